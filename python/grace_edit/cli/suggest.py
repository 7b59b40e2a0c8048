"""`grace suggest`: which layer to wrap and which radius to give, by measurement on records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation import EditRecord
from ..evaluation import load as load_records
from ..evaluation.model import AskedModel
from ..terminal import number, screen, table
from .evaluate import expected, progress_wanted
from .models import attach_edits, load_model, read_edits_of
from .output import NOT_FOUND, OK, USAGE, CommandError, print_json


def layer(
    data: str, *, model: str, count: int, layers: str, picture: Path | None, as_json: bool
) -> int:
    """Try layers on the first records that have rewordings, and name the best."""
    from ..suggesting import suggest_layer

    if count < 1:
        raise CommandError(USAGE, f"--count must be at least 1, got {count}")
    records = expected(lambda: [one for one in load_records(data).records if one.paraphrases])
    if not records:
        raise CommandError(USAGE, f"{data}: must hold records with rewordings, got none")
    loaded = load_model(model, task="auto", dtype=None, device="cpu")
    asked = AskedModel(loaded.model, loaded.tokenizer)
    edits = [
        (
            asked.for_editor(one.prompt),
            asked.target(one.target),
            [asked.for_editor(prompt) for prompt in one.paraphrases],
        )
        for one in records[:count]
    ]
    found = expected(
        lambda: suggest_layer(
            loaded.model,
            loaded.tokenizer,
            edits,
            layers=[name.strip() for name in layers.split(",") if name.strip()] or None,
            picture=picture,
            progress=progress_wanted(),
        )
    )
    return _tell(found, as_json)


def radius(
    data: str,
    codebook: Path,
    *,
    model: str | None,
    bounds: dict[str, float],
    picture: Path | None,
    as_json: bool,
) -> int:
    """Ask what records ask of saved edits, and name the largest radius that keeps the bounds."""
    from ..suggesting import suggest_radius

    saved = read_edits_of(codebook)
    records = expected(lambda: load_records(data).records)
    source = model or saved.source
    if not source:
        raise CommandError(USAGE, "--model must be given, got none")
    dtype = str(saved.codebook.values.dtype).removeprefix("torch.")
    loaded = load_model(source, task="auto", dtype=dtype, device="cpu")
    editor = expected(lambda: attach_edits(loaded, codebook))
    asked = AskedModel(loaded.model, loaded.tokenizer)
    edited = _edited(editor, asked, records)
    if not edited:
        raise CommandError(NOT_FOUND, f"{data}: holds no record of an edit in {codebook}")
    near = [(i, asked.for_editor(p)) for i, one in edited.items() for p in one.paraphrases]
    far = {
        "neighbours": [q.prompt for one in edited.values() for q in one.neighbours],
        "same subject": [q.prompt for one in edited.values() for q in one.same_subject],
    }
    kinds = {kind: list(map(asked.for_editor, prompts)) for kind, prompts in far.items() if prompts}
    found = expected(
        lambda: suggest_radius(
            editor,
            near,
            kinds,
            {kind: bounds[kind] for kind in kinds},
            picture=picture,
            progress=progress_wanted(),
        )
    )
    return _tell(found, as_json)


def _edited(editor: Any, asked: AskedModel, records: list[EditRecord]) -> dict[int, EditRecord]:
    """Return the records whose prompts are live edits, by the edits' ids."""
    live = {tuple(e.prompt): e.id for e in editor.codebook.history if e.live and e.prompt}
    found = {}
    for one in records:
        ids = tuple(editor.family.encode(asked.for_editor(one.prompt)))
        if ids in live:
            found[live[ids]] = one
    return found


def _tell(found: Any, as_json: bool) -> int:
    told = found.to_dict()
    if as_json:
        print_json(told)
        return OK
    rows = [_plain(row) for row in told["table"]]
    console = screen()
    if rows:
        console.print(table(list(rows[0]), [[*row.values()] for row in rows]))
    named = f"radius {number(told['radius'])}: " if "radius" in told else ""
    console.print(named + found.reason)
    return OK


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of figures, those of a kind under its name."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name} {kind}": number(share) for kind, share in value.items()}
        else:
            cells[name] = number(value) if isinstance(value, float) else value
    return cells
