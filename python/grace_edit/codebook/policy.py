"""The decisions of GRACE as pure functions over a distance, radii and whether labels agree.

Distances and radii are fp32 numbers (held in Python floats) and every result is rounded to fp32, so
the same stream of edits gives the same radii to the bit on every machine.

The method is that of Hartvigsen et al., "Aging with GRACE" (NeurIPS 2023, arXiv 2211.11031); the
default policy departs from it where its decisions lose edits.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from fractions import Fraction

import torch

from .records import Case, Decision, Label

DEFAULT = "default"
NEAREST = "nearest"
PAPER = "paper"
POLICIES = (DEFAULT, NEAREST, PAPER)


def fp32(number: float) -> float:
    """Return `number` rounded to the nearest fp32, +-inf where it overflows."""
    return ctypes.c_float(number).value


def add_up(a: float, b: float) -> float:
    """Return the smallest fp32 that is not below a + b, for a and b that are not negative."""
    total = fp32(a + b)
    if math.isinf(total) or Fraction(total) >= Fraction(a) + Fraction(b):
        return total
    # The next fp32 above a number that is not negative has the next bit pattern.
    (bits,) = struct.unpack("<i", struct.pack("<f", total))
    (above,) = struct.unpack("<f", struct.pack("<i", bits + 1))
    return float(above)


def decide(
    distance: float,
    neighbour_radius: float | None,
    same_label: bool,
    *,
    radius: float,
    drift: float = 0.0,
    max_radius: float | None = None,
) -> Decision:
    """Decide what an edit does to the codebook; the first case that fits is taken.

    - update: distance 0 and another label. The entry takes the new label.
    - add: no entry, or distance > radius + neighbour_radius, or the same label, not covered, and
      reaching it would need more than max_radius. A new entry of the full radius.
    - expand: same label, not covered. The neighbour grows to distance + drift, rounded up.
    - absorb: same label, covered (distance <= neighbour_radius).
    - split: another label. The neighbour shrinks to at most distance / 2, a new entry gets at most
      that.

    Args:
        distance: to the nearest live entry, fp32.
        neighbour_radius: of that entry, fp32; None where there is no entry.
        same_label: whether its label is the edit's.
        radius: of a new entry.
        drift: how far the query of a prompt moves between batches, in the units of `distance`.
        max_radius: to which an entry may grow; None means 3 * radius.

    Returns:
        The decision. It is fragile where an entry that is made or shrunk ends up smaller than the
        drift, or the split is at most 2 * drift away.
    """
    if neighbour_radius is None:
        return Decision("add", None, radius, fragile=radius < drift)
    if max_radius is None:
        max_radius = fp32(3.0 * radius)
    covered = distance <= neighbour_radius
    if distance == 0.0 and not same_label:
        return Decision("update", neighbour_radius, None, fragile=neighbour_radius < drift)
    if distance > fp32(radius + neighbour_radius):
        return Decision("add", neighbour_radius, radius, fragile=radius < drift)
    if same_label and covered:
        return Decision("absorb", neighbour_radius, None, fragile=neighbour_radius < drift)
    if same_label:
        reach = add_up(distance, drift)
        if reach > max_radius:
            return Decision("add", neighbour_radius, radius, fragile=radius < drift)
        return Decision("expand", reach, None, fragile=reach < drift)
    half = fp32(distance / 2.0)
    shrunk, new = min(neighbour_radius, half), min(radius, half)
    fragile = min(shrunk, new) < drift or distance <= fp32(2.0 * drift)
    return Decision("split", shrunk, new, fragile=fragile)


def own_radius(distance_to_other_label: float, *, radius: float) -> float:
    """Return the radius of an entry that one edit gets for itself.

    It ends half way to the nearest entry of another label (+inf: there is none) at the latest.
    """
    return min(radius, fp32(distance_to_other_label / 2.0))


def decide_nearest(
    distance: float,
    neighbour_radius: float | None,
    same_label: bool,
    *,
    radius: float,
    drift: float = 0.0,
) -> Decision:
    """Decide so that every edit keeps an entry of its own and neighbours stay as they are.

    For keys whose distances are mostly below two radii while the nearest key is nearly always the
    right one, as keys made from text are: there balls overlap and the nearest decides. The default
    decisions would expand one entry over many facts that share a target, or split radii until no
    rewording fits in.

    - update, absorb: distance 0, another or the same label. The edit takes the entry over, with the
      radius of a new one.
    - add: anything else. A new entry of the full radius.

    Args and returns: as `decide`. A contradicting entry within 2 * drift makes it fragile.
    """
    if neighbour_radius is not None and distance == 0.0:
        case: Case = "absorb" if same_label else "update"
        return Decision(case, radius, None, fragile=radius < drift)
    contradicted = neighbour_radius is not None and not same_label
    near = contradicted and distance <= fp32(2.0 * drift)
    return Decision("add", neighbour_radius, radius, fragile=radius < drift or near)


def decide_paper(
    distance: float, neighbour_radius: float | None, same_label: bool, *, radius: float
) -> Decision:
    """Decide as the code published with the paper does, given the distance.

    Its defects are kept: a split may enlarge the neighbour and gives the new entry half the
    distance however large that is; at distance 0 it leaves two entries with one key, the first of
    which has a negative radius; earlier edits are lost where balls move over them.
    """
    if neighbour_radius is None:
        return Decision("add", None, radius)
    if distance > fp32(radius + neighbour_radius):
        return Decision("add", neighbour_radius, radius)
    if not same_label:
        half = fp32(distance / 2.0)
        return Decision("split", fp32(half - fp32(1e-5)), half)
    if distance > neighbour_radius:
        return Decision("expand", distance, None)
    return Decision("absorb", neighbour_radius, None)


def label_key(label: Sequence[int], policy: str) -> Label | float:
    """Return what two labels must share to be the same one under `policy`.

    By default that is every id. The published code compares the fp32 means of the label tensors,
    the -100s of prompt positions included, so that equal targets after prompts of different lengths
    differ and different targets may agree.
    """
    if policy == PAPER:
        return torch.tensor(label, dtype=torch.int64).float().mean().item()
    return tuple(label)
