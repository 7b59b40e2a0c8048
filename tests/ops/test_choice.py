"""The table of measurements by which a GPU's implementation is chosen."""

from __future__ import annotations

import csv
from collections import defaultdict
from math import prod
from pathlib import Path

import pytest

from grace_kernels.choice import TRITON_IS_FASTER, WARM_ENTRIES, Shapes, triton_is_faster
from grace_kernels.triton import tiles

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
MEASURED = {(9, 0): "nvidia-h100-4727689.csv"}
SWEPT = "nvidia-h100-4727689-triton-sweep.csv"
TILE = ("form", "queries", "keys", "elements", "groups", "warps", "stages", "resident")
OF_THEN = {
    1: ("direct", 1, 16, 256, 16, 4, 8, 2),
    8: ("dot", 16, 64, 128, 16, 4, 4, 2),
    64: ("dot", 64, 128, 64, 8, 8, 4, 1),
    512: ("dot", 64, 128, 64, 8, 8, 4, 1),
}
"""Triton's tile by the queries, when the record was made."""
TIE = 0.02  # of the time: the two sketched lookups of one case were that near each other


def cases(record: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """Return the medians of both, cold, by what was asked and whether with a sketch."""
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    with record.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            name, _, sketch = row["name"].partition(", ")
            if name in ("triton", "cuda") and row["cache"] == "cold" and row["unit"] == "us":
                about = (row[c] for c in ("part", "data", "dtype", "batch", "keys", "width"))
                found[(*about, sketch)][name] = float(row["median"])
    return {case: times for case, times in found.items() if len(times) == 2}


def sweep() -> dict[tuple[int, ...], dict[tuple[object, ...], float]]:
    """Return the times of the tiles that ran, by queries, width and keys."""
    found: dict[tuple[int, ...], dict[tuple[object, ...], float]] = defaultdict(dict)
    with (RESULTS / SWEPT).open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["us"]:
                tile = row["form"], *(int(row[c]) for c in TILE[1:])
                found[tuple(int(row[c]) for c in "BDN")][tile] = float(row["us"])
    return found


def of_now(batch: int, dim: int, keys: int) -> tuple[object, ...]:
    """Return the tile that the table has for a problem."""
    tile = tiles.choose((9, 0), 2, batch, keys, dim)
    return "direct" if tile.direct else "dot", *(getattr(tile, name) for name in TILE[1:])


@pytest.mark.skipif(not RESULTS.exists(), reason="no source tree")
def test_the_tiles_are_those_that_the_sweep_found_best() -> None:
    swept = sweep()
    assert len(swept) == 10
    for batch in OF_THEN:
        problems = [p for p in swept if p[0] == batch]
        in_all = set.intersection(*(set(swept[p]) for p in problems))
        for now in {of_now(*p) for p in problems}:
            mine = [p for p in problems if of_now(*p) == now]
            # The least geometric mean of the times in units of the fastest tile's, or of any unit.
            least = min(prod(swept[p][tile] for p in mine) for tile in in_all)
            assert prod(swept[p][now] for p in mine) == least, (now, mine)
            for p in mine:
                assert swept[p][now] <= swept[p][OF_THEN[batch]], (now, p)
                assert swept[p][now] <= 1.05 * min(swept[p].values()), (now, p)


@pytest.mark.skipif(not RESULTS.exists(), reason="no source tree")
@pytest.mark.parametrize("capability", TRITON_IS_FASTER)
def test_the_table_names_the_faster_one_wherever_both_were_measured(
    capability: tuple[int, int],
) -> None:
    measured = cases(RESULTS / MEASURED[capability])
    assert len(measured) == 88  # 64, 12 with a sketch, and those 12 without
    wrong = []
    for case, times in measured.items():
        shape = SIZES[case[2]], *(int(number) for number in case[3:6])
        by_triton = triton_is_faster(capability, *shape, sketched=case[6] == "sketch")
        chosen, other = ("triton", "cuda") if by_triton else ("cuda", "triton")
        if times[chosen] > times[other] * (1 + TIE):
            wrong.append((case, times))
    assert wrong == []


def test_every_row_is_there_for_a_measurement() -> None:
    measured = cases(RESULTS / MEASURED[9, 0])
    for row in TRITON_IS_FASTER[9, 0]:
        held = [(SIZES[c[2]], *(int(n) for n in c[3:6])) in row and not c[6] for c in measured]
        assert sum(held) >= 3, row


def test_warming_up_meets_every_row_and_every_tile() -> None:
    for row in TRITON_IS_FASTER[9, 0]:
        for dim in (row.dim, 4096, 11008):
            assert any((row.size, row.batch[0], n, dim) in row for n in WARM_ENTRIES), (row, dim)
    for capability in ((8, 0), (9, 0), (10, 0)):
        for size, rows in tiles.table(capability).items():
            met = {
                tiles.choose(capability, size, batch, n, dim)
                for batch in range(1, 200)
                for n in WARM_ENTRIES
                for dim in (768, 4096)
            }
            assert met == set(rows)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (10, 0), (12, 0)])
def test_where_nothing_was_measured_triton_answers(capability: tuple[int, int]) -> None:
    assert triton_is_faster(capability, 2, 1, 1000, 768, sketched=False)
    assert triton_is_faster(capability, 4, 8, 100_000, 768, sketched=True)


def test_a_row_ends_where_it_says() -> None:
    row = Shapes(2, (5, 16), 100, 50, 4000)
    inside = [(2, 5, 50, 100), (2, 16, 40, 100), (2, 8, 1, 4000)]
    outside = [(4, 8, 50, 100), (2, 4, 50, 100), (2, 17, 50, 100), (2, 8, 51, 100), (2, 8, 50, 99)]
    assert all(call in row for call in inside)
    assert not any(call in row for call in [*outside, (2, 8, 39, 100)])
    assert (2, 10**6, 10**9, 100) in Shapes(2, (5, None), 100, None, 0)
