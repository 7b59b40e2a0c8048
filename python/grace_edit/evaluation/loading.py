"""Reading records from a JSON or JSONL file, or from the `datasets` package by name.

A bad file is refused with an error that names the file, the line, the field and the rule; up to ten
lines are named at once. Published files hold a few records without a target or prompt: those are
left out and listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .records import EditRecord, Question
from .schemas import KINDS, FieldError, Unusable, detect, parse_all, parse_question

_NAMED = 10
"""Lines that one error names at most."""

_BLANK = " \t\r\n"


class DataError(ValueError):
    """A data set cannot be read; the message says where and why."""


class NoDataError(DataError):
    """There is no such file or data set."""


@dataclass(frozen=True)
class Loaded:
    """What a data set holds.

    Args:
        records: in published order.
        kind: of `KINDS`.
        source: the path or name it was read from.
        sha256: of the file, empty for a name.
        skipped: `(place, reason)` of records that hold no edit.
    """

    records: list[EditRecord]
    kind: str
    source: str
    sha256: str = ""
    skipped: tuple[tuple[str, str], ...] = ()


def load(
    source: str | Path,
    kind: str = "auto",
    *,
    split: str = "test",
    zsre_target: str = "alt",
) -> Loaded:
    """Read a data set of edits.

    Args:
        source: a JSON or JSONL file, or a name that `datasets.load_dataset` knows.
        kind: one of `KINDS`, or `"auto"`: told from the fields of the first record.
        split: of a named data set.
        zsre_target: what a zsRE record edits towards: `"alt"`, the counterfactual of the editing
            literature, or `"answers"`, the right answer, as the GRACE paper does.

    Raises:
        DataError: nothing there, not JSON, or records of another form.
    """
    if kind not in ("auto", *KINDS):
        raise DataError(f"kind must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if zsre_target not in ("alt", "answers"):
        raise DataError(f"zsre_target must be 'alt' or 'answers', got {zsre_target!r}")
    path = Path(source).expanduser()
    if path.is_file():
        raw = path.read_bytes()
        rows = list(_rows_of_file(str(source), raw))
        digest = hashlib.sha256(raw).hexdigest()
    elif _is_path(str(source)):
        raise NoDataError(f"{source}: no such file")
    else:
        rows = list(_rows_by_name(str(source), split))
        digest = ""
    if not rows:
        raise DataError(f"{source}: must hold at least one record, got none")
    if kind == "auto":
        kind = _detected(rows)
    records, skipped = _parsed(rows, kind, zsre_target)
    if not records:
        raise DataError(f"{source}: must hold at least one edit, got none in {len(rows)} records")
    return Loaded(records, kind, str(source), digest, tuple(skipped))


def load_questions(source: str | Path) -> list[Question]:
    """Read questions with answers, for TRR, from a JSON or JSONL file.

    Each is `{"prompt": str, "answers": str | [str, ...]}`, or `{"text": str, "label": int | str}`
    for a classifier.

    Raises:
        DataError: nothing there, not JSON, or of another form.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise NoDataError(f"{source}: no such file")
    found: list[Question] = []
    wrong: list[str] = []
    for place, raw in _rows_of_file(str(source), path.read_bytes()):
        try:
            found.append(parse_question(raw))
        except (FieldError, Unusable) as error:
            wrong.append(f"{place}: {error}")
    if wrong:
        raise DataError(_several(wrong))
    return found


Row = tuple[str, Any]
"""The place of a record, as an error names it, and the record."""


def _is_path(source: str) -> bool:
    return source.endswith((".json", ".jsonl")) or source.startswith((".", "/", "~"))


def _rows_of_file(source: str, raw: bytes) -> Iterator[Row]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{source}:{line}: must be UTF-8, got byte {raw[error.start]:#x}") from None
    if text.lstrip(_BLANK).startswith("["):
        yield from _rows_of_array(source, text)
        return
    # Not splitlines: it also breaks at characters that a JSON string may hold.
    for line, item in enumerate(text.split("\n"), start=1):
        if item.strip(_BLANK):
            yield f"{source}:{line}", _decoded(f"{source}:{line}", item)


def _decoded(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: must be JSON: {error.msg} at column {error.colno}") from None


def _rows_of_array(source: str, text: str) -> Iterator[Row]:
    """Read a JSON array one item at a time, so that each is known by its line."""
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    while at < len(text) and text[at] != "]":
        place = f"{source}:{text.count(chr(10), 0, at) + 1}"
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{source}:{error.lineno}: must be JSON: {error.msg} at column {error.colno}"
            ) from None
        yield place, item
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    line = text.count("\n", 0, at) + 1
    if text[at : at + 1] != "]":
        raise DataError(f"{source}:{line}: must be a JSON array that is closed, got its end")
    if text[at + 1 :].strip(_BLANK):
        raise DataError(f"{source}:{line}: must be one JSON array, got more after it")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at


def _rows_by_name(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise NoDataError(
            f"{name}: no such file, and data sets are found by name only where the package "
            "datasets is installed (pip install datasets); or give the path of a JSON or JSONL file"
        ) from None
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # every hub failure has a kind of its own
        raise NoDataError(f"{name}: datasets cannot load split {split!r}: {error}") from error
    for number, item in enumerate(found):
        yield f"{name}[{split}][{number}]", dict(item)


def _detected(rows: list[Row]) -> str:
    place, first = rows[0]
    kind = detect(first) if isinstance(first, dict) else None
    if kind is None:
        fields = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise DataError(
            f"{place}: kind must be told by the fields of the first record, got {fields}; the "
            f"kinds are {', '.join(KINDS)}"
        )
    return kind


def _parsed(
    rows: Iterable[Row], kind: str, zsre_target: str
) -> tuple[list[EditRecord], list[tuple[str, str]]]:
    records: list[EditRecord] = []
    skipped: list[tuple[str, str]] = []
    wrong: list[str] = []
    for place, outcome in parse_all(rows, kind, zsre_target):
        if isinstance(outcome, FieldError):
            wrong.append(f"{place}: {outcome}")
        elif isinstance(outcome, Unusable):
            skipped.append((place, str(outcome)))
        else:
            records.append(replace(outcome, source=place))
    if wrong:
        raise DataError(_several(wrong))
    return records, skipped


def _several(wrong: list[str]) -> str:
    more = [f"... and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
    return "\n".join([*wrong[:_NAMED], *more])
