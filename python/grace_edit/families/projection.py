"""The output projection of a language model: a vocabulary is wider than anything else in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.torch_private import is_compiled


def output_projection(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes a language model's logits; None: there is none."""
    found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return found


@contextmanager
def rows_alone(model: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Give the output projection the tokens named alone, in this thread's forward inside a block.

    Args:
        row, column: `[n]`; of the hidden states `[B, T, H]` it sees `[n, H]`.
    """
    head, thread = output_projection(model), threading.get_ident()
    if head is None or is_compiled(model):
        yield
        return

    def pick(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():  # another thread's, of which nothing of this may be part
            return None
        whole = len(args) == 1 and args[0].ndim == 3 and threading.get_ident() == thread
        return (args[0][row, column],) if whole else None

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def logits_seen(model: nn.Module, row: int | None = None) -> Iterator[list[Tensor]]:
    """Note what the output projection gives in this thread's forwards inside a block, one by one.

    Args:
        row: of the batch, at whose last token they are noted; None: everything.
    """
    head, thread = output_projection(model), threading.get_ident()
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if threading.get_ident() == thread:  # others may be served meanwhile
            found.append((output if row is None else output[row, -1]).detach().clone())

    if head is None:
        yield found
        return
    handle = head.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
