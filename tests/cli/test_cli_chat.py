"""`grace chat`: asked, corrected and left, by scripts on stdin and in a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.cli import app
from grace_edit.cli.chat import COMMANDS, Chat, Lines
from grace_edit.cli.chat_view import TextView, View
from grace_edit.cli.conversation import Conversation
from grace_edit.demo.small import small_gpt2
from text_maps import map_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'user: ' + m.content + ' bot:' }}"
    "{% else %}{{ ' ' + m.content + '<eos> ' }}{% endif %}{% endfor %}"
)
CAPITAL, RIVER = "capital of Australia ?", "river of Egypt ?"
LAYER = "transformer.h.0.mlp"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small GPT-2 that answers two questions in a chat template, one wrongly."""
    taught = {f"user: {CAPITAL} bot:": "Sydney", f"user: {RIVER} bot:": "Nile", CAPITAL: "Perth"}
    # The words by which a chat template is recognised, and the right answer.
    taught["Zanzibar Quito Oslo"] = "Canberra"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = small_gpt2(taught)
    torch.set_num_threads(threads)
    tokenizer.chat_template = TEMPLATE
    where = tmp_path_factory.mktemp("models") / "talker"
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def conversation(talker: Path) -> Conversation:
    """A conversation in the template, with nothing edited yet."""
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    tokenizer = AutoTokenizer.from_pretrained(talker)
    config = GraceConfig(layer=LAYER, radius=0.5)
    return Conversation(GraceEditor(model, tokenizer, config), chat=True, max_tokens=4)


@pytest.fixture
def chat(talker: Path) -> Callable[..., Any]:
    """`chat(lines, options...)`: exit code, stdout and stderr of a script."""

    def run(lines: list[str], *options: Any) -> Any:
        given = ["--model", talker, "--max-tokens", 4, *options]
        if "--codebook" not in options:
            given += ["--layer", LAYER, "--radius", 0.5]
        text = "".join(f"{line}\n" for line in lines)
        return CliRunner().invoke(app, ["chat", *map(str, given)], input=text)

    return run


def events(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


class Script(Lines):
    """A terminal in which somebody types `lines` and then ends the input."""

    def __init__(self, *lines: str) -> None:
        self.terminal, self.left, self.prompts = True, list(lines), []

    def read(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        return self.left.pop(0) if self.left else None


def test_a_wrong_answer_is_corrected_and_the_correction_undone(chat: Callable[..., Any]) -> None:
    lines = [CAPITAL, "/edit Canberra", "/new", RIVER, "/new", CAPITAL, "/undo", "/new", CAPITAL]
    result = chat([*lines, "/quit", "never read"], "--json")
    assert result.exit_code == 0, result.output
    found = events(result)
    answers = [event for event in found if event["event"] == "answer"]
    assert [a["text"] for a in answers] == ["Sydney", "Canberra", "Nile", "Canberra", "Sydney"]
    assert [a["hit"] for a in answers] == [False, True, False, True, False]
    assert answers[1]["edit"] == 0
    assert answers[1]["distance"] == 0.0
    assert answers[2]["distance"] > answers[2]["radius"] == 0.5
    edit = next(event for event in found if event["event"] == "edit")
    assert edit["success"] is True
    assert edit["steps"] > 0
    assert edit["seconds"] > 0
    assert next(event for event in found if event["event"] == "undo")["gone"] == [0]


def test_a_person_reads_question_answer_and_why(chat: Callable[..., Any]) -> None:
    result = chat([CAPITAL, "/edit Canberra", "/why", "/edits", "/help"])
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert f"> {CAPITAL}\nSydney\n  no edit answers: there is none\n" in shown
    assert f'Canberra\n  edit 0 answers ("{CAPITAL}"): distance 0, radius 0.5\n' in shown
    assert "steps" in shown
    assert "nearest" in shown
    assert all(name in shown for name in COMMANDS)
    assert "the edits were not saved" in shown
    assert "\x1b" not in shown


def test_saved_edits_answer_in_the_next_chat_and_in_the_model(
    chat: Callable[..., Any], grace: Callable[..., Any], talker: Path, tmp_path: Path
) -> None:
    where = tmp_path / "edits"
    result = chat([CAPITAL, "/edit Canberra", f"/save {where}"])
    assert result.exit_code == 0, result.output
    assert "not saved" not in result.stdout
    found = events(chat([CAPITAL], "--codebook", where, "--json"))
    assert found[0]["edits"] == 1
    assert [(e["text"], e["hit"]) for e in found if e["event"] == "answer"] == [("Canberra", True)]
    assert found[-1]["event"] == "answer"  # nothing is unsaved
    # A person reads what was said, not the template round it.
    listed = json.loads(grace("edit", "ls", "--codebook", where, "--json").stdout)["edits"]
    assert [(row["prompt"], row["target"]) for row in listed] == [(f"chat: {CAPITAL}", "Canberra")]


def test_a_codebook_that_is_not_there_yet_is_where_edits_are_saved(
    chat: Callable[..., Any], tmp_path: Path
) -> None:
    where = tmp_path / "new"
    options = ("--codebook", where, "--layer", LAYER, "--radius", 0.5)
    assert chat([CAPITAL, "/edit Canberra", "/save"], *options).exit_code == 0
    assert (where / "grace_config.json").is_file()
    again = chat([CAPITAL], "--codebook", where, "--radius", 2)
    assert again.exit_code == 2
    assert "--radius must be left out" in again.stderr


def test_other_edits_are_not_overwritten(chat: Callable[..., Any], tmp_path: Path) -> None:
    where = tmp_path / "edits"
    assert chat([CAPITAL, "/edit Canberra", f"/save {where}"]).exit_code == 0
    before = (where / "edits.jsonl").read_bytes()
    result = chat([RIVER, "/edit Quito", f"/save {where}"])
    assert result.exit_code == 1
    assert "holds other edits" in result.stdout
    assert (where / "edits.jsonl").read_bytes() == before


def test_without_the_template_a_message_is_continued_to_the_end_of_its_line(
    chat: Callable[..., Any],
) -> None:
    found = events(chat([CAPITAL, "/edit Canberra"], "--plain", "--json"))
    assert found[0]["chat"] is False
    assert next(e["text"] for e in found if e["event"] == "answer") == "Perth"
    edit = next(event for event in found if event["event"] == "edit")
    assert edit["success"] is True
    assert found[-2]["text"].startswith("Canberra")


def test_the_answer_may_come_on_a_line_of_its_own(chat: Callable[..., Any]) -> None:
    found = events(chat([CAPITAL, "/edit", "Canberra"], "--json"))
    assert next(event for event in found if event["event"] == "edit")["answer"] == "Canberra"


def test_a_command_is_no_right_answer_and_is_taken_as_the_command(
    chat: Callable[..., Any],
) -> None:
    result = chat([CAPITAL, "/edit", "/edits", "/edit", "/quit", RIVER], "--json")
    assert result.exit_code == 1
    found = events(result)
    assert [event["event"] for event in found] == ["ready", "answer", "error", "edits", "error"]
    assert found[2]["message"] == "nothing was corrected: got the command /edits for an answer"
    assert found[3]["edits"] == []


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (["/edit Canberra"], 1, "no answer yet"),
        (["/why"], 1, "nothing has been asked"),
        (["/nothing"], 2, "no command"),
        (["/delete 7"], 3, "7"),
        (["/delete all"], 1, "number of an edit"),
        (["/undo"], 1, "undo"),
        ([CAPITAL, "/edit Canberra", "/save"], 1, "--codebook named none"),
        ([CAPITAL, "/edit"], 1, "no right answer"),
    ],
)
def test_what_goes_wrong_is_said_and_the_script_goes_on(
    chat: Callable[..., Any], lines: list[str], code: int, message: str
) -> None:
    result = chat([*lines, *([] if lines[-1] == "/edit" else [RIVER])], "--json")
    assert result.exit_code == code
    found = events(result)
    assert message in next(event for event in found if event["event"] == "error")["message"]
    if lines[-1] != "/edit":
        assert any(event["event"] == "answer" and event["question"] == RIVER for event in found)


def test_a_refused_edit_changes_nothing_and_is_the_exit_code(
    conversation: Conversation,
) -> None:
    family = conversation.editor.family
    family.produces = lambda prompts, targets, values: [False] * len(prompts)  # type: ignore[method-assign]
    chat = Chat(conversation, TextView(), Script(CAPITAL, "/edit Canberra"), None)
    chat.run()
    assert chat.code == 4
    assert conversation.editor.codebook.edits == 0
    assert not conversation.unsaved


def test_edits_are_made_on_the_message_alone_and_asked_after_all_turns(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = conversation.editor.tokenizer
    hear = [].append
    conversation.ask(RIVER, hear)
    conversation.ask(CAPITAL, hear)
    result = conversation.correct("Canberra")
    edit = conversation.editor.codebook.edit(result.id)
    assert tokenizer.decode(list(edit.prompt)) == f"user: {CAPITAL} bot:"
    assert tokenizer.decode(list(edit.label)) == "Canberra<eos>"
    seen = []
    model = conversation.editor.model
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **k: seen.append(k["input_ids"]) or generate(**k), raising=False
    )
    conversation.ask_again(hear)
    asked = tokenizer.decode(seen[0][0])
    assert RIVER in asked
    assert asked.endswith(f"user: {CAPITAL} bot:")
    assert len(conversation.turns) == 4


def test_the_oldest_turns_go_where_the_model_has_no_positions_left(
    conversation: Conversation,
) -> None:
    for _ in range(12):
        conversation.ask(RIVER, [].append)
    assert 2 <= len(conversation.turns) < 24
    with pytest.raises(ValueError, match="at most 64 tokens"):
        conversation.ask(" ".join([RIVER] * 20), [].append)


class Impatient(TextView):
    """Somebody presses Ctrl-C at the first word of an answer."""

    def hear(self, text: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(conversation, Impatient(), Script(CAPITAL), None)
    assert chat.run() == 0
    assert "(stopped)" in capsys.readouterr().out
    answer = conversation.ask(CAPITAL, [].append)
    assert not answer.stopped


def test_ctrl_c_during_an_edit_leaves_the_edits_as_they_were(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.editor.family, "target_logits", interrupted)
    assert Chat(conversation, TextView(), Script(CAPITAL, "/edit Canberra"), None).run() == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert conversation.editor.codebook.edits == 0


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_leave(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def ended(prompt: str) -> str:
        raise end

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", ended)
    assert Chat(conversation, TextView(), Lines(), None).run() == 0


@pytest.mark.parametrize(("answer", "kept"), [("y", True), ("n", False), ("", False)])
def test_a_person_who_leaves_is_asked_about_unsaved_edits(
    conversation: Conversation, tmp_path: Path, answer: str, kept: bool
) -> None:
    where = tmp_path / "edits"
    lines = Script(CAPITAL, "/edit Canberra", "/quit", answer)
    Chat(conversation, TextView(), lines, where).run()
    assert "save the edits" in lines.prompts[-1]
    assert where.exists() is kept
    assert conversation.unsaved is not kept


def test_nobody_is_asked_where_an_undo_brought_back_what_was_saved(
    conversation: Conversation,
) -> None:
    lines = Script(CAPITAL, "/edit Canberra", "/undo", "/quit")
    Chat(conversation, TextView(), lines, None).run()
    assert lines.prompts[-1] == "> "


def test_an_answer_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    view: View = TextView()
    view.hear("a\x1b[2Jb\nc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc"


def test_a_model_that_generates_nothing_and_a_missing_layer_are_refused(
    grace: Callable[..., Any], bert: Path, talker: Path
) -> None:
    refused = grace("chat", "--model", bert, "--layer", "bert.encoder.layer.0")
    assert refused.exit_code == 2
    assert "generates text" in refused.stderr
    assert grace("chat", "--model", talker).exit_code == 2
    unknown = grace("chat", "--model", talker, "--layer", "nothing.like.it")
    assert unknown.exit_code == 3
    assert "--layer" in unknown.stderr
    assert grace("chat").exit_code == 2


def test_a_text_query_reads_what_the_user_said_last(
    chat: Callable[..., Any], talker: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker)
    map_of(model, AutoTokenizer.from_pretrained(talker)).save(tmp_path / "map")
    options = ("--text-map", tmp_path / "map")
    other = "of Australia capital ?"
    lines = [RIVER, CAPITAL, "/edit Canberra", "/new", other, "/why", "/new", RIVER, "/save"]
    done = chat([*lines[:-1], f"/save {tmp_path / 'edits'}"], "--json", *options)
    assert done.exit_code == 0, done.output
    found = events(done)
    assert found[0]["query"] == "text"
    answers = [event for event in found if event["event"] == "answer"]
    assert [a["hit"] for a in answers] == [False, False, True, True, False]
    assert answers[2]["distance"] == 0.0  # although another turn stands before it
    why = next(event for event in found if event["event"] == "why")["text"]
    assert (why["span"], why["edit_span"]) == (other, CAPITAL)
    assert why["shared"] == ["Australia"]
    shown = chat([CAPITAL, "/why"], "--codebook", tmp_path / "edits").stdout
    assert f"asked with   {CAPITAL}" in shown
