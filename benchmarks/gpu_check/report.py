"""JSON, CSV, Markdown and a picture, from the records alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import pruned
from .journal import Journal, without_paths
from .picture import COLUMNS, OURS, TITLES, draw, peer, time_of
from .place import slug


def write(journal: Journal, out: Path, stages: Sequence[str]) -> list[str]:
    """Write the report's files anew; return their names.

    They begin with the device's name (`nvidia-h200-report.md`), under which they may be committed
    as they are; those of a rehearsal begin with `rehearsal`.
    """
    runs = journal.runs()
    about = runs[-1]["about"]
    prefix = "rehearsal" if about["rehearsal"] else slug(about["device"])
    measured = merged(journal)
    found = {stage: _states(journal, stage) for stage in stages}
    names = {kind: f"{prefix}-{kind}" for kind in ("gpu-check.json", "bench.csv", "report.md")}
    everything = {"runs": runs, "rows": {s: journal.rows(s) for s in stages}, "states": found}
    whole = without_paths(json.dumps(everything, indent=1))
    (out / names["gpu-check.json"]).write_text(whole + "\n")
    with (out / names["bench.csv"]).open("w", newline="") as file:
        file.write(without_paths(_csv(measured)))
    picture = f"{prefix}-bench.png"
    trouble = None
    try:
        drawn = bool(measured) and draw(measured, out / picture, _title(about))
    except Exception as error:  # a report without its picture is still a report
        drawn, trouble = False, f"{type(error).__name__}: {error}"
    text = markdown(runs, found, journal, measured, picture if drawn else None, trouble)
    (out / names["report.md"]).write_text(without_paths(text))
    return [*names.values(), *([picture] if drawn else [])]


def _title(about: dict[str, Any]) -> str:
    what = f"gpu-check on {about['device']}"
    return f"Rehearsal of {what}: its times mean nothing" if about["rehearsal"] else what


def _states(journal: Journal, stage: str) -> dict[str, str]:
    rows = journal.rows(stage)
    found = {name: "not run" for name in journal.plan(stage)}
    for name, record in rows.items():
        found[name] = "cut off" if record["status"] == "started" else record["status"]
    return found


def merged(journal: Journal) -> list[dict[str, Any]]:
    """Return one entry per shape: its columns in microseconds, the roofs, the shares.

    A roof is the longer of the time to move the bytes once and the time of the multiplications at
    the product rate, both measured in the run that timed the row: one at the rate of a pass that
    only reads, as a lookup mostly does, one at that of a copy, which reads and writes.
    """
    ceilings: dict[int, dict[str, Any]] = {}
    for record in journal.records():
        if record.get("row") == "ceilings" and record.get("status") == "ok":
            ceilings[record["run"]] = record["result"]
    shapes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, record in journal.rows("bench").items():
        result = record.get("result") or {}
        if name == "ceilings" or "columns" not in result:
            continue
        key = tuple(result[k] for k in ("op", "dtype", "D", "N", "B"))
        shape = shapes.setdefault(
            key, {**{k: v for k, v in result.items() if k != "columns"}, "columns": {}}
        )
        shape["columns"].update(result["columns"])
        if any(column in OURS for column in result["columns"]):
            shape["run"] = record["run"]
            ceiling = ceilings.get(record["run"])
            if ceiling is not None:
                shape["roof us"], shape["bound by"] = _roof(result, ceiling, "read")
                shape["copy roof us"], _ = _roof(result, ceiling, "copy")
    for shape in shapes.values():
        _compare(shape)
    return list(shapes.values())


def _roof(result: dict[str, Any], ceiling: dict[str, Any], how: str) -> tuple[float, str]:
    size = 4 if result["dtype"] == "fp32" else 2
    n, d, b = result["N"], result["D"], result["B"]
    moved = n * d * size + 4 * n + b * d * size + 12 * b
    if result["op"] == "adapt_":
        moved += 2 * b * d * size
    rate = ceiling["tf32 operations per second" if size == 4 else "bf16 operations per second"]
    memory = 1e6 * moved / ceiling[f"{how} bytes per second"]
    compute = 1e6 * 2 * b * n * d / rate
    return max(memory, compute), "memory" if memory >= compute else "arithmetic"


def _compare(shape: dict[str, Any]) -> None:
    """Add the best of ours, the best right peer, their ratio, and the share of the roof."""
    right: dict[str, float] = {}
    for name, column in shape["columns"].items():
        us = time_of(column)
        if column.get("verdict") == "right" and us:
            right[name] = us
    ours = {name: t for name, t in right.items() if name in OURS}
    others = {name: t for name, t in right.items() if name not in OURS}
    if ours:
        shape["best"] = min(ours, key=ours.__getitem__)
        if "roof us" in shape:
            shape["share"] = shape["roof us"] / ours[shape["best"]]
            shape["copy share"] = shape["copy roof us"] / ours[shape["best"]]
    if others:
        shape["best peer"] = min(others, key=others.__getitem__)
    if ours and others:
        shape["ratio"] = others[shape["best peer"]] / ours[shape["best"]]
    cdist = time_of(shape["columns"].get("cdist", {}))
    if ours and cdist:
        shape["ratio to cdist"] = cdist / ours[shape["best"]]


_CSV = ("op", "dtype", "D", "N", "B", "key bytes", "codebooks", "column", "verdict")
_TIMES = tuple(
    f"{kind} {part}" for kind in ("cold", "warm", "eager") for part in ("us", "p20", "p80")
)


def _csv(measured: list[dict[str, Any]]) -> str:
    with io.StringIO() as file:
        writer = csv.writer(file)
        roofs = ("roof us", "copy roof us")
        writer.writerow([*_CSV, *_TIMES, *roofs, "share of the roof", "share of the copy roof"])
        for shape in measured:
            high = [shape.get(roof) for roof in roofs]
            for name, column in shape["columns"].items():
                cold = time_of(column)
                times = [
                    column.get(kind, {}).get(part, "") for kind, part in map(str.split, _TIMES)
                ]
                told = column.get("verdict") or column.get("error", "")
                shares = [f"{roof / cold:.4f}" if roof and cold else "" for roof in high]
                row = [shape.get(key, "") for key in _CSV[:-2]]
                tops = [f"{roof:.3f}" if roof else "" for roof in high]
                writer.writerow([*row, name, told, *times, *tops, *shares])
        return file.getvalue()


def _cell(column: dict[str, Any], kind: str = "cold") -> str:
    if not column:
        return "–"
    if "error" in column:
        return "out of memory" if "out of memory" in column["error"] else "failed"
    us, verdict = time_of(column, kind), column.get("verdict", "")
    text = "–" if us is None else f"{us:.4g}"
    if verdict == "right":
        return text
    return text + (" ≈" if verdict.startswith("right indices") else " (wrong)")


def markdown(
    runs: list[dict[str, Any]],
    states: dict[str, dict[str, str]],
    journal: Journal,
    measured: list[dict[str, Any]],
    picture: str | None,
    trouble: str | None,
) -> str:
    """Return the report."""
    about = runs[-1]["about"]
    lines = [f"# {_title(about)}", ""]
    if about["rehearsal"]:
        lines += [
            "Run on a CPU with small sizes, to try the machinery. Nothing below was run on a GPU.",
            "",
        ]
    lines += ["| | |", "|---|---|"]
    skip = ("rehearsal", "device")
    lines += [f"| {k} | {_plain(v)} |" for k, v in about.items() if k not in skip and v is not None]
    lines += [f"| runs | {', '.join(r['time'] for r in runs)} |", ""]
    if len({r["about"]["sources"] for r in runs}) > 1:
        lines += ["The runs are of different sources: only rows of the last one's count here.", ""]
    lines += [
        "## What was run",
        "",
        "| stage | ok | skipped | failed | not run |",
        "|---|---|---|---|---|",
    ]
    for stage, found in states.items():
        lines.append(f"| {stage} | {' | '.join(str(n) for n in _tally(found))} |")
    lines.append("")
    for stage, found in states.items():
        lines += _notable(stage, found, journal.rows(stage))
    lines += _correct(journal)
    if measured:
        lines += _bench(journal, measured, picture, trouble)
    results = [record.get("result") or {} for record in journal.rows("bench").values()]
    lines += pruned.table([result for result in results if "pruned columns" in result])
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


def _tally(found: dict[str, str]) -> tuple[int, int, int, int]:
    states = list(found.values())
    ok, skipped = states.count("ok"), states.count("skipped")
    late = states.count("not run") + states.count("cut off")
    return ok, skipped, len(states) - ok - skipped - late, late


def _notable(stage: str, found: dict[str, str], rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, state in found.items():
        if state in ("ok", "not run"):
            continue
        error = " ".join(str(rows.get(name, {}).get("error", "")).split())
        error = error if len(error) < 400 else "... " + error[-400:]
        lines.append(f"* {stage}: {name}: {state}: {error.replace('|', '/')}")
    late = [name for name, state in found.items() if state == "not run"]
    if late:
        lines.append(f"* {stage}: not run within the budget: {'; '.join(late)}")
    return [*lines, ""] if lines else []


def _correct(journal: Journal) -> list[str]:
    """Say in a few lines how much was compared."""
    lines = ["## Correct, and in graphs", ""]
    for kind, what in (("codebooks", ""), ("sketched codebooks", ", through a sketch")):
        books, wrong = 0, 0
        for name, record in journal.rows("correct").items():
            result = record.get("result") or {}
            if name.startswith(f"{kind} "):
                books += result.get("problems", 0)
                wrong += sum(n for key, n in result.items() if key.startswith("wrong, "))
        lines.append(
            f"* random codebooks compared to the bit with the CPU{what}: {books}, wrong: {wrong}"
        )
    for stage in ("correct", "graphs"):
        for name, record in journal.rows(stage).items():
            if record["status"] == "ok" and not name.startswith(("codebooks", "sketched")):
                parts = [
                    f"{k} {v}"
                    for k, v in (record.get("result") or {}).items()
                    if not isinstance(v, (dict, list))
                ]
                lines.append(f"* {name}: {', '.join(parts)[:300]}")
    return [*lines, ""]


def _bench(
    journal: Journal, measured: list[dict[str, Any]], picture: str | None, trouble: str | None
) -> list[str]:
    names = [name for name in COLUMNS if any(peer(shape, name)[1] for shape in measured)]
    heads = [TITLES.get(name, name) for name in names]
    lines = ["## Times", ""]
    ceiling = (journal.rows("bench").get("ceilings") or {}).get("result") or {}
    if ceiling:
        lines += [
            f"In the same run: copy {ceiling['copy bytes per second'] / 1e12:.3g} TB/s (read "
            f"+ written), a pass that only reads {ceiling['read bytes per second'] / 1e12:.3g} "
            f"TB/s, product {ceiling['bf16 operations per second'] / 1e12:.4g} TFLOP/s bf16, "
            f"{ceiling['fp32 operations per second'] / 1e12:.3g} fp32, "
            f"{ceiling['tf32 operations per second'] / 1e12:.3g} tf32, a kernel in a graph "
            f"{ceiling['kernel in a graph us']:.3g} µs.",
            "",
        ]
    lines += [
        'µs per call, median, caches cold, by graph replay. "≈": right indices, inexact distances. '
        "Share: the roof over the best of ours. The roof is the longer of moving the bytes once at "
        "the read-only rate and the multiplications; the copy share has the copy rate in that "
        "place. Ratio: the best right peer over the best of ours.",
        "",
        "| op, dtype | D | N | B | "
        + " | ".join(heads)
        + " | roof | share | copy share | ratio | cdist ratio |",
        "|---" * (9 + len(heads)) + "|",
    ]
    for shape in measured:
        cells = [_cell(peer(shape, name)[1]) for name in names]
        lines.append(
            f"| {shape['op']} {shape['dtype']} | {shape['D']} | {shape['N']} | {shape['B']} | "
            + " | ".join([*cells, *_shares(shape)])
            + " |"
        )
    lines += ["", "Spread (p20 to p80), warm caches and eager calls, µs:", ""]
    shown = [name for name in names if name in OURS]
    titles = [f"{TITLES[n]} {k}" for n in shown for k in ("p20 to p80", "warm", "eager")]
    rest = [f"{TITLES.get(n, n)} eager" for n in names if n not in shown]
    lines += [
        "| op, dtype | D | N | B | " + " | ".join([*titles, *rest]) + " |",
        "|---" * (4 + len(titles) + len(rest)) + "|",
    ]
    for shape in measured:
        cells = []
        for name in shown:
            column = shape["columns"].get(name, {})
            cold = column.get("cold")
            cells.append(f"{cold['p20']:.4g} to {cold['p80']:.4g}" if cold else "–")
            cells += [_cell(column, kind) for kind in ("warm", "eager")]
        cells += [_cell(peer(shape, name)[1], "eager") for name in names if name not in shown]
        lines.append(
            f"| {shape['op']} {shape['dtype']} | {shape['D']} | {shape['N']} | {shape['B']} | "
            + " | ".join(cells)
            + " |"
        )
    lines.append("")
    if picture:
        lines += [f"![times by the size of the keys]({picture})", ""]
    if trouble:
        lines += [f"No picture: {trouble}", ""]
    wrong = [
        f"* {shape['op']} {shape['dtype']} D={shape['D']} N={shape['N']} B={shape['B']}, {name}: "
        f"{column.get('verdict') or column.get('error')}"
        for shape in measured
        for name, column in shape["columns"].items()
        if column.get("verdict") != "right"
    ]
    if wrong:
        lines += ["What is not right, or could not be timed:", "", *wrong, ""]
    return lines


def _shares(shape: dict[str, Any]) -> list[str]:
    roof, share, copy = shape.get("roof us"), shape.get("share"), shape.get("copy share")
    return [
        f"{roof:.4g}" if roof else "–",
        f"{100 * share:.0f} %" if share else "–",
        f"{100 * copy:.0f} %" if copy else "–",
        f"{shape['ratio']:.3g} ({shape['best peer']})" if "ratio" in shape else "–",
        f"{shape['ratio to cdist']:.3g}" if "ratio to cdist" in shape else "–",
    ]
