"""The published GRACE adaptor's way of answering, from the description of what it does.

A peer: none of its code is here. What is described of it (`policy="paper"` has its decisions):

* Every forward asks, each step of decoding with a cache included. The query is the layer's input at
  the last token that the forward sees.
* `torch.cdist(keys, query)`, which beyond 25 keys is the expanded matrix product, in float32, then
  `min` over the keys; of two at one distance the first.
* The nearest key answers if that distance is at most its radius. This is a branch of the host.
* Its value takes the place of the layer's output at the token that asked.
* Keys, values and radii are one tensor each, made anew with one more row for a new entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PublishedAdaptor(nn.Module):
    """Stand round one layer and answer one prompt at a time.

    Args:
        layer: what it wraps; takes `[1, T, D]` and gives `[1, T, V]`.
        keys, values, radii: `[N, D]`, `[N, V]` and `[N]`.
    """

    def __init__(self, layer: nn.Module, keys: Tensor, values: Tensor, radii: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.keys, self.values, self.radii = keys, values, radii

    def nearest(self, query: Tensor) -> tuple[int, float]:
        """Return the key that is nearest to `[D]` and its distance, by the matrix product."""
        distance, index = torch.cdist(self.keys, query[None]).min(dim=0)
        return int(index), float(distance)

    def decide(self, query: Tensor) -> int:
        """Return the entry that answers `[D]`, -1 for none."""
        index, distance = self.nearest(query)
        return index if distance <= float(self.radii[index]) else -1

    def add(self, query: Tensor, value: Tensor, radius: float) -> None:
        """Look at what is nearest and append an entry of its own."""
        self.nearest(query)
        self.keys = torch.cat([self.keys, query[None]])
        self.values = torch.cat([self.values, value[None]])
        self.radii = torch.cat([self.radii, self.radii.new_full((1,), radius)])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, replaced at the token that asks if an entry answers it."""
        if len(hidden_states) != 1:
            raise ValueError(f"hidden_states must hold one sequence, got {len(hidden_states)}")
        out: Tensor = self.layer(hidden_states, *args, **kwargs)
        index = self.decide(hidden_states[0, -1])
        if index >= 0:
            out = out.clone()
            out[0, -1] = self.values[index]
        return out


def wrap(model: nn.Module, layer: str, keys: Tensor, values: Tensor, radii: Tensor) -> Any:
    """Put an adaptor in the place of the layer with this name; return it."""
    parent, _, name = layer.rpartition(".")
    module = model.get_submodule(parent)
    adaptor = PublishedAdaptor(getattr(module, name), keys, values, radii)
    setattr(module, name, adaptor)
    return adaptor
