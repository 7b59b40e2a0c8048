"""Edits of several keys: one id, made, superseded, deleted and saved together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, entries, fed_anew, insert_several, state
from grace_edit.codebook import store
from grace_edit.codebook.codebook import Codebook
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

POLICIES = ("default", "nearest")


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((VALUE_DIM,), float(number))


def make(book: Codebook, label: int, *keys: Tensor, prompts: Any = None, **given: Any) -> int:
    """Make one edit of several keys."""
    prompts = prompts or [None] * len(keys)
    with book.transaction():
        id = book.insert(keys[0], [label], value(label), prompts[0], **given).id
        assert id is not None
        for key, prompt in zip(keys[1:], prompts[1:], strict=True):
            book.insert(key, [label], value(label), prompt, part_of=id, **given)
    return id


def answers(book: Codebook, *queries: Tensor) -> list[Any]:
    """Return the label that answers each query, None for a miss."""
    found, labels = book.lookup(torch.stack(queries))[0].tolist(), book.labels
    return [None if slot < 0 else (labels[slot] or (None,))[0] for slot in found]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_edit_of_several_keys_is_one_edit_and_goes_as_one(policy: str) -> None:
    book = Codebook(2, VALUE_DIM, policy=policy)
    one = make(book, 1, vec(0, 0), vec(5, 0), vec(0, 5))
    two = make(book, 2, vec(9, 9))
    asked = (vec(0, 0), vec(5, 0), vec(0, 5), vec(9, 9))
    assert (book.ids, book.edits, book.entries) == ([one, two], 2, 4)
    assert [edit.id for edit in book.history] == [one, two]
    assert [part.whole for part in book.parts(one)] == [one, one]
    assert {book.members(slot) for slot in range(4)} == {(one,), (two,)}
    assert answers(book, *asked) == [1, 1, 1, 2]
    book.check()
    book.delete(one)
    assert (book.ids, book.entries, answers(book, *asked)) == ([two], 1, [None, None, None, 2])
    book.check()
    book.undo()
    assert (book.ids, answers(book, *asked)) == ([one, two], [1, 1, 1, 2])
    book.undo()  # edit two
    book.undo()  # all three keys of edit one
    assert (book.entries, book.edits) == (0, 0)
    book.check()


def test_a_part_is_not_deleted_alone() -> None:
    book = Codebook(2, VALUE_DIM)
    id = make(book, 1, vec(0, 0), vec(5, 0))
    (part,) = book.parts(id)
    with pytest.raises(KeyError, match=f"whole edit, got {part.id}, a key of edit {id}"):
        book.delete(part.id)
    assert book.ids == [id]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_edit_that_comes_back_by_one_of_its_keys_is_superseded_with_all_of_them(
    policy: str, which: int
) -> None:
    book = Codebook(2, VALUE_DIM, policy=policy)
    keys, prompts = (vec(0, 0), vec(5, 0), vec(0, 5)), [[1], [2], [3]]
    old = make(book, 1, *keys, prompts=prompts)
    before = entries(book)
    new = make(book, 2, keys[which], vec(9, 9), prompts=[prompts[which], [4]])
    assert book.ids == [new]
    expected: list[Any] = [None, None, None, 2]
    expected[which] = 2
    assert answers(book, *keys, vec(9, 9)) == expected
    book.check()
    book.delete(new)
    assert (book.ids, entries(book)) == ([old], before)
    assert answers(book, *keys, vec(9, 9)) == [1, 1, 1, None]
    book.check()


def test_members_of_an_entry_that_goes_with_a_superseded_edit_keep_their_label() -> None:
    book = Codebook(2, VALUE_DIM)
    old = make(book, 1, vec(0, 0), vec(5, 0), prompts=[[1], [2]])
    member = make(book, 1, vec(5.5, 0))
    assert book.edit(member).slot == book.parts(old)[0].slot
    new = make(book, 2, vec(0, 0), prompts=[[1]])
    assert book.ids == [member, new]
    assert answers(book, vec(5.5, 0), vec(5, 0), vec(4.4, 0)) == [1, 1, None]  # a key of its own
    assert torch.equal(book.values[book.edit(member).slot], value(1))
    book.check()


@pytest.mark.parametrize("label", [1, 2])
def test_the_entries_of_a_superseded_edit_take_no_part_in_the_decision(label: int) -> None:
    book = Codebook(2, VALUE_DIM)
    old = make(book, 1, vec(0, 0), vec(0.5, 0), prompts=[[1], [2]])
    assert book.entries == 1
    new = make(book, label, vec(0.5, 0), prompts=[[2]])
    assert book.edit(new).result.case == "add"  # not expanded, not split: the entry is going
    assert (book.ids, book.entries, book.radii.max().item()) == ([new], 1, 1.0)
    assert answers(book, vec(0.5, 0), vec(-0.6, 0)) == [label, None]
    book.check()
    book.delete(new)
    assert (book.ids, answers(book, vec(0.5, 0), vec(-0.6, 0))) == ([old], [1, 1])
    book.check()


def test_a_key_that_its_edit_has_already_is_refused() -> None:
    book = Codebook(2, VALUE_DIM)
    id = make(book, 1, vec(0, 0), prompts=[[1]])
    with pytest.raises(ValueError, match="query must differ from those of edit 0"):
        book.propose(vec(-0.0, 0), [1], [2], part_of=id)
    with pytest.raises(ValueError, match="prompt must differ from those of edit 0"):
        book.propose(vec(3, 0), [1], [1], part_of=id)
    with pytest.raises(ValueError, match="label must be that of edit 0"):
        book.propose(vec(3, 0), [2], [2], part_of=id)
    make(book, 2, vec(9, 0))
    with pytest.raises(ValueError, match="part_of must be the edit made last, got 0"):
        book.propose(vec(3, 0), [1], [2], part_of=id)
    paper = Codebook(2, VALUE_DIM, policy="paper")
    paper.insert(vec(0, 0), [1], value(1))
    with pytest.raises(ValueError, match="part_of must be None with the policy paper"):
        paper.propose(vec(3, 0), [1], part_of=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_given_radius_is_the_entrys_and_later_edits_do_not_widen_it(policy: str) -> None:
    book = Codebook(2, VALUE_DIM, policy=policy)
    id = make(book, 1, vec(0, 0), vec(5, 0), radius=0.25)
    assert book.radii[:2].tolist() == [0.25, 0.25]
    later = make(book, 1, vec(0.5, 0))
    assert book.edit(later).result.case == "add"  # by default it would have expanded the entry
    assert book.radii[:3].tolist() == [0.25, 0.25, 1.0]
    make(book, 3, vec(0, -0.2))
    book.check()
    for other in book.ids:
        if other != id:
            book.delete(other)
    assert book.radii[:2].tolist() == [0.25, 0.25]
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="radius must be finite and not negative"):
            book.propose(vec(9, 9), [1], radius=wrong)


def test_an_edit_with_a_radius_takes_over_an_entry_no_wider_than_that() -> None:
    book = Codebook(2, VALUE_DIM)
    make(book, 1, vec(0, 0))
    make(book, 1, vec(0.9, 0))  # a member of the same entry
    make(book, 1, vec(0, 0), radius=0.25)
    assert book.radii[0].item() == 0.25
    assert answers(book, vec(0, 0), vec(0.9, 0), vec(0.5, 0)) == [1, 1, 1]
    assert book.entries == 2  # the member was uncovered, and has an entry of its own
    book.check()


@pytest.mark.parametrize(
    ("policy", "drift", "seed"),
    [("default", 0.0, 0), ("default", 0.1, 1), ("nearest", 0.0, 2), ("nearest", 0.1, 3)],
)
def test_every_promise_holds_after_every_edit_of_several_keys(
    policy: str, drift: float, seed: int
) -> None:
    book = Codebook(3, VALUE_DIM, policy=policy, capacity=4, drift=drift)
    stream = Stream(seed, spread=1.2)
    for _ in range(150):
        insert_several(book, stream)
        book.check()
    kinds = Counter(
        (edit.state, bool(book.parts(edit.id)), edit.radius is None) for edit in book.history
    )
    assert len(kinds) == 8
    assert min(kinds.values()) >= 3, kinds


@pytest.mark.parametrize(
    ("policy", "drift", "seed"), [("default", 0.0, 4), ("default", 0.1, 5), ("nearest", 0.0, 6)]
)
def test_deleting_edits_of_several_keys_equals_feeding_the_remaining_ones(
    policy: str, drift: float, seed: int
) -> None:
    book = Codebook(3, VALUE_DIM, policy=policy, capacity=4, drift=drift)
    stream = Stream(seed)
    for _ in range(50):
        insert_several(book, stream)
    for number in range(20):
        remaining = [edit.id for edit in book.history if edit.state != "deleted"]
        book.delete(stream.random.choice(remaining), purge=number % 2 == 0)
        book.check()
        fresh, names = fed_anew(book)
        assert entries(book) == entries(fresh, names)
        insert_several(book, stream)
        book.check()


def imported(policy: str) -> Codebook:
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(12, 3, generator=source)
    values, radii = torch.randn(12, VALUE_DIM, generator=source), torch.full((12,), 0.6)
    return Codebook.from_tensors(keys, values, radii, [[i % 3] for i in range(12)], policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_import_whose_slot_was_freed_and_used_again_comes_back(
    tmp_path: Path, policy: str
) -> None:
    book = imported(policy)
    before, values = entries(book), bits(book.values[:12])
    middle = make(book, 7, vec(9, 9, 9), book.query_of(4), prompts=[[1], [2]])
    assert book.edit(4).state == "superseded"
    new = make(book, 8, vec(9, 9, 9), prompts=[[1]])  # supersedes both keys: slot 4 is free
    taken = make(book, 9, vec(-9, 9, 9))
    assert book.edit(taken).slot == 4
    book.check()
    store.save(book, tmp_path, {})
    book, _ = store.load(tmp_path)
    book.check()
    book.delete(new)
    assert middle in book.ids
    book.check()
    book.delete(middle)
    assert 4 in book.ids
    book.check()
    book.delete(taken)
    assert (entries(book), bits(book.values[:12])) == (before, values)


@pytest.mark.parametrize("policy", POLICIES)
def test_edits_of_several_keys_among_imported_ones(policy: str) -> None:
    book, stream = imported(policy), Stream(13, spread=1.0)
    stream.queries += [book.query_of(id) for id in range(12)]
    before = entries(book)
    for number in range(60):
        insert_several(book, stream)
        book.check()
        if number % 5 == 4:
            book.delete(stream.random.choice([id for id in book.ids if id >= 12]))
            book.check()
    assert any(edit.state == "superseded" for edit in book.history[:12])
    for edit in book.history[12:]:
        if edit.state != "deleted":
            book.delete(edit.id)
            book.check()
    assert entries(book) == before
    for id in range(12):
        book.delete(id, purge=id % 2 == 0)
        book.check()
    assert book.entries == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_purging_erases_every_key_of_an_edit(policy: str) -> None:
    book = Codebook(2, VALUE_DIM, policy=policy)
    id = make(book, 1, vec(0, 0), vec(5, 0), prompts=[[1], [2]])
    kept = make(book, 2, vec(9, 9), vec(7, 0), prompts=[[3], [4]])
    at = [edit.query_index for edit in (book.edit(id), *book.parts(id))]
    book.delete(id, purge=True)
    assert not book.storage.queries.vectors[at].any()
    assert book.storage.by_prompt.keys() == {(3,), (4,)}
    with pytest.raises(KeyError):
        book.parts(id)
    assert book.ids == [kept]
    book.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_edits_of_several_keys_are_saved_and_go_on(tmp_path: Path, policy: str) -> None:
    book, stream = Codebook(3, VALUE_DIM, policy=policy), Stream(11)
    for _ in range(40):
        insert_several(book, stream)
    proposal = book.propose(vec(9, 9, 9), [1], [7], radius=0.3, negatives=[[1, 2], [3]])
    id = book.commit(proposal, value(1)).id
    book.delete(book.ids[5], purge=True)
    book.delete(book.ids[2])
    store.save(book, tmp_path, {})
    loaded, _ = store.load(tmp_path)
    loaded.check()
    assert id is not None
    assert loaded.edit(id).negatives == ((1, 2), (3,))
    assert (loaded.ids, loaded.edits) == (book.ids, book.edits)
    ours, theirs = Stream(12), Stream(12)
    for number in range(12):
        for each, source in ((book, ours), (loaded, theirs)):
            insert_several(each, source)
            if number % 4 == 3:
                each.delete(each.ids[number])
        assert entries(loaded) == entries(book)
        assert bits(loaded.values) == bits(book.values)
    loaded.check()


class Several(RuleBasedStateMachine):
    """Edits of several keys in any order, on a grid where many of them meet."""

    policy = "default"
    point = st.tuples(st.integers(-4, 4), st.integers(-4, 4)).map(lambda p: (p[0] / 2, p[1] / 2))

    def __init__(self) -> None:
        super().__init__()
        self.book = Codebook(2, VALUE_DIM, capacity=1, policy=self.policy)
        self.past: list[dict[str, Any]] = []

    @rule(
        keys=st.lists(point, min_size=1, max_size=4, unique=True),
        label=st.integers(0, 2),
        first=st.none() | st.integers(0, 3),
        radius=st.none() | st.sampled_from([0.0, 0.3]),
    )
    def insert(self, keys: Any, label: int, first: int | None, radius: float | None) -> None:
        self.past.append(state(self.book))
        prompts = [None if first is None else [first + n] for n in range(len(keys))]
        with self.book.transaction():
            id = make(self.book, label, vec(*keys[0]), prompts=prompts[:1], radius=radius)
            for key, prompt in zip(keys[1:], prompts[1:], strict=True):
                # Its own prompt may have brought the edit another query, which is the key's.
                taken = [each.id for each in (self.book.edit(id), *self.book.parts(id))]
                if all(not torch.equal(self.book.query_of(i), vec(*key)) for i in taken):
                    given: Any = {"radius": radius, "part_of": id}
                    self.book.insert(vec(*key), [label], value(label), prompt, **given)
        assert id in self.book.ids

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

    @invariant()
    def every_promise_holds(self) -> None:
        self.book.check()


class SeveralNearest(Several):
    """The same where the nearest decides."""

    policy = "nearest"


TestSeveral, TestSeveralNearest = Several.TestCase, SeveralNearest.TestCase
TestSeveral.settings = TestSeveralNearest.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_an_edit_takes_over_two_of_which_one_was_answered_by_a_further_key_of_the_other() -> None:
    book, zeros = Codebook(1, 1), torch.zeros(1)

    def insert(places: tuple[float, float], prompt: int) -> int:
        with book.transaction():
            id = book.insert(torch.tensor([places[0]]), [1], zeros, [prompt]).id
            book.insert(torch.tensor([places[1]]), [1], zeros, part_of=id)
        assert id is not None
        return id

    first, second = insert((0.0, 20.0), 7), insert((0.5, 20.5), 8)
    assert book.entries == 2  # both keys of the second are absorbed by those of the first
    result = book.insert(torch.tensor([3.0]), [2], zeros, [7])
    assert result.case == "update"
    assert (book.edit(first).superseded_by, book.edit(second).superseded_by) == (result.id,) * 2
    assert book.ids == [result.id]
    book.check()
    book.delete(result.id)  # type: ignore[arg-type]
    assert book.ids == [first, second]
    book.check()
