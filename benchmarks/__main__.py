"""The benchmarks' command line.

python -m benchmarks [run]   measure, write CSV, JSON, page and pictures, print the goals
python -m benchmarks plot    draw the pictures of a run anew, from its CSV
python -m benchmarks page    docs/performance.md and docs/generality.md, from benchmarks/results/
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import suite
from .goals import goals
from .measurements import Measurement, Progress, Run, Settings, read, write
from .page import ROOT, goals_table, page

DEVICES = ("cpu", "cuda", "rehearsal")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure (what is done without a command)")
    run.add_argument("--device", default="cpu", choices=DEVICES, help="rehearsal: a CPU as a GPU")
    run.add_argument("--out", type=Path, default=Path("grace-bench"), metavar="DIR")
    run.add_argument("--quick", action="store_true", help="a few minutes instead of twenty")
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    run.add_argument("--parts", default="", help="by commas: " + ", ".join(suite.PARTS))
    run.add_argument("--seconds", type=float, help="of a GPU: nothing is begun any more after it")
    run.add_argument("--activations", type=Path, help="file to keep a model's activations in")
    run.add_argument("--commit", help="of the sources, where there is no git to tell")
    plot = commands.add_parser("plot", help="draw the pictures of a run anew")
    plot.add_argument("csv", type=Path)
    plot.add_argument("--out", type=Path, metavar="DIR", help="default: that of the CSV")
    commands.add_parser("page", help="write docs/performance.md and docs/generality.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status, 1 where one of ours is not exact."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    told = parser().parse_args(given)
    if told.command == "page":
        from . import page_edits, page_summary

        page_summary.write()
        page_edits.write()
    elif told.command == "plot":
        from . import pictures

        if not told.csv.exists():
            parser().error(f"there is no {told.csv}")
        for path in pictures.draw(read(told.csv), told.out or told.csv.parent, told.csv.stem):
            print(path)
    else:
        return _run(told)
    return 0


def _run(told: argparse.Namespace) -> int:
    known = suite.parts_on(told.device)
    parts = [part for part in told.parts.split(",") if part] or list(known)
    unknown = [part for part in parts if part not in known]
    if unknown:
        parser().error(f"--parts must be among {', '.join(known)}, got {', '.join(unknown)}")
    if told.threads < 1:
        parser().error(f"--threads must be at least 1, got {told.threads}")
    if told.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device must be one that is here, got cuda; rehearsal runs it on a CPU")
    until = float("inf") if told.seconds is None else time.monotonic() + told.seconds
    settings = Settings(
        told.device, told.quick, told.threads, activations=told.activations, until=until
    )
    command = ["python -m benchmarks", *(["--quick"] if told.quick else [])]
    command += [f"--device {told.device}"] if told.device != "cpu" else []
    command += [f"--threads {told.threads}"]
    command += [f"--parts {shlex.quote(told.parts)}"] if told.parts else []
    command += [f"--seconds {told.seconds:g}"] if told.seconds is not None else []

    def keep(run: Run) -> list[Path]:
        return write(run, told.out, suite.stem(run, settings))

    silent = contextlib.nullcontext()
    if told.device == "cpu":  # what the models' libraries say meanwhile
        from grace_edit.cli.output import quiet

        silent = quiet()
    with silent:
        run = suite.run(settings, parts, shown, " ".join(command), commit=told.commit, keep=keep)
    stem = suite.stem(run, settings)
    files = keep(run)
    if importlib.util.find_spec("matplotlib") is not None:
        from . import pictures

        files += pictures.draw(run, told.out, stem)
    text = page([(stem, run)], {file.name for file in files})
    files.append(told.out / f"{stem}.md")
    files[-1].write_text(text)
    print("\n".join(goals_table([goal for goal in goals(run.measured) if goal.total])))
    print("\n".join(str(file) for file in files))
    bad = [*failures(run), *([run.environment["failed"]] if "failed" in run.environment else [])]
    late = sum("not run" in one.note for one in run.measured)
    print("\n".join(f"WRONG: {line}" for line in bad) + f"\nnot run: {late}" * bool(late))
    return 1 if bad else 0


def failures(run: Run) -> list[str]:
    """Return what of ours is not exact or, on a GPU, did not answer."""

    def bad(one: Measurement) -> bool:
        silent = one.answers == "absent" and one.name.partition(",")[0] in ("triton", "cuda")
        return one.kind == "ours" and (one.answers in ("wrong", "rounded") or silent)

    return [
        f"{one.part} {one.name} {one.keys} x {one.width}, {one.batch}: {one.note}"
        for one in run.measured
        if bad(one)
    ]


@contextlib.contextmanager
def shown(part: str) -> Iterator[Progress]:
    """Show on a terminal how far a part is, once somebody has been kept waiting."""
    try:
        from grace_edit.progress import counter
    except ImportError:  # which needs tqdm
        yield lambda done, total: None
        return
    with counter(part) as advance:
        yield advance


if __name__ == "__main__":
    if importlib.util.find_spec("grace_edit") is None:  # not installed
        sys.path.insert(0, str(ROOT / "python"))
    sys.exit(main())
