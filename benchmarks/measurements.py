"""What is measured: the columns of a measurement, its CSV and JSON files, ratios between two.

A measurement is one thing that was timed in one case, and a row of the CSV. Ratios are never
stored: `ratio` and `best_peer` derive them from measurements of one run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

KINDS = ("ours", "peer", "bound")
ANSWERS = ("exact", "rounded", "wrong", "absent", "")
RIGHT = ("exact", "rounded")
MORE_IS_BETTER = ("tokens/s", "edits/s", "GB/s", "TFLOP/s")

Progress = Callable[[int, int], object]
"""Called with what is done of a part, and what there is in all."""


@dataclass(frozen=True)
class Measurement:
    """One thing that was timed, in one case; README.md says what each column means.

    `kind` is `ours`, `peer`, or `bound` for what a contestant cannot do without. `answers` is
    `exact` (the reference's bits), `rounded` (the right indices, distances that round), `wrong`,
    `absent` (could not be had: `note` says why), or empty.
    """

    part: str
    device: str = "cpu"
    data: str = ""
    dtype: str = ""
    keys: int | None = None
    width: int | None = None
    batch: int | None = None
    radius: float | None = None
    cache: str = ""
    name: str = ""
    kind: str = "ours"
    answers: str = ""
    unit: str = "ms"
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.answers not in ANSWERS:
            raise ValueError(f"answers must be one of {ANSWERS}, got {self.answers!r}")
        if (self.answers == "absent") != (self.median is None):
            raise ValueError(f"median must be None where answers is absent, got {self.median}")
        for name in ("radius", "median", "p20", "p80"):
            value = getattr(self, name)
            if value is not None:  # the same six digits in every file
                object.__setattr__(self, name, float(f"{value:.6g}"))

    @property
    def counts(self) -> bool:
        """Whether it was timed and its answers, where it gives any, are right."""
        return self.median is not None and self.answers != "wrong"


Measured = Sequence[Measurement]
COLUMNS = tuple(f.name for f in fields(Measurement))
CASE = ("device", "data", "keys", "width", "batch", "cache")
"""Columns that contestants have in common where they are compared, besides the radius."""
OPERATORS = ("nearest", "lookup", "adapt_")
"""Parts that share the peers of `nearest`; the radius follows from the data and is no case."""


@dataclass(frozen=True)
class Settings:
    """What a part is told.

    Attributes:
        device: `cpu`, `cuda`, or `rehearsal`: what runs on a GPU, tiny, on a CPU.
        quick: a tenth of the work.
        threads: for everything that is timed.
        budget: scales the seconds a case may take; tests make it small.
        activations: file in which the packaged model's activations are kept between runs.
        until: `time.monotonic()` from which on nothing is begun any more; on a GPU alone.
    """

    device: str = "cpu"
    quick: bool = False
    threads: int = 1
    budget: float = 1.0
    activations: Path | None = None
    until: float = float("inf")

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the one of two sizes that fits."""
        return quick if self.quick else full


@dataclass
class Run:
    """One run: what it depends on, and what was measured."""

    environment: dict[str, Any] = field(default_factory=dict)
    measured: list[Measurement] = field(default_factory=list)


def case(one: Measurement) -> tuple[Any, ...]:
    """Return what has to be equal for two measurements to be compared."""
    radius = None if one.part in OPERATORS else one.radius
    return *(getattr(one, name) for name in CASE), radius


def ratio(ours: Measurement, other: Measurement) -> float:
    """Return how many times better `ours` is than `other`: faster, or more in a second.

    Raises:
        ValueError: the units differ, or one of them was not timed.
    """
    if ours.unit != other.unit or ours.median is None or other.median is None:
        raise ValueError(f"both must be timed in one unit, got {ours} and {other}")
    if ours.unit in MORE_IS_BETTER:
        return ours.median / other.median
    return other.median / ours.median


def contestants(
    measured: Iterable[Measurement], ours: Measurement, kind: str, part: str | None = None
) -> list[Measurement]:
    """Return those of a kind in the case of `ours`, of `part` or else of its own part."""
    wanted = case(ours), part or ours.part
    return [one for one in measured if one.kind == kind and (case(one), one.part) == wanted]


def best_peer(
    measured: Iterable[Measurement],
    ours: Measurement,
    *,
    part: str | None = None,
    dtype: str | None = None,
) -> Measurement | None:
    """Return the best peer in the case of `ours` whose answers are right, None if there is none.

    Args:
        part: whose peers, if not the part of `ours`.
        dtype: only peers that read keys of this type.
    """
    found = [
        peer
        for peer in contestants(measured, ours, "peer", part)
        if peer.answers in RIGHT and dtype in (None, peer.dtype)
    ]
    return min(found, key=lambda peer: ratio(peer, ours) ** -1, default=None)


def write(run: Run, folder: Path, stem: str) -> list[Path]:
    """Write `stem.csv` and `stem.json`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, whole = folder / f"{stem}.csv", folder / f"{stem}.json"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in run.measured:
            values = asdict(one).values()
            writer.writerow(["" if value is None else value for value in values])
    rows = ",\n  ".join(json.dumps(_brief(one)) for one in run.measured)
    about = json.dumps(run.environment, indent=1)
    whole.write_text(f'{{"environment": {about},\n "rows": [\n  {rows}\n]}}\n')
    return [table, whole]


def _brief(one: Measurement) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if value not in ("", None)}


def read(path: Path) -> Run:
    """Return a run from its CSV (with what it depends on, if the JSON lies beside it) or its JSON.

    Raises:
        ValueError: the file is not one of these.
    """
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        return Run(data["environment"], [Measurement(**row) for row in data["rows"]])
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text())["environment"] if beside.exists() else {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must begin with {','.join(COLUMNS)}")
        return Run(about, [_measurement(row) for row in reader])


_NUMBERS: dict[str, Callable[[str], float]] = {
    **dict.fromkeys(("keys", "width", "batch"), int),
    **dict.fromkeys(("radius", "median", "p20", "p80"), float),
}


def _measurement(row: dict[str, str]) -> Measurement:
    values: dict[str, Any] = dict(row)
    for name, number in _NUMBERS.items():
        values[name] = number(row[name]) if row[name] else None
    return Measurement(**values)


def select(measured: Measured, **wanted: Any) -> list[Measurement]:
    """Return those whose columns are as wanted."""
    return [one for one in measured if all(getattr(one, k) == v for k, v in wanted.items())]
