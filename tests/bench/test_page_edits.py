"""docs/generality.md is made from a study's rows, and is what the committed study gives."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import page_edits

ENVIRONMENT = {
    "date": "2026-01-02",
    "machine": "x86_64",
    "cpus": 2,
    "threads": 2,
    "torch": "2.0",
    "transformers": "5.0",
}


def row(part: str, name: str, value: float | None, count: int, reach: str = "") -> dict[str, Any]:
    return {"part": part, "name": name, "value": value, "count": count, "reach": reach}


STUDY = {
    "command": "grace eval data --out out",
    "counts": {"edits": 500},
    "environments": [ENVIRONMENT],
    "rows": [
        row("edits", "accepted", 0.984, 500, "≥ .97"),
        row("edits", "portability", None, 0),
        row("scope, tokens", "neighbours fired", 0.0061, 4868),
        row("scope, letters", "neighbours fired", 0.004, 4868),
        row("scope, letters", "rewordings", 0.91, 1000, "≥ .80"),
        row("beside it: grace", "seconds per edit", 1.25, 100),
        row("edits", "keys", 492.0, 492),
    ],
}


def test_rows_of_a_part_are_a_table_with_a_column_for_each_map_or_method() -> None:
    text = page_edits.page(STUDY)
    assert "`grace eval data --out out` (2026-01-02, x86_64, 2 processors" in text
    assert "| accepted | 0.984 of 500 | ≥ .97 |" in text
    assert "| keys | 492 |  |" in text
    assert "| portability | – |  |" in text
    assert "|  | tokens | letters | to reach |" in text
    assert "| neighbours fired | 0.0061 of 4,868 | 0.004 of 4,868 |  |" in text
    assert "| rewordings | – | 0.91 of 1,000 | ≥ .80 |" in text
    assert "| seconds per edit | 1.25 of 100 |  |" in text
    # Parts that were not run have no table.
    assert "### Hallucination" not in text
    assert "NeuralDB" in text


def test_the_committed_page_is_that_of_the_committed_study() -> None:
    found = json.loads(page_edits.STUDY.read_text()) if page_edits.STUDY.exists() else None
    assert page_edits.PAGE.read_text(encoding="utf-8") == page_edits.page(found)
