"""Memory of a codebook that is edited for months: undo, the past, and forgetting it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, entries, fed_anew, state
from grace_edit.codebook import store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import UndoError
from torch import Tensor


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((2,), float(number))


def tensors_of(held: Any, seen: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return every tensor that can be reached from an object, by identity."""
    if isinstance(held, Tensor):
        seen[id(held)] = held
    elif isinstance(held, dict):
        for key, item in held.items():
            tensors_of(key, seen)
            tensors_of(item, seen)
    elif isinstance(held, (list, tuple, set, frozenset)):
        for item in held:
            tensors_of(item, seen)
    elif type(held).__module__.startswith("grace_edit.") and id(held) not in seen:
        seen[id(held)] = torch.empty(0)
        tensors_of(vars(held), seen)
    return seen


def bytes_of(book: Codebook) -> int:
    """Return the bytes of all tensors that a codebook holds."""
    return sum(t.numel() * t.element_size() for t in tensors_of(book.storage, {}).values())


def served(book: Codebook) -> Any:
    """Return all that lookups and live edits are, without where queries are stored."""
    live = [(e.id, e.label, e.prompt, e.slot, e.value_id, e.result) for e in book.live_keys]
    queries = [bits(book.query_of(id)) for id in book.ids]
    tensors = [bits(t) for t in (book.keys, book.values, book.radii, book.count)]
    return live, queries, tensors, book.labels


@pytest.mark.parametrize("policy", ["default", "nearest"])
def test_memory_stays_flat_under_edits_deletes_and_supersessions(policy: str) -> None:
    book, stream = Codebook(3, VALUE_DIM, policy=policy, capacity=64), Stream(3)
    book.undo_limit, book.history_limit = 5, 10
    sizes, records = [], []
    for number in range(600):
        query, label, value, _ = stream.next(0.3)
        book.insert(query, label, value, [number % 7, number] if number % 2 else [number % 7])
        if book.edits > 20:
            book.delete(stream.random.choice(book.ids), purge=number % 10 == 0)
        if number % 100 == 99:
            book.check()
            sizes.append(bytes_of(book))
            held = book.storage
            records.append(len(held.edit_records) + len(held.retired_values) + len(held.past))
    assert len(book.storage.past) == 10
    assert len(book.history) == 30
    assert max(sizes[2:]) <= 1.1 * sizes[1]
    assert max(records) <= 50


def test_a_thousand_edits_of_one_prompt_leave_one_value_once_compacted() -> None:
    book = Codebook(2, 2)
    for number in range(300):
        book.insert(vec(0, 0), [number], value(number), prompt=[1])
    assert len(book.storage.retired_values) == 299
    before, version = served(book), book.version
    assert book.compact() == 299
    assert served(book) == before
    assert book.version > version
    assert not book.storage.retired_values
    assert len(book.storage.queries.owners) == 1
    assert [edit.id for edit in book.history] == [299]
    with pytest.raises(KeyError):
        book.edit(5)
    with pytest.raises(UndoError, match="nothing has changed since the codebook was compacted"):
        book.undo()
    book.delete(299)  # nothing comes back
    assert book.ids == []
    book.check()


@pytest.mark.parametrize("policy", ["default", "paper", "nearest"])
def test_compacting_changes_nothing_that_is_served_and_edits_go_on(
    policy: str, tmp_path: Any
) -> None:
    book, stream = Codebook(3, VALUE_DIM, policy=policy, capacity=4), Stream(21)
    repeats = 0.0 if policy == "paper" else 0.2
    for number in range(4):
        for _ in range(40):
            book.insert(*stream.next(repeats))
        for _ in range(4):
            book.delete(stream.random.choice(book.ids))
        before, past = served(book), len(book.storage.past)
        assert book.compact(keep=number) == past - number
        assert served(book) == before
        book.check()
        store.save(book, tmp_path, {})
        loaded, _ = store.load(tmp_path)
        assert served(loaded) == before
        loaded.check()
        book.delete(book.ids[3])
        fresh, names = fed_anew(book)
        assert entries(book) == entries(fresh, names)
        book.check()


def test_what_a_change_forgets_comes_back_when_it_is_undone() -> None:
    book, stream = Codebook(3, VALUE_DIM, capacity=4), Stream(22)
    book.history_limit = 3
    states = []
    for number in range(90):
        states.append(state(book))
        if number % 4 == 3:
            book.delete(stream.random.choice(book.ids))
        else:
            book.insert(*stream.next(0.3))
        book.check()
        assert len(book.storage.past) <= 3
    for expected in reversed(states):
        book.undo()
        assert state(book) == expected
    book.check()


def test_imported_entries_are_forgotten_like_others() -> None:
    torch.manual_seed(0)
    keys = torch.randn(6, 3) * 4
    labels = [[n] for n in range(6)]
    book = Codebook.from_tensors(keys, torch.randn(6, 2), torch.ones(6), labels)
    book.insert(keys[1], [9], value(9))
    book.delete(2)
    before = served(book)
    assert book.compact() == 2
    assert served(book) == before
    assert book.ids == [0, 3, 4, 5, 6]
    book.delete(6)
    assert book.ids == [0, 3, 4, 5]
    book.check()


def test_an_undo_step_of_a_delete_holds_what_it_left_different() -> None:
    book = Codebook(2, 2)
    for number in range(50):
        book.insert(vec(10 * number, 0), [number], value(number), prompt=[number])
    places = []
    for _ in range(3):
        book.delete(book.ids[20])
        places.append(len(book.storage.journal._steps[-1]))
    assert max(places) < 25  # of some four hundred that the replay writes


def test_labels_that_nothing_holds_lose_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Codebook(2, 2)
    monkeypatch.setattr("grace_edit.codebook.labels._MOST", 16)
    book.storage.labels._most = 16
    book.undo_limit = 4
    for number in range(200):
        book.insert(vec(0, 0), [number], value(number), prompt=[1])
        book.insert(vec(9, number % 3), [number % 5], value(number))
    assert len(book.storage.labels._numbers) <= 32
    book.check()
    for _ in range(4):
        book.undo()
        book.check()


def test_limits_are_checked() -> None:
    book = Codebook(2, 2)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="history_limit must be None or a whole number"):
            book.history_limit = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="keep must be a whole number"):
            book.compact(wrong)  # type: ignore[arg-type]
    with book.transaction(), pytest.raises(ValueError, match="cannot compact inside a transaction"):
        book.compact()
