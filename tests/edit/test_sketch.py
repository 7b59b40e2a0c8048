"""The sketch that a codebook keeps is true after every change, whoever changes and looks."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sketched_books
import torch
from codebook_streams import VALUE_DIM, Stream, state
from grace_edit import Codebook, QueryPlan
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.codebook import sketch_upkeep as sketching
from grace_edit.codebook import store
from sketched_books import WORTH, add, agree, since_fit, spread_out
from tiny_models import run_of
from torch.utils._python_dispatch import TorchDispatchMode

from grace_kernels import Sketch
from grace_kernels.sketch import OUTLIERS, worthwhile


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sketched_books.make_small_ones_worth_a_sketch(monkeypatch)


def test_the_rule_is_about_rows_and_not_yet_measured() -> None:
    assert [worthwhile(rows) for rows in (0, 4095, 4096, 10**6)] == [False] * 2 + [True] * 2


def test_a_sketch_stands_by_and_covers_nothing_until_enough_slots_are_in_use() -> None:
    assert Codebook(4, 2, capacity=WORTH - 1).sketch is None
    book = Codebook(4, VALUE_DIM, capacity=WORTH)
    stands = book.sketch
    assert stands is not None
    where = [tensor.data_ptr() for tensor in stands.tensors()]
    for i in range(WORTH):
        assert (int(stands.covered), stands.active) == (0, False)
        book.insert(torch.full((4,), 9.0 * i), [i], torch.zeros(VALUE_DIM))
        agree(book, i)
    assert (int(stands.covered), stands.active) == (WORTH, True)
    assert book.sketch is stands
    assert [tensor.data_ptr() for tensor in stands.tensors()] == where
    assert agree(book) <= 12 * (OUTLIERS + 3)
    book.check()


@pytest.mark.parametrize("policy", ["default", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sketch_stays_true_whatever_is_done_to_a_codebook(
    policy: str, seed: int, tmp_path: Path
) -> None:
    stream = Stream(seed, spread=6.0, labels=4)
    choose = stream.random
    book = Codebook(3, VALUE_DIM, capacity=WORTH // 2, policy=policy, drift=0.01)
    done: dict[str, int] = {}
    capacities, states = set(), set()
    for step in range(220):
        kind = choose.choice(["insert"] * 9 + ["delete", "undo", "undo", "fail", "batch", "purge"])
        kind = "load" if step % 60 == 59 else kind
        query, label, value, prompt = stream.next()
        if kind == "insert":
            book.insert(query, label, value, prompt)
        elif kind in ("delete", "purge") and book.ids:
            book.delete(choose.choice(book.ids), purge=kind == "purge")
        elif kind == "undo" and book.storage.journal.steps:
            book.undo()
        elif kind in ("fail", "batch"):
            before = state(book)
            try:
                with book.transaction():
                    for _ in range(choose.randrange(1, 30)):
                        query, label, value, prompt = stream.next()
                        book.insert(query, label, value, prompt)
                    agree(book, step)
                    if kind == "fail":
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert state(book) == before
        elif kind == "load":
            store.save(book, tmp_path, {})
            book, _ = store.load(tmp_path)
        done[kind] = done.get(kind, 0) + 1
        agree(book, step)
        capacities.add(book.capacity)
        states.add(None if book.sketch is None else book.sketch.active)
        if step % 20 == 0:
            book.check()
    book.check()
    assert len(done) == 7
    assert len(capacities) >= 3
    assert {None, True} <= states


def test_growth_takes_the_sketch_along_and_its_undo_takes_it_back() -> None:
    book = spread_out(WORTH - 1)
    assert book.sketch is None
    add(book, 1)  # a sketch is made, and fitted at once
    made = book.sketch
    assert made is not None
    assert (int(made.covered), made.active) == (WORTH, True)
    book.undo()
    assert (book.sketch, book.capacity) == (None, WORTH - 1)
    add(book, WORTH)
    grown = book.sketch
    assert grown is not None
    assert book.capacity == 4 * WORTH - 4
    assert (grown.capacity, int(grown.covered)) == (160, 2 * WORTH - 1)
    agree(book)
    book.undo()
    assert book.sketch is not None
    assert (book.sketch.capacity, int(book.sketch.covered)) == (96, 2 * WORTH - 2)
    agree(book)
    book.check()


def test_growth_amid_a_change_does_not_take_a_sketch_into_use_that_was_not_told_of_it() -> None:
    book = spread_out(WORTH)
    near = book.keys[3] + 0.01  # splits entry 3 and needs a new slot
    seen = []

    def answers(edit: Any, slot: int) -> bool:
        return True

    def looked(capacity: int) -> None:
        resize(capacity)
        assert book.sketch is not None
        seen.append((int(book.sketch.covered), slots.sketch_upkeep.up_to_date))

    slots = book.storage.slots
    resize, slots._resize = slots._resize, looked  # type: ignore[method-assign]
    plan = book.propose(near, [999])
    assert plan.case == "split"
    book.commit(plan, torch.zeros(VALUE_DIM), answers=answers)
    assert seen == [(0, False)]
    assert int(book.sketch.covered) == WORTH + 1  # type: ignore[union-attr]
    agree(book)


def test_a_lookup_amid_a_change_is_not_misled_and_the_sketch_is_back_at_its_end() -> None:
    book = spread_out(WORTH)
    slots = book.storage.slots
    with book.lock, book.transaction():
        key = book.keys[5].clone()
        slots.write_key(5, torch.full_like(key, 7.0))
        slots.write_radius(6, 9.0)
        assert not book.sketch.active  # type: ignore[union-attr]
        agree(book)
        assert book.lookup(torch.full_like(key, 7.1)[None])[0].tolist() == [5]
        with suppress(KeyboardInterrupt), book.transaction():
            slots.write_key(5, key)
            slots.write_key(8, key + 1)
            raise KeyboardInterrupt
        assert book.sketch.active  # type: ignore[union-attr]
        agree(book)
        assert book.lookup(torch.full_like(key, 7.1)[None])[0].tolist() == [5]
    agree(book)
    book.undo()
    assert book.lookup(key[None])[0].tolist() == [5]
    agree(book)


@pytest.mark.parametrize("where", ["extend", "update_radii_", "refit"])
@pytest.mark.parametrize("how", ["insert", "delete", "undo"])
def test_an_interruption_while_the_sketch_is_told_misleads_nobody(
    where: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = spread_out(WORTH, capacity=4 * WORTH)
    add(book, WORTH - 1 if where == "refit" and how == "insert" else 20)
    if where == "refit" and how != "insert":
        since_fit(book).unknown = 1000  # fitted anew at the next change
    real, calls = getattr(Sketch, where), 0

    def interrupted(self: Sketch, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if where == "refit":
            real(self, *args, **kwargs)
        raise KeyboardInterrupt

    before = state(book)
    monkeypatch.setattr(Sketch, where, interrupted)
    change = {
        "insert": lambda: add(book, 1),
        "delete": lambda: book.delete(book.ids[-3]),
        "undo": book.undo,
    }[how]
    with pytest.raises(KeyboardInterrupt):
        change()
    assert calls > 0
    if how != "undo":
        assert state(book) == before
    agree(book)
    monkeypatch.undo()
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= WORTH)
    add(book, 1)
    assert book.sketch.active  # type: ignore[union-attr]
    agree(book)
    book.check()


def test_changes_and_fits_within_the_capacity_write_into_the_same_memory() -> None:
    book = Codebook(16, VALUE_DIM, capacity=4 * WORTH, radius=0.5)
    assert book.sketch is not None
    before = [tensor.data_ptr() for tensor in book.sketch.tensors()]
    add(book, 3 * WORTH)
    for id in (5, 50, 100):
        book.delete(id)
    for _ in range(10):
        book.undo()
    assert since_fit(book).slots == 2 * WORTH
    assert [tensor.data_ptr() for tensor in book.sketch.tensors()] == before
    agree(book)


def test_a_served_lookup_with_a_sketch_reads_no_value_of_it() -> None:
    book = spread_out(WORTH)
    adaptor = GraceAdaptor(book, query="last", replace="last")
    source, hidden = book.keys[:4].clone(), torch.zeros(4, VALUE_DIM)
    plan = QueryPlan(torch.arange(4), torch.arange(4), torch.arange(4) + 1)
    with adaptor.using(plan=plan), torch.no_grad(), Dispatched() as seen:
        out = adaptor(source, hidden)
    assert torch.equal(out, book.values[:4])
    assert "pruned_adapt_" in seen.names
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(seen.names)


class Dispatched(TorchDispatchMode):
    """Note the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_half_the_width_have_a_sketch_too(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(WORTH, 24, generator=draw).to(dtype)
    book = Codebook.from_tensors(
        keys, keys[:, :VALUE_DIM], torch.full((WORTH,), 0.5), [[i] for i in range(WORTH)]
    )
    for i in range(5):
        book.insert(torch.randn(24, generator=draw).to(dtype), [1000 + i], torch.zeros(VALUE_DIM))
        agree(book, i)
    assert book.sketch is not None
    assert (book.sketch.dtype, book.sketch.active) == (dtype, True)


def test_a_codebook_that_is_moved_takes_its_sketch_along() -> None:
    book = spread_out(WORTH)
    assert book.sketch is not None
    held = book.sketch.active, book.sketch.rows
    book.to("cpu")
    agree(book)
    with torch.inference_mode():
        book.to("meta")
    assert {tensor.device.type for tensor in book.sketch.tensors()} == {"meta"}
    assert not any(tensor.is_inference() for tensor in book.sketch.tensors())
    assert (book.sketch.active, book.sketch.rows) == held


@pytest.mark.parametrize("start", [WORTH // 2, WORTH], ids=["made in it", "grown in it"])
def test_a_sketch_made_or_grown_in_inference_mode_is_kept_true_outside_of_it(start: int) -> None:
    book = Codebook(3, VALUE_DIM, capacity=start, radius=0.2)
    draw = torch.Generator().manual_seed(0)
    for i in range(3 * WORTH):
        with torch.inference_mode(start - 5 < i < start + 20):
            book.insert(10 * torch.randn(3, generator=draw), [i], torch.zeros(VALUE_DIM))
            if i % 9 == 0:
                book.undo()
    assert book.capacity > start
    assert book.sketch is not None
    assert book.sketch.active
    assert not any(tensor.is_inference() for tensor in book.sketch.tensors())
    agree(book)


def test_threads_are_served_rightly_while_another_one_edits() -> None:
    book = spread_out(2 * WORTH, capacity=8 * WORTH)
    wrong: list[Any] = []
    stop = threading.Event()

    def serve(first: int) -> None:
        try:
            while not stop.is_set():
                index, distance = book.lookup(book.keys[first : first + 8])
                if index.tolist() != list(range(first, first + 8)) or distance.any():
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 40)]
    for thread in threads:
        thread.start()
    try:
        add(book, 2 * WORTH)  # fitted anew on the way
        for _ in range(WORTH):
            book.undo()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert since_fit(book).slots == 4 * WORTH
    agree(book)


def test_rekeying_gives_the_new_keys_a_sketch(edited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= 2)
    editor = edited("gpt2", capacity=8)
    for start in (10, 20, 30):
        assert editor.edit(run_of(start, 4), run_of(start + 8, 1)).success
    old = editor.codebook.sketch
    assert old.active
    editor.rekey()
    assert editor.codebook.sketch is not old
    assert editor.codebook.sketch.active
    agree(editor.codebook)
    editor.codebook.check()
