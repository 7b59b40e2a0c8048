"""What a run has finished, on disk: a log that only grows, and the method's state every few edits.

A run may be killed at any moment. The log then ends in a whole line or in a torn one, which is
dropped; a state is a directory that was renamed into place, or it is not there. From both a run
goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG, STATES = "journal.jsonl", "state"
_NEW = ".new"


class Journal:
    """The finished units of one method in one directory.

    Args:
        directory: made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.units: dict[str, dict[str, Any]] = {}
        (directory / STATES).mkdir(parents=True, exist_ok=True)
        self._read()
        self._file = open(directory / LOG, "ab")  # noqa: SIM115  # open for as long as the run

    def _read(self) -> None:
        path = self.directory / LOG
        if not path.exists():
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode().split("\n")[:-1]:
            found = json.loads(line)
            self.units[found.pop("unit")] = found

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def add(self, unit: str, found: dict[str, Any]) -> None:
        """Note a finished unit; it is on disk when this returns. A later one of a name counts."""
        line = json.dumps({"unit": unit, **found}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.units[unit] = found

    def save(self, edits: int, write: Callable[[Path], None]) -> None:
        """Keep the state after so many edits, written by `write` to a directory."""
        states = self.directory / STATES
        name = f"{edits:06d}"
        if (states / name).exists():
            return
        fresh = states / (name + _NEW)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        write(fresh)
        for path in fresh.iterdir():
            _sync(path)
        _sync(fresh)
        os.rename(fresh, states / name)
        _sync(states)
        for other in states.iterdir():
            if other.name != name:
                shutil.rmtree(other)

    def saved(self) -> tuple[int, Path | None]:
        """Return after how many edits the last state was kept, and where; 0 and None without."""
        states = self.directory / STATES
        found = sorted(path for path in states.iterdir() if not path.name.endswith(_NEW))
        return (int(found[-1].name), found[-1]) if found else (0, None)

    def close(self) -> None:
        """Close the log."""
        self._file.close()


def read_units(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the finished units of a directory."""
    journal = Journal(directory)
    journal.close()
    return journal.units


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or as it was."""
    fresh = path.with_name(path.name + _NEW)
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
