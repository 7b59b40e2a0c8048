"""The mathematics of the sketch: no bound is above a distance, whatever the keys are like."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch, reference
from grace_kernels.sketch_layout import COORDINATES, DIRECTIONS, MIDDLE, OUTLIERS, UNKNOWN

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _sphere(g: torch.Generator, n: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(_normal(g, n, dim), dim=1) * 7


def _clusters(g: torch.Generator, n: int, dim: int) -> Tensor:
    centres = 10 * _normal(g, 3, dim)
    return centres[torch.randint(3, (n,), generator=g)] + 0.01 * _normal(g, n, dim)


def _massive(g: torch.Generator, n: int, dim: int) -> Tensor:
    keys = _normal(g, n, dim)
    keys[:, dim // 2] = 3000 + 100 * _normal(g, n)
    return keys


def _steep(g: torch.Generator, n: int, dim: int) -> Tensor:
    return _normal(g, n, dim) * torch.arange(1, dim + 1).double() ** -1.5 * 20


def _close(g: torch.Generator, n: int, dim: int) -> Tensor:
    return _normal(g, n, dim) * 1e-24


def _scales(g: torch.Generator, n: int, dim: int) -> Tensor:
    return _normal(g, n, dim) * 10 ** (7 * torch.rand(n, 1, generator=g).double() - 3)


def _one_far_out(g: torch.Generator, n: int, dim: int) -> Tensor:
    keys = _normal(g, n, dim)
    keys[n // 2] *= 5000
    return keys


KINDS: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "isotropic": _normal,
    "on a sphere": _sphere,
    "clustered": _clusters,
    "one massive dimension": _massive,
    "a steep spectrum": _steep,
    "far from the origin": lambda g, n, dim: 300 + _normal(g, n, dim),
    "duplicates": lambda g, n, dim: _normal(g, 1, dim).expand(n, dim),
    "in a plane": lambda g, n, dim: _normal(g, n, 2) @ _normal(g, 2, dim),
    "1e-24 apart": _close,
    "subnormal": lambda g, n, dim: _normal(g, n, dim) * 1e-40,
    "norms of 1e-3 to 1e4": _scales,
    "one far out": _one_far_out,
}


def keys_and_queries(
    kind: str, dtype: torch.dtype, n: int, dim: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Keys and queries: keys themselves, their neighbours by one step and by a little, others."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max / 4
    keys = KINDS[kind](generator, n, dim).clamp(-largest, largest).to(dtype)
    row = torch.randint(n, (4,), generator=generator)
    up = torch.tensor(math.inf, dtype=dtype)
    near = keys[row] + (0.01 * keys[row].double() * _normal(generator, 4, dim)).to(dtype)
    others = KINDS[kind](generator, 2, dim).clamp(-largest, largest).to(dtype)
    return keys, torch.cat([keys[row[:2]], torch.nextafter(keys[row[2:]], up), near, others])


def allowed(distance: Tensor) -> Tensor:
    """The largest lower bound with which a key at this canonical distance is never pruned."""
    return distance.double() * (1 + 2.0**-22) + 2.0**-74


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_lower_bound_is_above_a_canonical_distance(kind: str, dtype: torch.dtype) -> None:
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        seed=st.integers(0, 2**31),
        n=st.sampled_from([1, 2, 31, 64, 150]),
        dim=st.sampled_from([1, 2, 7, 40, 64, 100, 384]),
        fitted=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def holds(seed: int, n: int, dim: int, fitted: float) -> None:
        keys, query = keys_and_queries(kind, dtype, n, dim, seed)
        made = Sketch.fit(keys, torch.ones(n), int(fitted * n))
        made.extend(keys, made.rows, n)
        distance = reference.squared_distances(query, keys).double().sqrt().float()
        assert (made.lower_bounds(query) <= allowed(distance)).all()

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_alone_answers_at_its_very_distance(kind: str, dtype: torch.dtype, isa: str) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        seed=st.integers(0, 2**31),
        n=st.sampled_from([1, 31, 40]),
        dim=st.sampled_from([1, 7, 40, 100, 384]),
    )
    def holds(seed: int, n: int, dim: int) -> None:
        keys, query = keys_and_queries(kind, dtype, n, dim, seed)
        made = Sketch.fit(keys, torch.ones(n), max(1, n // 2))
        made.extend(keys, made.rows, n)
        distance = reference.squared_distances(query, keys).double().sqrt().float()
        for row in range(0, n, 3):
            for x, d in zip(query, distance[:, row], strict=True):
                radii = torch.full((n,), -math.inf)
                radii[row] = d
                index, got = grace_kernels.lookup(x[None], keys, radii, sketch=made, backend="cpu")
                assert index.item() == row
                assert got.item() == d

    holds()


def fine_sketch_of_long_keys(seed: int) -> tuple[Sketch, Tensor, Tensor]:
    """Return a sketch, its keys and queries for which a query's own rounding decides.

    Directions are exact (Hadamard), keys 1e5 long across them and 0.02 apart along them, codes as
    fine as that allows: the float32 sums of a query are off by more than the codes are.
    """
    generator = torch.Generator().manual_seed(seed)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(8):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    along, across = hadamard[:64] / 16, hadamard[64:] / 16
    base = 1e5 * torch.nn.functional.normalize(_normal(generator, 192), dim=0) @ across
    keys = (base + 0.002 * _normal(generator, 45, 64) @ along).float()
    query = (base + 0.002 * _normal(generator, 6, 64) @ along).float()
    made = Sketch(45, 256, torch.float32)
    made.directions.copy_(along)
    made.scales.fill_(2.0**-14)
    made.scales[MIDDLE] = 1e5
    made.extend(keys, 0, 45)
    return made, keys, query


def sketch_of_keys_along_a_direction(seed: int) -> tuple[Sketch, Tensor, Tensor]:
    """Return a sketch, its keys and queries for which the rounding of a query's residual decides.

    Keys are 1.3e5 long along one direction and 30 across all: a difference of squares, which the
    float32 sums of a query miss by more than 30 squared.
    """
    made, keys, query = fine_sketch_of_long_keys(seed)
    rows = torch.cat([keys, query]).double()
    across = torch.ones(256, dtype=torch.float64) / 16
    across[64:128] = across[192:] = -1 / 16  # a Hadamard row that is no direction
    assert not (made.directions.double() @ across).any()
    rows += 2.0**17 * made.directions[0].double() + 30 * across - rows.mean(dim=0)
    keys, query = rows.float().split([45, 6])
    made.scales[COORDINATES] = 2.0**11
    made.scales[MIDDLE] = 30.0
    made.extend(keys, 0, 45)
    return made, keys, query


def in_order(terms: Tensor) -> Tensor:
    """Sum the last dimension in float32, one by one; how torch's own sums round is up to it."""
    return reduce(torch.add, terms.unbind(-1))


def test_the_rounding_of_what_a_query_has_beside_its_coordinates_is_allowed_for(isa: str) -> None:
    coarse = 0
    for seed in range(8):
        made, keys, query = sketch_of_keys_along_a_direction(seed)
        distance = reference.squared_distances(query, keys).double().sqrt().float()
        coordinates = in_order(query[:, None] * made.directions.float())
        rest = in_order(query.square()) - in_order(coordinates.square())
        plain = rest.clamp(min=0).sqrt()
        coarse += int(((plain - 30).abs() > 10).sum())
        for row in range(45):
            radii = torch.full((45,), -math.inf)
            for x, d in zip(query, distance[:, row], strict=True):
                radii[row] = d
                index, _ = grace_kernels.lookup(x[None], keys, radii, sketch=made, backend="cpu")
                assert index.item() == row
    assert coarse > 24  # of 48 queries


def test_the_rounding_of_a_query_is_allowed_for(isa: str) -> None:
    coarse = 0
    for seed in range(8):
        made, keys, query = fine_sketch_of_long_keys(seed)
        distance = reference.squared_distances(query, keys).double().sqrt().float()
        plain = in_order((query - made.centre)[:, None] * made.directions.float())
        exact = (query.double() - made.centre.double()) @ made.directions.double().T
        coarse += int(((plain - exact).norm(dim=1) > made._decode()[1].median()).sum())
        for row in range(45):
            radii = torch.full((45,), -math.inf)
            for x, d in zip(query, distance[:, row], strict=True):
                radii[row] = d
                index, _ = grace_kernels.lookup(x[None], keys, radii, sketch=made, backend="cpu")
                assert index.item() == row
    assert coarse > 24  # of 48 queries


@pytest.mark.parametrize("kind", ["a steep spectrum", "clustered", "in a plane"])
def test_bounds_are_close_to_the_distances_where_few_directions_tell_the_keys_apart(
    kind: str,
) -> None:
    keys, query = keys_and_queries(kind, torch.float32, 2000, 384, 0)
    made = Sketch.fit(keys, torch.ones(2000))
    distance = torch.cdist(query.double(), keys.double())
    far = distance > distance.median()
    assert (made.lower_bounds(query)[far] > 0.9 * distance[far]).double().mean() > 0.99


def test_directions_are_not_longer_than_one_and_nearly_orthonormal() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (1, 5, 63, 64, 65, 500):
        made = Sketch.fit(torch.randn(300, dim, generator=generator), torch.ones(300))
        gram = made.directions.double() @ made.directions.double().T
        assert torch.linalg.matrix_norm(made.directions.double(), 2) <= 1
        rows = min(dim, DIRECTIONS)
        assert torch.allclose(gram[:rows, :rows], torch.eye(rows).double(), atol=0.02)
        assert not made.directions[rows:].any()


def test_a_scale_times_a_code_is_exact_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    for factor in (1e-30, 1.0, 1e18):
        made = Sketch.fit(torch.randn(300, 90, generator=generator) * factor, torch.ones(300))
        codes = torch.arange(-UNKNOWN, UNKNOWN + 1, dtype=torch.float32)[:, None]
        product = made.scales[:MIDDLE] * codes
        assert torch.equal(product.double(), made.scales[:MIDDLE].double() * codes.double())


@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e6, 1e12])
def test_bounds_do_not_depend_on_the_unit_of_the_keys(unit: float) -> None:
    keys, query = keys_and_queries("a steep spectrum", torch.float32, 500, 100, 0)
    plain = Sketch.fit(keys, torch.ones(500)).lower_bounds(query)
    scaled = Sketch.fit(keys * unit, torch.ones(500)).lower_bounds(query * unit) / unit
    assert torch.allclose(scaled, plain, rtol=0.02, atol=0.02)


def test_keys_that_are_not_finite_have_no_bound() -> None:
    keys = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    keys[3, 5], keys[4, 5], keys[39, 0] = math.nan, math.inf, -math.inf
    made = Sketch.fit(keys, torch.ones(40))
    unknown = made.lower_bounds(keys[:1])[0] == -math.inf
    assert unknown.nonzero()[:, 0].tolist() == [3, 4, 39]


def test_a_key_out_of_reach_of_the_scales_is_bounded_all_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 30, generator=generator)
    made = Sketch.fit(keys, torch.ones(500), 400)
    keys[450:] *= torch.linspace(1, 1e6, 50)[:, None]
    made.extend(keys, 400, 500)
    query = torch.cat([keys[440:], torch.randn(5, 30, generator=generator)])
    distance = reference.squared_distances(query, keys).double().sqrt().float()
    assert (made.lower_bounds(query) <= allowed(distance)).all()


def test_the_radius_bound_holds_for_all_entries_but_the_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(300, 8, generator=generator)
    radii = torch.rand(300, generator=generator)
    made = Sketch.fit(keys, radii)
    for round_ in range(200):
        first = int(torch.randint(300, (), generator=generator))
        last = min(300, first + int(torch.randint(1, 9, (), generator=generator)))
        new = torch.rand(last - first, generator=generator) * (50 if round_ % 7 == 0 else 2)
        radii[first:last] = torch.where(new < 0.1, -math.inf, new)
        if round_ % 11 == 0:
            radii[first] = math.nan
        made.update_radii_(radii, first, last)
        above = (radii > made.radius_bound).nonzero()[:, 0].tolist()
        assert set(above) <= set(made.outliers.tolist())
        assert len(set(made.outliers.tolist()) - {-1}) == OUTLIERS


def test_a_few_outliers_leave_the_radius_bound_alone() -> None:
    keys = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    radii = torch.ones(300)
    radii[:20] = 1e6
    made = Sketch.fit(keys, radii)
    assert made.radius_bound == 1
    radii[20:40] = 1e6
    made.update_radii_(radii, 20, 40)
    assert made.radius_bound == 1e6


def test_a_sketch_is_a_tenth_of_its_keys_at_most() -> None:
    for dtype, dim in ((torch.bfloat16, 768), (torch.bfloat16, 4096), (torch.float32, 768)):
        keys = torch.zeros(20_000, dim, dtype=dtype)
        assert Sketch(20_000, dim, dtype).nbytes <= 0.1 * keys.nbytes


def test_a_state_makes_an_equal_sketch() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, radii = torch.randn(100, 20, generator=generator), torch.rand(100, generator=generator)
    made = Sketch.fit(keys, radii, 70)
    again = Sketch.from_state(made.state(), 200, torch.float32)
    assert again.capacity >= 200
    assert again.rows == again.covered == 70
    query = torch.randn(3, 20, generator=generator)
    assert torch.equal(again.lower_bounds(query), made.lower_bounds(query))
    for name in ("centre", "directions", "scales", "radius_bound", "outliers"):
        assert torch.equal(getattr(again, name), getattr(made, name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head", lambda t: t[:1], r"head must be torch.int8 \[4, 10, 32\], got .* \[1, 10, 32\]"),
        ("scales", lambda t: t.double(), "scales must be torch.float32"),
        ("covered", lambda t: t + 900, r"covered must lie in \[0, 100\], got 1000"),
        ("scales", lambda t: t * math.nan, "scales must be positive with 16 significant bits"),
        ("scales", lambda t: t * (1 + 2.0**-20), "scales must be positive with 16 significant"),
        ("radius_bound", lambda t: t * math.nan, "radius_bound must not be NaN"),
        ("directions", lambda t: t * 1.1, "directions must be no longer than 1, got longer"),
        ("directions", lambda t: t * math.nan, "directions must be no longer than 1"),
    ],
)
def test_a_bad_state_is_refused(name: str, change: Callable, message: str) -> None:
    keys = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    state = Sketch.fit(keys, torch.ones(100)).state()
    state[name] = change(state[name])
    with pytest.raises(ValueError, match=message):
        Sketch.from_state(state, 100, torch.float32)


def test_resizing_keeps_what_is_covered() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, radii = torch.randn(100, 20, generator=generator), torch.rand(100, generator=generator)
    made = Sketch.fit(keys, radii)
    query = torch.randn(3, 20, generator=generator)
    for capacity, rows in ((500, 100), (100, 100), (40, 40)):
        other = made.resized(capacity)
        assert (other.rows, int(other.covered)) == (rows, rows)
        assert torch.equal(other.lower_bounds(query), made.lower_bounds(query)[:, :rows])
        assert (other.outliers < capacity).all()


def test_a_sketch_made_in_inference_mode_can_be_told_of_changes_outside() -> None:
    keys = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made = Sketch.fit(keys, torch.ones(40), 30)
    made.extend(keys, 30, 40)
    made.update_radii_(torch.ones(40), 30, 40)
    assert made.rows == 40


def test_progress_counts_all_rows() -> None:
    seen: list[tuple[int, int]] = []
    keys = torch.zeros(5000, 4096, dtype=torch.bfloat16)
    Sketch.fit(keys, torch.ones(5000), progress=lambda done, rows: seen.append((done, rows)))
    assert len(seen) > 1
    assert seen[-1] == (5000, 5000)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, k, r: s.extend(k, 51, 60), "first must be at most the 50 slots covered, got 51"),
        (lambda s, k, r: s.extend(k, 0, 65), r"last must lie in \[0, 64\], got 65"),
        (lambda s, k, r: s.extend(k, -1, 3), r"first must lie in \[0, 64\], got -1"),
        (lambda s, k, r: s.extend(k.half(), 0, 3), "keys must be torch.float32 with 20 columns"),
        (lambda s, k, r: s.extend(k[:, 1:], 0, 3), "keys must be torch.float32 with 20 columns"),
        (lambda s, k, r: s.update_radii_(r.double(), 0, 3), "radii must be float32 of rank 1"),
        (lambda s, k, r: s.update_radii_(r, 3, 2), r"last must lie in \[3, 99\], got 2"),
        (lambda s, k, r: s.refit(k, r), "keys must have at most 64 rows, got 99"),
        (lambda s, k, r: s.refit(k, r[:50]), "radii must have 99 rows like keys"),
        (lambda s, k, r: Sketch.fit(k[:, :0], r), r"keys must have columns, got shape \[99, 0\]"),
        (lambda s, k, r: Sketch.fit(k, r, 100), r"count must lie in \[0, 99\], got 100"),
        (lambda s, k, r: Sketch.fit(k.double(), r), "keys must be float32, float16 or bfloat16"),
        (
            lambda s, k, r: grace_kernels.lookup(k[:2].half(), k.half(), r, sketch=s),
            "sketch must be of torch.float16 keys with 20 columns like keys, got one of torch.fl",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable, message: str) -> None:
    keys, radii = torch.randn(99, 20), torch.ones(99)
    made = Sketch.fit(keys[:50], radii[:50])
    with pytest.raises(ValueError, match=message):
        call(made, keys, radii)


def test_a_sketch_of_another_type_is_refused() -> None:
    keys = torch.randn(3, 4)
    with pytest.raises(TypeError, match="sketch must be a Sketch or None, got dict"):
        grace_kernels.lookup(keys, keys, torch.ones(3), sketch={})  # type: ignore[arg-type]
