"""Choosing a radius from distances of prompts that should hit and of prompts that should not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """What one radius would do.

    Args:
        radius: the radius.
        hit: share of the positives within it.
        fired: per kind of negative, the share within it.
    """

    radius: float
    hit: float
    fired: dict[str, float]


@dataclass(frozen=True)
class Suggestion:
    """A radius with its reason.

    Args:
        radius: the largest that keeps every bound, as float32.
        hit: share of the positives within it.
        fired: per kind of negative, the share within it.
        bound_by: the kind whose bound stopped it; None where no negative did.
        table: rates at this radius and round it, ascending.
    """

    radius: float
    hit: float
    fired: dict[str, float]
    bound_by: str | None
    table: list[Rate]

    @property
    def reason(self) -> str:
        """Say in a sentence why this radius."""
        if self.bound_by is None:
            return (
                f"no negative came near: the radius reaches the farthest positive ({self.hit:.1%})"
            )
        share = self.fired[self.bound_by]
        return (
            f"a larger radius would let too many of {self.bound_by!r} fire "
            f"({share:.2%} do); {self.hit:.1%} of the positives hit"
        )


def suggest_radius(
    positives: Tensor | Sequence[float],
    negatives: Mapping[str, Tensor | Sequence[float]],
    bounds: Mapping[str, float],
) -> Suggestion:
    """Suggest the largest radius at which no kind of negative fires more often than its bound.

    Args:
        positives: `[P]` distances of prompts to the entry that should answer them; +inf where
            another entry is nearer.
        negatives: per kind, `[N]` distances of prompts that should defer to their nearest entry.
        bounds: per kind, the share that may fire, 0..1.

    Returns:
        The suggestion. Where no negative stops it, the radius is that of the farthest finite
        positive; without any positive, the largest that the bounds allow.

    Raises:
        ValueError: kinds and bounds differ, a bound is not in 0..1, a distance is NaN or negative,
            there is nothing to go by, or no radius above 0 keeps the bounds.
    """
    if set(negatives) != set(bounds):
        raise ValueError(f"bounds must name {sorted(negatives)}, got {sorted(bounds)}")
    near = _distances("positives", positives)
    far = {kind: _distances(f"negatives[{kind!r}]", far) for kind, far in negatives.items()}
    limit, bound_by = float("inf"), None
    for kind, distances in far.items():
        if not 0 <= bounds[kind] <= 1:
            raise ValueError(f"bounds[{kind!r}] must be in 0..1, got {bounds[kind]}")
        # The first negative that may not fire, counted from the nearest.
        allowed = int(bounds[kind] * len(distances))
        if allowed < len(distances) and float(distances[allowed]) < limit:
            limit, bound_by = float(distances[allowed]), kind
    reached = near[near < limit]
    if len(reached):
        # Half way to the first negative: nothing is gained by going nearer to it.
        inner = float(reached[-1])
        radius = inner if limit == float("inf") else (inner + limit) / 2
    elif limit < float("inf"):
        radius = limit
    else:
        raise ValueError("positives must hold a finite distance where nothing bounds the radius")
    radius = float(torch.tensor(radius, dtype=torch.float32))
    if radius >= limit:
        radius = float(torch.nextafter(torch.tensor(limit), torch.tensor(0.0)))
    if radius <= 0:
        raise ValueError(f"no radius keeps the bound of {bound_by!r}: too many are at distance 0")
    table = [_rate(radius * step, near, far) for step in _STEPS]
    here = _rate(radius, near, far)
    return Suggestion(radius, here.hit, here.fired, bound_by, table)


_STEPS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5)


def _rate(radius: float, near: Tensor, far: dict[str, Tensor]) -> Rate:
    share = lambda d: float((d <= radius).double().mean()) if len(d) else 0.0  # noqa: E731
    return Rate(radius, share(near), {kind: share(d) for kind, d in far.items()})


def _distances(name: str, given: Tensor | Sequence[float]) -> Tensor:
    made = torch.as_tensor(given, dtype=torch.float64).flatten()
    if bool((made.isnan() | (made < 0)).any()):
        raise ValueError(f"{name} must be distances of at least 0, got {made.tolist()[:5]}")
    return made.sort().values
