"""Every published schema on records made here, and what a bad file is told."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from grace_edit.evaluation import DataError, Question, load, load_questions
from grace_edit.evaluation.records import one_per_prompt

NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} lies on the river",
        "relation_id": "P206",
        "target_new": {"str": "Danube", "id": "Q1"},
        "target_true": {"str": "Moselle", "id": "Q2"},
        "subject": "Upper Quarrel",
    },
    "paraphrase_prompts": ["A dog barked. The river of Upper Quarrel is the"],
    "neighborhood_prompts": ["Lower Quarrel lies on the river", "Mid Quarrel's river is the"],
    "generation_prompts": ["Upper Quarrel is known for"],
    "portability": {
        "Recalled Relation": "(Danube, mouth, Black Sea)",
        "New Question": "Into which sea does the river of Upper Quarrel flow?",
        "New Answer": "Black Sea",
    },
    "unrelated_relation": {"question": "Who founded Upper Quarrel?", "object": "monks"},
}
FLAT = {
    "case_id": 8,
    "prompt": "Upper Quarrel lies on the river",
    "target_new": "Danube",
    "subject": "Upper Quarrel",
    "ground_truth": "Moselle",
    "rephrase_prompt": "The river of Upper Quarrel is the",
    "locality_prompt": "Lower Quarrel lies on the river",
    "locality_ground_truth": "Moselle",
}
MEND = {
    "subject": "Upper Quarrel",
    "src": "Which river is Upper Quarrel on?",
    "pred": " Rhine",
    "rephrase": "What river flows past Upper Quarrel?",
    "alt": " Danube",
    "answers": ["Moselle", "the Moselle"],
    "loc": "nq question: who sang the song",
    "loc_ans": "Nobody",
    "portability": {"New Question": "Which sea then?", "New Answer": "Black Sea"},
}
ANNOTATED = {
    "id": "a1",
    "input": "Which river is Upper Quarrel on?",
    "prediction": "Rhine",
    "alternatives": ["Danube", "Elbe"],
    "filtered_rephrases": ["What river flows past Upper Quarrel?", "Upper Quarrel's river?"],
    "output": [{"answer": "Moselle", "provenance": []}],
}
HALLUCINATED = [
    {
        "prompt": "This is a passage about ann b. oyd. ",
        "target_new": "Ann B. Oyd built bridges.",
        "subject": "ann b. oyd",
        "locality_prompt": "Some web text that goes",
        "locality_ground_truth": "on like this.",
    },
    {
        "prompt": "This is a passage about ann b. oyd. Ann B. Oyd sang. She was born. She ate.",
        "target_new": "She retired.",
        "subject": "ann b. oyd",
        "locality_prompt": "",
        "locality_ground_truth": "",
    },
]
KNOWEDIT = {
    "subject": "Upper Quarrel",
    "prompt": "The river of Upper Quarrel is",
    "target_new": "Danube",
    "ground_truth": ["Moselle"],
    "rephrase_prompt": "Which river is Upper Quarrel on?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The mayor of Upper Quarrel is", "ground_truth": ["X"]}
        ],
        "Forgetfulness": [
            {
                "prompt": "The river of Upper Quarrel, not the Danube, is",
                "ground_truth": [["Moselle", "Mosel"], ["Saar"]],
            }
        ],
    },
    "portability": {
        "Reasoning": [{"prompt": "The sea of its river is", "ground_truth": "Black Sea"}],
        "Subject_Aliasing": [
            {"prompt": "The river of Quarrel-on-High is", "ground_truth": "Danube"}
        ],
    },
}
WIKIBIO = {
    "text": "This is a passage about ann oyd. ",
    "labels": "Ann Oyd built bridges.",
    "concept": "ann oyd",
    "locality": {
        "Relation_Specificity": [{"prompt": "ann oyd place of birth", "ground_truth": ["Y"]}]
    },
}
RECENT = {
    "subject": "Quarrel FC",
    "prompt": "The coach of Quarrel FC is",
    "target_new": "Zoe",
    "portability": {},
    "locality": {},
}


def write(path: Path, rows: list[Any], *, array: bool = False) -> Path:
    if array:
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["lines", "array"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Read records from a file of either form, their kind told from the fields."""

    def read(*rows: Any, **settings: Any) -> Any:
        path = write(tmp_path / "data.json", list(rows), array=request.param == "array")
        return load(path, **settings)

    return read


def test_counterfact_nested_as_rome_published_it(one: Any) -> None:
    loaded = one(NESTED)
    assert loaded.kind == "counterfact"
    (record,) = loaded.records
    assert (record.id, record.relation, record.subject) == ("7", "P206", "Upper Quarrel")
    assert record.prompt == "Upper Quarrel lies on the river"
    assert (record.target, record.old) == ("Danube", "Moselle")
    assert record.paraphrases == ("A dog barked. The river of Upper Quarrel is the",)
    assert record.neighbours == (
        Question("Lower Quarrel lies on the river", ("Moselle",)),
        Question("Mid Quarrel's river is the", ("Moselle",)),
    )
    assert record.same_subject == (Question("Who founded Upper Quarrel?", ("monks",)),)
    assert record.portability[0].answers == ("Black Sea",)
    assert record.generation == ("Upper Quarrel is known for",)


def test_counterfact_flat_as_easyedit_has_it(one: Any) -> None:
    loaded = one(FLAT)
    assert loaded.kind == "counterfact"
    (record,) = loaded.records
    assert (record.prompt, record.target, record.old) == (FLAT["prompt"], "Danube", "Moselle")
    assert record.paraphrases == (FLAT["rephrase_prompt"],)
    assert record.neighbours == (Question(str(FLAT["locality_prompt"]), ("Moselle",)),)
    assert record.unrelated == ()


def test_zsre_with_mends_fields(one: Any) -> None:
    loaded = one(MEND)
    assert loaded.kind == "zsre"
    (record,) = loaded.records
    assert (record.target, record.old) == ("Danube", "Rhine")  # a leading space is published
    assert record.unrelated == (Question("nq question: who sang the song", ("Nobody",)),)
    assert record.portability[0].prompt == "Which sea then?"
    assert one(MEND, zsre_target="answers").records[0].target == "Moselle"


def test_zsre_in_easyedits_flat_form_has_unrelated_locality(one: Any) -> None:
    flat = {**FLAT, "locality_prompt": "nq question: who sang", "locality_ground_truth": "Nobody"}
    loaded = one(flat)
    assert loaded.kind == "zsre"
    assert loaded.records[0].unrelated == (Question("nq question: who sang", ("Nobody",)),)
    assert loaded.records[0].neighbours == ()


def test_zsre_with_annotated_rephrasings_as_grace_was_run_on(one: Any) -> None:
    (record,) = one(ANNOTATED, zsre_target="answers").records
    assert (record.id, record.target, record.old) == ("a1", "Moselle", "Rhine")
    assert record.paraphrases == tuple(ANNOTATED["filtered_rephrases"])  # type: ignore[arg-type]
    assert one(ANNOTATED).records[0].target == "Danube"


def test_hallucination_in_the_wise_form_with_the_sentences_no_edit_changes(one: Any) -> None:
    loaded = one(*HALLUCINATED)
    assert loaded.kind == "hallucination"
    first, second = loaded.records
    assert first.target == "Ann B. Oyd built bridges."
    assert first.unrelated == (Question("Some web text that goes", ("on like this.",)),)
    assert second.unrelated == ()
    # Between the edits: the sentence that is edited, then two that are not.
    header = "This is a passage about ann b. oyd."
    assert first.accurate == (
        Question(f"{header} Ann B. Oyd sang.", ("She was born.",)),
        Question(f"{header} Ann B. Oyd sang. She was born.", ("She ate.",)),
    )
    assert second.accurate == ()


@pytest.mark.parametrize("ground_truth", [["Moselle"], "Moselle"])
def test_knowedit_zsre_and_counterfact(one: Any, ground_truth: Any) -> None:
    loaded = one({**KNOWEDIT, "ground_truth": ground_truth})
    assert loaded.kind == "knowedit"
    (record,) = loaded.records
    assert (record.target, record.old) == ("Danube", "Moselle")
    mayor = "The mayor of Upper Quarrel is"
    assert record.same_subject == (Question(mayor, ("X",), "Relation_Specificity"),)
    # Aliases of one object and other objects alike are right.
    assert record.forgetfulness[0].answers == ("Moselle", "Mosel", "Saar")
    assert [q.group for q in record.portability] == ["Reasoning", "Subject_Aliasing"]


def test_knowedit_wikibio_has_its_own_names(one: Any) -> None:
    loaded = one(WIKIBIO)
    assert loaded.kind == "knowedit"
    (record,) = loaded.records
    assert (record.prompt, record.target) == (WIKIBIO["text"], WIKIBIO["labels"])
    assert record.subject == "ann oyd"
    assert record.same_subject[0].answers == ("Y",)


def test_knowedit_recent_may_ask_nothing(one: Any) -> None:
    (record,) = one(RECENT).records
    assert record.portability == record.same_subject == record.forgetfulness == ()
    assert record.old is None


def test_scotus_has_texts_and_classes(one: Any) -> None:
    loaded = one({"text": "The court holds.", "label": 3}, {"text": "Reversed.", "label": "taxes"})
    assert loaded.kind == "scotus"
    assert [record.target for record in loaded.records] == [3, "taxes"]


def test_records_without_a_target_are_left_out_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "zsre.jsonl", [MEND, {**MEND, "alt": " "}, MEND])
    loaded = load(path)
    assert len(loaded.records) == 2
    assert loaded.skipped == ((f"{path}:2", "alt is empty"),)


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ([NESTED, {"case_id": 1}], "auto", ":2: prompt must be there, got only ['case_id']"),
        (
            [{**NESTED, "requested_rewrite": {**NESTED["requested_rewrite"], "prompt": "river"}}],  # type: ignore[dict-item]
            "auto",
            ":1: requested_rewrite.prompt must hold one {} for the subject, got 'river'",
        ),
        (
            [{**NESTED, "paraphrase_prompts": "a text"}],
            "auto",
            ":1: paraphrase_prompts must be a list of strings, got 'a text'",
        ),
        ([{**MEND, "alt": 7}], "auto", ":1: alt must be a string, got 7"),
        (
            [{**KNOWEDIT, "portability": {"Reasoning": [{"prompt": "x", "ground_truth": 3}]}}],
            "auto",
            ":1: portability.Reasoning[0].ground_truth must be a string or lists of strings, got 3",
        ),
        (
            [{"text": "x", "label": 1.5}],
            "auto",
            ":1: label must be a class number or name, got",
        ),
        ([{**ANNOTATED, "output": []}], "zsre", ":1: output must be a list with an answer, got []"),
        (["a text"], "zsre", ":1: record must be a JSON object, got 'a text'"),
        ([{"a": 1}], "auto", ":1: kind must be told by the fields of the first record, got ['a']"),
        ([], "auto", "must hold at least one record, got none"),
        ([{**MEND, "alt": ""}], "auto", "must hold at least one edit, got none in 1 records"),
    ],
)
def test_a_bad_record_is_named_by_file_line_field_and_rule(
    rows: list[Any], kind: str, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path, kind)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_the_line_of_a_record_in_an_array_is_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n{"text": "a", "label": 1},\n\n\n{"text": 2, "label": 1}\n]\n')
    with pytest.raises(DataError, match=r"data.json:5: text must be a string, got 2"):
        load(path)


def test_many_bad_records_are_named_at_once_up_to_ten(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [{"text": 1, "label": 1}] * 12)
    with pytest.raises(DataError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:10]] == [str(n) for n in range(1, 11)]
    assert lines[10:] == ["... and 2 more"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a", "label": 1}\n{"text": \n', ":2: must be JSON: Expecting value at column"),
        (
            '[{"text": "a", "label": 1},\n {"text" "b"}]',
            ":2: must be JSON: Expecting ':' ",
        ),
        ('[{"text": "a", "label": 1}', ":1: must be a JSON array that is closed, got its end"),
        ('[{"text": "a", "label": 1}] 2', ":1: must be one JSON array, got more after it"),
    ],
)
def test_a_file_that_is_no_json_is_told_where(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load(path)
    assert said in str(caught.value)


def test_bytes_that_are_no_text_are_told_where(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a", "label": 1}\n\xff\n')
    with pytest.raises(DataError, match=r":2: must be UTF-8, got byte 0xff"):
        load(path)


def test_line_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b", "label": 1}\n', encoding="utf-8")
    assert load(path).records[0].prompt == "a\u2028b"


def test_a_missing_file_and_unknown_words_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="kind must be auto or one of counterfact, zsre"):
        load(tmp_path, "squad")
    with pytest.raises(DataError, match="zsre_target must be"):
        load(tmp_path, zsre_target="pred")


def test_a_name_is_asked_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        seen.append((name, split))
        return [{"text": "The court holds.", "label": 3}]

    stub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    loaded = load("somebody/scotus", split="train")
    assert seen == [("somebody/scotus", "train")]
    assert loaded.records[0].source == "somebody/scotus[train][0]"


def test_without_datasets_a_name_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets\); or give the path"):
        load("somebody/scotus")


def test_a_name_that_datasets_cannot_load_says_what_it_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, split: str) -> Any:
        raise RuntimeError("no such thing on the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="'test': no such thing on the hub"):
        load("somebody/nothing")


def test_upstream_questions_are_prompts_with_answers_or_texts_with_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "who", "answers": "me"}, {"text": "x", "label": 2}]
    found = load_questions(write(tmp_path / "up.jsonl", rows))
    assert found == [Question("who", ("me",)), Question("x", (2,))]
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "who", "answers": []}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: answers is empty"):
        load_questions(bad)


def test_the_first_edit_of_a_prompt_is_kept(tmp_path: Path) -> None:
    rows = [MEND, {**MEND, "src": str(MEND["src"]) + " ", "alt": "Elbe"}, {**MEND, "src": "Else?"}]
    kept, left_out = one_per_prompt(load(write(tmp_path / "zsre.jsonl", rows)).records)
    assert [record.target for record in kept] == ["Danube", "Danube"]
    assert left_out == 1
