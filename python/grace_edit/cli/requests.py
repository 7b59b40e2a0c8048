"""The edits that a file asks for, one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codebook import files
from ..codebook.records import EditResult
from ..editing.asked import read_wanted
from ..families import Family
from ..families.ids import is_chat
from .output import NOT_FOUND, USAGE, CommandError

Text = str | list[Any]
"""A text as a file has it: as such, as token ids, or a prompt as chat messages."""

_MOST_TOLD = 20
"""Lines that are named when a file is wrong; of more, how many."""


@dataclass
class Request:
    """One edit of the file, and what became of it."""

    line: int
    prompt: Text
    target: Text | int
    paraphrases: list[Text] = field(default_factory=list)
    negatives: list[Text] = field(default_factory=list)
    result: EditResult | None = None
    radius: float | None = None

    @property
    def asked(self) -> Text:
        """The prompt as a person reads it; of a chat, what was said last."""
        prompt: Any = self.prompt
        return f"chat: {prompt[-1]['content']}" if is_chat(prompt) else prompt

    @property
    def wanted(self) -> dict[str, Any]:
        """The edit as `GraceEditor.edit` takes it."""
        names = ("prompt", "target", "paraphrases", "negatives")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        made = {} if self.result is None else self.result.to_dict()
        own: dict[str, Any] = {"line": self.line, "prompt": self.prompt, "target": self.target}
        further = {"paraphrases": self.paraphrases, "negatives": self.negatives}
        own |= {name: prompts for name, prompts in further.items() if prompts}
        return {**own, "radius": self.radius, **made}


def read_requests(path: Path) -> list[Request]:
    """Read a file of edits, one JSON object `{"prompt": str, "target": str | int}` per line.

    It may hold `paraphrases` and `negatives` too, lists of prompts; see `GraceEditor.edit`. A text
    may be a list of token ids, and a prompt chat messages. Blank lines are skipped and further keys
    ignored.

    Raises:
        CommandError: the file is missing or holds no edit, or lines are wrong, which are named.
    """
    if not path.is_file():
        raise CommandError(NOT_FOUND, f"--edits {path}: no such file")
    if path.name == files.EDITS and (path.parent / files.CONFIG).is_file():
        raise CommandError(
            USAGE,
            f"--edits {path}: must be a file of edits to make, got the history of saved ones; "
            f"grace codebook export {path.parent} --out FILE writes them as such a file",
        )
    requests, wrong = [], []
    for line, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            requests.append(_parse(line, raw))
        except ValueError as error:
            wrong.append(f"{path}:{line}: {error}")
    _refuse(wrong)
    if not requests:
        raise CommandError(USAGE, f"--edits {path}: must hold at least one edit, got none")
    return requests


def _parse(line: int, raw: bytes) -> Request:
    try:
        found = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, got other bytes at {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, got {type(found).__name__}")
    for name in ("prompt", "target"):
        if name not in found:
            raise ValueError(f"must have the field {name}, got {', '.join(found) or 'none'}")
    prompt, target = found["prompt"], found["target"]
    if not _is_prompt(prompt):
        raise ValueError(
            f"prompt must be a string that is not empty or chat messages, got {prompt!r}"
        )
    if not (type(target) is int or _is_text(target)):
        raise ValueError(f"target must be a string that is not empty or a class id, got {target!r}")
    paraphrases, negatives = (_prompts(name, found) for name in ("paraphrases", "negatives"))
    return Request(line, prompt, target, paraphrases, negatives)


def _prompts(name: str, record: dict[str, Any]) -> list[Text]:
    found = record.get(name, [])
    if not isinstance(found, list) or not all(map(_is_prompt, found)):
        raise ValueError(f"{name} must be a list of prompts that are not empty, got {found!r}")
    return found


def _is_prompt(found: Any) -> bool:
    return is_chat(found) or _is_text(found)


def _is_text(found: Any) -> bool:
    """Say whether this is text, or a list of token ids."""
    if isinstance(found, list):
        return bool(found) and all(type(item) is int for item in found)
    return isinstance(found, str) and bool(found)


def check_tokens(requests: list[Request], family: Family, path: Path) -> None:
    """Encode every edit once, so that a bad one is known before the first is made.

    Raises:
        CommandError: lines that this model cannot take, which are named.
    """
    wrong = []
    for request in requests:
        try:
            read_wanted(family, request.wanted)
        except ValueError as error:
            wrong.append(f"{path}:{request.line}: {error}")
    _refuse(wrong)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        more = len(wrong) - _MOST_TOLD
        told = [f"and {more} more lines"] if more > 0 else []
        raise CommandError(USAGE, *wrong[:_MOST_TOLD], *told)
