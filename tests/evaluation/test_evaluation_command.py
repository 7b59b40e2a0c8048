"""`grace eval` as a function: files, resuming, what it refuses, and the paper's settings, small."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import record, words
from grace_edit.evaluation import SETTINGS, DataError, EvaluationError, Options, run
from grace_edit.evaluation.pictures import draw_all
from tiny_models import LAYERS

LAYER = LAYERS["gpt2"]


def counterfact(number: int) -> dict[str, Any]:
    """Return a record about counting in CounterFact's nested form."""
    one = record(number)
    rest = one.prompt.removeprefix(one.subject)
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{}" + rest,
            "target_new": {"str": one.target},
            "target_true": {"str": one.old},
            "subject": one.subject,
        },
        "paraphrase_prompts": list(one.paraphrases),
        "neighborhood_prompts": [question.prompt for question in one.neighbours],
        "portability": {
            "New Question": one.portability[0].prompt,
            "New Answer": one.portability[0].answers[0],
        },
    }


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    upstream = [{"prompt": words(start, 4), "answers": words(start + 4, 2)} for start in (11, 23)]
    return Options(
        data=write(tmp_path / "edits.jsonl", [counterfact(i) for i in (0, 1, 1, 2)]),
        out=tmp_path / "out",
        model="counting/gpt2",
        layer=LAYER,
        radius=0.5,
        every=2,
        upstream=write(tmp_path / "upstream.jsonl", upstream),
        draw=False,
        command="grace eval --edits 3",
    )


def with_(options: Options, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


def test_an_evaluation_writes_its_results_and_says_how_they_came_about(
    options: Options, pair: Callable[[str], Any]
) -> None:
    results = run(with_(options, baselines=("memory",)), pair("gpt2"))
    assert json.loads((options.out / "results.json").read_text()) == results
    assert results["command"] == "grace eval --edits 3"
    (environment,) = results["environments"]
    assert {"torch", "transformers", "python", "threads"} <= set(environment)
    assert results["data"]["records"] == 3
    assert results["data"]["left_out"]["of a prompt edited before"] == 1
    assert results["data"]["upstream"] == 2
    assert results["model"] == "counting/gpt2"
    assert str(options.out.parent) not in json.dumps(results)  # no path of this machine
    assert results["protocol"]["how"].keys() == {"free", "forced", "scope", "stream"}
    assert set(results["headline"]) == {"grace", "memory"}
    mine = results["headline"]["grace"]
    assert mine["accepted"] == mine["ERR"] == 1
    assert mine["TRR f1"] == 1
    with open(options.out / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["figures"])
    assert {row["edits"] for row in rows if row["metric"] == "ERR"} == {"2", "3"}
    told = json.loads((options.out / "easyedit-grace.json").read_text())
    assert [one["case_id"] for one in told] == ["0", "1", "2"]
    assert told[0]["post"]["portability"].keys() == {"one_hop_acc"}
    assert not (options.out / "pictures").exists()


def test_a_finished_run_is_not_done_again_and_takes_further_baselines(
    options: Options, pair: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(options, pair("gpt2"))
    monkeypatch.setattr("grace_edit.evaluation.identity.environment", lambda: {"python": "4"})
    log = (options.out / "grace" / "journal.jsonl").read_bytes()
    more = with_(options, baselines=("rag",), baseline_settings={"rag": {"threshold": 0.9}})
    second = run(more, pair("gpt2"))
    assert (options.out / "grace" / "journal.jsonl").read_bytes() == log
    assert second["headline"]["grace"] == first["headline"]["grace"]
    assert second["headline"]["rag"]["keys"] == 3
    # Both places the figures come from are named.
    assert second["environments"] == [*first["environments"], {"python": "4"}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"radius": 0.25}, "another config"),
        ({"every": 1}, "another protocol"),
        ({"edits": 2}, "another records"),
        ({"model": "counting/other"}, "another model"),
        ({"upstream_questions": 1, "seed": 0}, "another upstream"),
    ],
)
def test_a_directory_of_another_run_is_refused(
    changes: dict[str, Any],
    said: str,
    options: Options,
    pair: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("grace_edit.evaluation.command.run_stream", stop)
    for one in (options, options):
        with pytest.raises(Stopped):
            run(one, pair("gpt2"))
    with pytest.raises(EvaluationError, match=f"grace: holds a run with {said}; name another"):
        run(with_(options, **changes), pair("gpt2"))


class Stopped(Exception):
    """Where the work would begin."""


def stop(*_: Any, **__: Any) -> Any:
    raise Stopped


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layer": None}, EvaluationError, "layer must be given, or a setting that names one"),
        ({"layer": "mlp.nowhere"}, ValueError, "nowhere"),
        (
            {"baselines": ("rome",)},
            EvaluationError,
            "baselines must be of paper, .* got 'rome'",
        ),
        ({"setting": "nli"}, EvaluationError, "setting must be one of zsre, scotus, .* got 'nli'"),
        ({"edits": 0}, EvaluationError, "edits must be at least 1, got 0"),
        ({"model": None}, EvaluationError, "model must be given, or a setting that names one"),
        ({"data": "nothing.jsonl"}, DataError, "no such file"),
        ({"radius": -1.0}, ValueError, "radius must be positive"),
        ({"config": {"margin": "x"}}, ValueError, "margin must be a number"),
    ],
)
def test_options_that_cannot_be_run_say_why(
    changes: dict[str, Any],
    error: type[Exception],
    said: str,
    options: Options,
    pair: Callable[[str], Any],
) -> None:
    with pytest.raises(error, match=said):
        run(with_(options, **changes), pair("gpt2"))


def test_the_order_is_the_files_or_one_drawn_from_the_seed(
    options: Options, pair: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def look(make: Any, records: Any, *_: Any, **__: Any) -> Any:
        seen.append([one.id for one in records])
        raise Stopped

    monkeypatch.setattr("grace_edit.evaluation.command.run_stream", look)
    for number, changes in enumerate(
        ({}, {"shuffle": True, "seed": 3}, {"shuffle": True, "seed": 3}, {"edits": 2})
    ):
        with pytest.raises(Stopped):
            run(with_(options, out=options.out / str(number), **changes), pair("gpt2"))
    assert seen[0] == ["0", "1", "2"]
    assert seen[1] == seen[2] != seen[0]
    assert seen[3] == ["0", "1"]


def test_a_sweep_runs_grace_at_each_layer_and_everything_is_drawn(
    options: Options, pair: Callable[[str], Any]
) -> None:
    pytest.importorskip("matplotlib")
    layers = ("transformer.h.0.mlp", LAYER)
    results = run(
        with_(options, edits=2, every=None, layers=layers, sweep_edits=1, draw=True), pair("gpt2")
    )
    assert {f"grace at {layer}" for layer in layers} <= set(results["headline"])
    pictures = options.out / "pictures"
    names = {"stream-exact", "stream-accuracy", "keys", "scope-grace", "layers"}
    names.add("map-grace")
    assert {path.stem for path in pictures.iterdir()} == names
    assert {path.suffix for path in pictures.iterdir()} == {".png", ".svg", ".csv"}
    with open(pictures / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(layers)
    assert float(rows[1]["ERR"]) == results["headline"][f"grace at {LAYER}"]["ERR"]
    with open(pictures / "map-grace.csv", newline="") as file:
        targets = [row["target"] for row in csv.DictReader(file)]
    assert sorted(targets) == sorted(record(i).target for i in range(2))


def test_without_matplotlib_drawing_says_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_all(tmp_path, [], {}, {"grace": {"edit": [0.0]}}, {}, [])


SMALL: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "zsre": (
        "t5",
        [
            {
                "input": words(start, 5),
                "prediction": words(start + 5, 2),
                "alternatives": [],
                "filtered_rephrases": [words(start + 1, 4)],
                "output": [{"answer": words(start + 30, 2)}],
            }
            for start in (0, 14)
        ],
    ),
    "scotus": ("bert", [{"text": words(s, 6), "label": label} for s, label in ((0, 2), (40, 0))]),
    "hallucination": (
        "gpt2",
        [
            {
                "prompt": words(start, 5) + " ",
                "target_new": words(start + 30, 2),
                "subject": str(start),
                "locality_prompt": words(start + 20, 5),
                "locality_ground_truth": words(start + 25, 4),
            }
            for start in (0, 14)
        ],
    ),
}


@pytest.mark.parametrize("name", list(SMALL))
def test_the_papers_settings_run_on_their_families_at_small_size(
    name: str, pair: Callable[[str], Any], tmp_path: Path
) -> None:
    family, rows = SMALL[name]
    setting = SETTINGS[name]
    layer = {**LAYERS, "t5": "encoder.block.0.layer.1.DenseReluDense.wo"}[family]
    results = run(
        Options(
            data=write(tmp_path / "data.jsonl", rows),
            out=tmp_path / "out",
            setting=name,
            layer=layer,
            draw=False,
        ),
        pair(family),
    )
    assert results["setting"]["published"] == setting.published
    assert results["model"] == setting.model
    config = results["config"]
    assert (config["policy"], config["recipe"], config["query"]) == ("paper", "paper", "last")
    assert results["data"]["kind"] == setting.kind
    final = results["headline"]["grace"]
    # A causal model of this depth cannot be reached from the tokens before the one that asks.
    assert final["accepted"] == (0 if name == "hallucination" else 1)
    assert final["keys"] == 2 * final["accepted"]
    scores = {(f["metric"], f["score"]) for f in results["figures"]}
    assert {("ES", setting.score), ("ERR", setting.score)} <= scores
    if name == "hallucination":
        # Nothing upstream is answered by an edit: its perplexity is what it was.
        trr = {
            f["edits"]: f["value"]
            for f in results["figures"]
            if (f["metric"], f["score"]) == ("TRR", "perplexity")
        }
        assert trr[0] == trr[2]
