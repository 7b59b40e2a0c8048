"""Thousands of edits of SmolLM2 one after the other: what each costs, and whether all still hold.

Every edit is trained, proven and published, so that it is on the disk before the next one begins;
a run that was killed goes on behind the last edit that was reported. At the end every live edit is
asked by free generation, and a few are deleted and brought back.

    python -m benchmarks.lifelong DATA --model DIR --out OUT [--edits 3000] [--contexts N]

DATA is a folder of published records. OUT/rows.jsonl gets a line for each edit (figures alone, no
texts), OUT/lifelong.json the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from grace_edit import GraceConfig, GraceEditor, publish
from grace_edit.editing import making
from grace_edit.evaluation.loading import load
from grace_edit.evaluation.model import load_model
from grace_edit.evaluation.records import EditRecord
from grace_edit.progress import bar

from .millions import own_memory

FILES = (
    "counterfact.jsonl",
    "counterfact_flat.jsonl",
    "knowedit_wiki_counterfact.jsonl",
    "zsre.jsonl",
)
"""In this order, until there are edits enough: CounterFact comes first."""

LAYER = "model.layers.24.mlp"
_WINDOW = 100  # edits whose median stands for the cost at a point of the stream
_TAKEN_BACK = 20


def stream_of(data: Path, edits: int, seed: int) -> Iterator[tuple[str, EditRecord]]:
    """Yield `(file, record)` of as many edits, shuffled within each file."""
    found = 0
    for name in FILES:
        records = list(load(data / name).records)
        random.Random(seed).shuffle(records)
        for record in records[: edits - found]:
            yield name, record
        found += min(len(records), edits - found)
    if found < edits:
        raise SystemExit(f"edits must be at most {found}, which {data} holds, got {edits}")


class Stopwatch:
    """Adds up the seconds that a function takes."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.call(*args, **named)
        finally:
            self.seconds += time.perf_counter() - start


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the edits that are missing, measure at the end, return the summary."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    directory, rows_file = out / "edits", out / "rows.jsonl"
    if (directory / "grace_config.json").exists():
        editor = GraceEditor.from_pretrained(model, tokenizer, directory)
    else:
        config = GraceConfig(
            layer=LAYER, query="text", contexts=options.contexts, margin=options.margin
        )
        editor = GraceEditor(model, tokenizer, config)
    training = making.fit_value = Stopwatch(making.fit_value)  # type: ignore[assignment]
    stream = list(stream_of(options.data, options.edits, options.seed))
    done = len(rows_file.read_text().splitlines()) if rows_file.exists() else 0
    with publish(editor, directory), rows_file.open("a") as rows:
        for number in bar(range(done, len(stream)), "editing", True):
            name, record = stream[number]
            training.seconds = 0.0
            start = time.perf_counter()
            result = editor.edit(record.prompt, record.target)
            row = {
                "edit": number + 1,
                "file": name,
                "case": result.case,
                "accepted": result.success,
                "reason": "" if result.success else "refused",
                "steps": result.steps,
                "seconds": time.perf_counter() - start,
                "training_s": training.seconds,
                "entries": editor.codebook.entries,
                "live": editor.codebook.edits,
                "own_bytes": own_memory(),
            }
            rows.write(json.dumps(row) + "\n")
            rows.flush()
        told = summary([json.loads(line) for line in rows_file.read_text().splitlines()])
        told.update(held(editor))
        told.update(taken_back(editor, options.seed))
    told["settings"] = {"layer": LAYER, "query": "text", "contexts": options.contexts}
    told["settings"]["margin"] = options.margin
    told["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    told["threads"] = torch.get_num_threads()
    told["load_average_at_the_end"] = os.getloadavg()[0]
    return told


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rows of all edits say together."""
    marks = [mark for mark in (100, 300, 1_000, 2_000, 3_000) if mark < len(rows)]
    at = {}
    for mark in sorted({*marks, len(rows)}):
        window = rows[max(0, mark - _WINDOW) : mark]
        trained = [row for row in window if row["training_s"] > 0]
        at[str(mark)] = {
            "seconds": median(row["seconds"] for row in window),
            "training_s": median(row["training_s"] for row in window),
            "apart_from_training_s": median(row["seconds"] - row["training_s"] for row in window),
            "steps": median(row["steps"] for row in trained) if trained else None,
            "entries": window[-1]["entries"],
            "live": window[-1]["live"],
            "own_bytes": window[-1]["own_bytes"],
        }
    cases: dict[str, int] = {}
    files: dict[str, int] = {}
    for row in rows:
        files[row["file"]] = files.get(row["file"], 0) + 1
        if row["accepted"]:
            cases[row["case"]] = cases.get(row["case"], 0) + 1
    accepted = sum(row["accepted"] for row in rows)
    return {"edits": len(rows), "accepted": accepted, "cases": cases, "files": files, "at": at}


def held(editor: GraceEditor) -> dict[str, Any]:
    """Ask every live edit by free generation."""
    live = [edit for edit in editor.codebook.live_keys if edit.prompt is not None]
    right = 0
    for edit in bar(live, "asking every edit", True):
        target = list(edit.label)
        wanted = editor.tokenizer.decode(target, skip_special_tokens=True)
        right += editor.answer(list(edit.prompt), len(target)).startswith(wanted)
    return {"live_edits_asked": len(live), "produced": right, "err": right / len(live)}


def taken_back(editor: GraceEditor, seed: int) -> dict[str, Any]:
    """Delete a few edits and undo that, timed; the disk included."""
    ids = [edit.id for edit in editor.codebook.history if edit.live]
    deleting, undoing = [], []
    for edit in random.Random(seed).sample(ids, min(_TAKEN_BACK, len(ids))):
        start = time.perf_counter()
        editor.delete(edit)
        middle = time.perf_counter()
        editor.undo()
        deleting.append(middle - start)
        undoing.append(time.perf_counter() - middle)
    return {
        "delete_s": {"median": median(deleting), "most": max(deleting)},
        "undo_s": {"median": median(undoing), "most": max(undoing)},
    }


def main() -> None:
    """Run and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True, help="where SmolLM2-135M-Instruct was saved to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=3_000)
    parser.add_argument("--contexts", type=int, help="as in GraceConfig; None: its default")
    parser.add_argument("--margin", type=float, default=5.0, help="as in GraceConfig")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    told = run(options)
    (options.out / "lifelong.json").write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
