"""The demo's picture: what the edits did, in five panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .corrections import NEAR, WORDINGS

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
STATES = {
    "corrected": ("#5fc4a6", "✓"),
    "right before and after": ("#d5efe6", "✓"),
    "still wrong": ("#f3c98b", "✗"),
    "no longer right": ("#d55e00", "✗"),
    "as before": ("#e6e6e6", "="),
    "hit, same answer": ("#cfc5e6", "="),
    "changed by an edit": ("#d55e00", "!"),
}
"""What can become of a prompt: colour and mark."""
COLUMNS = {
    "edit": "as edited",
    "cloze": "other\nwords",
    "question": "question",
    "chat": "in a chat",
    "neighbour": "another\nsubject",
    "same subject": "same subject,\nother question",
}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw the figures of a run to a PNG and return its path."""
    figure = Figure(figsize=(12, 14), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    upper, lower = parts
    axes = upper.subplots(2, 2)
    rows = result["topics"]["rows"]
    main = next(row for row in reversed(rows) if row["method"] == "GRACE")
    _stream(axes[0, 0], main)
    _ratios(axes[0, 1], main)
    _methods(axes[1, 0], rows, result["topics"]["trr_before"])
    _distances(axes[1, 1], result["corrections"]["rows"])
    _answers(lower.subplots(), result["corrections"]["rows"])
    figure.suptitle("GRACE edits of a sentence classifier (1) and of SmolLM2-135M-Instruct (2)")
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


def _distances(axis: Any, rows: list[dict[str, Any]]) -> None:
    kinds = {
        "as edited": (("edit",), BLUE),
        "in other words": (WORDINGS, GREEN),
        "same subject,\nanother question": (("same subject",), ORANGE),
        "another subject": (("neighbour",), GREY),
    }
    for height, (roles, colour) in enumerate(kinds.values()):
        ratios = [row["distance"] / row["radius"] for row in rows if row["role"] in roles]
        # Spread by their order, so that equal ones can be told apart.
        places = [height + 0.5 * ((i * 7 % 11) / 10 - 0.5) for i in range(len(ratios))]
        axis.scatter(ratios, places, s=18, color=colour, alpha=0.8, linewidths=0)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.text(0.97, 1.01, "answered", ha="right", va="bottom", transform=_across(axis))
    axis.set_yticks(range(len(kinds)), list(kinds))
    axis.set_xlim(left=-0.05)
    axis.set_title("2. How near the nearest edit is", pad=18)
    axis.set_xlabel("distance to the nearest key / its radius")


def _across(axis: Any) -> Any:
    return axis.get_xaxis_transform()


def _answers(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a square for every prompt: errors from top to bottom, ways to ask from left to right."""
    edits = [row for row in rows if row["role"] == "edit"]
    columns = [row["role"] for row in rows if row["fact"] == edits[0]["fact"]]
    states = [_states([row for row in rows if row["fact"] == edit["fact"]]) for edit in edits]
    for down, line in enumerate(states):
        for across, state in enumerate(line):
            colour, mark = STATES[state]
            square = Rectangle((across - 0.46, down - 0.42), 0.92, 0.84, color=colour, linewidth=0)
            axis.add_patch(square)
            axis.text(across, down, mark, ha="center", va="center", fontsize=9)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(edits) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), [COLUMNS[role] for role in columns], fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(
        range(len(edits)), [f"{edit['prompt']} {edit['wanted']}" for edit in edits], fontsize=8
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("2. What became of every prompt, answered freely before and after all edits")
    used = [state for state in STATES if any(state in line for line in states)]
    squares = [Patch(color=STATES[state][0]) for state in used]
    names = [f"{STATES[state][1]} {state}".strip() for state in used]
    axis.legend(
        squares,
        names,
        ncols=3,
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
    )


def _states(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        if row["role"] in NEAR:
            hit = "hit, same answer" if row["unchanged"] else "changed by an edit"
            found.append(hit if row["fired"] else "as before")
        elif row["right_before"]:
            found.append("right before and after" if row["right_after"] else "no longer right")
        else:
            found.append("corrected" if row["right_after"] else "still wrong")
    return found
