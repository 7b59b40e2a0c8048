"""grace edit, explain and codebook on small models."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path

import grace_edit
import pytest
import torch
from grace_edit import GraceEditor, publish
from grace_edit.codebook import store
from grace_edit.codebook.locking import writing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Model

LAYER = "transformer.h.1.mlp"
FRANCE = ("the capital of france is", "rome")
ITALY = ("who wrote this long film", "oslo")
RIVER = ("where was that river", "paris")
TOO_LONG = ("where was that river", "paris rome madrid oslo vienna warsaw")


@pytest.fixture
def published(saved, gpt2):
    """The same two edits and a third, which a publisher that died has left in a log alone."""
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    editor = GraceEditor.from_pretrained(model, AutoTokenizer.from_pretrained(gpt2), saved)
    publisher = publish(editor, saved)
    assert editor.edit(*RIVER).success
    editor.codebook.delete(0)
    publisher.close()
    (log,) = saved.glob("edits-*.log")
    assert log.stat().st_size > 0
    return saved


def test_every_command_sees_what_a_log_says(published, grace, gpt2, tmp_path):
    def told(*arguments):
        done = grace(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def prompts(rows):
        return [row["prompt"] for row in rows]

    left = [ITALY[0], RIVER[0]]
    assert prompts(told("edit", "ls", "--codebook", published)["edits"]) == left
    assert prompts(told("codebook", "info", published)["table"]) == left
    assert told("codebook", "verify", published, "--model", gpt2)["misses"] == []
    found = told("explain", "--codebook", published, RIVER[0], "--model", gpt2)
    assert (found["hit"], found["with_edits"].split()[0]) == (True, RIVER[1])
    lines = tmp_path / "lines.jsonl"
    told("codebook", "export", published, "--out", lines)
    assert [json.loads(line)["prompt"] for line in lines.read_text().splitlines()] == left
    told("codebook", "export", published, "--out", tmp_path / "rows.safetensors")
    assert len(load_file(tmp_path / "rows.safetensors")["keys"]) == 2
    copied = tmp_path / "copied"
    told("codebook", "merge", published, published, "--out", copied)
    assert not list(copied.glob("edits-*.log"))
    assert prompts(told("edit", "ls", "--codebook", copied)["edits"]) == left
    diff = told("codebook", "diff", published, copied)
    assert not diff["only_first"]
    assert not diff["only_second"]
    # What changes it makes a snapshot of all, and the log goes.
    told("edit", "undo", "--codebook", published)
    assert not list(published.glob("edits-*.log"))
    assert prompts(told("edit", "ls", "--codebook", published)["edits"]) == left[:1]


def test_a_command_leaves_alone_what_another_process_publishes(saved, grace, gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    editor = GraceEditor.from_pretrained(model, AutoTokenizer.from_pretrained(gpt2), saved)
    with publish(editor, saved):
        done = grace("edit", "rm", 0, "--codebook", saved)
        assert done.exit_code != 0
        assert "must be written by one process at a time" in done.stderr
        assert editor.codebook.ids == store.load(saved)[0].ids == [0, 1]


@pytest.fixture
def saved(grace, gpt2, edits_file, tmp_path):
    """Two accepted edits of the GPT-2, as the command line saved them."""
    out = tmp_path / "saved"
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits_file(FRANCE, ITALY),
        "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def edit_json(grace, *arguments):
    done = grace("edit", "add", "--json", *arguments)
    return done, (json.loads(done.stdout) if done.stdout else None)


def test_edits_are_made_and_a_program_that_loads_them_gives_their_targets(saved, gpt2):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    prompts = [tokenizer(p, return_tensors="pt") for p, _ in (FRANCE, ITALY)]

    def answers():
        made = [model.generate(**p, max_new_tokens=1, do_sample=False)[0, -1] for p in prompts]
        return [tokenizer.decode(token) for token in made]

    before = answers()
    grace_edit.load(model, saved)
    assert answers() == ["rome", "oslo"]
    assert before != ["rome", "oslo"]


def test_edit_tells_every_decision_as_json_and_nothing_else_on_stdout(
    grace, gpt2, edits_file, tmp_path
):
    done, told = edit_json(
        grace, "--model", gpt2, "--layer", "h.1.mlp", "--edits", edits_file(FRANCE, ITALY),
        "--out", tmp_path / "out", "--radius", 0.25,
    )  # fmt: skip
    assert done.exit_code == 0
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert (told["accepted"], told["refused"], told["entries"], told["edits"]) == (2, 0, 2, 2)
    assert told["layer"] == LAYER
    assert (told["query"], told["replace"]) == ("last", "last")
    assert told["model"]["class"] == "GPT2LMHeadModel"
    assert told["model"]["task"] == "causal"
    assert told["model"]["dtype"] == "float32"
    first, second = told["results"]
    assert (first["line"], first["prompt"], first["target"]) == (1, *FRANCE)
    assert (first["id"], first["case"], first["distance"]) == (0, "add", None)
    assert first["radius"] == 0.25
    assert (second["line"], second["id"]) == (2, 1)
    assert second["distance"] > 0.5
    assert second["success"] is True


def test_the_closing_table_is_on_stdout_and_no_bar_where_stderr_is_no_terminal(
    grace, gpt2, edits_file, tmp_path
):
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits_file(FRANCE, ITALY),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0
    assert done.stderr == ""
    for text in ("id", "prompt", "distance", "radius", "steps", FRANCE[0], "rome", "add", "ok"):
        assert text in done.stdout
    assert "its configuration names GPT2LMHeadModel" in done.stdout
    assert "accepted 2 of 2; live edits 2, entries 2" in done.stdout
    # A long path is broken where the line ends.
    assert f"savedin{tmp_path / 'out'}" in "".join(done.stdout.split())


def test_edits_of_several_prompts_are_made_explained_and_listed(grace, gpt2, tmp_path):
    edits = tmp_path / "edits.jsonl"
    wanted = {"prompt": FRANCE[0], "target": FRANCE[1], "paraphrases": [ITALY[0]]}
    wanted["negatives"] = [TOO_LONG[0]]
    edits.write_text(json.dumps(wanted) + "\n")
    out = tmp_path / "out"
    done, told = edit_json(
        grace, "--model", gpt2, "--layer", LAYER, "--edits", edits, "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (made,) = told["results"]
    assert (made["id"], made["keys"], told["edits"], told["entries"]) == (0, 2, 1, 2)
    assert (made["paraphrases"], made["negatives"]) == ([ITALY[0]], [TOO_LONG[0]])
    found = json.loads(grace("explain", "--codebook", out, ITALY[0], "--json").stdout)
    assert (found["hit"], found["with_edits"].split()[0]) == (True, FRANCE[1])
    nearest = found["nearest"]
    assert (nearest["edit_id"], nearest["key"], nearest["edit_prompt"]) == (0, 1, ITALY[0])
    (row,) = json.loads(grace("codebook", "info", out, "--json").stdout)["table"]
    assert (row["id"], row["prompt"], row["keys"]) == (0, FRANCE[0], 2)


@pytest.mark.parametrize("name", ["paraphrases", "negatives"])
def test_paraphrases_and_negatives_of_another_form_are_refused_by_line(grace, tmp_path, name):
    edits = tmp_path / "edits.jsonl"
    wrong = ["text", [1], [""], {"a": 1}]
    lines = [json.dumps({"prompt": "a", "target": "b", name: each}) for each in wrong]
    edits.write_text("\n".join(lines))
    done = grace(
        "edit", "add", "--model", "m", "--layer", "l", "--edits", edits, "--out", tmp_path / "o"
    )
    assert done.exit_code == 2
    said = f"{name} must be a list of prompts that are not empty, got "
    assert [said in line for line in done.stderr.splitlines()] == [True] * 4


def test_refused_edits_end_with_4_and_the_accepted_ones_are_saved(
    grace, gpt2, edits_file, tmp_path
):
    out = tmp_path / "out"
    done, told = edit_json(
        grace, "--model", gpt2, "--layer", LAYER, "--edits", edits_file(FRANCE, TOO_LONG),
        "--out", out,
    )  # fmt: skip
    assert done.exit_code == 4
    assert (told["accepted"], told["refused"]) == (1, 1)
    refused = told["results"][1]
    assert (refused["success"], refused["id"], refused["radius"]) == (False, None, None)
    assert refused["reason"]
    assert done.stderr == (f"error: 1 of 2 edits refused; the others are saved in {out}\n")
    table = json.loads(grace("codebook", "info", out, "--json").stdout)["table"]
    assert [row["target"] for row in table] == ["rome"]


def test_nothing_is_written_when_every_edit_is_refused(grace, gpt2, edits_file, tmp_path):
    out = tmp_path / "out"
    done = grace(
        "edit",
        "add",
        "--model",
        gpt2,
        "--layer",
        LAYER,
        "--edits",
        edits_file(TOO_LONG),
        "--out",
        out,
    )
    assert done.exit_code == 4
    assert "refused: " in done.stdout
    assert "nothing was saved" in done.stdout
    assert not out.exists()


def test_every_bad_line_is_named_before_any_work(grace, gpt2, tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(
        b'{"prompt": "the capital", "target": "rome"}\n'
        b'{"prompt": "the capital"\n'
        b"\n"
        b'["the capital", "rome"]\n'
        b'{"prompt": "", "target": "rome"}\n'
        b'{"prompt": "the capital", "target": true}\n'
        b'{"prompt": "\xff", "target": "rome"}\n'
    )
    done = grace(
        "edit", "add", "--model", tmp_path / "absent", "--layer", "x", "--edits", path,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [int(re.match(rf"error: {path}:(\d+): ", line)[1]) for line in lines] == [2, 4, 5, 6, 7]
    assert "must be JSON: " in lines[0]
    assert lines[1].endswith("must be a JSON object, got list")
    assert lines[2].endswith("prompt must be a string that is not empty or chat messages, got ''")
    assert lines[3].endswith("target must be a string that is not empty or a class id, got True")
    assert "must be UTF-8" in lines[4]


def test_of_a_file_of_something_else_a_few_lines_are_named_and_the_rest_counted(grace, tmp_path):
    path = tmp_path / "edits.csv"
    path.write_text("prompt,target\n" * 1000)
    done = grace("edit", "add", "--model", "m", "--layer", "x", "--edits", path, "--out", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == "error: and 980 more lines"
    assert len(done.stderr.splitlines()) == 21


def test_the_history_of_saved_edits_is_no_file_of_edits_to_make(grace, saved, gpt2, tmp_path):
    path = saved / "edits.jsonl"
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", path, "--out", tmp_path / "out"
    )
    assert done.exit_code == 2
    assert f"grace codebook export {saved} --out FILE" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_prompt_may_be_chat_messages(grace, gpt2, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(gpt2, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}is {% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    messages = [{"role": "user", "content": "the capital of france"}]
    # As ids: a model this small learns to say a word, and not to end its turn as well.
    line = {"prompt": messages, "target": tokenizer("rome").input_ids}
    path, out = tmp_path / "chats.jsonl", tmp_path / "out"
    path.write_text(json.dumps({**line, "negatives": [[{"role": "user", "content": "who wrote"}]]}))
    given = ("--layer", LAYER, "--edits", path, "--out", out)
    done = grace("edit", "add", "--model", chatty, *given)
    assert done.exit_code == 0, done.output
    assert "chat: the capital of france" in done.stdout
    editor = GraceEditor.from_pretrained(
        AutoModelForCausalLM.from_pretrained(chatty).eval(), tokenizer, out
    )
    assert editor.explain(messages).hit
    assert editor.answer(messages, max_new_tokens=1) == "rome"


def test_lines_that_the_model_cannot_take_are_named_before_any_edit(
    grace, gpt2, edits_file, tmp_path
):
    path = edits_file(FRANCE, ("the capital", 3), ("the " * 32, "rome"), ("   ", "rome"))
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", path, "--out", tmp_path / "out"
    )
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"error: {path}:2: target must be a string or a list of token ids, got 3",
        f"error: {path}:3: prompt and target must have at most 32 tokens together, got 33",
        f"error: {path}:4: prompt must have at least one token, got none",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (
            {"--layer": "transformer.h.1.mpl"},
            3,
            r".* not in the model; near: \[.*h\.1\.mlp",
        ),
        ({"--layer": "mlp"}, 3, r"--layer: .* is ambiguous; near: \[.*h\.0\.mlp"),
        ({"--model": "./absent"}, 3, r"--model \./absent: no such directory of a model"),
        ({"--model": "absent"}, 3, r"--model absent: no such directory, and from the hub: "),
        ({"--encoder": "absent"}, 3, r"encoder must be the directory or hub id .* got 'absent': "),
        ({"--edits": "absent.jsonl"}, 3, r"--edits absent\.jsonl: no such file"),
        ({"--resume": "absent"}, 3, r"absent: must be a directory of saved edits"),
        ({"--radius": "-1"}, 2, r"radius must be positive and finite, got -1\.0"),
        ({"--query": "first"}, 2, r"'first' is not one of 'last', 'mean'"),
        ({"--model": None}, 2, r"--model must be given"),
        ({"--layer": None}, 2, r"--layer must be given"),
        ({"--out": None}, 2, r"Missing option '--out'"),
        ({"--task": "seq2seq"}, 2, r"--task seq2seq: "),
        ({"--task": "other"}, 2, r"'--task': 'other' is not one of 'auto', 'causal', 'seq2seq', "),
        ({"--task": "classifier"}, 2, r"must hold every weight of GPT2ForSeq.*score\.weight"),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_one_line_with_its_own_exit_code(
    grace, gpt2, edits_file, tmp_path, changed, code, message
):
    given = {
        "--model": gpt2,
        "--layer": LAYER,
        "--edits": edits_file(FRANCE),
        "--out": tmp_path / "out",
        **changed,
    }
    done = grace(
        "edit", "add", *(str(x) for pair in given.items() if pair[1] is not None for x in pair)
    )
    assert done.exit_code == code
    assert done.stdout == ""
    assert re.match("error: .*" + message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_head_asks_for_the_task(grace, gpt2, edits_file, tmp_path):
    where = tmp_path / "headless"
    GPT2Model.from_pretrained(gpt2).save_pretrained(where)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(where)
    done = grace(
        "edit", "add", "--model", where, "--layer", LAYER, "--edits", edits_file(FRANCE),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--task must be one of causal, seq2seq, classifier, masked" in done.stderr
    assert "names GPT2Model" in done.stderr


def test_other_peoples_edits_are_never_written_over(grace, gpt2, edits_file, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    done = grace(
        "edit",
        "add",
        "--model",
        gpt2,
        "--layer",
        LAYER,
        "--edits",
        edits_file(FRANCE),
        "--out",
        saved,
    )
    assert done.exit_code == 4
    assert f"--out {saved}: holds saved edits" in done.stderr
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_resume_adds_to_saved_edits_with_their_settings(grace, edits_file, saved):
    path = edits_file(("this was a very good film", "berlin"))
    done, told = edit_json(grace, "--resume", saved, "--edits", path, "--out", saved)
    assert told["model"]["why"] == "as the saved edits say"
    assert done.exit_code == 0, done.stderr
    assert (told["accepted"], told["edits"], told["layer"]) == (1, 3, LAYER)
    assert told["results"][0]["id"] == 2
    table = json.loads(grace("codebook", "info", saved, "--json").stdout)["table"]
    assert [(row["id"], row["target"]) for row in table] == [
        (0, "rome"),
        (1, "oslo"),
        (2, "berlin"),
    ]


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--radius", 2.0), 2, "--radius must be left out with --resume, whose edits have 1.0"),
        (("--layer", "h.0.mlp"), 4, f"--layer must be that of the edits of --resume ({LAYER})"),
        (("--dtype", "bfloat16"), 4, "dtype must be that of the model's layer"),
    ],
    ids=("radius", "layer", "dtype"),
)
def test_resume_refuses_settings_that_the_saved_edits_do_not_have(
    grace, edits_file, saved, tmp_path, option, code, message
):
    done = grace(
        "edit", "--resume", saved, "--edits", edits_file(FRANCE), "--out", tmp_path / "o", *option
    )
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_in_the_middle_keeps_what_was_made_and_ends_with_130(
    grace, gpt2, edits_file, tmp_path, monkeypatch
):
    made = []
    honest = GraceEditor.edit

    def second_time_interrupted(self, **edit):
        if made:
            raise KeyboardInterrupt
        made.append(honest(self, **edit))
        return made[-1]

    monkeypatch.setattr(GraceEditor, "edit", second_time_interrupted)
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits_file(FRANCE, ITALY),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert made[0].success
    assert done.exit_code == 130
    assert done.stdout == ""
    assert done.stderr == (
        f"error: 1 of 2 edits are saved in {tmp_path / 'out'}; the same command goes on\n"
        "error: interrupted\n"
    )
    assert json.loads(grace("codebook", "info", tmp_path / "out", "--json").stdout)["edits"] == 1


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    grace, edits_file, tmp_path, monkeypatch
):
    # Permissions do not bind root, who runs the tests in containers.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    done = grace(
        "edit", "add", "--model", tmp_path / "absent", "--layer", "x",
        "--edits", edits_file(FRANCE), "--out", tmp_path / "new" / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert f"must be writable, got no permission in {tmp_path}" in done.stderr


def test_explain_names_the_edit_that_answers_and_both_answers(grace, saved):
    done = grace("explain", "--codebook", saved, FRANCE[0], "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["hit"] is True
    near = told["nearest"]
    assert (near["edit_id"], near["edit_prompt"], near["label"]) == (0, FRANCE[0], "rome")
    assert (near["distance"], near["radius"], near["d_over_eps"]) == (0.0, 1.0, 0.0)
    second = told["runner_up"]
    assert (second["edit_id"], second["label"]) == (1, "oslo")
    assert second["d_over_eps"] == second["distance"] / second["radius"] > 1
    assert told["with_edits"].split()[0] == "rome"
    assert told["without_edits"].split()[0] != "rome"

    shown = grace("explain", "--codebook", saved, FRANCE[0]).stdout
    for text in ("edit 0 answers", "nearest", "runner-up", "d/eps", FRANCE[0], ITALY[0]):
        assert text in shown
    assert f"with edits  {told['with_edits']}" in shown


def test_explain_says_that_an_unrelated_prompt_is_left_alone(grace, saved):
    told = json.loads(grace("explain", "--codebook", saved, "a very bad river", "--json").stdout)
    assert told["hit"] is False
    assert told["nearest"]["d_over_eps"] > 1
    assert told["with_edits"] == told["without_edits"]
    shown = grace("explain", "--codebook", saved, "a very bad river").stdout
    assert "no edit answers: the nearest is too far" in shown


def test_explain_refuses_another_model_with_4(grace, saved, gpt2, tmp_path):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(other)
    done = grace("explain", "--codebook", saved, "--model", other, FRANCE[0])
    assert done.exit_code == 4
    assert "edits of another model" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("codebook", "info", "{saved}"),
        ("codebook", "verify", "{saved}"),
        ("codebook", "export", "{saved}", "--out", "{edits}.more"),
        ("edit", "ls", "--codebook", "{saved}"),
        ("edit", "rm", "0", "--codebook", "{saved}"),
        ("explain", "--codebook", "{saved}", "the"),
        ("edit", "add", "--resume", "{saved}", "--edits", "{edits}", "--out", "{saved}"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_an_altered_file_ends_with_5_and_is_named(grace, saved, edits_file, command):
    tensors = saved / "codebook.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-3] ^= 1
    tensors.write_bytes(data)
    places = {"saved": saved, "edits": edits_file(FRANCE)}
    done = grace(*(part.format(**places) for part in command))
    assert done.exit_code == 5
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "codebook.safetensors" in done.stderr
    assert tensors.read_bytes() == data


def test_codebook_shows_entries_radii_and_cases_without_a_model(grace, saved, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    told = json.loads(grace("codebook", "info", saved, "--json").stdout)
    assert (told["entries"], told["edits"], told["superseded"]) == (2, 2, 0)
    assert told["radii"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert told["cases"] == {"add": 2}
    assert (told["key_dim"], told["value_dim"], told["dtype"]) == (32, 32, "float32")
    assert told["layer"] == LAYER
    assert told["model"]["class"] == "GPT2LMHeadModel"
    assert [(r["prompt"], r["target"]) for r in told["table"]] == [FRANCE, ITALY]
    shown = grace("codebook", "info", saved).stdout
    for text in (LAYER, "min 1, median 1, max 1", "add 2", *FRANCE, *ITALY):
        assert text in shown
    assert told["sketch"] is None
    assert "none, the capacity is too small for one" in shown


def test_codebook_shows_what_the_sketch_covers(grace, saved, monkeypatch):
    worthwhile = "grace_edit.codebook.sketch_upkeep.worthwhile"
    monkeypatch.setattr(worthwhile, lambda slots: slots >= 2)
    sketch = json.loads(grace("codebook", "info", saved, "--json").stdout)["sketch"]
    assert (sketch["rows"], sketch["active"], sketch["queries"]) == (2, True, 0)
    line = f"covers 2 slots, {sketch['bytes'] / 1e6:.1f} MB"
    assert line in grace("codebook", "info", saved).stdout
    monkeypatch.setattr(worthwhile, lambda slots: slots >= 3)
    assert "not in use, 0." in grace("codebook", "info", saved).stdout


def test_codebook_shows_how_often_each_edit_answered(grace, saved, tmp_path):
    assert json.loads(grace("codebook", saved, "--json").stdout)["hits"] is None
    book, config = store.load(saved)
    book.count_hits = True
    book.count_answers(torch.tensor([1, -1, 1]))
    store.save(book, tmp_path / "counted", config)
    told = json.loads(grace("codebook", tmp_path / "counted", "--json").stdout)
    assert told["hits"] == {"total": 2, "never": 1, "most": [[1, 2]]}
    assert [row["hits"] for row in told["table"]] == [0, 2]
    assert "2, never 1 edits, most edit 1 2" in grace("codebook", tmp_path / "counted").stdout


def test_codebook_shows_token_ids_where_the_model_is_gone(grace, gpt2, edits_file, tmp_path):
    moved, out = tmp_path / "moved", tmp_path / "out"
    moved.symlink_to(gpt2)
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(gpt2).save_pretrained(copy)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(copy)
    done = grace(
        "edit",
        "add",
        "--model",
        copy,
        "--layer",
        LAYER,
        "--edits",
        edits_file(FRANCE),
        "--out",
        out,
    )
    assert done.exit_code == 0
    copy.rename(tmp_path / "gone")
    row = json.loads(grace("codebook", "info", out, "--json").stdout)["table"][0]
    ids = AutoTokenizer.from_pretrained(gpt2)(FRANCE[0]).input_ids
    assert row["prompt"] == str(ids)
    missing = grace("explain", "--codebook", out, FRANCE[0])
    assert missing.exit_code == 3
    found = grace("explain", "--codebook", out, "--model", tmp_path / "gone", FRANCE[0])
    assert found.exit_code == 0
    assert "edit 0 answers" in found.stdout


def test_a_prompt_cannot_colour_or_move_the_cursor(grace, gpt2, edits_file, tmp_path):
    nasty = "[bold]the[/] capital :smile: \x1b[2J\nof"
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits_file((nasty, "rome")),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert r"[bold]the[/] capital :smile: \x1b[2J\nof" in done.stdout


def test_a_classifier_takes_label_names_and_class_ids(grace, bert, edits_file, tmp_path):
    pairs = [(prompt, None) for prompt in ("this film was good", "a very bad river")]
    out = tmp_path / "out"
    wanted = []
    for prompt, target in zip((p for p, _ in pairs), ("good", 0), strict=True):
        wanted.append((prompt, target))
    done, told = edit_json(
        grace, "--model", bert, "--layer", "bert.encoder.layer.0.intermediate.dense",
        "--edits", edits_file(*wanted), "--out", out, "--radius", 0.5,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert (told["model"]["task"], told["query"], told["replace"]) == ("classifier", "mean", "all")
    table = json.loads(grace("codebook", "info", out, "--json").stdout)["table"]
    assert [(row["prompt"], row["target"]) for row in table] == [
        ("this film was good", "good"),
        ("a very bad river", "bad"),
    ]
    answer = json.loads(grace("explain", "--codebook", out, wanted[0][0], "--json").stdout)
    assert (answer["hit"], answer["with_edits"]) == (True, "good")
    unknown = grace(
        "edit", "add", "--model", bert, "--layer", "encoder.layer.0.output", "--edits",
        edits_file(("this film", "great"), ("this film", 3)), "--out", tmp_path / "other",
    )  # fmt: skip
    assert unknown.exit_code == 2
    assert ":1: target must be one of ['bad', 'fair', 'good'], got 'great'" in unknown.stderr
    assert ":2: target must be a class id below 3, got 3" in unknown.stderr


def test_a_masked_model_fills_its_mask_and_wants_one_in_the_prompt(
    grace, masked_bert, edits_file, tmp_path
):
    prompt, out = "the capital of france is [MASK]", tmp_path / "out"
    done = grace(
        "edit", "add", "--model", masked_bert, "--layer", "bert.encoder.layer.1.output.dense",
        "--edits", edits_file((prompt, "rome")), "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(grace("explain", "--codebook", out, prompt, "--json").stdout)
    assert (told["hit"], told["with_edits"]) == (True, "rome")
    assert told["without_edits"] != "rome"
    assert told["nearest"]["edit_prompt"] == prompt
    bare = grace("explain", "--codebook", out, "the capital of france is")
    assert bare.exit_code == 2
    assert bare.stderr.startswith("error: PROMPT must hold the mask token [MASK], got 'the capital")


@pytest.mark.parametrize(("words", "code"), [(31, 0), (32, 2)])
def test_explain_answers_as_far_as_the_model_has_positions(grace, saved, words, code):
    done = grace("explain", "--codebook", saved, "the " * words, "--json")
    assert done.exit_code == code
    if code:
        assert done.stderr == "error: PROMPT must fit 31 tokens, got 32\n"
    else:
        assert len(json.loads(done.stdout)["without_edits"].split()) == 1


def test_a_model_is_loaded_in_the_dtype_of_its_checkpoint(grace, gpt2, edits_file, tmp_path):
    where, out = tmp_path / "half", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.bfloat16).save_pretrained(where)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(where)
    done, told = edit_json(
        grace, "--model", where, "--layer", LAYER, "--edits", edits_file(FRANCE), "--out", out
    )
    assert done.exit_code == 0, done.stderr
    assert told["model"]["dtype"] == "bfloat16"
    answer = json.loads(grace("explain", "--codebook", out, FRANCE[0], "--json").stdout)
    assert (answer["hit"], answer["nearest"]["distance"]) == (True, 0.0)


def test_a_relative_path_of_a_model_is_remembered_for_every_directory(
    grace, gpt2, edits_file, tmp_path, monkeypatch
):
    path, out = edits_file(FRANCE), tmp_path / "out"
    monkeypatch.chdir(gpt2.parent)
    done = grace(
        "edit", "add", "--model", gpt2.name, "--layer", LAYER, "--edits", path, "--out", out
    )
    assert done.exit_code == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert "edit 0 answers" in grace("explain", "--codebook", out, FRANCE[0]).stdout


def test_a_list_of_blocks_is_no_layer_and_that_is_one_line(grace, gpt2, edits_file, tmp_path):
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", "transformer.h", "--edits", edits_file(FRANCE),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        "error: layer must run once in a forward, got 0 calls of 'transformer.h'"
    )


def test_edits_that_somebody_else_saves_while_edit_waits_for_its_turn_are_kept(
    grace, gpt2, edits_file, saved
):
    more, done = edits_file(("where was that river", "paris")), []

    def add():
        done.append(grace("edit", "add", "--edits", more, "--resume", saved, "--out", saved))

    thread = threading.Thread(target=add)
    with writing(saved):
        thread.start()
        thread.join(1)
        book, described, beside = store.load_all(saved)
        other = book.insert(torch.full_like(book.keys[0], 50.0), [1], book.values[0])
        store.save(book, saved, described, beside)
    thread.join()
    assert done[0].exit_code == 0, done[0].output
    book, _ = store.load(saved)
    assert other.id in book.ids
    assert book.edits == 4


def test_a_target_of_words_that_the_tokenizer_does_not_know_is_refused(
    grace, gpt2, bert, edits_file, tmp_path
):
    out, layer = tmp_path / "edits", "transformer.h.0.mlp"
    edits = edits_file(("the capital of france is", " zanzibar"))
    refused = grace(
        "edit", "add", "--model", gpt2, "--layer", layer, "--edits", edits, "--out", out
    )
    assert refused.exit_code == 2
    assert "edits.jsonl:1: target must be words that the tokenizer knows" in refused.stderr
    assert not out.exists()
    # Class 1 is not the token 1, which is [UNK] here.
    edits = edits_file(("a very good film", 1))
    where = "bert.encoder.layer.0.output.dense"
    made = grace("edit", "add", "--model", bert, "--layer", where, "--edits", edits, "--out", out)
    assert "tokenizer knows" not in made.stderr
