"""Requests beside changes of several layers: answered as of before or after, in every layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, rekeying
from grace_edit.reach import Reach
from test_threads import LONG, Gate, Work
from text_models import QUESTION, TARGET, text_editor
from tiny_models import generated, logits_of, run_of

LOWER, UPPER = "transformer.h.0.mlp", "transformer.h.2.mlp"
ONE, TO_ONE, TO_TWO = run_of(10, 4), run_of(30, 3), run_of(55, 3)


@pytest.fixture
def pair(trained):
    """Return the editors of two layers, the upper of which answers a prompt."""
    lower = GraceEditor(trained("gpt2"), None, GraceConfig(layer=LOWER, radius=0.05))
    upper = lower.add_layer(UPPER)
    assert upper.edit(ONE, TO_ONE).success
    return lower, upper


@pytest.fixture
def beside(monkeypatch):
    """Return a function that has another thread ask while a change is being settled."""

    def let(ask: Callable[[], Any]) -> list[Any]:
        seen: list[Any] = []
        see_to = Reach.see_to

        def looked(*args: Any) -> None:
            seen.append(Work(ask).result())
            try:
                see_to(*args)
            finally:
                seen.append(Work(ask).result())

        monkeypatch.setattr(Reach, "see_to", looked)
        return seen

    return let


class Halfway:
    """A request that waits between the two layers until it may go on.

    Args:
        ask: makes it; None: by a forward.
    """

    def __init__(self, editor: GraceEditor, ask: Callable[[], Any] | None = None) -> None:
        gate, model = Gate(), editor.model
        self._gate, here = gate, threading.get_ident()

        def stop(module: Any, args: Any) -> None:
            if threading.get_ident() != here:
                gate.stop()

        self._hook = model.transformer.h[1].register_forward_pre_hook(stop)
        self._work = Work(ask or (lambda: logits_of(model, ONE)))
        assert gate.reached.wait(LONG)
        self._hook.remove()

    def result(self) -> torch.Tensor:
        self._gate.opened.set()
        found: torch.Tensor = self._work.result()
        return found


def test_a_change_is_seen_in_all_layers_or_in_none(pair, beside):
    lower, upper = pair
    key = upper.codebook.query_of(0)
    before = logits_of(lower.model, ONE)
    seen = beside(lambda: logits_of(lower.model, ONE))
    waiting = Halfway(lower)
    assert lower.edit(ONE, TO_ONE).success
    assert not torch.equal(upper.codebook.query_of(0), key)  # both layers have changed
    after = logits_of(lower.model, ONE)
    assert not torch.equal(after, before)
    assert len(seen) == 2
    assert all(torch.equal(each, before) for each in seen)
    assert torch.equal(waiting.result(), before)

    waiting = Halfway(lower)
    lower.undo()
    assert torch.equal(logits_of(lower.model, ONE), before)
    assert torch.equal(waiting.result(), after)

    first, waiting = Halfway(lower), Halfway(lower)
    assert lower.edit(ONE, TO_ONE).success
    assert torch.equal(first.result(), before)
    lower.delete(lower.codebook.ids[0])
    assert lower.edit(ONE, TO_ONE).success
    assert torch.equal(waiting.result(), before)  # however much has changed since
    as_before = [torch.equal(each, before) for each in seen[2:]]
    assert as_before == [True, True, False, False, True, True]
    assert lower.adaptor.moments.used == 0


def test_a_witness_is_told_of_no_entry_that_is_gone(pair):
    lower, upper = pair
    told = []

    def see(book: Any, index: torch.Tensor, *_: Any) -> None:
        told.append(book.edit_of_slot(int(index[0])).id)

    def ask() -> torch.Tensor:
        with upper.adaptor.using(witness=see):
            return logits_of(lower.model, ONE)

    before = Work(ask).result()
    assert told == [0]
    first, waiting = Halfway(lower, ask), Halfway(lower, ask)
    upper.delete(0)
    assert torch.equal(first.result(), before)
    assert upper.edit(TO_TWO, TO_ONE).success  # in its slot
    assert torch.equal(waiting.result(), before)
    assert told == [0]


def test_a_rekeying_that_is_refused_inside_a_change_shows_nothing_of_it(pair):
    lower, upper = pair
    before = logits_of(lower.model, ONE)
    with lower.layers.changing():
        upper.delete(0)
        with pytest.raises(ValueError, match="inside a transaction"):
            lower.rekey()
        assert torch.equal(Work(lambda: logits_of(lower.model, ONE)).result(), before)
    assert not torch.equal(logits_of(lower.model, ONE), before)


class Interrupted:
    """A lock that somebody presses Ctrl-C at, once it is taken outside a `with` block."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.release = self._lock.release

    def acquire(self) -> None:
        self._lock.acquire()
        raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


def test_an_interrupt_of_a_change_that_is_shown_keeps_nobody_waiting(pair, monkeypatch):
    lower, upper = pair
    before = logits_of(upper.model, ONE)
    with monkeypatch.context() as patch:
        patch.setattr(upper.family.adaptor.moments, "_lock", lock := Interrupted())
        with pytest.raises(KeyboardInterrupt):
            lower.edit(ONE, TO_TWO)
        Work(lock.__enter__).result()
    assert torch.equal(Work(lambda: logits_of(upper.model, ONE)).result(), before)


def test_a_change_that_is_refused_is_never_seen(pair, beside):
    lower, _ = pair
    seen = beside(lambda: (logits_of(lower.model, ONE), generated(lower.model, [ONE], 3)))
    before = logits_of(lower.model, ONE)
    waiting = Halfway(lower)
    assert not lower.edit(ONE, TO_TWO).success
    assert len(seen) == 2
    for logits, tokens in seen:
        assert torch.equal(logits, before)
        assert tokens == [TO_ONE]
    assert torch.equal(waiting.result(), before)
    assert torch.equal(logits_of(lower.model, ONE), before)


def test_a_batch_of_several_layers_is_seen_when_all_of_it_is_done(pair, beside):
    lower, _ = pair
    before = generated(lower.model, [ONE, TO_TWO], 3)
    seen = beside(lambda: generated(lower.model, [ONE, TO_TWO], 3))
    results = lower.edit_batch([(TO_TWO, TO_ONE), (ONE, TO_ONE)])
    assert all(result.success for result in results)
    assert seen == [before] * 4
    assert generated(lower.model, [ONE, TO_TWO], 3) == [TO_ONE, TO_ONE] != before


def test_requests_beside_a_rekeying_are_answered_as_before(pair, monkeypatch):
    lower, upper = pair
    assert lower.edit(TO_TWO, TO_ONE).success
    seen = []
    find = rekeying.find_unproven

    def looked(*args: Any) -> Any:
        seen.append(Work(lambda: logits_of(lower.model, ONE)).result())
        return find(*args)

    monkeypatch.setattr(rekeying, "find_unproven", looked)
    with torch.no_grad():
        lower.model.transformer.h[1].mlp.c_fc.weight.mul_(1.05)  # as rounding would, and more
    assert not upper.explain(ONE).hit
    before = logits_of(lower.model, ONE)
    waiting = Halfway(lower)
    lower.rekey()
    assert len(seen) == 2
    assert all(torch.equal(each, before) for each in seen)
    assert torch.equal(waiting.result(), before)
    assert generated(lower.model, [ONE], 3) == [TO_ONE]


def test_requests_by_text_are_answered_as_of_one_time_too(trained, beside):
    lower = text_editor(trained("gpt2"), "gpt2", contexts=0)
    upper = lower.add_layer(UPPER)
    assert upper.edit(QUESTION, TARGET).success
    before = lower.answer(QUESTION, 2)
    seen = beside(lambda: lower.answer(QUESTION, 2))
    upper.delete(0)
    assert lower.answer(QUESTION, 2) != before
    assert seen == [before, before]
    lower.undo()
    assert lower.answer(QUESTION, 2) == before
