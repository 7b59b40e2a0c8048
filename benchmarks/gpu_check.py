"""Build, test and measure on a GPU, by worth, in at most eight minutes: `make gpu-check OUT=DIR`.

First the build, for this GPU alone. Then bits against the CPU, nodes of graphs and edits between
replays: of the CUDA kernels with the forms that are off by default (2,000 random codebooks each),
then of Triton, whose kernels many processes compile. Then times, new forms beside old ones first.
Last what takes long: 20,000 codebooks, the sanitizer. What there was no time for is said.
A kernel that hangs costs its own step: the form that waits in barriers has tests of its own, and is
timed last where they fail.

With the Python of the machine as it is: torch with CUDA, triton, nvcc, pytest, and pytest-xdist and
pytest-timeout where they are installed. DIR gets seven files named after the GPU.
`--rehearse` does it small on a CPU and builds nothing. Exit status 1 where something failed, or a
test was not run that is not among the last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("ops/test_problems", "ops/test_graphs", "ops/test_faults", "edit/test_served_graphs")
STAGES = (
    ("cuda", ["--only=cuda", "-m", "not bulk"], 0.25),
    ("warpgroups", ["--only=warpgroups", "-m", "not bulk"], 0.2),
    ("triton", ["--only=triton", "-m", "not bulk"], 0.35),
)
"""Name, what pytest is told, and the share of the time that is left, at most."""
LAST = ("all", [], 1.0)
BUILD, TIMES = 0.35, 0.8  # likewise
FORMS_LAST = "--parts=ceilings,operators,pruned,edits,more,forms"


def run(command: list[str], log: Path | None, seconds: float, **variables: str) -> int:
    """Run a program of this Python beside the sources for so long; return its exit status."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    where = {"cwd": ROOT, "env": {**os.environ, **variables}, "start_new_session": True}
    said = {} if log is None else {"stdout": log.open("a"), "stderr": subprocess.STDOUT}
    program = subprocess.Popen([sys.executable, *command], **where, **said)
    try:
        return program.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return 124
    finally:  # workers of pytest-xdist and nvcc must not go on beside what is timed next
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def build(log: Path, seconds: float) -> bool:
    """Build the libraries for this GPU alone; say what spills."""
    for library in (ROOT / "grace_kernels").glob("*.so"):
        library.unlink()  # that of an earlier build must not pass for this one's
    chip = "{}.{}".format(*torch.cuda.get_device_capability())
    how = {"TORCH_CUDA_ARCH_LIST": chip, "GRACE_KERNELS_COMPILE": "cuda"}
    status = run(["setup.py", "build_ext", "--inplace"], log, seconds, **how)
    spills = len(re.findall(r"[1-9]\d* bytes spill stores", log.read_text()))
    print(f"build: status {status}, {spills} kernels spill", flush=True)
    return status == 0 and spills == 0


def test(
    name: str, told: list[str], log: Path, seconds: float, rehearse: bool
) -> tuple[bool, bool]:
    """Run what runs on a GPU; say what failed and what was not run.

    Returns:
        Whether all was run that should have been and passed, and whether what was run passed.
    """
    command = ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += [f"tests/{of}.py" for of in (FIRST[1:3] if rehearse else FIRST)]
    command += [] if rehearse else ["tests/ops", "--gpu", *told]
    record = log.with_suffix(".xml")
    command += [f"--until={time.time() + seconds}", f"--junitxml={record}"]
    if importlib.util.find_spec("xdist") and not rehearse:  # most of the time goes into compiling
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 2))), "--maxschedchunk=4"]
    if importlib.util.find_spec("pytest_timeout"):
        # So that there is a record of the others, no test may go on until all are ended.
        command += [f"--timeout={min(170, max(20, seconds)):.0f}", "--timeout-method=thread"]
    status = run(command, log, seconds + 40, OMP_NUM_THREADS="1")
    found, late, failed = Counter(), Counter(), []
    for case in ET.parse(record).iter("testcase") if record.exists() else ():
        of, tags = case.get("name", ""), {child.tag: child.get("message", "") for child in case}
        what = next((tag for tag in ("failure", "error", "skipped") if tag in tags), "passed")
        if what == "skipped" and tags[what].startswith("not run"):
            what, late[of.partition("[")[0]] = "not run", late[of.partition("[")[0]] + 1
        failed += [f"{what}: {of}"] if what in ("failure", "error") else []
        found[what] += 1
    record.unlink(missing_ok=True)
    print(f"tests, {name}: {', '.join(f'{n} {what}' for what, n in found.items()) or 'no record'}")
    untold = [f"not run: {of} ({n})" for of, n in late.items()]
    print("\n".join([*failed[:20], *untold]), flush=True)
    passed = status == 0 and found["passed"] > 0
    return passed and not (late and name != LAST[0]), passed


def main() -> int:
    """Do one stage after the other, each with what the ones before it left of the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--commit", help="of the sources, where there is no git to tell")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("gpu-check needs a GPU, got none; --rehearse runs it on a CPU")
    end, out = time.monotonic() + given.seconds, given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    gpu = "rehearsal" if given.rehearse else torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")

    def left(share: float) -> float:
        return share * (end - time.monotonic())

    built, log = out / f"{name}-build.txt", out / f"{name}-tests.txt"
    for of_before in (built, log):
        of_before.unlink(missing_ok=True)
    good = given.rehearse or build(built, left(BUILD))
    done = {of: test(of, told, log, left(share), given.rehearse) for of, told, share in STAGES}
    good &= all(well for well, _ in done.values())
    seconds = left(TIMES)
    command = ["-m", "benchmarks", f"--out={out}", "--threads=1"]
    command += [f"--device={'rehearsal' if given.rehearse else 'cuda'}"]
    command += [f"--seconds={seconds - 15:.0f}", f"--commit={given.commit or ''}"]
    command += [] if done["cuda"][1] and done["warpgroups"][1] else [FORMS_LAST]
    good &= run(command, None, seconds) == 0
    if not given.rehearse and left(1) > 60:
        stage, told, share = LAST
        good &= test(stage, told, log, left(share) - 30, rehearse=False)[0]
    else:
        print("not run: 20,000 random codebooks and the sanitizer")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
