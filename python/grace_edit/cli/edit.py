"""`grace edit`: make the edits of a file and save them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adaptor import attach as attaching
from ..codebook.locking import writing
from ..codebook.records import EditResult
from ..config import GraceConfig
from ..editing.asked import read_wanted
from ..editor import GraceEditor
from ..families import Family
from ..terminal import facts, number, plain, progress, screen, table
from .models import Loaded, SavedEdits, attach_edits, load_model, read_edits_of
from .output import (
    CONFLICT,
    FAILED,
    NOT_FOUND,
    OK,
    USAGE,
    CommandError,
    asks_line,
    complain,
    print_json,
    quiet,
)


@dataclass
class Request:
    """One edit of the file, and what became of it."""

    line: int
    prompt: str
    target: str | int
    paraphrases: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
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
        own = {"line": self.line, "prompt": self.prompt, "target": self.target}
        further = {"paraphrases": self.paraphrases, "negatives": self.negatives}
        own |= {name: prompts for name, prompts in further.items() if prompts}
        return {**own, "radius": self.radius, **made}


@dataclass
class Options:
    """What `grace edit` was told. In `settings` None is an option that was not given."""

    model: str | None
    edits: Path
    out: Path
    resume: Path | None
    task: str
    dtype: str | None
    device: str
    as_json: bool
    settings: dict[str, Any] = field(default_factory=dict)


def read_requests(path: Path) -> list[Request]:
    """Read a file of edits, one JSON object `{"prompt": str, "target": str | int}` per line.

    It may hold `paraphrases` and `negatives` too, lists of prompts; see `GraceEditor.edit`. Blank
    lines are skipped and further keys ignored.

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
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a string that is not empty, got {prompt!r}")
    if not (type(target) is int or (isinstance(target, str) and target)):
        raise ValueError(f"target must be a string that is not empty or a class id, got {target!r}")
    paraphrases, negatives = (_prompts(name, found) for name in ("paraphrases", "negatives"))
    return Request(line, prompt, target, paraphrases, negatives)


def _prompts(name: str, record: dict[str, Any]) -> list[str]:
    found = record.get(name, [])
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
        raise ValueError(f"{name} must be a list of strings that are not empty, got {found!r}")
    return found


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


def _check_known(family: Family, target: str | int, ids: list[int]) -> None:
    """Refuse words that the tokenizer does not know: the model would be taught to say [UNK]."""
    tokenizer = family.tokenizer
    if family.name == "classifier" or tokenizer is None or tokenizer.unk_token_id not in ids:
        return
    if str(tokenizer.unk_token) not in str(target):
        read = tokenizer.decode(ids)
        raise ValueError(f"target must be words that the tokenizer knows, got {target!r} ({read})")


def run(options: Options) -> int:
    """Make the edits and save the accepted ones; returns the exit code."""
    requests = read_requests(options.edits)
    _check_out(options)
    with writing(options.out):  # or the edits that somebody else saves meanwhile would be lost
        return _run(options, requests)


def _run(options: Options, requests: list[Request]) -> int:
    saved = None if options.resume is None else read_edits_of(options.resume)
    config = _new_config(options) if saved is None else _kept_config(options, saved)
    for name in ("encoder", "text_map"):
        if options.settings.get(name) is not None and config.query != "text":
            raise CommandError(
                USAGE, f"--{name.replace('_', '-')} must be left out without --query text"
            )
    source = options.model or (saved.source if saved is not None else "")
    if not source:
        raise CommandError(USAGE, "--model must be given, got none")
    _check_out(options)
    dtype, task = options.dtype, options.task
    if saved is not None:
        dtype = dtype or str(saved.codebook.values.dtype).removeprefix("torch.")
        task = saved.about("serving").get("task", task) if task == "auto" else task
    loaded = load_model(source, task=task, dtype=dtype, device=options.device)
    _check_layer(loaded, config, saved)
    with quiet():
        with progress("attaching"):
            if options.resume is None:
                editor = GraceEditor(loaded.model, loaded.tokenizer, config)
            else:
                editor = attach_edits(loaded, options.resume)
        check_tokens(requests, editor.family, options.edits)
        with progress("editing", len(requests)) as step:
            for request in requests:
                _make(editor, request, options.edits)
                step()
        accepted = [r for r in requests if r.result is not None and r.result.success]
        if accepted:
            editor.save_pretrained(options.out)
    if options.as_json:
        print_json(_summary(options, loaded, editor, requests, len(accepted)))
    else:
        _show(options, loaded, editor, requests, len(accepted))
    refused = len(requests) - len(accepted)
    if not refused:
        return OK
    kept = f"the others are saved in {options.out}" if accepted else "nothing was saved"
    complain(f"{refused} of {len(requests)} edits refused; {kept}")
    return CONFLICT


def _new_config(options: Options) -> GraceConfig:
    given = {name: value for name, value in options.settings.items() if value is not None}
    if "layer" not in given:
        raise CommandError(USAGE, "--layer must be given, got none")
    return GraceConfig(**given)


def _kept_config(options: Options, saved: SavedEdits) -> GraceConfig:
    """Return the settings of saved edits; what is given on top must not differ."""
    own = saved.about("config")
    for name, value in options.settings.items():
        if name != "layer" and value is not None and value != own.get(name):
            raise CommandError(
                USAGE,
                f"--{name.replace('_', '-')} must be left out with --resume, whose edits have "
                f"{own.get(name)}, got {value}",
            )
    layer = options.settings.get("layer") or own.get("layer")
    return GraceConfig(**{**own, "layer": layer})


def _check_out(options: Options) -> None:
    """Refuse a place that cannot be written, or holds other edits, before any work is done."""
    out, resume = options.out, options.resume
    if out.exists() and not out.is_dir():
        raise CommandError(USAGE, f"--out {out}: must be a directory, got a file")
    same = resume is not None and out.exists() and out.samefile(resume)
    if (out / "grace_config.json").exists() and not same:
        raise CommandError(
            CONFLICT,
            f"--out {out}: holds saved edits; name another directory, or add to them with "
            f"--resume {out}",
        )
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(USAGE, f"--out {out}: must be writable, got no permission in {parent}")


def _check_layer(loaded: Loaded, config: GraceConfig, saved: SavedEdits | None) -> None:
    try:
        name, _ = attaching.find_layer(loaded.model, config.layer)
    except ValueError as error:
        raise CommandError(NOT_FOUND, f"--layer: {error}") from error
    before = None if saved is None else saved.about("serving").get("layer")
    if before is not None and name != before:
        raise CommandError(
            CONFLICT, f"--layer must be that of the edits of --resume ({before}), got {name}"
        )


def _make(editor: GraceEditor, request: Request, path: Path) -> None:
    try:
        request.result = editor.edit(**request.wanted)
    except (ValueError, FloatingPointError) as error:
        where = f"{path}:{request.line}"
        raise CommandError(FAILED, f"{where}: {error}; nothing was saved") from error
    slot = request.result.slot
    if request.result.success and slot is not None:
        request.radius = float(editor.codebook.radii[slot])


def _summary(
    options: Options, loaded: Loaded, editor: GraceEditor, requests: list[Request], accepted: int
) -> dict[str, Any]:
    return {
        "out": str(options.out) if accepted else None,
        "model": loaded.facts(),
        "layer": editor.layer,
        "query": editor.adaptor.query,
        "text": editor.status()["text"],
        "replace": editor.adaptor.replace,
        "drift": editor.codebook.drift,
        "accepted": accepted,
        "refused": len(requests) - accepted,
        "entries": editor.codebook.entries,
        "edits": editor.codebook.edits,
        "results": [request.to_dict() for request in requests],
    }


def _show(
    options: Options, loaded: Loaded, editor: GraceEditor, requests: list[Request], accepted: int
) -> None:
    book, model, console = editor.codebook, loaded.facts(), screen()
    console.print(
        facts(
            {
                "model": model["source"],
                "class": f"{model['class']}: {model['task']}, {model['why']}",
                "runs in": f"{model['dtype']} on {model['device']}",
                "layer": editor.layer,
                "asks": asks_line(
                    editor.adaptor.query, editor.adaptor.replace, editor.status()["text"]
                ),
                "drift": number(book.drift),
            }
        )
    )
    columns = ("id", "prompt", "target", "case", "distance", "radius", "steps", "outcome")
    console.print(table(columns, map(_cells, requests)))
    console.print(
        f"accepted {accepted} of {len(requests)}; live edits {book.edits}, entries {book.entries}"
    )
    console.print(f"saved in {plain(options.out)}" if accepted else "nothing was saved")


def _cells(request: Request) -> list[Any]:
    result = request.result
    assert result is not None
    outcome = f"refused: {result.reason}"
    if result.success:
        outcome = "ok, fragile" if result.fragile else "ok"
    return [
        "–" if result.id is None else result.id,
        request.prompt,
        request.target,
        result.case,
        number(result.distance),
        number(request.radius),
        result.steps,
        outcome,
    ]
