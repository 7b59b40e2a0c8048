"""Deleting is replaying, undo is exact, transactions are all or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, entries, fed_anew, state
from grace_edit.codebook import replay
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import UndoError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((2,), float(number))


def interrupted(book: Codebook, work: Callable[[], object]) -> None:
    with book.transaction():
        work()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("seed", "policy", "drift"),
    [
        pytest.param(0, "default", 0.0, id="default"),
        pytest.param(1, "default", 0.1, id="default with drift"),
        pytest.param(2, "paper", 0.0, id="paper"),
        pytest.param(3, "nearest", 0.0, id="nearest"),
    ],
)
def test_deleting_equals_feeding_the_remaining_edits_to_a_new_codebook(
    seed: int, policy: str, drift: float
) -> None:
    book = Codebook(3, VALUE_DIM, policy=policy, capacity=4, drift=drift)
    stream = Stream(seed)
    repeats = 0.0 if policy == "paper" else 0.15  # the paper's ties depend on the order of slots
    for _ in range(80):
        book.insert(*stream.next(repeats))
    for number in range(14):
        remaining = [edit.id for edit in book.history if edit.state != "deleted"]
        book.delete(stream.random.choice(remaining), purge=number % 2 == 0)
        book.check()
        fresh, names = fed_anew(book)
        assert entries(book) == entries(fresh, names)
        for _ in range(2):
            book.insert(*stream.next(repeats))
            book.check()


def test_an_exact_tie_falls_as_in_a_new_codebook_although_slots_were_used_before() -> None:
    book = Codebook(2, 2)
    for point, label in ((vec(0, 0), 0), (vec(-1, 0), 0), (vec(0, -0.5), 0), (vec(1, -1), 1)):
        book.insert(point, [label], value(label))
    assert [book.edit(id).slot for id in (1, 3)] == [2, 1]
    book.delete(0)  # edit 2 is now as far from the entry of edit 1 as from that of edit 3
    fresh, names = fed_anew(book)
    assert entries(book) == entries(fresh, names)
    book.check()


def test_deleting_every_edit_in_any_order_leaves_nothing() -> None:
    book, stream = Codebook(3, 2), Stream(7)
    for _ in range(40):
        book.insert(*stream.next())
    everything = [edit.id for edit in book.history]
    stream.random.shuffle(everything)
    for id in everything:
        book.delete(id)
    assert (book.entries, book.edits, int(book.count), book.ids) == (0, 0, 0, [])
    assert not book.keys.any()
    assert not book.values.any()
    assert bool((book.radii == -math.inf).all())
    assert not book.storage.retired_values
    assert len(book.history) == 40  # deleted, not purged
    book.check()


def test_deleting_gives_an_entry_its_radius_back() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(0.5, 0), [2], value(2))
    assert book.radii[0].item() == 0.25
    book.delete(1)
    assert book.radii[:2].tolist() == [1.0, -math.inf]
    assert int(book.count) == 1


def test_deleting_the_edit_that_made_an_entry_leaves_its_other_members_answered() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(0.5, 0), [1], value(2))
    book.delete(0)
    assert int(book.lookup(vec(0.5, 0)[None])[0]) == book.edit(1).slot
    assert torch.equal(book.values[book.edit(1).slot], value(1))  # the value it had all along
    assert int(book.lookup(vec(-0.6, 0)[None])[0]) == -1
    book.check()


def test_deleting_an_edit_brings_back_what_it_superseded() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1), prompt=[1])
    book.insert(vec(0.5, 0), [1], value(1), prompt=[2])
    before = entries(book)
    book.insert(vec(0, 0), [2], value(2), prompt=[1])
    assert book.ids == [2]
    book.delete(2)
    assert book.ids == [0, 1]
    assert entries(book) == before
    assert torch.equal(book.values[0], value(1))
    book.check()


def test_deleting_a_superseded_edit_keeps_it_from_coming_back() -> None:
    book = Codebook(2, 2)
    for label in (1, 2, 3):
        book.insert(vec(0, 0), [label], value(label))
    book.delete(1)
    book.delete(2)
    assert (book.ids, book.labels[0]) == ([0], (1,))
    book.check()


def test_where_the_nearest_decides_a_delete_frees_its_entry_and_replays_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book, stream = Codebook(3, 2, policy="nearest"), Stream(9)
    for _ in range(60):
        book.insert(*stream.next(0.0))
    book.insert(book.query_of(7), [9], value(9))
    with monkeypatch.context() as patched:
        patched.setattr(replay, "everything", lambda storage: pytest.fail("replayed"))
        for id in (59, 3, 31):
            slot = book.edit(id).slot
            book.delete(id)
            assert book.labels[slot : slot + 1] in ([None], [])
            assert not book.keys[slot].any()
            book.check()
    book.undo()
    assert 31 in book.ids
    book.delete(60)  # it superseded edit 7, which comes back
    assert 7 in book.ids
    book.check()


def test_ids_are_never_used_twice() -> None:
    book, stream, seen = Codebook(3, 2), Stream(8), set()
    for number in range(60):
        result = book.insert(*stream.next())
        assert result.id not in seen
        seen.add(result.id)
        if number % 5 == 4:
            book.undo()
        if number % 7 == 6:
            book.delete(book.ids[0], purge=number % 2 == 0)
    assert seen == set(range(60))


def test_undo_goes_back_step_by_step_to_the_bit() -> None:
    book, stream = Codebook(3, 2, capacity=2), Stream(9)
    states, versions = [state(book)], [book.version]
    for number in range(80):
        if number % 9 == 8:
            book.delete(stream.random.choice(book.ids))
        elif number % 13 == 12:
            with book.transaction():
                book.insert(*stream.next())
                book.delete(book.ids[0])
                book.insert(*stream.next())
        else:
            book.insert(*stream.next())
        states.append(state(book))
        versions.append(book.version)
    for before in reversed(states[:-1]):
        book.undo()
        assert state(book) == before
        versions.append(book.version)
    assert all(b > a for a, b in pairwise(versions))
    with pytest.raises(
        UndoError, match="cannot undo: nothing has changed since the codebook was made"
    ):
        book.undo()
    book.check()


def test_a_purge_erases_the_edit_and_ends_the_undo() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(40, 41), [77], value(5), prompt=[66])
    book.delete(1)
    assert book.edit(1).prompt == (66,)
    assert torch.equal(book.query_of(1), vec(40, 41))
    book.delete(1, purge=True)
    with pytest.raises(KeyError):
        book.edit(1)
    assert [edit.id for edit in book.history] == [0]
    for tensor in (book.storage.queries.vectors, book.keys, book.values):
        assert not bool((tensor >= 5).any())
    with pytest.raises(UndoError, match="cannot undo: nothing has changed since a purge"):
        book.undo()
    book.insert(vec(9, 9), [1], value(1))
    book.undo()
    assert book.ids == [0]
    book.check()


def test_a_transaction_is_one_step_of_undo() -> None:
    book, stream = Codebook(3, 2), Stream(10)
    for _ in range(10):
        book.insert(*stream.next())
    before = state(book)
    with book.transaction():
        for _ in range(20):
            book.insert(*stream.next())
        book.delete(3)
    book.undo()
    assert state(book) == before
    with book.transaction():
        pass
    book.undo()  # an empty transaction is no step
    assert book.edits < 10


def test_an_interrupted_transaction_leaves_nothing_behind_but_a_new_version() -> None:
    book, stream = Codebook(3, 2, capacity=4), Stream(11)
    for _ in range(30):
        book.insert(*stream.next())
    before, seen = state(book), book.version

    def work() -> None:
        nonlocal seen
        for _ in range(40):
            book.insert(*stream.next())
        book.delete(4, purge=True)
        seen = book.version

    with pytest.raises(KeyboardInterrupt):
        interrupted(book, work)
    assert state(book) == before
    assert book.version > seen  # what was served in between must not be taken for this state
    book.undo()
    book.check()


def test_a_failing_part_of_a_transaction_takes_back_only_itself() -> None:
    book, stream = Codebook(3, 2), Stream(12)
    with book.transaction():
        book.insert(*stream.next())
        middle = state(book)
        with pytest.raises(KeyboardInterrupt):
            interrupted(book, lambda: book.insert(*stream.next()))
        assert state(book) == middle
        with pytest.raises(UndoError, match="cannot undo inside a transaction"):
            book.undo()
    assert state(book) == middle
    book.undo()
    assert book.ids == []


def test_only_the_latest_steps_of_undo_are_kept() -> None:
    book, stream = Codebook(3, VALUE_DIM), Stream(14)
    assert book.undo_limit == 100
    book.undo_limit = 3
    states = []
    for _ in range(8):
        states.append(state(book))
        book.insert(*stream.next())
    assert book.storage.journal.steps == 3
    for expected in (states[7], states[6], states[5]):
        book.undo()
        assert state(book) == expected
    with pytest.raises(UndoError, match=r"only the last 3 steps were kept \(undo_limit\)"):
        book.undo()
    book.insert(*stream.next())
    book.undo_limit = 0  # what was kept goes at once
    with pytest.raises(UndoError, match="only the last 0 steps"):
        book.undo()
    book.delete(book.ids[0])
    assert book.storage.journal.steps == 0
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="undo_limit must be a whole number"):
            book.undo_limit = wrong  # type: ignore[assignment]
    book.check()


class AnyOrder(RuleBasedStateMachine):
    """Operations in any order, against a codebook fed anew and remembered states."""

    policy = "default"

    def __init__(self) -> None:
        super().__init__()
        self.book = Codebook(2, 2, capacity=1, policy=self.policy)
        self.past: list[dict[str, Any]] = []
        self.version = self.book.version

    coordinate = st.integers(-6, 6).map(lambda i: i / 4)

    @rule(
        x=coordinate,
        y=coordinate,
        label=st.integers(0, 2),
        prompt=st.none() | st.integers(0, 3),
        own=st.booleans(),
    )
    def insert(self, x: float, y: float, label: int, prompt: int | None, own: bool) -> None:
        self.past.append(state(self.book))
        prompts = None if prompt is None else [prompt]
        proposal = self.book.propose(vec(x, y), [label], prompts, own_entry=own and x > 0.5)
        result = self.book.commit(
            proposal, value(x + 10) if proposal.slot < 0 or y > 0 else value(y)
        )
        assert result.slot is not None
        assert self.book.edit_of_slot(result.slot).label == (label,)

    @precondition(lambda self: self.book.edits > 0)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        known = [edit.id for edit in self.book.history if edit.state != "deleted"]
        self.past.append(state(self.book))
        self.book.delete(data.draw(st.sampled_from(known)))
        fresh, names = fed_anew(self.book)
        assert entries(self.book) == entries(fresh, names)

    @precondition(lambda self: self.past)
    @rule()
    def undo(self) -> None:
        self.book.undo()
        assert state(self.book) == self.past.pop()

    @precondition(lambda self: self.book.edits > 0)
    @rule(x=coordinate)
    def fail(self, x: float) -> None:
        before = state(self.book)

        def work() -> None:
            self.book.insert(vec(x, x), [1], value(1))
            self.book.delete(self.book.ids[0], purge=True)

        with pytest.raises(KeyboardInterrupt):
            interrupted(self.book, work)
        assert state(self.book) == before

    @invariant()
    def every_promise_holds(self) -> None:
        self.book.check()
        assert self.book.version >= self.version
        self.version = self.book.version


class AnyOrderNearest(AnyOrder):
    """The same where the nearest decides."""

    policy = "nearest"


TestAnyOrder, TestAnyOrderNearest = AnyOrder.TestCase, AnyOrderNearest.TestCase
TestAnyOrder.settings = TestAnyOrderNearest.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_equal_bits_are_told_from_equal_numbers() -> None:
    assert bits(vec(0.0)) != bits(vec(-0.0))  # or the comparisons above would be weaker
