"""A sketch comes back from disk as it was, or is refused; audits and status tell of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sketched_books
import torch
from codebook_streams import bits
from grace_edit import GraceEditor
from grace_edit.codebook import files, store
from grace_edit.codebook import sketch_upkeep as sketching
from grace_edit.codebook.files import CONFIG, TENSORS, StoreError
from safetensors.torch import load_file, save_file
from sketched_books import WORTH, add, agree, busy, counted, fits, since_fit, spread_out
from torch import Tensor

from grace_kernels import Sketch
from grace_kernels.sketch import _STATE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sketched_books.make_small_ones_worth_a_sketch(monkeypatch)


def same(a: Sketch, b: Sketch) -> bool:
    parts = {name: (getattr(a, name), getattr(b, name)) for name in _STATE}
    blocks = -(-a.rows // 32)
    for name in ("head", "tail"):
        parts[name] = tuple(tensor[:blocks] for tensor in parts[name])
    return all(bits(x) == bits(y) for x, y in parts.values()) and a.rows == b.rows


@pytest.mark.parametrize("hopeless", [False, True])
def test_a_loaded_codebook_has_the_sketch_that_was_saved_and_its_past(
    tmp_path: Path, hopeless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = busy()
    if hopeless:
        counted(book, 256, 100_000, 0, 100_000)
        add(book, 1)
    store.save(book, tmp_path, {})
    seen = fits(monkeypatch)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is not None
    assert book.sketch is not None
    assert seen == []
    assert same(loaded.sketch, book.sketch)
    assert loaded.sketch.active == book.sketch.active != hopeless
    assert since_fit(loaded) == since_fit(book)
    assert since_fit(loaded).unknown == 1
    agree(loaded)
    loaded.check()
    for more in (3, 12):  # then there are enough of them for what was hopeless to be fitted
        for each in (book, loaded):
            add(each, more)
        assert same(loaded.sketch, book.sketch)
        assert since_fit(loaded) == since_fit(book)
    assert loaded.sketch.active
    assert len(seen) == 2 * hopeless


def without(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("sketch.")]:
        del tensors[name]


def test_a_file_without_a_sketch_loads_and_one_is_fitted(tmp_path: Path) -> None:
    book = busy()
    store.save(book, tmp_path, {})
    damage(tmp_path, without)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is not None
    assert loaded.sketch.active
    assert since_fit(loaded).slots == book.storage.slots.in_use
    agree(loaded)
    loaded.check()


def test_a_codebook_too_small_for_a_sketch_saves_none(tmp_path: Path) -> None:
    for book in (spread_out(WORTH - 1), spread_out(WORTH - 1, capacity=64)):
        store.save(book, tmp_path, {})
        assert not [name for name in load_file(tmp_path / TENSORS) if "sketch" in name]
        loaded, _ = store.load(tmp_path)
        assert (loaded.sketch is None) == (book.sketch is None)
        loaded.check()


def test_a_sketch_that_is_no_longer_worthwhile_is_left_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(busy(), tmp_path, {})
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: False)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is None
    loaded.check()


def damage(directory: Path, how: Any) -> None:
    """Change the tensors of a saved codebook, its checksums being made to agree."""
    tensors = load_file(directory / TENSORS)
    how(tensors)
    save_file(tensors, directory / TENSORS)
    described = json.loads((directory / CONFIG).read_bytes())
    described["files"][TENSORS] = files.sha256((directory / TENSORS).read_bytes())
    described["checksum"] = files.checksum_of(described)
    (directory / CONFIG).write_bytes(files.render(described))


def shifted(name: str, by: float) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"sketch.{name}"] = tensors[f"sketch.{name}"] + by

    return change


def doubled(name: str) -> Any:
    # Scales keep their 16 significant bits, without which they would be refused as such.
    return lambda tensors: tensors.update({f"sketch.{name}": 2 * tensors[f"sketch.{name}"]})


def replaced(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.update({f"sketch.{name}": tensor})


def of_other_keys(tensors: dict[str, Tensor]) -> None:
    other = spread_out(106, seed=7).sketch
    assert other is not None
    tensors.update({f"sketch.{name}": tensor for name, tensor in other.state().items()})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(lambda t: t.pop("sketch.tail"), "tail", id="tensor missing"),
        pytest.param(lambda t: t.pop("sketch.upkeep"), "upkeep", id="past missing"),
        pytest.param(replaced("upkeep", torch.zeros(4).long()), "upkeep must", id="not fitted"),
        pytest.param(replaced("upkeep", torch.ones(4)), "upkeep must", id="past not counted"),
        pytest.param(replaced("centre", torch.zeros(15)), "centre must", id="other width"),
        pytest.param(replaced("covered", torch.tensor(100)), "covered must", id="too few rows"),
        pytest.param(replaced("covered", torch.tensor(300)), "covered must", id="beyond capacity"),
        pytest.param(
            replaced("outliers", torch.full((32,), 256)), "outliers must", id="outlier beyond"
        ),
        pytest.param(
            replaced("outliers", torch.full((32,), -2)), "outliers must", id="outlier below"
        ),
        pytest.param(replaced("scales", torch.ones(66)), "scales must", id="shape"),
        pytest.param(shifted("centre", 1.0), "keys and radii, got wrong slots", id="centre moved"),
        pytest.param(doubled("scales"), "keys and radii, got wrong slots", id="scales"),
        pytest.param(shifted("directions", 1.0), "directions must be", id="directions too long"),
        pytest.param(
            lambda t: (replaced("radius_bound", torch.tensor(0.4))(t), t),
            "keys and radii, got wrong slots",
            id="bound of radii too low",
        ),
        pytest.param(of_other_keys, "keys and radii, got wrong slots", id="of other keys"),
    ],
)
def test_a_sketch_that_is_damaged_or_of_another_codebook_is_refused_by_the_name_of_its_file(
    tmp_path: Path, how: Any, message: str
) -> None:
    store.save(busy(), tmp_path, {})
    store.load(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(StoreError, match=rf"{TENSORS}: bad tensors .*{message}"):
        store.load(tmp_path)


def test_an_audit_finds_what_a_sketch_was_not_told_of() -> None:
    book = busy()
    sketch = book.sketch
    assert sketch is not None
    assert sketch.faults(book.keys, book.radii) == []
    key, radius = book.keys[7].clone(), book.radii[9].clone()
    book.keys[7] += 1
    book.keys[11, 0] = math.nan
    book.radii[9] = 3.0
    assert sketch.faults(book.keys, book.radii) == [7, 9, 11]
    assert sketch.faults(book.keys, book.radii, torch.tensor([1, 11])) == [9, 11]
    sketch.extend(book.keys, 7, 12)
    sketch.update_radii_(book.radii, 9, 10)
    assert sketch.faults(book.keys, book.radii) == []
    book.keys[7], book.radii[9] = key, radius
    assert sketch.faults(book.keys, book.radii) == [7]
    book.keys[11] = spread_out(100).keys[11]
    assert sketch.faults(book.keys, book.radii) == [7]  # 11 has no bound that could be wrong
    with pytest.raises(AssertionError, match=r"the sketch is wrong about slots \[7\]"):
        book.check()
    sketch.extend(book.keys, 7, 12)
    book.check()
    sketch.covered.fill_(3)
    with pytest.raises(AssertionError, match="the sketch covers 3 slots"):
        book.check()


def test_status_says_what_the_sketch_covers_and_saves(edited: Any) -> None:
    editor: GraceEditor = edited("gpt2", capacity=WORTH - 1)
    assert editor.status()["sketch"] is None
    editor.detach()
    editor = edited("gpt2", capacity=64)
    unused = {"rows": 0, "active": False, "queries": 0, "scored": None, "scanned": None}
    size = editor.codebook.sketch.nbytes  # type: ignore[union-attr]
    assert editor.status()["sketch"] == {**unused, "bytes": size}
    dim = editor.codebook.keys.shape[1]
    for i in range(WORTH):
        editor.codebook.insert(torch.full((dim,), 9.0 * i), [i], torch.zeros(dim))
    counted(editor.codebook, 300, 1000, 10, 250)
    assert editor.status()["sketch"] == {
        "rows": WORTH,
        "active": True,
        "bytes": size,
        "queries": 300,
        "scored": 0.01,
        "scanned": 0.25,
    }
    editor.detach()
