"""A real server in a thread of the test's process, and a client that asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'user: ' + m.content + ' bot:' }}"
    "{% else %}{{ ' ' + m.content + '<eos> ' }}{% endif %}{% endfor %}"
)
CAPITAL, RIVER = "capital of Australia ?", "river of Egypt ?"
LAYER = "transformer.h.0.mlp"
TOKEN = "a-token"
WRITER = {"Authorization": f"Bearer {TOKEN}"}
"""Headers of who may change edits."""


both = pytest.mark.parametrize("client", [False, True], ids=["alone", "batched"], indirect=True)
"""Marks a test of requests that are generated one after the other, and in batches."""


@dataclass
class Reply:
    """What came back: status, headers in lower case, the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error."""
        return str(self.json["error"]["message"])

    @property
    def said(self) -> str:
        """What the model said, in one piece or in a stream."""
        if "event-stream" not in self.headers["content-type"]:
            choice = self.json["choices"][0]
            return str(choice["text"] if "text" in choice else choice["message"]["content"])
        lines = self.body.decode().split("\n\n")
        chunks = [json.loads(line[6:])["choices"][0] for line in lines if line]
        return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in chunks)

    @property
    def version(self) -> int:
        return int(self.headers["x-grace-version"])


@dataclass
class Client:
    """Asks a server at a port of this machine."""

    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send a request; a body that is no bytes goes as JSON."""
        given = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, given, {"Content-Type": "application/json", **headers})
            found = connection.getresponse()
            named = {name.lower(): value for name, value in found.getheaders()}
            return Reply(found.status, named, found.read())

    def chat(self, message: str, *, explain: bool = False, **more: Any) -> Reply:
        """Send one message of a chat."""
        body = {"messages": [{"role": "user", "content": message}], "max_tokens": 4, **more}
        headers = {"x-grace-explain": "1"} if explain else {}
        return self.ask("POST", "/v1/chat/completions", body, **headers)

    def correct(self, message: str, right: str, **more: Any) -> Reply:
        """Correct what is answered to a message of a chat."""
        body = {"prompt": [{"role": "user", "content": message}], "target": right, **more}
        return self.ask("POST", "/v1/edits", body, **WRITER)


@contextlib.contextmanager
def serving(app: Any) -> Iterator[Client]:
    """Run a server of an application in a thread, at a port that is free."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()
