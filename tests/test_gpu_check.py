"""gpu-check without a GPU: the machinery rehearsed on a CPU, its judgements on planted errors."""

from __future__ import annotations

import contextlib
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

from benchmarks.gpu_check import __main__ as command  # noqa: E402
from benchmarks.gpu_check import (  # noqa: E402
    bench,
    journal,
    peers,
    place,
    process,
    pruned,
    report,
)

import grace_kernels  # noqa: E402
from benchmarks import gpu, page, rows  # noqa: E402

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert called(patch, "--rehearse", "--quick", "--out", str(out)) == 0
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
    for kind in ("codebooks", "sketched codebooks"):
        compared = sum(
            row["result"]["problems"]
            for name, row in book.rows("correct").items()
            if name.startswith(kind)
        )
        assert compared == 40


def test_the_suite_turns_the_times_into_rows_that_name_the_rehearsal(rehearsed: Path) -> None:
    book = journal.Journal(rehearsed / "rows.jsonl")
    stem, run = gpu.as_run(book)
    assert stem == "rehearsal-cpu"
    assert {row.device for row in run.rows} == {"rehearsal"}
    ours = [r for r in run.rows if r.kind == "ours"]
    assert {(r.part, r.cache) for r in ours} >= {
        (part, cache) for part in ("lookup", "adapt_") for cache in ("cold", "warm", "eager")
    }
    assert {r.answers for r in ours} == {"exact"}
    assert {r.name for r in run.rows if r.part == "pruned"} >= {"cpu, sketch", "cpu"}
    shape = next(s for s in report.merged(book) if s["op"] == "lookup")
    column = {"keys": shape["N"], "width": shape["D"], "batch": shape["B"], "cache": "cold"}
    found = [r for r in run.rows if r.part == "lookup" and r.name == "cpu" and r.unit == "us"]
    (mine,) = [r for r in found if all(getattr(r, k) == v for k, v in column.items())]
    assert mine.median == pytest.approx(shape["columns"]["cpu"]["cold"]["us"], rel=1e-5)
    for name in set(peers.PACKAGES) - set(peers.installed()):
        (row,) = [r for r in run.rows if r.name == name]
        assert (row.answers, row.note) == ("absent", f"not installed: pip install {name}")


def test_the_page_of_the_times_has_the_ratios_of_ours_to_every_peer(rehearsed: Path) -> None:
    stem, run = gpu.as_run(journal.Journal(rehearsed / "rows.jsonl"))
    text = page.page([(stem, run)])
    section = text[text.index("### On the GPU, beside each peer") :]
    lines = [line[2:-2].split(" | ") for line in section.splitlines() if "|" in line]
    head = lines[0]
    mine = next(r for r in run.rows if (r.part, r.name, r.cache) == ("lookup", "cpu", "cold"))
    start = ["`lookup`", f"{mine.keys:,} × {mine.width}", str(mine.batch), mine.dtype, "cpu"]
    line = dict(zip(head[5:], next(x for x in lines if x[:5] == start)[5:], strict=True))
    found = rows.contestants(run.rows, mine, "peer")
    timed = {r.name: r.median / mine.median for r in found if r.dtype == mine.dtype}
    assert {"cdist", "torch.compile"} & set(timed)
    for name, ratio in timed.items():
        assert line[name] in (page.times(ratio), f"wrong ({page.times(ratio)})")
    (roof,) = [r for r in rows.contestants(run.rows, mine, "bound") if r.dtype == mine.dtype]
    assert line["of the roof"] == f"{100 * roof.median / mine.median:.0f} %"
    sketches = text[text.index("### On the GPU, through a sketch") :]
    mine = next(r for r in run.rows if (r.name, r.cache) == ("cpu, sketch", "warm"))
    other = next(r for r in run.rows if (r.name, r.cache) == ("cpu", "warm") and _same(r, mine))
    told = [mine.data, mine.name, page.figure(mine.median), page.times(other.median / mine.median)]
    assert " | ".join(told) + " |" in sketches


def _same(row: rows.Row, other: rows.Row) -> bool:
    return (rows.case(row), row.part, row.dtype) == (rows.case(other), other.part, other.dtype)


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
    shapes = [*bench.shapes(CPU), *pruned.shapes(CPU)]
    assert set(whole["rows"]["bench"]) == {"ceilings", *(s.name for s in shapes)}


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


def again_with(book: journal.Journal, run: int, **depends: Any) -> list[str]:
    """Return the rows that a run begins, where the second one fails."""
    began: list[str] = []

    def fails() -> dict[str, Any]:
        began.append("b")
        raise journal.Wrong("no")

    def fine() -> dict[str, Any]:
        began.append("a")
        return {}

    rows = [journal.Row("a", fine), journal.Row("b", fails)]
    status = journal.run_rows("stage", rows, book, run, lambda: 9.0, depends=depends)
    assert status == 0
    return began


def test_a_row_of_other_sources_or_other_backends_is_not_done(tmp_path: Path) -> None:
    book = journal.Journal(tmp_path / "rows.jsonl")
    runs = [("old", ["x"]), ("old", ["x"]), ("old", ["x", "y"]), ("new", ["x", "y"])]
    began = []
    for run, (sources, backends) in enumerate(runs, start=1):
        book.append(run=run, about={"sources": sources})
        began.append(again_with(book, run, sources=sources, backends=backends))
    assert began == [["a", "b"], ["b"], ["a", "b"], ["a", "b"]]
    assert book.rows("stage")["a"]["sources"] == "new"
    assert book.rows("stage")["a"]["backends"] == ["x", "y"]
    book.append(run=5, about={"sources": "newer"})
    assert book.rows("stage") == {}
    assert book.plan("stage") == []
    assert command.status(book, ["stage"]) == 1


def test_a_lost_context_ends_the_process_with_what_was_seen(tmp_path: Path) -> None:
    book = journal.Journal(tmp_path / "rows.jsonl")

    def lost() -> dict[str, Any]:
        raise journal.ContextLost("the capture failed", {"seen": 3})

    rows = [journal.Row("loses", lost), journal.Row("next", dict)]
    assert journal.run_rows("stage", rows, book, 1, lambda: 9.0) == journal.CONTEXT_LOST
    record = book.rows("stage")["loses"]
    assert (record["status"], record["result"]) == ("failed", {"seen": 3})
    assert journal.run_rows("stage", rows, book, 1, lambda: 9.0) == 0
    assert book.rows("stage")["next"]["status"] == "ok"


def test_the_digest_changes_with_every_source_a_row_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "ROOT", tmp_path)
    seen = {place.sources_digest()}
    names = ("setup.py", "csrc/cuda/a.cuh", "grace_kernels/a.py", "python/grace_edit/a.py")
    for name in (*names, "benchmarks/gpu_check/a.py", "tests/ops/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        seen.add(place.sources_digest())
    assert len(seen) == 7
    (tmp_path / "tests/ops/test_a.py").write_text("2")
    assert place.sources_digest() not in seen


def test_without_git_the_commit_and_what_changed_since_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, "_printed", lambda *told: "")
    about = place.environment(torch.device("cpu"))
    assert (about["commit"], about["changed since"]) == (None, None)
    said = {("git", "rev-parse", "HEAD"): "abc"}
    monkeypatch.setattr(place, "_printed", lambda *told: said.get(told, ""))
    about = place.environment(torch.device("cpu"))
    assert (about["commit"], about["changed since"]) == ("abc", False)


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

    def runs() -> bool:
        with contextlib.suppress(OSError):
            return state.read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    end = time.monotonic() + 5  # a busy machine takes a while to end what is killed
    while runs() and time.monotonic() < end:
        time.sleep(0.02)
    assert not runs()
    assert process.run([sys.executable, "-c", "print(7); exit(3)"], 20) == ("7\n", 3)


def h200(tmp_path: Path) -> journal.Journal:
    """Return the records of an invented run; the figures are round, not measured."""
    book = journal.Journal(tmp_path / "rows.jsonl")
    about = {"device": "NVIDIA H200", "rehearsal": False, "sources": "a", "commit": "b"}
    book.append(run=1, about=about, time="then")
    ceiling = {
        "copy bytes per second": 4e12,
        "read bytes per second": 5e12,
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
    # 2e8 bytes of keys, 4e5 of radii and 2012 around the query at 5e12 and 4e12 bytes per second.
    assert few["roof us"] == pytest.approx((2e8 + 4e5 + 2012) / 5e6)
    assert few["copy roof us"] == pytest.approx((2e8 + 4e5 + 2012) / 4e6)
    assert few["bound by"] == "memory"
    assert (few["best"], few["best peer"]) == ("cuda", "cuBLAS query @ keys")
    assert few["ratio"] == 2.0
    assert few["ratio to cdist"] == 10.0
    assert few["share"] == pytest.approx(few["roof us"] / 62.5)
    assert few["copy share"] == pytest.approx(few["copy roof us"] / 62.5)
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
    row = "| lookup bf16 | 1000 | 100000 | 1 | 100 | 62.5 | 125 | 250 | 625 ≈ | 40.08 | "
    assert row + "64 % | 80 % | 2 (cuBLAS query @ keys) | 10 |" in text
    assert "| lookup bf16 | 1000 | 100000 | 512 | – | out of memory | – | – | – |" in text
    assert "B=1, cuBLAS keys @ query: 1 of 1 indices wrong" in text
    assert "bench: not run within the budget: later" in text
    book.append(run=2, about={**book.runs()[0]["about"], "sources": "c"}, time="now")
    assert "runs are of different sources" not in text
    report.write(book, tmp_path, stages=("bench",))
    text = (tmp_path / "nvidia-h200-report.md").read_text()
    assert "runs are of different sources" in text
    assert "| lookup bf16 |" not in text  # those times are of other code


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
