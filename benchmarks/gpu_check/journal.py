"""Rows, their records on disk, the process that runs them, and the one that watches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
# Not run again where sources and backends are the same; what failed is tried once more.
DONE = ("ok", "skipped")
CONTEXT_LOST = 75  # exit status of a stage whose CUDA context a row has broken
THE_STAGE = "the stage"  # the row that stands for a process which dies outside its rows


class Skipped(Exception):
    """A row cannot be run here; the message says why."""


class Wrong(Exception):
    """A row ran and what it found is wrong; `result` is kept beside the message."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class CutOff(Wrong):
    """The time of a row ended within it; what it saw until then was right."""


class ContextLost(Wrong):
    """The process is of no more use: the rows behind this one need a new one."""


@dataclass(frozen=True)
class Row:
    """One thing to check or to time.

    Args:
        name: unique within the stage and the same in every run.
        run: does it and returns what is recorded; raises `Skipped`, `Wrong` or anything else.
        limit: seconds after which it counts as hung.
        again: says whether a recorded success has to be made anew (a library that is gone).
    """

    name: str
    run: Callable[[], dict[str, Any]]
    limit: float = 60.0
    again: Callable[[], bool] = lambda: False


def without_paths(text: str) -> str:
    """Return `text` without the names of this machine's folders: results are committed."""
    for folder, name in (
        (str(ROOT) + os.sep, ""),
        (str(ROOT), "."),
        (sys.prefix, "<python>"),
        (sys.base_prefix, "<python>"),
        (str(Path.home()) + os.sep, "~/"),
        (tempfile.gettempdir() + os.sep, "<tmp>/"),
    ):
        if len(folder) > 3:
            text = text.replace(folder, name)
    return text


def short_traceback(error: BaseException, most: int = 1500) -> str:
    """Return the last frames and the message of an exception."""
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-4)
    kept = [line for part in lines for line in part.splitlines() if line.strip(" ~^")]
    text = without_paths("\n".join(kept)).strip()
    return text if len(text) <= most else text[: most // 3] + "\n...\n" + text[-2 * most // 3 :]


class Journal:
    """Records of every run into one folder, a JSON object per line; the last one of a row counts.

    A record has `run` (1, 2, ...), `stage`, `row`, `status` and, by status, `seconds`, `result`,
    `error`, besides what it depends on: `sources`, a digest, and `backends`. Status: `started`;
    `ok`; `skipped` with a reason; `failed`; `crashed` (it took its process down); `hung`; `cut off`
    (the time ended while it ran).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[dict[str, Any]]:
        """Return all whole records, oldest first."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut in two
            if isinstance(record, dict):
                found.append(record)
        return found

    def append(self, **record: Any) -> None:
        """Write one record, on disk when this returns."""
        line = json.dumps(record, default=str).encode() + b"\n"
        with self.path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def runs(self) -> list[dict[str, Any]]:
        """Return what each run said of itself when it began."""
        return [record for record in self.records() if "about" in record]

    def _of_these_sources(self) -> list[dict[str, Any]]:
        """Return the records of the runs whose sources are those of the last run."""
        records = self.records()
        sources = {r["run"]: r["about"].get("sources") for r in records if "about" in r}
        last = sources[max(sources)] if sources else None
        return [r for r in records if sources.get(r.get("run")) == last]

    def plan(self, stage: str) -> list[str]:
        """Return the names of a stage's rows, of all runs of the present sources."""
        names: dict[str, None] = {}
        for record in self._of_these_sources():
            if record.get("stage") == stage and "plan" in record:
                names.update(dict.fromkeys(record["plan"]))
        return list(names)

    def rows(self, stage: str) -> dict[str, dict[str, Any]]:
        """Return the last record of each row of a stage, `started` ones included.

        Rows of other sources than the last run's are left out: they are about other code.
        """
        return {
            record["row"]: record
            for record in self._of_these_sources()
            if record.get("stage") == stage and "row" in record
        }


def run_rows(
    stage: str,
    rows: Sequence[Row],
    journal: Journal,
    run: int,
    remaining: Callable[[], float],
    *,
    settle: Callable[[], None] = lambda: None,
    depends: dict[str, Any] | None = None,
    out: TextIO = sys.stderr,
) -> int:
    """Run what is not done yet: what must be made anew, what was never tried, what failed.

    Args:
        remaining: seconds left of the stage's budget; no row begins without any.
        settle: waits for the device; an error that a row left behind shows here.
        depends: recorded with each row; a row recorded with anything else is not done.

    Returns:
        The exit status of the stage's process: 0, or `CONTEXT_LOST`.
    """
    names = [row.name for row in rows]
    if journal.plan(stage) != names:
        journal.append(run=run, stage=stage, plan=names)
    before = journal.rows(stage)
    anew: list[Row] = []
    fresh: list[Row] = []
    failed: list[Row] = []
    for row in rows:
        record = before.get(row.name)
        if record is not None and record["run"] == run:
            continue
        if record is None or any(record.get(k) != v for k, v in (depends or {}).items()):
            fresh.append(row)
        elif record["status"] not in DONE:
            failed.append(row)
        elif row.again():
            anew.append(row)
    for row in [*anew, *fresh, *failed]:
        if remaining() <= 0:
            break
        common = {"run": run, "stage": stage, "row": row.name, **(depends or {})}
        journal.append(**common, status="started", limit=row.limit)
        start = time.monotonic()
        record, lost = _record(row, settle)
        seconds = round(time.monotonic() - start, 2)
        journal.append(**common, **record, seconds=seconds)
        told = record.get("error") or brief(record.get("result", {}))
        line = told.splitlines()[-1] if told else ""
        print(f"{stage}: {row.name}: {record['status']}, {seconds} s. {line}"[:240], file=out)
        out.flush()
        if lost:
            return CONTEXT_LOST
    return 0


def _record(row: Row, settle: Callable[[], None]) -> tuple[dict[str, Any], bool]:
    """Run one row; return its record and whether the device is beyond use."""
    record: dict[str, Any]
    lost = False
    try:
        result = row.run()
        settle()
        return {"status": "ok", "result": result}, False
    except Skipped as reason:
        record = {"status": "skipped", "error": without_paths(str(reason))}
    except Wrong as wrong:
        lost = isinstance(wrong, ContextLost)
        record = {
            "status": "cut off" if isinstance(wrong, CutOff) else "failed",
            "error": without_paths(str(wrong)),
            "result": wrong.result,
        }
    except Exception as error:
        record = {"status": "failed", "error": short_traceback(error)}
    try:
        settle()
    except Exception as error:
        if record["status"] == "skipped":
            record["status"] = "failed"
        record["error"] += "\nafterwards: " + without_paths(str(error)).splitlines()[0]
        return record, True
    return record, lost


def brief(result: dict[str, Any]) -> str:
    """Return a result in one short line."""
    parts = []
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if not isinstance(value, (dict, list)):
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def supervise(
    command: Sequence[str],
    journal: Journal,
    stage: str,
    run: int,
    deadline: float,
    log: Path,
    environment: dict[str, str] | None = None,
) -> None:
    """Run a stage's process until its rows are through or `deadline` (monotonic seconds).

    The process gets the seconds left as its last argument. Where it dies or hangs in a row, that is
    recorded and a new process goes on behind it; where it dies outside a row, the stage is over.
    """
    while (left := deadline - time.monotonic()) > 0:
        code, tail, why = _watch(
            [*command, f"{left:.1f}"], journal, stage, deadline, log, environment
        )
        if code in (0, CONTEXT_LOST) and why == "":
            if code == CONTEXT_LOST:
                continue
            if journal.rows(stage).get(THE_STAGE, {}).get("status") == "crashed":
                journal.append(run=run, stage=stage, row=THE_STAGE, status="ok", result={})
            return
        struck = [r for r in journal.rows(stage).values() if r["status"] == "started"]
        struck = [r for r in struck if r["run"] == run]
        if not struck:
            if why != "cut off":
                error = f"the process ended with status {code}\n{tail}"
                journal.append(run=run, stage=stage, row=THE_STAGE, status="crashed", error=error)
            return
        for record in struck:
            told = {
                "hung": f"no end within {record['limit']:g} s",
                "cut off": "the budget of the stage ended while it ran",
            }.get(why, f"the process ended with status {code}\n{tail}")
            kept = {k: v for k, v in record.items() if k not in ("status", "limit")}
            journal.append(**kept, status=why or "crashed", error=told)
            print(f"{stage}: {record['row']}: {why or 'crashed'}", file=sys.stderr, flush=True)


def _watch(
    command: Sequence[str],
    journal: Journal,
    stage: str,
    deadline: float,
    log: Path,
    environment: dict[str, str] | None,
) -> tuple[int, str, str]:
    """Run one process; return its status, the end of what it printed, and why it was ended."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
        start_new_session=True,  # so that what it starts ends with it
    )
    tail: deque[str] = deque(maxlen=15)
    reader = threading.Thread(target=_pass_on, args=(process.stdout, tail, stage, log), daemon=True)
    reader.start()
    why = ""
    seen, current, since = -1, None, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            size = journal.path.stat().st_size if journal.path.exists() else 0
            if size != seen:
                seen, since = size, now
                started = [r for r in journal.rows(stage).values() if r["status"] == "started"]
                current = started[-1] if started else None
            if now > deadline:
                why = "cut off"
            elif current is not None and now - since > current["limit"]:
                why = "hung"
            if why:
                break
    finally:
        _end(process)
        reader.join(timeout=5)
    return process.returncode, without_paths("\n".join(tail)), why


def _pass_on(lines: Iterable[str], tail: deque[str], stage: str, log: Path) -> None:
    with log.open("a") as file:
        for line in lines:
            tail.append(line.rstrip())
            file.write(line)
            file.flush()
            if line.startswith(f"{stage}: "):
                print(line, end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
