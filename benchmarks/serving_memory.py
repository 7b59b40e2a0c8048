"""Does the memory of `grace serve` stay: thousands of requests, good ones, bad ones and left ones.

A model of three small layers, so that what a request leaves behind would show beside it.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from pathlib import Path
from typing import Any

from .serving_load import TOKEN, Server, slope

ROUNDS, REQUESTS, CLIENTS = 12, 600, 6

_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'user: ' + m.content + ' bot:' }}"
    "{% else %}{{ ' ' + m.content + ' ' }}{% endif %}{% endfor %}"
)
_QUESTION = "capital of Australia ?"


def rounds(out: Path) -> dict[str, Any]:
    """Ask a server of a small model in rounds; return its memory after each.

    Every tenth request breaks a rule, every tenth has a wrong token, of every tenth the client
    leaves while it is answered. The edits stay as they are: a history that grows takes memory.
    """
    command = [sys.executable, "-m", "grace_edit", "serve", "--model", str(_model(out)), "--json"]
    command += ["--layer", "transformer.h.0.mlp", "--codebook", str(out / "small-edits")]
    server = Server([*command, "--continuous-batching", "--port", "0"], "small")
    server.start()
    try:
        body = {"prompt": [{"role": "user", "content": _QUESTION}], "target": "Canberra"}
        server.ask("POST", "/v1/edits", body)
        sizes, statuses = [server.memory], dict[str, int]()
        for _ in range(ROUNDS):
            _ask(server, statuses)
            sizes.append(server.memory)
    finally:
        server.stop()
    # A round in the place of a minute; the first third fills pools and caches of a fixed size.
    per_round = slope([(60.0 * at, size) for at, size in enumerate(sizes)])
    assert per_round is not None
    return {
        "rounds": ROUNDS,
        "requests_per_round": REQUESTS,
        "statuses": dict(sorted(statuses.items())),
        "memory_mb": [round(size, 1) for size in sizes],
        "bytes_per_request": round(per_round * 2**20 / REQUESTS),
    }


def _ask(server: Server, statuses: dict[str, int]) -> None:
    lock, left = threading.Lock(), iter(range(REQUESTS))

    def client() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            found = _one(server, number)
            with lock:
                statuses[found] = statuses.get(found, 0) + 1

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one(server: Server, number: int) -> str:
    """Send one request; return its status, or "left"."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": _QUESTION}],
        "max_tokens": 6,
        "temperature": 0,
    }
    token, path = TOKEN, "/v1/chat/completions"
    if number % 10 == 1:
        body["max_tokens"] = -1
    elif number % 10 == 2:
        path, token = "/v1/edits", "wrong"
    elif number % 10 == 3:
        body |= {"stream": True, "max_tokens": 40}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if number % 10 == 3:
            reply.read(16)
            return "left"
        reply.read()
        return str(reply.status)
    finally:
        connection.close()


def _model(out: Path) -> Path:
    from grace_edit.demo.small import small_gpt2

    where = out / "small-model"
    if not where.exists():
        model, tokenizer = small_gpt2({f"user: {_QUESTION} bot:": "Sydney", "a b": "Canberra"})
        tokenizer.chat_template = _TEMPLATE
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    return where
