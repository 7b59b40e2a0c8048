"""How a codebook keeps its sketch: when it has one, how it stays true, when it is fitted anew.

A `grace_kernels.Sketch` lets a lookup read fewer keys and must be told of every key and radius that
is written. `touch` is called before each write: it takes the sketch out of use, at once and in
place, so that nobody is ever misled. `tell` catches up and takes it into use again, at the end of
every transaction, rollback and undo.

`maintain`, called where a change of the codebook ends, decides about its speed:

* A sketch exists while the capacity is worth one, and covers nothing until the slots in use are. It
  is then fitted to them. Only a change of the capacity, which replaces all tensors, makes or drops
  one: what a compiled model sees stays the same.
* It is fitted anew when the slots in use have doubled, or when its scales do not reach the keys of
  more slots written since than 1 % of these and of the slots in use (lookups score such a key
  always; at 1 % that costs about as much as reading the sketch).
* It is hopeless when lookups, of 256 queries at least, had to read more than half of the pairs as
  without it. Radii that were large once may be the reason: the bound of all radii, which otherwise
  only grows, is taken anew. If that lowers nothing, it is fitted anew where the slots in use are a
  tenth more than at the last fit, or else stays out of use until the next.

A fit reads all keys twice, so each of these waits for a number of edits that is a share of the
slots: fits cost a stream of edits the same per edit at any size. What lookups counted is read here
alone, where the host waits for the device anyway, never in a lookup.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grace_kernels.sketch import Sketch, worthwhile

from ..progress import counter

log = logging.getLogger("grace_edit")

PREFIX = "sketch."
_GROWTH = 2  # times the slots of the last fit
_OUT_OF_REACH = 0.01  # of the slots
_QUERIES = 256  # before they tell anything
_SCANNED = 0.5  # of the pairs
_ADDED = 0.1  # of the slots of the last fit
_GAP = 64  # slots told of needlessly rather than in one more call
_CHECKED = 256  # keys compared with a loaded sketch


@dataclass
class SinceFit:
    """What happened to a codebook since its sketch was fitted.

    Args:
        slots: in use at that time; 0: it was not fitted, and is told of nothing.
        written: keys written since.
        unknown: those of them that the scales do not reach.
        hopeless: it stays out of use until the next fit.
    """

    slots: int = 0
    written: int = 0
    unknown: int = 0
    hopeless: bool = False


@dataclass
class SketchUpkeep:
    """The sketch beside a codebook's keys, `[C, D]`, and what it was not told of yet.

    It holds no keys or radii: who calls it passes them, with the number of slots in use, and holds
    the codebook's lock.

    Args:
        sketch: None where the capacity is too small for one to pay.
        since_fit: what happened since it was fitted.
    """

    sketch: Sketch | None
    since_fit: SinceFit = field(default_factory=SinceFit)
    _untold: dict[str, set[int]] = field(default_factory=lambda: {"keys": set(), "radii": set()})
    _fresh: set[int] = field(
        default_factory=set
    )  # slots whose keys it was told of since `maintain`

    @classmethod
    def beside(cls, keys: Tensor) -> SketchUpkeep:
        """Return what is to stand beside new keys: a sketch that covers nothing yet, or none."""
        if not worthwhile(len(keys)):
            return cls(None)
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            sketch = Sketch(len(keys), keys.shape[1], keys.dtype, keys.device)
            sketch.active = False
        return cls(sketch)

    def resized(self, keys: Tensor) -> SketchUpkeep:
        """Return what is to stand beside `keys`, the codebook's in new memory."""
        if self.sketch is None or not worthwhile(len(keys)):
            return SketchUpkeep.beside(keys)
        with torch.inference_mode(False):
            return replace(self, sketch=self.sketch.resized(len(keys)))

    def to(self, device: torch.device | str) -> SketchUpkeep:
        """Return what is to stand beside the keys when they are on `device`."""
        return replace(self, sketch=None if self.sketch is None else self.sketch.to(device))

    @property
    def up_to_date(self) -> bool:
        """Whether the sketch was told of everything that was written."""
        return not any(self._untold.values())

    def take(self, other: SketchUpkeep) -> bool:
        """Hold in place what the sketch of equal keys and radii holds; False: it does not fit."""
        own, theirs = self.sketch, other.sketch
        if own is None or theirs is None or own.capacity != theirs.capacity:
            return False
        own.active = False
        self.since_fit = SinceFit()  # an interruption leaves it to be fitted anew
        own.copy_(theirs)
        self.since_fit, self._fresh = replace(other.since_fit), set()
        self._untold = {"keys": set(), "radii": set()}
        return True

    def touch(self, table: str, slot: int) -> None:
        """Take the sketch out of use: a slot of "keys" or "radii" is about to be written."""
        self.touch_all(table, (slot,))

    def touch_all(self, table: str, slots: Sequence[int]) -> None:
        """Take the sketch out of use, if any of these slots is about to be written."""
        if self.sketch is None or table not in self._untold or not slots:
            return
        if self.sketch.active:
            self.sketch.active = False
        self._untold[table].update(slots)

    def tell(self, keys: Tensor, radii: Tensor, in_use: int) -> None:
        """Tell the sketch what was written, and of slots that came into use; then use it again."""
        sketch, untold = self.sketch, self._untold
        if sketch is None or self.up_to_date:
            return
        if self.since_fit.slots:
            for first, last in _runs(untold["radii"], len(radii)):
                sketch.update_radii_(radii, first, last)
            covered = sketch.rows
            for first, last in _runs(untold["keys"], len(radii)):
                if first < covered:
                    sketch.extend(keys, first, min(last, covered))
            if covered < in_use:
                sketch.extend(keys, covered, in_use)
            self._fresh |= untold["keys"]
        untold["keys"].clear()
        untold["radii"].clear()
        # Last: an interruption before leaves the sketch out of use, and the slots to be told of.
        sketch.active = self.since_fit.slots > 0 and not self.since_fit.hopeless

    def maintain(self, keys: Tensor, radii: Tensor, in_use: int) -> None:
        """Tell the sketch of a change that ends here, and fit it anew if that has become worth it.

        A fit takes seconds for a large codebook.
        """
        self.tell(keys, radii, in_use)
        sketch, since = self.sketch, self.since_fit
        if sketch is None:
            return
        if not since.slots:
            if worthwhile(in_use):
                self._fit(sketch, keys, radii, in_use)
            return
        since.written += len(self._fresh)
        counts, unknown = sketch.take_stock(list(self._fresh), radii)
        since.unknown += unknown
        self._fresh.clear()
        grown = in_use >= _GROWTH * since.slots
        scanned, pairs = counts["scanned"], counts["pairs"]
        if grown or since.unknown > _OUT_OF_REACH * max(since.written, in_use):
            self._fit(sketch, keys, radii, in_use)
        elif since.hopeless or (counts["queries"] >= _QUERIES and scanned > _SCANNED * pairs):
            if not since.hopeless and self._tightened(sketch, radii):
                return
            if in_use - since.slots >= _ADDED * since.slots:
                self._fit(sketch, keys, radii, in_use)
            elif not since.hopeless:
                log.info("sketch out of use: %d of %d pairs were read without it", scanned, pairs)
                since.hopeless, sketch.active = True, False

    def _fit(self, sketch: Sketch, keys: Tensor, radii: Tensor, in_use: int) -> None:
        """Fit the sketch anew, in place; an interruption leaves that to the next change."""
        self.since_fit = SinceFit()
        self._untold = {"keys": set(), "radii": set()}
        self._fresh = set()
        try:
            with counter("fitting the sketch") as progress:
                sketch.refit(keys, radii, in_use, progress=progress)
            sketch.reset_counts_()
        except BaseException:
            sketch.active = False
            raise
        self.since_fit.slots = in_use
        log.info("sketch fitted to %d slots", in_use)

    def _tightened(self, sketch: Sketch, radii: Tensor) -> bool:
        """Take the bound of all radii anew; begin to count anew, and say so, if it is less now."""
        since = self.since_fit
        slots, since.slots = since.slots, 0  # an interruption leaves it to be fitted anew
        less = sketch.retake_radii_(radii)
        since.slots = slots
        if less:
            sketch.reset_counts_()
        return less

    def describe(self, in_use: int) -> dict[str, Any] | None:
        """Return the state of the sketch for a person; see `Codebook.describe_sketch`."""
        sketch = self.sketch
        if sketch is None:
            return None
        counts = sketch.counts()
        pairs = counts["pairs"]
        return {
            "rows": min(sketch.rows, in_use) if sketch.active else 0,
            "active": sketch.active,
            "bytes": sketch.nbytes,
            "queries": counts["queries"],
            "scored": counts["scored"] / pairs if pairs else None,
            "scanned": counts["scanned"] / pairs if pairs else None,
        }

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` takes; none for a sketch that was not fitted.

        It must be up to date.
        """
        since = self.since_fit
        if self.sketch is None or not since.slots:
            return {}
        past = [since.slots, since.written, since.unknown, int(since.hopeless)]
        state = {**self.sketch.state(), "upkeep": torch.tensor(past, dtype=torch.int64)}
        return {PREFIX + name: tensor for name, tensor in state.items()}

    def restore(self, tensors: dict[str, Tensor], keys: Tensor, radii: Tensor, in_use: int) -> None:
        """Take the sketch that is among `tensors`, if any, for these keys and radii.

        Some of the keys and all radii are compared with it.

        Raises:
            KeyError: a tensor of the sketch is missing.
            ValueError: one has a wrong shape, dtype or content, or it is the sketch of other keys.
        """
        state = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
        if not state:
            return
        past = state["upkeep"]
        if past.dtype != torch.int64 or past.shape != (4,) or int(past[0]) < 1:
            raise ValueError(f"upkeep must be 4 int64, the first positive, got {past}")
        sketch = Sketch.restored(state, keys, radii, in_use, _CHECKED)
        if self.sketch is None:
            return
        slots, written, unknown, hopeless = past.tolist()
        sketch.active = not hopeless
        self.sketch = sketch
        self.since_fit = SinceFit(slots, written, unknown, bool(hopeless))


def _runs(slots: set[int], capacity: int) -> Iterator[tuple[int, int]]:
    """Return ranges `(first, last)`, ascending, that hold those of `slots` below `capacity`."""
    first = last = -1
    for slot in sorted(slots):
        if slot >= capacity:
            break
        if first >= 0 and slot < last + _GAP:
            last = slot + 1
            continue
        if first >= 0:
            yield first, last
        first, last = slot, slot + 1
    if first >= 0:
        yield first, last
