"""`grace edit add`: make the edits of a file and save them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adaptor import attach as attaching
from ..codebook.locking import writing
from ..config import GraceConfig
from ..editor import GraceEditor
from ..terminal import facts, number, plain, progress, screen, table
from .models import (
    Loaded,
    SavedEdits,
    attach_edits,
    check_place,
    holds_edits,
    load_model,
    read_edits_of,
)
from .opening import takes_text
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
from .requests import Request, check_tokens, read_requests
from .unfinished import Saver, restore


@dataclass
class Options:
    """What `grace edit add` was told. In `settings` None is an option that was not given."""

    model: str | None
    edits: Path
    out: Path
    resume: Path | None
    task: str
    dtype: str | None
    device: str
    as_json: bool
    settings: dict[str, Any] = field(default_factory=dict)


def run(options: Options) -> int:
    """Make the edits and save the accepted ones; returns the exit code."""
    requests = read_requests(options.edits)
    check_place(options.out)
    with writing(options.out):  # or the edits that somebody else saves meanwhile would be lost
        return _run(options, requests)


def _run(options: Options, requests: list[Request]) -> int:
    source = options.resume
    saved, done = _begun(options, requests)
    if saved is not None:
        source = options.out
    else:
        _check_free(options)
        saved = None if source is None else read_edits_of(source)
    config = _new_config(options) if saved is None else _kept_config(options, saved, done)
    for name in ("encoder", "text_map"):
        asked = (None, "text") if saved is None else ("text",)
        if options.settings.get(name) is not None and config.query not in asked:
            raise CommandError(
                USAGE, f"--{name.replace('_', '-')} must be left out without --query text"
            )
    origin = options.model or (saved.source if saved is not None else "")
    if not origin:
        raise CommandError(USAGE, "--model must be given, got none")
    dtype, task = options.dtype, options.task
    if saved is not None:
        dtype = dtype or str(saved.codebook.values.dtype).removeprefix("torch.")
        task = saved.about("serving").get("task", task) if task == "auto" else task
    loaded = load_model(origin, task=task, dtype=dtype, device=options.device)
    if task != options.task:
        loaded.why = "as the saved edits say"
    _check_layer(loaded, config, saved)
    chosen = saved is None and _asks_text(options, loaded)
    if chosen:
        config = dataclasses.replace(config, query="text")
    with quiet():
        with progress("attaching"):
            if source is None:
                editor = GraceEditor(loaded.model, loaded.tokenizer, config)
            else:
                editor = attach_edits(loaded, source)
        check_tokens(requests, editor.family, options.edits)
        _make_all(options, editor, requests, done)
        accepted = _accepted(requests)
        if accepted:
            editor.save_pretrained(options.out)
    if options.as_json:
        summary = _summary(options, loaded, editor, requests, accepted)
        print_json({**summary, "query_chosen": chosen, "done_before": done})
    else:
        _show(options, loaded, editor, requests, accepted, done, chosen)
    refused = len(requests) - accepted
    if not refused:
        return OK
    kept = f"the others are saved in {options.out}" if accepted else "nothing was saved"
    complain(f"{refused} of {len(requests)} edits refused; {kept}")
    return CONFLICT


def _asks_text(options: Options, loaded: Loaded) -> bool:
    """Say whether new edits are to ask by text though nobody said so, as `grace chat` has it."""
    given = {name: value for name, value in options.settings.items() if value is not None}
    if "query" in given or "paper" in (given.get("policy"), given.get("recipe")):
        return False
    with quiet():
        return takes_text(loaded, given)


def _make_all(options: Options, editor: GraceEditor, requests: list[Request], done: int) -> None:
    """Make the edits that are not done; what is made is kept whatever happens."""
    saver = Saver(editor, options.out, requests, options.settings)
    try:
        with progress("editing", len(requests)) as step:
            for number, request in enumerate(requests):
                if number >= done:
                    _make(editor, request, options.edits)
                    saver.save_if_due()
                step()
    except BaseException:
        kept = saver.save()
        what = f"{kept} of {len(requests)} edits are saved in {options.out}"
        complain(f"{what}; the same command goes on" if kept else "nothing was saved")
        raise


def _accepted(requests: list[Request]) -> int:
    return sum(request.result is not None and request.result.success for request in requests)


def _begun(options: Options, requests: list[Request]) -> tuple[SavedEdits | None, int]:
    """Return the edits in --out and how many of the file are done, if this file was begun there."""
    if not holds_edits(options.out):
        return None, 0
    saved = read_edits_of(options.out)
    done = restore(saved, requests)
    return (saved, done) if done else (None, 0)


def _new_config(options: Options) -> GraceConfig:
    given = {name: value for name, value in options.settings.items() if value is not None}
    if "layer" not in given:
        raise CommandError(USAGE, "--layer must be given, got none")
    return GraceConfig(**given)


def _kept_config(options: Options, saved: SavedEdits, done: int) -> GraceConfig:
    """Return the settings of saved edits; what is given on top must not differ."""
    own = saved.about("config")
    before = saved.about("adding").get("settings", {}) if done else own
    where = f"for {options.out}, begun with" if done else "with --resume, whose edits have"
    for name, value in options.settings.items():
        if name != "layer" and value is not None and value != before.get(name):
            raise CommandError(
                USAGE,
                f"--{name.replace('_', '-')} must be left out {where} {before.get(name)}, "
                f"got {value}",
            )
    layer = options.settings.get("layer") or own.get("layer")
    return GraceConfig(**{**own, "layer": layer})


def _check_free(options: Options) -> None:
    """Refuse a place that holds other edits, before any work is done."""
    out, resume = options.out, options.resume
    same = resume is not None and resume.exists() and out.exists() and out.samefile(resume)
    if holds_edits(out) and not same:
        raise CommandError(
            CONFLICT,
            f"--out {out}: holds saved edits; name another directory, or add to them with "
            f"--resume {out}",
        )


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
        raise CommandError(FAILED, f"{where}: {error}") from error
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
    options: Options,
    loaded: Loaded,
    editor: GraceEditor,
    requests: list[Request],
    accepted: int,
    done: int,
    chosen: bool,
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
                )
                + ("; chosen because a map fits, see --query" if chosen else ""),
                "drift": number(book.drift),
            }
        )
    )
    columns = ("id", "prompt", "target", "case", "distance", "radius", "steps", "outcome")
    console.print(table(columns, map(_cells, requests)))
    for request in requests:
        if request.result is not None and request.result.success and request.result.reason:
            console.print(plain(f"line {request.line}: {request.result.reason}"))
    console.print(
        f"accepted {accepted} of {len(requests)}; live edits {book.edits}, entries {book.entries}"
    )
    if done:
        console.print(f"went on after {done} that an earlier call had done")
    console.print(f"saved in {plain(options.out)}" if accepted else "nothing was saved")


def _cells(request: Request) -> list[Any]:
    result = request.result
    assert result is not None
    outcome = f"refused: {result.reason}"
    if result.success:
        outcome = "ok, fragile" if result.fragile else "ok"
    return [
        "–" if result.id is None else result.id,
        request.asked,
        request.target,
        result.case,
        number(result.distance),
        number(request.radius),
        result.steps,
        outcome,
    ]
