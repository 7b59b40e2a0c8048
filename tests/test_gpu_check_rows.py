"""What the rows of gpu-check judge, tried without a GPU on planted errors."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_check import (
    bench,
    correct,
    graphs,
    journal,
    peers,
    place,
    problems,
    sanitizer,
    served,
    special,
    warm,
)

import grace_kernels

CPU = place.Place(torch.device("cpu"))
GPU = place.Place(torch.device("cuda"))  # as far as that goes without one


def test_a_wrong_bit_of_a_backend_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.random_problem(0, 7)
    backend = CPU.backends[0]
    assert problems.compare(CPU, problem, (backend,)) == {backend: []}
    plain = problems.answers

    def spoiled(part: str) -> Any:
        def answers(problem: Any, backend: Any) -> Any:
            got = plain(problem, backend)
            if backend == CPU.truth:
                return got
            if part == "distance":
                got.nearest[1].view(torch.int32)[0] += 1
            elif part == "index":
                got.lookup[0][0] += 1
            elif part == "guard":
                got.around.view(-1)[-1] += 1
            else:
                problem.keys[0, 0] += 1
            return got

        return answers

    monkeypatch.setattr(place.Place, "backends", ("cpu",))
    expected = {
        "distance": "nearest distance: 1 differ",
        "index": "lookup index: 1 differ",
        "guard": "written rows: 1 differ",
        "key": "keys was written to",
    }
    for part, told in expected.items():
        monkeypatch.setattr(problems, "answers", spoiled(part))
        found = problems.compare(CPU, problem, ("cpu",))["cpu"]
        assert len(found) == 1
        assert told in found[0]
    with pytest.raises(journal.Wrong, match="codebook 7 of seed 0") as wrong:
        correct._random(CPU, 7, 1)
    assert wrong.value.result["wrong, cpu"] == 1


def test_what_a_backend_does_not_write_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with problems.poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_random_codebooks_cover_the_kinds_and_are_the_same_wherever_made() -> None:
    made = [problems.random_problem(0, number) for number in range(200)]
    again = problems.random_problem(0, 123)
    for name in ("query", "keys", "radii", "values", "query_row"):
        one, other = getattr(made[123], name), getattr(again, name)
        assert problems.testing.same_bits(one, other)
        assert one.stride() == other.stride()
    assert {p.keys.dtype for p in made} == set(problems.DTYPES)
    assert {p.values.dtype for p in made} == set(problems.VALUE_DTYPES)
    hits = [bool((problems.answers(p, "cpu").lookup[0] >= 0).any()) for p in made[:60]]
    assert any(hits)
    assert not all(hits)
    for holds in (
        lambda p: p.keys.stride(0) > p.keys.shape[1] + 1,
        lambda p: p.hidden.numel() > 0 and p.hidden.stride(-1) != 1,
        lambda p: p.count is not None and 0 < int(p.count) < len(p.keys),
        lambda p: (p.radii == -torch.inf).any(),
        lambda p: p.radii.isnan().any(),
        lambda p: p.query.isnan().any(),
        lambda p: len(p.keys) == 0,
        lambda p: len(p.query) == 0,
        lambda p: len(p.keys) > 1000,
        lambda p: (p.query_row < 0).any(),
    ):
        assert sum(bool(holds(p)) for p in made) >= 3


def test_every_codebook_has_a_form_that_triton_has_compiled_before() -> None:
    forms = {warm.form(problem) for problem in warm.problems()}
    drawn = [problems.random_problem(4, n, large=n % 2 == 0) for n in range(150)]
    asking = [problem for problem in drawn if len(problem.query)]
    assert {warm.form(problem) for problem in asking} <= forms
    assert len(forms) < 130  # each takes seconds
    one, other = (special.plain_problem(torch.float32, 9, dim, 3, 16) for dim in (64, 72))
    assert warm.form(one) != warm.form(other)


def test_copies_for_a_device_keep_strides_offset_and_every_bit() -> None:
    wide = torch.arange(60.0).view(6, 10)
    part = wide[1:5:2, 3:8]
    copy = problems.moved(part, torch.device("cpu"))
    assert (copy.stride(), copy.storage_offset()) == (part.stride(), part.storage_offset())
    assert torch.equal(copy, part)
    copy += 1
    assert wide[1, 3] == 13


def test_a_graph_that_does_not_see_an_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CPU.backends[0]
    assert graphs._edits(CPU, backend)["hits"] > 20
    monkeypatch.setattr(place.Captured, "replay", lambda self: None)
    with pytest.raises(journal.Wrong, match=r"after edit 0 .* the index is stale"):
        graphs._edits(CPU, backend)


def test_a_replay_with_other_bits_or_a_missing_one_is_found() -> None:
    watched = graphs.Watched(CPU, CPU.backends[0], seed=3)
    assert watched.hits > 0
    for _ in range(20):
        watched.replay()
    watched.verdict(20)
    with pytest.raises(journal.Wrong, match="21 replays must have run, 20 did"):
        watched.verdict(21)
    watched.distances.view(torch.int32)[5, 3] += 1  # input 5 comes once more in the next ten
    for _ in range(10):
        watched.replay()
    with pytest.raises(journal.Wrong, match="1 of 30 replays gave other bits"):
        watched.verdict(30)


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("name", [*peers.PEERS, "torch.compile"])
def test_peers_give_the_right_answer_in_both_dtypes(name: str, batch: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shape = bench.Shape("lookup", dtype, 40, 300, batch)
        shelf = bench.with_queries(bench.Stock(CPU).shelves_for(shape)[0], batch, 5)
        shelf.radii.fill_(torch.inf)
        if name != "cdist":  # which is not told of dead entries
            dead = int(bench.right_answer(shelf)[0].max())
            shelf.radii[dead] = -torch.inf
            shelf.norms[dead] = torch.inf
        right = grace_kernels.lookup(shelf.query, shelf.keys, shelf.radii)
        assert bench.verdict(bench.right_answer(shelf), right, exact=True) == "right"
        peer = peers.PEERS.get(name) or peers.compiled(batch, "eager")
        assert bench.verdict(peer(shelf), right, exact=False).startswith("right")


def test_a_peer_that_writes_rows_writes_those_of_adapt() -> None:
    shape = bench.Shape("adapt_", torch.float32, 40, 300, 8)
    shelf = bench.with_queries(bench.Stock(CPU).shelves_for(shape)[0], 8, 5)
    hidden, rows = torch.randn(8, 40), torch.arange(8)
    expected = hidden.clone()
    book = (shelf.keys, shelf.radii, shelf.values)
    grace_kernels.adapt_(expected, shelf.query, rows, rows, rows + 1, *book)
    assert not torch.equal(expected, hidden)
    peers.writing(peers.keys_query, hidden, rows)(shelf)
    assert torch.equal(hidden, expected)


def test_a_wrong_column_is_told_and_ours_is_not_timed_where_it_is_wrong() -> None:
    shape = bench.Shape("lookup", torch.float32, 40, 300, 4)
    shelves = [bench.with_queries(s, 4, 5) for s in bench.Stock(CPU).shelves_for(shape)[:1]]
    right = [bench.right_answer(shelves[0])]

    def off(shelf: peers.Shelf) -> tuple:
        index, distance = peers.keys_query(shelf)
        index[1] += 1
        return index, distance

    column = bench._column(CPU, off, False, shelves, right)
    assert column["verdict"] == "1 of 4 indices wrong"
    assert column["cold"]["us"] > 0
    column = bench._column(CPU, off, True, shelves, right)
    assert column == {"verdict": "1 of 4 indices wrong"}

    def rounded(shelf: peers.Shelf) -> tuple:
        index, distance = peers.keys_query(shelf)
        return index, distance * (1 + 2e-7)

    assert bench._column(CPU, rounded, False, shelves, right)["verdict"] == "right"
    told = bench._column(CPU, rounded, True, shelves, right)["verdict"]
    assert told == "distances differ in bits"


def test_a_backend_that_does_not_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.Place, "backends", (*CPU.backends, "cuda"))
    with pytest.raises(journal.Wrong, match="cuda must answer here") as wrong:
        correct._random(CPU, 7, 2)
    assert type(wrong.value) is journal.Wrong
    assert wrong.value.result["problems"] == 2
    with pytest.raises(journal.Wrong, match="cuda must answer here"):
        graphs._edits(CPU, "cuda")
    with pytest.raises(journal.Wrong, match="cuda: must answer here") as wrong:
        bench.measure(CPU, bench.Stock(CPU), bench.Shape("lookup", torch.float32, 40, 300, 1))
    assert wrong.value.result["columns"][CPU.backends[0]]["verdict"] == "right"
    assert CPU.available == CPU.backends[:1]


def test_codebooks_stop_before_their_row_counts_as_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "COMPARING", 1e-9)
    with pytest.raises(journal.CutOff, match="after 0 of 3"):
        correct._random(CPU, 7, 3)


def test_the_bulk_of_the_codebooks_comes_behind_everything_else() -> None:
    names = [row.name for row in correct.rows(GPU, Path("log.txt"))]
    kinds = ("codebooks", "sketched codebooks")
    for kind in kinds:
        assert sum(name.startswith(kind) for name in names) == 20
    early = names.index("codebooks 500 to 999")
    assert max(n for n, name in enumerate(names) if name.startswith("regimes")) < early
    assert early < names.index("operator tests") < names.index("compute-sanitizer works")
    bulk = names.index("codebooks 1000 to 1499")
    assert names.index("racecheck, cuda") < bulk
    assert all(name.startswith(kinds) for name in names[bulk:])
    assert names.index("sketched codebooks 500 to 999") < names.index("operator tests")


def test_a_sanitizer_that_the_budget_ends_is_cut_off_and_not_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda: "tool")
    monkeypatch.setattr(sanitizer, "run", lambda *told: ("", None))
    book = journal.Journal(tmp_path / "rows.jsonl")
    log = tmp_path / "log.txt"

    def both(left: float) -> list[type]:
        there = place.Place(GPU.device, deadline=time.monotonic() + left)
        found = []
        for call in (
            lambda: correct._sanitizer_works(there),
            lambda: correct._sanitized(there, log, "memcheck", "cuda"),
        ):
            with pytest.raises((journal.Wrong, journal.Skipped)) as caught:
                call()
            found.append(caught.type)
        return found

    cut, wrong = journal.CutOff, journal.Wrong
    assert both(500) == [wrong, cut]  # the trial has not been made
    for status, second in (("cut off", cut), ("ok", wrong), ("skipped", journal.Skipped)):
        book.append(run=1, stage="correct", row="compute-sanitizer works", status=status)
        assert both(500) == [wrong, second]
    book.append(run=1, stage="correct", row="compute-sanitizer works", status="ok")
    assert both(100) == [wrong, cut]
    assert both(60) == [cut, cut]
    monkeypatch.setattr(sanitizer, "run", lambda *told: ("ERROR SUMMARY: 0 errors", 0))
    assert both(20) == [cut, cut]  # not begun, or the first would be right


def test_an_error_says_its_words_in_any_case_of_letters() -> None:
    def raises(text: str) -> Any:
        def call() -> None:
            raise RuntimeError(text)

        return call

    words = ("out of memory",)
    for text in ("CUDA out of memory. Tried", "lookup failed (Out Of Memory?)"):
        assert special._expect_error(RuntimeError, words, raises(text)) == text
    with pytest.raises(journal.Wrong, match="must say out of memory"):
        special._expect_error(RuntimeError, words, raises("illegal memory access"))


class FakeCapture:
    """torch.cuda as far as a capture needs it; its end fails as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def wait_stream(self, other: Any) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Any:
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_collects_no_garbage_and_a_failed_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    fake = FakeCapture(monkeypatch)
    fake.fails = fails
    on: list[bool] = []

    def function() -> tuple[torch.Tensor, ...]:
        on.append(gc.isenabled())
        return (torch.ones(1),)

    assert gc.isenabled()
    lost = pytest.raises(journal.ContextLost, match="previous error during capture")
    with lost if fails else contextlib.nullcontext():
        place.Captured(GPU, function, warm=2)
    assert on == [True, True, False]
    assert gc.isenabled()


def test_a_lost_context_keeps_the_columns_timed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    column, seen = bench._column, []

    def losing(*told: Any) -> dict[str, Any]:
        seen.append(1)
        if len(seen) == 2:
            raise journal.ContextLost("the capture failed")
        return column(*told)

    monkeypatch.setattr(bench, "_column", losing)
    with pytest.raises(journal.ContextLost, match="the capture failed") as lost:
        bench.measure(CPU, bench.Stock(CPU), bench.Shape("lookup", torch.float32, 40, 300, 1))
    first, second = lost.value.result["columns"].values()
    assert first["cold"]["us"] > 0
    assert second == {"error": "the capture failed"}
    assert len(seen) == 2


def test_captures_that_cannot_be_counted_are_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    with served._recordings() as found:
        with contextlib.suppress(Exception):
            trees.CUDAGraphTreeManager.record_function(None)
    assert found == [1]
    monkeypatch.delattr(trees.CUDAGraphTreeManager, "record_function")
    with pytest.raises(journal.Skipped, match="record_function"), served._recordings():
        pass
