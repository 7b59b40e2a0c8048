"""What a codebook decides by: the policy and its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import policy as rules
from .records import Label


@dataclass(frozen=True)
class Settings:
    """Policy, radius of a new entry, drift of queries, and the radius an entry may grow to.

    The three numbers are fp32. `autocast` is that for which the drift holds too. See `Codebook`.
    """

    policy: str
    radius: float
    drift: float
    max_radius: float
    autocast: torch.dtype | None = None

    @classmethod
    def checked(
        cls,
        policy: str,
        radius: float,
        drift: float,
        max_radius: float | None,
        autocast: torch.dtype | None = None,
    ) -> Settings:
        """Check the arguments of `Codebook` and round them to fp32.

        Raises:
            ValueError: one is out of its range.
        """
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius must be positive and finite, got {radius}")
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"drift must be finite and not negative, got {drift}")
        if max_radius is not None and not max_radius > 0:
            raise ValueError(f"max_radius must be positive, got {max_radius}")
        if policy not in rules.POLICIES:
            raise ValueError(f"policy must be one of {', '.join(rules.POLICIES)}, got {policy}")
        radius = rules.fp32(radius)
        largest = rules.fp32(3.0 * radius if max_radius is None else max_radius)
        return cls(policy, radius, rules.fp32(drift), largest, autocast)

    @property
    def paper(self) -> bool:
        """Whether decisions are those of the published code: no repair, no update, no drift."""
        return self.policy == rules.PAPER

    @property
    def nearest(self) -> bool:
        """Whether every edit has an entry of its own, that no other edit changes."""
        return self.policy == rules.NEAREST

    def label_key(self, label: Label) -> Label | float:
        """Return what two labels share if they are the same one to the policy."""
        return rules.label_key(label, self.policy)
