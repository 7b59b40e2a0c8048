"""The page and the README's figures, from rows alone: `python -m benchmarks.page` writes both."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from .goals import Goal, goals, ours_and_best, pruned, shares, where, worst_cases
from .markdown import figure, table, times
from .on_gpu import beside_peers, through_sketches
from .rows import OPERATORS, RIGHT, Row, Run, case, contestants, ratio, read, select

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- performance -->\n.*?<!-- /performance -->", re.DOTALL)
PICTURES = {
    "latency": "time of one call against the number of keys",
    "roofline": "share of the speed of reading the keys",
    "speedup": "times faster than the best right peer",
    "survivors": "what a sketch leaves, and the time, against the radius",
}
Runs = Sequence[tuple[str, Run]]


def committed(folder: Path = RESULTS) -> Runs:
    """Return the committed runs on CPUs, by name."""
    return [(file.stem, read(file)) for file in sorted(folder.glob("cpu-*.csv"))]


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
        "Made by `grace bench` (or `make bench`); this page by `make docs` from the CSV files, "
        f"every ratio from rows of one run. {about} says how it is measured, and what the columns "
        "mean.",
        "",
    ]
    if not runs:
        lines += ["No run is committed.", ""]
    for stem, run in runs:
        lines += _one(stem, run, {name: folder + name for name in drawn})
    return "\n".join(lines).rstrip() + "\n"


def _one(stem: str, run: Run, links: dict[str, str]) -> list[str]:
    rows = run.rows
    lines = [f"## {_title(stem, run)}", ""]
    sections = (
        ("Goals", _goals(goals(rows))),
        ("On the GPU, beside each peer", beside_peers(rows)),
        ("On the GPU, through a sketch", through_sketches(rows)),
        ("Brute force beside the best right peer", _brute(rows)),
        ("Brute force beside each peer", _each(rows)),
        ("Share of the speed of reading the keys", _shares(rows)),
        ("Through a sketch", _pruned(rows)),
        ("Where a sketch proves nothing", _worst(rows)),
        ("From how many keys on a sketch pays", _small(rows)),
        *((_OTHER[part], _other(rows, part)) for part in _OTHER),
        ("Times", _times(rows)),
        ("What is missing or wrong", _missing(rows)),
        ("Environment", _environment(run)),
    )
    for title, body in sections:
        if body:
            lines += [f"### {title}", "", *body, ""]
        if title == "Goals":
            for kind, told in PICTURES.items():
                if link := links.get(f"{stem}-{kind}.png"):
                    lines += [f"![{told}]({link})", ""]
    return lines


def _title(stem: str, run: Run) -> str:
    about = run.environment
    if "cpu" not in about:
        return stem
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    quick = ", a quick run" if about.get("quick") else ""
    return f"{about['cpu']}, {about['instructions']}, {threads}{quick}"


def _goals(found: Sequence[Goal]) -> list[str]:
    def verdict(goal: Goal) -> str:
        if not goal.total:
            return "not measured"
        return "met" if goal.met == goal.total else f"**missed** in {goal.total - goal.met}"

    return table(
        ("goal", "", "cases", "farthest off", "where"),
        [(g.text, verdict(g), str(g.total), times(g.worst), g.where) for g in found],
    )


def _cases(rows: Sequence[Row], part: str = "nearest", cache: str = "warm") -> list[Row]:
    """Return one row of ours per case."""
    mine = select(rows, part=part, kind="ours", cache=cache, device="cpu")
    return list({case(row): row for row in mine}.values())


def _brute(rows: Sequence[Row]) -> list[str]:
    """Each operator with keys of each type over the best peer: of that type and of any."""
    found: dict[str, dict[tuple[object, ...], tuple[Row, Row]]] = {}
    columns = []
    for part in OPERATORS:
        for name, ours in (("best", None), ("fp32", "fp32")):
            pairs = ours_and_best(rows, part, dtype=ours)
            columns.append(f"`{part}`, {name}")
            found[columns[-1]] = {case(mine): (mine, peer) for mine, peer in pairs}
    body = []
    for row in _cases(rows):
        cells = [f"{row.keys:,} × {row.width}", str(row.batch), row.data]
        for column in columns:
            pair = found[column].get(case(row))
            cells.append("–" if pair is None else times(ratio(*pair)))
        best = found[columns[0]].get(case(row))
        body.append([*cells, "–" if best is None else f"{best[1].name}, {best[1].dtype}"])
    made = table(("keys, width", "B", "data", *columns, "best peer"), body)
    said = (
        "Times faster, warm caches. best: ours and the peers each with keys of the type they are "
    )
    said += "fastest with; fp32: all with float32 keys. The peers only search: what a lookup tests "
    said += "and `adapt_` writes besides is not in their times."
    return [said, "", *made] if made else []


def _each(rows: Sequence[Row]) -> list[str]:
    """Our `nearest`, in its best type, over every peer."""
    pairs = {case(mine): mine for mine, _ in ours_and_best(rows, "nearest")}
    names = list(
        dict.fromkeys(
            (r.name, r.dtype) for r in select(rows, part="nearest", kind="peer", cache="warm")
        )
    )
    body = []
    for row in _cases(rows):
        mine = pairs.get(case(row))
        if mine is None:
            continue
        cells = [f"{row.keys:,} × {row.width}", str(row.batch), row.data, mine.dtype]
        beside = {(p.name, p.dtype): p for p in contestants(rows, row, "peer")}
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
    made = table(head, body)
    return ["`nearest`, times faster, warm caches.", "", *made] if made else []


def _shares(rows: Sequence[Row]) -> list[str]:
    body = [
        (f"{row.keys:,} × {row.width}", row.data, row.dtype, f"{100 * share:.0f} %")
        for row, share in shares(rows)
    ]
    made = table(("keys, width", "data", "type", "share"), body)
    said = "`nearest`, one query, cold caches, beside the fastest way to read the same bytes."
    return [said, "", *made] if made else []


def _pruned(rows: Sequence[Row]) -> list[str]:
    names = ("faiss IndexFlatL2", "read the keys", "lookup")
    beside = {
        name: {case(r): ratio(r, o) for m in (False, True) for r, o in pruned(rows, name, m)}
        for name in names
    }
    left = {case(r): r.median for r in select(rows, part="pruned", name="survivors")}
    body = []
    for row in select(rows, part="pruned", name="lookup, sketch", data="activations"):
        if row.median is None:
            continue
        share = left.get(case(row))
        body.append(
            [
                f"{row.keys:,} × {row.width}",
                str(row.batch),
                f"{row.radius:g}",
                *(times(beside[name].get(case(row))) for name in names),
                "–" if share is None else f"{share:.3g} %",
            ]
        )
    made = table(
        ("keys, width", "B", "ε", "faiss IndexFlatL2", "reading", "without a sketch", "left"), body
    )
    said = (
        "`lookup`, bfloat16 keys like activations, queries that miss: times faster than each. "
        "left: pairs of a query and a key that are scored or scanned."
    )
    return [said, "", *made] if made else []


def _worst(rows: Sequence[Row]) -> list[str]:
    body = [
        (f"{row.keys:,} × {row.width}", str(row.batch), row.data, f"{took:.2f}")
        for row, took in worst_cases(rows)
    ]
    return table(("keys, width", "B", "data", "time with, over time without"), body)


def _small(rows: Sequence[Row]) -> list[str]:
    mine = select(rows, part="pruned", name="lookup, sketch", data="activations, few keys")
    other = {
        (case(r), r.dtype): r
        for r in select(rows, part="pruned", name="lookup", data="activations, few keys")
    }
    sizes = sorted({row.keys or 0 for row in mine})
    lines: dict[tuple[object, str], dict[int, str]] = {}
    for row in mine:
        took = ratio(other[case(row), row.dtype], row)
        lines.setdefault((row.width, row.dtype), {})[row.keys or 0] = f"{took:.2f}"
    made = table(
        ("width", "type", *(f"{size:,}" for size in sizes)),
        [(str(w), t, *(at.get(size, "–") for size in sizes)) for (w, t), at in lines.items()],
    )
    return ["Time with over time without, one query, ε = 1.", "", *made] if made else []


_OTHER = {
    "call": "What a call costs before any work",
    "model": "An edited model",
    "edits": "Edits",
    "growth": "Growth of a codebook",
}


def _other(rows: Sequence[Row], part: str) -> list[str]:
    body = [
        (
            row.name + (" (peer)" if row.kind == "peer" else ""),
            "" if row.keys is None else f"{row.keys:,}",
            row.data,
            _spread(row),
            row.unit,
            row.note,
        )
        for row in select(rows, part=part)
    ]
    return table(("what", "keys", "data", "median (p20 to p80)", "unit", ""), body)


def _spread(row: Row) -> str:
    if row.median is None:
        return "–"
    if row.p20 is None or row.p80 is None:
        return figure(row.median)
    return f"{figure(row.median)} ({figure(row.p20)} to {figure(row.p80)})"


def _times(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of the operators and their peers, a line per case and cache."""
    lines: list[str] = []
    for cache in ("warm", "cold"):
        names = list(
            dict.fromkeys(
                (r.part if r.kind == "ours" else r.name, r.dtype)
                for r in rows
                if r.part in OPERATORS and r.cache == cache and r.device == "cpu"
            )
        )
        body = []
        for row in _cases(rows, cache=cache):
            cells = [f"{row.keys:,} × {row.width}", str(row.batch), row.data]
            beside = {
                (r.part if r.kind == "ours" else r.name, r.dtype): r
                for r in rows
                if r.part in OPERATORS and case(r) == case(row)
            }
            cells += [_cell(beside.get(name)) for name in names]
            body.append(cells)
        heads = [f"{name}, {dtype}" for name, dtype in names]
        made = table(("keys, width", "B", "data", *heads), body)
        if made:
            lines += [f"Milliseconds, median, {cache} caches.", "", *made, ""]
    return lines[:-1]


def _cell(row: Row | None) -> str:
    if row is None or row.median is None:
        return "–"
    return figure(row.median) + (" (wrong)" if row.answers == "wrong" else "")


def _missing(rows: Sequence[Row]) -> list[str]:
    told: dict[str, list[str]] = {}
    for row in rows:
        if row.answers in ("absent", "wrong"):
            why = re.sub(r": took .*", ": too slow with fewer queries", row.note)
            why = re.sub(r"\d+ of \d+ indices", "indices", why)
            key = f"{row.name}, {row.dtype}: {why}" if row.dtype else f"{row.name}: {why}"
            told.setdefault(key, []).append(where(row) if row.keys else row.part)
    return [
        f"* {what} ({cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''})"
        for what, cases in told.items()
    ]


def _environment(run: Run) -> list[str]:
    def plain(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return table(("", ""), [(k, plain(v)) for k, v in run.environment.items() if v is not None])


def block(runs: Runs) -> str:
    """Return what the README quotes, between its markers."""
    lines = ["<!-- performance -->"]
    if not runs:
        lines.append("No run is committed: `make bench` measures on your machine.")
    else:
        stem, run = runs[0]
        found = [goal for goal in goals(run.rows) if goal.total]
        met = sum(goal.met == goal.total for goal in found)
        lines += [
            f"Times faster than the best correct peer (the fastest of {_peers(run.rows)}), one run "
            f"of `make bench` on {_title(stem, run)}, {_DATA[_readme_data(run.rows)]}, "
            f"[every figure](docs/performance.md). {met} of {len(found)} goals are met in all "
            "their cases; the page says where the others are missed.",
            "",
            *_readme_brute(run.rows),
        ]
        if sketch := _readme_pruned(run.rows):
            lines += [
                "",
                "Lookups through a sketch, bf16 keys, data like a real model's activations, times "
                "faster than faiss `IndexFlatL2`, and than merely reading the keys once; ε is the "
                "radius.",
                "",
                *sketch,
            ]
    return "\n".join([*lines, "<!-- /performance -->"])


_DATA = {
    "activations": "data like a real model's activations",
    "isotropic": "isotropic (normal) data",
}


def _readme_data(rows: Sequence[Row]) -> str:
    """Return the data that the README's brute force was measured with."""
    return "activations" if select(rows, part="nearest", data="activations") else "isotropic"


def _peers(rows: Sequence[Row]) -> str:
    """Return the names of the peers that can be the best one: those with right answers."""
    timed = select(rows, part="nearest", kind="peer", cache="warm")
    return ", ".join(dict.fromkeys(row.name for row in timed if row.answers in RIGHT))


def _readme_brute(rows: Sequence[Row]) -> list[str]:
    wanted = [("nearest", "fp32"), ("nearest", None), ("lookup", None)]
    found = [
        {case(mine): ratio(mine, peer) for mine, peer in ours_and_best(rows, part, dtype=dtype)}
        for part, dtype in wanted
    ]
    data = _readme_data(rows)
    body = [
        (f"{row.keys:,} × {row.width}, {row.batch}", *(times(at.get(case(row))) for at in found))
        for row in _cases(rows)
        if row.data == data and (row.keys or 0) in (10_000, 100_000)
    ]
    head = ("`nearest`, all fp32", "`nearest`, each at its best", "`lookup`, each at its best")
    return table(("keys, width, queries", *head), body)


def _readme_pruned(rows: Sequence[Row]) -> list[str]:
    found: dict[str, dict[float, str]] = {}
    reading = {case(r): ratio(r, o) for r, o in pruned(rows, "read the keys")}
    for row, other in pruned(rows, "faiss IndexFlatL2"):
        key = f"{row.keys:,} × {row.width}, {row.batch}"
        beside = f"{times(ratio(row, other))}, {times(reading.get(case(row)))}"
        found.setdefault(key, {})[row.radius or 0.0] = beside
    radii = sorted({radius for at in found.values() for radius in at})
    return table(
        ("keys, width, queries", *(f"ε = {radius:g}" for radius in radii)),
        [(key, *(at.get(radius, "–") for radius in radii)) for key, at in found.items()],
    )


def main() -> None:
    """Write the page and the README's block from the committed runs."""
    runs = committed()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(runs))
    text = README.read_text()
    README.write_text(BLOCK.sub(lambda _: block(runs), text))


if __name__ == "__main__":
    main()
