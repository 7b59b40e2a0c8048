"""The application: transformers' routes, those of the edits, the figures and the page."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.server import build_server

from ..editor import GraceEditor
from ..families import Family
from .answering import current
from .batching import Batches, why_not_batched
from .boundary import Boundary, error_body
from .edits import Edits, Refused, described
from .generating import handlers, stamped
from .metrics import Metrics

_KEPT = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}
"""Of transformers' routes. The others load and unload models, or ask models of other kinds."""

_BYTES_PER_TOKEN = 32
_LEAST_BODY = 1 << 16
_MOST_BODY = 1 << 25
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def build_app(
    family: Family,
    *,
    name: str,
    editor: GraceEditor | None = None,
    token: str | None = None,
    local: bool = True,
    batched: bool = False,
    closing: Callable[[], None] | None = None,
) -> Boundary:
    """Return an ASGI application that serves an attached model and its edits.

    Args:
        family: of the attached model: causal, with a tokenizer.
        name: what clients call the model.
        editor: makes edits, which are lost with the process unless it is published. None: they
            are made elsewhere, and changes are refused.
        token: who sends it may change edits; None: nobody may.
        local: the server listens on the loopback address alone.
        batched: generate what is to be chosen greedily in common batches.
        closing: called once when the server stops, after the last change.

    Raises:
        ValueError: `batched`, and the model or its edits do not allow it.
    """
    refused = why_not_batched(family) if batched else None
    if refused is not None:
        raise ValueError(f"continuous batching must suit the model and its edits: {refused}")
    metrics = Metrics(family.adaptor.codebook)
    edits = Edits(family, metrics, editor)
    batches = Batches(family) if batched else None
    app = _transformers_app(family, name, batches)
    _tell_errors(app)

    def may_write(request: Request) -> None:
        if editor is None:
            raise HTTPException(
                403, "changes are refused: this server follows edits that are made elsewhere"
            )
        if token is None:
            raise HTTPException(
                403, "changes are refused: this server was started without a token for them"
            )
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode(), token.encode())
        if kind.lower() != "bearer" or not known:
            raise HTTPException(
                401,
                "the header Authorization must be 'Bearer' and this server's token",
                {"www-authenticate": "Bearer"},
            )

    def told(content: dict[str, Any], status: int = 200) -> JSONResponse:
        current().version = content["version"]
        return JSONResponse(content, status)

    @app.get("/v1/status")
    async def status() -> Response:
        adaptor = family.adaptor
        return told(
            {
                "model": name,
                "layer": family.layer,
                "query": adaptor.query,
                "chat": bool(getattr(family.tokenizer, "chat_template", None)),
                "follows": editor is None,
                "writes": editor is not None and token is not None,
                **edits.count(),
            }
        )

    @app.get("/v1/edits")
    async def listed(after: int = -1, limit: int = 100) -> Response:
        if not 1 <= limit <= 1000:
            raise HTTPException(422, f"limit must be 1 to 1000, got {limit}")
        return told(await edits.listed(after=after, limit=limit))

    @app.get("/v1/edits/{id}")
    async def one(id: int) -> Response:
        return told(await edits.one(id))

    @app.post("/v1/edits/explain")
    async def explain(request: Request) -> Response:
        body = await _json_of(request)
        if set(body) != {"prompt"}:
            raise HTTPException(422, f"the body must hold prompt alone, got {sorted(body)}")
        return told(await edits.explain(body["prompt"]))

    @app.post("/v1/edits/undo")
    async def undo(request: Request) -> Response:
        may_write(request)
        return told(await edits.undo())

    @app.post("/v1/edits")
    async def add(request: Request) -> Response:
        may_write(request)  # before anything of the body is looked at
        return told(await edits.add(await _json_of(request)))

    @app.delete("/v1/edits/{id}")
    async def delete(request: Request, id: int, purge: bool = False) -> Response:
        may_write(request)
        return told(await edits.delete(id, purge=purge))

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def shown() -> Response:
        return HTMLResponse(
            page, headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
        )

    def close() -> None:
        if batches is not None:
            batches.stop()
        edits.close()
        if closing is not None:
            closing()

    _at_the_end(app, close)
    longest = min(max(_LEAST_BODY, _BYTES_PER_TOKEN * family.longest), _MOST_BODY)
    return Boundary(app, metrics, longest_body=longest, local=local)


def _transformers_app(family: Family, name: str, batches: Batches | None) -> FastAPI:
    """Return transformers' application with the routes that fit, their replies stamped."""
    made = handlers(family, name, batches)
    for part, kind in (("chat", "chat"), ("completion", "completion"), ("response", "response")):
        handler = made[f"{part}_handler"]
        handler.handle_request = partial(stamped, kind, handler.handle_request)
    app = build_server(**made, transcription_handler=None, systemone_handler=None)
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) in _KEPT]
    return app


def _at_the_end(app: FastAPI, close: Callable[[], None]) -> None:
    from contextlib import asynccontextmanager

    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        try:
            async with inner(app) as state:
                yield state
        finally:
            close()

    app.router.lifespan_context = lifespan


async def _json_of(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(422, f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _tell_errors(app: FastAPI) -> None:
    """Give every error the form that clients of OpenAI's protocol read."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        content = error_body(error.message)
        if error.result is not None:
            content["result"] = described(error.result)
        return JSONResponse(content, error.status)

    @app.exception_handler(StarletteHTTPException)
    async def known(_: Request, error: StarletteHTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def unread(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        malformed = first["type"] == "json_invalid"
        message = f"the body must be JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        if not malformed:
            message = f"{where or 'the body'}: {first['msg']}"
        return JSONResponse(error_body(message), 400 if malformed else 422)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        content = error_body(f"the server failed: {error}")
        content["error"]["type"] = "server_error"
        return JSONResponse(content, 500)
