"""How a codebook keeps its sketch: when it has one, how it stays true, when it is fitted anew.

A `grace_kernels.Sketch` lets a lookup read fewer keys and must be told of every key and radius that
is written. `touch` is called before each write: it takes the sketch out of use, at once and in
place, so that nobody is ever misled. `tell` catches up and takes it into use again, at the end of
every transaction, rollback and undo.

`settle`, called where a change of the codebook ends, decides about its speed:

* A sketch exists while the capacity is worth one, and covers nothing until the rows in use are. It
  is then fitted to them. Only a change of the capacity, which replaces all tensors, makes or drops
  one: what a compiled model sees stays the same.
* It is fitted anew when the rows in use have doubled, or when its scales do not reach the keys of
  more rows written since than 1 % of these and of the rows in use (lookups score such a key always;
  at 1 % that costs about as much as reading the sketch).
* It is hopeless when lookups, of 256 queries at least, had to read more than half of the pairs as
  without it. Radii that were large once may be the reason: the bound of all radii, which otherwise
  only grows, is taken anew. If that lowers nothing, it is fitted anew where the rows in use are a
  tenth more than at the last fit, or else stays out of use until the next.

A fit reads all keys twice, so each of these waits for a number of edits that is a share of the
rows: fits cost a stream of edits the same per edit at any size. What lookups counted is read here
alone, where the host waits for the device anyway, never in a lookup.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_kernels.sketch import Sketch, worthwhile

from ..progress import counter

if TYPE_CHECKING:
    from .storage import Rows

log = logging.getLogger("grace_edit")

PREFIX = "sketch."
_GROWTH = 2  # times the rows of the last fit
_OUT_OF_REACH = 0.01  # of the rows
_QUERIES = 256  # before they tell anything
_SCANNED = 0.5  # of the pairs
_ADDED = 0.1  # of the rows of the last fit
_GAP = 64  # rows told of needlessly rather than in one more call
_CHECKED = 256  # keys compared with a loaded sketch


@dataclass
class Upkeep:
    """What happened to a codebook since its sketch was fitted.

    Args:
        rows: in use at that time; 0: it was not fitted, and is told of nothing.
        written: keys written since.
        unknown: those of them that the scales do not reach.
        hopeless: it stays out of use until the next fit.
        stale: per tensor, the rows written that the sketch was not told of yet.
        fresh: rows whose keys it was told of since `settle`.
    """

    rows: int = 0
    written: int = 0
    unknown: int = 0
    hopeless: bool = False
    stale: dict[str, set[int]] = field(default_factory=lambda: {"keys": set(), "radii": set()})
    fresh: set[int] = field(default_factory=set)


def made(keys: Tensor) -> Sketch | None:
    """Return a sketch that covers nothing yet, None where keys `[C, D]` are not worth one."""
    capacity, dim = keys.shape
    if not worthwhile(capacity):
        return None
    with torch.inference_mode(False):  # or nobody could write to it outside of that mode
        sketch = Sketch(capacity, dim, keys.dtype, keys.device)
        sketch.active = False
    return sketch


def resized(book: Rows, keys: Tensor) -> tuple[Sketch | None, Upkeep]:
    """Return what is to stand beside `keys`, the codebook's in new memory."""
    new = made(keys)
    if new is None or book.sketch is None:
        return new, Upkeep()
    with torch.inference_mode(False):
        return book.sketch.resized(len(keys)), book._upkeep


def touch(book: Rows, table: str, row: int) -> None:
    """Note that a row of "keys" or "radii" is about to be written."""
    if book.sketch is None or table not in book._upkeep.stale:
        return
    if book.sketch.active:
        book.sketch.active = False
    book._upkeep.stale[table].add(row)


def tell(book: Rows) -> None:
    """Tell the sketch what was written, and of rows that came into use; then use it again."""
    sketch, upkeep = book.sketch, book._upkeep
    stale = upkeep.stale
    if sketch is None or not (stale["keys"] or stale["radii"]):
        return
    with book.lock:
        if upkeep.rows:
            for first, last in _runs(stale["radii"], book):
                sketch.update_radii_(book.radii, first, last)
            covered = sketch.rows
            for first, last in _runs(stale["keys"], book):
                if first < covered:
                    sketch.extend(book.keys, first, min(last, covered))
            if covered < book._row_count:
                sketch.extend(book.keys, covered, book._row_count)
            upkeep.fresh |= stale["keys"]
        stale["keys"].clear()
        stale["radii"].clear()
        # Last: an interruption before leaves the sketch out of use, and the rows to be told of.
        sketch.active = upkeep.rows > 0 and not upkeep.hopeless


def settle(book: Rows) -> None:
    """Tell the sketch of a change that ends here, and fit it anew if that has become worth it."""
    tell(book)
    sketch, upkeep, rows = book.sketch, book._upkeep, book._row_count
    if sketch is None:
        return
    if not upkeep.rows:
        if worthwhile(rows):
            fit(book)
        return
    upkeep.written += len(upkeep.fresh)
    queries, pairs, _, scanned, unknown = torch.cat([sketch.counters, _unknown(book)]).tolist()
    upkeep.unknown += unknown
    upkeep.fresh.clear()
    if rows >= _GROWTH * upkeep.rows or upkeep.unknown > _OUT_OF_REACH * max(upkeep.written, rows):
        fit(book)
    elif upkeep.hopeless or (queries >= _QUERIES and scanned > _SCANNED * pairs):
        if not upkeep.hopeless and _tightened(book):
            return
        if rows - upkeep.rows >= _ADDED * upkeep.rows:
            fit(book)
        elif not upkeep.hopeless:
            log.info("sketch out of use: %d of %d pairs were read without it", scanned, pairs)
            upkeep.hopeless, sketch.active = True, False


def fit(book: Rows) -> None:
    """Fit the sketch anew, in place; takes seconds for a large codebook and shows progress.

    An interruption leaves it out of use; the next change fits it.
    """
    sketch, rows = book.sketch, book._row_count
    assert sketch is not None
    with book.lock:
        book._upkeep = Upkeep()
        try:
            with counter("fitting the sketch") as progress:
                sketch.refit(book.keys, book.radii, rows, progress=progress)
            sketch.counters.zero_()
        except BaseException:
            sketch.active = False
            raise
        book._upkeep.rows = rows
    log.info("sketch fitted to %d rows", rows)


def _tightened(book: Rows) -> bool:
    """Take the bound of all radii anew; begin to count anew, and say so, if it has become less."""
    sketch, upkeep = book.sketch, book._upkeep
    assert sketch is not None
    with book.lock:
        rows, upkeep.rows = upkeep.rows, 0  # an interruption leaves it to be fitted anew
        less = sketch.retake_radii_(book.radii)
        upkeep.rows = rows
        if less:
            sketch.counters.zero_()
    return less


def _unknown(book: Rows) -> Tensor:
    """Return how many of the fresh rows are live and out of the scales' reach, `[1]` int64."""
    sketch = book.sketch
    assert sketch is not None
    rows = [row for row in book._upkeep.fresh if row < min(sketch.rows, len(book.radii))]
    at = torch.tensor(rows, dtype=torch.int64, device=sketch.head.device)
    return (sketch.unreachable(at) & (book.radii[at] != -torch.inf)).sum()[None]


def _runs(rows: Iterable[int], book: Rows) -> Iterator[tuple[int, int]]:
    """Return ranges `(first, last)`, ascending, that hold those of `rows` within the capacity."""
    first = last = -1
    for row in sorted(rows):
        if row >= len(book.radii):
            break
        if first >= 0 and row < last + _GAP:
            last = row + 1
            continue
        if first >= 0:
            yield first, last
        first, last = row, row + 1
    if first >= 0:
        yield first, last


def described(book: Rows) -> dict[str, Any] | None:
    """Return the state of the sketch for a person, None where there is none.

    `rows` in use that lookups use it for, `active`, `bytes`; of `queries` since the fit, the shares
    of pairs that were `scored` one by one and `scanned` as without a sketch, None before the first.
    """
    sketch = book.sketch
    if sketch is None:
        return None
    counts = sketch.counts()
    pairs = counts["pairs"]
    return {
        "rows": min(sketch.rows, book._row_count) if sketch.active else 0,
        "active": sketch.active,
        "bytes": sketch.nbytes,
        "queries": counts["queries"],
        "scored": counts["scored"] / pairs if pairs else None,
        "scanned": counts["scanned"] / pairs if pairs else None,
    }


# ---------------------------------------------------------------------- on disk


def saved(book: Rows) -> dict[str, Tensor]:
    """Return the tensors that `restore` takes; none for a sketch that was not fitted."""
    tell(book)
    sketch, upkeep = book.sketch, book._upkeep
    if sketch is None or not upkeep.rows:
        return {}
    past = [upkeep.rows, upkeep.written, upkeep.unknown, int(upkeep.hopeless)]
    state = {**sketch.state(), "upkeep": torch.tensor(past, dtype=torch.int64)}
    return {PREFIX + name: tensor for name, tensor in state.items()}


def restore(book: Rows, tensors: dict[str, Tensor]) -> None:
    """Give a codebook that was filled from `tensors` the sketch that is among them, if any.

    Some of its keys and all radii are compared with it.

    Raises:
        KeyError: a tensor of the sketch is missing.
        ValueError: one has a wrong shape, dtype or content, or it is the sketch of other keys.
    """
    state = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
    if not state:
        return
    past, outliers = state["upkeep"], state["outliers"]
    if past.dtype != torch.int64 or past.shape != (4,) or int(past[0]) < 1:
        raise ValueError(f"upkeep must be 4 int64, the first positive, got {past}")
    if state["centre"].shape != book.keys.shape[1:]:
        raise ValueError(
            f"centre must have {book.keys.shape[1]} columns like keys, got "
            f"{list(state['centre'].shape)}"
        )
    if not bool(((outliers >= -1) & (outliers < len(book.radii))).all()):
        raise ValueError(f"outliers must lie in [-1, {len(book.radii)}), got {outliers.tolist()}")
    sketch = Sketch.from_state(state, len(book.radii), book.keys.dtype)
    if sketch.rows < book._row_count:
        raise ValueError(f"covered must be at least {book._row_count}, got {sketch.rows}")
    looked = torch.arange(0, sketch.rows, max(1, sketch.rows // _CHECKED))
    wrong = sketch.faults(book.keys, book.radii, looked)
    if wrong:
        raise ValueError(f"sketch must be of these keys and radii, got wrong rows {wrong[:8]}")
    if book.sketch is None:
        return
    rows, written, unknown, hopeless = past.tolist()
    sketch.active = not hopeless
    book.sketch, book._upkeep = sketch, Upkeep(rows, written, unknown, bool(hopeless))
