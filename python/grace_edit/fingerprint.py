"""Telling one model from another without reading all of it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

SAMPLES = 4096
"""Elements of each tensor that go into the hash."""


def fingerprint(model: nn.Module, layer: str) -> dict[str, str]:
    """Return the fingerprint of `model` in two parts, `{"below": hex, "above": hex}`.

    Below is what decides a query: the parameters registered before the wrapped layer. Above is the
    rest, the wrapped layer included: it decides what a value does. Each part hashes, per parameter,
    its name, shape, dtype and at most 4096 evenly strided elements.

    Args:
        model: the model, attached or not.
        layer: full name of the wrapped layer.
    """
    parts = {"below": hashlib.sha256(), "above": hashlib.sha256()}
    part = "below"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name == layer or name.startswith(layer + "."):
            part = "above"
        parts[part].update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        parts[part].update(_sample(parameter.detach()))
    return {name: digest.hexdigest() for name, digest in parts.items()}


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    step = max(1, -(-flat.numel() // SAMPLES))
    picked = flat[::step].cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes() if picked.numel() else b""
