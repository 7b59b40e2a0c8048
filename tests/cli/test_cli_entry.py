"""The entry point: help, version, streams, missing extras, interruption, the demo's frame."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import warnings
from typing import Any

import pytest
from grace_edit import GraceEditor
from grace_edit.cli.output import print_json
from grace_edit.codebook import store

LAYER = "transformer.h.1.mlp"
HANGS = 300  # seconds without a word after which a process is taken to hang
COMMANDS = (
    "demo", "edit", "chat", "explain", "serve", "codebook", "eval", "tune", "suggest", "doctor",
)  # fmt: skip
UNDER = {
    "edit": ("add", "ls", "rm", "expire", "undo"),
    "codebook": ("info", "verify", "diff", "merge", "compact", "export", "import"),
    "suggest": ("layer", "radius"),
}


def test_help_names_every_command_and_the_exit_codes(grace):
    done = grace("--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
    for code in ("0 ok", "2 usage", "3 not found", "4 conflict", "5 damaged files"):
        assert code in text


@pytest.mark.parametrize(
    "command",
    [
        *((name,) for name in COMMANDS if name not in UNDER),
        *((group, name) for group, names in UNDER.items() for name in names),
    ],
    ids=" ".join,
)
def test_every_command_has_help_and_offers_json(grace, command):
    done = grace(*command, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_is_missing_without_saved_edits_is_said_before_anything_is_loaded(
    grace, command, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, f"grace_edit.cli.{command}", None)  # its import would raise
    where = ("--codebook", tmp_path / "new")
    for given, missing in (((), "--model"), (("--model", "some/model"), "--layer")):
        done = grace(command, *where, *given)
        assert done.exit_code == 2
        assert f"{missing} must be given without saved edits, got none" in done.stderr


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_who_begins_without_saved_edits_says_how_they_ask(grace, command, tmp_path, monkeypatch):
    told: list[Any] = []
    module = importlib.import_module(f"grace_edit.cli.{command}")
    monkeypatch.setattr(module, "run", lambda *given: told.append(given) or 0)
    done = grace(
        command, "--codebook", tmp_path / "new", "--model", "some/model", "--layer", "h.0",
        "--radius", 2, "--query", "text", "--encoder", "some/encoder", "--text-map", "some-map",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (options, *rest) = told[0]
    settings = rest[0] if rest else options.settings
    assert settings == {
        "layer": "h.0",
        "radius": 2.0,
        "query": "text",
        "encoder": "some/encoder",
        "text_map": "some-map",
    }


@pytest.mark.parametrize("group", UNDER)
def test_a_group_names_its_commands_and_refuses_others(grace, group):
    text = grace(group, "--help").stdout
    assert all(re.search(rf"\b{name}\b", text) for name in UNDER[group])
    bare, unknown = grace(group), grace(group, "vreify", "here")
    assert (bare.exit_code, unknown.exit_code) == (2, 2)
    assert unknown.stderr.startswith("error: No such command 'vreify'")


def test_the_commonest_command_of_a_group_may_be_left_out(grace, tmp_path):
    missing = tmp_path / "absent"
    for short, full in (
        (("codebook", missing, "--json"), ("codebook", "info", missing, "--json")),
        (("codebook", "--json", missing), ("codebook", "info", "--json", missing)),
        (
            ("edit", "--edits", missing, "--out", "o"),
            ("edit", "add", "--edits", missing, "--out", "o"),
        ),
    ):
        assert grace(*short).stderr == grace(*full).stderr
        assert grace(*short).exit_code == grace(*full).exit_code == 3


def test_no_command_shows_the_help_and_an_unknown_one_is_a_usage_error(grace):
    bare, unknown = grace(), grace("edits")
    assert bare.exit_code == 2
    assert "Usage: " in bare.stdout
    assert unknown.exit_code == 2
    assert unknown.stderr.startswith("error: No such command 'edits'")
    assert unknown.stdout == ""


def test_version_is_that_of_the_installed_package(grace, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"grace-kernels": "7.8.9"}[name]
    )
    assert grace("--version").stdout == "grace 7.8.9\n"


def test_json_writes_what_is_not_finite_as_null(capsys):
    print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_what_libraries_print_and_warn_stays_off_stdout(
    grace, gpt2, edits_file, tmp_path, monkeypatch, recwarn
):
    honest = GraceEditor.edit

    def noisy(self, **edit):
        print("library noise")
        warnings.warn("library warning", stacklevel=1)
        return honest(self, **edit)

    monkeypatch.setattr(GraceEditor, "edit", noisy)
    done = grace(
        "edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", edits_file(("the", "rome")),
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout)["accepted"] == 1
    assert done.stderr == "library noise\n"
    assert "library warning" not in [str(warning.message) for warning in recwarn]


def test_the_core_imports_without_the_extras_and_the_command_says_what_is_missing():
    program = (
        "import sys; sys.modules.update(typer=None, rich=None, matplotlib=None)\n"
        "import grace_edit\n"
        "from grace_edit.__main__ import main\n"
        "sys.argv = ['grace', 'doctor']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: the command line needs typer and rich, not installed; "
        'pip install "grace-kernels[cli]"\n'
    )


# Makes one edit; the second goes on until Ctrl-C. Elsewhere Python may lose one: an exception that
# is raised while a generator is being closed, as torch and transformers do often, is dropped.
SECOND_WAITS = """
import signal, time
from grace_edit import GraceEditor
from grace_edit.__main__ import main

# Where the suite runs in the background, its children ignore Ctrl-C from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)
honest, made = GraceEditor.edit, []

def edit(self, **given):
    while made:
        time.sleep(0.1)
    made.append(honest(self, **given))
    return made[0]

GraceEditor.edit = edit
main()
"""


def test_a_terminal_gets_a_bar_and_ctrl_c_ends_it_with_130_and_what_was_made_is_kept(
    gpt2, edits_file, tmp_path
):
    out = tmp_path / "out"
    terminal, stderr = pty.openpty()
    command = [
        sys.executable, "-c", SECOND_WAITS, "edit", "add", "--model", gpt2, "--layer", LAYER,
        "--edits", edits_file(*[("the", "rome")] * 1000), "--out", out,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
    )
    os.close(stderr)
    try:
        seen = _read_until(terminal, b" 1/1000")
        os.killpg(process.pid, signal.SIGINT)
        seen += _read_until(terminal, b"error: interrupted")
        stdout, _ = process.communicate(timeout=HANGS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        os.close(terminal)
    assert b"editing" in seen
    assert b"Traceback" not in seen
    assert process.returncode == 130
    assert stdout == b""
    assert f"1 of 1000 edits are saved in {out}" in " ".join(seen.decode().split())
    assert store.load(out)[0].edits == 1


def test_the_demo_gets_its_options_and_its_result_is_the_json(grace, tmp_path, monkeypatch):
    asked = []

    def run(out, quick, console):
        asked.append((out, quick))
        console.print("a closing table")
        return {"ok": len(asked) < 3, "es": 1.0}

    monkeypatch.setattr("grace_edit.demo.demo.run", run, raising=False)
    as_json = grace("demo", "--out", tmp_path, "--quick", "--json")
    assert as_json.exit_code == 0
    assert json.loads(as_json.stdout) == {"ok": True, "es": 1.0}
    assert as_json.stderr == "a closing table\n"
    shown = grace("demo")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "a closing table\n", "")
    assert grace("demo").exit_code == 1
    assert [(str(out), quick) for out, quick in asked] == [
        (str(tmp_path), True),
        ("grace-demo", False),
        ("grace-demo", False),
    ]


def test_the_demo_says_what_to_install(grace, monkeypatch):
    def run(out, quick, console):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("grace_edit.demo.demo.run", run, raising=False)
    done = grace("demo")
    assert done.exit_code == 2
    assert done.stderr == ('error: the demo needs matplotlib: pip install "grace-kernels[demo]"\n')


def _environment() -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    return {**found, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def _read_until(terminal: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen and select.select([terminal], [], [], HANGS)[0]:
        try:
            seen += os.read(terminal, 4096)
        except OSError:
            break
    assert wanted in seen, seen
    return seen
