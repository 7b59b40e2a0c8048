"""Telling one model from another without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SAMPLES = 4096
"""Elements of each tensor that go into the hash."""


def fingerprint(model: nn.Module, layer: str) -> dict[str, str]:
    """Return the fingerprint of `model` in two parts, `{"below": hex, "above": hex}`.

    Below is what can decide a query: the parameters registered before the wrapped layer's block,
    and the block's own beside the layer, whose order of registration says nothing (Llama registers
    a block's norms after its mlp). Above is the rest, the wrapped layer included: it decides what a
    value does. Each part hashes, per parameter, its name, shape, dtype and at most 4096 evenly
    strided elements.

    Args:
        model: the model, attached or not.
        layer: full name of the wrapped layer.
    """
    named = model.named_parameters(remove_duplicate=False)
    return fingerprint_of(
        ((name, tuple(p.shape), p.dtype, sample(p.detach())) for name, p in named), layer
    )


def fingerprint_of(
    parameters: Iterable[tuple[str, tuple[int, ...], torch.dtype, bytes]], layer: str
) -> dict[str, str]:
    """Return the fingerprint of a model that is not at hand, from its parameters.

    Args:
        parameters: name, shape, dtype and `sample` of each, in the order of `named_parameters`,
            shared ones under each of their names.
        layer: full name of the wrapped layer.
    """
    parts = {"below": hashlib.sha256(), "above": hashlib.sha256()}
    block = _block_of(layer)
    passed = False
    for name, shape, dtype, sampled in parameters:
        in_layer = f"{name}.".startswith(layer + ".")
        in_block = f"{name}.".startswith(block + ".")
        passed = passed or in_layer or in_block
        part = "above" if in_layer or (passed and not in_block) else "below"
        parts[part].update(f"{name} {shape} {dtype}".encode())
        parts[part].update(sampled)
    return {name: digest.hexdigest() for name, digest in parts.items()}


def _block_of(layer: str) -> str:
    """Return the name of the innermost element of a list of blocks that holds `layer`."""
    parts = layer.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else layer


def sample(tensor: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """Return the bytes of at most 4096 evenly strided elements, as `dtype` holds them if given.

    Of a tensor that is made of others, as torchao's int8 weights are of numbers and scales, of each
    of these; `dtype` says nothing there.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return b"".join(sample(getattr(tensor, name)) for name in names)
    flat = tensor.reshape(-1)
    step = max(1, -(-flat.numel() // SAMPLES))
    picked = flat[::step].to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
    return picked.view(torch.uint8).numpy().tobytes() if picked.numel() else b""
