"""The random codebooks: reproducible, lawful, and hard enough that a wrong rule shows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from grace_kernels import Sketch, lookup
from grace_kernels.reference import squared_distances
from grace_kernels.testing import SketchCase, random_codebook, same_bits

SEEDS = range(400)


def pruned(case: SketchCase, sketch: Sketch, rule: str) -> tuple[Tensor, Tensor]:
    """Return what a lookup finds among the keys that `rule` keeps."""
    n = len(case.keys) if case.count is None else case.count
    if rule == "radii as at the fit":
        sketch = replace(case, later_radii=()).sketch()
    rows = min(int(sketch.covered), n)
    radii, live = case.radii[:n], case.radii[:n] != -math.inf
    s = squared_distances(case.query, case.keys[:n]).nan_to_num(nan=math.inf, posinf=math.inf)
    d = s.double().sqrt().float()
    bound = torch.zeros(len(s), n).double() - math.inf
    if rows:
        bound[:, :rows] = sketch.lower_bounds(case.query)[:, :rows]
        if rule == "e forgotten":
            bound[:, :rows] += sketch._decode()[1][:rows]
    reach = sketch.radius_bound.expand(len(s))
    large = sketch.outliers[(sketch.outliers >= 0) & (sketch.outliers < n)]
    large = large[live[large] & (radii[large] > sketch.radius_bound)]
    if len(large) and rule != "outliers forgotten":
        hit = torch.where(d[:, large] <= radii[large], d[:, large], math.inf)
        found = (d[:, large] <= radii[large]).any(dim=1)
        reach = torch.where(found, torch.maximum(reach, hit.amin(dim=1)), reach)
        uncovered = radii[large[large >= rows]].tolist()
        reach = reach.clamp(min=max(uncovered, default=-math.inf))
    if rule == "own radius alone":
        reach = radii.expand(len(s), n).nan_to_num(nan=-math.inf)
    else:
        reach = reach[:, None].expand(len(s), n)
    kept = ~(bound > reach.double() * (1 + 2.0**-22) + 2.0**-74)
    kept[:, rows:] = rule != "rows not covered forgotten"
    kept &= live & ~case.query.isnan().any(dim=1)[:, None]
    if n == 0:
        return torch.full((len(s),), -1), torch.full((len(s),), math.inf)
    # The first of the least, +inf included, for which a row left out must stand behind it.
    order = s.double().masked_fill(s == math.inf, 1e300).masked_fill(~kept, math.inf)
    index = order.argmin(dim=1)
    at = torch.arange(len(s))
    miss = ~kept[at, index] | ~(d[at, index] <= radii[index])
    return index.masked_fill(miss, -1), d[at, index].masked_fill(miss, math.inf)


@cache
def cases() -> list[tuple[SketchCase, Sketch, tuple[Tensor, Tensor]]]:
    """Return codebooks, their sketches and the reference's answers."""
    found = []
    for seed in SEEDS:
        case = random_codebook(seed)
        right = lookup(case.query, case.keys, case.radii, case.count, backend="reference")
        found.append((case, case.sketch(), right))
    return found


def wrong(rule: str) -> int:
    """Count the codebooks on which `rule` changes the answer of brute force."""
    found = 0
    for case, sketch, right in cases():
        got = pruned(case, sketch, rule)
        found += not (same_bits(right[0], got[0]) and same_bits(right[1], got[1]))
    return found


def test_the_rule_of_the_sketch_is_right_on_all_of_them() -> None:
    assert wrong("as it should be") == 0


@pytest.mark.parametrize(
    "rule",
    [
        "own radius alone",
        "e forgotten",
        "outliers forgotten",
        "rows not covered forgotten",
        "radii as at the fit",
    ],
)
def test_a_wrong_rule_is_wrong_on_some(rule: str) -> None:
    assert wrong(rule) >= 3


def test_a_seed_gives_the_same_codebook_again() -> None:
    for seed in range(12):
        a, b = random_codebook(seed), random_codebook(seed)
        assert a.name == b.name
        for name in ("query", "keys", "radii", "fit_keys", "fit_radii"):
            assert same_bits(getattr(a, name), getattr(b, name))
        for mine, other in zip(a.sketch().tensors(), b.sketch().tensors(), strict=True):
            assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_what_is_told_ends_in_the_codebook_as_it_is() -> None:
    for case, _, _ in cases():
        n = len(case.keys) if case.count is None else case.count
        keys, radii = case.fit_keys.clone(), case.fit_radii.clone()
        for target, changes in ((keys, case.later_keys), (radii, case.later_radii)):
            for first, last, rows in changes:
                target[first:last] = rows
        live = case.radii[:n] != -math.inf
        assert same_bits(radii[:n], case.radii[:n])
        assert same_bits(keys[:n][live], case.keys[:n][live])


def test_every_kind_of_edge_is_among_them() -> None:
    drawn, sketches, answers = zip(*cases(), strict=True)
    ends = [len(c.keys) if c.count is None else c.count for c in drawn]
    finite = [c.radii[c.radii.isfinite()] for c in drawn]
    assert {c.keys.dtype for c in drawn} == {torch.bfloat16, torch.float16, torch.float32}
    assert sum(s.rows < n for s, n in zip(sketches, ends, strict=True)) >= 20
    assert sum(s.rows > n for s, n in zip(sketches, ends, strict=True)) >= 20
    assert sum(not c.active for c in drawn) >= 3
    assert sum(bool((c.radii == -math.inf).any()) for c in drawn) >= 20
    many = [len(r) > 40 and int((r > 2 * r.quantile(0.1)).sum()) > 32 for r in finite]
    assert sum(many) >= 20
    exact = 0
    for case, (index, distance) in zip(drawn, answers, strict=True):
        hit = index >= 0
        exact += int((distance[hit] == case.radii[index[hit]]).sum())
    assert exact >= 100
