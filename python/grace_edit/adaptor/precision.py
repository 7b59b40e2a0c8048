"""In which dtypes a layer runs, and whether the edits of a codebook answer there.

`torch.autocast` lets a layer take and give another dtype than the model's own, and moves what it
takes: on SmolLM2-135M, float32 against bfloat16 on a CPU, a query at `layers.24.mlp` by 0.03–0.06
and one at the output of block 24 by 2–4, where the same query moves by 0.00001 between batches. So
the drift of a codebook has to know of it. One that was made inside autocast measures that move too
and answers inside and outside; one that was made outside is refused inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..codebook.codebook import Codebook

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")  # of devices that have an autocast, as torch has it


def autocast_of(device: torch.device) -> torch.dtype | None:
    """Return the dtype that `torch.autocast` computes in on a device now; None: it is off."""
    kind = device.type
    if kind not in _KINDS or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute as written inside a `with` block, on every device."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def own_dtype(layer: nn.Module, seen: Tensor) -> torch.dtype:
    """Return the dtype that a layer which gave `seen` runs in where autocast is off."""
    if autocast_of(seen.device) is None:
        return seen.dtype
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), seen.dtype)


def check_fits(
    book: Codebook, queries: Tensor | None, outputs: Tensor, *, editing: bool = False
) -> None:
    """Refuse what a layer takes and gives on another device than its codebook's, in another dtype
    than that its edits were made in, or under an autocast that they were not made for.

    Under an autocast that is no obstacle dtypes may differ: queries are to be cast to that of the
    keys, and values to that of the output.

    Args:
        book: the codebook.
        queries: what the layer takes; None: what it gives is all that matters.
        outputs: what it gives.
        editing: an edit is to be made of it; else it is to be answered, which nothing hinders in an
            empty codebook.

    Raises:
        ValueError: naming the remedy.
    """
    device = outputs.device if queries is None else queries.device
    if not device == outputs.device == book.device:
        where = " and ".join(sorted({str(device), str(outputs.device)}))
        raise ValueError(
            f"the wrapped layer must run on the device of its codebook ({book.device}), got "
            f"{where}; call editor.codebook.to(device) where the layer was moved by itself"
        )
    autocast = autocast_of(outputs.device)
    if autocast is not None:
        if queries is not None and autocast not in (book.autocast, book.keys.dtype):
            _refuse_autocast(book, autocast, editing)
        return
    taken = book.keys.dtype if queries is None else queries.dtype
    if taken != book.keys.dtype or outputs.dtype != book.values.dtype:
        raise ValueError(
            f"the wrapped layer must run in the dtypes of its codebook ({book.keys.dtype} in, "
            f"{book.values.dtype} out), got {taken} in, {outputs.dtype} out; call "
            "editor.rekey() to make the edits anew in these dtypes"
        )


def _refuse_autocast(book: Codebook, autocast: torch.dtype, editing: bool) -> None:
    if not editing and not book.entries:
        return
    made = "outside of it" if book.autocast is None else f"for {book.autocast}"
    context = f"torch.autocast({book.device.type!r}, {autocast})"
    raise ValueError(
        f"the wrapped layer must run outside of torch.autocast, got {context}, which moves queries "
        f"farther than the drift of these edits, made {made}; leave autocast, or make the edits "
        f"anew inside it, which then answer inside and outside: with {context}: editor.rekey() "
        "(saved edits: load them with GraceEditor.from_pretrained, rekey, and save them again)"
    )
