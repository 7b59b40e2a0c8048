"""Deleting replays what the deleted edit can have touched, and gives what replaying all gives."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codebook_streams import (
    ISLAND_DIM,
    VALUE_DIM,
    Islands,
    Stream,
    bits,
    entries,
    insert_several,
    state,
)
from grace_edit.codebook import comparing, deletion, replay
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.comparing import Bounds, Names
from grace_edit.codebook.records import TieError
from grace_edit.codebook.touched import touched


def anew(book: Codebook, id: int, monkeypatch: pytest.MonkeyPatch) -> Codebook:
    """Return a copy of a codebook from which an edit was deleted by replaying everything."""
    other = copy.deepcopy(book)

    def none(*_: Any) -> None:
        raise TieError

    with monkeypatch.context() as patched:
        patched.setattr(deletion, "Part", none)
        other.delete(id)
    return other


def content(book: Codebook) -> dict[str, Any]:
    """Return everything but the slots and values of entries."""
    history = []
    for edit in book.history:
        key = bits(book.keys[edit.slot]) if edit.live else None
        distance = None
        if edit.live and edit.query_index >= 0:
            distance = book.storage.queries.answer(edit.query_index)[1]
        query = bits(book.query_of(edit.id))
        history.append((edit.id, edit.state, edit.superseded_by, query, key, distance))
    return {
        "entries": entries(book),
        "history": history,
        "counts": (int(book.count), book.edits, book.entries),
        "index": (book.storage.by_prompt, book.storage.by_query),
    }


def by_id(book: Codebook) -> dict[int, Any]:
    """Return the value that answers each edit of the history, and what was verified."""
    known = {edit.id: edit for edit in book.history if edit.state != "deleted"}
    values = {id: bits(book.storage.value_of(edit)) for id, edit in known.items() if edit.live}
    return {id: (edit.value_id, edit.verified, values.get(id)) for id, edit in known.items()}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how often everything was replayed."""
    calls: list[int] = []
    everything: Callable[..., None] = replay.everything

    def noted(storage: Any) -> None:
        calls.append(1)
        everything(storage)

    monkeypatch.setattr(replay, "everything", noted)
    return calls


@pytest.mark.parametrize(
    ("seed", "policy", "apart", "imports"),
    [
        pytest.param(0, "default", 9.0, 0, id="islands far apart"),
        pytest.param(1, "default", 3.0, 0, id="islands that touch"),
        pytest.param(4, "default", 0.4, 0, id="all near each other"),
        pytest.param(2, "nearest", 3.0, 0, id="the nearest decides"),
        pytest.param(3, "default", 9.0, 8, id="with imported edits"),
    ],
)
def test_deleting_gives_to_the_bit_what_replaying_everything_gives(
    seed: int,
    policy: str,
    apart: float,
    imports: int,
    monkeypatch: pytest.MonkeyPatch,
    replayed: list[int],
) -> None:
    stream, parts = Islands(seed, apart=apart), 0
    book = Codebook(ISLAND_DIM, VALUE_DIM, policy=policy, capacity=4, drift=0.01)
    if imports:
        keys = torch.stack([stream.query() for _ in range(40)]).unique(dim=0)[:imports]
        labels = [[n % 3] for n in range(imports)]
        radii = torch.rand(imports, generator=stream.torch)
        book = Codebook.from_tensors(keys, keys[:, :VALUE_DIM], radii, labels, policy=policy)
    for _ in range(60):
        stream.insert(book)
    for _ in range(10):
        id = stream.random.choice(
            [e.id for e in book.history if e.state != "deleted" and e.part_of is None]
        )
        expected, before = anew(book, id, monkeypatch), state(book)
        ids, held = touched(book.storage, id), by_id(book)
        del replayed[:]
        book.delete(id)
        parts += not replayed
        assert content(book) == content(expected)
        # Replaying everything gives edits for which nobody verified a value the one that answers
        # them now, however far they are; here they keep theirs.
        near = by_id(expected)
        for each, answered in by_id(book).items():
            made_again = replayed or ids is None or each in ids
            assert answered == (near if made_again else held)[each]
        book.check()
        if stream.random.random() < 0.3:
            book.undo()
            assert state(book) == before
        stream.insert(book)
    assert parts >= (5 if imports else 8)


@pytest.mark.parametrize(
    ("dim", "dtype", "scale", "offset"),
    [
        pytest.param(3, torch.float32, 1.0, 0.0, id="few numbers"),
        pytest.param(300, torch.float32, 1.0, 0.0, id="many numbers"),
        pytest.param(40, torch.float32, 1.0, 2e4, id="near each other and far from others"),
        pytest.param(40, torch.float32, 1e-20, 0.0, id="squares that lose bits in float32"),
        pytest.param(40, torch.bfloat16, 1.0, 3.0, id="bfloat16"),
    ],
)
def test_linked_edits_are_decided_by_products_as_by_every_distance(
    dim: int,
    dtype: torch.dtype,
    scale: float,
    offset: float,
    monkeypatch: pytest.MonkeyPatch,
    replayed: list[int],
) -> None:
    monkeypatch.setattr(comparing, "_MOST_ROWS", 16)  # so that those asked before come up again
    source, chance = torch.Generator().manual_seed(dim), random.Random(dim)
    reach = scale * math.sqrt(2 * dim)  # about how far they are from each other
    queries = scale * torch.randn(100, dim, generator=source)
    queries[:20] += offset
    book = Codebook(dim, VALUE_DIM, dtype=dtype, radius=0.7 * reach, capacity=4)
    for query in queries.to(dtype):
        own = chance.choice([None, None, 0.4 * reach])
        label = [chance.randrange(4)]
        book.insert(query, label, torch.zeros(VALUE_DIM, dtype=dtype), radius=own)
    assert {edit.result.case for edit in book.history} >= {"split", "expand"}
    for id in chance.sample(range(20, 100), 6):
        expected = anew(book, id, monkeypatch)
        assert touched(book.storage, id) is None
        del replayed[:]
        book.delete(id)
        assert replayed == []
        assert content(book) == content(expected)
        assert by_id(book) == by_id(expected)
    book.check()


class _Signed(Stream):
    """Edits on a grid whose zeros have either sign, or on a plain one where no two are as near."""

    def __init__(self, seed: int, *, even: bool) -> None:
        super().__init__(seed, spread=0.8)
        self._even = even

    def next(self, repeats: float = 0.3) -> tuple[torch.Tensor, list[int], torch.Tensor, Any]:
        query, label, value, prompt = super().next(repeats)
        if self._even:
            query = query.round()
        else:
            query[0] = 0.0  # so that equal ones may differ in its sign
        query = torch.where(query == 0, self.random.choice([0.0, -0.0]), query)
        return query, label, value, None if prompt is None else [prompt[0] % 20]


@pytest.mark.parametrize(
    ("even", "imports"),
    [
        pytest.param(False, 0, id="no two as near"),
        pytest.param(True, 0, id="many as near"),
        pytest.param(False, 4, id="with imported edits"),
    ],
)
def test_linked_edits_of_several_keys_come_out_as_by_replaying_everything(
    even: bool, imports: int, monkeypatch: pytest.MonkeyPatch, replayed: list[int]
) -> None:
    parts = 0
    for seed in range(3):
        stream = _Signed(seed, even=even)
        book = Codebook(3, VALUE_DIM, radius=2.0, capacity=4)
        if imports:
            keys = torch.stack([stream.next(0.0)[0] for _ in range(imports)])
            labels = [[number % 3] for number in range(imports)]
            radii = torch.full((imports,), 0.5)
            book = Codebook.from_tensors(keys, keys[:, :VALUE_DIM], radii, labels, radius=2.0)
        for _ in range(30):
            insert_several(book, stream)
        for _ in range(8):
            left = [e.id for e in book.history if e.state != "deleted" and e.part_of is None]
            id = stream.random.choice(left)
            expected = anew(book, id, monkeypatch)
            del replayed[:]
            book.delete(id)
            parts += not replayed
            assert content(book) == content(expected)
            assert by_id(book) == by_id(expected)
            insert_several(book, stream)
        book.check()
    assert even or imports or parts > 12


def test_an_edit_that_took_over_a_query_is_repaired_in_a_rehearsal_too(
    monkeypatch: pytest.MonkeyPatch, replayed: list[int]
) -> None:
    book, zeros = Codebook(1, VALUE_DIM, radius=2.0), torch.zeros(VALUE_DIM)
    last = None
    for x, label, prompt, radius in (
        (0.0, 1, None, None),
        (1.0, 1, [7], None),
        (0.9, 1, [7], None),  # takes the query of the one before, still answered by the first
        (2.2, 2, None, None),
        (1.7, 2, None, 0.4),  # draws it
        (-0.8, 3, None, None),
    ):
        last = book.insert(torch.tensor([x]), [label], zeros, prompt, radius=radius).id
    assert last is not None
    expected = anew(book, last, monkeypatch)
    del replayed[:]
    book.delete(last)
    assert replayed == []
    assert content(book) == content(expected)
    book.check()


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-22, 1e12])
@pytest.mark.parametrize("dim", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_hold_for_every_two_queries(
    scale: float, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "_MOST_ROWS", 16)
    source = torch.Generator().manual_seed(dim)
    queries = torch.randn(40, dim, generator=source)
    if scale > 1e-20:  # alone, for whose squares float32 has no bits
        queries[::3] += 1000.0
    queries[20] = queries[3] * (1 + 1e-6)
    queries = (queries * scale).to(dtype)
    wide = queries.double().numpy()
    squares = ((wide[:, None] - wide[None]) ** 2).sum(axis=2)
    bounds = Bounds(queries, Names(queries).each)
    for asked, reached in ((0, 16), (15, 16), (16, 32), (32, 40)):
        bounds.reach(asked)
        for number in (asked, *range(reached), 0):
            least, slack = bounds.of(number)
            assert len(least) == reached
            assert (least <= squares[number, :reached]).all()
            most = least.astype("float64") + bounds.slack[:reached] + slack
            assert (most >= squares[number, :reached]).all()


def test_equal_queries_share_a_name_and_no_others_do() -> None:
    queries = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0], [1.0, 1e-30], [1.0, 0.0]])
    names = Names(queries)
    assert [names.each.index(name) for name in names.each] == [0, 1, 0, 3, 1]
    assert names.find(torch.tensor([1.0, -0.0])) == names.each[1]
    assert names.find(torch.tensor([2.0, 1.0])) is None


def test_queries_too_large_to_be_multiplied_are_replayed(replayed: list[int]) -> None:
    book = Codebook(2, VALUE_DIM, radius=1e30)
    for x in (0.0, 1e19, 2.2e19):
        book.insert(torch.tensor([x, 0.0]), [1], torch.zeros(VALUE_DIM))
    book.delete(1)
    assert len(replayed) == 1
    book.check()


@pytest.mark.parametrize("apart", [9.0, 3.0], ids=["islands far apart", "islands that touch"])
def test_several_deleted_at_once_leave_what_they_leave_one_by_one(apart: float) -> None:
    stream = Islands(11, apart=apart)
    book = Codebook(ISLAND_DIM, VALUE_DIM, capacity=4)
    ids = [stream.insert(book) for _ in range(40)]
    some = stream.random.sample(ids, 12)
    one_by_one, before, version = copy.deepcopy(book), state(book), book.version
    for id in some:
        one_by_one.delete(id)
    book.delete_all([*some, some[0]])
    assert content(book) == content(one_by_one)
    assert book.version == version + 1
    book.check()
    book.undo()
    assert state(book) == before
    with pytest.raises(KeyError):
        book.delete_all([some[0], 10_000])
    assert state(book) == before
    book.delete_all([])
    assert book.version == version + 2


def test_equal_distances_are_left_to_a_replay_of_everything(replayed: list[int]) -> None:
    book = Codebook(2, VALUE_DIM)
    for _ in range(60):  # so many that they are not simply all replayed
        book.insert(torch.rand(2) * 1000 + 100, [1], torch.zeros(VALUE_DIM))
    ids = []
    for x, label in ((0.0, 1), (2.0, 2), (1.0, 3)):  # the third is as far from both
        ids.append(book.insert(torch.tensor([x, 0.0]), [label], torch.ones(VALUE_DIM)).id)
    last = book.insert(torch.tensor([1.0, 0.5]), [3], torch.ones(VALUE_DIM)).id
    assert last is not None
    book.delete(last)
    assert len(replayed) == 1
    book.check()


def test_what_is_touched_does_not_grow_with_what_is_far() -> None:
    stream, sizes = Islands(7, centres=100), []
    book = Codebook(ISLAND_DIM, VALUE_DIM)
    for _ in range(150):
        book.insert(stream.query(), [stream.random.randrange(3)], torch.zeros(VALUE_DIM))
    for id in book.ids[:30]:
        ids = touched(book.storage, id)
        assert ids is not None
        sizes.append(len(ids))
    assert max(sizes) < 40
    assert sum(sizes) < 30 * 8
    # With their labels all different no entry can grow, and links are shorter.
    alone = Codebook(2, VALUE_DIM)
    for number in range(150):
        alone.insert(torch.tensor([2.5 * number, 0.0]), [number], torch.zeros(VALUE_DIM))
    assert touched(alone.storage, 100) == {100}
    same = Codebook(2, VALUE_DIM)
    for number in range(150):
        same.insert(torch.tensor([2.5 * number, 0.0]), [1], torch.zeros(VALUE_DIM))
    assert touched(same.storage, 100) is None


def test_a_long_chain_of_edits_is_not_followed_to_its_end() -> None:
    book = Codebook(2, VALUE_DIM)
    for number in range(400):
        # A chain, and as many edits that are linked with none.
        book.insert(torch.tensor([1.9 * number, 0.0]), [number], torch.zeros(VALUE_DIM))
        book.insert(torch.tensor([9.0 * number, 900.0]), [number], torch.zeros(VALUE_DIM))
    assert touched(book.storage, 0) is None
    assert touched(book.storage, 1) == {1}


def test_where_the_nearest_decides_many_are_deleted_without_a_look_at_all() -> None:
    book, zeros = Codebook(2, VALUE_DIM, policy="nearest"), torch.zeros(VALUE_DIM)
    for label in (1, 2):  # each is corrected once
        for number in range(400):
            if label == 1 or number < 90:
                book.insert(torch.tensor([float(number), 0.0]), [label], zeros)
    ids = touched(book.storage, *book.ids[-90:])
    assert ids is not None
    assert len(ids) == 180


def test_a_prompt_links_edits_whose_queries_are_far_apart() -> None:
    book, zeros = Codebook(2, VALUE_DIM), torch.zeros(VALUE_DIM)
    for number in range(70):
        book.insert(torch.tensor([500.0, 10.0 * number]), [1], zeros)
    near, far = torch.tensor([0.0, 0.0]), torch.tensor([99.0, 0.0])
    first = book.insert(near, [1], zeros, [7]).id
    between = book.insert(near, [2], zeros).id
    last = book.insert(far, [3], zeros, [7]).id  # the first is not live, this one has its own query
    assert None not in (first, between, last)
    book.delete(between)  # type: ignore[arg-type]
    assert book.edit(first).superseded_by == last  # type: ignore[arg-type]
    assert torch.equal(book.query_of(last), near)  # type: ignore[arg-type]
    book.check()
