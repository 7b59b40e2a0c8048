"""The parts on a GPU, rehearsed on a CPU, and what is made of their figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grace_kernels
from benchmarks import __main__ as command
from benchmarks import (
    goals,
    gpu,
    gpu_edits,
    gpu_forms,
    gpu_operators,
    gpu_pruned,
    gpu_tiles,
    page,
    pictures,
    suite,
    timing,
)
from benchmarks.gate import right_answers
from benchmarks.markdown import figure, times
from benchmarks.measurements import Measurement, Run, Settings, read, select
from benchmarks.peers import Book
from grace_kernels.triton import forms, tiles

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OURS = gpu.ours(CPU)[0]
FORMS = ("", ", exact-always", ", apart", ", apart, dependent", ", rows", ", apart, rows")
FORMS += (", warpgroups", ", warpgroups, apart, dependent")
FORMS += (", coordinates", ", coordinates, dependent")
TRITON = [gpu_tiles.NOW, gpu_tiles.BEFORE, gpu_tiles.APART]
ON_CUDA = Settings("cuda")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a rehearsal wrote."""
    out = tmp_path_factory.mktemp("rehearsed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "FEW", 2)
        arguments = ["--device", "rehearsal", "--threads", "1", "--out", str(out)]
        assert command.main([*arguments, "--commit", "abc"]) == 0
    return out


@pytest.fixture
def run(rehearsed: Path) -> Run:
    return read(rehearsed / "rehearsal.csv")


def test_a_rehearsal_writes_flat_files_that_say_what_they_are(rehearsed: Path, run: Run) -> None:
    assert sorted(path.name for path in rehearsed.iterdir()) == [
        f"rehearsal.{end}" for end in ("csv", "json", "md", "png", "svg")
    ]
    text = (rehearsed / "rehearsal.md").read_text()
    assert "## Rehearsal on a CPU of a run on a GPU: its times mean nothing\n" in text
    assert "![times by the size of the keys](rehearsal.png)" in text
    assert run.environment["commit"] == "abc"
    for path in rehearsed.iterdir():
        if path.suffix != ".png":
            assert str(ROOT) not in path.read_text()
            assert str(rehearsed) not in path.read_text()


def test_every_part_of_a_rehearsal_is_measured_and_ours_are_exact(run: Run) -> None:
    assert {one.device for one in run.measured} == {"rehearsal"}
    assert {one.part for one in run.measured} == {
        "ceilings",
        "forms",
        "lookup",
        "adapt_",
        "pruned",
        "edits",
    }
    mine = [one for one in run.measured if one.kind == "ours" and one.unit == "us"]
    assert {one.answers for one in mine} == {"exact"}
    for part, names in (
        ("lookup", {OURS}),
        ("adapt_", {OURS}),
        ("pruned", {OURS, f"{OURS}, sketch"}),
        ("forms", {*(f"cuda{of}" for of in FORMS), *TRITON}),
    ):
        found = {(one.name, one.cache) for one in mine if one.part == part}
        assert found == {(name, cache) for name in names for cache in ("cold", "warm", "eager")}
    cold = select(run.measured, part="lookup", cache="cold", kind="peer")
    assert {"cuBLAS keys @ query", "cuBLAS query @ keys", "cdist", "torch.compile"} <= {
        one.name for one in cold
    }
    assert all(one.p20 <= one.median <= one.p80 for one in [*mine, *cold])
    one, batch = select(run.measured, part="edits")
    assert (one.name, batch.name) == (gpu_edits.ONE_BY_ONE, gpu_edits.BATCH)
    for each in (one, batch):
        assert (each.unit, each.batch, each.answers) == ("edits/s", 8, "")
    assert min(one.median, batch.median) > 0
    operators = [int(each.note.split()[-4]) for each in (one, batch)]
    assert operators[1] < operators[0]


def test_edits_without_transformers_are_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(small: bool) -> None:
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr(gpu_edits, "model_of", fail)
    (found,) = gpu_edits.run(Settings("rehearsal"), lambda done, total: None)
    assert (found.answers, found.median) == ("absent", None)
    assert found.note == "No module named 'transformers'"


def test_the_page_has_times_shares_and_ratios_of_the_rehearsal(rehearsed: Path, run: Run) -> None:
    text = (rehearsed / "rehearsal.md").read_text()
    section = text[text.index("### Beside each peer") :]
    lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("|")]
    ours, peers = goals.on_a_gpu(run.measured)[0]
    mine, peer = ours[OURS], goals.best(goals.families(peers))
    line = dict(zip(lines[0], lines[2], strict=True))
    assert line["keys, width"] == f"{mine.keys:,} × {mine.width}"
    assert line[OURS] == figure(mine.median)
    assert line["best right peer"] == f"{times(peer.median / mine.median)} ({peer.name})"
    least = goals.roof(run.measured, mine)
    assert line["of the roof"] == f"{100 * least / mine.median:.0f} %"
    sketches = text[text.index("### Through a sketch") :]
    with_, without = goals.beside_sketches(run.measured)[0]
    told = f"| {figure(with_.median)} | {figure(without.median)} | "
    assert told + f"{with_.median / without.median:.3g} |" in sketches


def shelf(n: int = 200, dim: int = 40, batch: int = 4) -> tuple[Book, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    book = Book(torch.randn(n, dim, generator=generator), torch.full((n,), 3.0))
    return book, book.keys[3 : 3 + batch] + 0.01


def judged(call: Callable[[], Any], kind: str = "ours", **others: Any) -> list[Measurement]:
    book, query = shelf()
    right = right_answers(query, book.keys, book.radii)["lookup"]
    made = {"it": (kind, lambda: [call]), "fine": ("ours", lambda: [lambda: lookup(book, query)])}
    return list(gpu.measured({"part": "lookup"}, made, [right], CPU, **others))


def lookup(book: Book, query: torch.Tensor) -> Any:
    return grace_kernels.lookup(query, book.keys, book.radii)


def test_a_contestant_with_a_wrong_answer_is_timed_and_marked() -> None:
    def off() -> Any:
        index, distance = lookup(*shelf())
        index[1] += 1
        return index, distance

    found = judged(off, "peer")
    wrong = [one for one in found if one.name == "it"]
    assert {one.answers for one in wrong} == {"wrong"}
    assert {one.cache for one in wrong} == {"cold", "eager"}
    assert wrong[0].note == "1 of 4 indices wrong"
    assert {one.answers for one in found if one.name == "fine"} == {"exact"}
    assert command.failures(Run({}, found)) == []
    assert (
        command.failures(Run({}, judged(off)))
        == ["lookup it None x None, None: 1 of 4 indices wrong"] * 3
    )


def test_ours_with_a_bit_off_is_not_exact_and_fails_the_run() -> None:
    def off() -> Any:
        index, distance = lookup(*shelf())
        distance.view(torch.int32)[0] += 1
        return index, distance

    found = [one for one in judged(off) if one.name == "it"]
    assert {one.answers for one in found} == {"rounded"}
    assert len(command.failures(Run({}, found))) == 3
    assert command.failures(Run({}, judged(off, "peer"))) == []


def test_what_a_replay_does_not_write_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.Captured, "replay", lambda self: None)
    found = judged(lambda: lookup(*shelf()))
    assert {one.answers for one in found} == {"wrong"}
    assert found[0].note == "replayed: wrong 4 of 4 indices wrong"


def test_what_fails_does_not_stop_the_others_and_ours_must_not() -> None:
    def fails() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 41 GiB.\nSo")

    found = judged(fails, "peer")
    assert found[0].answers == "absent"
    assert found[0].note == "OutOfMemoryError: CUDA out of memory. Tried to allocate 41 GiB."
    assert [one.name for one in found] == ["it", *["fine"] * 3]
    silent = replace(found[0], kind="ours", name="cuda, sketch")
    assert len(command.failures(Run({}, [silent]))) == 1


def test_a_write_to_another_row_is_wrong() -> None:
    book, query = shelf()
    hidden, rows = torch.zeros(4, 40), torch.arange(4)
    values = torch.randn(200, 40)

    def call(spoilt: bool) -> Any:
        where = query, rows, rows, rows + 1
        got = grace_kernels.adapt_(hidden, *where, book.keys, book.radii, values)
        hidden[2, 5] += spoilt
        return got

    for spoilt, answers in ((False, "exact"), (True, "wrong")):
        found = judged(lambda s=spoilt: call(s), hidden=hidden, values=[values])
        assert {one.answers for one in found if one.name == "it"} == {answers}


def test_a_peer_that_writes_rows_writes_those_of_adapt() -> None:
    book, query = shelf()
    book.radii[4] = 0.0
    values = torch.randn(200, 7)
    hidden, rows = torch.randn(4, 7), torch.arange(4)
    expected = hidden.clone()
    where = query, rows, rows, rows + 1
    grace_kernels.adapt_(expected, *where, book.keys, book.radii, values)
    assert torch.equal(expected[1], hidden[1])
    assert not torch.equal(expected[0], hidden[0])
    gpu_operators.writing(lambda: lookup(book, query), values, hidden)
    assert torch.equal(hidden, expected)


def test_what_the_time_does_not_reach_is_named_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = Settings("rehearsal", until=time.monotonic() - 1)
    parts = gpu_operators.run, gpu_operators.more, gpu_pruned.run, gpu_edits.run
    found = [one for part in parts for one in part(late, lambda done, total: None)]
    absent = [one for one in found if one.kind == "ours"]
    assert len(absent) == 4 + 2 + 2 + 1
    assert {one.note for one in absent} == {"not run: the time was over"}
    assert command.failures(Run({}, found)) == []
    given = ["--device", "rehearsal", "--parts", "pruned", "--seconds", "-1"]
    assert command.main([*given, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("not run: 2\n")


def test_triton_is_timed_with_both_tiles_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, radii = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1)
    book, query = Book(keys.expand(100_000, 768), radii.expand(100_000)), keys.expand(8, 768)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_a_gpu = torch.device("cuda")
    timed = gpu_tiles.contestants([(book, query)], on_a_gpu)
    assert list(timed) == TRITON
    few = Book(book.keys[:1000], book.radii[:1000])
    assert list(gpu_tiles.contestants([(few, query)], on_a_gpu)) == [TRITON[0], TRITON[2]]
    other = Book(book.keys[:999], book.radii[:999])
    assert gpu_tiles.contestants([(other, query)], on_a_gpu) == {}
    asked = (9, 0), 2, 8, 100_000, 768
    now = tiles.choose(*asked)
    monkeypatch.setattr(tiles, "choose", tiles.choose)  # given back as it is
    gpu_tiles.use(gpu_tiles.BEFORE)
    assert tiles.choose(*asked) == tiles.choose((9, 0), 2, 8) != now
    gpu_tiles.use(gpu_tiles.APART)
    assert forms.apart()
    gpu_tiles.use(gpu_tiles.NOW)
    assert tiles.choose(*asked) == now
    assert not forms.apart()


def test_the_most_telling_shapes_come_first_and_none_is_lost() -> None:
    assert list(suite.ON_A_GPU) == ["ceilings", "forms", "operators", "pruned", "edits", "more"]
    first, others = gpu_operators.first_shapes(ON_CUDA), gpu_operators.other_shapes(ON_CUDA)
    assert {(s.part, s.dim, s.keys, s.batch) for s in first} == {
        ("lookup", dim, n, batch)
        for dim, n in ((768, 1000), (768, 10_000), (768, 100_000), (4096, 10_000), (4096, 100_000))
        for batch in (1, 8, 64, 512)
    }
    assert len({*first, *others}) == len(first) + len(others) == 92
    assert {s.dtype for s in others} == {torch.bfloat16, torch.float16, torch.float32}
    assert sum(s.compiled for s in others) == 28
    sketched = gpu_pruned.shapes(ON_CUDA)
    assert {(s.data, s.keys, s.dim, s.batch) for s in sketched} == {
        *((gpu_pruned.COVERED, 100_000, dim, batch) for dim in (768, 4096) for batch in (1, 8)),
        *(
            (gpu_pruned.SPECTRUM, n, dim, batch)
            for n in (100_000, 1_000_000)
            for dim in (768, 4096)
            for batch in (1, 8)
        ),
    }


def invented() -> list[Measurement]:
    """Return a run whose figures are round, not measured."""
    about = {"device": "cuda", "data": "isotropic", "dtype": "bf16", "keys": 100_000, "width": 1000}
    about |= {"part": "lookup", "batch": 1, "cache": "cold", "unit": "us"}

    def one(name: str, median: float, answers: str = "rounded", **others: Any) -> Measurement:
        kind = "ours" if name in ("triton", "cuda") else "peer"
        return Measurement(**about | others, name=name, kind=kind, answers=answers, median=median)

    top = {"part": "ceilings", "device": "cuda", "kind": "bound"}
    return [
        Measurement(**top, name="read", unit="GB/s", median=5000),
        Measurement(**top, name="copy", unit="GB/s", median=4000),
        Measurement(**top, name="product", dtype="bf16", unit="TFLOP/s", median=800),
        Measurement(**top, name="product", dtype="tf32", unit="TFLOP/s", median=400),
        one("triton", 100.0, "exact"),
        one("cuda", 62.5, "exact"),
        one("cuBLAS keys @ query", 30.0, "wrong", note="1 of 1 indices wrong"),
        one("cuBLAS query @ keys", 125.0),
        one("cdist", 625.0, note="distances off by up to 0.1 of themselves"),
        one("torch.compile", 250.0),
        one("cuda", 700.0, "exact", batch=512),
    ]


def test_roofs_shares_and_ratios_are_those_of_the_best_right_contestants() -> None:
    measured = invented()
    (ours, peers), (many, _) = goals.on_a_gpu(measured)
    mine = goals.best(ours)
    assert (mine.name, goals.best(peers).name) == ("cuda", "cuBLAS query @ keys")
    # 2e8 bytes of keys, 4e5 of radii and 2012 round the query, at 5e12 and 4e12 bytes a second.
    assert goals.roof(measured, mine) == pytest.approx((2e8 + 4e5 + 2012) / 5e6)
    assert goals.roof(measured, mine, "copy") == pytest.approx((2e8 + 4e5 + 2012) / 4e6)
    assert goals.roof(measured, many["cuda"]) == pytest.approx(1e6 * 2 * 512 * 1e8 / 8e14)
    written = replace(mine, part="adapt_")
    assert goals.roof(measured, written) == pytest.approx((2e8 + 4e5 + 6012) / 5e6)
    assert goals.roof(measured[4:], mine) is None
    about = {"gpu": "NVIDIA H200", "commit": "0123456789"}
    text = page.page([("nvidia-h200", Run(about, measured))])
    assert "## NVIDIA H200, commit 0123456\n" in text
    line = "| `lookup` | 100,000 × 1000 | 1 | bf16 | 100 | 62.5 | 125 | 625 ≈ | 250 | "
    assert line + "64 % | 80 % | 2.0 (cuBLAS query @ keys) | 10.0 |" in text
    assert "* cuBLAS keys @ query, bf16: indices wrong (100,000 × 1000" in text


def test_the_picture_of_a_gpu_shows_all_contestants_the_roof_and_what_is_wrong() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    assert pictures.times_on_a_gpu(figure, invented())
    (legend,) = figure.legends
    told = {text.get_text() for text in legend.get_texts()}
    assert told == {"triton", "cuda", "cuBLAS", "cdist", "torch.compile", "roof"}
    wrong = [replace(m, answers="wrong") if m.name == "cdist" else m for m in invented()]
    figure = Figure()
    assert pictures.times_on_a_gpu(figure, wrong)
    (line,) = [x for x in figure.axes[0].lines if x.get_label() == "wrong answers"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2e8], [625.0])
    assert not pictures.times_on_a_gpu(Figure(), [m for m in invented() if m.kind == "bound"])


def test_the_goals_of_a_gpu_are_judged() -> None:
    def reached(measured: list[Measurement], start: str) -> tuple[int, int]:
        (goal,) = [goal for goal in goals.goals(measured) if goal.text.startswith(start)]
        return goal.met, goal.total

    measured = invented()
    assert reached(measured, "20 to 250 MB") == (1, 1)
    slower = [replace(m, median=2 * m.median) if m.kind == "ours" else m for m in measured]
    assert reached(slower, "20 to 250 MB") == (0, 1)
    assert reached(measured, "keys up to 20 MB") == (0, 0)
    assert reached(measured, "at least 10 times cdist") == (1, 1)
    without = replace(measured[5], part="pruned", data="x")
    for ratio, usual, worst in ((0.5, 1, 1), (0.6, 0, 1), (1.2, 0, 0)):
        pair = [without, replace(without, name="cuda, sketch", median=62.5 * ratio)]
        pair += [replace(one, data="x, all cover") for one in pair]
        assert reached(pair, "sketch: at most 0.5") == (usual, 1)
        assert reached(pair, "sketch in the worst case") == (worst, 1)


def test_forms_leave_half_of_the_time_to_what_answers_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Settings] = []
    monkeypatch.setattr(gpu, "each", lambda shapes, settings, *_: told.append(settings) or ())
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    for until in (140.0, float("inf")):
        assert list(gpu_forms.run(replace(ON_CUDA, until=until), lambda done, total: None)) == []
    assert [settings.until for settings in told] == [120.0, float("inf")]


def test_a_device_that_is_lost_ends_the_run_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1 << 36}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(**figures))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "NVIDIA H200 (SXM)")
    smi = "580.1, 1980 MHz, 2619 MHz, 41, 92.20 W, P0"
    monkeypatch.setattr(suite, "_printed", lambda *told: smi if told[0] == "nvidia-smi" else "")

    def loses(settings: Settings, progress: Any) -> Any:
        yield Measurement("ceilings", "cuda", name="read", unit="GB/s", median=1.0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "ceilings", loses)
    kept: list[int] = []
    run = suite.run(
        ON_CUDA,
        ("ceilings", "pruned"),
        command.shown,
        "",
        commit="abc",
        keep=lambda run: kept.append(len(run.measured)),
    )
    assert (len(run.measured), kept) == (1, [1])
    kept.clear()
    monkeypatch.setattr(suite, "KEPT", -1.0)  # so that a process that is ended loses nothing
    suite.run(
        ON_CUDA, ("ceilings",), command.shown, "", keep=lambda run: kept.append(len(run.measured))
    )
    assert kept == [1, 1]
    about = run.environment
    assert about["failed"] == (
        "ceilings: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert (about["gpu"], about["capability"], about["commit"]) == (
        "NVIDIA H200 (SXM)",
        "9.0",
        "abc",
    )
    assert about["clocks as found"].startswith("clocks.sm 1980 MHz, clocks.mem 2619 MHz")
    assert about["driver"] == "580.1"
    assert suite.stem(run, ON_CUDA) == "nvidia-h200-sxm"
