"""No edit is lost: repair, verified values, and what happens when something goes wrong in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from codebook_streams import Stream, bits, entries, state
from grace_edit.codebook import retention
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.queries import Queries
from grace_edit.codebook.records import Edit
from grace_edit.codebook.storage import Storage
from torch import Tensor


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((2,), float(number))


def lost(book: Codebook) -> list[int]:
    """Return the live edits that no entry of their label answers."""
    index, _ = book.lookup(torch.stack([book.query_of(id) for id in book.ids]))
    labels = book.labels
    return [
        id
        for id, slot in zip(book.ids, index.tolist(), strict=True)
        if slot < 0 or labels[slot] != book.edit(id).label
    ]


@pytest.mark.parametrize(
    ("seed", "dim", "spread", "labels", "drift"),
    [
        pytest.param(0, 2, 1.0, 2, 0.0, id="crowded plane"),
        pytest.param(1, 3, 1.5, 3, 0.1, id="with drift"),
        pytest.param(2, 8, 0.8, 4, 0.0, id="more dimensions"),
    ],
)
def test_every_promise_holds_after_every_one_of_500_conflicting_edits(
    seed: int, dim: int, spread: float, labels: int, drift: float
) -> None:
    book = Codebook(dim, 2, capacity=4, drift=drift)
    stream = Stream(seed, dim=dim, spread=spread, labels=labels)
    cases: Counter[str | None] = Counter()
    for number in range(500):
        cases[book.insert(*stream.next()).case] += 1
        if number < 100 or number % 4 == 0:
            book.check()
        else:
            assert not lost(book)
    assert all(cases[case] >= 5 for case in ("add", "update", "expand", "absorb", "split")), cases


def test_where_the_nearest_decides_balls_overlap_and_every_promise_holds() -> None:
    book, stream = Codebook(3, 2, capacity=4, policy="nearest"), Stream(4, spread=1.0)
    cases: Counter[str | None] = Counter()
    for number in range(300):
        cases[book.insert(*stream.next()).case] += 1
        if number < 100 or number % 4 == 0:
            book.check()
        else:
            assert not lost(book)
    assert set(cases) == {"add", "update", "absorb"}
    live = book.radii[: int(book.count)]
    assert bool((live == 1.0).all())


def test_where_the_nearest_decides_a_query_between_two_edits_gets_the_nearer_ones_answer() -> None:
    book = Codebook(2, 2, policy="nearest")
    book.insert(vec(0, 0), [1], value(1))
    assert book.insert(vec(0.5, 0), [2], value(2)).case == "add"
    assert book.insert(vec(0, 0.5), [1], value(3)).case == "add"  # the same label: not expanded
    assert book.radii[:3].tolist() == [1.0, 1.0, 1.0]
    asked = torch.stack([vec(0.24, 0), vec(0.26, 0), vec(-0.9, 0), vec(1.5, 0), vec(1.6, 0)])
    assert book.lookup(asked)[0].tolist() == [0, 1, 0, 1, -1]


def test_where_the_nearest_decides_an_import_keeps_its_radius_until_an_edit_replaces_it() -> None:
    keys = torch.tensor([[0.0, 0.0], [0.3, 0.0]])
    radii = torch.tensor([0.4, 0.2])
    book = Codebook.from_tensors(keys, keys, radii, [[1], [2]], policy="nearest")
    book.insert(vec(0.1, 0), [3], value(3))
    assert torch.equal(book.radii[:2], radii)
    book.check()
    assert book.insert(vec(0.3, 0), [4], value(4)).case == "update"
    assert book.radii[1].item() == 1.0
    book.check()
    book.delete(3)
    assert torch.equal(book.radii[:2], radii)
    assert book.ids == [0, 1, 2]
    book.check()
    book.delete(0)
    assert book.ids == [1, 2]
    book.check()


def conflicting(count: int) -> Codebook:
    book, stream = Codebook(4, 2, capacity=16), Stream(3, dim=4, spread=1.2, labels=4)
    for _ in range(count):
        book.insert(*stream.next(repeats=0.0))
    return book


def test_a_stream_of_2000_conflicting_edits_loses_none() -> None:
    book = conflicting(2000)
    assert book.edits == 2000
    assert lost(book) == []
    book.check()


def test_without_repair_the_same_stream_would_lose_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "repair", lambda *_: False)
    book = conflicting(2000)
    assert len(lost(book)) > 200
    with pytest.raises(AssertionError, match="edit"):
        book.check()


def test_repair_goes_in_order_of_id_until_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair as the rule reads, edit by edit over and over, gives the same codebook."""
    stream = Stream(6, dim=2, spread=1.0, labels=3)  # here the order makes a difference
    fast, slow = Codebook(2, 2), Codebook(2, 2)
    passes = 0

    def literal(storage: Storage, affected: Any, answers: Any, by: int) -> bool:
        """Look every live edit up, in passes over all of them, and repair those that lost."""
        nonlocal passes
        changed = True
        while changed:
            changed, passes = False, passes + 1
            for id in storage.live_ids():
                edit = storage.edit(id)
                slot = int(storage.lookup(storage.query_of(edit)[None])[0])
                entry = storage.entry(slot)
                if entry is not None and entry.label == edit.label:
                    retention.accept(storage, edit, slot, entry.value_id)
                else:
                    one_by_one(storage, [id], answers, by)
                    changed = True
        return False

    def noted(self: Queries, key: Tensor, slot: int) -> list[int]:
        draw(self, key, slot)
        return []  # the passes find them

    one_by_one, draw = retention.repair, Queries.draw
    for _ in range(200):
        edit = stream.next()
        fast.insert(*edit)
        with monkeypatch.context() as patched:
            patched.setattr(retention, "repair", literal)
            patched.setattr(Queries, "draw", noted)
            slow.insert(*edit)
        assert entries(fast) == entries(slow)
    assert passes > 210  # it had to go over them again, often enough


def test_a_moved_edit_stays_where_its_model_agrees_and_else_keeps_its_value() -> None:
    for agrees in (True, False):
        book, asked = Codebook(2, 2), []

        def answers(edit: Edit, slot: int, agrees: bool = agrees) -> bool:
            asked.append((edit.id, slot, edit.label))  # noqa: B023
            return agrees

        book.commit(book.propose(vec(0, 0), [1]), value(1), answers=answers)
        book.commit(book.propose(vec(1.4, 0), [1]), None, answers=answers)  # expands entry 0
        assert asked == []
        proposal = book.propose(vec(2.2, 0), [1], own_entry=True)
        book.commit(proposal, value(2), answers=answers)  # nearer to edit 1, same label
        assert asked == [(1, 1, (1,))]
        slot = book.edit(1).slot
        assert slot == (1 if agrees else 2)
        assert torch.equal(book.values[slot], value(2) if agrees else value(1))
        assert book.entries == (2 if agrees else 3)
        book.check()


def test_a_tie_with_a_new_entry_in_a_lower_slot_is_noticed() -> None:
    book = Codebook(2, 2)
    book.insert(vec(10, 10), [9], value(9))
    book.insert(vec(-1, 0), [1], value(1))
    book.insert(vec(0, 0), [1], value(1))
    book.delete(0)
    assert book.insert(vec(1, 0), [2], value(2)).slot == 0  # as far from edit 2 as its entry is
    assert book.labels[book.edit(2).slot] == (1,)
    assert book.entries == 3
    book.check()


def test_a_value_that_is_known_to_answer_an_edit_is_not_tried_again() -> None:
    book = Codebook(2, 2)

    def answers(edit: Edit, slot: int) -> bool:
        raise AssertionError("the value is known to answer")

    for point in (vec(0, 0), vec(1.0, 0), vec(1.2, 0)):
        proposal = book.propose(point, [1])
        book.commit(proposal, value(1) if proposal.slot < 0 else None, answers=answers)
    # Uncovers edits 1 and 2; the entry that edit 1 gets has the value that answered both.
    assert book.commit(book.propose(vec(0, -1.2), [2]), value(2), answers=answers).case == "split"
    assert [book.members(slot) for slot in range(3)] == [(0,), (3,), (1, 2)]
    book.check()


def test_a_value_trained_for_all_members_replaces_the_old_one() -> None:
    book = Codebook(2, 2)

    def answers(edit: Edit, slot: int) -> bool:
        raise AssertionError("every member was verified")

    book.commit(book.propose(vec(0, 0), [1]), value(1), answers=answers)
    proposal = book.propose(vec(0.5, 0), [1])
    assert (proposal.case, proposal.members) == ("absorb", (0,))
    with book.transaction():
        result = book.commit(proposal, value(2), answers=answers)
        book.record(replace(result, loss_start=3.0, loss_end=0.5, steps=4))
    result = book.edit(result.id).result
    assert (result.loss_start, result.loss_end, result.steps) == (3.0, 0.5, 4)
    assert torch.equal(book.values[0], value(2))
    assert book.entries == 1
    book.check()
    book.undo()
    assert torch.equal(book.values[0], value(1))
    book.check()


def test_deleting_gives_a_member_its_own_entry_where_the_value_was_not_verified() -> None:
    book = Codebook(2, 2)

    def yes(edit: Edit, slot: int) -> bool:
        return True

    book.commit(book.propose(vec(0, 0), [1]), value(1), answers=yes)
    # The value of entry 0 does not answer this one, so the editor gave it an entry of its own.
    book.commit(book.propose(vec(0.6, 0), [1], own_entry=True), value(2), answers=yes)
    book.commit(book.propose(vec(0.9, 0), [1]), None, answers=yes)  # absorbed by entry 1
    assert book.members(1) == (1, 2)
    book.delete(1)
    # Now edit 2 would be absorbed by entry 0, whose value nobody tried on it.
    assert book.entries == 2
    assert torch.equal(book.values[book.edit(2).slot], value(2))
    assert book.edit(2).slot != book.edit(0).slot
    book.check()


def test_without_a_model_an_equal_label_is_enough_when_an_edit_is_deleted() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.commit(book.propose(vec(0.6, 0), [1], own_entry=True), value(2))
    book.insert(vec(0.9, 0), [1], value(3))
    book.delete(1)
    assert book.members(0) == (0, 2)
    assert book.entries == 1
    book.check()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_exception_out_of_the_model_takes_everything_back_to_the_bit(
    error: type[BaseException],
) -> None:
    interrupted = 0
    book, stream = Codebook(2, 2, capacity=4), Stream(6, dim=2, labels=1)
    calls = 0

    def answers(edit: Edit, slot: int) -> bool:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise error
        return calls % 2 == 0

    for _ in range(150):
        query, label, given, prompt = stream.next()
        # Entries of their own within a ball of the same label draw its members away.
        proposal = book.propose(query, label, prompt, own_entry=stream.random.random() < 0.4)
        given = given if proposal.slot < 0 or proposal.case == "update" else None
        before, version, next_id = state(book), book.version, book.storage.next_id
        try:
            book.commit(proposal, given, answers=answers)
        except error:
            interrupted += 1
            assert state(book) == before
            assert (book.version, book.storage.next_id) == (version, next_id)
            book.commit(proposal, given, answers=lambda edit, slot: True)  # it is still good
        book.check()
    assert interrupted > 5


def test_values_of_superseded_edits_come_back_with_them() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(0, 0), [2], value(2))
    book.insert(vec(0, 0), [3], value(3))
    assert bits(torch.stack(list(book.storage.retired_values.values()))) == bits(
        torch.stack([value(1), value(2)])
    )
    book.delete(2)
    assert (book.labels[0], book.ids) == ((2,), [1])
    assert torch.equal(book.values[0], value(2))
    book.delete(1)
    assert (book.labels[0], book.ids) == ((1,), [0])
    assert torch.equal(book.values[0], value(1))
    assert not book.storage.retired_values
    book.check()
