"""Lines of a study's tables, from what runs and questions about scope found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import metrics


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Args:
        part: of the study, and which method or map.
        name: what was measured.
        value, count: the mean, and of how many; None: there was nothing to average.
        reach: what it should be, if anything was set.
    """

    part: str
    name: str
    value: float | None
    count: int
    reach: str = ""


def row_of(part: str, name: str, found: Sequence[bool], reach: str = "") -> Row:
    """Return the share of what was found."""
    return Row(part, name, metrics.mean(found), len(found), reach)


def together(one: Row, other: Row) -> Row:
    """Return the mean over what two rows averaged."""
    there = [(row.value, row.count) for row in (one, other) if row.value is not None]
    count = sum(count for _, count in there)
    value = sum(value * count for value, count in there) / count if count else None
    return replace(one, value=value, count=count)


# Metric, score, among, what the table calls it, and what was to be reached
_Wanted = tuple[str, str, str, str, str]
END: tuple[_Wanted, ...] = (
    ("stream", "accepted", "attempted", "accepted", "≥ .97"),
    ("ES", "exact", "accepted", "ES of accepted", ""),
    ("ERR", "exact", "accepted", "ERR of accepted", "1.00"),
    ("ERR", "accuracy", "attempted", "ERR, teacher-forced", ""),
    ("generality", "exact", "attempted", "generality: the target is produced", "≥ .88"),
    ("generality", "accuracy", "attempted", "generality, teacher-forced", ""),
    ("generality", "right edit", "attempted", "rewordings that hit their own edit", ""),
    ("generality", "exact where right", "accepted", "target produced where it hits", ""),
    ("generality", "exact, right edit forced", "accepted", "target produced, hit forced", ""),
    ("neighbour", "fires", "attempted", "neighbours fired", "≤ .01"),
    ("neighbour", "unchanged", "attempted", "answers to neighbours unchanged", "≥ .98"),
    ("same_subject", "fires", "attempted", "same subject, other relation, fired", "≤ .05"),
    ("same_subject", "unchanged", "attempted", "answers to those unchanged", ""),
    ("portability", "exact", "attempted", "portability", ""),
    ("TRR", "fires", "all", "unrelated questions fired", "≤ .001"),
    ("TRR", "f1", "all", "F1 on unrelated questions", ""),
    ("stream", "keys", "accepted", "keys", ""),
    ("stream", "steps per edit", "attempted", "steps per edit", ""),
    ("stream", "seconds per edit", "attempted", "seconds per edit", ""),
)
BESIDE = tuple(
    (metric, score, among, name, "")
    for metric, score, among, name, _ in END
    if name not in ("keys", "ES of accepted")
)
PASSAGES_WANTED: tuple[_Wanted, ...] = (
    ("stream", "accepted", "attempted", "accepted", ""),
    ("ES", "perplexity", "attempted", "ES, perplexity", ""),
    ("ERR", "perplexity", "attempted", "ERR, perplexity", ""),
    ("ERR", "perplexity", "accepted", "ERR, perplexity, of accepted", ""),
    ("TRR", "perplexity", "all", "TRR, perplexity", ""),
    ("ARR", "perplexity", "attempted", "ARR, perplexity", ""),
    ("ARR", "fires", "attempted", "sentences that no edit changes fired", ""),
    ("stream", "seconds per edit", "attempted", "seconds per edit", ""),
)


def rows_of(
    results: dict[str, Any], part: str, method: str, wanted: Sequence[_Wanted]
) -> Iterator[Row]:
    """Give the figures at the end of a run; TRR's also before it."""
    mine = [one for one in results["figures"] if one["method"] == method]
    last = max(one["edits"] for one in mine)
    for metric, score, among, name, reach in wanted:
        for edits in (0, last) if metric == "TRR" and score != "fires" else (last,):
            there = [
                one
                for one in mine
                if (one["edits"], one["metric"], one["score"], one["among"])
                == (edits, metric, score, among)
                and one["protocol"] != ("forced" if score == "unchanged" else "")
            ]
            for one in there[:1]:
                before = "" if edits else ", before any edit"
                yield Row(part, name + before, one["value"], one["count"], reach)
