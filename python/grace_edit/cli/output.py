"""What the commands share: exit codes, silence, JSON, errors of one line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..codebook.files import SeveralLayersError, StoreError
from ..terminal import plain

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
CONFLICT = 4
CORRUPT = 5
INTERRUPTED = 130


class CommandError(Exception):
    """An error a person can mend: an exit code and one message per line."""

    def __init__(self, code: int, *messages: str) -> None:
        super().__init__(*messages)
        self.code = code
        self.messages = messages


def describe_error(error: Exception) -> tuple[int, list[str]] | None:
    """Return the exit code and the messages of an error, None for one nobody expected."""
    if isinstance(error, CommandError):
        return error.code, list(error.messages)
    # typer's usage errors; their base class moved between its versions, the method stayed.
    usage: Callable[[], str] | None = getattr(error, "format_message", None)
    if usage is not None:
        return USAGE, [f"{usage()} (see --help)"]
    if isinstance(error, SeveralLayersError):
        return CONFLICT, [str(error)]
    if isinstance(error, StoreError):
        return CORRUPT, [str(error)]
    if isinstance(error, OSError):
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else FAILED
        named = error.filename is not None and error.strerror is not None
        return code, [f"{error.filename}: {error.strerror}" if named else str(error)]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return FAILED, [f"out of memory: {error}"]
    if isinstance(error, KeyError):
        return NOT_FOUND, [str(error.args[0]) if error.args else "unknown key"]
    if isinstance(error, ValueError):
        return USAGE, [str(error)]
    return None


def complain(message: str) -> None:
    """Print one line `error: ...` on stderr."""
    print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr)


def asks_line(query: Any, replace: Any, text: dict[str, Any] | None) -> str:
    """Say in a line what asks and what is replaced; `text` tells of `query="text"`."""
    of = "" if text is None else f" (encoder {text['encoder']}, map {text['map']})"
    return f"query {query}{of}, replaces {replace}"


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout; what is not finite becomes null."""
    print(json.dumps(_finite(data), allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, torch and the hub inside a `with` block.

    No warnings, no loading bars, and whatever they print goes to stderr: stdout is for answers.
    """
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
