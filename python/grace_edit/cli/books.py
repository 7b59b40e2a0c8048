"""`grace codebook verify`, `diff`, `merge`, `export` and `import`: whole directories of edits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..codebook import exchange, merging, store
from ..codebook.locking import writing
from ..codebook.merging import Conflict, MergeConflict, Merged
from ..codebook.records import Edit
from ..editing.asked import read_wanted
from ..families import target_of
from ..terminal import facts, number, plain, progress, screen, table
from .changing import row_of
from .models import (
    SavedEdits,
    Words,
    attach_edits,
    check_place,
    holds_edits,
    load_model,
    read_edits_of,
)
from .output import (
    CONFLICT,
    CORRUPT,
    FAILED,
    NOT_FOUND,
    OK,
    USAGE,
    CommandError,
    complain,
    print_json,
    quiet,
)


def verify(directory: Path, *, model: str | None, device: str, as_json: bool) -> int:
    """Check the files, the codebook's promises, and with a model what its prompts hit."""
    saved = read_edits_of(directory)
    book = saved.codebook
    try:
        with progress("checking"):
            book.check()
    except AssertionError as error:
        raise CommandError(CORRUPT, f"{directory}: a promise is broken: {error}") from error
    data: dict[str, Any] = {
        "directory": str(directory),
        "entries": book.entries,
        "edits": book.edits,
        "keys": len(book.live_keys),
        "model": None,
        "misses": None,
    }
    if model is not None:
        dtype = str(book.values.dtype).removeprefix("torch.")
        task = saved.about("serving").get("task", "auto")
        loaded = load_model(model, task=task, dtype=dtype, device=device)
        with quiet():
            editor = attach_edits(loaded, directory)
            misses = editor.verify(progress=sys.stderr.isatty())
        data |= {"model": loaded.facts(), "misses": [asdict(miss) for miss in misses]}
    if as_json:
        print_json(data)
    else:
        _show_verified(data)
    if data["misses"]:
        complain(f"{len(data['misses'])} prompts miss their edits")
        return FAILED
    return OK


def _show_verified(data: dict[str, Any]) -> None:
    console, misses = screen(), data["misses"]
    asked = "no model was asked"
    if misses is not None:
        source = data["model"]["source"]
        asked = f"{source} hits the edit of every prompt" if not misses else f"asked of {source}"
    checked = f"{data['edits']} edits with {data['keys']} keys, {data['entries']} entries"
    console.print(facts({"files": "as saved", "codebook": checked, "model": asked}))
    if misses:
        rows = (
            [m["edit_id"], m["mode"], number(m["distance"]), number(m["radius"])] for m in misses
        )
        console.print(table(("edit", "mode", "distance", "radius"), rows))


def diff(first: Path, second: Path, *, as_json: bool) -> int:
    """Show what two directories of edits do not share."""
    a, b = read_edits_of(first), read_edits_of(second)
    words = Words.of_saved(a), Words.of_saved(b)
    found = merging.diff(a.codebook, b.codebook)
    data = {
        "first": str(first),
        "second": str(second),
        "other_kind": _other_kind(a, b),
        "only_first": [row_of(a, words[0], edit) for edit in found.only_first],
        "only_second": [row_of(b, words[1], edit) for edit in found.only_second],
        "differ": [
            {"first": row_of(a, words[0], x), "second": row_of(b, words[1], y), "in": list(what)}
            for x, y, what in found.differ
        ],
        "same": found.same,
    }
    if as_json:
        print_json(data)
    else:
        _show_difference(data)
    return OK


def _show_difference(data: dict[str, Any]) -> None:
    console = screen()
    rows: list[list[Any]] = []
    for row in data["only_first"]:
        rows.append(["only in A", row["id"], "", row["prompt"], row["target"], ""])
    for row in data["only_second"]:
        rows.append(["only in B", "", row["id"], row["prompt"], "", row["target"]])
    for pair in data["differ"]:
        x, y = pair["first"], pair["second"]
        what = f"other {', '.join(pair['in'])}"
        rows.append([what, x["id"], y["id"], x["prompt"], x["target"], y["target"]])
    if data["other_kind"]:
        console.print(f"edits of another {', '.join(data['other_kind'])}")
    if rows:
        console.print(table(("", "A", "B", "prompt", "target in A", "target in B"), rows))
    console.print(
        f"only in A {len(data['only_first'])}, only in B {len(data['only_second'])}, "
        f"differ {len(data['differ'])}, same {data['same']}"
    )


def _other_kind(a: SavedEdits, b: SavedEdits) -> list[str]:
    """Return in what two directories differ that must agree for one model to serve both."""
    names = sorted({*a.about("serving"), *b.about("serving")})
    found = [n for n in names if a.about("serving").get(n) != b.about("serving").get(n)]
    prints = [saved.about("model").get("fingerprint") for saved in (a, b)]
    # A fingerprint is of what lies below a layer and above it: of two layers it tells nothing.
    other_model = prints[0] != prints[1] and "layer" not in found
    return [*(["model"] if other_model else []), *found]


def merge(first: Path, second: Path, out: Path, prefer: str, *, as_json: bool) -> int:
    """Make the edits of one directory in those of another, and save both in a third."""
    _check_new(out)
    a, b = read_edits_of(first), read_edits_of(second)
    other = _other_kind(a, b)
    if other:
        raise CommandError(
            CONFLICT, f"{second}: must be of the model, layer and query of {first}, got another "
            f"{', '.join(other)}"
        )  # fmt: skip
    try:
        merging.check_alike(a.codebook, b.codebook)
    except ValueError as error:
        raise CommandError(CONFLICT, str(error)) from error
    words = Words.of_saved(a)
    refused = False
    with writing(out):
        _check_new(out)
        try:
            with progress("merging", b.codebook.edits) as step:
                done = merging.merge(a.codebook, b.codebook, prefer, step)  # type: ignore[arg-type]
        except MergeConflict as error:
            done, refused = Merged(conflicts=error.conflicts), True
        else:
            described = {key: x for key, x in a.described.items() if key != "adding"}
            store.save(a.codebook, out, described, a.beside)
    conflicts = [_conflict(words, pair) for pair in done.conflicts]
    data = {
        "out": None if refused else str(out),
        "prefer": prefer,
        "made": len(done.ids),
        "same": len(done.same),
        "ids": done.ids,
        "conflicts": conflicts,
        "edits": a.codebook.edits,
        "entries": a.codebook.entries,
    }
    if as_json:
        print_json(data)
    else:
        _show_merged(data)
    if refused:
        complain(
            f"{len(conflicts)} edits of {second} contradict {first}; nothing was merged: say with "
            "--prefer first or last which are to win"
        )
        return CONFLICT
    return OK


def _conflict(words: Words, pair: Conflict) -> dict[str, Any]:
    found = {}
    for name, edit in (("first", pair.first), ("second", pair.second)):
        found[name] = {
            "id": edit.id,
            "prompt": words.prompt(edit.prompt),
            "target": words.target(edit.label),
        }
    return found


def _show_merged(data: dict[str, Any]) -> None:
    console = screen()
    if data["conflicts"]:
        columns = ("A", "prompt in A", "target in A", "B", "prompt in B", "target in B")
        rows = [[x for side in pair.values() for x in side.values()] for pair in data["conflicts"]]
        console.print(table(columns, rows))
    if data["out"] is None:
        return
    wins = {"first": ", A's edits kept", "last": ", B's edits made", "error": ""}[data["prefer"]]
    wins = wins if data["conflicts"] else ""
    console.print(
        f"made {data['made']} edits of B, {data['same']} were there, "
        f"{len(data['conflicts'])} conflicts{wins}; live edits {data['edits']}, "
        f"entries {data['entries']}"
    )
    console.print(f"saved in {plain(data['out'])}")


def export_to(directory: Path, out: Path, *, as_json: bool) -> int:
    """Write the live edits as JSON lines, or the entries as safetensors."""
    check_place(out.parent)
    if out.exists():
        raise CommandError(CONFLICT, f"--out {out}: must be a new file, got one that exists")
    saved = read_edits_of(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"directory": str(directory), "out": str(out)}
    if out.suffix == ".safetensors":
        data["entries"] = exchange.write(saved.codebook, out, saved.described, saved.beside)
        said = f"{data['entries']} entries"
    else:
        data |= _write_lines(saved, out)
        said = f"{data['edits']} edits, {data['as_ids']} of them as token ids"
        if data["left_out"]:
            said += f"; {data['left_out']} whose prompts are not known are left out"
    if as_json:
        print_json(data)
    else:
        screen().print(plain(f"{said}; written to {out}"))
    return OK


def _write_lines(saved: SavedEdits, out: Path) -> dict[str, int]:
    book, words = saved.codebook, Words.of_saved(saved)
    family = words.family(saved)
    lines, as_ids, left_out = [], 0, 0
    for edit in book.history:
        if not edit.live:
            continue
        parts = book.parts(edit.id)
        if any(key.prompt is None for key in (edit, *parts)):
            left_out += 1
            continue
        record = _record(edit, parts)
        text = _as_text(words, record)
        if family is not None and _reads_as(family, text, record):
            lines.append(text)
        else:
            lines.append(record)
            as_ids += 1
    for line in lines:
        for name in ("paraphrases", "negatives"):
            if not line[name]:
                del line[name]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    exchange.replace_file(out, content.encode())
    return {"edits": len(lines), "as_ids": as_ids, "left_out": left_out}


def _record(edit: Edit, parts: Sequence[Edit]) -> dict[str, Any]:
    return {
        "prompt": list(edit.prompt or ()),
        "target": target_of(edit.label),
        "paraphrases": [list(part.prompt or ()) for part in parts],
        "negatives": [list(prompt) for prompt in edit.negatives],
    }


def _as_text(words: Words, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": words.prompt(record["prompt"]),
        "target": words.target(record["target"]),
        "paraphrases": [words.prompt(prompt) for prompt in record["paraphrases"]],
        "negatives": [words.prompt(prompt) for prompt in record["negatives"]],
    }


def _reads_as(family: Any, text: dict[str, Any], record: dict[str, Any]) -> bool:
    """Say whether an edit as text is read as the token ids that it has."""
    try:
        wanted = read_wanted(family, text)
    except ValueError:
        return False
    found = asdict(wanted)
    return all(found[name] == record[name] for name in ("prompt", "target")) and all(
        list(found[name]) == record[name] for name in ("paraphrases", "negatives")
    )


def import_from(file: Path, out: Path, like: Path | None, *, as_json: bool) -> int:
    """Make a codebook of entries given as tensors, and save it."""
    if not file.is_file():
        raise CommandError(NOT_FOUND, f"{file}: no such file")
    if file.suffix in (".jsonl", ".json"):
        raise CommandError(
            USAGE,
            f"{file}: must be a safetensors file; edits as JSON lines are made with a model: "
            f"grace edit add --edits {file}",
        )
    _check_new(out)
    given = None
    if like is not None:
        saved = read_edits_of(like)
        given = (saved.codebook, saved.described, saved.beside)
    with progress("reading"):
        book, described, beside = exchange.read(file, given)
    described = {key: x for key, x in described.items() if key != "adding"}
    with writing(out), progress("saving"):
        _check_new(out)
        store.save(book, out, described, beside)
    data = {"file": str(file), "out": str(out), "entries": book.entries, "policy": book.policy}
    if as_json:
        print_json(data)
    else:
        screen().print(plain(f"{book.entries} entries; saved in {out}"))
    return OK


def _check_new(out: Path) -> None:
    check_place(out)
    if holds_edits(out):
        raise CommandError(CONFLICT, f"--out {out}: holds saved edits; name another directory")
