"""The operators under torch's own checks, torch.compile and in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import ops

from .test_adapt import expected_hidden, problem, rows


def layouts() -> list[tuple[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, 20, generator=generator)
    query = keys[:3] + 0.1
    radii = torch.ones(9)
    permuted = query.T.contiguous().T, keys.T.contiguous().T, radii
    return [
        ("contiguous", (query, keys, radii)),
        ("count", (query, keys, radii, torch.tensor(4))),
        ("dense, permuted", permuted),
        ("empty", (query[:0], keys[:0], radii[:0])),
    ]


@pytest.mark.parametrize("op", [ops.nearest, ops.lookup, ops.reference_lookup], ids=str)
@pytest.mark.parametrize("arguments", [pytest.param(a, id=name) for name, a in layouts()])
def test_lookups_pass_opcheck(op: Any, arguments: tuple) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("op", [ops.adapt_, ops.reference_adapt_], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_adapt_passes_opcheck(op: Any, permuted: bool) -> None:
    p = problem()
    if permuted:
        p = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in p.items()}
    torch.library.opcheck(op, tuple(p.values()))
    grad = p["hidden"].clone()
    torch.library.opcheck(
        ops.adapt_backward, (grad, rows(5, -1, -1, 2, 2), p["first_row"], p["last_row"], 12)
    )


@pytest.mark.on_a_cpu
@pytest.mark.too_long_interpreted
def test_fakes_tell_shapes_dtypes_and_strides(backend: str) -> None:
    p = problem()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = grace_kernels.lookup(p["source"], p["keys"], p["radii"], backend=backend)
    real = grace_kernels.lookup(p["source"], p["keys"], p["radii"], backend=backend)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.on_a_cpu
@pytest.mark.too_long_interpreted
def test_whole_graphs_compile_and_agree_with_eager(backend: str) -> None:
    p = problem()

    def serve(hidden: Tensor, source: Tensor, count: Tensor) -> tuple:
        out = hidden * 1.0
        index, distance = grace_kernels.adapt_(
            out,
            source,
            p["query_row"],
            p["first_row"],
            p["last_row"],
            p["keys"],
            p["radii"],
            p["values"],
            count,
            backend=backend,
        )
        nearest = grace_kernels.nearest(source, p["keys"], p["radii"], 7, backend=backend)
        return out, index, distance, *nearest

    compiled = torch.compile(serve, fullgraph=True, backend="aot_eager")
    arguments = p["hidden"], p["source"], torch.tensor(12)
    with torch.no_grad():
        results = compiled(*arguments)
        for got, expected in zip(results, serve(*arguments), strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(results[0], expected_hidden(p))


@pytest.mark.on_a_cpu
@pytest.mark.too_long_interpreted
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_call_tells_autograd_that_it_wrote(compiler: str, backend: str) -> None:
    p = problem()
    x = torch.zeros(20, 7, requires_grad=True)
    hidden = x.exp()
    write = torch.compile(
        lambda hidden: grace_kernels.adapt_(**{**p, "hidden": hidden}, backend=backend),
        fullgraph=True,
        backend=compiler,
    )
    with torch.no_grad():
        assert write(hidden)[0].tolist() == [5, -1, -1, 2, 2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@pytest.mark.on_a_cpu
@pytest.mark.too_long_interpreted
def test_gradients_compile_in_one_graph(backend: str) -> None:
    p = problem()
    hidden, values = p["hidden"].requires_grad_(), p["values"].requires_grad_()

    def loss(hidden: Tensor, values: Tensor) -> Tensor:
        out, _, _ = grace_kernels.adapt(
            **{**p, "hidden": hidden, "values": values}, backend=backend
        )
        return out.square().sum()

    expected = torch.autograd.grad(loss(hidden, values), (hidden, values))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, values), (hidden, values))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_dynamic_batch_compiles_once() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    p = problem()
    lookup = torch.compile(
        lambda query: grace_kernels.lookup(query, p["keys"], p["radii"]),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for batch in (2, 3, 5, 9, 8):
        query = p["source"][:batch]
        index, _ = lookup(query)
        assert torch.equal(index, grace_kernels.lookup(query, p["keys"], p["radii"])[0])
    assert counter.frame_count == 1


def in_a_fresh_process(code: str, **environment: str) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    import os

    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_compiled_call_works_as_the_first_call_of_a_process() -> None:
    printed = in_a_fresh_process(
        """
        import torch, grace_kernels

        @torch.compile(fullgraph=True)
        def lookup(query, keys, radii):
            return grace_kernels.lookup(query, keys, radii)

        keys = torch.eye(4)
        print(lookup(keys[2:3], keys, torch.full((4,), 0.5))[0].tolist())
        """
    )
    assert printed.strip() == "[2]"


def test_importing_draws_nothing_in_and_changes_nothing() -> None:
    printed = in_a_fresh_process(
        """
        import sys, torch
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
        state = torch.random.get_rng_state()
        before = set(sys.modules)
        import grace_kernels
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - {"grace_kernels", "torch"} - set(sys.stdlib_module_names)))
        """
    )
    assert printed.strip() == "[]"
