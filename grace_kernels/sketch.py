"""A certified sketch of a codebook's keys, from which `lookup` sees that a query is far from a key.

Let P be 64 directions with |P| <= 1 (largest singular value), z = k - c for a centre c, and

    phi(k) = (P z, rho(z))        rho(z) = sqrt(|z|^2 - |P z|^2)

rho is a seminorm, |(1 - P^T P)^1/2 z|, and |z|^2 = |P z|^2 + rho(z)^2, so distances never grow:
d(x, k) >= |phi(x) - phi(k)|. P need not be orthonormal, only no longer than 1: it is orthonormal up
to its rounding to bfloat16, after which its norm is bounded anew. The closer its rows are to the
principal directions of the keys, the less is lost.

A row of the sketch is 66 bytes: phi(k) as int8 codes with one scale per number, and a bound e of
what that lost, |phi(k) - stored| <= e, rounded up. A key cannot be within T of a query if

    |phi(x) - stored| - e - (the kernel's own rounding) > T (1 + 2^-22) + 2^-74

where the last terms cover that the canonical distance is rounded. Any part of the 65 numbers will
do for phi, so kernels look at the first few, and at the rest where those leave a doubt.

Which T: a hit lies within its own radius, and only a key at least as near as some true hit can take
its place. A kernel may thus look, in one pass, for keys within their own radii, and in another one,
for the few queries that found such a key, for everything nearer (CPU); or at once for every key
within `radius_bound`, having first scored the few entries whose radii exceed it (GPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .validation import check_codebook

DIRECTIONS = 64
HEAD = 8  # directions whose codes stand beside rho's and e's
BLOCK = 32  # keys whose codes for one number are neighbours
OUTLIERS = 32  # entries whose radii may exceed radius_bound
UNKNOWN = 127  # code of a bound that does not exist

_SAMPLE = 8192  # keys that directions are taken from
_ELEMENTS = 1 << 23  # of keys held in float64 at a time
_STATE = ("centre", "directions", "scales", "head", "tail", "covered", "radius_bound", "outliers")
_COUNTS = ("queries", "pairs", "scored", "scanned")
# Rows. A lookup of one query on a CPU took 0.15 (D = 4096, float32) to 0.61 (D = 384, bfloat16) of
# the time without a sketch at 4096 rows, and broke even between 512 and 2048 (docs/performance.md).
_WORTHWHILE = 4096


def worthwhile(rows: int, dim: int, element_size: int) -> bool:
    """Say whether looking at a sketch first pays for a codebook of so many rows.

    Args:
        rows: in use, or set aside.
        dim: D, the width of keys.
        element_size: bytes of one number of a key.
    """
    return rows >= _WORTHWHILE


class Sketch:
    """What `lookup` and `adapt_` take as `sketch`; it changes their speed, never an answer.

    It belongs to one tensor of keys `[C, D]` and one of radii `[C]` and must be told what is
    written to them: `extend` after keys, `update_radii_` after the radius of any row in use, with
    codes or not. Rows that have none are read as without a sketch. All of this happens in place,
    without waiting for a GPU (`fit` and `refit` apart), so that compiled models and captured graphs
    see it.

    Attributes:
        centre: `[D]` float32, c.
        directions: `[64, D]` bfloat16, P.
        scales: `[67]` float32: of rho, of e, of the 64 coordinates, all with 16 significant bits so
            that a scale times a code is exact; last what is to be added to rho.
        head: `[ceil(C / 32), 10, 32]` int8, codes of rho, e and coordinates 0..7 of 32 keys each.
        tail: `[ceil(C / 32), 56, 32]` int8, codes of coordinates 8..63.
        covered: int64 scalar, rows that lookups use the sketch for; 0 while it is not `active`.
        radius_bound: float32 scalar, not below the radius of any entry but the outliers.
        outliers: `[32]` int64, rows with the largest radii; -1: none.
        counters: `[4]` int64, written by lookups: queries, pairs of a query and a covered row,
            pairs of those scored one by one, pairs read as without a sketch.
    """

    def __init__(self, capacity: int, dim: int, dtype: torch.dtype, device: Any = "cpu") -> None:
        """Make a sketch that covers nothing yet; see `fit`."""
        blocks = -(-capacity // BLOCK)
        self.dtype = dtype
        self.rows = 0
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            self.centre = torch.zeros(dim, device=device)
            self.directions = torch.zeros(DIRECTIONS, dim, dtype=torch.bfloat16, device=device)
            self.scales = torch.ones(DIRECTIONS + 3, device=device)
            self.head = torch.zeros(blocks, HEAD + 2, BLOCK, dtype=torch.int8, device=device)
            tail = (blocks, DIRECTIONS - HEAD, BLOCK)
            self.tail = torch.zeros(tail, dtype=torch.int8, device=device)
            self.covered = torch.zeros((), dtype=torch.int64, device=device)
            self.radius_bound = torch.full((), -math.inf, device=device)
            self.outliers = torch.full((OUTLIERS,), -1, dtype=torch.int64, device=device)
            self.counters = torch.zeros(4, dtype=torch.int64, device=device)
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
            radii: `[C]` float32; the directions follow the keys of live entries.
            count: the rows in use, as for `lookup`.
            progress: called with the rows done and the rows in all.

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

        An interruption leaves a sketch that covers the rows done so far.
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
        self._choose(keys, live[:: max(1, -(-len(live) // _SAMPLE))])
        step = max(BLOCK, _ELEMENTS // max(1, keys.shape[1]) // BLOCK * BLOCK)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            self.extend(keys, first, last)
            if progress is not None:
                progress(last, rows)

    def extend(self, keys: Tensor, first: int, last: int) -> None:
        """Sketch rows `first..last-1`, new ones or old ones whose keys have changed.

        Args:
            keys: `[C, D]`, all of them, C no more than the rows this sketch has memory for.
            first, last: 0 <= first <= last <= C; `first` is at most `rows`.

        Raises:
            ValueError: a row is out of range, or keys are not those this sketch was made for.
        """
        self._check(keys)
        _check_rows(first, last, min(len(keys), self.capacity))
        if first > self.rows:
            raise ValueError(f"first must be at most the {self.rows} rows covered, got {first}")
        step = max(1, _ELEMENTS // keys.shape[1])
        for start in range(first, last, step):
            stop = min(start + step, last)
            codes = self._encode(keys[start:stop])
            row = torch.arange(start, stop, device=codes.device)
            block, place = row // BLOCK, row % BLOCK
            self.head[block, :, place] = codes[:, : HEAD + 2]
            self.tail[block, :, place] = codes[:, HEAD + 2 :]
            self.rows = max(self.rows, stop)
        if self._active:
            self.covered.fill_(self.rows)

    def update_radii_(self, radii: Tensor, first: int, last: int) -> None:
        """Take note of the radii of rows `first..last-1`, those without codes included.

        Raises:
            ValueError: a row is out of range, or radii are not those of this sketch's device.
        """
        if radii.dim() != 1 or radii.dtype != torch.float32 or radii.device != self.centre.device:
            raise ValueError(
                f"radii must be float32 of rank 1 on {self.centre.device}, got {radii.dtype} of "
                f"rank {radii.dim()} on {radii.device}"
            )
        _check_rows(first, last, len(radii))
        new = torch.arange(first, last, device=radii.device)
        old = self.outliers
        listed = (old >= 0) & ((old < first) | (old >= last)) & (old < len(radii))
        rows = torch.cat([torch.where(listed, old, -1), new])
        radius = torch.where(rows >= 0, radii[rows.clamp(min=0)], -math.inf) if len(radii) else rows
        radius = radius.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        order = radius.topk(min(OUTLIERS + 1, len(rows)))
        kept = order.indices[:OUTLIERS]
        # First: an interruption may leave a bound that is too high, not an entry that is forgotten.
        if len(order.values) > OUTLIERS:
            torch.maximum(self.radius_bound, order.values[OUTLIERS], out=self.radius_bound)
        self.outliers.copy_(torch.where(order.values[:OUTLIERS] > -math.inf, rows[kept], -1))

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

    def unreachable(self, rows: Tensor) -> Tensor:
        """Say which of `rows` `[N]` int64 have keys that the scales do not reach, `[N]` bool.

        A lookup scores such a key always.
        """
        return self.head[rows // BLOCK, 1, rows % BLOCK] == UNKNOWN

    def take_stock(self, rows: list[int], radii: Tensor) -> tuple[dict[str, int], int]:
        """Return `counts()`, and how many live ones of `rows` `unreachable` is true of.

        Both in one wait for the device. Rows that have no codes are left out.

        Args:
            rows: of which it is asked.
            radii: `[C]` float32, all of them.
        """
        coded = [row for row in rows if row < min(self.rows, len(radii))]
        at = torch.tensor(coded, dtype=torch.int64, device=self.head.device)
        live = radii[at] != -math.inf
        out_of_reach = (self.unreachable(at) & live).sum()
        *counts, unreachable = torch.cat([self.counters, out_of_reach[None]]).tolist()
        return dict(zip(_COUNTS, counts, strict=True)), unreachable

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
            count: rows in use, which it must cover.
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
            raise ValueError(f"sketch must be of these keys and radii, got wrong rows {wrong[:8]}")
        return sketch

    def resized(self, capacity: int) -> Sketch:
        """Return a copy for a codebook of `capacity` rows, covering as many of them as this one."""
        out = Sketch(capacity, self.centre.shape[0], self.dtype, self.centre.device)
        for name in ("centre", "directions", "scales", "radius_bound", "counters"):
            getattr(out, name).copy_(getattr(self, name))
        out.outliers.copy_(torch.where(self.outliers < capacity, self.outliers, -1))
        blocks = min(len(out.head), len(self.head))
        out.head[:blocks], out.tail[:blocks] = self.head[:blocks], self.tail[:blocks]
        out.rows = min(self.rows, capacity)
        out.active = self._active
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
        """Number of rows there is memory for, a multiple of 32."""
        return len(self.head) * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def counts(self) -> dict[str, int]:
        """Return what lookups have counted since the fit, by name; waits for the device."""
        return dict(zip(_COUNTS, self.counters.tolist(), strict=True))

    def faults(self, keys: Tensor, radii: Tensor, rows: Tensor | None = None) -> list[int]:
        """Return the rows, ascending, that this sketch is wrong about; [] unless it was misled.

        Wrong about a key: |phi(k) - stored|, computed anew in float64, is above the bound that is
        stored with it, by more than this computation's own rounding. Wrong about a radius: it is
        above `radius_bound` and the row is not among the outliers. For audits: reads the keys and
        waits for the device.

        Args:
            keys, radii: `[C, D]` and `[C]`, those that this sketch was told of. Keys are compared
                for the rows sketched (active or not), radii for all that are given.
            rows: `[N]` int64, to compare only these keys; None: all.

        Raises:
            ValueError: as `refit`.
        """
        self._check(keys, radii)
        most = min(self.rows, len(keys))
        each = torch.arange(most, device=keys.device) if rows is None else rows[rows < most]
        wrong = []
        for part in each.split(max(1, _ELEMENTS // keys.shape[1])):
            along, rho, lost = self._exact(keys[part])
            stored, e = self._decode(part)
            off = (along - stored[:, 1:]).square().sum(dim=1) + (rho - stored[:, 0]).square()
            # Not the other way round: a key that is not finite needs the bound that there is not.
            holds = (e == math.inf) | (off.sqrt() - lost <= e * (1 + 2.0**-40))
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
        """Make the sketch that `state` describes, with memory for `capacity` rows.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has a wrong shape or dtype, or directions are longer than 1.
        """
        sketch = cls(capacity, state["centre"].shape[0], dtype, device)
        rows = int(state["covered"])
        blocks = -(-rows // BLOCK)
        if not 0 <= rows <= capacity:
            raise ValueError(f"covered must lie in [0, {capacity}], got {rows}")
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
        if not bool((scales == _short(scales)).all() and sketch.scales.isfinite().all()):
            raise ValueError("scales must be positive with 16 significant bits, got others")
        if bool(sketch.radius_bound.isnan()):
            raise ValueError("radius_bound must not be NaN, got NaN")
        if not _norm_bound(sketch.directions) <= 1:
            raise ValueError("directions must be no longer than 1, got longer ones")
        sketch.rows = rows
        return sketch

    # ------------------------------------------------------------------ the mathematics

    def lower_bounds(self, query: Tensor) -> Tensor:
        """Return `[B, rows]` float64 lower bounds of the distances of `[B, D]` queries.

        What kernels compute faster and with more slack; for tests and for looking at a sketch.
        """
        x, rho, lost = self._exact(query)
        stored, e = self._decode()
        across = rho[:, None] - stored[None, :, 0]
        along = torch.cdist(x, stored[:, 1:], compute_mode="donot_use_mm_for_euclid_dist")
        return torch.hypot(along, across) * (1 - 2.0**-30) - e - 2 * lost[:, None]

    def _exact(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P z `[N, 64]`, rho `[N]` and a bound of the error of both together, in float64.

        Sums have D terms: an error of D 2^-53 |z| for each of 64 coordinates, hence of 8 D 2^-53
        |z|; and of D 2^-53 (1 + 16) |z|^2 for rho^2, whose root may be worse off by far.
        """
        dim = rows.shape[1]
        z = rows.double() - self.centre.double()
        along = z @ self.directions.double().T
        square = z.square().sum(dim=1)
        rest = (square - along.square().sum(dim=1)).clamp(min=0)
        error = (dim + 8) * 2.0**-48 * square
        rho = rest.sqrt()
        # The larger of sqrt(rest + error) - rho and rho - sqrt(rest - error).
        off = torch.maximum((rest + error).sqrt() - rho, rho - (rest - error).clamp(min=0).sqrt())
        return along, rho, off + (dim + 8) * 2.0**-48 * square.sqrt()

    def _encode(self, rows: Tensor) -> Tensor:
        """Return the codes `[N, 66]` of keys: of rho, of e, of the coordinates."""
        scales = self.scales.double()
        along, rho, lost = self._exact(rows)
        codes = rows.new_zeros(len(rows), DIRECTIONS + 2, dtype=torch.float64)
        codes[:, 2:] = (along / scales[2:-1]).round().clamp(-127, 127)
        codes[:, 0] = ((rho - scales[-1]) / scales[0]).round().clamp(-127, 127)
        off = (along - codes[:, 2:] * scales[2:-1]).square().sum(dim=1)
        off = off + (rho - (codes[:, 0] * scales[0] + scales[-1])).square()
        e = (off.sqrt() + lost) * (1 + 2.0**-20) / scales[1]
        codes[:, 1] = e.ceil().clamp(max=UNKNOWN)
        # Infinite and NaN keys, and those that the scales do not reach.
        bad = ~(e <= UNKNOWN - 1)
        codes[bad] = 0
        codes[bad, 1] = UNKNOWN
        return codes.to(torch.int8)

    def _decode(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return stored rho and coordinates `[N, 65]` and e `[N]`, of some or all, as float64."""
        scales = self.scales.double()
        if rows is None:
            rows = torch.arange(self.rows, device=scales.device)
        block, place = rows // BLOCK, rows % BLOCK
        codes = torch.cat([self.head[block, :, place], self.tail[block, :, place]], dim=1).double()
        e = torch.where(codes[:, 1] == UNKNOWN, math.inf, codes[:, 1] * scales[1])
        rho = codes[:, :1] * scales[0] + scales[-1]
        return torch.cat([rho, codes[:, 2:] * scales[2:-1]], dim=1), e

    def _choose(self, keys: Tensor, sample: Tensor) -> None:
        """Take centre, directions and scales from some of the keys."""
        rows = keys[sample].double()
        rows = rows[rows.isfinite().all(dim=1)]
        self.centre.copy_(rows.mean(dim=0) if len(rows) else torch.zeros_like(self.centre))
        z = rows - self.centre.double()
        self.directions.copy_(_principal(z))
        along, rho, lost = self._exact(rows)
        self.scales.fill_(1)
        if len(rows) == 0:
            return
        # A few keys far out must not make the codes of all others coarse.
        reach = along.abs()
        usual = reach.sort(dim=0).values[int(0.999 * (len(rows) - 1))]
        reach = torch.minimum(reach.amax(dim=0), 8 * usual)
        middle = (rho.amax() + rho.amin()) / 2
        self.scales[-1] = middle
        self.scales[2:-1] = _short(reach / 110)
        self.scales[0] = _short((rho - self.scales[-1].double()).abs().amax() / 110)
        # Half a step in every coordinate is code 10: a key may be 100 steps out of reach in one.
        others = torch.cat([self.scales[:1], self.scales[2:-1]]).double()
        most = others.square().sum()
        self.scales[1] = _short(most.sqrt() / 20 + lost.amax() / 20)

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


def _check_rows(first: int, last: int, rows: int) -> None:
    if not 0 <= first <= rows:
        raise ValueError(f"first must lie in [0, {rows}], got {first}")
    if not first <= last <= rows:
        raise ValueError(f"last must lie in [{first}, {rows}], got {last}")


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


def _principal(z: Tensor) -> Tensor:
    """Return 64 directions `[64, D]` bfloat16 along which rows `[N, D]` float64 vary most.

    Subspace iteration from a fixed start; rows past D are zero. Scaled down until their norm is
    certainly at most 1.
    """
    dim = z.shape[1]
    size = z.abs().amax() if z.numel() else z.new_zeros(())
    # In float32, for speed: any P will do. The largest element becomes 1, so nothing overflows.
    plain = (z / size).float() if size > 0 else z.float()
    generator = torch.Generator().manual_seed(0)
    width = min(dim, DIRECTIONS + 16)
    basis = torch.randn(dim, width, generator=generator).to(z.device)
    basis = torch.linalg.qr(basis).Q
    for _ in range(6 if len(z) and width < dim else 0):
        basis = torch.linalg.qr(plain.T @ (plain @ basis)).Q
    if len(z):  # order by variance
        moved = plain @ basis
        turn = torch.linalg.eigh(moved.double().T @ moved.double()).eigenvectors.flip(1)
        basis = torch.linalg.qr(basis.double() @ turn).Q
    rows = min(dim, DIRECTIONS)
    out = z.new_zeros(DIRECTIONS, dim)
    out[:rows] = basis.double().T[:rows]
    out = out.nan_to_num(0.0, 0.0, 0.0)
    while True:
        stored = out.to(torch.bfloat16)
        bound = _norm_bound(stored)
        if bound <= 1:
            return stored
        out = out * ((1 - 2.0**-11) / bound)  # less may be lost in the rounding


def _norm_bound(directions: Tensor) -> float:
    """Return an upper bound of the largest singular value of `[64, D]`, close to it.

    With whatever V and L, P P^T = V L V^T + R: its norm is at most |V^T V| max|L| + |R|, and that
    of V^T V at most its largest row sum. Rounding: 2^-40 is more than D 2^-52 for D < 2^12, beyond
    which it grows with D.
    """
    wide = directions.double()
    if not bool(wide.isfinite().all()):
        return math.inf
    gram = wide @ wide.T
    values, v = torch.linalg.eigh(gram)
    rest = torch.linalg.matrix_norm(gram - (v * values) @ v.T)
    bound = (v.T @ v).abs().sum(dim=1).amax() * values.abs().amax() + rest
    error = max(2.0**-40, directions.shape[1] * 2.0**-51) * max(1.0, float(wide.square().sum()))
    return math.sqrt(float(bound) + error) * (1 + 2.0**-50)


def _short(numbers: Tensor) -> Tensor:
    """Round positive float64 numbers up to 16 significant bits, within [2^-100, 2^120]."""
    mantissa, exponent = torch.frexp(numbers.clamp(2.0**-100, 2.0**119))
    return torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
