"""What clients do wrong, and what goes wrong for them: clear errors, and nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grace_edit import GraceEditor
from grace_edit.cli import app as command
from grace_edit.server.app import build_app
from server_lab import CAPITAL, RIVER, TOKEN, WRITER, Client, both, serving
from typer.testing import CliRunner

CHAT, EDITS = "/v1/chat/completions", "/v1/edits"
MESSAGES = [{"role": "user", "content": CAPITAL}]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, b"{nope", 400, "must be JSON"),
        (CHAT, b"\xff\xfe", 400, "JSON"),
        (CHAT, b"[]", 422, "dictionary"),
        pytest.param(CHAT, b"[" * 60_000, 400, "nested less deeply", id="deep"),
        (CHAT, {}, 400, "messages must be a list of at least one message"),
        (CHAT, {"messages": ["hello"]}, 400, "messages[0] must be an object"),
        (CHAT, {"messages": [{"role": 1, "content": "a"}]}, 400, "messages[0].role must be"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content must be"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            400,
            "text parts",
        ),
        (CHAT, {"messages": MESSAGES, "max_tokens": "many"}, 400, "max_tokens must be"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens must be"),
        (CHAT, {"messages": MESSAGES, "temperature": -1}, 400, "temperature must be"),
        (CHAT, {"messages": MESSAGES, "frequency_penalty": -1}, 400, "frequency_penalty must"),
        (CHAT, {"messages": MESSAGES, "stream": "yes"}, 400, "stream must be true or false"),
        (CHAT, {"messages": MESSAGES, "n": 2}, 400, "n must be 1"),
        (CHAT, {"messages": MESSAGES, "generation_config": "{}"}, 400, "must be left out"),
        (
            CHAT,
            {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            400,
            "without what apply_chat_template itself takes",
        ),
        (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"of": [1]}}, 400, "an object of"),
        (CHAT, {"messages": MESSAGES, "frequency": 1}, 422, "frequency"),
        (CHAT, {"messages": MESSAGES, "model": "other"}, 400, "other"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 99}]}, 400, "at most 63 tokens"),
        ("/v1/completions", {"prompt": [1, 2]}, 400, "prompt must be a string"),
        ("/v1/completions", {"prompt": "a " * 99, "stream": True}, 400, "at most 63 tokens"),
        pytest.param(
            "/v1/completions", {"prompt": "a" * 100_000}, 413, "at most 65536 bytes", id="long"
        ),
        ("/v1/responses", {"input": 5}, 400, "input must be"),
        (
            "/v1/responses",
            {"input": [{"role": "user"}], "stream": False},
            400,
            "input[0].content must",
        ),
        ("/v1/responses", {"input": [7]}, 400, "input[0] must be an object"),
        (EDITS, b"{nope", 400, "must be JSON"),
        (EDITS, b'{"prompt": "\\ud800", "target": "x"}', 400, "half of a surrogate pair"),
        (EDITS + "/explain", b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        ("/v1/completions", b'{"prompt": "x", "stop": "\\ud800"}', 400, "half of a surrogate pair"),
        (EDITS, [1], 422, "must be a JSON object, got list"),
        (EDITS, {"prompt": CAPITAL}, 422, "target must be given"),
        (EDITS, {"prompt": 3, "target": "x"}, 422, "prompt must be"),
        (EDITS, {"prompt": CAPITAL, "target": ""}, 422, "target must have at least one token"),
        (EDITS, {"prompt": MESSAGES, "target": " "}, 422, "target must not be empty"),
        (EDITS, {"prompt": "a " * 99, "target": "x"}, 422, "at most 64 tokens"),
        (EDITS, {"prompt": CAPITAL, "target": "x", "paraphrases": "y"}, 422, "must be a list"),
        (EDITS, {"prompt": CAPITAL, "target": "x", "radius": 1}, 422, "got ['radius']"),
        (EDITS + "/explain", {"prompt": {}}, 422, "prompt must be"),
        (EDITS + "/explain", {}, 422, "must hold prompt"),
    ],
    ids=str,
)
def test_a_bad_request_is_told_the_rule_and_the_next_one_is_answered(
    faulty: Client, path: str, body: Any, status: int, said: str
) -> None:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = faulty.ask("POST", path, given, **WRITER)
    assert reply.status == status, reply.body
    assert said in reply.error
    assert faulty.chat(RIVER).said == "Nile"
    assert faulty.ask("GET", EDITS).json["version"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/edits/99", 404),
        ("GET", "/v1/edits/first", 422),
        ("GET", "/v1/edits?limit=0", 422),
        ("DELETE", "/v1/edits/99", 404),
        ("DELETE", "/v1/edits/99?purge=true", 404),
        ("POST", "/v1/edits/undo", 409),
        ("PUT", "/v1/edits", 405),
        ("POST", "/reset", 404),
        ("POST", "/load_model", 404),
        ("GET", "/docs", 404),
    ],
)
def test_what_is_not_there_is_said(faulty: Client, method: str, path: str, status: int) -> None:
    reply = faulty.ask(method, path, {}, **WRITER)
    assert reply.status == status, reply.body
    assert reply.error


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer another"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer \xe9"},
    ],
    ids=str,
)
def test_no_change_without_the_token(faulty: Client, headers: dict[str, str]) -> None:
    body = {"prompt": CAPITAL, "target": "Canberra"}
    for method, path in (("POST", EDITS), ("DELETE", EDITS + "/0"), ("POST", EDITS + "/undo")):
        reply = faulty.ask(method, path, body, **headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    assert faulty.ask("GET", EDITS).status == 200


def test_no_change_at_all_where_the_server_has_no_token(editor: GraceEditor) -> None:
    with serving(build_app(editor.family, name="talker", editor=editor)) as client:
        for headers in ({}, WRITER, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
            reply = client.ask("POST", EDITS, {"prompt": CAPITAL, "target": "Perth"}, **headers)
            assert reply.status == 403
        assert client.ask("GET", EDITS).json["edits"] == []


def test_a_page_of_another_name_is_refused_where_the_server_is_local(editor: GraceEditor) -> None:
    for local, wanted in ((True, 421), (False, 200)):
        with serving(build_app(editor.family, name="talker", local=local)) as client:
            assert client.ask("GET", EDITS, Host="evil.example:80").status == wanted
            for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
                assert client.ask("GET", EDITS, Host=host).status == 200


def test_an_edit_that_cannot_be_made_says_why_and_changes_nothing(
    client: Client, editor: GraceEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "config", _with(editor.config, max_steps=1, lr=1e-9))
    reply = client.correct(CAPITAL, "Canberra")
    assert reply.status == 422
    assert "could not be made" in reply.error
    assert reply.json["result"]["success"] is False
    assert client.ask("GET", EDITS).json == {"version": 0, "edits": [], "more": False, "total": 0}
    assert client.chat(CAPITAL).said == "Sydney"


@both
def test_edits_at_once_are_made_one_by_one_and_all_are_there(client: Client) -> None:
    answers = ["Canberra", "Oslo", "Quito", "Zanzibar"]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.correct, CAPITAL, right) for right in answers]
        chats = [pool.submit(client.chat, CAPITAL) for _ in range(8)]
        made = [future.result() for future in asked]
        said = {(r.result().version, r.result().said) for r in chats}
    assert [r.status for r in made] == [200] * 4
    versions = sorted((r.json["version"], right) for r, right in zip(made, answers, strict=True))
    assert [v for v, _ in versions] == [1, 2, 3, 4]
    assert said <= {(0, "Sydney"), *versions}
    assert client.chat(CAPITAL).said == versions[-1][1]


@both
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_ends_its_generation_and_disturbs_nobody(
    client: Client, editor: GraceEditor, stream: bool
) -> None:
    editor.model.generation_config.eos_token_id = -1  # it would say 50 tokens
    steps, entered, go_on = [], threading.Event(), threading.Event()

    def slowly(*_: Any) -> None:
        steps.append(1)
        entered.set()
        go_on.wait(0.05)

    hook = editor.model.register_forward_pre_hook(slowly)
    body = json.dumps({"prompt": RIVER, "max_tokens": 50, "stream": stream}).encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", client.port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        raw.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        assert entered.wait(30)
        if stream:
            raw.recv(20)
    end = time.monotonic() + 30
    done = -1
    while len(steps) != done and time.monotonic() < end:  # until a moment without a step
        done = len(steps)
        time.sleep(0.3)
    hook.remove()
    assert 0 < done < 40
    assert client.chat(RIVER).said == "Nile"


def test_a_connection_that_is_dropped_before_its_request_is_there_leaves_nothing(
    client: Client,
) -> None:
    for sent in (
        b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{",
        b"GE",
    ):
        with contextlib.closing(socket.create_connection(("127.0.0.1", client.port))) as raw:
            raw.sendall(sent)
    assert client.chat(RIVER).said == "Nile"


def test_an_edit_whose_client_leaves_is_made_all_the_same(
    client: Client, editor: GraceEditor
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def waits(*_: Any) -> None:
        entered.set()
        go_on.wait(30)

    hook = editor.model.register_forward_pre_hook(waits)
    body = json.dumps({"prompt": MESSAGES, "target": "Canberra"}).encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", client.port))) as raw:
        head = f"POST {EDITS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert entered.wait(30)
    assert client.ask("GET", EDITS).json["version"] == 0  # others are answered meanwhile
    go_on.set()
    hook.remove()
    end = time.monotonic() + 30
    while client.ask("GET", EDITS).json["version"] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert client.ask("GET", EDITS).json["total"] == 1
    assert client.chat(CAPITAL).said == "Canberra"
    assert client.ask("GET", f"{EDITS}/0").json["edit"]["prompt"] == CAPITAL


def test_what_is_no_http_is_told_so_and_disturbs_nobody(client: Client) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n", b"\r\n" * 9):
        with contextlib.closing(socket.create_connection(("127.0.0.1", client.port))) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            raw.settimeout(30)
            assert raw.recv(100)[:12] in (b"HTTP/1.1 400", b"")
    assert client.chat(RIVER).said == "Nile"


@both
def test_requests_of_one_id_get_each_its_own_answer(client: Client) -> None:
    def ask(message: str) -> str:
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": 4}
        reply = client.ask("POST", CHAT, body, **{"x-request-id": "the-same"})
        assert reply.headers["x-client-request-id"] == "the-same"
        return reply.said

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [CAPITAL, RIVER] * 4)) == ["Sydney", "Nile"] * 4


def test_the_command_says_what_is_missing_and_which_options_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRACE_TOKEN", raising=False)
    where = str(tmp_path / "edits")

    def run(*options: str) -> str:
        model = ["--model", "none", "--layer", "h.0.mlp"]
        result = CliRunner().invoke(command, ["serve", "--codebook", where, *model, *options])
        assert result.exit_code == 2, result.output
        return result.output

    assert "--token must not be empty" in run("--token", " ")
    assert "--token must be left out with --follow" in run("--token", "x", "--follow")
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "must be free to listen on" in run("--port", str(taken.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'needs uvicorn, not installed: pip install "grace-kernels[serve]"' in run()


def _with(config: Any, **changed: Any) -> Any:
    return dataclasses.replace(config, **changed)
