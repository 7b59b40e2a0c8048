"""A codebook as settings, tensors and records that can be written to files, and back.

The names in them are those of the first release and stay: `rows` are slots in use, `value` and
`stamp` name a value id, `pool` the retired values. Records are one JSON object per edit or entry
about which there is more to say than "as imported"; `query` is the row of `queries` that an edit
was made with, -1 for an imported one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .records import Edit, EditResult, Entry
from .storage import Imported, Storage

_FLOATS = ("distance", "radius_before", "radius_after", "loss_start", "loss_end")
_NEWER = ("probability", "proven")


def settings_of(storage: Storage) -> dict[str, Any]:
    """Return what is to be known of a codebook before its tensors are read."""
    slots, settings = storage.slots, storage.settings
    autocast = settings.autocast
    return {
        # Where there is none, files are as those of the first release.
        **({} if autocast is None else {"autocast": str(autocast).removeprefix("torch.")}),
        "key_dim": slots.keys.shape[1],
        "value_dim": slots.values.shape[1],
        "dtype": str(slots.keys.dtype).removeprefix("torch."),
        "value_dtype": str(slots.values.dtype).removeprefix("torch."),
        "policy": settings.policy,
        "radius": settings.radius,
        "drift": settings.drift,
        "max_radius": settings.max_radius if math.isfinite(settings.max_radius) else None,
        "capacity": slots.capacity,
        "rows": slots.in_use,
        "imported": len(storage.imported.labels),
        "version": storage.version,
        "next_id": storage.next_id,
        "next_stamp": storage.next_value_id,
    }


def format_of(storage: Storage) -> int:
    """Return the lowest format whose readers understand this codebook."""
    several = any(edit and _several(edit) for edit in storage.edit_records.values())
    return 2 if several or storage.settings.nearest else 1


def content_of(storage: Storage) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the lines of records of a codebook."""
    asked = [edit for edit in storage.history() if edit.query_index >= 0]
    rows = {edit.id: row for row, edit in enumerate(asked)}
    at = torch.tensor([edit.query_index for edit in asked], dtype=torch.int64)
    lines = (json.dumps(r, separators=(",", ":"), allow_nan=False) for r in _records(storage, rows))
    return _tensors(storage, at), "".join(line + "\n" for line in lines)


def same(a: Storage, b: Storage) -> bool:
    """Say whether two codebooks are equal to the bit, but for capacity, sketch and hits."""
    settings = [{**settings_of(one), "capacity": 0} for one in (a, b)]
    if settings[0] != settings[1]:  # the version is among them
        return False
    (mine, records), (theirs, others) = content_of(a), content_of(b)
    kept = [name for name in mine if not name.startswith(("sketch.", "hit_"))]
    return records == others and all(_same_bits(mine[name], theirs[name]) for name in kept)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    x, y = (t.cpu().flatten().view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(x, y)


def _tensors(storage: Storage, at: Tensor) -> dict[str, Tensor]:
    slots, queries, imported = storage.slots, storage.queries, storage.imported
    with storage.lock:
        slots.tell_sketch()
        storage.gather_hits()
    count = slots.in_use
    retired = sorted(storage.retired_values)
    values = [storage.retired_values[id].cpu() for id in retired]
    flat = [id for label in imported.labels for id in label]
    tensors = {
        "keys": slots.keys[:count],
        "values": slots.values[:count],
        "radii": slots.radii[:count],
        "queries": queries.vectors[at],
        "distances": queries.distances[at],
        "pool": torch.stack(values) if values else slots.values[:0],
        "pool_stamps": torch.tensor(retired, dtype=torch.int64),
        "imported_radii": imported.radii,
        "imported_labels": torch.tensor(flat, dtype=torch.int64),
        "imported_lengths": torch.tensor([len(x) for x in imported.labels]).long(),
        **slots.sketch_upkeep.state(),
    }
    if storage.hits.on:  # else files are as those of the first release
        tensors |= _hits(storage)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _hits(storage: Storage) -> dict[str, Tensor]:
    """Return what was counted of the edits of the history."""
    hits = storage.hits
    tables = [
        [(id, number) for id, number in table.items() if storage.knows(id)]
        for table in (hits.gathered or {}, hits.used, hits.made)
    ]
    counted, used, made = (torch.tensor(t, dtype=torch.int64).reshape(-1, 2) for t in tables)
    return {
        "hit_edits": counted[:, 0],
        "hit_counts": counted[:, 1],
        "hit_used": used,
        "hit_made": made,
        "hit_started": torch.tensor(hits.started, dtype=torch.int64),
    }


def _records(storage: Storage, rows: dict[int, int]) -> Iterator[dict[str, Any]]:
    for id, edit in sorted(storage.edit_records.items()):
        yield edit_record(id, edit, rows.get(id, -1))
    for slot, entry in sorted(storage.entry_records.items()):
        yield entry_record(slot, entry)


def edit_record(id: int, edit: Edit | None, row: int) -> dict[str, Any]:
    """Return an edit as JSON can hold it, whose query is in this row; None: it was purged."""
    if edit is None:
        return {"purged": id}
    return {
        "edit": id,
        "state": edit.state,
        "superseded_by": edit.superseded_by,
        "label": edit.label,
        "prompt": edit.prompt,
        "query": row,
        "slot": edit.slot,
        "value": edit.value_id,
        "verified": None if edit.verified is None else sorted(edit.verified),
        **_result(edit.result),
        **_several(edit),
    }


def entry_record(slot: int, entry: Entry | None) -> dict[str, Any]:
    """Return the entry of a slot as JSON can hold it; None: the imported one is dead."""
    if entry is None:
        return {"dead": slot}
    return {
        "entry": slot,
        "label": entry.label,
        "value": entry.value_id,
        "owner": entry.owner,
        "members": entry.members,
    }


def entry_of(record: dict[str, Any]) -> Entry:
    """Return the entry that a record of one tells of."""
    label, members = tuple(record["label"]), tuple(record["members"])
    return Entry(label, record["value"], record["owner"], members)


def _result(result: EditResult) -> dict[str, Any]:
    fields = {name: _plain(item) for name, item in asdict(result).items()}
    # An older release reads the file, and knows none of these fields of a result. It looks for no
    # other field of an edit than its own.
    newer = {name: fields.pop(name) for name in _NEWER}
    if result.keys == 1:
        del fields["keys"]
    return {"result": fields, **{k: item for k, item in newer.items() if item is not None}}


def _several(edit: Edit) -> dict[str, Any]:
    """Return what an edit of one key, made without negatives, has no fields for."""
    fields = {"part_of": edit.part_of, "radius": edit.radius, "negatives": edit.negatives or None}
    return {name: item for name, item in fields.items() if item is not None}


def _plain(item: Any) -> Any:
    """Return what JSON can hold: a number that is not finite becomes its name."""
    return str(item) if isinstance(item, float) and not math.isfinite(item) else item


def _result_fields(record: dict[str, Any]) -> dict[str, Any]:
    fields = {name: _number(name, item) for name, item in record["result"].items()}
    return {**{name: record.get(name) for name in _NEWER}, **fields}


def _number(name: str, item: Any) -> Any:
    return float(item) if name in _FLOATS and isinstance(item, str) else item


def fill_tensors(
    storage: Storage, tensors: dict[str, Tensor], settings: dict[str, Any], *, adopt: bool = False
) -> None:
    """Fill the slots, and the sketch, of an empty codebook on a CPU.

    Args:
        adopt: keys and values become its memory, whatever its capacity was.

    Raises:
        KeyError, TypeError, ValueError: a tensor is missing or not what the settings say.
    """
    slots = storage.slots
    count, imported = settings["rows"], settings["imported"]
    key_dim, value_dim = slots.keys.shape[1], slots.values.shape[1]
    key_type, value_type = slots.keys.dtype, slots.values.dtype
    edits, retired = len(tensors["queries"]), len(tensors["pool_stamps"])
    expected: dict[str, tuple[torch.dtype, list[int]]] = {
        "keys": (key_type, [count, key_dim]),
        "values": (value_type, [count, value_dim]),
        "radii": (torch.float32, [count]),
        "queries": (key_type, [edits, key_dim]),
        "distances": (torch.float32, [edits]),
        "pool": (value_type, [retired, value_dim]),
        "pool_stamps": (torch.int64, [retired]),
        "imported_radii": (torch.float32, [imported]),
        "imported_labels": (torch.int64, [int(tensors["imported_lengths"].sum())]),
        "imported_lengths": (torch.int64, [imported]),
    }
    for name, (dtype, shape) in expected.items():
        got = tensors[name]
        if got.dtype != dtype or list(got.shape) != shape:
            raise ValueError(f"{name} must be {dtype} {shape}, got {got.dtype} {list(got.shape)}")
    fill = slots.adopt if adopt else slots.fill
    fill(tensors["keys"], tensors["values"], tensors["radii"])
    slots.sketch_upkeep.restore(tensors, slots.keys, slots.radii, slots.in_use)


def fill_records(storage: Storage, lines: str, tensors: dict[str, Tensor]) -> None:
    """Fill queries and records of a codebook whose slots are filled.

    Raises:
        KeyError, TypeError, ValueError, IndexError, AttributeError: a record is not one, or does
            not agree with the tensors.
    """
    edits: dict[int, Edit | None] = {}
    entries: dict[int, Entry | None] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        if "edit" in record:
            edits[record["edit"]] = edit_of(record)
        elif "entry" in record:
            entries[record["entry"]] = entry_of(record)
        elif "dead" in record:
            entries[record["dead"]] = None
        else:
            edits[record["purged"]] = None

    asked = [edit for edit in edits.values() if edit and edit.query_index >= 0]
    asked.sort(key=lambda edit: edit.query_index)
    if [edit.query_index for edit in asked] != list(range(len(tensors["queries"]))):
        raise ValueError(f"{len(tensors['queries'])} queries for {len(asked)} edits, or not theirs")
    owners, slots = [edit.id for edit in asked], [edit.slot for edit in asked]
    storage.queries.fill(tensors["queries"], owners, slots, tensors["distances"])
    retired = zip(tensors["pool_stamps"].tolist(), tensors["pool"], strict=True)
    values = {id: value.clone() for id, value in retired}
    storage.fill(_imported(tensors), edits, entries, values)
    if "hit_edits" in tensors:
        ids, counts = tensors["hit_edits"].tolist(), tensors["hit_counts"].tolist()
        used, made, started = {}, {}, None
        if "hit_used" in tensors:
            used, made = (dict(tensors[name].tolist()) for name in ("hit_used", "hit_made"))
            started = int(tensors["hit_started"])
        storage.hits.go_on(dict(zip(ids, counts, strict=True)), used, made, started)
    _check_agreement(storage, tensors["radii"])


def _imported(tensors: dict[str, Tensor]) -> Imported:
    flat, start = tensors["imported_labels"].tolist(), 0
    labels = []
    for length in tensors["imported_lengths"].tolist():
        labels.append(tuple(flat[start : start + length]))
        start += length
    return Imported(labels, tensors["imported_radii"].clone())


def edit_of(record: dict[str, Any]) -> Edit:
    """Return the edit that a record of one tells of."""
    return Edit(
        id=record["edit"],
        label=tuple(record["label"]),
        prompt=None if record["prompt"] is None else tuple(record["prompt"]),
        query_index=max(record["query"], -1),
        slot=record["slot"],
        value_id=record["value"],
        verified=None if record["verified"] is None else frozenset(record["verified"]),
        result=EditResult(**_result_fields(record)),
        state=record["state"],
        superseded_by=record["superseded_by"],
        part_of=record.get("part_of"),
        radius=record.get("radius"),
        negatives=tuple(tuple(prompt) for prompt in record.get("negatives", ())),
    )


def _check_agreement(storage: Storage, radii: Tensor) -> None:
    for slot, radius in enumerate(radii.tolist()):
        if (storage.entry(slot) is None) != (radius == -math.inf):
            raise ValueError(f"slot {slot} is dead in one file and live in the other")
    # Slots and edits without a record of their own are as imported: slot i answers for edit i.
    edits, entries = storage.edit_records, storage.entry_records
    imported = range(len(storage.imported.labels))
    members = {(m, slot) for slot, entry in entries.items() if entry for m in entry.members}
    live = {(edit.id, edit.slot) for edit in edits.values() if edit and edit.live}
    members |= {(i, slot) for i, slot in live if i == slot in imported and i not in entries}
    live |= {(i, i) for i in entries if i in imported and i not in edits}
    if members != live:
        raise ValueError("the members of the entries are not the live edits")
    parts = [edit for edit in edits.values() if edit and edit.part_of is not None]
    if any(edit not in storage.group(edit.whole)[1:] for edit in parts):
        raise ValueError("a part does not follow its edit")
