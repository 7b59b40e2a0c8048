"""Triton's interpreter, as the kernels need it on a CPU.

Triton 3.6 interprets a product of bfloat16 tiles as one of the integers that hold their bits, so
that one operation is done right here. It is done badly on purpose besides: a tensor core cuts off
what a sum of products loses, in an order of its own, and the kernel must be exact all the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ERROR = 2.0**-18.8 / 16  # of a product's magnitude, for each element summed up
_noise = np.random.default_rng(0)


def load() -> ModuleType:
    """Return the launcher with kernels that triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("grace_kernels.triton.lookup")


@contextmanager
def interpreting() -> Iterator[ModuleType]:
    """Let the interpreter multiply as a tensor core might, and say nothing of overflows."""
    import triton.language as tl
    from triton.runtime import interpreter

    def wide(tile: Any) -> np.ndarray:
        if tile.dtype.scalar == tl.bfloat16:
            return (tile.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return tile.data.astype(np.float64)

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
        x, y = wide(a), wide(b)
        product, size = x @ y, abs(x) @ abs(y)
        lost = size * (ERROR * x.shape[1]) * _noise.choice([-1.0, 1.0], size.shape)
        return interpreter.TensorHandle(
            (product + lost).astype(np.float32) + sums.data, sums.dtype.scalar
        )

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")  # asked for again by what is imported late
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_patch_lang", once_per_launch(interpreter._patch_lang))
        patch.setattr(interpreter, "_get_np_dtype", known_by_name(interpreter._get_np_dtype))
        yield load()


def known_by_name(numpy_type: Any) -> Any:
    """Have numpy's type of one of triton's looked up without a table made for every time."""
    known: dict[str, Any] = {}

    def look_up(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_type(scalar)
        return known[scalar.name]

    return look_up


def once_per_launch(patch_lang: Any) -> Any:
    """Have the language patched at a launch, not again for each function that a kernel calls.

    That is a third of the interpreter's time, and changes nothing: what is patched stays patched
    until the launch restores it.
    """
    patched: set[tuple[int, ...]] = set()

    def patch(function: Any) -> Any:
        import triton.language as tl

        held = function.__globals__.values()
        key = tuple(id(lang) for lang in (tl, tl.core) if any(lang is value for value in held))
        if key in patched:
            return None  # whoever asked is not the launch, and restores nothing
        first = not patched
        scope = patch_lang(function)
        patched.add(key)
        if first:
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        return scope

    return patch
