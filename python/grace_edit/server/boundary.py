"""What stands between the network and the application: size, host, leaving clients, stamps.

Plain ASGI. A request's body is read here, up to its limit, before anything looks at it; from then
on whatever comes in is the client leaving.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from .answering import EXPLAIN, Trace, begin
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = b"x-request-id"


def error_body(message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as clients of this protocol read it."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


class Boundary:
    """Wrap an application.

    Args:
        app: the application.
        metrics: where requests are counted.
        longest_body: most bytes of a request's body.
        local: the server listens on the loopback address alone: a request for another host was
            sent by a page that has its own name lead here, and is refused.
    """

    def __init__(self, app: App, metrics: Metrics, *, longest_body: int, local: bool) -> None:
        self.app, self.metrics = app, metrics
        self.longest_body, self.local = longest_body, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_stamps(trace, asked_id)]
            await send(message)

        trace = Trace(
            asyncio.get_running_loop(), explain=headers.get(EXPLAIN.encode()) in (b"1", b"true")
        )
        asked_id = headers.get(_REQUEST_ID)
        try:
            refused = self._refused(headers)
            body = b"" if refused else await self._body(receive)
            if body is None:
                refused = JSONResponse(
                    error_body(f"the body must have at most {self.longest_body} bytes, got more"),
                    413,
                    headers={"connection": "close"},
                )
            elif wrong := _unreadable(body):
                refused = JSONResponse(error_body(f"the body must {wrong}"), 400)
            if refused is not None:
                await refused(scope, receive, counted)
                return
            # Ids of generations must differ, whatever clients call their requests.
            scope["headers"] = [
                (name, value) for name, value in scope["headers"] if name.lower() != _REQUEST_ID
            ] + [(_REQUEST_ID, uuid.uuid4().hex.encode())]
            await self._run(scope, body or b"", receive, counted, trace)
        except _Left:
            status = 499
        finally:
            self.metrics.request(scope.get("path", ""), status, time.perf_counter() - start, trace)

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, trace: Trace
    ) -> None:
        left = asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            trace.leave()

        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if pending:
                return pending.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        watching = asyncio.create_task(watch())
        restore = begin(trace)
        try:
            await self.app(scope, replay, send)
        finally:
            restore()
            watching.cancel()
            trace.leave()  # nobody listens to what may still be generated

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body; None: it is too long."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.longest_body:
                return None
            if not message.get("more_body", False):
                return b"".join(pieces)

    def _refused(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self.local and not _is_local(headers.get(b"host", b"").decode("latin-1")):
            message = "the host must be a loopback address, as this server listens on one, got "
            return JSONResponse(error_body(message + "another"), 421)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.longest_body:
            message = f"the body must have at most {self.longest_body} bytes, got {int(length)}"
            return JSONResponse(error_body(message), 413, headers={"connection": "close"})
        return None


def _unreadable(body: bytes) -> str | None:
    """Say which rule of text a JSON body breaks that no later reader would name."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "be Unicode text, got half of a surrogate pair"
    except RecursionError:
        return "be nested less deeply"
    except ValueError:
        pass  # no JSON at all, which is told where it is needed
    return None


class _Left(Exception):
    """The client left before its request was there."""


def _stamps(trace: Trace, asked_id: bytes | None) -> list[tuple[bytes, bytes]]:
    stamps = [(name.encode(), value.encode()) for name, value in trace.headers().items()]
    if asked_id is not None:
        stamps.append((b"x-client-request-id", asked_id))
    return stamps


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
