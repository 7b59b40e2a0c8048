"""The demo's picture: what the edits did, in four panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw the figures of a run to a PNG and return its path."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    rows = result["topics"]["rows"]
    main = next(row for row in reversed(rows) if row["method"] == "GRACE")
    _stream(axes[0, 0], main)
    _ratios(axes[0, 1], main)
    _methods(axes[1, 0], rows, result["topics"]["trr_before"])
    _facts(axes[1, 1], result["facts"])
    figure.suptitle("GRACE edits of a sentence classifier (1) and a language model (2)")
    figure.savefig(path, dpi=120)
    return path


def _stream(axis: Any, row: dict[str, Any]) -> None:
    edits = [point["edits"] for point in row["curve"]]
    axis.plot(edits, edits, color=GREY, linestyle="--", label="one key per edit")
    axis.plot(edits, [point["keys"] for point in row["curve"]], color=BLUE, label="keys")
    axis.set(
        xlabel="edits of the stream",
        ylabel="keys in the codebook",
        title=f"1. Keys grow slower than edits (ε = {row['radius']:.3g})",
    )
    axis.legend(frameon=False)


def _ratios(axis: Any, row: dict[str, Any]) -> None:
    bins = [i * 0.1 for i in range(41)]
    for name, colour in (("unrelated", GREY), ("paraphrase", ORANGE)):
        values = [min(ratio, 3.99) for ratio in row["ratios"][name]]
        weights = [1 / len(values)] * len(values)
        label = f"{name} sentences ({len(values)})"
        axis.hist(values, bins, weights=weights, color=colour, alpha=0.75, label=label)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_ylim(top=1.15 * axis.get_ylim()[1])
    axis.text(0.96, 0.97, "answered", ha="right", va="top", transform=axis.get_xaxis_transform())
    axis.set(
        xlabel="distance to the nearest key / its radius (last bin: 3.9 and more)",
        ylabel="share",
        title="1. Who falls inside a ball: held-out paraphrases, others",
    )
    axis.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.95, 1.0))


def _methods(axis: Any, rows: list[dict[str, Any]], trr: float) -> None:
    ordered = sorted(rows, key=lambda row: (row["radius"] is None, row["radius"] or 0.0))
    measures = {
        "ERR": "err",
        "TRR": "trr",
        "paraphrases\nthat take the edit": "paraphrase_takes",
        "false fires": "false_fires",
    }
    colours = [BLUE, GREEN, "#56B4E9", ORANGE]
    width = 0.8 / len(ordered)
    for number, (row, colour) in enumerate(zip(ordered, colours, strict=False)):
        name = row["method"] + (f", ε = {row['radius']:.3g}" if row["radius"] else "")
        known = [(i, row[f]) for i, f in enumerate(measures.values()) if row.get(f) is not None]
        places = [i + (number - (len(ordered) - 1) / 2) * width for i, _ in known]
        bars = axis.bar(places, [v for _, v in known], width, color=colour, label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(trr, color="black", linewidth=1, linestyle=":")
    axis.text(3.3, trr + 0.01, "TRR unedited", ha="right", va="bottom", fontsize=8)
    axis.set_xticks(range(len(measures)), list(measures))
    axis.set(ylim=(0, 1.3), ylabel="share", title="1. At three radii, beside fine-tuning")
    axis.legend(frameon=False, ncols=2, fontsize=8, loc="upper left")


def _facts(axis: Any, facts: dict[str, Any]) -> None:
    shares = {
        "changed facts\nanswered": facts["answered_after"] / facts["attempted"],
        "their\nparaphrases": facts["paraphrases_take"] / facts["paraphrases"],
        "other facts\nas before": facts["unchanged"] / facts["untouched"],
        "other facts, other\nwords, as before": facts["unchanged_paraphrases"]
        / facts["untouched_paraphrases"],
    }
    bars = axis.bar(list(shares), list(shares.values()), color=[BLUE, ORANGE, GREEN, GREEN])
    axis.bar_label(bars, fmt="%.3f")
    axis.set(
        ylim=(0, 1.15),
        ylabel="share",
        title=f"2. {facts['attempted']} of {facts['facts']} facts changed, free generation",
    )
