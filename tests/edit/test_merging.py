"""Two codebooks merged and compared, on random streams that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, insert_several, state
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.merging import MergeConflict, Merged, Prefer, diff, merge
from torch import Tensor


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((VALUE_DIM,), float(number))


def book_of(stream: Stream, edits: int, policy: str, verified: bool) -> Codebook:
    """A codebook with edits of one key and of several, superseded and deleted ones."""
    book = Codebook(stream.dim, VALUE_DIM, capacity=4, policy=policy)
    for number in range(edits):
        if stream.random.random() < 0.3:
            insert_several(book, stream)
        else:
            query, label, given, prompt = stream.next()
            proposal = book.propose(query, label, prompt)
            if verified and stream.random.random() < 0.7:
                if proposal.case in ("expand", "absorb"):
                    proposal = book.propose(query, label, prompt, own_entry=True)
                book.commit(proposal, given, answers=lambda edit, slot: edit.id % 2 == 0)
            else:
                book.insert(query, label, given, prompt)
        if number % 9 == 8:
            book.delete(stream.random.choice(book.ids))
    return book


def two(seed: int, policy: str = "default", verified: bool = True) -> tuple[Codebook, Codebook]:
    """Two codebooks whose edits share queries and prompts, with the same and other targets."""
    stream = Stream(seed, spread=1.2, labels=3)
    first = book_of(stream, 25, policy, verified)
    second = book_of(stream, 25, policy, verified)  # repeats queries of the first
    return first, second


def check_kept(book: Codebook, before: list[int], other: Codebook, merged: Merged) -> None:
    """Every live edit of both is live, was there already, or is listed; what is live answers."""
    book.check()
    listed = {pair.first.id for pair in merged.conflicts}
    assert set(before) - set(book.ids) <= listed
    lost = {pair.second.id for pair in merged.conflicts}
    live = set(book.ids)
    for edit in other.history:
        if not edit.live:
            continue
        made = set(merged.ids.get(edit.id, ()))
        assert made or edit.id in merged.same or edit.id in lost
        if not made <= live:  # a later edit, whose queries became the same here, has superseded it
            assert made - live <= listed
            continue
        if not made and edit.id in lost:
            continue
        # Each prompt, or else each query, is answered as it was over there.
        for key in (edit, *other.parts(edit.id)):
            answer = answer_to(book, key.prompt, other.query_of(key.id))
            assert answer == edit.label, (edit.id, key.id)


def answer_to(book: Codebook, prompt: Any, query: Tensor) -> Any:
    if prompt is not None:
        query = next(
            (book.query_of(edit.id) for edit in book.live_keys if edit.prompt == prompt), query
        )
    slot = int(book.lookup(query[None])[0])
    return None if slot < 0 else book.labels[slot]


@pytest.mark.parametrize("prefer", ["first", "last"])
@pytest.mark.parametrize("policy", ["default", "nearest"])
@pytest.mark.parametrize("seed", range(4))
def test_after_a_merge_every_edit_of_both_is_live_or_listed_and_all_that_live_answer(
    seed: int, policy: str, prefer: Prefer
) -> None:
    first, second = two(seed, policy)
    ids, untouched = first.ids, state(second)
    merged = merge(first, second, prefer)
    assert merged.ids
    assert merged.conflicts
    check_kept(first, ids, second, merged)
    assert state(second) == untouched
    if prefer == "first":
        assert set(ids) <= set(first.ids)
        assert not {pair.second.id for pair in merged.conflicts} & set(merged.ids)
    else:
        assert {pair.second.id for pair in merged.conflicts} <= set(merged.ids)


@pytest.mark.parametrize("seed", range(2))
def test_undo_takes_a_merge_back_to_the_bit(seed: int) -> None:
    first, second = two(seed)
    before = state(first)
    merge(first, second, "last")
    assert state(first) != before
    first.undo()
    assert state(first) == before


@pytest.mark.parametrize("seed", range(2))
def test_conflicts_refuse_a_merge_unless_somebody_is_preferred(seed: int) -> None:
    first, second = two(seed)
    before = state(first)
    with pytest.raises(MergeConflict, match="contradict") as error:
        merge(first, second)
    assert state(first) == before
    named = {(pair.first.id, pair.second.id) for pair in error.value.conflicts}
    kept = merge(first, second, "first").conflicts
    assert named == {(pair.first.id, pair.second.id) for pair in kept}


def test_codebooks_of_the_published_policy_are_merged_by_its_decisions() -> None:
    first, second = paper_books()
    fed = Codebook(2, VALUE_DIM, policy="paper")
    for book in (first, second):
        for edit in book.history:
            fed.insert(book.query_of(edit.id), edit.label, value(edit.label[0]))
    merge(first, second)
    assert bits(first.radii) == bits(fed.radii)
    assert bits(first.keys) == bits(fed.keys)
    assert first.labels == fed.labels


def paper_books() -> tuple[Codebook, Codebook]:
    books = Codebook(2, VALUE_DIM, policy="paper"), Codebook(2, VALUE_DIM, policy="paper")
    places = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for number, place in enumerate(places):
        label = number % 3
        books[number // 10].insert(place, [label], value(label))
    return books


def test_same_prompt_and_target_is_no_conflict_and_further_wordings_come_along() -> None:
    first, second = Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM)
    first.insert(vec(0, 0), [1], value(1), [7])
    second.insert(vec(0, 0), [1], value(2), [7])
    second.insert(vec(9, 0), [1], value(2), [8], part_of=0)
    second.insert(vec(20, 0), [2], value(3), [9])
    second.insert(vec(20, 9), [3], value(4), [9, 9])
    merged = merge(first, second)
    assert merged.conflicts == []
    assert merged.same == {0: (0,)}
    assert merged.ids == {0: (1,), 2: (2,), 3: (3,)}
    assert first.ids == [0, 1, 2, 3]
    asked = torch.stack([vec(0, 0), vec(9, 0), vec(20, 0), vec(20, 9)])
    slots = first.lookup(asked)[0].tolist()
    # The edit that was there keeps its value.
    assert [first.values[slot, 0].item() for slot in slots] == [1, 2, 3, 4]
    assert [first.edit(id).prompt for id in first.ids] == [(7,), (8,), (9,), (9, 9)]
    first.check()
    again = merge(first, second)
    assert (again.ids, sorted(again.same)) == ({}, [0, 2, 3])


def test_what_was_left_out_for_an_edit_comes_when_that_edit_is_superseded() -> None:
    first, second = Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM)
    first.history_limit = 0  # what the merge supersedes is remembered until its end
    first.insert(vec(0, 0), [1], value(1), [7])
    first.insert(vec(9, 0), [1], value(1), [8], part_of=0)
    second.insert(vec(0, 0), [1], value(2), [7])  # agrees with the edit that the next one ends
    second.insert(vec(9, 0), [2], value(3), [8])
    merged = merge(first, second, "last")
    assert [(pair.first.id, pair.second.id) for pair in merged.conflicts] == [(0, 1)]
    assert merged.same == {}
    slots = first.lookup(torch.stack([vec(0, 0), vec(9, 0)]))[0].tolist()
    assert [first.labels[slot] for slot in slots] == [(1,), (2,)]
    first.check()


def test_a_limit_of_the_history_hides_no_conflict() -> None:
    first, second = Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM)
    first.history_limit = 0
    first.insert(vec(0, 0), [1], value(1), [7])
    second.insert(vec(0, 0), [2], value(2), [7])
    (pair,) = merge(first, second, "last").conflicts
    assert (pair.first.id, pair.first.label, pair.second.label) == (0, (1,), (2,))
    assert first.history_limit == 0


def test_no_value_is_exchanged_for_one_that_was_not_seen_to_answer() -> None:
    first, second = Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM)
    trusting = {"answers": lambda edit, slot: True}
    first.commit(first.propose(vec(0, 0), [1], [7]), value(1), **trusting)
    # By default both would share the entry of the first: the label is the same, and it is near.
    second.commit(second.propose(vec(0.5, 0), [1], [8]), value(2), **trusting)
    second.commit(second.propose(vec(0, 0.5), [1], [9], own_entry=True), value(1), **trusting)
    merge(first, second)
    slots = first.lookup(torch.stack([vec(0, 0), vec(0.5, 0), vec(0, 0.5)]))[0].tolist()
    assert [first.values[slot, 0].item() for slot in slots] == [1, 2, 1]
    assert slots[0] == slots[2]  # the same bits: shared
    first.check()


def test_entries_that_were_given_as_tensors_come_with_their_radius_and_value() -> None:
    keys = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    given = Codebook.from_tensors(keys, keys, torch.tensor([0.25, 2.0]), [[1], [2]])
    book = Codebook(2, VALUE_DIM)
    book.insert(vec(5, 5), [3], value(3), [7])
    merge(book, given)
    asked = torch.tensor([[0.2, 0.0], [0.3, 0.0], [7.1, 0.0], [5.0, 5.0]])
    labels = [None if s < 0 else book.labels[s] for s in book.lookup(asked)[0].tolist()]
    assert labels == [(1,), None, (2,), (3,)]
    book.check()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"policy": "nearest"}, "policy of both codebooks must be the same, got default"),
        ({"radius": 2.0}, "radius of both codebooks must be the same, got 1.0 and 2.0"),
        ({"dtype": torch.bfloat16}, "dtype of both codebooks must be the same"),
    ],
)
def test_codebooks_of_other_kinds_are_not_merged(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM, **other))


def test_a_difference_names_each_edit_once() -> None:
    first, second = Codebook(2, VALUE_DIM), Codebook(2, VALUE_DIM)
    for book in (first, second):
        book.insert(vec(0, 0), [1], value(1), [1])  # the same
        book.insert(vec(50, 9), [1], value(1))  # the same, known by its key
    first.insert(vec(10, 0), [1], value(1), [2])  # another target and value
    second.insert(vec(10, 0), [2], value(2), [2])
    first.insert(vec(20, 0), [3], value(3), [3])  # another value
    second.insert(vec(20, 0), [3], value(4), [3])
    first.insert(vec(30, 0), [4], value(5), [4])  # further wordings
    second.insert(vec(30, 0), [4], value(5), [4])
    second.insert(vec(30, 9), [4], value(5), [4, 4], part_of=4)
    first.insert(vec(40, 0), [5], value(6), [5])  # here alone
    second.insert(vec(60, 0), [6], value(7), [6])  # there alone
    found = diff(first, second)
    assert [edit.prompt for edit in found.only_first] == [(5,)]
    assert [edit.prompt for edit in found.only_second] == [(6,)]
    assert [(a.id, b.id, what) for a, b, what in found.differ] == [
        (2, 2, ("target", "value")),
        (3, 3, ("value",)),
        (4, 4, ("prompts",)),
    ]
    assert found.same == 2


@pytest.mark.parametrize("seed", [0, 3])
def test_a_codebook_does_not_differ_from_itself_and_a_deleted_edit_shows(seed: int) -> None:
    first, again = two(seed)[0], two(seed)[0]
    found = diff(first, again)
    assert (found.only_first, found.only_second, found.differ) == ([], [], [])
    assert found.same == first.edits
    gone = first.history[-1]
    again.delete(gone.id)
    found = diff(first, again)
    # An edit that it had superseded may have come back.
    assert gone in [*found.only_first, *(mine for mine, _, _ in found.differ)]
