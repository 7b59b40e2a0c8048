"""A study of a small model on a small folder of records, killed and gone on with."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_edit.codebook.locking import take
from grace_edit.evaluation import EvaluationError, NoDataError, Options, OtherRunError
from grace_edit.evaluation.journal import Journal
from grace_edit.evaluation.mapping import learn_map
from grace_edit.evaluation.rows import Row, row_of, together
from grace_edit.evaluation.scope import Keyring
from grace_edit.evaluation.study import PARTS, Sizes, study
from grace_edit.keys.choice import text_keys
from text_maps import map_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SUBJECTS = ("Quito", "Oslo", "Paris", "Rome", "Lima", "Bonn", "Cairo", "Delhi")
TEXT = """
<pad> <eos> <unk> the city of is a in what where who works for It rained. capital founder country
author person red blue green new old north south nq question: Where is ? passage book He wrote
Berlin Tunis Pisa Nice Graz Tokyo Seoul Minsk Anna Otto
"""
SIZES = Sizes(edits=4, paper=1, baselines=1, zsre=2, hallucination=2, unrelated=2)


def nested(number: int, subject: str) -> dict[str, Any]:
    relation = ("capital", "founder")[number % 2]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "the " + relation + " of {} is",
            "relation_id": relation,
            "target_new": {"str": ("red", "blue", "green")[number % 3]},
            "target_true": {"str": "old"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"It rained. {subject} is a {relation} in the"],
        "neighborhood_prompts": [f"the {relation} of Berlin is", f"the {relation} of Tunis is"],
        "unrelated_relation": {"question": f"where works {subject} ?", "object": "north"},
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records under their published names."""
    made = tmp_path_factory.mktemp("records")
    files: dict[str, list[dict[str, Any]]] = {
        "counterfact.jsonl": [nested(n, subject) for n, subject in enumerate(SUBJECTS)],
        "zsre.jsonl": [
            {
                "subject": subject,
                "src": f"what is the author of {subject} ?",
                "rephrase": f"who is the author of {subject} ?",
                "alt": "blue",
                "pred": "red",
                "answers": ["red"],
                "loc": f"nq question: where is {other} ?",
                "loc_ans": "south",
            }
            for subject, other in (("Pisa", "Tokyo"), ("Nice", "Seoul"), ("Graz", "Minsk"))
        ],
        "hallucination.jsonl": [
            {
                "prompt": f"It is a passage of {subject} in the city.",
                "target_new": "He wrote",
                "subject": subject,
                "locality_prompt": "the person works",
                "locality_ground_truth": "in the city",
            }
            for subject in ("Anna", "Otto")
        ],
    }
    for name, rows in files.items():
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="session")
def small() -> tuple[Any, Any]:
    """A random model, and a tokenizer with a token per word."""
    torch.manual_seed(0)
    words = dict.fromkeys([*TEXT.split(), *SUBJECTS])
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval(), tokenizer


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that maps were learned from; the map is one made by hand."""
    folders: list[str] = []

    def stand_in(data: Path, out: Path, *, model: Any, tokenizer: Any, **_: Any) -> dict[str, Any]:
        folders.append(data.name)
        time.sleep(0.2)  # long enough for somebody else to want it too
        map_of(model, tokenizer).save(out)
        return {}

    monkeypatch.setattr("grace_edit.evaluation.study.learn_map", stand_in)
    return folders


@pytest.fixture
def run(folder: Path, small: tuple[Any, Any], learned: list[str]) -> Callable[..., dict[str, Any]]:
    """Run the study into a directory."""

    def go(out: Path, parts: tuple[str, ...] = PARTS, **changes: Any) -> dict[str, Any]:
        options = Options(data="", out=out, model="tiny", layer="transformer.h.1.mlp")
        options = replace(options, config={"max_steps": 60}, draw=False, **changes)
        return study(folder, out, small, options, parts=parts, sizes=SIZES)

    return go


def timeless(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if "seconds" not in row["name"]]


def test_a_study_measures_every_part_and_says_what_to_reach(
    run: Callable[..., dict[str, Any]], learned: list[str], tmp_path: Path
) -> None:
    results = run(tmp_path / "out")
    assert learned == ["train", "unseen-1", "unseen-2"]
    rows = {(row["part"], row["name"]): row for row in results["rows"]}
    assert rows["edits", "accepted"]["value"] == 1
    assert rows["edits", "accepted"]["reach"] == "≥ .97"
    assert rows["edits", "ERR of accepted"]["value"] == 1
    # Keys alone say the same of scope as the edited model did.
    for name in (
        "rewordings that hit their own edit",
        "neighbours fired",
        "same subject, other relation, fired",
    ):
        assert rows["scope, tokens", name]["value"] == rows["edits", name]["value"]
        assert rows["scope, tokens", name]["count"] == rows["edits", name]["count"] > 0
    assert (
        rows["scope, tokens", "rewordings whose target is produced"]["value"]
        == (rows["edits", "generality: the target is produced"]["value"])
    )
    told = {name: row["value"] for (part, name), row in rows.items() if part == "rewordings"}
    assert sum(told.values()) == 4
    assert rows["relations never seen, tokens", "neighbours fired"]["count"] == 8
    assert rows["zsRE, tokens", "rephrasings that hit their own edit"]["count"] == 2
    assert rows["harder prompts, tokens", "rewordings in lower case that hit"]["count"] == 4
    for part in ("the paper's settings", "beside it: grace", "beside it: ft", "beside it: rag"):
        assert rows[part, "accepted"]["count"] == 1
    assert rows["hallucination", "ERR, perplexity"]["count"] == 2
    before = rows["hallucination", "TRR, perplexity, before any edit"]
    assert before["value"] == pytest.approx(rows["hallucination", "TRR, perplexity"]["value"])
    # What is shown to others holds no record.
    for name in ("study.json", "study.csv"):
        text = (tmp_path / "out" / name).read_text()
        assert not any(word in text for word in (*SUBJECTS, "rained", str(tmp_path)))


def test_a_study_that_was_killed_ends_with_the_same_figures(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("edits", "scope")
    expected = timeless(run(tmp_path / "whole", parts))
    add = Journal.add
    left = [9]

    def dying(journal: Journal, unit: str, found: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        add(journal, unit, found)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", parts)
    assert timeless(run(tmp_path / "out", parts)) == expected


def test_parts_done_side_by_side_share_what_both_need(
    folder: Path, small: tuple[Any, Any], learned: list[str], tmp_path: Path
) -> None:
    options = Options(data="", out=tmp_path, model="tiny", layer="transformer.h.1.mlp", draw=False)

    def go(out: Path, parts: tuple[str, ...]) -> dict[str, Any]:
        changed = replace(options, out=out, config={"max_steps": 60})
        return study(folder, out, copy.deepcopy(small), changed, parts=parts, sizes=SIZES)

    own, others = ("edits",), ("baselines", "hallucination")
    expected = timeless(go(tmp_path / "alone", (*own, *others)))
    learned.clear()
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(go, tmp_path / "both", parts) for parts in (own, others)]
        results = max((each.result() for each in done), key=lambda found: len(found["rows"]))
    assert timeless(results) == expected
    assert learned == ["train"]
    assert json.loads((tmp_path / "both" / "study.json").read_text()) == results


def test_a_part_is_done_by_one_process_at_a_time(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    let_go = take(tmp_path / "paper", timeout=1.0)
    try:
        with pytest.raises(TimeoutError, match="must be written by one process at a time"):
            run(tmp_path, ("paper",))
    finally:
        let_go()
    assert {row["part"] for row in run(tmp_path, ("paper",))["rows"]} == {"the paper's settings"}


def test_a_directory_of_another_study_and_an_unknown_part_are_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(tmp_path, ())
    with pytest.raises(OtherRunError, match="holds a run with another seed"):
        run(tmp_path, (), seed=1)
    with pytest.raises(EvaluationError, match="parts must be of edits, scope"):
        run(tmp_path, ("songs",))
    with pytest.raises(EvaluationError, match="query must be text for a study, got last"):
        run(tmp_path, (), query="last")


def test_the_nearest_key_decides_and_only_within_its_radius(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    keys = text_keys(model, tokenizer, "tokens", map_of(model, tokenizer))
    ring = Keyring(keys, ["the capital of Oslo is", "the capital of Quito is"])
    assert ring.ask("the capital of Quito is").hits(1)
    assert not ring.ask("the capital of Quito is").hits(0)
    far = ring.ask("He wrote a red book in the north")
    assert not far.fires
    assert not far.hits(far.nearest)
    assert ring.fired(["the capital of Oslo is", "He wrote a red book"]) == [True, False]
    assert ring.asked == 5
    other = ring.with_prompts(["the founder of Lima is"])
    assert other.ask("the founder of Lima is").hits(0)


def test_rows_are_means_and_two_of_them_are_weighed_by_their_counts() -> None:
    one = row_of("part", "name", [True, False, False, False], "≥ .1")
    assert one == Row("part", "name", 0.25, 4, "≥ .1")
    assert together(one, row_of("part", "name", [True])) == Row("part", "name", 0.4, 5, "≥ .1")
    none = row_of("part", "name", [])
    assert (none.value, none.count) == (None, 0)
    assert together(one, none) == one
    assert together(none, none).value is None


def test_a_map_is_learned_from_the_files_of_a_folder_that_teach_something(
    folder: Path, small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[Any] = []

    def stand_in(sources: list[Path], out: Path, dense: Any, **_: Any) -> dict[str, Any]:
        told.extend([[path.name for path in sources], dense.kind, out])
        return {"facts": 3}

    monkeypatch.setattr("grace_edit.evaluation.mapping.tune", stand_in)
    model, tokenizer = small
    assert learn_map(folder, tmp_path, model=model, tokenizer=tokenizer) == {"facts": 3}
    # Passages name nobody in their prompts.
    assert told == [["counterfact.jsonl", "zsre.jsonl"], "tokens", tmp_path]
    with pytest.raises(ValueError, match="model must be given for the encoder 'tokens'"):
        learn_map(folder, tmp_path)
    with pytest.raises(NoDataError, match="holds no file of counterfact, knowedit, zsre"):
        learn_map(tmp_path, tmp_path, model=model, tokenizer=tokenizer)
