"""Codebooks on disk: three files, written so that a crash never leaves a wrong state that loads.

    grace_config.json      format, settings, the caller's own configuration, checksums of the others
    codebook.safetensors   keys, values, radii, stored queries, values that only the history needs,
                           the sketch of the keys if there is one
    edits.jsonl            one line per edit of the history, then one per entry

The configuration vouches for the other two, so the state it describes is either there as a whole or
refused. Each file is first written under its name + ".new" and fsynced; then they are renamed, the
configuration last. What an interruption between the renames leaves is completed on reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor

from . import sketch_upkeep as sketching
from .codebook import Codebook
from .records import Edit, EditResult, Entry
from .storage import digest

FORMAT = 1
CONFIG = "grace_config.json"
TENSORS = "codebook.safetensors"
EDITS = "edits.jsonl"
_NEW = ".new"
_FLOATS = ("distance", "radius_before", "radius_after", "loss_start", "loss_end")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
_DTYPES["float64"] = torch.float64


class StoreError(ValueError):
    """A saved codebook is missing, damaged, too new, or not one that belongs here."""


def save(codebook: Codebook, directory: str | Path, config: dict[str, Any]) -> None:
    """Write a codebook with its whole history, and the caller's `config`, to a directory.

    An earlier save there is replaced. If that is interrupted, `load` finds the old state or the new
    one. Steps of undo are not saved.

    Args:
        codebook: outside a transaction.
        directory: made if it is not there.
        config: what JSON can hold; `load` returns it.

    Raises:
        TypeError, ValueError: `config` is not JSON. Nothing is written.
        OSError: as the file system says.
    """
    if codebook._open:
        raise ValueError("codebook must not be inside a transaction, got an open one")
    directory = Path(directory)
    rows = {edit.id: row for row, edit in enumerate(e for e in codebook.history if e.row >= 0)}
    files = {
        TENSORS: render_tensors(_tensors(codebook, rows)),
        EDITS: "".join(_line(record) for record in _records(codebook, rows)).encode(),
    }
    described: dict[str, Any] = {
        "format": FORMAT,
        "codebook": {
            "key_dim": codebook.keys.shape[1],
            "value_dim": codebook.values.shape[1],
            "dtype": str(codebook.keys.dtype).removeprefix("torch."),
            "value_dtype": str(codebook.values.dtype).removeprefix("torch."),
            "policy": codebook.policy,
            "radius": codebook.radius,
            "drift": codebook.drift,
            "max_radius": codebook.max_radius if math.isfinite(codebook.max_radius) else None,
            "capacity": codebook.capacity,
            "rows": codebook._row_count,
            "imported": len(codebook._imported_labels),
            "version": codebook.version,
            "next_id": codebook._next_id,
            "next_stamp": codebook._next_stamp,
        },
        "config": config,
        "files": {name: _sha256(content) for name, content in files.items()},
    }
    described["checksum"] = _checksum(described)
    files[CONFIG] = _render(described)

    directory.mkdir(parents=True, exist_ok=True)
    if (directory / (CONFIG + _NEW)).exists():
        _complete(directory)
    for name, content in files.items():
        with open(directory / (name + _NEW), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(directory)
    _rename(directory)


def load(
    directory: str | Path, device: torch.device | str = "cpu"
) -> tuple[Codebook, dict[str, Any]]:
    """Read what `save` wrote: the codebook, equal to the bit, and the caller's `config`.

    Raises:
        StoreError: naming the file: it is missing, truncated, altered, of a newer format, or does
            not agree with the others.
    """
    directory = Path(directory)
    described, files = _read(directory)
    try:
        tensors = parse_tensors(files[TENSORS])
    except Exception as error:  # safetensors raises its own kinds
        raise StoreError(f"{directory / TENSORS}: not a safetensors file ({error})") from error
    try:
        book = _empty(described["codebook"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory / CONFIG}: bad settings ({error!r})") from error
    try:
        _fill_tensors(book, tensors, described["codebook"])
        sketching.restore(book, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory / TENSORS}: bad tensors ({error!r})") from error
    try:
        _fill_records(book, files[EDITS], tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(f"{directory / EDITS}: bad record ({error!r})") from error
    sketching.settle(book.to(device))
    return book, described["config"]


# ---------------------------------------------------------------------- what is written


def _tensors(book: Codebook, rows: dict[int, int]) -> dict[str, Tensor]:
    count = book._row_count
    edits = [book.edit(id) for id in rows]
    at = torch.tensor([edit.row for edit in edits], dtype=torch.int64)
    stamps = sorted(book._pool)
    pool = [book._pool[stamp].cpu() for stamp in stamps]
    flat = [id for label in book._imported_labels for id in label]
    tensors = {
        "keys": book.keys[:count],
        "values": book.values[:count],
        "radii": book.radii[:count],
        "queries": book._queries[at],
        "distances": book._answer_distance[at],
        "pool": torch.stack(pool) if pool else book.values[:0],
        "pool_stamps": torch.tensor(stamps, dtype=torch.int64),
        "imported_radii": book._imported_radii,
        "imported_labels": torch.tensor(flat, dtype=torch.int64),
        "imported_lengths": torch.tensor([len(x) for x in book._imported_labels]).long(),
        **sketching.saved(book),
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _records(book: Codebook, rows: dict[int, int]) -> Iterator[dict[str, Any]]:
    """Describe every edit and every entry about which there is more to say than "as imported"."""
    for id, edit in sorted(book._edits.items()):
        if edit is None:
            yield {"purged": id}
            continue
        yield {
            "edit": id,
            "state": edit.state,
            "superseded_by": edit.superseded_by,
            "label": edit.label,
            "prompt": edit.prompt,
            "query": rows.get(id, -1),
            "slot": edit.slot,
            "value": edit.stamp,
            "verified": None if edit.verified is None else sorted(edit.verified),
            "result": {name: _plain(item) for name, item in asdict(edit.result).items()},
        }
    for slot, held in sorted(book._entries.items()):
        if held is None:
            yield {"dead": slot}
            continue
        yield {
            "entry": slot,
            "label": held.label,
            "value": held.stamp,
            "owner": held.owner,
            "members": held.members,
        }


def _plain(item: Any) -> Any:
    """Return what JSON can hold: a number that is not finite becomes its name."""
    return str(item) if isinstance(item, float) and not math.isfinite(item) else item


def _number(name: str, item: Any) -> Any:
    return float(item) if name in _FLOATS and isinstance(item, str) else item


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"


def _render(described: dict[str, Any]) -> bytes:
    return (json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checksum(described: dict[str, Any]) -> str:
    return _sha256(_render({k: v for k, v in described.items() if k != "checksum"}))


def _rename(directory: Path) -> None:
    for name in (TENSORS, EDITS, CONFIG):
        if (directory / (name + _NEW)).exists():
            os.replace(directory / (name + _NEW), directory / name)
    _sync(directory)


def _complete(directory: Path) -> None:
    """Finish a save that was interrupted between its renames, before another one begins."""
    try:
        _read_files(directory, _read_config(directory / CONFIG))
    except StoreError:
        try:
            _read_files(directory, _read_config(directory / (CONFIG + _NEW)))
        except StoreError:
            return
        _rename(directory)


def _sync(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------- what is read


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the configuration and the contents it vouches for."""
    try:
        described = _read_config(directory / CONFIG)
        return described, _read_files(directory, described)
    except StoreError as error:
        # A save that was interrupted between its renames has left the rest of the new state.
        try:
            described = _read_config(directory / (CONFIG + _NEW))
            return described, _read_files(directory, described)
        except StoreError:
            raise error from None


def _read_config(path: Path) -> dict[str, Any]:
    content = _read_bytes(path)
    try:
        described = json.loads(content)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise StoreError(f"{path}: not JSON ({error})") from error
    if not isinstance(described, dict) or not isinstance(described.get("format"), int):
        raise StoreError(f"{path}: not the configuration of a saved codebook")
    if described["format"] > FORMAT:
        raise StoreError(
            f"{path}: format must be at most {FORMAT}, got {described['format']}; "
            "it was written by a newer release"
        )
    if described.get("checksum") != _checksum(described) or content != _render(described):
        raise StoreError(f"{path}: checksum differs, the file was altered")
    return described


def _read_files(directory: Path, described: dict[str, Any]) -> dict[str, bytes]:
    contents = {}
    for name in (TENSORS, EDITS):
        wanted = described.get("files", {}).get(name)
        for candidate in (directory / name, directory / (name + _NEW)):
            if candidate.exists():
                content = _read_bytes(candidate)
                if _sha256(content) == wanted:
                    contents[name] = content
                    break
        else:
            _read_bytes(directory / name)  # raises where it is missing
            raise StoreError(f"{directory / name}: checksum differs, truncated or altered")
    return contents


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def _empty(settings: dict[str, Any]) -> Codebook:
    maximum = settings["max_radius"]
    book = Codebook(
        settings["key_dim"],
        settings["value_dim"],
        radius=settings["radius"],
        policy=settings["policy"],
        capacity=settings["capacity"],
        dtype=_DTYPES[settings["dtype"]],
        value_dtype=_DTYPES[settings["value_dtype"]],
        drift=settings["drift"],
        max_radius=math.inf if maximum is None else maximum,
    )
    if not 0 <= settings["rows"] <= settings["capacity"]:
        raise ValueError(f"rows must lie in [0, {settings['capacity']}], got {settings['rows']}")
    book.version = settings["version"]
    book._next_id, book._next_stamp = settings["next_id"], settings["next_stamp"]
    book._undo_end = "it was loaded"
    return book


def _fill_tensors(book: Codebook, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    rows, imported = settings["rows"], settings["imported"]
    key_dim, value_dim = book.keys.shape[1], book.values.shape[1]
    edits, pool = len(tensors["queries"]), len(tensors["pool_stamps"])
    expected: dict[str, tuple[torch.dtype, list[int]]] = {
        "keys": (book.keys.dtype, [rows, key_dim]),
        "values": (book.values.dtype, [rows, value_dim]),
        "radii": (torch.float32, [rows]),
        "queries": (book.keys.dtype, [edits, key_dim]),
        "distances": (torch.float32, [edits]),
        "pool": (book.values.dtype, [pool, value_dim]),
        "pool_stamps": (torch.int64, [pool]),
        "imported_radii": (torch.float32, [imported]),
        "imported_labels": (torch.int64, [int(tensors["imported_lengths"].sum())]),
        "imported_lengths": (torch.int64, [imported]),
    }
    for name, (dtype, shape) in expected.items():
        got = tensors[name]
        if got.dtype != dtype or list(got.shape) != shape:
            raise ValueError(f"{name} must be {dtype} {shape}, got {got.dtype} {list(got.shape)}")
    book.keys[:rows], book.values[:rows] = tensors["keys"], tensors["values"]
    book.radii[:rows] = tensors["radii"]
    book._row_count = rows
    book.count.fill_(rows)
    book._imported_radii = tensors["imported_radii"].clone()
    flat, start = tensors["imported_labels"].tolist(), 0
    for length in tensors["imported_lengths"].tolist():
        book._imported_labels.append(tuple(flat[start : start + length]))
        start += length
    for stamp, value in zip(tensors["pool_stamps"].tolist(), tensors["pool"], strict=True):
        book._pool[stamp] = value.clone()


def _fill_records(book: Codebook, content: bytes, tensors: dict[str, Tensor]) -> None:
    with book.transaction():
        for line in content.decode().splitlines():
            record = json.loads(line)
            if "edit" in record:
                _fill_edit(book, record, tensors)
            elif "entry" in record:
                book._entries[record["entry"]] = Entry(
                    tuple(record["label"]),
                    record["value"],
                    record["owner"],
                    tuple(record["members"]),
                )
            elif "dead" in record:
                book._entries[record["dead"]] = None
            else:
                book._edits[record["purged"]] = None
    book._undo.clear()
    imported = range(len(book._imported_labels))
    book._live_edits = sum(i not in book._edits for i in imported)
    book._live_edits += sum(edit is not None and edit.live for edit in book._edits.values())
    numbers = []
    for slot, radius in enumerate(tensors["radii"].tolist()):
        entry = book._entry(slot)
        if (entry is None) != (radius == -math.inf):
            raise ValueError(f"row {slot} is dead in one file and live in the other")
        if entry is None:
            book._holes[slot] = None
        numbers.append(-1 if entry is None else book._label_number(entry.label))
    book._label_ids[: book._row_count] = torch.tensor(numbers, dtype=torch.int64)
    if book._query_count != len(tensors["queries"]):
        raise ValueError(f"{len(tensors['queries'])} queries for {book._query_count} edits")
    # Rows and edits without a record of their own are as imported: row i answers for edit i.
    members = {(m, slot) for slot, entry in book._entries.items() if entry for m in entry.members}
    live = {(e.id, e.slot) for e in book._edits.values() if e and e.live}
    members |= {(i, slot) for i, slot in live if i == slot in imported and i not in book._entries}
    live |= {(i, i) for i in book._entries if i in imported and i not in book._edits}
    if members != live:
        raise ValueError("the members of the rows are not the live edits")


def _fill_edit(book: Codebook, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    id, at = record["edit"], record["query"]
    prompt = None if record["prompt"] is None else tuple(record["prompt"])
    row = -1
    if at >= 0:
        row = book._new_query_row(tensors["queries"][at], id)
        book._answer_slot[row] = record["slot"]
        book._answer_distance[row] = tensors["distances"][at]
    edit = Edit(
        id=id,
        label=tuple(record["label"]),
        prompt=prompt,
        row=row,
        slot=record["slot"],
        stamp=record["value"],
        verified=None if record["verified"] is None else frozenset(record["verified"]),
        result=EditResult(**{name: _number(name, x) for name, x in record["result"].items()}),
        state=record["state"],
        superseded_by=record["superseded_by"],
    )
    book._edits[id] = edit
    if edit.live and row >= 0:
        if prompt is not None:
            book._by_prompt[prompt] = id
        book._by_query[digest(tensors["queries"][at])] = id
