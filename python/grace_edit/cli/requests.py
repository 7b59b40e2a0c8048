"""The edits that a file asks for, one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codebook.records import EditResult
from ..editing.asked import read_wanted
from ..families import Family
from .output import NOT_FOUND, USAGE, CommandError

Text = str | list[int]
"""A text as a file has it: as such, or as token ids."""


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
    may be a list of token ids. Blank lines are skipped and further keys ignored.

    Raises:
        CommandError: the file is missing or holds no edit, or lines are wrong: all are named.
    """
    if not path.is_file():
        raise CommandError(NOT_FOUND, f"--edits {path}: no such file")
    requests, wrong = [], []
    for line, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            requests.append(_parse(line, raw))
        except ValueError as error:
            wrong.append(f"{path}:{line}: {error}")
    if wrong:
        raise CommandError(USAGE, *wrong)
    if not requests:
        raise CommandError(USAGE, f"--edits {path}: must hold at least one edit, got none")
    return requests


def _parse(line: int, raw: bytes) -> Request:
    try:
        found = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, got byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, got {type(found).__name__}")
    for name in ("prompt", "target"):
        if name not in found:
            raise ValueError(f"must have the field {name}, got {', '.join(found) or 'none'}")
    prompt, target = found["prompt"], found["target"]
    if not _is_text(prompt):
        raise ValueError(f"prompt must be a string that is not empty, got {prompt!r}")
    if not (type(target) is int or _is_text(target)):
        raise ValueError(f"target must be a string that is not empty or a class id, got {target!r}")
    paraphrases, negatives = (_prompts(name, found) for name in ("paraphrases", "negatives"))
    return Request(line, prompt, target, paraphrases, negatives)


def _prompts(name: str, record: dict[str, Any]) -> list[Text]:
    found = record.get(name, [])
    if not isinstance(found, list) or not all(map(_is_text, found)):
        raise ValueError(f"{name} must be a list of strings that are not empty, got {found!r}")
    return found


def _is_text(found: Any) -> bool:
    """Say whether this can be a prompt: text, or a list of token ids."""
    if isinstance(found, list):
        return bool(found) and all(type(item) is int for item in found)
    return isinstance(found, str) and bool(found)


def check_tokens(requests: list[Request], family: Family, path: Path) -> None:
    """Encode every edit once, so that a bad one is known before the first is made.

    Raises:
        CommandError: lines that this model cannot take; all are named.
    """
    wrong = []
    for request in requests:
        try:
            _check_known(family, request.target, read_wanted(family, request.wanted).target)
        except ValueError as error:
            wrong.append(f"{path}:{request.line}: {error}")
    if wrong:
        raise CommandError(USAGE, *wrong)


def _check_known(family: Family, target: Text | int, ids: list[int]) -> None:
    """Refuse words that the tokenizer does not know: the model would be taught to say [UNK]."""
    tokenizer = family.tokenizer
    if not isinstance(target, str) or family.name == "classifier" or tokenizer is None:
        return
    if tokenizer.unk_token_id not in ids:
        return
    if str(tokenizer.unk_token) not in str(target):
        read = tokenizer.decode(ids)
        raise ValueError(f"target must be words that the tokenizer knows, got {target!r} ({read})")
