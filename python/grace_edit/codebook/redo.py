"""A change as bytes, and the same change made to an equal codebook elsewhere.

Nothing is decided again: what changed are places (see `journal`), and a record holds what each of
them holds now. It is JSON, framed by its length, and safetensors. Edits and entries are written as
in a snapshot. What differs between two codebooks that are equal otherwise is named by what it
belongs to: a stored query by its edit, the number of a label by the label.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor

from . import snapshot
from .journal import Place
from .records import CapacityError, Edit
from .storage import Absent, Storage

_LENGTH = struct.Struct("<Q")
_ROWS = ("keys", "values", "radii")
_CHANGES = ("free", "keys", "values", "radii", "records", "asked", "retired", "dropped")
_OF_QUERIES = ("vectors", "owners", "answers")


def render(storage: Storage, changed: Iterable[Place], taken: int = 0) -> bytes:
    """Return the record of a change that `storage` has just gone through.

    Args:
        taken: the highest version that may be seen before the next record is there.
    """
    places: dict[Any, dict[str, list[Any]]] = {
        part: defaultdict(list) for part in (storage, storage.slots, storage.queries)
    }
    for part, table, key in changed:
        places[part][table].append(key)
    own, slots, queries = places.values()
    tensors = {name: _rows(storage, name, slots[name]) for name in _ROWS}
    # An edit that is new may have taken a place which held just what it holds now.
    indices = {edit.query_index for edit in _there(storage, own["edit_records"])}
    asked = _asked(storage, indices.union(*(queries[name] for name in _OF_QUERIES)))
    at = torch.tensor([edit.query_index for edit in asked], dtype=torch.int64)
    tensors["queries"] = storage.queries.vectors[at]
    tensors["distances"] = storage.queries.distances[at]
    retired = {id: storage.retired_values.get(id) for id in own["retired_values"]}
    values = [value.cpu() for value in retired.values() if value is not None]
    tensors["retired"] = torch.stack(values) if values else storage.slots.values[:0].cpu()
    said: dict[str, Any] = {
        "version": storage.version,
        "taken": taken,
        "next_id": storage.next_id,
        "next_stamp": storage.next_value_id,
        "capacity": storage.slots.capacity,
        "rows": storage.slots.in_use,
        "live": storage.live_edits,
        "free": [[slot, slot in storage.slots.free] for slot in slots["free"]],
        **{name: _slots(storage, slots[name]) for name in _ROWS},
        "records": [_record(storage, "edit", id) for id in sorted(own["edit_records"])]
        + [_record(storage, "entry", slot) for slot in sorted(own["entry_records"])],
        "asked": [[edit.id, *storage.queries.answer(edit.query_index)[:1]] for edit in asked],
        "retired": [id for id, value in retired.items() if value is not None],
        "dropped": [id for id, value in retired.items() if value is None],
        "by_prompt": [[key, storage.by_prompt.get(key)] for key in own["by_prompt"]],
        "by_query": [[key.hex(), storage.by_query.get(key)] for key in own["by_query"]],
        "past": [[id, id in storage.past] for id in own["past"]],
    }
    head = json.dumps(said, separators=(",", ":"), allow_nan=False).encode()
    body = render_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return _LENGTH.pack(len(head)) + head + body


def _slots(storage: Storage, slots: list[int]) -> list[int]:
    # What is beyond a capacity that undoing has made smaller again is gone with it.
    return sorted(slot for slot in slots if slot < storage.slots.capacity)


def _rows(storage: Storage, name: str, slots: list[int]) -> Tensor:
    tensor: Tensor = getattr(storage.slots, name)
    at = torch.tensor(_slots(storage, slots), dtype=torch.int64, device=tensor.device)
    return tensor[at]


def _there(storage: Storage, ids: list[int]) -> list[Edit]:
    found = (storage.edit_records.get(id) for id in ids)
    return [edit for edit in found if edit is not None]


def _asked(storage: Storage, indices: set[int]) -> list[Edit]:
    count = storage.queries.count
    owners = {int(storage.queries.owners[index]) for index in indices if 0 <= index < count}
    return [edit for edit in _there(storage, sorted(owners)) if edit.query_index >= 0]


def _record(storage: Storage, kind: str, key: int) -> dict[str, Any]:
    found = getattr(storage, f"{kind}_records").get(key, Absent)
    if found is Absent:
        return {"gone": kind, "key": key}
    if kind == "edit":
        row = -1 if found is None else min(found.query_index, 0)
        return snapshot.edit_record(key, found, row)
    return snapshot.entry_record(key, found)


def version_of(record: bytes) -> int:
    """Return the version that a record leads to.

    Raises:
        KeyError, TypeError, ValueError: it is no record.
    """
    return int(_parse(record)[0]["version"])


def rows_of(record: bytes) -> set[int]:
    """Return the slots of which a record holds a key, a value or a radius.

    Raises:
        KeyError, TypeError, ValueError: it is no record.
    """
    said = _parse(record)[0]
    return {slot for name in _ROWS for slot in said[name]}


def changes_something(record: bytes) -> bool:
    """Say whether a record is of a change, not of a writer that came or went.

    Raises:
        KeyError, TypeError, ValueError: it is no record.
    """
    return _changes(_parse(record)[0])


def _changes(said: dict[str, Any]) -> bool:
    return any(said[name] for name in _CHANGES)


def _parse(record: bytes) -> tuple[dict[str, Any], bytes]:
    if len(record) < _LENGTH.size:
        raise ValueError(f"record must have {_LENGTH.size} bytes at least, got {len(record)}")
    end = _LENGTH.size + _LENGTH.unpack_from(record)[0]
    return json.loads(record[_LENGTH.size : end]), record[end:]


def apply(storage: Storage, record: bytes) -> bool:
    """Make the change of a record, within the tensors that are there if the capacity allows it.

    A single step to lookups, all of it or nothing. It is no step of undo: what was done before
    cannot be undone afterwards.

    Args:
        storage: equal to the one that the record was made of, before that change.
        record: what `render` returned.

    Returns:
        Whether it changes anything: one that says no more than a version does not.

    Raises:
        CapacityError: it needs more slots than there are, and the codebook is frozen.
        KeyError, TypeError, ValueError: it is no record, or one of another codebook.
    """
    said, body = _parse(record)
    try:
        tensors = parse_tensors(body)
    except Exception as error:  # safetensors raises its own kinds
        raise ValueError(f"record must end with safetensors ({error})") from error
    capacity = storage.slots.capacity
    if said["capacity"] > capacity:
        if storage.slots.frozen:
            raise CapacityError(
                f"cannot follow a growth to {said['capacity']} slots: the codebook is frozen and "
                f"has {capacity}; thaw it, or attach with a larger capacity"
            )
        storage.slots.warn_of_new_memory(said["capacity"])
    changes = _changes(said)
    with storage.change():
        _apply_slots(storage, said, tensors)
        _apply_records(storage, said, tensors)
        storage.drop_labels()
        storage.slots.maintain_sketch()
        # The writer's number, or the next one where that has gone back.
        version = max(said["version"], storage.version + changes)
        for name, number in (("taken", said["taken"]), ("version", version)):
            storage.journal.write(storage, name, None, number)
        storage.next_id, storage.next_value_id = said["next_id"], said["next_stamp"]
    storage.journal.forget("a change was followed")
    return changes


def _apply_slots(storage: Storage, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    slots, write = storage.slots, storage.journal.write
    if said["capacity"] != slots.capacity:
        write(slots, "capacity", None, said["capacity"])
    for slot, free in said["free"]:
        write(slots, "free", slot, free)
    write(slots, "in_use", None, said["rows"])
    for name in _ROWS:
        for slot, row in zip(said[name], tensors[name], strict=True):
            # A radius last: one that makes its slot live must find the key.
            write(slots, name, slot, row.to(slots.device))


def _apply_records(storage: Storage, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    write, queries = storage.journal.write, storage.queries
    vectors = {
        id: (slot, vector, distance)
        for (id, slot), vector, distance in zip(
            said["asked"], tensors["queries"], tensors["distances"].tolist(), strict=True
        )
    }
    labelled = {*said["keys"], *said["radii"]}
    for record in said["records"]:
        if "entry" in record or "dead" in record or record.get("gone") == "entry":
            slot = record.get("entry", record.get("dead", record.get("key")))
            new = snapshot.entry_of(record) if "entry" in record else None
            write(storage, "entry_records", slot, Absent if "gone" in record else new)
            labelled.add(slot)
            continue
        id = record.get("edit", record.get("purged", record.get("key")))
        before = storage.edit_records.get(id)
        index = -1 if before is None else before.query_index
        if "edit" not in record:
            if index >= 0:
                queries.erase(index)
            write(storage, "edit_records", id, Absent if "gone" in record else None)
            continue
        if record["query"] >= 0 > index:
            index = queries.add(vectors[id][1], id)
        elif index >= 0 > record["query"]:
            queries.erase(index)
            index = -1
        write(storage, "edit_records", id, snapshot.edit_of({**record, "query": index}))
    for id, (slot, vector, distance) in vectors.items():
        index = storage.edit(id).query_index
        queries.write(index, vector)
        queries.set_answer(index, slot, distance)
    for slot in sorted(labelled):
        if slot < storage.slots.capacity:
            entry = storage.entry(slot)
            number = -1 if entry is None else storage.label_number(entry.label)
            write(storage.slots, "label_ids", slot, number)
    for id, value in zip(said["retired"], tensors["retired"], strict=True):
        write(storage, "retired_values", id, value.clone())
    for id in said["dropped"]:
        write(storage, "retired_values", id, Absent)
    for prompt, id in said["by_prompt"]:
        write(storage, "by_prompt", tuple(prompt), Absent if id is None else id)
    for query, id in said["by_query"]:
        write(storage, "by_query", bytes.fromhex(query), Absent if id is None else id)
    for id, there in said["past"]:
        write(storage, "past", id, True if there else Absent)
    write(storage, "live_edits", None, said["live"])
