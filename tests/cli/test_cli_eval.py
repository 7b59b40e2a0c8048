"""grace eval and tune with a small model: what it prints and writes, resuming, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grace_edit.evaluation import DataError

LAYER = "transformer.h.1.mlp"
FACTS = (("france", "rome", "oslo"), ("italy", "oslo", "paris"), ("spain", "paris", "madrid"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three records in CounterFact's form."""
    path = tmp_path / "facts.jsonl"
    rows = [
        {
            "case_id": number,
            "requested_rewrite": {
                "prompt": "the capital of {} is",
                "target_new": {"str": new},
                "target_true": {"str": old},
                "subject": subject,
            },
            "paraphrase_prompts": [f"the long river where the capital of {subject} is"],
            "neighborhood_prompts": ["the capital of norway is"],
        }
        for number, (subject, new, old) in enumerate(FACTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(
    grace: Callable[..., Any], gpt2: Path, data: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Run `grace eval` on the records into `tmp_path/out`; more options may be given."""
    own = ("--model", gpt2, "--layer", LAYER, "--radius", 0.1, "--out", tmp_path / "out")
    return lambda *more: grace("eval", data, *own, *more)


def test_an_evaluation_prints_its_figures_and_goes_on_where_it_was_stopped(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    done = evaluate("--every", 2, "--baselines", "memory, ft")
    assert done.exit_code == 0, done.output
    assert "3 edits of kind counterfact" in done.stdout
    for name in ("ERR of accepted", "generality", "neighbour fires", "grace", "memory", "ft"):
        assert name in done.stdout
    log = (tmp_path / "out" / "grace" / "journal.jsonl").read_bytes()
    again = evaluate("--every", 2, "--json")
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told["headline"]["grace"]["ERR"] == 1
    assert told["headline"].keys() == {"grace"}
    assert told["command"].split()[0] == "grace"
    assert (tmp_path / "out" / "grace" / "journal.jsonl").read_bytes() == log


def test_a_directory_of_another_run_is_a_conflict(
    evaluate: Callable[..., Any], grace: Callable[..., Any]
) -> None:
    assert evaluate("--edits", 1).exit_code == 0
    other = evaluate("--edits", 2)
    assert other.exit_code == 4
    assert other.stdout == ""
    assert "holds a run with another records; name another directory" in other.stderr
    assert len(other.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--baselines", "rome"), 2, "baselines must be of paper, ft"),
        (("--edits", 0), 2, "edits must be at least 1, got 0"),
        (("--layer", "mlp.nowhere"), 2, "nowhere"),
        (("--kind", "songs"), 2, "kind must be auto or one of"),
        (("--setting", "songs"), 2, "setting must be one of zsre"),
        (("--model", "./nothing"), 3, "no such directory of a model"),
        (("--upstream", "nothing.jsonl"), 3, "nothing.jsonl: no such file"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_an_exit_code(
    more: tuple[Any, ...], code: int, said: str, evaluate: Callable[..., Any]
) -> None:
    done = evaluate(*more)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_data_that_is_not_there_or_wrong_is_named(
    grace: Callable[..., Any], gpt2: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"requested_rewrite": {"prompt": 3, "subject": "x"}}\n' * 2)
    own = ("--model", gpt2, "--layer", LAYER, "--out", tmp_path / "out")
    done = grace("eval", tmp_path / "nothing.jsonl", *own)
    assert (done.exit_code, "no such file" in done.stderr) == (3, True)
    done = grace("eval", wrong, *own)
    assert done.exit_code == 2
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        f"{wrong}:1",
        f"{wrong}:2",
    ]


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of what learns a map, which is tested elsewhere; it finds two figures."""
    calls: list[dict[str, Any]] = []

    def stand_in(data: Path, out: Path, **more: Any) -> dict[str, Any]:
        calls.append({"data": data, "out": out, **more})
        if data.name == "bad.jsonl":
            raise DataError("bad.jsonl:1: must be JSON\nbad.jsonl:2: must be JSON")
        return {"radius": 0.75, "fired": {"neighbours": 0.0125}}

    monkeypatch.setattr("grace_edit.evaluation.mapping.learn_map", stand_in)
    return calls


def test_tune_learns_for_the_tokens_of_a_model_or_for_an_encoder_and_tells_what_it_found(
    learned: list[dict[str, Any]], grace: Callable[..., Any], gpt2: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "map"
    done = grace("tune", data, "--model", gpt2, "--out", out)
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()[:2]] == [
        ["radius", "0.75"],
        ["fired", "neighbours", "0.0125"],
    ]
    assert (learned[0]["data"], learned[0]["out"], learned[0]["encoder"]) == (data, out, "tokens")
    assert type(learned[0]["model"]).__name__ == "GPT2LMHeadModel"
    done = grace("tune", data, "--encoder", "some/encoder", "--out", out, "--json")
    assert json.loads(done.stdout)["fired"] == {"neighbours": 0.0125}
    assert (learned[1]["model"], learned[1]["encoder"]) == (None, "some/encoder")


def test_tune_refuses_in_lines_before_it_loads_anything(
    learned: list[dict[str, Any]], grace: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("x")
    out = ("--out", tmp_path / "map")
    for arguments, code, said in (
        ((data, *out), 2, ["--model must be given where --encoder is tokens"]),
        ((tmp_path / "none", "--encoder", "e", *out), 3, ["none: no such file or directory"]),
        ((data, "--encoder", "e", "--out", tmp_path), 4, ["must be a new or empty directory"]),
        ((bad, "--encoder", "e", *out), 2, ["bad.jsonl:1: must be", "bad.jsonl:2: must be"]),
    ):
        done = grace("tune", *arguments)
        assert (done.exit_code, done.stdout) == (code, "")
        lines = done.stderr.splitlines()
        assert len(lines) == len(said)
        assert all(what in line for what, line in zip(said, lines, strict=True))


def test_a_directory_of_records_is_studied_as_a_whole(
    grace: Callable[..., Any], gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def stand_in(data: Path, out: Path, loaded: Any, options: Any, **more: Any) -> dict[str, Any]:
        calls.append((data, out, options, more))
        row = {"part": "edits", "name": "accepted", "value": 0.98, "count": 500, "reach": "≥ .97"}
        return {"rows": [row]}

    monkeypatch.setattr("grace_edit.evaluation.study.study", stand_in)
    own = ("eval", tmp_path, "--model", gpt2, "--layer", LAYER, "--out", tmp_path / "out")
    done = grace(*own, "--edits", 12, "--parts", "edits, scope", "--beside", "some/encoder")
    assert done.exit_code == 0, done.output
    assert "accepted" in done.stdout
    assert "≥ .97" in done.stdout
    ((data, out, options, more),) = calls
    assert (data, out, options.layer) == (tmp_path, tmp_path / "out", LAYER)
    assert (more["parts"], more["encoders"]) == (("edits", "scope"), ("some/encoder",))
    assert (more["sizes"].edits, more["sizes"].paper) == (12, 60)
    assert json.loads(grace(*own, "--json").stdout)["rows"][0]["value"] == 0.98


def test_parts_of_a_study_need_a_directory(evaluate: Callable[..., Any]) -> None:
    done = evaluate("--parts", "edits")
    assert done.exit_code == 2
    assert "--parts, --beside and --jobs must be left out: DATA is not a directory" in done.stderr


def test_two_processes_find_what_one_does_and_tell_what_went_wrong_in_either(
    grace: Callable[..., Any],
    gpt2: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The parts that learn no map.
    monkeypatch.setattr("grace_edit.cli.studying._SHARES", (("paper",), ("hallucination",)))
    folder = tmp_path / "records"
    folder.mkdir()
    rows = data.read_text().splitlines()
    (folder / "counterfact.jsonl").write_text("\n".join(rows))
    passages = folder / "hallucination.jsonl"
    passage = {
        "prompt": "the long river of france is",
        "target_new": "rome oslo",
        "subject": "france",
        "locality_prompt": "the capital of norway is",
        "locality_ground_truth": "oslo",
    }
    passages.write_text(json.dumps(passage))
    own = ("eval", folder, "--model", gpt2, "--layer", LAYER, "--edits", 2, "--json")
    parts = ("--parts", "hallucination,paper")
    alone = grace(*own, *parts, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    both = grace(*own, *parts, "--out", tmp_path / "both", "--jobs", 2)
    assert both.exit_code == 0, both.output
    found, expected = (
        {(row["part"], row["name"]): row["value"] for row in json.loads(done.stdout)["rows"]}
        for done in (both, alone)
    )
    assert found.keys() == expected.keys()
    assert {part for part, _ in found} == {"the paper's settings", "hallucination"}
    assert all(found[row] == expected[row] for row in found if "seconds" not in row[1])

    passages.write_text("no record")
    wrong = grace(*own, *parts, "--out", tmp_path / "wrong", "--jobs", 2)
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "hallucination.jsonl:1: must be" in wrong.stderr
    assert (tmp_path / "wrong" / "rows-paper.json").exists()  # what the other one has done
    assert grace(*own, "--out", tmp_path / "three", "--jobs", 3).exit_code == 2


ORPHAN = """
import multiprocessing, threading, time
from grace_edit.cli import studying

def work(begun):
    threading.Thread(target=studying._end_with_parent, daemon=True).start()
    begun.send(None)
    time.sleep(60)
    print("outlived", flush=True)

if __name__ == "__main__":
    mine, its = multiprocessing.Pipe(duplex=False)
    multiprocessing.get_context("spawn").Process(target=work, args=(its,)).start()
    mine.recv()
    print("begun", flush=True)
    time.sleep(600)
"""


def test_the_second_process_of_a_study_ends_with_the_first(tmp_path: Path) -> None:
    program = tmp_path / "orphan.py"
    program.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "begun\n"
        first.kill()
        # Until both have ended.
        assert first.stdout.read() == ""
