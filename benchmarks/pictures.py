"""Pictures of a run, from its measurements alone, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .goals import families, key_bytes, on_a_gpu, ours_and_best, roof, shares
from .measurements import Measured, Run, ratio, select

# Okabe and Ito's colours, which stay apart for the colour-blind; markers differ too.
BLUE, SKY, GREEN, ORANGE, RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
PINK, GREY, BROWN, BLACK = "#CC79A7", "#777777", "#8C6D31", "#000000"
OURS = {"bf16": ("nearest, bf16 keys", BLUE, "o"), "fp32": ("nearest, fp32 keys", SKY, "s")}
PEERS = {
    "torch product": (GREEN, "^"),
    "torch.compile": (PINK, "v"),
    "torch.cdist": (GREY, "x"),
    "faiss IndexFlatL2": (ORANGE, "D"),
    "faiss bf16 codes": (ORANGE, "d"),
    "usearch exact": (RED, "P"),
    "scikit-learn argmin": (BROWN, "*"),
    "PyKeOps argmin": (BLACK, "+"),
}
ON_A_GPU = {
    "triton": (BLUE, "o"),
    "cuda": (RED, "s"),
    "cuBLAS": (GREEN, "^"),
    "torch.compile": (PINK, "v"),
    "cdist": (GREY, "x"),
}
WIDTH_COLOURS = (BLUE, RED, GREEN, ORANGE)
WRONG = {"marker": "$?$", "ls": "", "ms": 8, "label": "wrong answers"}


def draw(run: Run, out: Path, stem: str) -> list[Path]:
    """Write `<stem><kind>.png` and `.svg` of every kind there are figures for; return the paths."""
    import matplotlib
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Callable[[Any, Measured], bool]] = {
        "": times_on_a_gpu,
        "-latency": latency,
        "-roofline": roofline,
        "-speedup": speedup,
        "-survivors": survivors,
    }
    written = []
    style = {"svg.hashsalt": stem, "font.size": 9, "axes.titlesize": 10}
    with matplotlib.rc_context(style):  # the same file from the same figures
        for kind, make in kinds.items():
            figure = Figure(layout="constrained")
            if not make(figure, run.measured):
                continue
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it is laid out: not again for every file
            for ending in ("png", "svg"):
                path = out / f"{stem}{kind}.{ending}"
                meta = {"Date": None} if ending == "svg" else {}
                figure.savefig(path, dpi=120, metadata=meta)
                written.append(path)
    return written


def _plot(axis: Any, points: Sequence[tuple[Any, Any]], **style: Any) -> None:
    """Draw a line, if there is a point."""
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _data(measured: Measured) -> str:
    return "activations" if select(measured, part="nearest", data="activations") else "isotropic"


def latency(figure: Any, measured: Measured) -> bool:
    """Time of a call against the number of keys: a panel per width and batch, and the roofline."""
    data = _data(measured)
    found = select(measured, part="nearest", data=data, cache="warm", device="cpu")
    found = sorted((r for r in found if r.median is not None), key=lambda r: r.keys or 0)
    batches = sorted({r.batch or 0 for r in found})
    widths = sorted({r.width or 0 for r in found})
    if not batches:
        return False
    figure.set_size_inches(1.2 + 3.4 * len(batches), 1.6 + 3.0 * len(widths))
    axes = figure.subplots(len(widths), len(batches), squeeze=False, sharex=True, sharey="row")
    bandwidth = next((r.median for r in select(measured, part="read")), None)
    for line, width in zip(axes, widths, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            here = select(found, width=width, batch=batch)
            _lines(axis, here)
            sizes = sorted({r.keys or 0 for r in here})
            for size, name, dash in ((2, "bf16", ":"), (4, "fp32", "-.")) if bandwidth else ():
                label = f"roofline, {name}: bytes / read bandwidth"
                roofs = [(n, n * width * size / bandwidth / 1e6) for n in sizes]
                _plot(axis, roofs, color="black", ls=dash, lw=1.2, label=label)
            axis.set(xscale="log", yscale="log", title=f"width {width}, B = {batch}")
            _plain(axis, "x", "y")
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("keys")
    for line in axes:
        line[0].set_ylabel("ms per call, median")
    _legend(figure, axes)
    figure.suptitle(
        f"nearest, keys like {data}, warm caches; p20 to p80 shaded for ours; "
        "the roofline is of memory, which a cache may beat"
    )
    return True


def _lines(axis: Any, here: Measured) -> None:
    for dtype, (label, colour, marker) in OURS.items():
        mine = select(here, dtype=dtype, kind="ours")
        x = [r.keys for r in mine]
        style = {"color": colour, "marker": marker, "lw": 2.2, "ms": 5, "label": label}
        axis.plot(x, [r.median for r in mine], **style, zorder=3)
        axis.fill_between(
            x, [r.p20 for r in mine], [r.p80 for r in mine], color=colour, alpha=0.2, lw=0
        )
    for name, (colour, marker) in PEERS.items():
        for dtype, dash in (("fp32", "-"), ("bf16", "--")):
            peers = select(here, name=name, dtype=dtype, kind="peer")
            style = {"marker": marker, "ls": dash, "lw": 1, "ms": 4, "label": f"{name}, {dtype}"}
            for wrong in (False, True):
                some = [(r.keys, r.median) for r in peers if (r.answers == "wrong") == wrong]
                _plot(axis, some, color=colour, **(WRONG if wrong else style))


def _plain(axis: Any, *which: str) -> None:
    """Label decades as plain numbers, such as 10k and 0.1."""
    for name in which:
        side = getattr(axis, f"{name}axis")
        side.set_major_formatter(_short)
        side.set_minor_formatter("")


def _short(value: float, _: int | None = None) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _legend(figure: Any, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    style = {"ncols": max(1, min(4, int(figure.get_size_inches()[0] // 2.6))), "fontsize": 8}
    where = "outside lower center"
    figure.legend(handles.values(), handles.keys(), loc=where, frameon=False, **style)


def roofline(figure: Any, measured: Measured) -> bool:
    """Share of the speed of merely reading the keys, against the number of keys, cold caches."""
    found = [(one, share) for one, share in shares(measured) if one.median is not None]
    datas = list(dict.fromkeys(one.data for one, _ in found))
    if not datas:
        return False
    figure.set_size_inches(1.0 + 4.0 * len(datas), 4.2)
    axes = figure.subplots(1, len(datas), squeeze=False, sharey=True)
    widths = sorted({one.width or 0 for one, _ in found})
    for axis, data in zip(axes[0], datas, strict=True):
        for width, colour in zip(widths, WIDTH_COLOURS, strict=False):
            for dtype, dash, marker in (("bf16", "-", "o"), ("fp32", "--", "s")):
                case = (data, width, dtype)
                here = [(m, s) for m, s in found if (m.data, m.width, m.dtype) == case]
                line = sorted((one.keys or 0, 100 * share) for one, share in here)
                style = {"ls": dash, "marker": marker, "ms": 5, "label": f"width {width}, {dtype}"}
                _plot(axis, line, color=colour, **style)
        axis.axhline(100, color="black", lw=1, ls=":")
        axis.set(xscale="log", xlabel="keys", title=f"keys: {data}")
        _plain(axis, "x")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(0, 105 * max(1.0, *(share for _, share in found)))
    axes[0][0].set_ylabel("% of the speed of reading the same bytes")
    _legend(figure, axes)
    figure.suptitle("nearest, one query, cold caches; dotted: as fast as a mere read")
    return True


def speedup(figure: Any, measured: Measured) -> bool:
    """Bars: times faster than the best right peer."""
    kinds = (
        ("nearest", "fp32", "nearest, all fp32", SKY),
        ("nearest", None, "nearest, each at its best", BLUE),
        ("lookup", None, "lookup, each at its best", GREEN),
    )
    data = _data(measured)
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for part, dtype, label, _ in kinds:
        for mine, peer in ours_and_best(measured, part, dtype=dtype):
            if mine.data == data and mine.device == "cpu":
                key = (mine.batch or 0, mine.width or 0, mine.keys or 0)
                found.setdefault(key, {})[label] = ratio(mine, peer)
    batches = sorted({key[0] for key in found})
    if not batches:
        return False
    figure.set_size_inches(1.0 + 3.6 * len(batches), 4.6)
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        keys = sorted(key for key in found if key[0] == batch)
        for number, (_, _, label, colour) in enumerate(kinds):
            heights = [found[key].get(label, math.nan) for key in keys]
            places = [i + (number - 1) * 0.27 for i in range(len(keys))]
            over = [h - 1 for h in heights]
            bars = axis.bar(places, over, 0.26, bottom=1, color=colour, label=label)
            for bar, height in zip(bars, heights, strict=True):
                if math.isfinite(height):
                    _above(axis, bar.get_x() + bar.get_width() / 2, height)
        labels = [f"{_short(n)} × {width}" for _, width, n in keys]
        axis.set_xticks(range(len(keys)), labels, rotation=40, ha="right")
        axis.axhline(1, color="black", lw=1)
        axis.set(yscale="log", title=f"B = {batch}")
        axis.margins(y=0.18)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (2, 3, 5) else "")
        axis.tick_params(axis="y", which="both", labelsize=8)
    axes[0][0].set_ylabel("times faster than the best right peer")
    _legend(figure, axes)
    figure.suptitle(f"Keys like {data}, warm caches; above 1: faster")
    return True


def _above(axis: Any, place: float, height: float) -> None:
    """Write a height at the end of its bar."""
    up = height >= 1
    style = {"ha": "center", "va": "bottom" if up else "top", "fontsize": 6, "rotation": 90}
    offset = {"xytext": (0, 2 if up else -2), "textcoords": "offset points"}
    axis.annotate(f"{height:.1f}", (place, height), **offset, **style)


def survivors(figure: Any, measured: Measured) -> bool:
    """What a sketch leaves, and the time with it and without, against the radius."""
    left = select(measured, part="pruned", name="survivors", batch=1)
    codebooks = sorted({(r.keys or 0, r.width or 0) for r in left})
    if not codebooks:
        return False
    figure.set_size_inches(10, 4.4)
    axes = figure.subplots(1, 2)
    for (n, width), colour in zip(codebooks, WIDTH_COLOURS, strict=False):
        what = f"{n:,} × {width}"
        line = sorted((r.radius, r.median) for r in left if (r.keys, r.width) == (n, width))
        floor = min((m for _, m in line if m), default=1e-4)
        some = [(x, m if m else math.nan) for x, m in line]
        _plot(axes[0], some, color=colour, marker="o", label=what)
        none = [(x, floor / 3) for x, m in line if not m]
        _plot(axes[0], none, color=colour, marker="v", mfc="none", ls="", label=f"{what}: none")
        case = {"part": "pruned", "batch": 1, "keys": n, "width": width, "data": "activations"}
        for name, dash, marker, told in (
            ("lookup, sketch", "-", "o", "with"),
            ("lookup", "--", "s", "without"),
        ):
            found = [r for r in select(measured, **case, name=name) if r.median is not None]
            timed = sorted((r.radius, r.median) for r in found)
            label = f"{what}, {told} a sketch"
            _plot(axes[1], timed, color=colour, ls=dash, marker=marker, label=label)
    axes[0].set(yscale="log", ylabel="pairs scored or scanned, %")
    axes[1].set(yscale="log", ylabel="ms per lookup, median")
    for axis in axes:
        _plain(axis, "y")
        axis.set_xlabel("radius ε of every entry")
        axis.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        axis.legend(**below, ncols=2, frameon=False, fontsize=8)
    figure.suptitle("lookup through a sketch: bf16 keys like activations, one query that misses")
    return True


def times_on_a_gpu(figure: Any, measured: Measured) -> bool:
    """Time of a lookup on a GPU against the bytes of bfloat16 keys: a panel per batch."""
    cases = [
        (next(iter(ours.values())), {**ours, **families(peers)})
        for ours, peers in on_a_gpu(measured)
    ]
    cases = [(one, found) for one, found in cases if (one.part, one.dtype) == ("lookup", "bf16")]
    cases.sort(key=lambda entry: key_bytes(entry[0]))
    batches = sorted({one.batch or 0 for one, _ in cases})
    if not batches:
        return False
    figure.set_size_inches(0.8 + 3.6 * len(batches), 4.4)
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        here = [(key_bytes(one), one, found) for one, found in cases if one.batch == batch]
        for name in dict.fromkeys(name for _, _, found in here for name in found):
            colour, marker = ON_A_GPU.get(name, (BLUE, "o"))
            line = [(size, found[name]) for size, _, found in here if name in found]
            width = 2.2 if line[0][1].kind == "ours" else 1
            style = {"marker": marker, "lw": width, "ms": 4, "label": name}
            for wrong in (False, True):
                some = [(x, m.median) for x, m in line if (m.answers == "wrong") == wrong]
                some = [point for point in some if point[1] is not None]
                _plot(axis, some, color=colour, **(WRONG if wrong else style))
        roofs = [(size, roof(measured, one)) for size, one, _ in here]
        if roofs[0][1]:
            _plot(axis, roofs, color="black", ls=":", lw=1.2, label="roof")
        axis.set(xscale="log", yscale="log", title=f"B = {batch}", xlabel="bytes of keys")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("µs per call, median")
    _legend(figure, axes)
    figure.suptitle("lookup, bf16 keys, replays of a graph, cold caches")
    return True
