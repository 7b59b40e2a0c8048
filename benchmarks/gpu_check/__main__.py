"""Arguments, the four stages in turn, the report, the exit status.

Exit status: 0 where everything of build, correct and graphs was right and nothing measured was
wrong; 1 where something failed or was not reached; 2 where nothing can be run here.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError:
    print("gpu-check needs torch in the Python that runs it, got none", file=sys.stderr)
    sys.exit(2)

from . import journal as records
from .journal import DONE, ROOT, Journal, supervise

STAGES = ("build", "correct", "graphs", "bench")
# Of the seconds that are left when a stage begins, how many it may take; what it leaves, the later
# ones get. A build from nothing needs more than its share of the work.
SHARE = {"build": 0.45, "correct": 0.5, "graphs": 0.4, "bench": 1.0}
FOR_THE_REPORT = 8.0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Build, check and measure the GPU kernels; a second run goes on from there.",
    )
    made.add_argument("--out", type=Path, required=True, help="folder for at most 8 flat files")
    made.add_argument(
        "--stages", default=",".join(STAGES), help="which to run, by commas (default: all)"
    )
    made.add_argument("--seed", type=int, default=0, help="of all random inputs")
    made.add_argument("--budget", type=float, default=480.0, help="seconds in all (default: 480)")
    made.add_argument("--quick", action="store_true", help="a tenth of the work")
    made.add_argument(
        "--rehearse", action="store_true", help="run the machinery on a CPU, with small sizes"
    )
    made.add_argument("--commit", help="what to record as the commit where there is no git")
    made.add_argument("--child", nargs=2, metavar=("STAGE", "RUN"), help=argparse.SUPPRESS)
    made.add_argument("seconds", type=float, nargs="?", help=argparse.SUPPRESS)
    return made


def main() -> int:
    """Run what was asked for and return the exit status."""
    arguments = parser().parse_args()
    stages = [stage for stage in arguments.stages.split(",") if stage]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser().error(f"--stages must be among {','.join(STAGES)}, got {','.join(unknown)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a GPU, got none; --rehearse runs it on a CPU", file=sys.stderr)
        return 2
    if arguments.child:
        return _child(arguments)
    return _parent(arguments, stages)


def _device(rehearse: bool) -> torch.device:
    return torch.device("cpu") if rehearse else torch.device("cuda", 0)


def _child(arguments: argparse.Namespace) -> int:
    """Be the process of one stage."""
    from . import bench, build, correct, graphs, pruned
    from .place import Place, sources_digest

    stage, run = arguments.child
    place = Place(
        _device(arguments.rehearse),
        seed=arguments.seed,
        quick=arguments.quick,
        deadline=time.monotonic() + arguments.seconds,
    )
    torch.set_num_threads(max(1, min(8, torch.get_num_threads())))
    if place.gpu:
        torch.cuda.set_device(place.device)
    gc.collect()
    gc.freeze()  # `Captured` collects garbage: let it not look through what was imported
    log = arguments.out / "log.txt"
    rows = {
        "build": lambda: build.rows(place, log),
        "correct": lambda: correct.rows(place, log),
        "graphs": lambda: graphs.rows(place),
        "bench": lambda: pruned.among(bench.rows(place), place),
    }[stage]()
    journal = Journal(arguments.out / "rows.jsonl")
    depends: dict[str, Any] = {"sources": sources_digest()}
    if stage != "build":  # whose rows decide what there is
        depends["backends"] = list(place.available)
    return records.run_rows(
        stage,
        rows,
        journal,
        int(run),
        place.remaining,
        settle=place.settle,
        depends=depends,
        out=sys.stdout,
    )


def _parent(arguments: argparse.Namespace, stages: list[str]) -> int:
    """Run each stage in a process of its own, then write the report."""
    from .place import environment
    from .report import write

    start = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "rows.jsonl")
    about = environment(_device(arguments.rehearse), arguments.commit)
    about["rehearsal"] = arguments.rehearse
    earlier = journal.runs()
    for record in earlier:
        was = record["about"]
        if (was["device"], was["rehearsal"]) != (about["device"], about["rehearsal"]):
            print(
                f"--out must hold runs of this device ({about['device']}), got those of "
                f"{was['device']}{', a rehearsal' if was['rehearsal'] else ''}",
                file=sys.stderr,
            )
            return 2
    run = len(earlier) + 1
    about["command"] = " ".join(
        ["python -m benchmarks.gpu_check --out OUT", *_told(arguments, stages)]
    )
    journal.append(run=run, about=about, time=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))

    command = [sys.executable, "-m", str(__package__), "--out", str(out.resolve())]
    command += ["--seed", str(arguments.seed)]
    command += ["--quick"] * arguments.quick + ["--rehearse"] * arguments.rehearse
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    variables.update(PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    end = start + arguments.budget - FOR_THE_REPORT
    for stage in stages:
        left = end - time.monotonic()
        share = 1.0 if stage == stages[-1] else SHARE[stage]
        deadline = time.monotonic() + share * left
        print(f"{stage}: at most {max(0.0, share * left):.0f} s", file=sys.stderr, flush=True)
        child = [*command, "--child", stage, str(run)]
        supervise(child, journal, stage, run, deadline, out / "log.txt", variables)
    written = write(journal, out, stages=STAGES)
    print(f"{time.monotonic() - start:.0f} s; {', '.join(written)} in {out}", file=sys.stderr)
    return status(journal, stages)


def _told(arguments: argparse.Namespace, stages: list[str]) -> list[str]:
    told = [] if tuple(stages) == STAGES else ["--stages", ",".join(stages)]
    for name in ("seed", "budget"):
        if getattr(arguments, name) != parser().get_default(name):
            told += [f"--{name}", f"{getattr(arguments, name):g}"]
    return told + [f"--{name}" for name in ("quick", "rehearse") if getattr(arguments, name)]


def status(journal: Journal, stages: list[str]) -> int:
    """Return 1 where a row of `stages` failed, or one that must be right was not reached."""
    bad = []
    for stage in stages:
        rows = journal.rows(stage)
        for name in {*journal.plan(stage), *rows}:
            got = rows.get(name, {}).get("status", "not run")
            missing = got in ("not run", "cut off", "started")
            if got not in DONE and not (stage == "bench" and missing):
                bad.append(f"{stage}: {name}: {got}")
        if not rows:
            bad.append(f"{stage}: nothing was run")
    if bad:
        print(f"not right, or not reached: {len(bad)}", file=sys.stderr)
        for line in sorted(bad)[:20]:
            print(f"  {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
