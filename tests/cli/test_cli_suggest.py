"""grace suggest on a small model: a layer and a radius, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYER = "transformer.h.1.mlp"
FACTS = (("france", "rome"), ("italy", "oslo"))


def record(subject: str, target: str) -> dict[str, Any]:
    return {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "the capital of {} is",
            "target_new": {"str": target},
            "target_true": {"str": "paris"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"who wrote it the capital of {subject} is"],
        "neighborhood_prompts": ["the capital of norway is"],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record(*fact)) + "\n" for fact in FACTS))
    return path


def test_the_layer_suggested_is_one_of_those_tried_and_the_table_has_each(
    grace: Callable[..., Any], gpt2: Path, data: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "layers.png"
    own = ("suggest", "layer", data, "--model", gpt2, "--layers", f"h.0.mlp, {LAYER}")
    done = grace(*own, "--count", 1, "--picture", picture, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [row["layer"] for row in told["table"]][1] == LAYER
    assert told["layer"] in [row["layer"] for row in told["table"]]
    assert picture.exists()
    shown = grace(*own, "--count", 1)
    assert shown.exit_code == 0, shown.output
    assert "generality" in shown.stdout
    assert "of the other wordings" in shown.stdout


def test_the_radius_suggested_lets_no_neighbour_fire(
    grace: Callable[..., Any], gpt2: Path, data: Path, edits_file: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    saved = tmp_path / "saved"
    edits = edits_file(*((f"the capital of {subject} is", f" {new}") for subject, new in FACTS))
    made = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits, "--out", saved,
        "--radius", 0.1,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    done = grace("suggest", "radius", data, "--codebook", saved, "--neighbours", 0, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["radius"] > 0
    assert told["fired"] == {"neighbours": 0}
    shown = grace("suggest", "radius", data, "--codebook", saved, "--neighbours", 0)
    assert f"radius {told['radius']:.4g}: " in shown.stdout
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(record("spain", "oslo")) + "\n")
    done = grace("suggest", "radius", other, "--codebook", saved)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "holds no record of an edit in" in done.stderr


def test_suggest_refuses_in_one_line(
    grace: Callable[..., Any], gpt2: Path, data: Path, tmp_path: Path
) -> None:
    for arguments, code, said in (
        (("layer", data, "--model", gpt2, "--count", 0), 2, "--count must be at least 1"),
        (("layer", tmp_path / "none.jsonl", "--model", gpt2), 3, "no such file"),
        (("layer", data, "--model", gpt2, "--layers", "nowhere"), 2, "nowhere"),
        (("radius", data, "--codebook", tmp_path / "none"), 3, "no such directory"),
        (("layer", data, "--model", gpt2, "--picture", "x.jpg"), 2, "ends in .png or .svg"),
    ):
        done = grace("suggest", *arguments)
        assert (done.exit_code, done.stdout) == (code, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
