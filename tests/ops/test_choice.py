"""The table of measurements by which a GPU's implementation is chosen."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from grace_kernels.choice import TRITON_IS_FASTER, Shapes, triton_is_faster

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
MEASURED = {(9, 0): "nvidia-h100-4727689.csv"}
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
