"""Keys and values that stay in the file, and codebooks that take the tensors they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grace_edit.codebook import files, importing, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.files import TENSORS
from torch import Tensor

from grace_kernels.testing import same_bits


def tensors(count: int = 50) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(count, 12, generator=generator).bfloat16()
    values = torch.randn(count, 6, generator=generator).bfloat16()
    return keys, values, torch.ones(count), [(n,) for n in range(count)]


def change(book: Codebook) -> None:
    """Add beside an entry, change one, delete one, grow."""
    book.insert(book.keys[3] + 0.5, [77], torch.ones(6).bfloat16())
    book.insert(book.keys[4].clone(), [78], torch.full((6,), 2.0).bfloat16())
    book.delete(5)
    book.insert(torch.full((12,), 9.0).bfloat16(), [79], torch.full((6,), 3.0).bfloat16())


def same(a: Codebook, b: Codebook) -> bool:
    pairs = zip((a.keys, a.values, a.radii), (b.keys, b.values, b.radii), strict=True)
    return all(same_bits(x, y) for x, y in pairs) and a.storage.live_edits == b.storage.live_edits


def test_a_mapped_codebook_is_the_saved_one_and_changes_stay_out_of_the_file(
    tmp_path: Path,
) -> None:
    store.save(Codebook.from_tensors(*tensors()), tmp_path, {"a": 1})
    before = (tmp_path / TENSORS).read_bytes()
    mapped, config = store.load(tmp_path, mapped=True)
    plain, _ = store.load(tmp_path)
    assert config == {"a": 1}
    assert same(mapped, plain)
    change(mapped)
    change(plain)
    assert same(mapped, plain)
    assert (tmp_path / TENSORS).read_bytes() == before


def test_a_mapped_codebook_is_saved_over_the_file_it_lies_in(tmp_path: Path) -> None:
    store.save(Codebook.from_tensors(*tensors()), tmp_path, {})
    mapped, _ = store.load(tmp_path, mapped=True)
    mapped.delete(9)
    store.save(mapped, tmp_path, {})
    again, _ = store.load(tmp_path, mapped=True)
    assert same(mapped, again)
    mapped.delete(10)
    store.save(again, tmp_path, {})
    assert again.keys[10].any()
    assert not mapped.keys[10].any()


def test_only_a_full_codebook_stays_in_the_file_and_only_if_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {}
    map_tensors = files._map_tensors

    def noted(path: Path, wanted: str | None) -> dict[str, Tensor] | None:
        found = map_tensors(path, wanted)
        where.update(found or {})
        return found

    monkeypatch.setattr(files, "_map_tensors", noted)
    for capacity, mapped, stays in ((None, True, True), (None, False, False), (64, True, False)):
        store.save(Codebook.from_tensors(*tensors(), capacity=capacity), tmp_path, {})
        book, _ = store.load(tmp_path, mapped=mapped)
        for name in ("keys", "values"):
            shared = getattr(book, name).data_ptr() == where[name].data_ptr()
            assert shared == stays, (name, capacity, mapped)


def test_the_tensors_given_are_copied_unless_they_may_be_kept() -> None:
    for copy in (True, False):
        keys, values, radii, labels = tensors()
        wanted = Codebook.from_tensors(*tensors())
        book = Codebook.from_tensors(keys, values, radii, labels, copy=copy)
        assert same(book, wanted)
        assert (book.keys.data_ptr() == keys.data_ptr()) is not copy
        assert (book.values.data_ptr() == values.data_ptr()) is not copy
        change(book)
        change(wanted)
        assert same(book, wanted)


def test_a_number_that_is_not_finite_is_found_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_CHUNK", 40)
    for row in (0, 20, 49):
        keys, values, radii, labels = tensors()
        values[row, 5] = torch.nan
        with pytest.raises(ValueError, match="values must be finite"):
            Codebook.from_tensors(keys, values, radii, labels)


def test_what_was_renamed_over_while_it_was_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(Codebook.from_tensors(*tensors()), tmp_path, {})
    other = Codebook.from_tensors(*tensors(40))
    checksum, saved = files.sha256_of, []

    def saves_meanwhile(path: Path) -> str:
        found = checksum(path)
        if not saved and path.name == TENSORS:
            saved.append(True)
            store.save(other, tmp_path, {})
        return found

    monkeypatch.setattr(files, "sha256_of", saves_meanwhile)
    book, _ = store.load(tmp_path)
    assert saved == [True]
    assert same(book, other)
