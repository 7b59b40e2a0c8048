"""gpu-check without a GPU: what it makes of a record; what `--gpu` and `--until` do to pytest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, suite

ROOT = Path(__file__).parents[2]
RECORD = """<?xml version="1.0"?><testsuites><testsuite>
<testcase name="test_a[1]" /><testcase name="test_a[2]" />
<testcase name="test_b"><skipped type="pytest.skip" message="there is no tool" /></testcase>
{}
</testsuite></testsuites>"""
FAILED = '<testcase name="test_c[3]"><failure message="assert 1 == 2" /></testcase>'
LATE = """<testcase name="test_d[1]"><skipped message="not run: the time was over" /></testcase>
<testcase name="test_d[2]"><skipped message="not run: the time was over" /></testcase>"""


@pytest.mark.parametrize(
    ("cases", "status", "good", "told"),
    [
        ("", 0, (True, True), ["tests, cuda: 2 passed, 1 skipped"]),
        ("", 1, (False, False), ["tests, cuda: 2 passed, 1 skipped"]),
        (
            FAILED,
            1,
            (False, False),
            ["tests, cuda: 2 passed, 1 skipped, 1 failure", "failure: test_c[3]"],
        ),
        (
            LATE,
            0,
            (False, True),
            ["tests, cuda: 2 passed, 1 skipped, 2 not run", "not run: test_d (2)"],
        ),
    ],
)
def test_what_failed_and_what_was_not_run_is_told_and_is_not_good(
    cases: str,
    status: int,
    good: tuple[bool, bool],
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ran(command: list[str], log: Path, seconds: float, **variables: str) -> int:
        assert command[:2] == ["-m", "pytest"]
        assert command[command.index("--gpu") + 1] == "--only=cuda"
        (record,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml")]
        Path(record).write_text(RECORD.format(cases))
        return status

    monkeypatch.setattr(gpu_check, "run", ran)
    log = tmp_path / "a-tests.txt"
    assert gpu_check.test("cuda", ["--only=cuda"], log, 9, rehearse=False) == good
    assert capsys.readouterr().out.split("\n")[:-1] == [*told, *[""] * (len(told) == 1)]


def test_of_the_last_tests_those_there_was_no_time_for_are_told_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "a-tests.txt"

    def ran(*told: Any, **variables: str) -> int:
        log.with_suffix(".xml").write_text(RECORD.format(LATE))
        return 0

    monkeypatch.setattr(gpu_check, "run", ran)
    assert gpu_check.test("triton", [], log, 9, rehearse=False) == (False, True)
    assert gpu_check.test(gpu_check.LAST[0], [], log, 9, rehearse=False) == (True, True)
    assert capsys.readouterr().out.count("not run: test_d (2)") == 2
    assert not log.with_suffix(".xml").exists()


def test_without_a_record_nothing_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "run", lambda *told, **variables: 0)
    told = gpu_check.test("cuda", [], tmp_path / "a-tests.txt", 9, rehearse=False)
    assert told == (False, False)


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n", True),
        ("8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n", False),
    ],
)
def test_a_build_is_of_this_gpu_alone_and_spills_are_found(
    said: str, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "grace_kernels" / "_C_cuda.so"
    old.parent.mkdir()
    old.touch()

    def ran(command: list[str], log: Path, seconds: float, **variables: str) -> int:
        assert (variables["TORCH_CUDA_ARCH_LIST"], old.exists()) == ("9.0", False)
        log.write_text(said)
        return 0

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "run", ran)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_check.build(tmp_path / "log", 9) is good


@pytest.mark.parametrize("bad", [None, "cuda", "warpgroups", "triton"])
def test_each_step_has_what_those_before_it_left_and_one_that_fails_stops_none(
    bad: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out"), "--seconds", "100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "gpu-check needs a GPU, got none" in capsys.readouterr().err
    steps: list[Any] = []

    def ran(command: list[str], log: Path | None, seconds: float, **variables: str) -> int:
        steps.append((command, log, round(seconds, -1)))
        return 0

    def tested(name: str, told: list[str], log: Path, seconds: float, rehearse: bool) -> Any:
        steps.append((name, log.name, round(seconds)))
        return False, name != bad

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    monkeypatch.setattr(gpu_check, "build", lambda log, seconds: log.name.startswith("no"))
    monkeypatch.setattr(gpu_check, "test", tested)
    monkeypatch.setattr(gpu_check, "run", ran)
    assert gpu_check.main() == 1  # the build is not good
    log = "nvidia-h200-sxm-tests.txt"
    assert steps[:3] == [("cuda", log, 25), ("warpgroups", log, 20), ("triton", log, 35)]
    command, _, seconds = steps[3]
    assert command[:2] == ["-m", "benchmarks"]
    assert "--device=cuda" in command
    assert seconds == 80
    # What may hang is timed when all else has been.
    assert (gpu_check.FORMS_LAST in command) == (bad in ("cuda", "warpgroups"))
    assert steps[4] == ("all", log, 70)


def test_where_forms_are_timed_last_no_part_is_left_out() -> None:
    parts = gpu_check.FORMS_LAST.partition("=")[2].split(",")
    assert sorted(parts) == sorted(suite.ON_A_GPU)
    assert parts == [*(part for part in suite.ON_A_GPU if part != "forms"), "forms"]


PLANTED = """
import pytest, torch

lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
torch.cuda.current_stream = torch.cuda.default_stream = lambda: None

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(6))
def test_planted(number):
    if number == 2:
        lost.append(1)

@pytest.mark.gpu
@pytest.mark.bulk
def test_bulk():
    pass

@pytest.mark.gpu
def test_behind_the_bulk():
    pass

def test_of_a_cpu():
    assert False
"""


def planted(folder: Path, *arguments: str) -> str:
    """Run planted tests with what every test gets; return what pytest says."""
    (folder / "test_planted.py").write_text(PLANTED)
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [sys.executable, "-m", "pytest", str(folder), "--gpu", "--durations=0"]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_a_test_that_loses_the_gpu_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    told = planted(tmp_path, "-n", "1")
    assert "crashed while running 'test_planted.py::test_planted[2]'" in told
    assert "the GPU is lost: CUDA error: an illegal memory access" in told
    assert "1 failed, 8 passed, 1 error" in told  # its body had passed


def test_with_gpu_the_bulk_comes_last_and_what_the_time_does_not_reach_is_not_run(
    tmp_path: Path,
) -> None:
    told = planted(tmp_path, "--until=0", "-v")
    names = re.findall(r"test_planted.py::(\S+) SKIPPED", told)
    numbered = [f"test_planted[{n}]" for n in range(6)]
    assert names == [*numbered, "test_behind_the_bulk", "test_bulk"]
    assert "not run: the time was over" in told
    assert "8 skipped" in told


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    child = "import sys, time; print('up', flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys\n"
        f"one = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "one.stdout.readline()\n"
        "print(one.pid, flush=True)\n"
    )
    log = tmp_path / "log"
    assert gpu_check.run(["-c", parent], log, 60) == 0
    pid = int(log.read_text(encoding="utf-8"))

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    for _ in range(600):  # the system takes a moment; the child would sleep ten minutes
        if gone():
            return
        time.sleep(0.1)
    pytest.fail("the child of the program goes on")
