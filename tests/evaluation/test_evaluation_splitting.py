"""Splitting a folder of records: no subject on both sides, and relations that are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grace_edit.evaluation import DataError, NoDataError, load
from grace_edit.evaluation.splitting import Split, split

SUBJECTS = [f"Person{n:02d}" for n in range(20)]
RELATIONS = ("P1", "P2", "P3", "P36")


def nested(number: int, *, asks: bool) -> dict[str, Any]:
    """A record whose neighbours are about the next subjects of the same file, and a stranger."""
    subject, relation = SUBJECTS[number], RELATIONS[number % 4]
    raw = {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} " + relation,
            "relation_id": relation,
            "target_new": {"str": "new"},
            "target_true": {"str": "old"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"It rained. {subject} also {relation}"],
        "neighborhood_prompts": [
            *(f"{SUBJECTS[(number + n) % 20]} {relation}" for n in (1, 2, 3)),
            f"Stranger {relation}",
        ],
    }
    if asks:
        # What Wikidata calls P36, and something that nobody edits.
        name = ("capital", "hobby")[number // 4 % 2]
        asked = {"question": f"Where is {subject}?", "object": "here", "relation_id": name}
        raw["unrelated_relation"] = asked
    return raw


def flat(number: int, subject: str, wording: str) -> dict[str, Any]:
    return {
        "case_id": 100 + number,
        "prompt": f"{subject} {wording}",
        "target_new": "new",
        "subject": subject,
        "ground_truth": "old",
        "rephrase_prompt": f"{subject} still {wording}",
        "locality_prompt": f"{SUBJECTS[number % 20]} {wording}",
        "locality_ground_truth": "old",
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "counterfact.jsonl", [nested(n, asks=n < 12) for n in range(20)])
    # By prompt and by rewording its relation is known; the last one's is not.
    rows = [flat(0, "Alice", "P1"), flat(1, "Bob", "also P2"), flat(2, "Carol", "sings")]
    rows.append(flat(3, SUBJECTS[0].upper(), "P1"))
    write(folder / "counterfact_flat.jsonl", rows)
    asked = {"subject": "x", "src": "x?", "alt": "y", "loc": "who?", "loc_ans": "me"}
    write(folder / "zsre.jsonl", [asked, asked, {**asked, "loc": "what?"}])
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def subjects(rows: list[dict[str, Any]]) -> set[str]:
    return {row.get("requested_rewrite", row)["subject"].casefold() for row in rows}


def everything(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.iterdir()) for row in lines(path)]


@pytest.fixture
def parts(data: Path, tmp_path: Path) -> Split:
    return split(data, tmp_path / "out", edits=10)


def test_no_subject_and_no_prompt_of_an_edit_is_learned_from(parts: Split) -> None:
    edits, train = lines(parts.edits), everything(parts.train)
    own = subjects(edits)
    assert len(edits) == len(own) == 10
    assert not own & subjects(train)
    # Whatever their case, edited subjects stand nowhere in what is learned from.
    text = json.dumps(train).casefold()
    assert not any(subject in text for subject in own)
    # Nor do other edited subjects among an edit's neighbours; strangers and the others stay.
    for row in edits:
        neighbours = json.dumps(row["neighborhood_prompts"]).casefold()
        assert not any(subject in neighbours for subject in own)
        assert "stranger" in neighbours
    assert sum(len(row["neighborhood_prompts"]) for row in edits) > 10
    assert len(load(parts.edits).records) == 10


def test_one_half_of_the_questions_about_other_relations_is_learned_from(parts: Split) -> None:
    asking = [row for row in lines(parts.edits) if "unrelated_relation" in row]
    learned = [row for row in everything(parts.train) if "unrelated_relation" in row]
    assert (len(asking), len(learned)) == (6, 6)
    assert parts.counts["edits with a question about another relation"] == 6


def others_asked(rows: list[dict[str, Any]]) -> set[str]:
    asked = [row["unrelated_relation"] for row in rows if "unrelated_relation" in row]
    return {one["relation_id"] for one in asked}


def test_each_relation_is_never_seen_once(parts: Split) -> None:
    assert others_asked(everything(parts.train)) == {"capital", "hobby"}
    (only,) = [folder for relations, folder in parts.unseen if "P36" in relations]
    kept = {row["requested_rewrite"]["subject"] for row in lines(only / "counterfact.jsonl")}
    asking = [row for row in lines(parts.train / "counterfact.jsonl")
              if row["requested_rewrite"]["subject"] in kept]  # fmt: skip
    assert "capital" in others_asked(asking)  # or the case says little
    (first, one), (second, other) = parts.unseen
    assert sorted([*first, *second]) == sorted(RELATIONS)
    assert len(first) == len(second) == 2
    for relations, folder in ((first, one), (second, other)):
        rows = everything(folder)
        assert rows
        edits = [row["requested_rewrite"] for row in rows if "requested_rewrite" in row]
        asked = {edit["relation_id"] for edit in edits}
        assert asked
        beside = others_asked(rows)
        assert beside
        assert not ("P36" in relations and "capital" in beside)
        flat_ones = {row["subject"] for row in rows if "requested_rewrite" not in row}
        known = {"Alice": "P1", "Bob": "P2"}
        assert flat_ones == {name for name, number in known.items() if number not in relations}


def test_unrelated_questions_are_those_of_zsre_each_once(parts: Split) -> None:
    assert parts.unrelated is not None
    assert [row["prompt"] for row in lines(parts.unrelated)] == ["who?", "what?"]


def test_the_same_call_writes_the_same_and_another_seed_chooses_others(
    data: Path, tmp_path: Path, parts: Split
) -> None:
    before = parts.edits.read_bytes()
    split(data, tmp_path / "out", edits=10)
    assert parts.edits.read_bytes() == before
    assert split(data, tmp_path / "other", edits=10, seed=1).edits.read_bytes() != before


def test_a_folder_without_enough_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold subjects for 30 edits and others"):
        split(data, tmp_path / "out", edits=30)
    (data / "counterfact.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"counterfact.jsonl:1: must be a record that names"):
        split(data, tmp_path / "out", edits=10)
    (data / "counterfact.jsonl").unlink()
    with pytest.raises(NoDataError, match="no such file"):
        split(data, tmp_path / "out", edits=10)
