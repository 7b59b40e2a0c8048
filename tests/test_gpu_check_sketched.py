"""The rows of gpu-check about sketches, tried without a GPU on planted errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_check import bench, correct, journal, place, pruned, sketched, warm

import grace_kernels
from grace_kernels import Sketch

CPU = place.Place(torch.device("cpu"))
OURS = CPU.backends[0]
COUNTED = grace_kernels.build_info()["cpu"]["available"]


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[tuple, Any], None]) -> None:
    """Have an operator's answers changed where it was given a sketch."""
    plain = getattr(grace_kernels, name)

    def spoiled(*args: Any, **how: Any) -> Any:
        got = plain(*args, **how)
        if how.get("sketch") is not None:
            change(got, how["sketch"])
        return got

    monkeypatch.setattr(grace_kernels, name, spoiled)


def test_a_wrong_bit_behind_a_sketch_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in sketched.cases(0, range(9)) if len(case.query) > 1)
    assert sketched.compare(CPU, case, (OURS,)) == {OURS: []}

    def index(got: tuple, sketch: Sketch) -> None:
        got[0][1] += 1

    def distance(got: tuple, sketch: Sketch) -> None:
        got[1].view(torch.int32)[0] += 1

    def codes(got: tuple, sketch: Sketch) -> None:
        sketch.head.view(-1)[0] += 1

    for name, change, message in (
        ("lookup", index, "pruned lookup index: 1 differ"),
        ("adapt_", distance, "pruned adapt distance: 1 differ"),
        ("lookup", codes, "the sketch was written to"),
    ):
        with monkeypatch.context() as patch:
            spoil(patch, name, change)
            told = sketched.compare(CPU, case, (OURS,))[OURS]
            assert len(told) == 1
            assert message in told[0]
    with monkeypatch.context() as patch:
        spoil(patch, "lookup", distance)
        with pytest.raises(journal.Wrong, match=r"codebook 0: .* pruned lookup distance") as wrong:
            correct._sketched(CPU, 0, 2)
    assert wrong.value.result[f"wrong, {OURS}"] == 2


def test_a_row_written_beside_those_of_a_hit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = grace_kernels.adapt_

    def writes(hidden: torch.Tensor, *args: Any, **how: Any) -> Any:
        got = plain(hidden, *args, **how)
        if how["sketch"] is not None:
            hidden[-1, -1] = 7
        return got

    monkeypatch.setattr(grace_kernels, "adapt_", writes)
    case = next(sketched.cases(0, [1]))
    assert "rows written through" in sketched.compare(CPU, case, (OURS,))[OURS][0]


def test_the_seed_of_the_run_decides_over_the_codebooks() -> None:
    names = [[case.name for case in sketched.cases(seed, range(5))] for seed in (0, 0, 1)]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


@pytest.mark.skipif(not COUNTED, reason="no compiled CPU kernels to count")
def test_a_lookup_that_reads_every_key_in_spite_of_a_sketch_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(sketched.spares(CPU, OURS)) == 6

    def scanning(got: tuple, sketch: Sketch) -> None:
        sketch.counters[3] += 1

    with monkeypatch.context() as patch:
        spoil(patch, "lookup", scanning)
        with pytest.raises(journal.Wrong, match="hardly a key is within reach, read were"):
            sketched.spares(CPU, OURS)
    fit = Sketch.fit

    def misled(keys: torch.Tensor, radii: torch.Tensor) -> Sketch:
        sketch = fit(keys, radii)
        sketch.head[3, 2:] = 100
        return sketch

    monkeypatch.setattr(Sketch, "fit", misled)
    with pytest.raises(journal.Wrong, match="32 bounds of a sketch fitted on the device"):
        sketched.spares(CPU, OURS)


@pytest.mark.skipif(not COUNTED, reason="the reference does not look at sketches")
def test_a_graph_whose_sketch_was_not_told_of_a_key_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = sketched.told(CPU, OURS)
    assert result["hits"] > 20
    assert result["rows sketched"] > 210
    fit, extend = Sketch.fit, Sketch.extend

    def fitted_once(keys: torch.Tensor, radii: torch.Tensor, count: int) -> Sketch:
        with monkeypatch.context() as patch:
            patch.setattr(Sketch, "extend", extend)
            sketch = fit(keys, radii, len(keys))
        return sketch

    monkeypatch.setattr(Sketch, "fit", fitted_once)
    monkeypatch.setattr(Sketch, "extend", lambda *told: None)
    with pytest.raises(journal.Wrong, match="the answer is stale"):
        sketched.told(CPU, OURS)


def test_times_stand_beside_those_without_a_sketch_and_what_is_missed_is_marked() -> None:
    results = []
    for shape in pruned.shapes(CPU):
        result = pruned.measure(CPU, pruned.Stock(CPU), shape)
        assert set(result["pruned columns"]) == {f"{OURS} pruned", OURS}
        for column in result["pruned columns"].values():
            assert column["verdict"] == "right"
            assert column["cold"]["us"] > 0
        assert result["hits"] == (shape.batch if shape.worst else 0)
        results.append(result)
    fast, slow = (result["pruned columns"][f"{OURS} pruned"] for result in results)
    fast["of brute"], slow["of brute"] = 0.5, 1.2
    lines = [line for line in pruned.table(results) if f"| {OURS} |" in line]
    assert [bool(re.search(r"\| 1.2 MISSED \|", line)) for line in lines] == [False, True]
    assert "| 0.5 |" in lines[0]
    assert "worst case bf16" in lines[1]
    if COUNTED:
        assert fast["scored"] < 0.01
        assert slow["scored"] + slow["scanned"] > 0.9


def test_a_wrong_time_with_a_sketch_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(got: tuple, sketch: Sketch) -> None:
        got[0][0] += 1

    spoil(monkeypatch, "lookup", off)
    shape = pruned.shapes(CPU)[1]
    with pytest.raises(journal.Wrong, match=f"{OURS} pruned: 1 of 8 indices wrong") as wrong:
        pruned.measure(CPU, pruned.Stock(CPU), shape)
    columns = wrong.value.result["pruned columns"]
    assert "cold" not in columns[f"{OURS} pruned"]
    assert columns[OURS]["verdict"] == "right"


def test_the_rows_of_sketches_come_behind_the_first_lookups() -> None:
    gpu = replace(CPU, device=torch.device("cuda"))
    names = [row.name for row in pruned.among(bench.rows(gpu), gpu)]
    assert len(set(names)) == len(names)
    assert names[0] == "ceilings"
    at = [n for n, name in enumerate(names) if name.startswith("pruned")]
    assert at == list(range(at[0], at[0] + 12))
    assert len([name for name in names[: at[0]] if name.startswith("lookup")]) == 20
    assert {(s.dim, s.keys, s.batch) for s in pruned.shapes(gpu) if not s.worst} == {
        (dim, n, batch) for dim in (768, 4096) for n in (100_000, 1_000_000) for batch in (1, 8)
    }


def test_what_triton_compiles_beforehand_covers_the_codebooks_with_sketches() -> None:
    forms = {warm.sketched_form(case) for case in warm.sketched_cases()}
    drawn = [warm.sketched_form(case) for case in sketched.cases(3, range(300))]
    assert sum(form not in forms for form in drawn) <= 6
    assert len(forms) < 60  # each takes seconds
