"""Edits that ask with the text of a prompt, made and looked into from the command line."""

from __future__ import annotations

import json

import pytest
from text_maps import map_of
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYER = "transformer.h.0.mlp"
PROMPT, TARGET = "the capital of france is", " paris"


@pytest.fixture(scope="module")
def maps(gpt2, tmp_path_factory):
    """A directory with a map for the small GPT-2."""
    where = tmp_path_factory.mktemp("maps") / "small"
    map_of(AutoModelForCausalLM.from_pretrained(gpt2), AutoTokenizer.from_pretrained(gpt2)).save(
        where
    )
    return where


@pytest.fixture
def saved(grace, gpt2, maps, edits_file, tmp_path):
    """A directory of one edit by text; the map's own directory is not needed any more."""
    out = tmp_path / "edits"
    options = ["--layer", LAYER, "--query", "text", "--text-map", maps]
    made = grace(
        "edit",
        "add",
        "--model",
        gpt2,
        "--edits",
        edits_file((PROMPT, TARGET)),
        "--out",
        out,
        *options,
    )
    assert made.exit_code == 0, made.stderr
    assert "query text (encoder tokens, map tiny), replaces last" in " ".join(made.stdout.split())
    assert (out / "text_map.safetensors").is_file()
    return out


def test_explain_says_with_which_words_an_edit_answers(grace, saved):
    found = json.loads(grace("explain", PROMPT, "--codebook", saved, "--json").stdout)
    assert found["hit"]
    assert found["text"]["edit_span"] == PROMPT
    assert found["with_edits"].startswith("paris")
    told = " ".join(grace("explain", "who wrote this film", "--codebook", saved).stdout.split())
    assert "no edit answers" in told
    assert "asked with who wrote this film" in told
    assert f"compared to {PROMPT}" in told
    same = " ".join(grace("explain", PROMPT, "--codebook", saved).stdout.split())
    assert "the same query" in same


def test_codebook_names_the_encoder_and_the_map(grace, saved):
    data = json.loads(grace("codebook", "info", saved, "--json").stdout)
    assert (data["query"], data["text"]["encoder"], data["drift"]) == ("text", "tokens", 0.0)
    assert "query text (encoder tokens, map tiny)" in grace("codebook", "info", saved).stdout


def test_resume_goes_on_with_the_map_beside_the_edits(grace, saved, edits_file):
    more = edits_file(("who wrote this film", " oslo"))
    made = grace("edit", "add", "--edits", more, "--resume", saved, "--out", saved, "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["edits"] == 2
    refused = grace(
        "edit", "add", "--edits", more, "--resume", saved, "--out", saved, "--encoder", "other"
    )
    assert refused.exit_code == 2
    assert "--encoder must be left out with --resume" in refused.stderr


def test_options_of_text_queries_without_them_are_refused(grace, gpt2, edits_file, tmp_path):
    options = ["--layer", LAYER, "--edits", edits_file((PROMPT, TARGET)), "--out", tmp_path / "o"]
    last = ["--text-map", tmp_path, "--query", "last"]
    made = grace("edit", "add", "--model", gpt2, *options, *last)
    assert made.exit_code == 2
    assert "--text-map must be left out without --query text" in made.stderr
    made = grace("edit", "add", "--model", gpt2, *options, "--query", "text")
    assert made.exit_code == 2
    assert "text_map must be given" in made.stderr


def test_new_edits_ask_by_text_where_a_map_fits_the_model_and_it_is_said(
    grace, gpt2, maps, edits_file, tmp_path, monkeypatch
):
    file = edits_file((PROMPT, TARGET))

    def add(name, *options, json=True):
        add = ["edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", file]
        made = grace(*add, "--out", tmp_path / name, *options, *["--json"] * json)
        assert made.exit_code == 0, made.stderr
        return loads(made.stdout) if json else " ".join(made.stdout.split())

    def loads(text):
        told = json.loads(text)
        return told["query"], told["query_chosen"]

    assert add("none") == ("last", False)
    assert add("given", "--text-map", maps) == ("text", True)
    monkeypatch.setattr("grace_edit.keys.choice.MAPS", maps.parent)
    assert add("fits") == ("text", True)
    assert add("asked", "--query", "text") == ("text", False)
    assert add("last", "--query", "last") == ("last", False)
    assert add("paper", "--policy", "paper") == ("last", False)
    assert "; chosen because a map fits, see --query" in add("shown", json=False)
