"""From finished units to figures: rows that a CSV holds, JSON, and EasyEdit's result keys.

A figure carries what it is (`metric`), how it was asked for (`protocol`), what was scored (`score`)
and over which edits (`among`): every number says its protocol.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import metrics
from .records import LOCALITY, EditRecord
from .run import Units

FREE, FORCED = "free", "forced"
_SCORES = (
    (FREE, "exact"),
    (FREE, "f1"),
    (FREE, "grace_f1"),
    (FORCED, "accuracy"),
    (FORCED, "perplexity"),
    (FORCED, "loss"),
)
PROTOCOLS = {
    FREE: "greedy generation with the KV cache, one prompt at a time; a causal model says as many "
    "tokens as the right answer has (eight at least where it is compared with the unedited one's), "
    "an encoder-decoder ends by itself",
    FORCED: "the right answer's own tokens before each of its tokens, the edit asked at the end of "
    "the prompt",
    "scope": "whether an edit answers the prompt, and whether it is the right one",
    "stream": "of the edits themselves",
}


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        method: whose.
        edits: after how many edits of the stream.
        metric: "ERR", "generality", "neighbour", ...
        protocol: of `PROTOCOLS`.
        score: what is averaged: "exact", "f1", "accuracy", "perplexity", "fires", ...
        among: "attempted" edits, or the "accepted" ones alone; "all" where no edit is concerned.
        value: None where there was nothing to average.
        count: how many were averaged.
    """

    method: str
    edits: int
    metric: str
    protocol: str
    score: str
    among: str
    value: float | None
    count: int


def figures_of(method: str, units: Units, records: int) -> list[Figure]:
    """Return every figure of one method's run, in a fixed order."""
    book = _Book(method, units)
    points = sorted({int(name.split("/")[1]) for name in units if name.startswith("err/")})
    found = list(book.upstream(0))
    for edits in points:
        found += book.at(edits)
    found += book.rest(records)
    return found


@dataclass
class _Book:
    method: str
    units: Units

    def _figure(
        self, edits: int, metric: str, protocol: str, score: str, among: str, values: Iterable[Any]
    ) -> Figure:
        there = [value for value in values if value is not None]
        value = metrics.mean(there)
        return Figure(self.method, edits, metric, protocol, score, among, value, len(there))

    def _scores(
        self, edits: int, metric: str, among: str, asked: Sequence[dict[str, Any]]
    ) -> Iterator[Figure]:
        for protocol, score in _SCORES:
            values = [_score(one, score) for one in asked]
            if any(value is not None for value in values) or not asked:
                yield self._figure(edits, metric, protocol, score, among, values)
        hits = any("right" in one for one in asked)
        yield from self._fires(edits, metric, among, asked, hits=hits)

    def _fires(
        self, edits: int, metric: str, among: str, asked: Sequence[dict[str, Any]], *, hits: bool
    ) -> Iterator[Figure]:
        if not any("fires" in one for one in asked):
            return
        fires = [one.get("fires") for one in asked]
        yield self._figure(edits, metric, "scope", "fires", among, fires)
        if hits:
            right = [bool(one.get("right")) for one in asked if "fires" in one]
            yield self._figure(edits, metric, "scope", "right edit", among, right)
            # What is lost elsewhere is lost by scope, what is lost here by decoding.
            said = [one["exact"] for one in asked if one.get("right")]
            yield self._figure(edits, metric, FREE, "exact where right", among, said)
        if any("said" in one for one in asked):
            said = [one.get("said") for one in asked]
            yield self._figure(edits, metric, FREE, "exact, right edit forced", among, said)

    def _edits(self, edits: int) -> dict[int, dict[str, Any]]:
        found = {i: self.units[f"edit/{i}"] for i in range(edits)}
        return {i: unit for i, unit in found.items() if not unit.get("skipped")}

    def _among(self, edits: dict[int, dict[str, Any]]) -> dict[str, list[int]]:
        accepted = [i for i, unit in edits.items() if unit["accepted"]]
        return {"attempted": list(edits), "accepted": accepted}

    def at(self, edits: int) -> Iterator[Figure]:
        """Give the figures of a measurement after `edits` edits of the stream."""
        made = self._edits(edits)
        for among, numbers in self._among(made).items():
            after = [made[i]["after"] for i in numbers]
            yield from self._scores(edits, "ES", among, after)
            past = [self.units.get(f"err/{edits}/{i}") for i in numbers]
            yield from self._scores(edits, "ERR", among, [one for one in past if one is not None])
        yield from self.upstream(edits)
        stream = {
            "accepted": [unit["accepted"] for unit in made.values()],
            "right before": [unit["before"]["exact"] for unit in made.values()],
            "seconds per edit": [unit["seconds"] for unit in made.values()],
            "steps per edit": [unit["steps"] for unit in made.values()],
        }
        for score, values in stream.items():
            yield self._figure(edits, "stream", "stream", score, "attempted", values)
        keys = self.units[f"edit/{edits - 1}"]["keys"]
        if keys is not None:
            accepted = sum(unit["accepted"] for unit in made.values())
            shared = metrics.edits_per_key(accepted, keys)
            for score, value in (("keys", float(keys)), ("edits per key", shared)):
                yield Figure(
                    self.method, edits, "stream", "stream", score, "accepted", value, accepted
                )

    def upstream(self, edits: int) -> Iterator[Figure]:
        """Give TRR after `edits` edits; 0: of the unedited model."""
        start = f"trr/{edits}/"
        asked = [unit for name, unit in self.units.items() if name.startswith(start)]
        if asked:
            yield from self._scores(edits, "TRR", "all", asked)
            yield from self._verified(edits, "TRR", asked)

    def rest(self, edits: int) -> Iterator[Figure]:
        """Give what was measured at the end alone."""
        made = self._edits(edits)
        names = {"paraphrase": "generality", "portability": "portability", "accurate": "ARR"}
        for among, numbers in self._among(made).items():
            rest = [self.units[f"rest/{i}"] for i in numbers if f"rest/{i}" in self.units]
            for kind, metric in names.items():
                asked = [one for unit in rest for one in unit[kind]]
                if asked:
                    yield from self._scores(edits, metric, among, asked)
            for kind in LOCALITY:
                asked = [one for unit in rest for one in unit[kind]]
                if not asked:
                    continue
                yield from self._fires(edits, kind, among, asked, hits=False)
                same = [one["same"] for one in asked]
                yield self._figure(edits, kind, FREE, "unchanged", among, same)
                agree = [one.get("agreement") for one in asked]
                if any(value is not None for value in agree):
                    yield self._figure(edits, kind, FORCED, "unchanged", among, agree)
                if among == "attempted":
                    yield from self._verified(edits, kind, asked)

    def _verified(
        self, edits: int, metric: str, asked: Sequence[dict[str, Any]]
    ) -> Iterator[Figure]:
        verified = [one["verified"] for one in asked if "verified" in one]
        if verified:
            score = "unchanged where none fires, verified"
            yield self._figure(edits, metric, FREE, score, "all", verified)


def _score(asked: dict[str, Any], score: str) -> float | None:
    if score == "perplexity":
        loss = asked.get("loss")
        return None if loss is None else metrics.perplexity([loss])
    found = asked.get(score)
    return None if found is None else float(found)


def misses_of(units: Units, records: int) -> dict[str, int]:
    """Count the rewordings by what became of them at the end; empty where nobody can tell.

    `produced`: the target was said. Else the edit was `refused`, or to blame are `scope` (the right
    edit did not answer; it would have said the target), `decoding` (it answered and did not say
    it), or `both`. `lucky` ones were produced although the right edit did not answer.
    """
    found = dict.fromkeys(("produced", "lucky", "refused", "scope", "decoding", "both"), 0)
    told = False
    for i in range(records):
        made = units[f"edit/{i}"]
        for one in units.get(f"rest/{i}", {}).get("paraphrase", []):
            told = told or "said" in one
            if one["exact"]:
                found["produced" if one.get("right") else "lucky"] += 1
            elif not made.get("accepted"):
                found["refused"] += 1
            elif one.get("right"):
                found["decoding"] += 1
            else:
                found["scope" if one.get("said") else "both"] += 1
    return found if told else {}


def ratios_of(units: Units, records: int) -> dict[str, list[float]]:
    """Return distance over radius of the nearest entry, by kind of prompt, at the end."""
    found: dict[str, list[float]] = {
        name: [] for name in ("edit", "paraphrase", *LOCALITY, "upstream")
    }
    for i in range(records):
        own, rest = units.get(f"err/{records}/{i}"), units.get(f"rest/{i}", {})
        found["edit"] += _ratios([] if own is None else [own])
        for kind in ("paraphrase", *LOCALITY):
            found[kind] += _ratios(rest.get(kind, []))
    start = f"trr/{records}/"
    found["upstream"] = _ratios([u for name, u in units.items() if name.startswith(start)])
    return {name: values for name, values in found.items() if values}


@dataclass(frozen=True)
class Growth:
    """How large a codebook was after so many edits of the stream, and how many it had accepted."""

    edits: int
    accepted: int
    keys: int


def growth_of(units: Units, records: int) -> list[Growth]:
    """Return the growth edit by edit; empty for a method without entries."""
    found, accepted = [], 0
    for i in range(records):
        edit = units[f"edit/{i}"]
        accepted += bool(edit.get("accepted"))
        if edit["keys"] is not None:
            found.append(Growth(i + 1, accepted, edit["keys"]))
    return found


def _ratios(asked: Iterable[dict[str, Any]]) -> list[float]:
    return [
        one["distance"] / one["radius"]
        for one in asked
        if one.get("distance") is not None and (one.get("radius") or 0) > 0
    ]


def headline(figures: Sequence[Figure], method: str) -> dict[str, float | None]:
    """Return the figures a person looks at first, those at the end, by a short name."""
    mine = [one for one in figures if one.method == method]
    last = max((one.edits for one in mine), default=0)
    wanted = {
        "accepted": ("stream", "accepted", "attempted"),
        "ES": ("ES", "exact", "attempted"),
        "ERR of accepted": ("ERR", "exact", "accepted"),
        "ERR": ("ERR", "exact", "attempted"),
        "ERR teacher-forced": ("ERR", "accuracy", "attempted"),
        "ERR perplexity": ("ERR", "perplexity", "attempted"),
        "TRR f1": ("TRR", "f1", "all"),
        "TRR perplexity": ("TRR", "perplexity", "all"),
        "ARR perplexity": ("ARR", "perplexity", "attempted"),
        "generality": ("generality", "exact", "attempted"),
        "generality teacher-forced": ("generality", "accuracy", "attempted"),
        "paraphrases that hit the right edit": ("generality", "right edit", "attempted"),
        "paraphrases said where it hits": ("generality", "exact where right", "attempted"),
        "paraphrases said, right edit forced": (
            "generality",
            "exact, right edit forced",
            "attempted",
        ),
        "portability": ("portability", "exact", "attempted"),
        "keys": ("stream", "keys", "accepted"),
        "steps per edit": ("stream", "steps per edit", "attempted"),
        "seconds per edit": ("stream", "seconds per edit", "attempted"),
    }
    for kind in LOCALITY:
        wanted[f"{kind} fires"] = (kind, "fires", "attempted")
        wanted[f"{kind} unchanged"] = (kind, "unchanged", "attempted")
    found: dict[str, float | None] = {}
    for name, key in wanted.items():
        there = (
            one.value
            for one in mine
            if one.edits == last and (one.metric, one.score, one.among) == key
        )
        if (value := next(there, None)) is not None:
            found[name] = value
    return found


def to_csv(figures: Iterable[Figure]) -> str:
    """Return the figures as CSV; a value that is not there is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(Figure)]
    writer.writerow(names)
    for figure in figures:
        row = asdict(figure)
        writer.writerow(["" if row[name] is None else row[name] for name in names])
    return out.getvalue()


def easyedit(units: Units, records: Sequence[EditRecord]) -> list[dict[str, Any]]:
    """Return the results in EasyEdit's form: `pre` and `post` with its keys, one dict per record.

    `rewrite_acc` and the others are teacher-forced token accuracies, as there; `pre` was measured
    right before the edit, `post` at the end of the stream. It holds the records' texts.
    """
    found = []
    for i, record in enumerate(records):
        edit = units[f"edit/{i}"]
        if edit.get("skipped"):
            continue
        own, rest = units[f"err/{len(records)}/{i}"], units.get(f"rest/{i}", {})
        post: dict[str, Any] = {"rewrite_acc": [own["accuracy"]]}
        if rest.get("paraphrase"):
            post["rephrase_acc"] = [one["accuracy"] for one in rest["paraphrase"]]
        post["locality"] = {
            f"{'neighborhood' if kind == 'neighbour' else kind}_acc": agree
            for kind in LOCALITY
            if (agree := [q["agreement"] for q in rest.get(kind, []) if "agreement" in q])
        }
        post["portability"] = {}
        for question, asked in zip(record.portability, rest.get("portability", []), strict=False):
            name = f"{question.group or 'one_hop'}_acc"
            post["portability"].setdefault(name, []).append(asked["accuracy"])
        found.append(
            {
                "case_id": record.id,
                "requested_rewrite": {
                    "prompt": record.prompt,
                    "target_new": record.target,
                    "ground_truth": record.old,
                    "subject": record.subject,
                },
                "time": edit["seconds"],
                "pre": {"rewrite_acc": [edit["before"]["accuracy"]], "portability": {}},
                "post": post,
            }
        )
    return found
