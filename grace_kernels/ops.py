"""Every operator of this package: schema, fake kernel, handle. Read this file first.

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

import torch
from torch import Tensor

from . import reference

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
libraries = {}  # a Library unregisters its operators when it is collected
for _namespace, _names in {
    "grace": tuple(_SCHEMAS),
    "grace_reference": tuple(_SCHEMAS),
    "grace_triton": LOOKUPS,
    "grace_cuda": LOOKUPS,
}.items():
    _library = torch.library.Library(_namespace, "DEF")
    for _name in _names:
        _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{_namespace}::{_name}", _FAKES[_name], lib=_library)
        if _namespace in ("grace", "grace_reference"):
            _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    libraries[_namespace] = _library

# Filled in by the compiled library: the instruction set in use, those this machine can run (comma
# separated, best first), and a switch for tests.
_library = torch.library.Library("grace_cpu", "DEF")
_library.define("isa() -> str")
_library.define("isas() -> str")
_library.define("use_isa(str name) -> ()")
libraries["grace_cpu"] = _library

# Of the compiled CUDA library: forms of its kernels that are off by default, by names with commas
# between them; for tests and benchmarks, as csrc/cuda/forms.h says.
_library = torch.library.Library("grace_cuda_forms", "DEF")
_library.define("use(str names) -> ()")
_library.define("in_use() -> str")
libraries["grace_cuda_forms"] = _library

nearest = torch.ops.grace.nearest.default
lookup = torch.ops.grace.lookup.default
adapt_ = torch.ops.grace.adapt_.default
pruned_lookup = torch.ops.grace.pruned_lookup.default
pruned_adapt_ = torch.ops.grace.pruned_adapt_.default
adapt_backward = torch.ops.grace.adapt_backward.default

reference_lookup = torch.ops.grace_reference.lookup.default
reference_adapt_ = torch.ops.grace_reference.adapt_.default
reference_adapt_backward = torch.ops.grace_reference.adapt_backward.default
