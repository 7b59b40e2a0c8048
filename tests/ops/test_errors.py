"""Bad arguments: each error names the argument, the rule and what it got."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grace_kernels

from .test_adapt import problem

B, C, D = 3, 5, 8
LOOKUP: dict[str, Any] = {
    "query": torch.zeros(B, D),
    "keys": torch.zeros(C, D),
    "radii": torch.zeros(C),
    "count": None,
}

LOOKUP_ERRORS = [
    ("query", [[0.0]], TypeError, "query must be a Tensor, got list"),
    ("query", torch.zeros(D), ValueError, r"query must have rank 2, got shape \[8\]"),
    ("keys", torch.zeros(1, C, D), ValueError, r"keys must have rank 2, got shape \[1, 5, 8\]"),
    ("radii", torch.zeros(C, 1), ValueError, r"radii must have rank 1, got shape \[5, 1\]"),
    (
        "keys",
        torch.zeros(C, D + 1),
        ValueError,
        r"keys must have 8 columns like query, got shape \[5, 9\]",
    ),
    ("radii", torch.zeros(C + 1), ValueError, "radii must have 5 rows like keys, got 6"),
    (
        "query",
        torch.zeros(B, D, dtype=torch.float64),
        ValueError,
        "query must be float32, float16 or bfloat16, got torch.float64",
    ),
    (
        "keys",
        torch.zeros(C, D, dtype=torch.float16),
        ValueError,
        r"keys must have the dtype of query \(torch.float32\), got torch.float16",
    ),
    ("radii", torch.zeros(C).half(), ValueError, "radii must be float32, got torch.float16"),
    (
        "keys",
        torch.zeros(C, D, device="meta"),
        ValueError,
        r"keys must be on the device of query \(cpu\), got meta",
    ),
    ("count", 6, ValueError, r"count must lie in \[0, 5\], got 6"),
    ("count", -1, ValueError, r"count must lie in \[0, 5\], got -1"),
    ("count", torch.tensor(6), ValueError, r"count must lie in \[0, 5\], got 6"),
    ("count", torch.tensor(-1), ValueError, r"count must lie in \[0, 5\], got -1"),
    ("count", True, TypeError, "count must be a Tensor, an int or None, got bool"),
    ("count", 1.0, TypeError, "count must be a Tensor, an int or None, got float"),
    ("count", torch.tensor([1]), ValueError, r"count must have rank 0, got shape \[1\]"),
    ("count", torch.tensor(1.0), ValueError, "count must be int64, got torch.float32"),
]


@pytest.mark.on_a_cpu
@pytest.mark.index_values_are_checked
@pytest.mark.parametrize("operation", [grace_kernels.nearest, grace_kernels.lookup])
@pytest.mark.parametrize(("name", "value", "error", "message"), LOOKUP_ERRORS)
def test_a_bad_argument_of_a_lookup_is_named(
    operation: Any, name: str, value: Any, error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        operation(**{**LOOKUP, name: value}, backend=backend)


ADAPT_ERRORS = [
    ("hidden", torch.zeros(20), ValueError, r"hidden must have rank 2, got shape \[20\]"),
    ("values", torch.zeros(11, 7), ValueError, "values must have 12 rows like keys, got 11"),
    (
        "values",
        torch.zeros(12, 6),
        ValueError,
        r"values must have 7 columns like hidden, got shape \[12, 6\]",
    ),
    (
        "values",
        torch.zeros(12, 7).half(),
        ValueError,
        r"values must have the dtype of hidden \(torch.float32\), got torch.float16",
    ),
    (
        "hidden",
        torch.zeros(20, 7, dtype=torch.int32),
        ValueError,
        "hidden must be float32, float16, bfloat16 or float64, got torch.int32",
    ),
    (
        "source",
        torch.zeros(9, 24).half(),
        ValueError,
        r"keys must have the dtype of source \(torch.float16\), got torch.float32",
    ),
    (
        "hidden",
        torch.zeros(20, 7, device="meta"),
        ValueError,
        r"hidden must be on the device of source \(cpu\), got meta",
    ),
    ("query_row", torch.zeros(5), ValueError, "query_row must be int64, got torch.float32"),
    (
        "first_row",
        torch.zeros(4).long(),
        ValueError,
        "first_row must have 5 elements like query_row, got 4",
    ),
    ("last_row", [1, 2], TypeError, "last_row must be a Tensor, got list"),
    ("last_row", torch.tensor(3), ValueError, r"last_row must have rank 1, got shape \[\]"),
]


@pytest.mark.parametrize("operation", [grace_kernels.adapt, grace_kernels.adapt_])
@pytest.mark.parametrize(("name", "value", "error", "message"), ADAPT_ERRORS)
def test_a_bad_argument_of_adapt_is_named(
    operation: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        operation(**{**problem(), name: value})


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of reference, cpu, .* got 'gpu'"):
        grace_kernels.lookup(**LOOKUP, backend="gpu")


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_backend_that_cannot_answer_says_so(name: str) -> None:
    elsewhere = [LOOKUP[key].to("meta") for key in ("query", "keys", "radii")]
    with pytest.raises(grace_kernels.BackendUnavailable, match=f"backend '{name}'") as caught:
        grace_kernels.lookup(*elsewhere, backend=name)  # type: ignore[arg-type]
    missing = grace_kernels.build_info()[name].get("reason")
    where = "a CPU" if name == "cpu" else "a CUDA device"
    assert (missing or f"needs tensors on {where}, got meta") in str(caught.value)


def test_shapes_that_do_not_fit_are_refused_by_the_operators_themselves(isa: str) -> None:
    query, keys, radii = LOOKUP["query"], LOOKUP["keys"], LOOKUP["radii"]
    for bad in (
        (query[0], keys, radii),
        (query[:, :4], keys, radii),
        (query, keys, radii[:2]),
        (query.double(), keys.double(), radii),
        (query.half(), keys, radii),
        (query, keys, radii.double()),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.grace.lookup(*bad)
