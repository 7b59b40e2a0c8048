"""What is in a directory of edits, taken back or forgotten without a model: `grace edit ls`, `rm`,
`expire` and `undo`, and `grace codebook compact`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..codebook import store
from ..codebook.locking import writing
from ..codebook.records import Edit
from ..terminal import number, plain, progress, screen, table
from .models import SavedEdits, Words, read_edits_of
from .output import CONFLICT, NOT_FOUND, OK, CommandError, print_json


def list_edits(directory: Path, *, everything: bool, as_json: bool) -> int:
    """Show the live edits of a directory, or its whole history."""
    saved = read_edits_of(directory)
    words = Words.of_saved(saved)
    edits = [edit for edit in saved.codebook.history if everything or edit.live]
    rows = [row_of(saved, words, edit) for edit in edits]
    hits = saved.codebook.hits
    last = saved.codebook.last_hit
    if hits is not None and last is not None:
        rows = [
            {**row, "hits": hits.get(row["id"]), "last_hit": last.get(row["id"])} for row in rows
        ]
    if as_json:
        print_json({"directory": str(directory), "edits": rows})
        return OK
    console = screen()
    columns = ["id", "prompt", "target", "state", "keys", "radius"]
    columns += ["hits", "last hit"] * (hits is not None)
    console.print(table(columns, map(_cells, rows)))
    book = saved.codebook
    console.print(f"live edits {book.edits}, entries {book.entries}")
    return OK


def row_of(saved: SavedEdits, words: Words, edit: Edit) -> dict[str, Any]:
    """Return an edit of the history as JSON can hold it, with texts where they are known."""
    book = saved.codebook
    parts = book.parts(edit.id)
    return {
        "id": edit.id,
        "prompt": words.prompt(edit.prompt),
        "target": words.target(edit.label),
        "state": edit.state,
        "superseded_by": edit.superseded_by,
        "keys": 1 + len(parts),
        "paraphrases": [words.prompt(part.prompt) for part in parts],
        "negatives": [words.prompt(prompt) for prompt in edit.negatives],
        "radius": float(book.radii[edit.slot]) if edit.live else None,
        "fragile": edit.result.fragile,
        "proven": edit.result.proven,
    }


def _cells(row: dict[str, Any]) -> list[Any]:
    state = row["state"]
    if state == "superseded":
        state = f"superseded by {row['superseded_by']}"
    own = [row["id"], row["prompt"], row["target"], state, row["keys"], number(row["radius"])]
    if "hits" not in row:
        return own
    last = row["last_hit"]
    when = None if last is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
    return [*own, *("–" if item is None else item for item in (row["hits"], when))]


def remove(directory: Path, ids: list[int], *, purge: bool, as_json: bool) -> int:
    """Delete saved edits; all of them or none."""
    with writing(_existing(directory)):
        saved = read_edits_of(directory)
        _check_ids(saved, ids, purge)
        return _take_back(directory, saved, list(dict.fromkeys(ids)), purge, as_json)


def expire(
    directory: Path, unused_for: float, keep: list[int], *, dry_run: bool, as_json: bool
) -> int:
    """Delete saved edits that answered nobody for so many seconds, or say which these are."""
    with writing(_existing(directory)):
        saved = read_edits_of(directory)
        try:
            ids = saved.codebook.expire(unused_for, keep, dry_run=True)
        except KeyError as error:
            raise CommandError(NOT_FOUND, str(error.args[0])) from error
        except ValueError as error:
            raise CommandError(CONFLICT, f"{directory}: {error}") from error
        return _take_back(directory, saved, ids, False, as_json, dry_run=dry_run)


def undo(directory: Path, *, as_json: bool) -> int:
    """Delete the newest saved edit that was not deleted yet."""
    with writing(_existing(directory)):
        saved = read_edits_of(directory)
        made = [edit for edit in saved.codebook.history if edit.result.case != "import"]
        there = [edit.id for edit in made if edit.state != "deleted"]
        if not there:
            imported = "imported ones, which `grace edit rm` takes back"
            got = imported if saved.codebook.ids else "none"
            raise CommandError(NOT_FOUND, f"{directory}: must hold an edit to take back, got {got}")
        return _take_back(directory, saved, [max(there)], False, as_json)


def compact(directory: Path, keep: int, *, as_json: bool) -> int:
    """Forget deleted and superseded edits, and fold the log in."""
    with writing(_existing(directory)):
        before = _bytes_of(directory)
        saved = read_edits_of(directory)
        book = saved.codebook
        with progress("compacting"):
            forgotten = book.compact(keep)
            store.save(book, directory, saved.described, saved.beside)
        after = _bytes_of(directory)
    data = {
        "directory": str(directory),
        "forgotten": forgotten,
        "edits": book.edits,
        "history": len(book.history),
        "bytes_before": before,
        "bytes": after,
    }
    if as_json:
        print_json(data)
    else:
        kept = len(book.history) - book.edits
        screen().print(
            f"forgot {forgotten} deleted and superseded edits, kept {kept}; live edits "
            f"{book.edits}; {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB now"
        )
    return OK


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _existing(directory: Path) -> Path:
    """Return a directory of saved edits; the lock would make one that is not there."""
    read_edits_of(directory)
    return directory


def _check_ids(saved: SavedEdits, ids: list[int], purge: bool) -> None:
    wrong = []
    for id in ids:
        try:
            edit = saved.codebook.edit(id)
        except KeyError as error:
            wrong.append(str(error.args[0]))
            continue
        if edit.part_of is not None:
            wrong.append(f"id must be that of a whole edit, got {id}, a key of edit {edit.part_of}")
        elif edit.state == "deleted" and not purge:
            wrong.append(f"id must be that of an edit not yet deleted, got {id}")
    if wrong:
        raise CommandError(NOT_FOUND, *wrong)


def _take_back(
    directory: Path,
    saved: SavedEdits,
    ids: list[int],
    purge: bool,
    as_json: bool,
    *,
    dry_run: bool = False,
) -> int:
    book, words = saved.codebook, Words.of_saved(saved)
    before = set(book.ids)
    rows = [row_of(saved, words, book.edit(id)) for id in ids]
    if ids and not dry_run:
        with progress("taking back"):
            book.delete_all(ids, purge=purge)
        for row in rows:  # as they are now; a purge leaves nothing to read it from
            row.update(state="purged" if purge else "deleted", radius=None)
    back = [row_of(saved, words, book.edit(id)) for id in book.ids if id not in before]
    if ids and not dry_run:
        store.save(book, directory, saved.described, saved.beside)
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "dry_run": dry_run,
                "taken_back": rows,
                "purged": purge,
                "live_again": back,
                "edits": book.edits,
                "entries": book.entries,
            }
        )
        return OK
    console = screen()
    for row in rows:
        what = "would be taken back" if dry_run else "purged" if purge else "taken back"
        console.print(plain(f"{what}: {_named(row)}"))
    for row in back:
        console.print(plain(f"live again: {_named(row)}"))
    console.print(f"live edits {book.edits}, entries {book.entries}")
    return OK


def _named(row: dict[str, Any]) -> str:
    return f'edit {row["id"]}, "{row["prompt"]}" -> "{row["target"]}"'
