"""Part forms on a GPU: kernels that are off by default beside the ones that answer, in one run.

The forms are those of csrc/cuda/forms.h. A form that is faster wherever it is chosen and right to
the bit gets a row in csrc/cuda/kernels.h; what was predicted stands in
benchmarks/results/tuning.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grace_kernels

from . import gpu, gpu_operators, gpu_pruned, gpu_tiles
from .gate import right_answers
from .gpu import BF16, FP32, Call, Columns, Contestants, Shape
from .measurements import Measurement, Progress, Settings
from .peers import Book

K = 1000
SHARE = 0.5
FORMS = ("", "exact-always", "apart", "apart,dependent", "rows", "apart,rows")
"""What a lookup of up to 16 queries without a sketch may take; the first answers by default. The
exact form is timed beyond what is predicted to be its domain too: where it ends is to be measured.
"""
FORMS_OF_MANY = ("", "apart", "warpgroups", "warpgroups,apart,dependent", "exact-always")
"""The same of more; the last one of up to 64."""
SKETCHED = ("", "coordinates", "coordinates,dependent")
PLACES = (
    *((BF16, dim, keys, batch) for dim, keys in ((768, K), (768, 100 * K)) for batch in (1, 8, 64)),
    *((BF16, 4096, 10 * K, batch) for batch in (1, 8, 64)),
    *((BF16, dim, 100 * K, batch) for dim, batch in ((4096, 64), (768, 512), (4096, 512))),
    *((BF16, dim, K, 8) for dim in (4096, 11008)),
    *((BF16, 11008, 10 * K, batch) for batch in (1, 8)),
    *((BF16, 4096, 100 * K, batch) for batch in (1, 2, 8)),
    *((BF16, 768, 10 * K, batch) for batch in (1, 8, 64)),
    *((FP32, 768, 100 * K, batch) for batch in (1, 4)),
    *((FP32, 768, 10 * K, batch) for batch in (1, 8)),
)
"""Dtype, width, keys, queries: by worth."""
THROUGH_SKETCHES = (
    (gpu_pruned.SPECTRUM, 4096, 100 * K),
    (gpu_pruned.COVERED, 768, 100 * K),
)


def shapes(settings: Settings) -> list[Shape]:
    """Return what is measured, in order."""
    if settings.device != "cuda":
        small = [Shape("forms", FP32, 96, 3000, 1, data=gpu_pruned.SPECTRUM)]
        return [Shape("forms", FP32, 64, 300, batch) for batch in (8, 20)] + small
    plain = [Shape("forms", dtype, dim, n, batch) for dtype, dim, n, batch in PLACES]
    through = [
        Shape("forms", BF16, dim, n, batch, data=data)
        for data, dim, n in THROUGH_SKETCHES
        for batch in (1, 8)
    ]
    return [*plain[:12], *through, *plain[12:]]


def run(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure every form in every place, beside what answers by default.

    In half of the time: the other half is for what answers by default beside its peers.
    """
    now = time.monotonic()
    settings = replace(settings, until=now + SHARE * (settings.until - now))
    try:
        yield from gpu.each(shapes(settings), settings, progress, _books, _measure)
    finally:
        use("")
        gpu_tiles.use(gpu_tiles.NOW)


def use(forms: str) -> None:
    """Let forms be in use; nothing, where the compiled library is not there."""
    if grace_kernels.build_info()["cuda"]["available"]:
        torch.ops.grace_cuda_forms.use(forms)


def _books(shape: Shape, device: torch.device) -> list[Any]:
    if shape.data == "isotropic":
        return gpu_operators.codebooks(shape, device)
    return gpu_pruned.sketched(shape, device)


def _measure(
    shape: Shape, books: list[Any], columns: Columns, device: torch.device
) -> Iterator[Measurement]:
    if shape.data == "isotropic":
        asked = [
            (book, gpu_operators.queries(book.keys, shape.batch, n), None)
            for n, (book, _) in enumerate(books)
        ]
        names = FORMS
        if shape.batch > 16:
            names = FORMS_OF_MANY if shape.batch <= 64 else FORMS_OF_MANY[:-1]
    else:
        asked = [(Book(b.keys, b.radii), b.query[: shape.batch], b.sketch) for b in books]
        names = SKETCHED
    right = [
        right_answers(query, book.keys, book.radii, operations=("lookup",))["lookup"]
        for book, query, _ in asked[:2]
    ]
    count = torch.tensor(shape.keys, device=device)
    # Switched before the calls of a contestant are made, so that no call pays for it.
    contestants: Contestants = {
        ", ".join(("cuda", *filter(None, forms.split(",")))): (
            "ours",
            partial(_calls, forms, asked, count, gpu.ours(device)[-1]),
        )
        for forms in names
    }
    if shape.data == "isotropic":
        contestants |= gpu_tiles.contestants([pair[:2] for pair in asked], device)
    yield from gpu.measured(columns, contestants, right, device)
    use("")
    gpu_tiles.use(gpu_tiles.NOW)


def _calls(
    forms: str, asked: list[tuple[Book, Tensor, Any]], count: Tensor, backend: Any
) -> list[Call]:
    use(forms)
    how = {"count": count, "backend": backend}
    return [
        partial(grace_kernels.lookup, query, book.keys, book.radii, sketch=sketch, **how)
        for book, query, sketch in asked
    ]
