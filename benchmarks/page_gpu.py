"""What the page says of a run on a GPU (or of a rehearsal of one)."""

from __future__ import annotations

from collections.abc import Sequence

from .goals import Named, beside_sketches, best, families, on_a_gpu, roof
from .markdown import figure, table, times
from .measurements import Measured, Measurement, case, ratio, select


def sections(measured: Measured) -> list[tuple[str, list[str]]]:
    """Return titles and lines; a title without lines is left out."""
    if all(one.device == "cpu" for one in measured):
        return []
    return [
        ("What the GPU can do", _ceilings(measured)),
        ("Beside each peer", _cold(measured)),
        ("Spread, warm caches, eager calls", _others(measured)),
        ("Through a sketch", _sketches(measured)),
        ("Forms that are off by default", _forms(measured)),
        ("Edits", _edits(measured)),
    ]


def _ceilings(measured: Measured) -> list[str]:
    body = [
        (f"{one.name} {one.dtype}".strip(), figure(one.median), one.unit, one.note)
        for one in select(measured, part="ceilings")
        if one.median is not None
    ]
    return table(("what", "median", "unit", ""), body)


def _case(one: Measurement) -> tuple[str, ...]:
    return f"`{one.part}`", f"{one.keys:,} × {one.width}", str(one.batch), one.dtype


_HEAD = ("", "keys, width", "B", "type")


def _names(pairs: Sequence[Named]) -> list[str]:
    return list(dict.fromkeys(name for found in pairs for name in found))


def _us(one: Measurement | None) -> str:
    if one is None or one.median is None:
        return "–"
    mark = " (wrong)" if one.answers == "wrong" else " ≈" if one.note else ""
    return f"{figure(one.median)}{mark}"


def _cold(measured: Measured) -> list[str]:
    cases = [(ours, families(peers)) for ours, peers in on_a_gpu(measured)]
    mine, others = _names([ours for ours, _ in cases]), _names([peers for _, peers in cases])
    body = []
    for ours, peers in cases:
        cells = [*_case(next(iter(ours.values()))), *(_us(ours.get(name)) for name in mine)]
        cells += [_us(peers.get(name)) for name in others]
        fastest, peer = best(ours), best(peers)
        for how in ("read", "copy"):
            least = None if fastest is None else roof(measured, fastest, how)
            median = fastest.median if fastest is not None else None
            cells.append(f"{100 * least / median:.0f} %" if least and median else "–")
        over = times(ratio(fastest, peer)) if fastest and peer else "–"
        cdist = peers.get("cdist")
        cells.append(f"{over} ({peer.name})" if peer else "–")
        timed = fastest and cdist and cdist.median is not None
        cells.append(times(ratio(fastest, cdist)) if timed else "–")  # type: ignore[arg-type]
        body.append(cells)
    head = (*_HEAD, *mine, *others, "of the roof", "of the copy roof", "best right peer", "cdist")
    said = (
        "µs per call, median, by replays of a graph, cold caches. ≈: the right keys, distances "
        "that round. The roof is the longer of moving the bytes once at the rate of a pass that "
        "only reads and of the multiplications; the copy roof has the rate of a copy in that "
        "place. The last two: times faster than the best right peer, and than cdist."
    )
    return table(head, body, said)


def _others(measured: Measured) -> list[str]:
    """Spread, warm caches and eager calls of ours; eager calls of the peers."""
    by_cache = {
        cache: {
            (one.part, one.dtype, case(one)[:-2]): (ours, families(peers))
            for ours, peers in on_a_gpu(measured, cache)
            for one in [next(iter(ours.values()))]
        }
        for cache in ("cold", "warm", "eager")
    }
    eager = by_cache["eager"].values()
    mine, others = _names([ours for ours, _ in eager]), _names([peers for _, peers in eager])
    body = []
    for key, (ours, _) in by_cache["cold"].items():
        cells = list(_case(next(iter(ours.values()))))
        warm, called = (by_cache[cache].get(key, ({}, {})) for cache in ("warm", "eager"))
        for name in mine:
            one = ours.get(name)
            cells.append("–" if one is None else f"{figure(one.p20)} to {figure(one.p80)}")
            cells += [_us(warm[0].get(name)), _us(called[0].get(name))]
        body.append([*cells, *(_us(called[1].get(name)) for name in others)])
    head = [f"{name} {what}" for name in mine for what in ("p20 to p80", "warm", "eager")]
    return table((*_HEAD, *head, *(f"{name} eager" for name in others)), body, "µs per call.")


def _sketches(measured: Measured) -> list[str]:
    warm = {
        (one.name, one.dtype, case(one)[:-2]): (one, other)
        for one, other in beside_sketches(measured, "warm")
    }
    left = {
        (one.name, one.dtype, case(one)[:-2]): one.note
        for one in select(measured, part="pruned", unit="%")
    }
    body = []
    for one, other in beside_sketches(measured):
        key = (one.name, one.dtype, case(one)[:-2])
        again = warm.get(key)
        cells = [f"{one.keys:,} × {one.width}", str(one.batch), one.dtype, one.data, other.name]
        cells += [figure(one.median), figure(other.median), f"{1 / ratio(one, other):.3g}"]
        cells += ["–", "–"] if again is None else [figure(m.median) for m in again]
        counted = (f"{other.name}, survivors", *key[1:])
        body.append([*cells, left.get(counted, "–")])
    head = ("keys, width", "B", "type", "data", "ours", "with", "without", "ratio")
    said = "`lookup`, µs per call, median, replays of a graph, cold caches for keys and sketches."
    return table((*head, "warm with", "warm without", "left"), body, said)


def _forms(measured: Measured) -> list[str]:
    """Every form of the CUDA kernels beside the default, which comes first in each case."""
    every: dict[tuple[object, ...], dict[str, Measurement]] = {}
    for one in select(measured, part="forms", cache="cold"):
        every.setdefault((one.dtype, case(one)), {})[one.name] = one
    names = _names(list(every.values()))
    body = []
    for found in every.values():
        usual = found.get("cuda")
        timed = {name: one for name, one in found.items() if one.counts and one.answers == "exact"}
        fastest = min(timed, key=lambda name: timed[name].median or 0.0, default="–")
        one = next(iter(found.values()))
        cells = [f"{one.keys:,} × {one.width}", str(one.batch), one.dtype, one.data]
        cells += [_us(found.get(name)) for name in names]
        gain = times(ratio(timed[fastest], usual)) if fastest in timed and usual else "–"
        body.append([*cells, fastest, gain])
    head = ("keys, width", "B", "type", "data", *names, "fastest", "over the default")
    said = (
        "`lookup`, µs per call, median, replays of a graph, cold caches. A form counts only where "
        "it is exact; csrc/cuda/forms.h and grace_kernels/triton/forms.py say what each is."
    )
    return table(head, body, said)


def _edits(measured: Measured) -> list[str]:
    body = [
        (one.name, str(one.batch), one.data, figure(one.median), one.note)
        for one in select(measured, part="edits")
        if one.median is not None
    ]
    said = "Edits per second: one by one, and all in one batch, on models of their own."
    return table(("", "edits", "model", "edits/s", ""), body, said)
