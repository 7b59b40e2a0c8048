"""A snapshot that a served codebook comes to hold; its readers wait for copies alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from codebook_streams import bits
from grace_edit.codebook import adopting, snapshot
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import CapacityError
from sketched_books import agree, make_small_ones_worth_a_sketch, since_fit

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
