"""`grace explain` and `grace codebook`: look into saved edits."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..codebook.locking import owner_of
from ..families import Family, target_of
from ..terminal import facts, number, progress, screen, table
from .models import SavedEdits, Words, attach_edits, load_model, read_edits_of
from .output import OK, USAGE, CommandError, asks_line, print_json, quiet

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
        room = _room_for_answer(editor.family, prompt)
        found = editor.explain(prompt)
        length = ANSWER_TOKENS
        if found.edit_id is not None:
            length = max(length, len(target_of(editor.codebook.edit(found.edit_id).label)))
        length = min(length, room)
        edited = editor.answer(prompt, length)
        with editor.disable():
            unedited = editor.answer(prompt, length)
    nearest = None
    if found.edit_id is not None:
        place = {"edit_id": found.edit_id, "key": found.key, "slot": found.slot}
        near = {**place, "distance": found.distance}
        nearest = _entry(saved, words, {**near, "radius": found.radius, "label": found.label})
    runner_up = None if found.runner_up is None else _entry(saved, words, found.runner_up)
    data = {
        "prompt": prompt,
        "hit": found.hit,
        "text": None if found.text is None else asdict(found.text),
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


def _room_for_answer(family: Family, prompt: str) -> int:
    try:
        return family.room_for_answer(prompt)
    except ValueError as error:
        # It names its argument; here that is called PROMPT.
        raise CommandError(USAGE, f"PROMPT{str(error).removeprefix('prompt')}") from error


def _entry(saved: SavedEdits, words: Words, near: dict[str, Any]) -> dict[str, Any]:
    radius, book, id = near["radius"], saved.codebook, near["edit_id"]
    keys = [book.edit(id), *book.parts(id)]
    return {
        **near,
        "edit_prompt": words.prompt(keys[near["key"]].prompt),
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
    if data["text"] is not None:
        console.print(facts(text_facts(data["text"])))
    if nearest is None:
        return
    columns = ("", "edit", "its prompt", "its target", "distance", "radius", "d/eps")
    rows = [("nearest", nearest), ("runner-up", data["runner_up"])]
    console.print(table(columns, (_cells(name, near) for name, near in rows if near is not None)))


def text_facts(text: dict[str, Any]) -> dict[str, Any]:
    """Return what the keys saw in two texts (`TextReason` as a dict), by name, for a person."""
    told: dict[str, Any] = {"asked with": text["span"], "about": ", ".join(text["subject"]) or "–"}
    if text["edit_span"] is None:
        return told
    told["compared to"] = text["edit_span"]
    parts = f"meaning {number(text['meaning'])}, lexical {number(text['lexical'])}"
    decides = {None: "the same query", "meaning": "it is what is asked", "lexical": "it is of whom"}
    told["distance²"] = f"{parts}: {decides[text['decides']]}"
    differ = ", ".join(text["unshared"]) or "none"
    told["subject"] = f"shared {', '.join(text['shared']) or 'none'}; not shared {differ}"
    return told


def _cells(name: str, near: dict[str, Any]) -> list[Any]:
    figures = [number(near[key]) for key in ("distance", "radius", "d_over_eps")]
    return [name, near["edit_id"], near["edit_prompt"], near["label"], *figures]


def codebook(directory: Path, *, as_json: bool) -> int:
    """Show what a directory of edits holds; no model is loaded."""
    saved = read_edits_of(directory)
    book = saved.codebook
    words = Words.of_saved(saved)
    rows = []
    hits = book.hits
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
                    "keys": 1 + len(book.parts(edit.id)),
                    "fragile": edit.result.fragile,
                    **({} if hits is None else {"hits": hits[edit.id]}),
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
        "text": serving.get("text"),
        "replace": serving.get("replace"),
        "policy": book.policy,
        "key_dim": book.keys.shape[1],
        "value_dim": book.values.shape[1],
        "dtype": str(book.keys.dtype).removeprefix("torch."),
        "version": book.version,
        "log": {"changes": saved.changes, "bytes": saved.log_bytes, "writer": owner_of(directory)},
        "drift": book.drift,
        "entries": book.entries,
        "edits": book.edits,
        "superseded": states["superseded"],
        "deleted": states["deleted"],
        "radii": summary,
        "cases": dict(Counter(str(row["case"]) for row in rows)),
        "sketch": book.describe_sketch(),
        "hits": book.describe_hits(),
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
        "asks": asks_line(data["query"], data["replace"], data["text"]),
        "policy": data["policy"],
        "entries": data["entries"],
        "edits": f"{data['edits']} ({gone})",
    }
    if radii is not None:
        about["radii"] = ", ".join(f"{name} {number(value)}" for name, value in radii.items())
        about["cases"] = ", ".join(f"{name} {n}" for name, n in sorted(data["cases"].items()))
    about["drift"], about["version"] = number(data["drift"]), data["version"]
    if data["log"]["changes"] or data["log"]["writer"]:
        log = data["log"]
        about["log"] = f"{log['changes']} changes since the last snapshot, {log['bytes']} bytes"
        about["writer"] = log["writer"] or "none"
    about["sketch"] = _sketch_line(data["sketch"])
    if data["hits"] is not None:
        about["hits"] = _hits_line(data["hits"])
    console.print(facts(about))
    if not rows:
        return
    columns = ["id", "prompt", "target", "case", "slot", "radius", "fragile"]
    columns += ["hits"] * (data["hits"] is not None)
    shown = ({**r, "radius": number(r["radius"]), "fragile": "yes" * r["fragile"]} for r in rows)
    console.print(table(columns, ([row[name] for name in columns] for row in shown)))


def _hits_line(hits: dict[str, Any]) -> str:
    most = ", ".join(f"edit {id} {count}" for id, count in hits["most"])
    return f"{hits['total']}, never {hits['never']} edits" + (f", most {most}" if most else "")


def _sketch_line(sketch: dict[str, Any] | None) -> str:
    if sketch is None:
        return "none, the capacity is too small for one"
    use = f"covers {sketch['rows']} slots" if sketch["active"] else "not in use"
    return f"{use}, {sketch['bytes'] / 1e6:.1f} MB"
