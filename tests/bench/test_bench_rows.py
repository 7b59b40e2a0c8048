"""Rows, their files, their ratios, the clock and the gate before it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import grace_kernels
from benchmarks import goals, operators, rows, timing
from benchmarks.gate import judged, right_answers
from benchmarks.peers import PEERS, Book, Peer
from benchmarks.rows import Row, Run
from grace_kernels.testing import same_bits

CASE = {"data": "isotropic", "keys": 10_000, "width": 768, "batch": 1, "cache": "warm"}
MINE = Row("nearest", name="nearest", dtype="bf16", answers="exact", median=2.0, **CASE)
PEER = replace(MINE, kind="peer", name="faiss", dtype="fp32", answers="rounded", median=6.0)


def test_the_readme_of_the_benchmarks_names_every_column() -> None:
    text = (Path(rows.__file__).parent / "README.md").read_text()
    named = re.findall(r"^\| `([a-z0-9_]+)`", text, re.MULTILINE)
    assert named == list(rows.COLUMNS)


def test_csv_and_json_give_back_the_rows_that_were_written(tmp_path: Path) -> None:
    absent = Row("nearest", name="usearch", kind="peer", answers="absent", note='so, "so"')
    sketch = Row("pruned", name="lookup, sketch", radius=1 / 3, median=1e-9 / 7, p20=0.0, p80=1e9)
    run = Run({"cpu": "some"}, [MINE, PEER, absent, sketch])
    table, whole = rows.write(run, tmp_path, "cpu")
    assert rows.read(table).rows == rows.read(whole).rows == run.rows
    assert rows.read(table).environment == run.environment
    whole.unlink()
    assert rows.read(table) == Run({}, run.rows)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("part,device\nnearest,cpu\n")
    with pytest.raises(ValueError, match="must begin with part,device,data"):
        rows.read(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "mine"}, "kind must be one of"),
        ({"answers": "good"}, "answers must be one of"),
        ({"answers": "absent"}, "median must be None where answers is absent"),
        ({"median": None}, "median must be None where answers is absent"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(MINE, **changes)


def test_a_ratio_says_how_many_times_faster_or_more() -> None:
    assert rows.ratio(MINE, PEER) == 3.0
    many = replace(MINE, unit="tokens/s", median=90.0)
    assert rows.ratio(many, replace(many, median=30.0)) == 3.0
    with pytest.raises(ValueError, match="one unit"):
        rows.ratio(MINE, many)


def test_a_wrong_or_absent_peer_is_never_the_one_to_beat() -> None:
    wrong = replace(PEER, name="quick and wrong", answers="wrong", median=0.1)
    absent = replace(PEER, name="absent", answers="absent", median=None)
    elsewhere = replace(PEER, name="another case", batch=8, median=0.1)
    assert rows.best_peer([wrong, absent, elsewhere, PEER, MINE], MINE) == PEER
    assert rows.best_peer([wrong, absent], MINE) is None
    assert rows.best_peer([PEER], MINE, dtype="bf16") is None


def test_of_right_peers_the_fastest_is_the_best() -> None:
    faster = replace(PEER, name="faster", median=3.0)
    assert rows.best_peer([PEER, faster], MINE) == faster
    rate = {"unit": "tokens/s"}
    slow, fast = (replace(PEER, median=value, **rate) for value in (10.0, 20.0))
    assert rows.best_peer([slow, fast], replace(MINE, **rate)) == fast


def test_lookups_are_compared_with_the_peers_of_nearest_whatever_the_radius() -> None:
    lookup = replace(MINE, part="lookup", radius=1.0, median=1.0)
    assert goals.ours_and_best([lookup, PEER], "lookup") == [(lookup, PEER)]


def test_a_goal_counts_the_cases_that_reach_it_and_names_the_farthest() -> None:
    worse = replace(MINE, data="activations", median=5.0)
    beside = replace(PEER, data="activations")
    goal = goals.goals([MINE, PEER, worse, beside])[0]
    assert (goal.met, goal.total, goal.worst) == (1, 2, 6.0 / 5.0)
    assert "activations" in goal.where
    limits = [g for g in goals.goals([Row("pruned", name="fit", unit="s", median=90.0,
                                          keys=100_000, width=4096)]) if g.total]  # fmt: skip
    assert [(g.met, g.total, g.worst) for g in limits] == [(0, 1, 90.0)]


def reached(found: list[Row], start: str) -> tuple[int, int, float | None]:
    (goal,) = [goal for goal in goals.goals(found) if goal.text.startswith(start)]
    return goal.met, goal.total, goal.worst


def test_a_goal_with_float32_keys_compares_only_float32_keys() -> None:
    wide = replace(MINE, dtype="fp32", median=4.0)
    narrow = replace(PEER, name="narrow", dtype="bf16", median=3.0)
    found = [MINE, wide, PEER, narrow]
    for batch, met in ((1, 0), (8, 0), (64, 1)):
        some = [replace(row, batch=batch) for row in found]
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
    mine = Row("pruned", name="lookup, sketch", dtype="bf16", median=1.0, **case)
    queries = "1 query" if batch == 1 else "8 queries"
    for times, met in ((least, 1), (0.99 * least, 0)):
        faiss = replace(mine, kind="peer", name="faiss IndexFlatL2", median=times)
        told = f"sketch, {queries}: at least {least:.0f} times faiss"
        assert reached([mine, faiss], told) == (met, 1, times)


def test_times_are_the_median_and_the_fifths() -> None:
    took = timing.Times.of([5e-3, 1e-3, 2e-3, 4e-3, 3e-3])
    assert (took.median, took.p20, took.p80, took.calls) == (3e-3, 2e-3, 4e-3, 5)
    columns = took.columns("edits/s", per_call=6.0)
    assert columns["median"] == pytest.approx(2000)
    assert columns["p20"] < columns["median"] < columns["p80"]


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_everything_is_timed_in_turn_and_what_is_slow_in_few_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    order = []

    def note(name: str, seconds: float) -> None:
        order.append(name)
        clock.sleep(seconds)

    timed = {"a": lambda: note("a", 2e-3), "b": lambda: note("b", 1.0)}
    times = timing.interleaved(timed, 3.5, most=8)
    assert (times["a"].calls, times["b"].calls) == (8, timing.FEW)
    assert (times["a"].median, times["b"].median) == pytest.approx((2e-3, 1.0))
    changes = [name for name, after in pairwise(order) if name != after]
    assert changes == ["a", "b"] * (1 + timing.FEW)
    short = timing.interleaved({"c": lambda: note("c", 1e-4)}, 3.5, most=2)
    assert short["c"].calls == 20  # ten per round


def test_with_cold_caches_every_timed_call_comes_after_a_flush() -> None:
    order: list[str] = []
    timing.interleaved(
        {"call": lambda: order.append("call")}, 0.05, most=4, flush=lambda: order.append("flush")
    )
    assert "".join(name[0] for name in order) == "cc" + "fc" * 4


@pytest.mark.parametrize(("cache", "read"), [(3 << 20, 6 << 20), (768 << 20, 1 << 30)])
def test_a_flush_reads_twice_the_last_level_cache_but_at_most_a_gibibyte(
    cache: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda: cache)
    monkeypatch.setattr(torch, "ones", lambda count, dtype: torch.empty(count, dtype=dtype))
    assert timing.Flush().buffer.nbytes == read


def test_reading_reads_every_byte() -> None:
    keys = torch.zeros(32, 8, dtype=torch.bfloat16)
    assert [float(call()) for call in timing.reads(keys).values()] == [0.0] * 3
    keys[-1, -1] = 1.0
    for way, call in timing.reads(keys).items():
        assert float(call()) != 0, way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_knows_what_brute_force_gives(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(70, 40, generator=generator).to(dtype)
    keys[50] = keys[20]
    query = torch.cat([keys[[50, 3]].float() + 0.01, torch.randn(3, 40, generator=generator)])
    query, radii = query.to(dtype), torch.full((70,), 1.0)
    right = right_answers(query.float(), keys, radii)
    for name, answer in right.items():
        index, distance = getattr(grace_kernels, name)(query, keys, radii, backend="reference")
        assert answer[0].tolist() == index.tolist()
        assert same_bits(answer[1], distance)
    assert right["nearest"][0][0] == 20


def test_the_gate_tells_exact_rounded_and_wrong_apart() -> None:
    right = torch.tensor([4, 2]), torch.tensor([1.0, 2.0])
    assert judged(right, right) == ("exact", "")
    rounded = right[0], torch.tensor([1.0, 2.000001])
    assert judged(rounded, right)[0] == "rounded"
    assert judged((right[0], None), right)[0] == "rounded"
    assert judged((torch.tensor([4, 1]), right[1]), right) == ("wrong", "1 of 2 indices wrong")


def small_case(batch: int = 3) -> operators.Case:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(200, 64, generator=generator).bfloat16()
    query = keys[torch.tensor([5, 9, 11])[:batch]].float() + 0.01
    query = query.bfloat16().float()
    return operators.Case("isotropic", Book(keys.float(), keys, 1), query, torch.full((200,), 2.0))


def test_every_peer_that_is_installed_finds_the_right_keys() -> None:
    case = small_case()
    far = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    case = replace(case, query=torch.cat([case.query, far]))
    right = right_answers(case.query, case.book.narrow, case.radii)["nearest"]
    judgements = {}
    for peer in PEERS:
        if peer.name in ("torch.compile", "PyKeOps argmin"):
            continue  # they compile for seconds
        try:
            call = peer.asks(case.book, case.of(peer.dtype)[0])
        except ImportError:
            continue
        judgements[peer.name, peer.way] = judged(call(), right)[0]
    assert "wrong" not in judgements.values()
    assert judgements["torch product", "keys @ queries"] == "exact"


def test_a_peer_with_wrong_answers_is_timed_marked_and_not_called_beaten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(book: Book, query: torch.Tensor) -> object:
        return lambda: (torch.zeros(len(query), dtype=torch.int64), None)

    def missing(book: Book, query: torch.Tensor) -> object:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    product = next(peer for peer in PEERS if peer.way == "keys @ queries")
    planted = [Peer("first", "fp32", "first", first), Peer("gone", "fp32", "no-such", missing)]
    monkeypatch.setattr(operators, "PEERS", (*planted, product))
    found = operators.measure(small_case(), 0.01, {})
    by_name = {row.name: row for row in found if row.kind == "peer"}
    assert by_name["first"].answers == "wrong"
    assert by_name["first"].median is not None
    assert by_name["first"].note == "3 of 3 indices wrong"
    assert by_name["gone"].answers == "absent"
    assert by_name["gone"].note == "not installed: pip install no-such"
    for mine, peer in goals.ours_and_best(found, "nearest"):
        assert (mine.answers, peer.name) == ("exact", "torch product")
    mine = [row for row in found if row.kind == "ours"]
    assert {(row.part, row.dtype) for row in mine} == {
        (part, dtype) for part in rows.OPERATORS for dtype in ("fp32", "bf16")
    }
    assert {row.answers for row in mine} == {"exact"}


def test_an_adapt_that_writes_another_row_is_wrong() -> None:
    case = small_case()
    right = right_answers(case.query, case.book.narrow, case.radii)["lookup"]
    call, hidden = operators.ours(case)["adapt_", "fp32"]
    assert operators._verdict(call, hidden, case.book.wide, right) == ("exact", "")

    def spoilt() -> object:
        answer = call()
        hidden[1, 0] += 1
        return answer

    verdict = operators._verdict(spoilt, hidden, case.book.wide, right)
    assert verdict == ("wrong", "writes other rows")


def test_a_peer_far_slower_than_the_fastest_is_not_asked_for_more_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(book: Book, query: torch.Tensor) -> object:
        call = PEERS[0].asks(book, query)
        return lambda: (time.sleep(0.2), call())[1]

    late = Peer("late", "fp32", "", slowly)
    monkeypatch.setattr("benchmarks.peers.SLOW", 1e-9)
    monkeypatch.setattr("benchmarks.peers.FAR", 3.0)
    monkeypatch.setattr(operators, "PEERS", (PEERS[0], late))
    slow: dict[Peer, str] = {}
    found = operators.measure(small_case(1), 0.01, slow)
    assert [row.name for row in found if row.kind == "peer" and row.counts] == [
        "torch product",
        "late",
    ]
    assert list(slow) == [late]
    again = operators.measure(small_case(3), 0.01, slow)
    notes = {row.name: row.note for row in again if row.kind == "peer"}
    assert notes["late"].startswith("left out: took 0.")
    assert notes["torch product"] == "keys @ queries"


def test_a_peer_is_not_slow_beside_a_wrong_one_nor_after_it_changed_its_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at_once(book: Book, query: torch.Tensor) -> object:
        answer = torch.zeros(len(query), dtype=torch.int64), None
        return lambda: answer

    def slowly(book: Book, query: torch.Tensor) -> object:
        call = PEERS[0].asks(book, query)
        return lambda: (time.sleep(0.02), call())[1]

    late = Peer("late", "fp32", "", slowly, changes=True)
    monkeypatch.setattr("benchmarks.peers.SLOW", 1e-9)
    monkeypatch.setattr("benchmarks.peers.FAR", 3.0)
    monkeypatch.setattr(operators, "PEERS", (Peer("wrong", "fp32", "", at_once), late))
    slow: dict[Peer, str] = {}
    operators.measure(small_case(2), 0.01, slow)
    assert list(slow) == []
    monkeypatch.setattr("benchmarks.peers.FEW", 2)
    for batch, timed in ((2, False), (3, True)):
        found = operators.measure(small_case(batch), 0.01, {late: "left out"})
        assert [row.counts for row in found if row.name == "late"] == [timed]
