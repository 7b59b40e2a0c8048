"""Pictures of a run, as PNG and SVG, each with its data beside it as CSV.

matplotlib is needed here alone and imported when a picture is drawn. Colours are Okabe and Ito's,
which stay apart for the colour-blind (brown for their yellow, faint on white); markers differ too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .methods import KeyMap
from .results import Figure, Growth

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#000000",
)  # fmt: skip
MARKERS = "osD^vPX*"
GREY = "#777777"
_BINS = [i * 0.1 for i in range(41)]
_MOST_TARGETS = len(COLOURS) - 1
"""Targets that the map of keys gives a colour of their own."""


class _Sheet:
    """One picture: its figure and the rows of its data.

    Args:
        path: without an ending.
        head: the names of the data's columns.
    """

    def __init__(self, path: Path, head: Sequence[str]) -> None:
        self.path, self.head = path, head
        self.rows: list[Sequence[Any]] = []

    def save(self, figure: Any) -> list[Path]:
        import matplotlib

        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = [self.path.with_suffix(ending) for ending in (".png", ".svg", ".csv")]
        # The same file from the same data.
        with matplotlib.rc_context({"svg.hashsalt": self.path.name}):
            figure.savefig(written[0], dpi=120)
            figure.savefig(written[1], metadata={"Date": None})
        with open(written[2], "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.head)
            writer.writerows(self.rows)
        return written


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None
    return Canvas(figsize=(width, height), layout="constrained")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        # Of lines that coincide the first drawn shows at the sides.
        "linewidth": max(1.0, 3.4 - 0.4 * number),
        "clip_on": False,
    }


def stream(figures: Sequence[Figure], path: Path, score: str = "exact") -> list[Path]:
    """Draw ES, ERR and TRR against edits, a line for each method.

    Args:
        score: what is averaged: "exact", "f1", "accuracy" or "perplexity".
    """
    sheet = _Sheet(path, ["method", "edits", "metric", "score", "value", "count"])
    canvas = _figure(11, 3.6)
    axes = canvas.subplots(1, 3, sharey=score != "perplexity")
    methods = list(dict.fromkeys(one.method for one in figures))
    for axis, metric in zip(axes, ("ES", "ERR", "TRR"), strict=True):
        among = ("attempted", "all")
        for number, method in enumerate(methods):
            line = [
                one
                for one in figures
                if (one.method, one.metric, one.score) == (method, metric, score)
                and one.among in among
                and one.value is not None
            ]
            sheet.rows += [[o.method, o.edits, metric, score, o.value, o.count] for o in line]
            if line:
                axis.plot(
                    [o.edits for o in line],
                    [o.value for o in line],
                    label=method,
                    **_style(number),
                )
        axis.set(title=_TITLES[metric], xlabel="edits")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        if score != "perplexity":
            axis.set_ylim(-0.03, 1.03)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color=GREY)
    axes[0].set_ylabel(_SCORES.get(score, score))
    _legend(canvas, axes)
    return sheet.save(canvas)


_TITLES = {
    "ES": "ES: each edit right after it",
    "ERR": "ERR: all past edits",
    "TRR": "TRR: upstream data",
}
_SCORES = {
    "exact": "share produced freely",
    "f1": "F1 of free answers",
    "grace_f1": "F1 as published with GRACE",
    "accuracy": "token accuracy, teacher forced",
    "perplexity": "perplexity",
}


def _legend(canvas: Any, axes: Iterable[Any]) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    if found:
        canvas.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=8, frameon=False
        )


def growth(lines: Mapping[str, Sequence[Growth]], path: Path) -> list[Path]:
    """Draw keys, and edits per key, against accepted edits; a line for each method with keys."""
    sheet = _Sheet(path, ["method", "edits", "accepted", "keys"])
    canvas = _figure(8, 3.6)
    keys, shared = canvas.subplots(1, 2)
    most = max((one.accepted for line in lines.values() for one in line), default=1)
    keys.plot([0, most], [0, most], color=GREY, linestyle="--", zorder=5, label="one key per edit")
    for number, (method, line) in enumerate(lines.items()):
        sheet.rows += [[method, one.edits, one.accepted, one.keys] for one in line]
        style = {**_style(number), "markevery": max(1, len(line) // 8)}
        accepted = [one.accepted for one in line]
        keys.plot(accepted, [one.keys for one in line], label=method, **style)
        there = [one for one in line if one.keys]
        shared.plot(
            [one.accepted for one in there], [one.accepted / one.keys for one in there], **style
        )
    keys.set(title="Keys in the codebook", xlabel="accepted edits", ylabel="keys")
    shared.set(title="Edits per key", xlabel="accepted edits", ylabel="edits / key")
    shared.set_ylim(bottom=0)
    for axis in (keys, shared):
        axis.grid(alpha=0.3)
    _legend(canvas, (keys, shared))
    return sheet.save(canvas)


_GROUPS = (
    ("edit", "the edits' own prompts", True),
    ("paraphrase", "paraphrases", True),
    ("neighbour", "same relation, other subject", False),
    ("same_subject", "same subject, other relation", False),
    ("forgetfulness", "same relation, other object", False),
    ("unrelated", "unrelated", False),
    ("upstream", "upstream data", False),
)


def scope(ratios: Mapping[str, Sequence[float]], path: Path) -> list[Path]:
    """Draw how far prompts are from the nearest key, in units of its radius: 1 is where it fires.

    Above the line those that an edit should answer, below it those that none should: the picture
    for choosing the radius.

    Args:
        ratios: distance / radius by kind of prompt, as `results.ratios_of` gives them.
    """
    sheet = _Sheet(path, ["kind", "ratio"])
    there = [(name, label, ours) for name, label, ours in _GROUPS if ratios.get(name)]
    canvas = _figure(8, 0.9 + 1.1 * max(1, len(there)))
    axes = canvas.subplots(max(1, len(there)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, label, ours) in zip(axes, there, strict=False):
        values = ratios[name]
        sheet.rows += [[name, value] for value in values]
        shown = [min(value, _BINS[-1] - 0.01) for value in values]
        weights = [1 / len(shown)] * len(shown)
        axis.hist(shown, _BINS, weights=weights, color=COLOURS[0] if ours else COLOURS[1])
        axis.axvline(1.0, color="black", linewidth=1)
        inside = sum(value <= 1 for value in values) / len(values)
        axis.text(
            0.99, 0.9,
            f"{label} ({len(values)}): {inside:.1%} within the radius",
            ha="right", va="top", transform=axis.transAxes, fontsize=9,
        )  # fmt: skip
        axis.set_ylabel("share")
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])
    axes[-1].set_xlabel("distance to the nearest key / its radius (last bin: 3.9 and more)")
    canvas.suptitle("Which prompts an edit answers (blue: should, orange: should not)", fontsize=11)
    return sheet.save(canvas)


def key_map(found: KeyMap, path: Path) -> list[Path]:
    """Draw the keys in the plane of their two main directions, radii as circles, colour = target.

    Distances in the plane are at most the true ones: circles that overlap here need not overlap.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle

    sheet = _Sheet(path, ["x", "y", "radius", "target"])
    places = _plane(found.keys)
    sheet.rows = [
        [x, y, radius, label]
        for (x, y), radius, label in zip(places.tolist(), found.radii, found.labels, strict=True)
    ]
    often = sorted(set(found.labels), key=lambda one: (-found.labels.count(one), one))
    common = often[:_MOST_TARGETS]
    canvas = _figure(7.5, 6)
    axis = canvas.subplots()
    for number, target in enumerate([*common, None]):
        mine = [row for row in sheet.rows if (row[3] == target if target else row[3] not in common)]
        if not mine:
            continue
        style = _style(number) if target else {"color": GREY, "marker": ".", "markersize": 4}
        label = target if target else f"{len(often) - len(common)} other targets"
        xs, ys = [row[0] for row in mine], [row[1] for row in mine]
        axis.plot(xs, ys, linestyle="", label=_short(label), zorder=3, **style)
        circles = [Circle((row[0], row[1]), max(0.0, row[2])) for row in mine]
        colour = style["color"]
        axis.add_collection(
            PatchCollection(circles, facecolor=colour, edgecolor=colour, alpha=0.12)
        )
    axis.set_aspect("equal", adjustable="datalim")
    axis.autoscale_view()
    axis.set(
        xlabel="first main direction",
        ylabel="second main direction",
        title=f"{len(sheet.rows)} keys and their radii",
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return sheet.save(canvas)


def _short(text: str) -> str:
    # A dollar sign would begin mathematics.
    text = text.replace("$", r"\$")
    return text if len(text) <= 28 else text[:27] + "…"


def _plane(keys: Tensor) -> Tensor:
    """Return `[N, 2]`: the keys on the two directions in which they vary most."""
    centred = keys.double() - keys.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    # Either sign is right; the same picture every time needs one.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    placed = centred @ (directions * largest.sign()).T
    if placed.shape[1] < 2:
        placed = torch.nn.functional.pad(placed, (0, 2 - placed.shape[1]))
    return placed


def layers(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw a layer sweep.

    Args:
        rows: one for each layer: "layer", and the shares and figures of `results.headline`.
    """
    shares = {
        "accepted": "accepted",
        "ERR": "past edits produced (ERR)",
        "generality": "paraphrases produced",
        "neighbour fires": "neighbours fired",
        "same_subject fires": "same subject fired",
    }
    prices = {"steps per edit": "steps", "seconds per edit": "seconds"}
    names = [name for name in (*shares, *prices) if any(row.get(name) is not None for row in rows)]
    sheet = _Sheet(path, ["layer", *names])
    sheet.rows = [[row["layer"], *(row.get(name) for name in names)] for row in rows]
    canvas = _figure(9, 4.4)
    left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
    ticks = range(len(rows))
    for axis, wanted in ((left, shares), (right, prices)):
        for number, (name, label) in enumerate(wanted.items()):
            if name in names:
                values = [row.get(name) for row in rows]
                axis.plot(ticks, values, label=label, **_style(number))
        axis.set_xticks(ticks, _differing([str(row["layer"]) for row in rows]))
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
        axis.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2
        )
    left.set(title="What an edit does", ylabel="share", ylim=(-0.03, 1.03))
    right.set(title="What it costs", ylabel="per edit")
    right.set_ylim(bottom=0)
    return sheet.save(canvas)


def _differing(names: Sequence[str]) -> list[str]:
    """Return the parts of dotted names in which they differ: "24" of "model.layers.24.mlp"."""
    parts = [name.split(".") for name in names]
    if len({len(one) for one in parts}) > 1:
        return list(names)
    kept = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [".".join(one[i] for i in kept) if kept else ".".join(one) for one in parts]


def draw_all(
    out: Path,
    figures: Sequence[Figure],
    lines: Mapping[str, Sequence[Growth]],
    ratios: Mapping[str, Mapping[str, Sequence[float]]],
    maps: Mapping[str, KeyMap],
    swept: Sequence[Mapping[str, Any]],
    scores: Sequence[str] = ("exact",),
) -> list[Path]:
    """Draw every picture there is data for; return the files."""
    written: list[Path] = []
    for score in scores:
        if any(one.score == score for one in figures):
            written += stream(figures, out / f"stream-{score}", score)
    if any(lines.values()):
        written += growth({name: line for name, line in lines.items() if line}, out / "keys")
    for name, found in ratios.items():
        if found:
            written += scope(found, out / f"scope-{name}")
    for name, keys in maps.items():
        if len(keys.radii) > 1:
            written += key_map(keys, out / f"map-{name}")
    if swept:
        written += layers(swept, out / "layers")
    return written
