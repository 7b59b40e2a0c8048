"""What part forms times of Triton beside the compiled library: tiles of now and before, `apart`.

A table of grace_kernels/triton/tiles.py has rows for many keys that a sweep on an H100 found to be
faster. They are timed beside the rows for few keys, which answered before, where the two differ,
and beside the form of grace_kernels/triton/forms.py. On a CPU, where none of this answers, all are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import grace_kernels
from grace_kernels.triton import forms, tiles

from . import gpu
from .gpu import Call, Contestants
from .peers import Book

NOW, BEFORE, APART = "triton", "triton, tiles of before", "triton, apart"
TELLING = {(1000, 768), (100_000, 768), (10_000, 4096), (100_000, 4096), (1000, 11008)}
"""Keys and widths; elsewhere what part operators times of Triton is enough."""
_choose = tiles.choose


def contestants(asked: Sequence[tuple[Book, Tensor]], device: torch.device) -> Contestants:
    """Return what is to be timed for these codebooks and queries."""
    book, query = asked[0]
    names = [NOW, BEFORE, APART]
    if device.type == "cuda":
        size = book.keys.element_size()
        if size != 2 or tuple(book.keys.shape) not in TELLING:
            return {}
        shape = torch.cuda.get_device_capability(device), size, len(query)
        if _choose(*shape, *book.keys.shape) == _choose(*shape):
            names.remove(BEFORE)
    return {name: ("ours", partial(_calls, name, asked, device)) for name in names}


def use(name: str) -> None:
    """Let what is named answer from now on."""
    tiles.choose = _few if name == BEFORE else _choose
    forms.use("apart" if name == APART else "")


def _few(capability: tuple[int, int], element_size: int, batch: int, *_: int) -> tiles.Tile:
    return _choose(capability, element_size, batch)


def _calls(name: str, asked: Sequence[tuple[Book, Tensor]], device: torch.device) -> list[Call]:
    use(name)
    count = torch.tensor(len(asked[0][0].keys), device=device)
    how = {"count": count, "backend": gpu.ours(device)[0]}
    return [
        partial(grace_kernels.lookup, query, book.keys, book.radii, **how) for book, query in asked
    ]
