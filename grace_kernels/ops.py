"""Every operator of this package: schema, fake kernel, handle. Read this file first.

Its names begin with `grace`, or with what else `namespace.py` says.

`grace::*` is what callers get: the reference sits at `CompositeExplicitAutograd`, that is, on every
device for which nothing faster is registered. On a CPU the compiled library answers (`CPU` key), on
a GPU what `backends.py` chooses (`CUDA` key). One dispatch key holds one kernel, so every further
implementation has a namespace of its own with the same schemas: `grace_reference::*`,
`grace_triton::*` and `grace_cuda::*` (the compiled CUDA library's).

`count` is the number of rows in use as an int64 scalar tensor on the device; None means all rows.
The `pruned_` operators answer like those without, sooner: they take the tensors of a
`grace_kernels.Sketch` besides and count in the last of them what they looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .namespace import NAMESPACE

_CODEBOOK = "Tensor keys, Tensor radii"
_ROWS = "Tensor source, Tensor query_row, Tensor first_row, Tensor last_row"
_SKETCH = (
    "Tensor centre, Tensor directions, Tensor scales, Tensor head, Tensor tail, Tensor covered, "
    "Tensor radius_bound, Tensor outliers"
)
_SCHEMAS = {
    "nearest": f"(Tensor query, {_CODEBOOK}, Tensor? count=None) -> (Tensor, Tensor)",
    "lookup": f"(Tensor query, {_CODEBOOK}, Tensor? count=None) -> (Tensor, Tensor)",
    "adapt_": (
        f"(Tensor(a!) hidden, {_ROWS}, {_CODEBOOK}, Tensor values, Tensor? count=None) "
        "-> (Tensor, Tensor)"
    ),
    "pruned_lookup": (
        f"(Tensor query, {_CODEBOOK}, Tensor? count, {_SKETCH}, Tensor(a!) counters) "
        "-> (Tensor, Tensor)"
    ),
    "pruned_adapt_": (
        f"(Tensor(a!) hidden, {_ROWS}, {_CODEBOOK}, Tensor values, Tensor? count, {_SKETCH}, "
        "Tensor(b!) counters) -> (Tensor, Tensor)"
    ),
    "adapt_backward": (
        "(Tensor grad, Tensor index, Tensor first_row, Tensor last_row, SymInt slots) "
        "-> (Tensor, Tensor)"
    ),
}


def _fake_lookup(
    query: Tensor, keys: Tensor, radii: Tensor, count: Tensor | None = None, *sketch: Tensor
) -> tuple[Tensor, Tensor]:
    batch = query.shape[0]
    return query.new_empty(batch, dtype=torch.int64), query.new_empty(batch, dtype=torch.float32)


def _fake_adapt_(
    hidden: Tensor,
    source: Tensor,
    query_row: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    keys: Tensor,
    radii: Tensor,
    values: Tensor,
    count: Tensor | None = None,
    *sketch: Tensor,
) -> tuple[Tensor, Tensor]:
    batch = query_row.shape[0]
    return source.new_empty(batch, dtype=torch.int64), source.new_empty(batch, dtype=torch.float32)


def _fake_adapt_backward(
    grad: Tensor, index: Tensor, first_row: Tensor, last_row: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(slots, grad.shape[1])


_FAKES = {
    "nearest": _fake_lookup,
    "lookup": _fake_lookup,
    "adapt_": _fake_adapt_,
    "pruned_lookup": _fake_lookup,
    "pruned_adapt_": _fake_adapt_,
    "adapt_backward": _fake_adapt_backward,
}

LOOKUPS = ("nearest", "lookup", "adapt_", "pruned_lookup", "pruned_adapt_")


def namespace(implementation: str) -> str:
    """Return where the operators of an implementation are; "": those that callers get."""
    return f"{NAMESPACE}_{implementation}" if implementation else NAMESPACE


def operator(implementation: str, name: str) -> Any:
    """Return the handle of an operator of an implementation; "": the one that callers get."""
    return getattr(getattr(torch.ops, namespace(implementation)), name).default


libraries = {}  # by implementation; a Library unregisters its operators when it is collected
for _implementation, _names in {
    "": tuple(_SCHEMAS),
    "reference": tuple(_SCHEMAS),
    "triton": LOOKUPS,
    "cuda": LOOKUPS,
}.items():
    _library = torch.library.Library(namespace(_implementation), "DEF")
    for _name in _names:
        _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
        _fake = f"{namespace(_implementation)}::{_name}"
        torch.library.register_fake(_fake, _FAKES[_name], lib=_library)
        if _implementation in ("", "reference"):
            _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    libraries[_implementation] = _library

# Filled in by the compiled library: the instruction set in use, those this machine can run (comma
# separated, best first), and a switch for tests.
_library = torch.library.Library(namespace("cpu"), "DEF")
_library.define("isa() -> str")
_library.define("isas() -> str")
_library.define("use_isa(str name) -> ()")
libraries["cpu"] = _library

# Of the compiled CUDA library: forms of its kernels that are off by default, by names with commas
# between them; for tests and benchmarks, as csrc/cuda/forms.h says.
_library = torch.library.Library(namespace("cuda_forms"), "DEF")
_library.define("use(str names) -> ()")
_library.define("in_use() -> str")
libraries["cuda_forms"] = _library

nearest = operator("", "nearest")
lookup = operator("", "lookup")
adapt_ = operator("", "adapt_")
pruned_lookup = operator("", "pruned_lookup")
pruned_adapt_ = operator("", "pruned_adapt_")
adapt_backward = operator("", "adapt_backward")

reference_lookup = operator("reference", "lookup")
reference_adapt_ = operator("reference", "adapt_")
reference_adapt_backward = operator("reference", "adapt_backward")
