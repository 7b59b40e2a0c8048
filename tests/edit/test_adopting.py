"""A snapshot that a served codebook comes to hold; its readers wait for copies alone.

Whatever interrupts it, the codebook holds what it held, or all of the new.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_streams import bits, state
from grace_edit.codebook import adopting, redo, snapshot
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import CapacityError
from sketched_books import agree, make_small_ones_worth_a_sketch, since_fit

from grace_kernels import Sketch

WIDTH = 8


def book(entries: int, *, seed: int = 0, capacity: int = 600) -> Codebook:
    """Return a codebook of made-up entries."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(entries, WIDTH, generator=draw)
    labels = [[number % 7] for number in range(entries)]
    return Codebook.from_tensors(
        keys,
        torch.randn(entries, 3, generator=draw),
        torch.ones(entries),
        labels,
        capacity=capacity,
    )


def content(of: Codebook) -> Any:
    tensors, records = snapshot.content_of(of.storage)
    named = {n: bits(t) for n, t in tensors.items() if not n.startswith(("sketch.", "hit_"))}
    return named, records, snapshot.settings_of(of.storage), of.ids, of.labels, of.capacity


def changed(of: Codebook) -> Codebook:
    """Return it after a few changes, a dead slot among them."""
    of.insert(torch.full((WIDTH,), 50.0), [3], torch.zeros(3))
    of.insert(torch.full((WIDTH,), 70.0), [9], torch.ones(3))
    of.delete(4)
    return of


class CountingLock:
    """A lock that counts the functions of Python that run while it is held."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.calls = lock, 0

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event == "call"

    def __enter__(self) -> None:
        self.lock.__enter__()
        sys.setprofile(self._called)

    def __exit__(self, *given: Any) -> None:
        sys.setprofile(None)
        self.lock.__exit__(*given)


@pytest.mark.parametrize("other_seed", [0, 1], ids=["few rows differ", "all rows differ"])
def test_what_readers_wait_for_is_no_more_work_for_more_entries(
    other_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    calls = []
    for entries in (100, 500):
        served = book(entries)
        other = changed(book(entries, seed=other_seed))
        served.storage.lock = counting = CountingLock(served.storage.lock)  # type: ignore[assignment]
        written = adopting.adopt(served.storage, other.storage)
        served.storage.lock = counting.lock
        some, every = {4, entries, entries + 1}, set(range(entries + 2))
        assert written == (every if other_seed else some)
        assert content(served)[:5] == content(changed(book(entries, seed=other_seed)))[:5]
        calls.append(counting.calls)
    assert 0 < calls[0] == calls[1]


@pytest.mark.parametrize(
    ("own", "new"),
    [
        ((90, 600), (400, 600)),
        ((400, 600), (90, 600)),
        ((90, 100), (400, 600)),
        ((5, 600), (5, 90)),
    ],
    ids=["more", "fewer", "another capacity", "a smaller one"],
)
def test_what_was_adopted_is_held_with_its_sketch_and_can_be_edited(
    own: tuple[int, int], new: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    served = book(own[0], capacity=own[1])
    served.storage.slots.maintain_sketch()
    before = served.keys.data_ptr(), served.version
    other = changed(book(new[0], seed=1, capacity=new[1]))
    adopting.adopt(served.storage, other.storage)
    wanted = changed(book(new[0], seed=1, capacity=new[1]))
    assert content(served)[:2] == content(wanted)[:2]
    assert served.labels == wanted.labels
    assert served.capacity == new[1]
    assert (served.keys.data_ptr() == before[0]) == (own[1] == new[1])
    assert served.version > before[1]
    served.check()
    if since_fit(served).slots:
        agree(served)
    served.insert(torch.full((WIDTH,), -60.0), [3], torch.ones(3))
    served.check()


def test_nothing_is_adopted_by_nothing() -> None:
    own, new = Codebook(WIDTH, 3), Codebook(WIDTH, 3)
    assert adopting.adopt(own.storage, new.storage) == set()
    assert own.entries == 0


def test_a_frozen_codebook_keeps_its_memory_and_refuses_more_than_it_holds() -> None:
    served, other = book(40, capacity=64), changed(book(3, seed=1, capacity=20))
    served.frozen = True
    place = served.keys.data_ptr()
    adopting.adopt(served.storage, other.storage)
    assert (served.keys.data_ptr(), served.capacity) == (place, 64)
    assert served.ids == changed(book(3, seed=1, capacity=20)).ids
    served.check()
    with pytest.raises(CapacityError, match="frozen and has 64"):
        adopting.adopt(served.storage, book(3, capacity=65).storage)


class Interrupted(BaseException):
    """Raised between two lines, as a signal is."""


_LET_BE = ("transactions", "tables")  # what ends a transaction, and counts


class InterruptingLock:
    """A lock under which the `at`-th line of the codebook's code is not run: it raises instead."""

    def __init__(self, lock: Any, at: int) -> None:
        self.lock, self.left, self.depth = lock, at, 0

    def __enter__(self) -> None:
        self.lock.__enter__()
        self.depth += 1
        if self.depth == 1 and self.left > 0:
            frame: Any = sys._getframe(1)
            while frame is not None:
                frame.f_trace = self._traced(frame)
                frame = frame.f_back
            sys.settrace(lambda frame, event, argument: self._traced(frame))

    def __exit__(self, *given: Any) -> None:
        sys.settrace(None)
        self.depth -= 1
        self.lock.__exit__(*given)

    def _traced(self, frame: Any) -> Any:
        file, code = Path(frame.f_code.co_filename), frame.f_code
        ours = file.parent == Path(adopting.__file__).parent and file.stem not in _LET_BE
        ours = (ours and code.co_name != "end") or code is Sketch.copy_.__code__
        return self._line if ours else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Interrupted
        return self._line


def interrupted_everywhere(
    old: Codebook, change: Callable[[Codebook], Any], *, stride: int = 1
) -> int:
    """Interrupt a change of a codebook at each line in turn; return how many there were."""
    whole = copy.deepcopy(old)
    change(whole)
    before, after = state(old), state(whole)
    assert before != after
    at = 1
    while True:
        served = copy.deepcopy(old)
        places = [tensor.data_ptr() for tensor in (served.keys, served.values, served.radii)]
        lock, outer = served.storage.lock, sys.gettrace()
        served.storage.lock = InterruptingLock(lock, at)  # type: ignore[assignment]
        try:
            change(served)
            return at - 1
        except Interrupted:
            pass
        finally:
            served.storage.lock = lock
            sys.settrace(outer)
        now = state(served)
        changed = now == after
        assert changed or now == before, at
        if since_fit(served).slots:
            agree(served)
        assert (served.version > old.version) == changed, at
        # An undo that is lost misleads nobody; one that leads to what is no more would.
        steps = served.storage.journal.steps
        assert steps == 0 or (steps == old.storage.journal.steps and not changed), at
        if not changed:
            assert [t.data_ptr() for t in (served.keys, served.values, served.radii)] == places
            change(served)
            assert state(served) == after
        served.check()
        at += stride


def served_book() -> Codebook:
    served = book(50, capacity=90)
    served.storage.slots.maintain_sketch()
    served.insert(torch.full((WIDTH,), 30.0), [5], torch.ones(3))
    return served


@pytest.mark.parametrize(
    ("seed", "capacity"),
    [(0, 90), (1, 200)],
    ids=["the same memory", "other memory"],
)
def test_an_interruption_at_any_line_leaves_the_old_codebook_or_the_new_one(
    seed: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    new = changed(book(60, seed=seed, capacity=capacity))
    new.storage.slots.maintain_sketch()
    if not seed:
        scales = since_fit(new).slots, since_fit(served_book()).slots
        assert scales[0] > scales[1] > 0  # fitted to other keys than those of the one served

    def change(served: Codebook) -> None:
        adopting.adopt(served.storage, copy.deepcopy(new).storage)

    assert interrupted_everywhere(served_book(), change) > 30


def test_an_interruption_of_a_change_that_is_followed_leaves_all_of_it_or_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    records = []

    class Recorder:
        def commit(self, storage: Any, places: Any) -> None:
            records.append(redo.render(storage, places))

        def settled(self, storage: Any, *, anew: bool = False) -> None: ...

    other = served_book()
    other.storage.watcher = Recorder()  # type: ignore[assignment]
    other.delete(4)
    lines = interrupted_everywhere(
        served_book(), lambda served: redo.apply(served.storage, records[0]), stride=5
    )
    assert lines > 100
