"""Columns of the report and their picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLUMNS = (
    *("triton", "cuda", "cpu", "reference"),
    *("cuBLAS", "torch.compile", "cdist", "flash-kmeans", "fastkmeans", "vector-quantize-pytorch"),
)
OURS = ("triton", "cuda", "cpu", "reference")
TITLES = {"triton": "Triton", "cuda": "CUDA", "cpu": "ours (CPU)", "reference": "reference"}


def time_of(column: dict[str, Any], kind: str = "cold") -> float | None:
    return column.get(kind, {}).get("us")


def peer(shape: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Return a column; of the two ways to write the product, the faster right one."""
    if name != "cuBLAS":
        return name, shape["columns"].get(name, {})
    both = {n: c for n, c in shape["columns"].items() if n.startswith("cuBLAS")}
    if not both:
        return name, {}
    best = min(
        both,
        key=lambda n: (both[n].get("verdict") != "right", time_of(both[n]) or math.inf),
    )
    return best, both[best]


def draw(measured: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw time against the size of the keys, a panel per batch; say if there was a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [shape for shape in measured if shape["op"] == "lookup" and shape["dtype"] == "bf16"]
    found = found or [shape for shape in measured if shape["op"] == "lookup"]
    batches = sorted({shape["B"] for shape in found})
    if not batches:
        return False
    colours = {
        "triton": "#0072b2",
        "cuda": "#d55e00",
        "cpu": "#0072b2",
        "reference": "#0072b2",
        "cuBLAS": "#009e73",
        "torch.compile": "#cc79a7",
        "cdist": "#888888",
        "flash-kmeans": "#e69f00",
        "fastkmeans": "#56b4e9",
        "vector-quantize-pytorch": "#8c6d31",
    }
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(3.7 * len(batches) + 0.6, 4.3), sharey=True, squeeze=False
    )
    points = 0
    for axis, batch in zip(axes[0], batches, strict=True):
        here = sorted((s for s in found if s["B"] == batch), key=lambda s: s["key bytes"])
        for name in COLUMNS:
            line = [(s["key bytes"], time_of(peer(s, name)[1]), peer(s, name)[1]) for s in here]
            line = [(x, y, c) for x, y, c in line if y]
            if not line:
                continue
            points += len(line)
            axis.plot(
                [x for x, _, _ in line],
                [y for _, y, _ in line],
                "o-",
                color=colours[name],
                markersize=4,
                linewidth=2 if name in OURS else 1.2,
                label=TITLES.get(name, name),
            )
            wrong = [(x, y) for x, y, c in line if not c.get("verdict", "").startswith("right")]
            if wrong:
                axis.plot(*zip(*wrong, strict=True), "rx", markersize=9, label="wrong answers")
        roof = [(s["key bytes"], s["roof us"]) for s in here if "roof us" in s]
        if roof:
            axis.plot(*zip(*roof, strict=True), "k:", linewidth=1.2, label="roof")
        axis.set(xscale="log", yscale="log", title=f"B = {batch}", xlabel="bytes of keys")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("µs per call, cold caches")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False
    )
    kinds = sorted({shape["dtype"] for shape in found})
    figure.suptitle(f"{title}\nlookup, {', '.join(kinds)} keys", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return points > 0
