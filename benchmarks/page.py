"""The page and the README's figures, from measurements alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from . import page_gpu
from .goals import Goal, goals, ours_and_best, pruned, shares, where, worst_cases
from .markdown import figure, table, times
from .measurements import (
    OPERATORS,
    Measured,
    Measurement,
    Run,
    case,
    contestants,
    ratio,
    read,
    select,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURES = {
    "": "times by the size of the keys",
    "-latency": "time of one call against the number of keys",
    "-roofline": "share of the speed of reading the keys",
    "-speedup": "times faster than the best right peer",
    "-survivors": "what a sketch leaves, and the time, against the radius",
}
Runs = Sequence[tuple[str, Run]]


def committed(folder: Path = RESULTS) -> Runs:
    """Return the committed runs, by name, those on CPUs first: CSV files with a JSON beside."""
    files = [*sorted(folder.glob("cpu-*.csv")), *sorted(folder.glob("nvidia-*.csv"))]
    return [(file.stem, read(file)) for file in files if file.with_suffix(".json").exists()]


def page(runs: Runs, drawn: Collection[str] | None = None) -> str:
    """Return the whole page.

    Args:
        runs: by name.
        drawn: names of the pictures that lie beside the page; None: it is the committed page, with
            the committed pictures.
    """
    about, folder = "benchmarks/README.md", ""
    if drawn is None:
        about, folder = f"[{about}](../{about})", "../benchmarks/results/"
        drawn = {file.name for file in RESULTS.glob("*.png")}
    lines = [
        "# Performance",
        "",
        "Made by `make bench` and, on a GPU, `make gpu-check`; this page by `make docs` from the "
        f"CSV files, every ratio from measurements of one run. {about} says how it is measured, "
        "and what the columns mean.",
        "",
    ]
    if not runs:
        lines += ["No run is committed.", ""]
    for stem, run in runs:
        lines += _one(stem, run, {name: folder + name for name in drawn})
    return "\n".join(lines).rstrip() + "\n"


def _one(stem: str, run: Run, links: dict[str, str]) -> list[str]:
    measured = run.measured
    lines = [f"## {title(stem, run)}", ""]
    sections = (
        ("Goals", goals_table(goals(measured))),
        *page_gpu.sections(measured),
        ("Brute force beside the best right peer", _brute(measured)),
        ("Brute force beside each peer", _each(measured)),
        ("Share of the speed of reading the keys", _shares(measured)),
        ("Through a sketch", _pruned(measured)),
        ("Where a sketch proves nothing", _worst(measured)),
        ("From how many keys on a sketch pays", _small(measured)),
        *((_OTHER[part], _other(measured, part)) for part in _OTHER),
        ("Times", _times(measured)),
        ("What is missing or wrong", _missing(measured)),
        ("Environment", _environment(run)),
    )
    for heading, body in sections:
        if body:
            lines += [f"### {heading}", "", *body, ""]
        if heading == "Goals":
            for kind, told in PICTURES.items():
                if link := links.get(f"{stem}{kind}.png"):
                    lines += [f"![{told}]({link})", ""]
    return lines


def title(stem: str, run: Run) -> str:
    """Return what a run was made on, in words."""
    about = run.environment
    quick = ", a quick run" if about.get("quick") else ""
    if "gpu" in about:
        return f"{about['gpu']}, commit {str(about['commit'])[:7]}{quick}"
    if stem == "rehearsal":
        return "Rehearsal on a CPU of a run on a GPU: its times mean nothing"
    if "cpu" not in about:
        return stem
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"{about['cpu']}, {about['instructions']}, {threads}{quick}"


def goals_table(found: Sequence[Goal]) -> list[str]:
    def verdict(goal: Goal) -> str:
        if not goal.total:
            return "not measured"
        return "met" if goal.met == goal.total else f"**missed** in {goal.total - goal.met}"

    return table(
        ("goal", "", "cases", "farthest off", "where"),
        [(g.text, verdict(g), str(g.total), times(g.worst), g.where) for g in found],
    )


def cases(measured: Measured, part: str = "nearest", cache: str = "warm") -> list[Measurement]:
    """Return one of ours per case."""
    mine = select(measured, part=part, kind="ours", cache=cache, device="cpu")
    return list({case(one): one for one in mine}.values())


def _brute(measured: Measured) -> list[str]:
    """Each operator with keys of each type over the best peer: of that type and of any."""
    found: dict[str, dict[tuple[object, ...], tuple[Measurement, Measurement]]] = {}
    columns = []
    for part in OPERATORS:
        for name, ours in (("best", None), ("fp32", "fp32")):
            pairs = ours_and_best(measured, part, dtype=ours)
            columns.append(f"`{part}`, {name}")
            found[columns[-1]] = {case(mine): (mine, peer) for mine, peer in pairs}
    body = []
    for one in cases(measured):
        cells = [f"{one.keys:,} × {one.width}", str(one.batch), one.data]
        for column in columns:
            pair = found[column].get(case(one))
            cells.append("–" if pair is None else times(ratio(*pair)))
        best = found[columns[0]].get(case(one))
        body.append([*cells, "–" if best is None else f"{best[1].name}, {best[1].dtype}"])
    said = (
        "Times faster, warm caches. best: ours and the peers each with keys of the type they are "
        "fastest with; fp32: all with float32 keys. The peers only search: what a lookup tests "
        "and `adapt_` writes besides is not in their times."
    )
    return table(("keys, width", "B", "data", *columns, "best peer"), body, said)


def _each(measured: Measured) -> list[str]:
    """Our `nearest`, in its best type, over every peer."""
    pairs = {case(mine): mine for mine, _ in ours_and_best(measured, "nearest")}
    names = list(
        dict.fromkeys(
            (r.name, r.dtype) for r in select(measured, part="nearest", kind="peer", cache="warm")
        )
    )
    body = []
    for one in cases(measured):
        mine = pairs.get(case(one))
        if mine is None:
            continue
        cells = [f"{one.keys:,} × {one.width}", str(one.batch), one.data, mine.dtype]
        beside = {(p.name, p.dtype): p for p in contestants(measured, one, "peer")}
        for name in names:
            peer = beside.get(name)
            if peer is None or peer.median is None:
                cells.append("–")
            elif peer.answers == "wrong":
                cells.append(f"wrong ({times(ratio(mine, peer))})")
            else:
                cells.append(times(ratio(mine, peer)))
        body.append(cells)
    head = ("keys, width", "B", "data", "ours", *(f"{name}, {dtype}" for name, dtype in names))
    return table(head, body, "`nearest`, times faster, warm caches.")


def _shares(measured: Measured) -> list[str]:
    body = [
        (f"{one.keys:,} × {one.width}", one.data, one.dtype, f"{100 * share:.0f} %")
        for one, share in shares(measured)
    ]
    said = "`nearest`, one query, cold caches, beside the fastest way to read the same bytes."
    return table(("keys, width", "data", "type", "share"), body, said)


def _pruned(measured: Measured) -> list[str]:
    names = ("faiss IndexFlatL2", "read the keys", "lookup")
    beside = {
        name: {case(r): ratio(r, o) for m in (False, True) for r, o in pruned(measured, name, m)}
        for name in names
    }
    left = {case(r): r.median for r in select(measured, part="pruned", name="survivors")}
    body = []
    for one in select(measured, part="pruned", name="lookup, sketch", data="activations"):
        if one.median is None:
            continue
        share = left.get(case(one))
        cells = [f"{one.keys:,} × {one.width}", str(one.batch), f"{one.radius:g}"]
        cells += [times(beside[name].get(case(one))) for name in names]
        body.append([*cells, "–" if share is None else f"{share:.3g} %"])
    said = (
        "`lookup`, bfloat16 keys like activations, queries that miss: times faster than each. "
        "left: pairs of a query and a key that are scored or scanned."
    )
    head = ("keys, width", "B", "ε", "faiss IndexFlatL2", "reading", "without a sketch", "left")
    return table(head, body, said)


def _worst(measured: Measured) -> list[str]:
    body = [
        (f"{one.keys:,} × {one.width}", str(one.batch), one.data, f"{took:.2f}")
        for one, took in worst_cases(measured)
    ]
    return table(("keys, width", "B", "data", "time with, over time without"), body)


def _small(measured: Measured) -> list[str]:
    mine = select(measured, part="pruned", name="lookup, sketch", data="activations, few keys")
    other = {
        (case(r), r.dtype): r
        for r in select(measured, part="pruned", name="lookup", data="activations, few keys")
    }
    sizes = sorted({one.keys or 0 for one in mine})
    lines: dict[tuple[object, str], dict[int, str]] = {}
    for one in mine:
        took = ratio(other[case(one), one.dtype], one)
        lines.setdefault((one.width, one.dtype), {})[one.keys or 0] = f"{took:.2f}"
    return table(
        ("width", "type", *(f"{size:,}" for size in sizes)),
        [(str(w), t, *(at.get(size, "–") for size in sizes)) for (w, t), at in lines.items()],
        "Time with over time without, one query, ε = 1.",
    )


_OTHER = {
    "call": "What a call costs before any work",
    "model": "An edited model",
    "edits": "Edits",
    "growth": "Growth of a codebook",
}


def _other(measured: Measured, part: str) -> list[str]:
    body = [
        (
            one.name + (" (peer)" if one.kind == "peer" else ""),
            "" if one.keys is None else f"{one.keys:,}",
            one.data,
            _spread(one),
            one.unit,
            one.note,
        )
        for one in select(measured, part=part)
    ]
    return table(("what", "keys", "data", "median (p20 to p80)", "unit", ""), body)


def _spread(one: Measurement) -> str:
    if one.median is None:
        return "–"
    if one.p20 is None or one.p80 is None:
        return figure(one.median)
    return f"{figure(one.median)} ({figure(one.p20)} to {figure(one.p80)})"


def _times(measured: Measured) -> list[str]:
    """Milliseconds of the operators and their peers, a line per case and cache."""
    lines: list[str] = []
    for cache in ("warm", "cold"):
        names = list(
            dict.fromkeys(
                (r.part if r.kind == "ours" else r.name, r.dtype)
                for r in measured
                if r.part in OPERATORS and r.cache == cache and r.device == "cpu"
            )
        )
        body = []
        for one in cases(measured, cache=cache):
            cells = [f"{one.keys:,} × {one.width}", str(one.batch), one.data]
            beside = {
                (r.part if r.kind == "ours" else r.name, r.dtype): r
                for r in measured
                if r.part in OPERATORS and case(r) == case(one)
            }
            cells += [_cell(beside.get(name)) for name in names]
            body.append(cells)
        heads = [f"{name}, {dtype}" for name, dtype in names]
        said = f"Milliseconds, median, {cache} caches."
        lines += [*table(("keys, width", "B", "data", *heads), body, said), ""]
    return lines[:-1] if any(lines) else []


def _cell(one: Measurement | None) -> str:
    if one is None or one.median is None:
        return "–"
    return figure(one.median) + (" (wrong)" if one.answers == "wrong" else "")


def _missing(measured: Measured) -> list[str]:
    told: dict[str, list[str]] = {}
    for one in measured:
        if one.answers in ("absent", "wrong"):
            why = re.sub(r": took .*", ": too slow with fewer queries", one.note)
            why = re.sub(r"\d+ of \d+ indices", "indices", why)
            key = f"{one.name}, {one.dtype}: {why}" if one.dtype else f"{one.name}: {why}"
            told.setdefault(key, []).append(where(one) if one.keys else one.part)
    return [
        f"* {what} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
        for what, cases in told.items()
    ]


def _environment(run: Run) -> list[str]:
    def plain(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return table(("", ""), [(k, plain(v)) for k, v in run.environment.items() if v is not None])
