"""From a file of records to a saved map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grace_edit.evaluation.loading import DataError, load
from grace_edit.evaluation.tuning import facts_of, measured_on, tune
from grace_edit.keys.augment import Fact
from grace_edit.keys.learning import Recipe
from grace_edit.keys.text_keys import TextKeys
from grace_edit.keys.text_map import TextMap
from keys_lab import small_world, table

RECIPE = Recipe(meaning_width=16, lexical_width=64, steps=40, lr=2e-2, role_steps=100, practice=0)


_NUMBERS = {
    **{"capital": "P36", "language": "P37", "leader": "P6"},
    **{"birth": "P19", "work": "P800", "play": "P1303"},
}


def _nested(fact: Fact, number: int) -> dict[str, Any]:
    """A record as CounterFact has it; it names other relations in words, its own by number."""
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": fact.prompt.replace(fact.subject, "{}"),
            "relation_id": _NUMBERS[fact.relation],
            "target_new": {"str": "x"},
            "target_true": {"str": "y"},
            "subject": fact.subject,
        },
        "paraphrase_prompts": list(fact.rewordings),
        "neighborhood_prompts": list(fact.neighbours),
        "unrelated_relation": {
            "relation_id": fact.other_relations[0],
            "object": "z",
            "question": fact.others[0],
        },
    }


def _written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [_nested(fact, i) for i, fact in enumerate(small_world())]
    return _written(tmp_path_factory.mktemp("data") / "facts.jsonl", records)


def test_facts_have_one_name_for_a_relation(data: Path) -> None:
    facts = facts_of(load(data).records)
    assert len(facts) == len(small_world())
    asked = [fact for fact in facts if fact.other_relations == ("P36",)]
    assert asked, "a relation asked in words has the number it is edited under"
    assert all("capital" in fact.others[0] for fact in asked)
    assert {fact.relation for fact in facts} == set(_NUMBERS.values())
    assert facts[0].rewordings == small_world()[0].rewordings


def test_records_that_do_not_name_their_subject_are_left_out(tmp_path: Path) -> None:
    flat = {
        "prompt": "The capital of Norway is",
        "target_new": "x",
        "rephrase_prompt": "Norway's capital is",
        "locality_prompt": "The capital of Peru is",
        "locality_ground_truth": "y",
    }
    path = _written(tmp_path / "flat.jsonl", [{**flat, "subject": "Norway"}, flat])
    (fact,) = facts_of(load(path, "counterfact").records)
    assert fact == Fact(
        "The capital of Norway is", "Norway", ("Norway's capital is",), ("The capital of Peru is",)
    )


def test_tune_saves_a_map_and_says_what_it_measured(data: Path, tmp_path: Path) -> None:
    report = tune([data], tmp_path / "map", table(), name="tiny", check=[data], recipe=RECIPE)
    made = TextMap.load(tmp_path / "map")
    assert made.dense.name == "tiny"
    assert made.trained["sources"] == {"facts.jsonl": load(data).sha256}
    assert report["facts"] == len(small_world()) == made.trained["facts"]
    assert report["held out"]["rewordings"] > 0.5
    assert report["held out"]["others"] <= 0.05
    # What it has seen it knows, with one edit a subject.
    checked = report["check"]["facts.jsonl"]
    assert checked["rewordings"] > 0.9
    assert checked == measured_on(data, TextKeys(made, table()))


def test_tune_needs_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tune([tmp_path / "none.jsonl"], tmp_path / "map", table())
    assert not (tmp_path / "map").exists()
