"""The page with its summary of the committed runs, and what writes it."""

from __future__ import annotations

from .goals import goals, ours_and_best, pruned
from .markdown import table, times
from .measurements import RIGHT, Measured, case, ratio, select
from .page import PAGE, Runs, cases, committed, page, title


def summary(runs: Runs) -> str:
    """Return what the page begins with."""
    if not runs:
        return "No run is committed: `make bench` measures on your machine."
    stem, run = runs[0]
    found = [goal for goal in goals(run.measured) if goal.total]
    met = sum(goal.met == goal.total for goal in found)
    lines = [
        f"Times faster than the best correct peer (the fastest of {_right_peers(run.measured)}), "
        f"one run of `make bench` on {title(stem, run)}, {_DATA[_data(run.measured)]}. {met} of "
        f"{len(found)} goals are met in all their cases; where the others are missed stands below.",
        "",
        *_brute(run.measured),
    ]
    if sketch := _pruned(run.measured):
        lines += [
            "",
            "Lookups through a sketch, bf16 keys, data like a real model's activations, times "
            "faster than faiss `IndexFlatL2`, and than merely reading the keys once; ε is the "
            "radius.",
            "",
            *sketch,
        ]
    return "\n".join(lines)


def whole(runs: Runs) -> str:
    """Return the page, its summary behind its first paragraph."""
    intro, _, rest = page(runs).partition("\n\n## ")
    return f"{intro}\n\n## In short\n\n{summary(runs)}\n" + (f"\n## {rest}" if rest else "")


_DATA = {
    "activations": "data like a real model's activations",
    "isotropic": "isotropic (normal) data",
}


def _data(measured: Measured) -> str:
    """Return the data that the summary's brute force was measured with."""
    return "activations" if select(measured, part="nearest", data="activations") else "isotropic"


def _right_peers(measured: Measured) -> str:
    """Return the names of the peers that can be the best one: those with right answers."""
    timed = select(measured, part="nearest", kind="peer", cache="warm")
    return ", ".join(dict.fromkeys(one.name for one in timed if one.answers in RIGHT))


def _brute(measured: Measured) -> list[str]:
    wanted = [("nearest", "fp32"), ("nearest", None), ("lookup", None)]
    found = [
        {case(mine): ratio(mine, peer) for mine, peer in ours_and_best(measured, part, dtype=dtype)}
        for part, dtype in wanted
    ]
    data = _data(measured)
    body = [
        (f"{one.keys:,} × {one.width}, {one.batch}", *(times(at.get(case(one))) for at in found))
        for one in cases(measured)
        if one.data == data and (one.keys or 0) in (10_000, 100_000)
    ]
    head = ("`nearest`, all fp32", "`nearest`, each at its best", "`lookup`, each at its best")
    return table(("keys, width, queries", *head), body)


def _pruned(measured: Measured) -> list[str]:
    found: dict[str, dict[float, str]] = {}
    reading = {case(r): ratio(r, o) for r, o in pruned(measured, "read the keys")}
    for one, other in pruned(measured, "faiss IndexFlatL2"):
        key = f"{one.keys:,} × {one.width}, {one.batch}"
        beside = f"{times(ratio(one, other))}, {times(reading.get(case(one)))}"
        found.setdefault(key, {})[one.radius or 0.0] = beside
    radii = sorted({radius for at in found.values() for radius in at})
    return table(
        ("keys, width, queries", *(f"ε = {radius:g}" for radius in radii)),
        [(key, *(at.get(radius, "–") for radius in radii)) for key, at in found.items()],
    )


def write() -> None:
    """Write the page from the committed runs."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(whole(committed()), encoding="utf-8")
