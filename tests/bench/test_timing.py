"""The clock, the gate before it, and the peers on a CPU."""

from __future__ import annotations

import contextlib
import gc
from itertools import pairwise
from typing import Any

import pytest
import torch

import grace_kernels
from benchmarks import goals, measurements, operators, peers, timing
from benchmarks.gate import judged, judged_call, right_answers
from benchmarks.peers import ON_CPU, Book, Peer
from grace_kernels.testing import same_bits

CPU = torch.device("cpu")


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


def test_a_time_is_that_of_one_call_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    made = []

    def work() -> None:
        for _ in range(5):
            made.append(1)
            clock.sleep(2e-3)

    for way in (timing.by_the_host, timing.on_the_device):
        made.clear()
        took = way(work, 5, CPU, 0.1)
        assert (took.median, took.p20, took.p80) == pytest.approx((2e-3,) * 3)
        assert took.calls == len(made) // 5 - 1  # the first is not timed


class FakeCuda:
    """torch.cuda as far as a capture needs it; its end fails as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        self.current: list[Any] = []
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_stream", self.current.append)
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
def test_a_capture_collects_no_garbage_and_a_failed_one_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.fails = fails
    on: list[bool] = []

    def function() -> tuple[torch.Tensor, ...]:
        on.append(gc.isenabled())
        return (torch.ones(1),)

    assert gc.isenabled()
    told = pytest.raises(RuntimeError, match="previous error during capture")
    with told if fails else contextlib.nullcontext():
        timing.Captured(function, torch.device("cuda"), warm=2)
    assert on == [True, True, False]
    assert gc.isenabled()
    assert fake.current == [fake] * fails


def test_off_a_gpu_a_replay_writes_the_outputs_anew() -> None:
    x = torch.ones(3)
    captured = timing.Captured(lambda: (x * 2,), CPU)
    (out,) = captured.outputs
    x.fill_(4.0)
    captured.replay()
    assert out.tolist() == [8.0] * 3


def test_with_cold_caches_every_timed_call_comes_after_a_flush() -> None:
    order: list[str] = []
    timing.interleaved(
        {"call": lambda: order.append("call")}, 600, most=4, flush=lambda: order.append("flush")
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
    off = right[0], torch.tensor([1.0, 2.1])
    assert judged(off, right) == ("rounded", "distances off by up to 0.05 of themselves")
    assert judged((right[0], torch.tensor([1.0, float("nan")])), right)[0] == "wrong"
    miss = torch.tensor([4, -1]), torch.tensor([1.0, float("inf")])
    assert judged((miss[0], torch.tensor([1.0, 0.0])), miss)[0] == "wrong"
    assert judged((torch.tensor([4, 1]), right[1]), right) == ("wrong", "1 of 2 indices wrong")


def small_case(batch: int = 3) -> operators.Case:
    """Draw keys some 11 apart and queries 0.1 from one each: no rounding takes another for it.

    With 64 elements of about 1 a product in bfloat16 errs by 64 * 64 / 256 = 16 at the very worst,
    the squares are 0.01 and more than 49.
    """
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(200, 64, generator=generator).bfloat16()
    query = keys[torch.tensor([5, 9, 11])[:batch]].float() + 0.01
    query = query.bfloat16().float()
    book = Book(keys, torch.full((200,), 2.0), given=keys.float())
    return operators.Case("isotropic", book, query)


def test_every_peer_that_is_installed_finds_keys_that_rounding_cannot_confuse() -> None:
    case = small_case()
    right = right_answers(case.query, case.book.keys, case.book.radii)["nearest"]
    assert (right[1] < 0.2).all()
    asked = set()
    for peer in ON_CPU:
        if peer.name in ("torch.compile", "PyKeOps argmin"):
            continue  # they compile for seconds
        try:
            call = peer.asks(case.book, case.of(peer.dtype)[0])
        except ImportError:
            continue
        asked.add(peer.name)
        answers, note = judged(call(), right)
        assert answers in ("exact", "rounded"), (peer.name, peer.way)
        if peer.name == "torch product":  # which computes the distance again, in float64
            assert note == "", peer.way
    assert {"torch product", "torch.cdist"} <= asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_peers_on_a_gpu_answer_lookups(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "FEW", 1)  # beyond it torch.compile is another program
    case = small_case(batch)
    query = case.query.to(dtype)
    book = Book(case.book.keys.to(dtype), case.book.radii.clone())
    for reach in (2.0, 0.001):  # all hit; all miss
        book.radii.fill_(reach)
        right = right_answers(query, book.keys, book.radii)["lookup"]
        assert (right[0] >= 0).tolist() == [reach == 2.0] * batch
        for peer in (*peers.ON_GPU, peers.COMPILED):
            answers, note = judged(peer.asks(book, query)(), right)
            assert answers in ("exact", "rounded"), peer.name
            assert peer.name == "cdist" or note == ""


def test_a_peer_with_wrong_answers_is_timed_marked_and_not_called_beaten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(book: Book, query: torch.Tensor) -> object:
        return lambda: (torch.zeros(len(query), dtype=torch.int64), None)

    def missing(book: Book, query: torch.Tensor) -> object:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    product = next(peer for peer in ON_CPU if peer.way == "keys @ queries")
    planted = [Peer("first", "fp32", "first", first), Peer("gone", "fp32", "no-such", missing)]
    monkeypatch.setattr(operators, "ON_CPU", (*planted, product))
    found = operators.measure(small_case(), 0.01, {})
    by_name = {one.name: one for one in found if one.kind == "peer"}
    assert by_name["first"].answers == "wrong"
    assert by_name["first"].median is not None
    assert by_name["first"].note == "3 of 3 indices wrong"
    assert by_name["gone"].answers == "absent"
    assert by_name["gone"].note == "not installed: pip install no-such"
    for mine, peer in goals.ours_and_best(found, "nearest"):
        assert (mine.answers, peer.name) == ("exact", "torch product")
    mine = [one for one in found if one.kind == "ours"]
    assert {(one.part, one.dtype) for one in mine} == {
        (part, dtype) for part in measurements.OPERATORS for dtype in ("fp32", "bf16")
    }
    assert {one.answers for one in mine} == {"exact"}


def test_an_adapt_that_writes_another_row_is_wrong() -> None:
    case = small_case()
    right = right_answers(case.query, case.book.keys, case.book.radii)["lookup"]
    call, hidden = operators.ours(case)["adapt_", "fp32"]
    assert judged_call(call, right, hidden, case.book.wide) == ("exact", "")

    def spoilt() -> object:
        answer = call()
        hidden[1, 0] += 1
        return answer

    verdict = judged_call(spoilt, right, hidden, case.book.wide)
    assert verdict == ("wrong", "writes other rows")


def test_a_peer_far_slower_than_the_fastest_is_not_asked_for_more_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(operators, "time", clock)

    def slowly(book: Book, query: torch.Tensor) -> object:
        call = ON_CPU[0].asks(book, query)
        return lambda: (clock.sleep(0.2), call())[1]

    late = Peer("late", "fp32", "", slowly)
    monkeypatch.setattr("benchmarks.peers.SLOW", 1e-9)
    monkeypatch.setattr("benchmarks.peers.FAR", 3.0)
    monkeypatch.setattr(operators, "ON_CPU", (ON_CPU[0], late))
    slow: dict[Peer, str] = {}
    found = operators.measure(small_case(1), 0.01, slow)
    assert [one.name for one in found if one.kind == "peer" and one.counts] == [
        "torch product",
        "late",
    ]
    assert list(slow) == [late]
    again = operators.measure(small_case(3), 0.01, slow)
    notes = {one.name: one.note for one in again if one.kind == "peer"}
    assert notes["late"].startswith("left out: took 0.")
    assert notes["torch product"] == "keys @ queries"


def test_a_peer_is_not_slow_beside_a_wrong_one_nor_after_it_changed_its_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at_once(book: Book, query: torch.Tensor) -> object:
        answer = torch.zeros(len(query), dtype=torch.int64), None
        return lambda: answer

    clock = Clock()
    monkeypatch.setattr(operators, "time", clock)

    def slowly(book: Book, query: torch.Tensor) -> object:
        call = ON_CPU[0].asks(book, query)
        return lambda: (clock.sleep(0.02), call())[1]

    late = Peer("late", "fp32", "", slowly, changes=True)
    monkeypatch.setattr("benchmarks.peers.SLOW", 1e-9)
    monkeypatch.setattr("benchmarks.peers.FAR", 3.0)
    monkeypatch.setattr(operators, "ON_CPU", (Peer("wrong", "fp32", "", at_once), late))
    slow: dict[Peer, str] = {}
    operators.measure(small_case(2), 0.01, slow)
    assert list(slow) == []
    monkeypatch.setattr("benchmarks.peers.FEW", 2)
    for batch, timed in ((2, False), (3, True)):
        found = operators.measure(small_case(batch), 0.01, {late: "left out"})
        assert [one.counts for one in found if one.name == "late"] == [timed]
