"""gpu-check without a GPU: the machinery rehearsed on a CPU, its judgements on planted errors."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grace_kernels  # noqa: E402
from benchmarks.gpu_check import __main__ as command  # noqa: E402
from benchmarks.gpu_check import (  # noqa: E402
    bench,
    correct,
    graphs,
    journal,
    nodes,
    peers,
    place,
    problems,
    process,
    report,
    special,
    warm,
)

CPU = place.Place(torch.device("cpu"))
DEVICES = ("nvidia", "h200", "h100", "a100", "geforce", "cuda")


def gpu_check(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsed")
    done = gpu_check("--rehearse", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_a_rehearsal_writes_at_most_eight_flat_files_none_with_a_gpus_name(rehearsed: Path) -> None:
    files = sorted(path.name for path in rehearsed.iterdir())
    assert files == [
        "log.txt",
        "rehearsal-bench.csv",
        "rehearsal-bench.png",
        "rehearsal-gpu-check.json",
        "rehearsal-report.md",
        "rows.jsonl",
    ]
    assert not any(device in name for name in files for device in DEVICES)


def test_a_rehearsal_says_in_its_title_that_it_is_one(rehearsed: Path) -> None:
    text = (rehearsed / "rehearsal-report.md").read_text()
    assert text.startswith("# Rehearsal of gpu-check on CPU: its times mean nothing\n")
    assert "Nothing below was run on a GPU." in text
    assert "![times by the size of the keys](rehearsal-bench.png)" in text


def test_every_row_of_a_rehearsal_ends_well_and_every_codebook_is_right(rehearsed: Path) -> None:
    book = journal.Journal(rehearsed / "rows.jsonl")
    for stage in ("build", "correct", "graphs", "bench"):
        rows = book.rows(stage)
        assert list(rows) == book.plan(stage)
        assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    compared = sum(
        row["result"]["problems"]
        for name, row in book.rows("correct").items()
        if name.startswith("codebooks")
    )
    assert compared == 40


def test_csv_and_json_hold_every_column_with_its_times(rehearsed: Path) -> None:
    with (rehearsed / "rehearsal-bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    ours = "cpu" if grace_kernels.build_info()["cpu"]["available"] else "reference"
    columns = {ours, *peers.PEERS}
    assert Counter(line["column"] for line in lines) == {
        **dict.fromkeys(columns, 5),
        "torch.compile": 1,
    }
    assert all(float(line["cold p20"]) <= float(line["cold us"]) for line in lines)
    assert all(float(line["cold us"]) <= float(line["cold p80"]) for line in lines)
    whole = json.loads((rehearsed / "rehearsal-gpu-check.json").read_text())
    assert whole["runs"][0]["about"]["torch"] == torch.__version__
    assert set(whole["rows"]["bench"]) == {"ceilings", *(s.name for s in bench.shapes(CPU))}


def test_the_picture_is_a_picture(rehearsed: Path) -> None:
    from matplotlib import image

    pixels = image.imread(rehearsed / "rehearsal-bench.png")
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.02


def test_no_result_names_a_folder_of_the_machine(rehearsed: Path) -> None:
    for path in rehearsed.glob("rehearsal-*"):
        if path.suffix != ".png":
            text = path.read_text()
            assert str(ROOT) not in text
            assert str(rehearsed) not in text


def test_a_second_run_does_only_what_is_missing(rehearsed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(rehearsed, out)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    missing = [s.name for s in bench.shapes(CPU)][-3:-1]
    kept = [line for line in lines if not any(f'"row": "{name}"' in line for name in missing)]
    (out / "rows.jsonl").write_text("".join(kept) + '{"run": 1, "stage": "bench", "row": "cu')
    done = gpu_check("--rehearse", "--quick", "--out", str(out), "--stages", "bench")
    assert done.returncode == 0, done.stderr
    book = journal.Journal(out / "rows.jsonl")
    assert len(book.runs()) == 2  # the half line that a kill left has not spoiled the next
    again = [name for name, row in book.rows("bench").items() if row["run"] == 2]
    assert again == ["ceilings", *missing]  # the roof is measured in every run
    assert {row["status"] for row in book.rows("bench").values()} == {"ok"}


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process, as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    return command.main()


def test_without_a_gpu_it_says_so_in_a_line_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "--out", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert told == "gpu-check needs a GPU, got none; --rehearse runs it on a CPU\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_with_runs_of_another_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"device": "NVIDIA H200", "rehearsal": False}
    journal.Journal(tmp_path / "rows.jsonl").append(run=1, about=about)
    assert called(monkeypatch, "--rehearse", "--out", str(tmp_path)) == 2
    told = capsys.readouterr().err
    assert told == "--out must hold runs of this device (CPU), got those of NVIDIA H200\n"


PROGRAM = """
import os, sys, time
from benchmarks.gpu_check.journal import CutOff, Journal, Row, Skipped, Wrong, run_rows

broken = []

def settle():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def lose():
    broken.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def late():
    broken.append(1)
    return {"answer": 1}

def wrong():
    raise Wrong("2 of 3", {"seen": 3})

def skip():
    raise Skipped("no tool")

def fine():
    return {"answer": 42}

rows = [
    Row("fine", fine),
    Row("aborts", os.abort),
    Row("hangs", lambda: time.sleep(60), limit=0.5),
    Row("wrong", wrong),
    Row("skips", skip),
    Row("loses its context", lose),
    Row("loses it after the fact", late),
    Row("raises", lambda: 1 / 0),
    Row("fine too", fine),
]
end = time.monotonic() + float(sys.argv[3])
left = lambda: end - time.monotonic()
sys.exit(run_rows("stage", rows, Journal(sys.argv[1]), int(sys.argv[2]), left, settle=settle))
"""


def supervised(tmp_path: Path, program: str, run: int, seconds: float) -> journal.Journal:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program).replace("Journal(sys.argv[1])", "book"))
    source = script.read_text().replace(
        "rows = [", "from pathlib import Path\nbook = Journal(Path(sys.argv[1]))\nrows = [", 1
    )
    script.write_text(source)
    book = journal.Journal(tmp_path / "rows.jsonl")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program_of_stage = [sys.executable, str(script), str(book.path), str(run)]
    end = time.monotonic() + seconds
    journal.supervise(program_of_stage, book, "stage", run, end, tmp_path / "log.txt", environment)
    return book


def test_a_row_that_takes_its_process_down_does_not_stop_the_rows_behind_it(
    tmp_path: Path,
) -> None:
    rows = supervised(tmp_path, PROGRAM, 1, 60).rows("stage")
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine": "ok",
        "aborts": "crashed",
        "hangs": "hung",
        "wrong": "failed",
        "skips": "skipped",
        "loses its context": "failed",
        "loses it after the fact": "failed",
        "raises": "failed",
        "fine too": "ok",
    }
    assert rows["fine"]["result"] == {"answer": 42}
    assert "status -6" in rows["aborts"]["error"]
    assert rows["hangs"]["error"] == "no end within 0.5 s"
    assert rows["wrong"]["result"] == {"seen": 3}
    assert rows["skips"]["error"] == "no tool"
    assert "illegal memory access" in rows["loses it after the fact"]["error"]
    assert "ZeroDivisionError" in rows["raises"]["error"]

    again = supervised(tmp_path, PROGRAM, 2, 60).rows("stage")
    ran = [name for name, row in again.items() if row["run"] == 2]
    assert sorted(ran) == sorted(set(rows) - {"fine", "skips", "fine too"})


def test_a_budget_that_ends_kills_the_row_and_leaves_the_rest_not_run(tmp_path: Path) -> None:
    program = PROGRAM.replace("limit=0.5", "limit=50").replace("os.abort", "fine")
    start = time.monotonic()
    book = supervised(tmp_path, program, 1, 2.5)
    assert time.monotonic() - start < 10
    rows = book.rows("stage")
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine": "ok",
        "aborts": "ok",
        "hangs": "cut off",
    }
    states = report._states(book, "stage")
    assert [name for name, state in states.items() if state == "not run"] == [
        "wrong",
        "skips",
        "loses its context",
        "loses it after the fact",
        "raises",
        "fine too",
    ]
    told = "\n".join(report._notable("stage", states, rows))
    assert "stage: hangs: cut off: the budget of the stage ended while it ran" in told
    assert "not run within the budget: wrong; skips; loses its context" in told


def test_a_process_that_dies_before_its_first_row_is_recorded(tmp_path: Path) -> None:
    book = supervised(tmp_path, "raise SystemError('no such library')\nrows = [", 1, 30)
    row = book.rows("stage")[journal.THE_STAGE]
    assert row["status"] == "crashed"


def test_a_program_and_what_it_started_end_at_the_limit(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    inner = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    held = [sys.executable, "-c", inner]
    outer = f"import subprocess; print('on', flush=True); subprocess.run({held!r})"
    start = time.monotonic()
    text, status = process.run([sys.executable, "-c", outer], 1.5)
    assert time.monotonic() - start < 10
    assert (text, status) == ("on\n", None)
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert process.run([sys.executable, "-c", "print(7); exit(3)"], 20) == ("7\n", 3)


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


def h200(tmp_path: Path) -> journal.Journal:
    """Return the records of an invented run; the figures are round, not measured."""
    book = journal.Journal(tmp_path / "rows.jsonl")
    about = {"device": "NVIDIA H200", "rehearsal": False, "sources": "a", "commit": "b"}
    book.append(run=1, about=about, time="then")
    ceiling = {
        "copy bytes per second": 4e12,
        "bf16 operations per second": 8e14,
        "fp32 operations per second": 5e13,
        "tf32 operations per second": 4e14,
        "kernel in a graph us": 1.0,
    }
    common = {"op": "lookup", "dtype": "bf16", "D": 1000, "N": 100_000, "key bytes": 2 * 10**8}

    def column(us: float, verdict: str = "right") -> dict[str, Any]:
        times = {"us": us, "p20": us - 1, "p80": us + 1, "runs": 9}
        return {"verdict": verdict, "cold": times, "eager": times}

    few = {
        "triton": column(100.0),
        "cuda": column(62.5),
        "cuBLAS keys @ query": column(30.0, "1 of 1 indices wrong"),
        "cuBLAS query @ keys": column(125.0),
        "cdist": column(625.0, "right indices, distances off by up to 0.1"),
    }
    plan = ["ceilings", "few", "torch.compile few", "many", "later"]
    book.append(run=1, stage="bench", plan=plan)
    for name, result in (
        ("ceilings", ceiling),
        ("few", {**common, "B": 1, "columns": few}),
        ("torch.compile few", {**common, "B": 1, "columns": {"torch.compile": column(250.0)}}),
        ("many", {**common, "B": 512, "columns": {"cuda": {"error": f"out of memory: {ROOT}/x"}}}),
    ):
        status = "failed" if name == "many" else "ok"
        book.append(run=1, stage="bench", row=name, status=status, result=result, seconds=1)
    return book


def test_shares_and_ratios_are_those_of_the_best_right_columns(tmp_path: Path) -> None:
    few, many = report.merged(h200(tmp_path))
    # 2e8 bytes of keys, 4e5 of radii and 2012 around the query at 4e12 bytes per second.
    assert few["roof us"] == pytest.approx((2e8 + 4e5 + 2012) / 4e6)
    assert few["bound by"] == "memory"
    assert (few["best"], few["best peer"]) == ("cuda", "cuBLAS query @ keys")
    assert few["ratio"] == 2.0
    assert few["ratio to cdist"] == 10.0
    assert few["share"] == pytest.approx(few["roof us"] / 62.5)
    assert many["roof us"] == pytest.approx(1e6 * 2 * 512 * 1e8 / 8e14)
    assert many["bound by"] == "arithmetic"
    assert "share" not in many


def test_the_files_of_a_gpu_carry_its_name_and_mark_what_is_wrong(tmp_path: Path) -> None:
    book = h200(tmp_path)
    names = report.write(book, tmp_path, stages=("bench",))
    assert names == [
        "nvidia-h200-gpu-check.json",
        "nvidia-h200-bench.csv",
        "nvidia-h200-report.md",
        "nvidia-h200-bench.png",
    ]
    assert not any(str(ROOT) in (tmp_path / name).read_text() for name in names[:3])
    text = (tmp_path / "nvidia-h200-report.md").read_text()
    assert text.startswith("# gpu-check on NVIDIA H200\n")
    row = "| lookup bf16 | 1000 | 100000 | 1 | 100 | 62.5 | 125 | 250 | 625 ≈ | 50.1 | 80 % | "
    assert row + "2 (cuBLAS query @ keys) | 10 |" in text
    assert "| lookup bf16 | 1000 | 100000 | 512 | – | out of memory | – | – | – |" in text
    assert "B=1, cuBLAS keys @ query: 1 of 1 indices wrong" in text
    assert "bench: not run within the budget: later" in text
    book.append(run=2, about={**book.runs()[0]["about"], "sources": "c"}, time="now")
    report.write(book, tmp_path, stages=("bench",))
    assert "runs are of different sources" in (tmp_path / "nvidia-h200-report.md").read_text()


def test_what_fails_and_what_is_not_reached_shows_in_the_exit_status(tmp_path: Path) -> None:
    book = journal.Journal(tmp_path / "rows.jsonl")
    assert command.status(book, ["graphs"]) == 1
    for stage in ("graphs", "bench"):
        book.append(run=1, stage=stage, plan=["a", "b"])
        book.append(run=1, stage=stage, row="a", status="ok")
    assert command.status(book, ["bench"]) == 0  # times that were not taken are no error
    assert command.status(book, ["graphs"]) == 1
    book.append(run=1, stage="graphs", row="b", status="skipped")
    assert command.status(book, ["graphs", "bench"]) == 0
    book.append(run=1, stage="bench", row="b", status="failed")
    assert command.status(book, ["graphs"]) == 0
    assert command.status(book, ["graphs", "bench"]) == 1


def test_nodes_of_a_drawn_graph_are_counted_by_kind() -> None:
    drawing = """digraph dot {
    subgraph cluster_1 {
    label="graph_1" graph[style="dashed"];
"graph_1_node_0"[style="solid" shape="rectangle" label="0
MEMCPY DtoD 32 bytes
"];

"graph_1_node_1"[style="bold" shape="octagon" label="1
lookup_kernel<float>\\<\\<\\<264, 128, 0\\>\\>\\>
"];

"graph_1_node_0" -> "graph_1_node_1";
}
}
"""
    drawing = "\n".join(line.strip() for line in drawing.splitlines())
    assert nodes.of_drawing(drawing) == {"memcpy": 1, "kernel": 1}
