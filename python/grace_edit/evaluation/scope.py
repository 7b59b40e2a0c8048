"""Which edit a prompt would ask, by its text alone: no model runs and no value is trained.

A value decides what is said, its key whether it is asked. So one codebook of keys answers many
questions about scope: other maps, other data, other prompts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

import grace_kernels

from ..keys.text_keys import TextKeys


@dataclass(frozen=True)
class Asked:
    """What a prompt meets.

    Args:
        nearest: number of the edit whose key is nearest.
        fires: it is within its radius.
    """

    nearest: int
    fires: bool

    def hits(self, edit: int) -> bool:
        """Say whether this edit answers."""
        return self.fires and self.nearest == edit


class Keyring:
    """The keys of edits, each with the map's radius; the nearest decides, over a prompt's spans.

    Args:
        keys: makes keys of prompts.
        prompts: of the edits, which are numbered in this order.

    `seconds` and `asked` count what `ask` took.
    """

    def __init__(self, keys: TextKeys, prompts: Sequence[str]) -> None:
        self._keys = keys
        self._stored = torch.stack([keys.keys(prompt)[0] for prompt in prompts])
        self._radii = torch.full((len(prompts),), keys.radius)
        self.seconds, self.asked = 0.0, 0

    def with_prompts(self, prompts: Sequence[str]) -> Keyring:
        """Return the keys of other edits, made by the same map."""
        return Keyring(self._keys, prompts)

    def ask(self, prompt: str) -> Asked:
        """Say which edit a prompt would ask."""
        began = time.perf_counter()
        index, distance = grace_kernels.nearest(self._keys.keys(prompt), self._stored, self._radii)
        row = int(distance.argmin())
        found = Asked(int(index[row]), float(distance[row]) <= self._keys.radius)
        self.seconds += time.perf_counter() - began
        self.asked += 1
        return found

    def fired(self, prompts: Iterable[str]) -> list[bool]:
        """Say of each prompt whether any edit would answer."""
        return [self.ask(prompt).fires for prompt in prompts]
