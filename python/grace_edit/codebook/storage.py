"""The codebook's storage: tensors, host records, and a journal that can take every change back.

Everything that changes does so through `Rows`, which first saves what it is about to change, once
per transaction and only the row concerned. A transaction that ends with an exception is rolled
back to the bit; one that ends well becomes one step of undo.
"""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import sketch_upkeep as sketching
from .records import CapacityError, Edit, Entry, Label, UndoError


class _Absent:
    """What a journal notes for a record that was not there; the class itself survives a copy."""


_ABSENT: Any = _Absent
_VECTORS = ("keys", "values", "_queries")
_SCALARS = ("radii", "_label_ids", "_query_owner")
_NUMBERS = ("_row_count", "_query_count", "_live_edits", "_purged")
_Journal = dict[tuple[str, Any], Any]  # (table, key) -> what was there when the journal opened


class Rows:
    """Capacity-allocated rows and the records that belong to them; no decisions.

    Rows `0..count-1` are in use. A dead one among them has radius -inf and holds zeros, as do the
    rows from `count` on. Queries are kept on the host, one row per edit that was not imported.

    `lock` is held while rows change and must be held while they are read in another thread.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        capacity: int,
        dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.keys = torch.zeros(capacity, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(capacity, value_dim, dtype=value_dtype, device=device)
        self.radii = torch.full((capacity,), -math.inf, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.lock = threading.RLock()
        self.version = 0
        self.frozen = False
        self.sketch = sketching.made(self.keys)
        self._upkeep = sketching.Upkeep()

        self._label_ids = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self._queries = torch.zeros(0, key_dim, dtype=dtype)
        # What answers each stored query now, [Q]; slot -1 at -inf for an edit that is not live, so
        # that no new key is ever nearer to it.
        self._answer_slot = torch.zeros(0, dtype=torch.int64)
        self._answer_distance = torch.zeros(0)
        self._query_owner = torch.zeros(0, dtype=torch.int64)

        # Imported rows need no record until something happens to them: row i, value i and edit i
        # belong together, with label i of `_imported_labels`; absence below means "as imported".
        self._imported_labels: list[Label] = []
        self._imported_radii = torch.zeros(0)
        self._entries: dict[int, Entry | None] = {}
        self._edits: dict[int, Edit | None] = {}
        self._holes: dict[int, None] = {}  # dead rows below count
        self._pool: dict[int, Tensor] = {}  # values that edits refer to and no row holds, by stamp
        self._by_prompt: dict[Label, int] = {}  # live edits
        self._by_query: dict[bytes, int] = {}
        self._row_count = 0
        self._query_count = 0
        self._live_edits = 0

        # Never taken back: ids and stamps are not used twice, labels keep their numbers.
        self._next_id = 0
        self._next_stamp = 0
        self._label_numbers: dict[Any, int] = {}

        self._open: list[_Journal] = []
        self._undo: list[_Journal] = []
        self._undo_end = ""  # why nothing earlier than `_undo` can be undone
        self._purged = 0  # a purge is part of the open transaction
        self._changed = False  # version went up within it

    def __getstate__(self) -> dict[str, Any]:
        return {name: item for name, item in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    # ------------------------------------------------------------------ transactions

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group what is done inside into one step of undo, all of it or nothing.

        Any exception, KeyboardInterrupt included, restores everything to the bit (`version`, which
        only goes up, and the numbering of ids apart) and is raised on. Transactions nest: an inner
        one that fails takes back its own part only.
        """
        self._open.append({})
        try:
            yield
            sketching.tell(self)
        except BaseException:
            with self.lock:
                self._restore(self._open.pop())
                if not self._open:
                    if self._changed:  # somebody may have seen a version in between
                        self.version += 1
                    self._changed = False
                sketching.tell(self)
            raise
        journal = self._open.pop()
        if self._open:
            for place, old in journal.items():
                self._open[-1].setdefault(place, old)
            return
        if journal:
            self._undo.append(journal)
        if self._purged:
            self._undo.clear()
            self._undo_end = "a purge"
        self._purged, self._changed = 0, False

    def undo(self) -> None:
        """Take the last operation or transaction back, to the bit; may be called again and again.

        Only `version` goes up instead, and the ids that were given out stay used.

        Raises:
            UndoError: there is nothing to undo: nothing was done, or what was done lies before a
                purge or before loading. Or a transaction is open.
        """
        if self._open:
            raise UndoError("undo must not be called inside a transaction, got an open one")
        if not self._undo:
            after = self._undo_end or "the codebook was made"
            raise UndoError(f"undo must follow a change, got none since {after}")
        journal = self._undo[-1]
        if ("_capacity", None) in journal and not self.frozen:
            self._warn_of_new_memory(journal["_capacity", None])
        with self.lock:
            self._restore(self._undo.pop())
            self.version += 1
            sketching.settle(self)

    def _bump(self) -> None:
        self.version += 1
        self._changed = True

    def _save(self, table: str, key: Any = None) -> None:
        """Remember what `table` holds at `key` before it changes, the first time in a journal."""
        journal = self._open[-1]
        if (table, key) not in journal:
            journal[table, key] = self._read(table, key)

    def _read(self, table: str, key: Any) -> Any:
        if table in _VECTORS:
            row = getattr(self, table)[key]
            return row.clone() if row.view(torch.uint8).any() else None  # None: zeros
        if table in _SCALARS:
            return getattr(self, table)[key].item()
        if table == "_answers":
            return self._answer_slot[key].item(), self._answer_distance[key].item()
        if table == "_capacity":
            return len(self.radii)
        if table in _NUMBERS:
            return getattr(self, table)
        return getattr(self, table).get(key, _ABSENT)

    def _restore(self, journal: _Journal) -> None:
        # Backwards: rows beyond the old capacity are written before the tensors shrink.
        for (table, key), old in reversed(journal.items()):
            if table in _VECTORS or table in _SCALARS:
                self._set_row(table, key, 0 if old is None else old)
            elif table == "_answers":
                self._answer_slot[key], self._answer_distance[key] = old
            elif table == "_capacity":
                if not self.frozen:  # captured graphs must keep their memory
                    self._resize(old)
            elif table in _NUMBERS:
                setattr(self, table, old)
                if table == "_row_count":
                    self.count.fill_(old)
            elif old is _ABSENT:
                getattr(self, table).pop(key, None)
            else:
                getattr(self, table)[key] = old

    # ------------------------------------------------------------------ writing

    def _put(self, table: str, key: Any, item: Any = _ABSENT) -> None:
        """Set a host record, or remove it."""
        self._save(table, key)
        if item is _ABSENT:
            getattr(self, table).pop(key, None)
        else:
            getattr(self, table)[key] = item

    def _set_number(self, name: str, number: int) -> None:
        self._save(name)
        setattr(self, name, number)
        if name == "_row_count":
            self.count.fill_(number)

    def _write(self, table: str, row: int, data: Tensor | float) -> None:
        """Write one row of a tensor; a vector that holds these bits already is left alone."""
        target = getattr(self, table)
        if isinstance(data, Tensor):
            data = data.to(target.device)
            if same_bits(target[row], data):
                return
        self._save(table, row)
        self._set_row(table, row, data)

    def _set_row(self, table: str, row: int, data: Tensor | float) -> None:
        # The one place where a row of a codebook in use is written.
        sketching.touch(self, table, row)
        getattr(self, table)[row] = data

    def _write_answer(self, row: int, slot: int, distance: float) -> None:
        self._save("_answers", row)
        self._answer_slot[row], self._answer_distance[row] = slot, distance

    def _new_slot(self) -> int:
        """Take the lowest dead row, else a new one."""
        if self._holes:
            slot = min(self._holes)
            self._put("_holes", slot)
            return slot
        slot = self._row_count
        if slot == len(self.radii):
            if self.frozen:
                raise CapacityError(
                    f"capacity must exceed the {slot} rows in use while the codebook is frozen, "
                    f"got {slot}; thaw it, or attach with a larger capacity"
                )
            self._warn_of_new_memory(2 * slot)
            self._save("_capacity")
            self._resize(2 * slot)
        self._set_number("_row_count", slot + 1)
        return slot

    def _warn_of_new_memory(self, capacity: int) -> None:
        if self.radii.is_cuda:
            warnings.warn(
                f"the codebook moves from {len(self.radii)} rows into new memory for {capacity}: "
                "CUDA graphs captured before must be captured again",
                stacklevel=3,
            )

    def _resize(self, capacity: int) -> None:
        fills = {"keys": 0, "values": 0, "radii": -math.inf, "_label_ids": -1}
        grown = {name: resized(getattr(self, name), capacity, fill) for name, fill in fills.items()}
        sketch, upkeep = sketching.resized(self, grown["keys"])
        # All made before the first is replaced.
        vars(self).update(grown, sketch=sketch, _upkeep=upkeep)

    def _new_query_row(self, query: Tensor, edit_id: int) -> int:
        row = self._query_count
        if row == len(self._queries):
            capacity = max(64, 2 * row)
            for name in ("_queries", "_answer_slot", "_answer_distance", "_query_owner"):
                setattr(self, name, resized(getattr(self, name), capacity, 0))
        self._set_number("_query_count", row + 1)
        self._write("_queries", row, query)
        self._write("_query_owner", row, edit_id)
        self._write_answer(row, -1, -math.inf)
        return row

    def _write_entry(self, slot: int, entry: Entry, value: Tensor | None, number: int) -> None:
        """Make or change the record of a row, with a new value if one is given."""
        if value is not None:
            self._retire_value(slot)
            self._write("values", slot, value)
        self._write("_label_ids", slot, number)
        self._put("_entries", slot, entry)

    def _retire_value(self, slot: int) -> None:
        """Keep a value that is about to be overwritten; `_prune_pool` drops it if nobody cares."""
        entry = self._entry(slot)
        if entry is not None and entry.stamp not in self._pool:
            self._put("_pool", entry.stamp, self.values[slot].cpu().clone())

    def _prune_pool(self) -> None:
        """Drop the values that no edit refers to or that a row holds."""
        if not self._pool:
            return
        held = {entry.stamp for entry in self._entries.values() if entry is not None}
        wanted = {edit.stamp for edit in self._edits.values() if edit is not None} - held
        for stamp in list(self._pool):
            untouched = stamp < len(self._imported_labels) and stamp not in self._entries
            if stamp not in wanted or untouched:
                self._put("_pool", stamp)

    # ------------------------------------------------------------------ reading

    def _entry(self, slot: int) -> Entry | None:
        if slot in self._entries:
            return self._entries[slot]
        if 0 <= slot < len(self._imported_labels):
            return Entry(self._imported_labels[slot], slot, slot, (slot,))
        return None

    def _value_of(self, edit: Edit) -> Tensor:
        """Return `[V]` the value that answers an edit, or last did."""
        if edit.stamp in self._pool:
            return self._pool[edit.stamp]
        # An imported value sits in the row of its own number until it is overwritten.
        for slot in (edit.slot, edit.stamp):
            entry = self._entry(slot)
            if entry is not None and entry.stamp == edit.stamp:
                return self.values[slot]
        raise KeyError(f"value {edit.stamp} of edit {edit.id} is not stored")

    def _stored_query(self, edit: Edit) -> Tensor:
        """Return `[D]` the query of an edit of the history."""
        return self.keys[edit.id] if edit.row < 0 else self._queries[edit.row]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two vectors of one dtype are equal to the bit (-0 is not 0, a NaN is itself)."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def digest(query: Tensor) -> bytes:
    """Return a hash of a query's numbers; -0 and 0, between which the distance is 0, are one."""
    plain = (query.detach().cpu() + 0.0).contiguous().view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


def resized(tensor: Tensor, rows: int, fill: float) -> Tensor:
    """Return a copy of `tensor` with `rows` rows, new ones filled with `fill`."""
    with torch.inference_mode(False):  # or nobody could write to it outside of that mode
        out = tensor.new_full((rows, *tensor.shape[1:]), fill)
        kept = min(rows, len(tensor))
        out[:kept] = tensor[:kept]
    return out
