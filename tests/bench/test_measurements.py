"""Measurements, their files, their ratios and the goals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import goals, measurements
from benchmarks.measurements import Measurement, Run

CASE = {"data": "isotropic", "keys": 10_000, "width": 768, "batch": 1, "cache": "warm"}
MINE = Measurement("nearest", name="nearest", dtype="bf16", answers="exact", median=2.0, **CASE)
PEER = replace(MINE, kind="peer", name="faiss", dtype="fp32", answers="rounded", median=6.0)


def test_the_readme_of_the_benchmarks_names_every_column() -> None:
    text = (Path(measurements.__file__).parent / "README.md").read_text()
    named = re.findall(r"^\| `([a-z0-9_]+)`", text, re.MULTILINE)
    assert named == list(measurements.COLUMNS)


def test_csv_and_json_give_back_what_was_written(tmp_path: Path) -> None:
    absent = Measurement("nearest", name="usearch", kind="peer", answers="absent", note='so, "so"')
    sketch = Measurement(
        "pruned", name="lookup, sketch", radius=1 / 3, median=1e-9 / 7, p20=0.0, p80=1e9
    )
    run = Run({"cpu": "some"}, [MINE, PEER, absent, sketch])
    table, whole = measurements.write(run, tmp_path, "cpu")
    assert measurements.read(table).measured == measurements.read(whole).measured == run.measured
    assert measurements.read(table).environment == run.environment
    whole.unlink()
    assert measurements.read(table) == Run({}, run.measured)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("part,device\nnearest,cpu\n")
    with pytest.raises(ValueError, match="must begin with part,device,data"):
        measurements.read(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "mine"}, "kind must be one of"),
        ({"answers": "good"}, "answers must be one of"),
        ({"answers": "absent"}, "median must be None where answers is absent"),
        ({"median": None}, "median must be None where answers is absent"),
    ],
)
def test_a_measurement_that_contradicts_itself_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(MINE, **changes)


def test_a_ratio_says_how_many_times_faster_or_more() -> None:
    assert measurements.ratio(MINE, PEER) == 3.0
    many = replace(MINE, unit="tokens/s", median=90.0)
    assert measurements.ratio(many, replace(many, median=30.0)) == 3.0
    with pytest.raises(ValueError, match="one unit"):
        measurements.ratio(MINE, many)


def test_a_wrong_or_absent_peer_is_never_the_one_to_beat() -> None:
    wrong = replace(PEER, name="quick and wrong", answers="wrong", median=0.1)
    absent = replace(PEER, name="absent", answers="absent", median=None)
    elsewhere = replace(PEER, name="another case", batch=8, median=0.1)
    assert measurements.best_peer([wrong, absent, elsewhere, PEER, MINE], MINE) == PEER
    assert measurements.best_peer([wrong, absent], MINE) is None
    assert measurements.best_peer([PEER], MINE, dtype="bf16") is None


def test_of_right_peers_the_fastest_is_the_best() -> None:
    faster = replace(PEER, name="faster", median=3.0)
    assert measurements.best_peer([PEER, faster], MINE) == faster
    rate = {"unit": "tokens/s"}
    slow, fast = (replace(PEER, median=value, **rate) for value in (10.0, 20.0))
    assert measurements.best_peer([slow, fast], replace(MINE, **rate)) == fast


def test_lookups_are_compared_with_the_peers_of_nearest_whatever_the_radius() -> None:
    lookup = replace(MINE, part="lookup", radius=1.0, median=1.0)
    assert goals.ours_and_best([lookup, PEER], "lookup") == [(lookup, PEER)]


def test_a_goal_counts_the_cases_that_reach_it_and_names_the_farthest() -> None:
    worse = replace(MINE, data="activations", median=5.0)
    beside = replace(PEER, data="activations")
    goal = goals.goals([MINE, PEER, worse, beside])[0]
    assert (goal.met, goal.total, goal.worst) == (1, 2, 6.0 / 5.0)
    assert "activations" in goal.where
    limits = [g for g in goals.goals([Measurement("pruned", name="fit", unit="s", median=90.0,
                                          keys=100_000, width=4096)]) if g.total]  # fmt: skip
    assert [(g.met, g.total, g.worst) for g in limits] == [(0, 1, 90.0)]


def reached(found: list[Measurement], start: str) -> tuple[int, int, float | None]:
    (goal,) = [goal for goal in goals.goals(found) if goal.text.startswith(start)]
    return goal.met, goal.total, goal.worst


def test_a_goal_with_float32_keys_compares_only_float32_keys() -> None:
    wide = replace(MINE, dtype="fp32", median=4.0)
    narrow = replace(PEER, name="narrow", dtype="bf16", median=3.0)
    found = [MINE, wide, PEER, narrow]
    for batch, met in ((1, 0), (8, 0), (64, 1)):
        some = [replace(one, batch=batch) for one in found]
        queries = "1 query" if batch == 1 else f"{batch} queries"
        assert reached(some, f"{queries}, all with float32") == (met, 1, 1.5)
        best = reached(some, f"brute force, {queries}:")
        assert best == (met, 1, 1.5)
        assert reached([*some[:2], some[3]], f"{queries}, all with float32") == (0, 0, None)


@pytest.mark.parametrize(("batch", "least"), [(1, 20.0), (8, 10.0)])
def test_a_sketch_has_to_beat_faiss_by_half_as_much_with_eight_queries(
    batch: int, least: float
) -> None:
    case = {**CASE, "batch": batch, "data": "activations", "keys": 100_000, "radius": 1.0}
    mine = Measurement("pruned", name="lookup, sketch", dtype="bf16", median=1.0, **case)
    queries = "1 query" if batch == 1 else "8 queries"
    for times, met in ((least, 1), (0.99 * least, 0)):
        faiss = replace(mine, kind="peer", name="faiss IndexFlatL2", median=times)
        told = f"sketch, {queries}: at least {least:.0f} times faiss"
        assert reached([mine, faiss], told) == (met, 1, times)
