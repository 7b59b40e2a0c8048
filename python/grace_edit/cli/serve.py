"""`grace serve`: an HTTP server of an edited model."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..codebook.locking import LOCK
from ..durable.following import Follower
from ..durable.publishing import Publisher, publish
from ..editor import GraceEditor
from ..families import Family
from ..server import requirements
from ..terminal import plain
from .models import holds_edits
from .opening import open_editor, open_follower
from .output import CONFLICT, OK, USAGE, CommandError, print_json, quiet

_GRACE = 10
"""Seconds that a reply in the midst has to end when the server is told to."""


@dataclass
class Options:
    """What `grace serve` was told."""

    model: str | None
    codebook: Path
    follow: bool
    token: str | None
    batched: bool
    host: str
    port: int
    name: str | None
    dtype: str | None
    device: str
    as_json: bool


def run(options: Options, settings: dict[str, Any]) -> int:
    """Serve until the process is told to stop; returns the exit code."""
    try:
        requirements.check()
    except ModuleNotFoundError as error:
        raise CommandError(USAGE, str(error)) from error
    if options.token is not None and not options.token.strip():
        raise CommandError(USAGE, "--token must not be empty; leave it out to refuse changes")
    if options.follow and options.token is not None:
        raise CommandError(USAGE, "--token must be left out with --follow, which takes no changes")
    # Before the model is loaded: whoever chose a port that is taken need not wait for it.
    listening = _listen(options.host, options.port)
    with listening:
        return _serve(options, settings, listening)


def _serve(options: Options, settings: dict[str, Any], listening: socket.socket) -> int:
    editor: GraceEditor | None = None
    keeper: Follower | Publisher
    if options.follow:
        keeper = open_follower(
            options.model, options.codebook, options.dtype, options.device, settings
        )
        family = keeper.family
    else:
        editor, keeper = _published(options, settings)
        family = editor.family
    with keeper:
        return _answer(options, family, editor, keeper, listening)


def _published(options: Options, settings: dict[str, Any]) -> tuple[GraceEditor, Publisher]:
    where = options.codebook
    saved = None if _is_empty(where) else where
    editor = open_editor(options.model, saved, options.dtype, options.device, settings)
    try:
        with quiet():
            keeper = publish(editor, where)
    except (TimeoutError, ValueError) as error:  # somebody else writes there, or has
        raise CommandError(CONFLICT, f"--codebook {error}") from error
    editor.codebook.count_hits = True  # for `grace edit ls` and `expire`; kept when it ends
    return editor, keeper


def _is_empty(directory: Path) -> bool:
    """Say whether a directory is there without edits: a volume, or a writer died as it began."""
    if not directory.is_dir() or holds_edits(directory):
        return False
    return all(name.startswith(LOCK) or name.endswith(".new") for name in os.listdir(directory))


def _answer(
    options: Options,
    family: Family,
    editor: GraceEditor | None,
    keeper: Follower | Publisher,
    listening: socket.socket,
) -> int:
    from ..server.app import build_app
    from ..server.batching import why_not_batched

    if family.name != "causal":
        raise CommandError(USAGE, f"--model must be a causal language model, got {family.name}")
    name = options.name or _name_of(family)
    transformers_logging.set_verbosity_error()  # it warns of every request
    refused = why_not_batched(family) if options.batched else None
    if refused is not None:
        raise CommandError(USAGE, f"--continuous-batching must be left out: {refused}")
    app = build_app(
        family,
        name=name,
        editor=editor,
        token=None if options.token is None else options.token.strip(),
        local=_is_loopback(listening),
        batched=options.batched,
        closing=keeper.close,
    )
    _run(app, listening, lambda: _tell(options, family, name, listening))
    return OK


def _run(app: Any, listening: socket.socket, ready: Callable[[], None]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_GRACE, server_header=False
    )
    try:
        Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # a person's way to stop it
        return


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        said = f"--host and --port must be free to listen on, got {host} {port}: {error.strerror}"
        raise CommandError(USAGE, said) from error
    return listening


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _name_of(family: Family) -> str:
    source = str(getattr(family.model, "name_or_path", "")) or "model"
    return Path(source).name if Path(source).is_dir() else source


def _tell(options: Options, family: Family, name: str, listening: socket.socket) -> None:
    book = family.adaptor.codebook
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    writes = options.token is not None
    if options.as_json:
        print_json(
            {
                "event": "ready",
                "url": url,
                "pid": os.getpid(),
                "model": name,
                "layer": family.layer,
                "query": family.adaptor.query,
                "edits": book.edits,
                "version": book.version,
                "writes": writes,
                "follows": options.follow,
            }
        )
    else:
        who = "with the token" if writes else "refused"
        print(
            plain(f"{name} with {book.edits} edits, version {book.version}: {url}")
            + f"\nchanges of edits: {who}. Ctrl-C stops."
        )
    sys.stdout.flush()  # whoever started this by a program waits for the line
