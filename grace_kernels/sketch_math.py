"""The mathematics of a sketch, in float64: coordinates and residuals, codes, fitting, lower bounds.

Let P be 64 directions with |P| <= 1 (largest singular value), z = k - c for a centre c. The
coordinates of k are P z, its residual is rho(z) = sqrt(|z|^2 - |P z|^2). Both together,

    phi(k) = (P z, rho(z)),

never make a distance larger: d(x, k) >= |phi(x) - phi(k)|. P need not be orthonormal, only no
longer than 1: it is orthonormal up to its rounding to bfloat16, after which its norm is bounded
anew. The closer its rows are to the principal directions of the keys, the less is lost.

What is stored of phi(k) are int8 codes, and an error e >= |phi(k) - stored|, rounded up. A key
cannot be within reach T of a query if

    |phi(x) - stored| - e - (the kernel's own rounding) > T (1 + 2^-22) + 2^-74

where the last terms cover that the canonical distance is rounded. Any part of the 65 numbers will
do for phi, so kernels look at the first few, and at the rest where those leave a doubt.

Lemmas and their proofs are in `docs/error-bounds.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sketch_layout import COORDINATES, DIRECTIONS, ERROR, MIDDLE, RESIDUAL, UNKNOWN

_MOST = 127  # the largest code of a number
_OTHERS = slice(COORDINATES, MIDDLE)  # codes and scales of the coordinates


def exact(rows: Tensor, centre: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return coordinates `[N, 64]`, residuals `[N]` and a bound `[N]` of what both err by together
    (Lemma 14).
    """
    dim = rows.shape[1]
    z = rows.double() - centre.double()
    coordinates = z @ directions.double().T
    square = z.square().sum(dim=1)
    residual_square = (square - coordinates.square().sum(dim=1)).clamp(min=0)
    square_error = (dim + 8) * 2.0**-48 * square
    residual = residual_square.sqrt()
    # The larger of sqrt(r + e) - sqrt(r) and sqrt(r) - sqrt(r - e).
    above = (residual_square + square_error).sqrt() - residual
    below = residual - (residual_square - square_error).clamp(min=0).sqrt()
    rounding = torch.maximum(above, below) + (dim + 8) * 2.0**-48 * square.sqrt()
    return coordinates, residual, rounding


def encode(rows: Tensor, centre: Tensor, directions: Tensor, scales: Tensor) -> Tensor:
    """Return the codes `[N, 66]` of keys. The error is rounded up, or UNKNOWN (Lemma 14)."""
    scale = scales.double()
    coordinates, residual, rounding = exact(rows, centre, directions)
    codes = rows.new_zeros(len(rows), MIDDLE, dtype=torch.float64)
    codes[:, _OTHERS] = (coordinates / scale[_OTHERS]).round().clamp(-_MOST, _MOST)
    codes[:, RESIDUAL] = ((residual - scale[MIDDLE]) / scale[RESIDUAL]).round().clamp(-_MOST, _MOST)
    off = (coordinates - codes[:, _OTHERS] * scale[_OTHERS]).square().sum(dim=1)
    off = off + (residual - (codes[:, RESIDUAL] * scale[RESIDUAL] + scale[MIDDLE])).square()
    error = (off.sqrt() + rounding) * (1 + 2.0**-20) / scale[ERROR]
    codes[:, ERROR] = error.ceil().clamp(max=UNKNOWN)
    # Infinite and NaN keys, and those that the scales do not reach.
    bad = ~(error <= UNKNOWN - 1)
    codes[bad] = 0
    codes[bad, ERROR] = UNKNOWN
    return codes.to(torch.int8)


def decode(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what codes `[N, 66]` stand for: residual and coordinates `[N, 65]`, errors `[N]`."""
    scale, code = scales.double(), codes.double()
    error = torch.where(code[:, ERROR] == UNKNOWN, math.inf, code[:, ERROR] * scale[ERROR])
    residual = code[:, RESIDUAL : RESIDUAL + 1] * scale[RESIDUAL] + scale[MIDDLE]
    return torch.cat([residual, code[:, _OTHERS] * scale[_OTHERS]], dim=1), error


def lower_bounds(query: tuple[Tensor, Tensor, Tensor], stored: Tensor, error: Tensor) -> Tensor:
    """Return lower bounds `[B, N]` of distances, of what `exact` and `decode` returned."""
    coordinates, residual, rounding = query
    across = residual[:, None] - stored[None, :, 0]
    along = torch.cdist(coordinates, stored[:, 1:], compute_mode="donot_use_mm_for_euclid_dist")
    return torch.hypot(along, across) * (1 - 2.0**-30) - error - 2 * rounding[:, None]


def fit_(centre: Tensor, directions: Tensor, scales: Tensor, keys: Tensor) -> None:
    """Fill centre, directions and scales so that they suit these keys `[N, D]`."""
    rows = keys.double()
    rows = rows[rows.isfinite().all(dim=1)]
    centre.copy_(rows.mean(dim=0) if len(rows) else torch.zeros_like(centre))
    directions.copy_(principal(rows - centre.double()))
    coordinates, residual, rounding = exact(rows, centre, directions)
    scales.fill_(1)
    if len(rows) == 0:
        return
    # A few keys far out must not make the codes of all others coarse.
    extent = coordinates.abs()
    usual = extent.sort(dim=0).values[int(0.999 * (len(rows) - 1))]
    extent = torch.minimum(extent.amax(dim=0), 8 * usual)
    scales[MIDDLE] = (residual.amax() + residual.amin()) / 2
    scales[_OTHERS] = short(extent / 110)
    scales[RESIDUAL] = short((residual - scales[MIDDLE].double()).abs().amax() / 110)
    # Half a step in every number is code 10: a key may be 100 steps beyond the scales in one.
    steps = torch.cat([scales[RESIDUAL : RESIDUAL + 1], scales[_OTHERS]]).double()
    scales[ERROR] = short(steps.square().sum().sqrt() / 20 + rounding.amax() / 20)


def principal(z: Tensor) -> Tensor:
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
        bound = norm_bound(stored)
        if bound <= 1:
            return stored
        out = out * ((1 - 2.0**-11) / bound)  # less may be lost in the rounding


def norm_bound(directions: Tensor) -> float:
    """Return an upper bound of the largest singular value of `[64, D]`, close to it (Lemma 12)."""
    wide = directions.double()
    if not bool(wide.isfinite().all()):
        return math.inf
    gram = wide @ wide.T
    values, v = torch.linalg.eigh(gram)
    remainder = torch.linalg.matrix_norm(gram - (v * values) @ v.T)
    bound = (v.T @ v).abs().sum(dim=1).amax() * values.abs().amax() + remainder
    error = max(2.0**-40, directions.shape[1] * 2.0**-51) * max(1.0, float(wide.square().sum()))
    return math.sqrt(float(bound) + error) * (1 + 2.0**-50)


def short(numbers: Tensor) -> Tensor:
    """Round positive float64 numbers up to 16 significant bits, within [2^-100, 2^120].

    Times a code, which has 7, such a number is exact in float32 (Lemma 13).
    """
    mantissa, exponent = torch.frexp(numbers.clamp(2.0**-100, 2.0**119))
    return torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
