"""A certified sketch of a codebook's keys, from which `lookup` sees that a query is far from a key.

66 bytes per slot give a lower bound of the distance between a query and a key: `sketch_math.py`
says how, `sketch_layout.py` where each number stands.

Within which reach T keys matter: a hit lies within its own radius, and only a key at least as near
as some true hit can take its place. A kernel may thus look, in one pass, for keys within their own
radii, and in another one, for the few queries that found such a key, for everything nearer (CPU);
or at once for every key within `radius_bound`, having first scored the few slots whose radii exceed
it (GPU). Lemma 20 in `docs/error-bounds.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import sketch_math
from .sketch_layout import BLOCK, COUNTERS, ERROR, HEAD_NUMBERS, NAMES, OUTLIERS, UNKNOWN, layout
from .validation import check_codebook

_SAMPLE = 8192  # keys that directions are taken from
_ELEMENTS = 1 << 23  # of keys held in float64 at a time
_STATE = NAMES[:-1]  # all but the counters
# A lookup of one query on a CPU took 0.15 (D = 4096, float32) to 0.61 (D = 384, bfloat16) of the
# time without a sketch at 4096 slots, and broke even between 512 and 2048 (docs/performance.md).
_WORTHWHILE = 4096


def worthwhile(slots: int) -> bool:
    """Say whether looking at a sketch first pays for a codebook of so many slots."""
    return slots >= _WORTHWHILE


class Sketch:
    """What `lookup` and `adapt_` take as `sketch`; it changes their speed, never an answer.

    It belongs to one tensor of keys `[C, D]` and one of radii `[C]` and must be told what is
    written to them: `extend` after keys, `update_radii_` after the radius of any slot in use, with
    codes or not. Slots that have none are read as without a sketch. All of this happens in place,
    without waiting for a GPU (`fit` and `refit` apart), so that compiled models and captured graphs
    see it.

    Attributes:
        centre: `[D]` float32, c.
        directions: `[64, D]` bfloat16, P.
        scales: `[67]` float32: of the residual, of the error, of the 64 coordinates, all with 16
            significant bits so that a scale times a code is exact; last what is to be added to
            every residual.
        head: `[ceil(C / 32), 10, 32]` int8, codes of residual, error and coordinates 0..7 of 32
            slots each.
        tail: `[ceil(C / 32), 56, 32]` int8, codes of coordinates 8..63.
        covered: int64 scalar, slots that lookups use the sketch for; 0 while it is not `active`.
        radius_bound: float32 scalar, not below the radius of any slot but the outliers.
        outliers: `[32]` int64, slots with the largest radii; -1: none.
        counters: `[4]` int64, written by lookups: queries, pairs of a query and a covered slot,
            pairs whose distance was computed alone (scored), pairs read as without a sketch
            (scanned).
        dtype: of the keys.
        rows: int, slots that have codes, whether it is `active` or not.
    """

    centre: Tensor
    directions: Tensor
    scales: Tensor
    head: Tensor
    tail: Tensor
    covered: Tensor
    radius_bound: Tensor
    outliers: Tensor
    counters: Tensor

    def __init__(self, capacity: int, dim: int, dtype: torch.dtype, device: Any = "cpu") -> None:
        """Make a sketch that covers nothing yet; see `fit`."""
        blocks = -(-capacity // BLOCK)
        self.dtype = dtype
        self.rows = 0
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            for name, (shape, kind) in layout(dim, blocks).items():
                setattr(self, name, torch.zeros(shape, dtype=kind, device=device))
            self.scales.fill_(1)
            self.radius_bound.fill_(-math.inf)
            self.outliers.fill_(-1)
        self._active = True

    @classmethod
    def fit(
        cls,
        keys: Tensor,
        radii: Tensor,
        count: Tensor | int | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> Sketch:
        """Make a sketch of a codebook. Takes two passes over the keys; waits for the device.

        Args:
            keys: `[C, D]` float32, float16 or bfloat16; memory is set aside for all C rows.
            radii: `[C]` float32; the directions follow the keys of live slots.
            count: the slots in use, as for `lookup`.
            progress: called with the slots done and the slots in all.

        Raises:
            TypeError, ValueError: as `lookup`, and keys without columns.
        """
        check_codebook("keys", keys, keys, radii, count)
        if keys.shape[1] == 0:
            raise ValueError(f"keys must have columns, got shape {list(keys.shape)}")
        sketch = cls(keys.shape[0], keys.shape[1], keys.dtype, keys.device)
        sketch.refit(keys, radii, count, progress=progress)
        return sketch

    def refit(
        self,
        keys: Tensor,
        radii: Tensor,
        count: Tensor | int | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Follow the keys as they are now, in the tensors that are there; see `fit`.

        An interruption leaves a sketch that covers the slots done so far.

        Raises:
            ValueError: there are more keys than this sketch has memory for, or they or the radii
                are of another width, dtype or device.
        """
        self._check(keys, radii)
        if len(keys) > self.capacity:
            raise ValueError(f"keys must have at most {self.capacity} rows, got {len(keys)}")
        rows = keys.shape[0] if count is None else min(max(int(count), 0), keys.shape[0])
        if not self._active:
            self.counters.zero_()
        self.covered.zero_()
        self.rows, self._active = 0, True
        self.radius_bound.fill_(-math.inf)
        self.outliers.fill_(-1)
        self.update_radii_(radii, 0, rows)
        live = (radii[:rows] != -math.inf).nonzero()[:, 0]
        sample = keys[live[:: max(1, -(-len(live) // _SAMPLE))]]
        sketch_math.fit_(self.centre, self.directions, self.scales, sample)
        step = max(BLOCK, _ELEMENTS // max(1, keys.shape[1]) // BLOCK * BLOCK)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            self.extend(keys, first, last)
            if progress is not None:
                progress(last, rows)

    def extend(self, keys: Tensor, first: int, last: int) -> None:
        """Sketch slots `first..last-1`, new ones or old ones whose keys have changed.

        Args:
            keys: `[C, D]`, all of them, C no more than the slots this sketch has memory for.
            first, last: 0 <= first <= last <= C; `first` is at most `rows`.

        Raises:
            ValueError: a slot is out of range, or keys are not those this sketch was made for.
        """
        self._check(keys)
        _check_range(first, last, min(len(keys), self.capacity))
        if first > self.rows:
            raise ValueError(f"first must be at most the {self.rows} slots covered, got {first}")
        step = max(1, _ELEMENTS // keys.shape[1])
        for start in range(first, last, step):
            stop = min(start + step, last)
            codes = sketch_math.encode(keys[start:stop], self.centre, self.directions, self.scales)
            slot = torch.arange(start, stop, device=codes.device)
            block, place = slot // BLOCK, slot % BLOCK
            self.head[block, :, place] = codes[:, :HEAD_NUMBERS]
            self.tail[block, :, place] = codes[:, HEAD_NUMBERS:]
            self.rows = max(self.rows, stop)
        if self._active:
            self.covered.fill_(self.rows)

    def update_radii_(self, radii: Tensor, first: int, last: int) -> None:
        """Take note of the radii of slots `first..last-1`, those without codes included.

        Args:
            radii: `[C]` float32, those of all slots.

        Raises:
            ValueError: a slot is out of range, or radii are not those of this sketch's device.
        """
        if radii.dim() != 1 or radii.dtype != torch.float32 or radii.device != self.centre.device:
            raise ValueError(
                f"radii must be float32 of rank 1 on {self.centre.device}, got {radii.dtype} of "
                f"rank {radii.dim()} on {radii.device}"
            )
        _check_range(first, last, len(radii))
        new = torch.arange(first, last, device=radii.device)
        old = self.outliers
        others = (old >= 0) & ((old < first) | (old >= last)) & (old < len(radii))
        slots = torch.cat([torch.where(others, old, -1), new])
        radius = slots
        if len(radii):
            radius = torch.where(slots >= 0, radii[slots.clamp(min=0)], -math.inf)
        radius = radius.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        order = radius.topk(min(OUTLIERS + 1, len(slots)))
        largest = order.indices[:OUTLIERS]
        # First: an interruption may leave a bound that is too high, not a slot that is forgotten.
        if len(order.values) > OUTLIERS:
            torch.maximum(self.radius_bound, order.values[OUTLIERS], out=self.radius_bound)
        self.outliers.copy_(torch.where(order.values[:OUTLIERS] > -math.inf, slots[largest], -1))

    def retake_radii_(self, radii: Tensor) -> bool:
        """Take the bound of all radii anew, which `update_radii_` only raises; say if it fell.

        An interruption leaves a sketch that is out of use. Waits for the device.

        Args:
            radii: `[C]` float32, all of them.

        Raises:
            ValueError: as `update_radii_`.
        """
        before = self.radius_bound.item()
        on = self._active
        self.active = False
        self.radius_bound.fill_(-math.inf)
        self.outliers.fill_(-1)
        self.update_radii_(radii, 0, len(radii))
        self.active = on
        return bool(self.radius_bound.item() < before)

    def unreachable(self, slots: Tensor) -> Tensor:
        """Say which of some slots `[N]` int64 have keys beyond the scales, `[N]` bool.

        A lookup scores such a key always.
        """
        return self.head[slots // BLOCK, ERROR, slots % BLOCK] == UNKNOWN

    def take_stock(self, slots: list[int], radii: Tensor) -> tuple[dict[str, int], int]:
        """Return `counts()`, and how many live ones of `slots` `unreachable` is true of.

        Both in one wait for the device. Slots that have no codes are left out.

        Args:
            slots: of which it is asked.
            radii: `[C]` float32, all of them.
        """
        coded = [slot for slot in slots if slot < min(self.rows, len(radii))]
        at = torch.tensor(coded, dtype=torch.int64, device=self.head.device)
        live = radii[at] != -math.inf
        out_of_reach = (self.unreachable(at) & live).sum()
        *counts, unreachable = torch.cat([self.counters, out_of_reach[None]]).tolist()
        return dict(zip(COUNTERS, counts, strict=True)), unreachable

    def reset_counts_(self) -> None:
        """Let lookups count anew."""
        self.counters.zero_()

    @classmethod
    def restored(
        cls, state: dict[str, Tensor], keys: Tensor, radii: Tensor, count: int, sample: int
    ) -> Sketch:
        """Make the sketch that `state` describes, said to be of these keys and radii.

        All radii and about `sample` of the keys are compared with it, and waited for.

        Args:
            state: as `from_state` takes it.
            keys: `[C, D]`, on a CPU; C is its capacity.
            radii: `[C]` float32.
            count: slots in use, which it must cover.
            sample: how many keys to compare.

        Raises:
            KeyError: a tensor is missing.
            ValueError: as `from_state`, or it is the sketch of another codebook.
        """
        centre, outliers = state["centre"], state["outliers"]
        if centre.shape != keys.shape[1:]:
            raise ValueError(
                f"centre must have {keys.shape[1]} columns like keys, got {list(centre.shape)}"
            )
        if not bool(((outliers >= -1) & (outliers < len(radii))).all()):
            raise ValueError(f"outliers must lie in [-1, {len(radii)}), got {outliers.tolist()}")
        sketch = cls.from_state(state, len(radii), keys.dtype)
        if sketch.rows < count:
            raise ValueError(f"covered must be at least {count}, got {sketch.rows}")
        compared = torch.arange(0, sketch.rows, max(1, sketch.rows // sample))
        wrong = sketch.faults(keys, radii, compared)
        if wrong:
            raise ValueError(f"sketch must be of these keys and radii, got wrong slots {wrong[:8]}")
        return sketch

    def resized(self, capacity: int) -> Sketch:
        """Return a copy for `capacity` slots, covering as many of them as this one."""
        out = Sketch(capacity, self.centre.shape[0], self.dtype, self.centre.device)
        for name in ("centre", "directions", "scales", "radius_bound", "counters"):
            getattr(out, name).copy_(getattr(self, name))
        out.outliers.copy_(torch.where(self.outliers < capacity, self.outliers, -1))
        blocks = min(len(out.head), len(self.head))
        out.head[:blocks], out.tail[:blocks] = self.head[:blocks], self.tail[:blocks]
        out.rows = min(self.rows, capacity)
        out.active = self._active
        return out

    def copy_(self, other: Sketch) -> None:
        """Hold in place what a sketch of the same capacity and width holds, of any device."""
        for name in (*_STATE, "counters"):
            getattr(self, name).copy_(getattr(other, name))
        self.rows, self._active = other.rows, other._active

    def within(self, reach: float) -> Sketch:
        """Return this sketch for lookups in which each live slot has the radius `reach`, not NaN.

        It shares the codes and sees what is told of keys; what is counted is counted apart.
        """
        out = Sketch(0, self.centre.shape[0], self.dtype, self.centre.device)
        for name in _STATE:
            setattr(out, name, getattr(self, name))
        out.radius_bound = torch.full_like(self.radius_bound, reach)
        out.outliers = torch.full_like(self.outliers, -1)
        out.rows, out._active = self.rows, self._active
        return out

    def to(self, device: torch.device | str) -> Sketch:
        """Return this sketch if it is on `device`, otherwise a copy there."""
        # A device may be named without its number; tensors know where they are.
        if self.centre.to(device) is self.centre:
            return self
        out = Sketch(0, self.centre.shape[0], self.dtype, device)
        for name in (*_STATE, "counters"):
            setattr(out, name, getattr(self, name).to(device))
        out.rows, out._active = self.rows, self._active
        return out

    @property
    def active(self) -> bool:
        """Whether lookups use it. Switched off, in place, they read all keys."""
        return self._active

    @active.setter
    def active(self, on: bool) -> None:
        self._active = on
        self.covered.fill_(self.rows if on else 0)

    @property
    def capacity(self) -> int:
        """Number of slots there is memory for, a multiple of 32."""
        return len(self.head) * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def counts(self) -> dict[str, int]:
        """Return what lookups have counted since the fit, by name; waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    def faults(self, keys: Tensor, radii: Tensor, rows: Tensor | None = None) -> list[int]:
        """Return the slots, ascending, that this sketch is wrong about; [] unless it was misled.

        Wrong about a key: |phi(k) - stored|, computed anew in float64, is above the bound that is
        stored with it, by more than this computation's own rounding. Wrong about a radius: it is
        above `radius_bound` and the slot is not among the outliers. For audits: reads the keys and
        waits for the device.

        Args:
            keys, radii: `[C, D]` and `[C]`, those that this sketch was told of. Keys are compared
                for the slots sketched (active or not), radii for all that are given.
            rows: `[N]` int64, to compare only the keys of these slots; None: all.

        Raises:
            ValueError: as `refit`.
        """
        self._check(keys, radii)
        most = min(self.rows, len(keys))
        each = torch.arange(most, device=keys.device) if rows is None else rows[rows < most]
        wrong = []
        for part in each.split(max(1, _ELEMENTS // keys.shape[1])):
            coordinates, residual, rounding = self._exact(keys[part])
            stored, error = self._decode(part)
            off = (coordinates - stored[:, 1:]).square().sum(dim=1)
            off = off + (residual - stored[:, 0]).square()
            # Not the other way round: a key that is not finite needs the bound that there is not.
            holds = (error == math.inf) | (off.sqrt() - rounding <= error * (1 + 2.0**-40))
            wrong += part[~holds].tolist()
        above = ~(radii <= self.radius_bound) & ~radii.isnan()
        above[self.outliers[(self.outliers >= 0) & (self.outliers < len(radii))]] = False
        return sorted({*wrong, *above.nonzero()[:, 0].tolist()})

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what the operators take, in their order."""
        return (*(getattr(self, name) for name in _STATE), self.counters)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `from_state` makes an equal sketch of, those in use shared."""
        blocks = -(-self.rows // BLOCK)
        parts = {name: getattr(self, name) for name in _STATE}
        parts.update(head=self.head[:blocks], tail=self.tail[:blocks])
        parts["covered"] = torch.tensor(self.rows)
        return parts

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], capacity: int, dtype: torch.dtype, device: Any = "cpu"
    ) -> Sketch:
        """Make the sketch that `state` describes, with memory for `capacity` slots.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has a wrong shape or dtype, or directions are longer than 1.
        """
        sketch = cls(capacity, state["centre"].shape[0], dtype, device)
        slots = int(state["covered"])
        blocks = -(-slots // BLOCK)
        if not 0 <= slots <= capacity:
            raise ValueError(f"covered must lie in [0, {capacity}], got {slots}")
        for name in _STATE:
            target = getattr(sketch, name)
            target = target[:blocks] if name in ("head", "tail") else target
            got = state[name]
            if got.shape != target.shape or got.dtype != target.dtype:
                raise ValueError(
                    f"{name} must be {target.dtype} {list(target.shape)}, "
                    f"got {got.dtype} {list(got.shape)}"
                )
            target.copy_(got)
        scales = sketch.scales[:-1].double()
        if not bool((scales == sketch_math.short(scales)).all() and sketch.scales.isfinite().all()):
            raise ValueError("scales must be positive with 16 significant bits, got others")
        if bool(sketch.radius_bound.isnan()):
            raise ValueError("radius_bound must not be NaN, got NaN")
        if not sketch_math.norm_bound(sketch.directions) <= 1:
            raise ValueError("directions must be no longer than 1, got longer ones")
        sketch.rows = slots
        return sketch

    def lower_bounds(self, query: Tensor) -> Tensor:
        """Return float64 lower bounds `[B, slots]` of the distances of `[B, D]` queries.

        What kernels compute faster and with more slack; for tests and for looking at a sketch.
        """
        return sketch_math.lower_bounds(self._exact(query), *self._decode())

    def _exact(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return coordinates, residuals and a bound of what both err by, see `sketch_math`."""
        return sketch_math.exact(rows, self.centre, self.directions)

    def _decode(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is stored `[N, 65]` of some or all slots, and errors `[N]`, as float64."""
        if rows is None:
            rows = torch.arange(self.rows, device=self.scales.device)
        block, place = rows // BLOCK, rows % BLOCK
        codes = torch.cat([self.head[block, :, place], self.tail[block, :, place]], dim=1)
        return sketch_math.decode(codes, self.scales)

    def _check(self, keys: Tensor, radii: Tensor | None = None) -> None:
        wanted = [self.centre.shape[0]]
        if keys.dim() != 2 or list(keys.shape[1:]) != wanted or keys.dtype != self.dtype:
            raise ValueError(
                f"keys must be {self.dtype} with {wanted[0]} columns as the sketch was made for, "
                f"got {keys.dtype} {list(keys.shape)}"
            )
        if keys.device != self.centre.device:
            raise ValueError(
                f"keys must be on {self.centre.device} like the sketch, got {keys.device}"
            )
        if radii is not None and radii.shape != keys.shape[:1]:
            raise ValueError(f"radii must have {len(keys)} rows like keys, got {list(radii.shape)}")


def _check_range(first: int, last: int, end: int) -> None:
    if not 0 <= first <= end:
        raise ValueError(f"first must lie in [0, {end}], got {first}")
    if not first <= last <= end:
        raise ValueError(f"last must lie in [{first}, {end}], got {last}")


def check_sketch(sketch: Sketch | None, keys: Tensor) -> tuple[Tensor, ...]:
    """Raise unless `sketch` was made for keys like these; return its tensors, none for None.

    Raises:
        TypeError: it is no Sketch.
        ValueError: it was made for another width, dtype or device.
    """
    if sketch is None:
        return ()
    if not isinstance(sketch, Sketch):
        raise TypeError(f"sketch must be a Sketch or None, got {type(sketch).__name__}")
    dim, dtype, device = sketch.centre.shape[0], sketch.dtype, sketch.centre.device
    if (dim, dtype) != (keys.shape[1], keys.dtype):
        raise ValueError(
            f"sketch must be of {keys.dtype} keys with {keys.shape[1]} columns like keys, "
            f"got one of {dtype} with {dim}"
        )
    if device != keys.device:
        raise ValueError(f"sketch must be on the device of keys ({keys.device}), got {device}")
    return sketch.tensors()
