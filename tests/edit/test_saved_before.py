"""Snapshots that an earlier release saved load to the bit and are edited as it would have done."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_streams import bits
from grace_edit.codebook import files, sketch_upkeep, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import EditResult, UndoError
from safetensors.torch import load_file
from torch import Tensor

from grace_kernels.sketch import Sketch

SAVED = Path(__file__).parents[1] / "golden" / "saved_by_4727689"
NAMES = ("default", "imported", "paper", "sketch")


def plain(item: Any) -> Any:
    """Return what JSON gives back: lists, and names of numbers that are not finite."""
    if isinstance(item, float) and not math.isfinite(item):
        return str(item)
    return [plain(each) for each in item] if isinstance(item, tuple | list) else item


def result_of(result: EditResult) -> dict[str, Any]:
    """Return a result as it was saved then, of one key, its probability and proof not known."""
    fields = {name: plain(item) for name, item in asdict(result).items()}
    assert fields.pop("keys") == 1
    assert fields.pop("probability") is None
    assert fields.pop("proven") in (None, False)
    return fields


def picture(book: Codebook) -> dict[str, Any]:
    """Return what `expected.json` says of a codebook."""
    labels = book.labels
    owners = [None if x is None else book.edit_of_slot(s).id for s, x in enumerate(labels)]
    return {
        "labels": plain(labels),
        "ids": book.ids,
        "entries": book.entries,
        "edits": book.edits,
        "version": book.version,
        "capacity": book.capacity,
        "members": [plain(book.members(slot)) for slot in range(int(book.count))],
        "owners": owners,
        "edits_by_id": {
            str(e.id): plain([e.state, e.slot, e.superseded_by, e.value_id, e.label])
            for e in book.history
        },
    }


def agrees(book: Codebook, expected: dict[str, Tensor], when: str) -> None:
    """Compare every tensor, and the answer to every probe, to the bit."""
    retired = book.storage.retired_values
    index, distance = book.lookup(expected["probes"])
    got = {
        "keys": book.keys,
        "values": book.values,
        "radii": book.radii,
        "index": index,
        "distance": distance,
        "queries": torch.stack([book.query_of(edit.id) for edit in book.history]),
        "retired_ids": torch.tensor(sorted(retired), dtype=torch.int64),
        "retired": torch.stack([retired[id] for id in sorted(retired)] or [book.values[0]]),
    }
    if not retired:
        got["retired"] = book.values[:0]
    for name, tensor in got.items():
        want = expected[f"{when}.{name}"]
        assert (tensor.dtype, tensor.shape) == (want.dtype, want.shape), name
        assert bits(tensor) == bits(want), name


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    least = 40 if request.param == "sketch" else 4096
    monkeypatch.setattr(sketch_upkeep, "worthwhile", lambda slots: slots >= least)
    return str(request.param)


def test_a_snapshot_of_4727689_loads_to_the_bit(name: str) -> None:
    book, config = store.load(SAVED / name)
    assert {e.result.proven for e in book.history if e.result.case != "import"} <= {None}
    expected = load_file(SAVED / name / "expected.safetensors")
    assert config == {"layer": "h.1", "made_for": name}
    assert picture(book) == json.loads((SAVED / name / "expected.json").read_text())["saved"]
    agrees(book, expected, "saved")
    records = map(json.loads, (SAVED / name / files.EDITS).read_text().splitlines())
    for record in (record for record in records if "edit" in record):
        edit = book.edit(record["edit"])
        got = [edit.state, edit.superseded_by, edit.label, edit.prompt, edit.slot, edit.value_id]
        keys = ("state", "superseded_by", "label", "prompt", "slot", "value")
        assert plain(got) == [record[key] for key in keys]
        assert edit.verified == (record["verified"] and frozenset(record["verified"]))
        assert (edit.query_index >= 0) == (record["query"] >= 0)
        assert result_of(edit.result) == record["result"]
    book.check()
    with pytest.raises(UndoError, match="since the codebook was loaded"):
        book.undo()


def test_the_sketch_of_a_snapshot_is_used_as_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_upkeep, "worthwhile", lambda slots: slots >= 40)
    monkeypatch.setattr(Sketch, "refit", lambda *_, **__: pytest.fail("the sketch was fitted"))
    book, _ = store.load(SAVED / "sketch")
    saved = load_file(SAVED / "sketch" / files.TENSORS)
    assert book.sketch is not None
    assert book.sketch.active
    state = book.sketch.state()
    assert {f"sketch.{part}" for part in state} | {"sketch.upkeep"} <= set(saved)
    for part, tensor in state.items():
        assert bits(tensor) == bits(saved[f"sketch.{part}"]), part


def test_what_is_saved_again_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    book, config = store.load(SAVED / name)
    assert {e.result.proven for e in book.history if e.result.case != "import"} <= {None}
    store.save(book, tmp_path, config)
    for file in (files.CONFIG, files.TENSORS, files.EDITS):
        assert (tmp_path / file).read_bytes() == (SAVED / name / file).read_bytes()


def test_the_result_of_an_edit_is_saved_with_the_fields_that_4727689_knows(tmp_path: Path) -> None:
    book = Codebook(2, 2)
    made = book.insert(torch.ones(2), (1,), torch.ones(2))
    book.record(replace(made, probability=0.75))
    store.save(book, tmp_path, {})
    known, now = (
        json.loads((directory / files.EDITS).read_text().splitlines()[0])["result"].keys()
        for directory in (SAVED / "default", tmp_path)
    )
    assert now == known
    assert store.load(tmp_path)[0].edit(0).result == replace(made, probability=0.75)


def test_a_snapshot_of_4727689_is_edited_as_it_would_have_been(name: str) -> None:
    book, _ = store.load(SAVED / name)
    expected = load_file(SAVED / name / "expected.safetensors")
    described = json.loads((SAVED / name / "expected.json").read_text())
    given = zip(expected["further.query"], expected["further.value"], strict=True)
    for step, (query, value) in zip(described["further"], given, strict=True):
        result = book.insert(query, step["label"], value, step["prompt"])
        assert result_of(result) == step["result"]
        if "delete" in step:
            book.delete(step["delete"])
        if "undo" in step:
            book.undo()
        book.check()
    assert picture(book) == described["after"]
    agrees(book, expected, "after")
