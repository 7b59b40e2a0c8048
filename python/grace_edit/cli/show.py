"""`grace explain` and `grace codebook`: look into saved edits."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from .models import SavedEdits, Words, attach_edits, load_model, read_edits_of
from .output import (
    OK,
    USAGE,
    CommandError,
    facts,
    number,
    plain,
    print_json,
    progress,
    quiet,
    screen,
)

ANSWER_TOKENS = 8
"""How far answers are generated, unless the nearest edit's target is longer."""


def explain(directory: Path, prompt: str, *, model: str | None, device: str, as_json: bool) -> int:
    """Say which saved edit answers a prompt, and what the model says with and without edits."""
    if not prompt:
        raise CommandError(USAGE, "PROMPT must be a string that is not empty, got ''")
    saved = read_edits_of(directory)
    source = model or saved.source
    if not source:
        raise CommandError(USAGE, f"--model must be given: {directory} does not say which it is of")
    loaded = load_model(
        source,
        task=saved.about("serving").get("task", "auto"),
        dtype=str(saved.codebook.values.dtype).removeprefix("torch."),
        device=device,
    )
    words = Words(saved, loaded.tokenizer, loaded.model.config)
    with quiet(), progress("asking"):
        editor = attach_edits(loaded, directory)
        found = editor.explain(prompt)
        length = ANSWER_TOKENS
        if found.edit_id is not None:
            length = max(length, len(editor.codebook.edit(found.edit_id).label))
        edited = editor.answer(prompt, length)
        with editor.disable():
            unedited = editor.answer(prompt, length)
    nearest = None
    if found.edit_id is not None:
        near = {"edit_id": found.edit_id, "slot": found.slot, "distance": found.distance}
        nearest = _entry(saved, words, {**near, "radius": found.radius, "label": found.label})
    runner_up = None if found.runner_up is None else _entry(saved, words, found.runner_up)
    data = {
        "prompt": prompt,
        "hit": found.hit,
        "nearest": nearest,
        "runner_up": runner_up,
        "with_edits": edited,
        "without_edits": unedited,
    }
    if as_json:
        print_json(data)
    else:
        _show_answer(data)
    return OK


def _entry(saved: SavedEdits, words: Words, near: dict[str, Any]) -> dict[str, Any]:
    radius = near["radius"]
    return {
        **near,
        "edit_prompt": words.prompt(saved.codebook.edit(near["edit_id"]).prompt),
        "d_over_eps": near["distance"] / radius if radius > 0 else None,
    }


def _show_answer(data: dict[str, Any]) -> None:
    nearest, console = data["nearest"], screen()
    if data["hit"]:
        verdict = f"edit {nearest['edit_id']} answers"
    elif nearest is None:
        verdict = "no edit answers: there is none"
    else:
        verdict = "no edit answers: the nearest is too far"
    console.print(
        facts(
            {
                "prompt": data["prompt"],
                "verdict": verdict,
                "with edits": data["with_edits"],
                "without": data["without_edits"],
            }
        )
    )
    if nearest is None:
        return
    table = Table("", "edit", "its prompt", "its target", "distance", "radius", "d/eps")
    for name, near in (("nearest", nearest), ("runner-up", data["runner_up"])):
        if near is not None:
            table.add_row(
                name,
                str(near["edit_id"]),
                plain(near["edit_prompt"]),
                plain(near["label"]),
                number(near["distance"]),
                number(near["radius"]),
                number(near["d_over_eps"]),
            )
    console.print(table)


def codebook(directory: Path, *, as_json: bool) -> int:
    """Show what a directory of edits holds; no model is loaded."""
    saved = read_edits_of(directory)
    book = saved.codebook
    words = Words.of_saved(saved)
    rows = []
    for edit in book.history:
        if edit.live:
            rows.append(
                {
                    "id": edit.id,
                    "prompt": words.prompt(edit.prompt),
                    "target": words.target(edit.label),
                    "case": edit.result.case,
                    "slot": edit.slot,
                    "radius": float(book.radii[edit.slot]),
                    "fragile": edit.result.fragile,
                }
            )
    radii = [float(book.radii[slot]) for slot, label in enumerate(book.labels) if label is not None]
    summary = None
    if radii:
        summary = {"min": min(radii), "median": statistics.median(radii), "max": max(radii)}
    states = Counter(edit.state for edit in book.history)
    serving, model = saved.about("serving"), saved.about("model")
    data: dict[str, Any] = {
        "directory": str(directory),
        "model": {"class": model.get("class"), "source": saved.source or None},
        "task": serving.get("task"),
        "layer": serving.get("layer"),
        "query": serving.get("query"),
        "replace": serving.get("replace"),
        "policy": book.policy,
        "key_dim": book.keys.shape[1],
        "value_dim": book.values.shape[1],
        "dtype": str(book.keys.dtype).removeprefix("torch."),
        "version": book.version,
        "drift": book.drift,
        "entries": book.entries,
        "edits": book.edits,
        "superseded": states["superseded"],
        "deleted": states["deleted"],
        "radii": summary,
        "cases": dict(Counter(str(row["case"]) for row in rows)),
        "table": rows,
    }
    if as_json:
        print_json(data)
    else:
        _show_codebook(data)
    return OK


def _show_codebook(data: dict[str, Any]) -> None:
    console, radii, rows = screen(), data["radii"], data["table"]
    gone = f"{data['superseded']} superseded, {data['deleted']} deleted"
    shape = f"{data['key_dim']} -> {data['value_dim']}, {data['dtype']}"
    about: dict[str, Any] = {
        "model": f"{data['model']['class']} {data['model']['source'] or ''}".strip(),
        "layer": f"{data['layer']} ({shape})",
        "asks": f"query {data['query']}, replaces {data['replace']}",
        "policy": data["policy"],
        "entries": data["entries"],
        "edits": f"{data['edits']} ({gone})",
    }
    if radii is not None:
        about["radii"] = ", ".join(f"{name} {number(value)}" for name, value in radii.items())
        about["cases"] = ", ".join(f"{name} {n}" for name, n in sorted(data["cases"].items()))
    console.print(facts({**about, "drift": number(data["drift"]), "version": data["version"]}))
    if not rows:
        return
    table = Table("id", "prompt", "target", "case", "entry", "radius", "fragile")
    for row in rows:
        table.add_row(
            str(row["id"]),
            plain(row["prompt"]),
            plain(row["target"]),
            plain(row["case"]),
            str(row["slot"]),
            number(row["radius"]),
            "yes" if row["fragile"] else "",
        )
    console.print(table)
