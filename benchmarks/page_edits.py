"""docs/generality.md, from the committed study of edits alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .markdown import table
from .page import RESULTS, ROOT

PAGE = ROOT / "docs" / "generality.md"
STUDY = RESULTS / "edits-smollm2.json"
Rows = Sequence[dict[str, Any]]

_INTRO = """\
# Generality

An edit is made in one wording. Does it answer the others, and nothing else? This page says what
was measured and how. It is made by `make docs` from `benchmarks/results/edits-smollm2.json`, which
`make eval DATA=FOLDER` writes as `study.json` (figures alone; the records stay where they are).

## How it is measured

* The model is SmolLM2-135M-Instruct. The records are CounterFact's, edited one after the other,
  and everything is asked when all edits are in the codebook.
* "Produced" is free: greedy generation by the edited model, with the KV cache, one prompt at a
  time, as many tokens as the target has, and the text has to be the target. "Teacher-forced" is
  the share of target tokens that lead behind the right ones, the protocol of most published tables.
* A prompt "fires" if any edit answers it, a rewording "hits" if its own edit does. Where no edit
  fires the answer is the unedited model's by construction; one such prompt in twenty is generated
  anyway to see that it is so.
* The text map and its radius are learned from records of **other subjects**. Prompts about another
  subject that name an edited one are left out. For "relations never seen" the relations are split
  in halves, and what asks for one half is looked up by a map learned without its records.
* zsRE is another data set, of questions; nothing is learned from it.
* How maps are learned and where sentences are cut was chosen by looking at these files, at parts
  that the maps of the moment had not learned from. Records that nobody has looked at may give less.
* Most published tables take negatives from other subjects alone. Ours are also the same subject
  with another relation, and, as "harder prompts", wordings that other records use: questions
  of the edited relation, which should hit, and sentences and questions of other relations about the
  edited subject, which should not fire.
* A rewording that misses is generated once more with the right edit forced. So each miss is one of
  `scope` (the edit was not asked, and would have said the target), of `decoding` (it was asked and
  did not say it), or of `both`.
"""

_ANCHORS = """\
## What others report

| method | figure | protocol |
|---|---|---|
| GRACE, as others ran it | average of reliability, generality and locality .79; generality .08 \
(LLaMA-2-7B) | zsRE, T = 1000, 7–8B models, teacher-forced |
| WISE | the same average .77–.83 | the same |
| MEMOIR | the same average .93–.95 | the same |
| NeuralDB | generality .86 | CounterFact, 10,000 edits |

Models, data and protocols differ, so these are anchors, not a ranking.
"""


def page(study: dict[str, Any] | None) -> str:
    """Return the whole page; None: no study is committed."""
    lines = [_INTRO]
    if study is None:
        lines += ["No study is committed.", ""]
    else:
        lines += _tables(study)
    return "\n".join([*lines, _ANCHORS])


def write() -> None:
    """Write the page from the committed study."""
    found = json.loads(STUDY.read_text(encoding="utf-8")) if STUDY.exists() else None
    PAGE.write_text(page(found), encoding="utf-8")


def _tables(study: dict[str, Any]) -> list[str]:
    rows: Rows = study["rows"]
    counts = "; ".join(f"{count} {what}" for what, count in study["counts"].items())
    where = "; ".join(
        f"{e['date']}, {e['machine']}, {e['cpus']} processors, {e['threads']} threads, torch "
        f"{e['torch']}, transformers {e['transformers']}"
        for e in study["environments"]
    )
    lines = ["## What was measured", "", f"`{study['command']}` ({where}).", ""]
    lines += [f"Records: {counts}."]
    picture = STUDY.with_suffix(".png")
    if picture.exists():
        link = f"../benchmarks/results/{picture.name}"
        lines += ["", f"![distance over radius, by kind of prompt]({link})"]
    sections = (
        ("The stream of edits", "edits"),
        ("What became of the rewordings", "rewordings"),
        ("Scope alone, by dense part", "scope, "),
        ("Relations never seen", "relations never seen, "),
        ("zsRE, never learned from", "zsRE, "),
        ("Harder prompts", "harder prompts, "),
        ("The paper's settings, on the first edits", "the paper's settings"),
        ("Beside it, on the first edits", "beside it: "),
        ("Hallucination", "hallucination"),
    )
    for title, part in sections:
        found = _section(rows, part)
        if found:
            lines += ["", f"### {title}", "", *found]
    return [*lines, ""]


def _section(rows: Rows, part: str) -> list[str]:
    """Return a table of the rows whose part begins so, a column for each end of it."""
    mine = [row for row in rows if row["part"].startswith(part)]
    columns = list(dict.fromkeys(row["part"].removeprefix(part) for row in mine))
    names = list(dict.fromkeys(row["name"] for row in mine))
    cells = {(row["part"].removeprefix(part), row["name"]): row for row in mine}
    body = []
    for name in names:
        there = [cells.get((column, name)) for column in columns]
        reach = next((row["reach"] for row in there if row and row["reach"]), "")
        body.append([name, *map(_cell, there), reach])
    return table(["", *(column or "measured" for column in columns), "to reach"], body)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    value = row["value"]
    if value == int(value) and value > 1:
        return f"{value:,.0f}"
    if row["count"] and value in (0, 1):
        return f"all {row['count']:,}" if value else f"none of {row['count']:,}"
    return f"{value:.4g} of {row['count']:,}" if row["count"] else f"{value:.4g}"
