"""The demo: two real models are edited, saved, loaded elsewhere and measured.

`run` is what `grace demo` calls. Part 1 is in `topics.py`, part 2 in `corrections.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..editor import GraceEditor
from ..terminal import number, progress, table
from . import corrections as part2
from . import report
from . import topics as part1
from .data import load_topics
from .reload import answers_of
from .smollm2 import load_smollm2, packaged_file

QUICK = 120
"""Requests of the stream that a quick run looks at."""
QUICK_ERRORS = 3
"""Errors of the language model that a quick run corrects."""
SHOWN = 2
"""Errors around which every question is printed."""


def run(out: Path, quick: bool, console: Console) -> dict[str, Any]:
    """Run the demo, write what it makes to `out` and print its tables.

    Args:
        out: directory for the models, the codebooks, the figures and the picture.
        quick: fewer edits and only one ε.
        console: where the tables go; progress bars go to stderr.

    Returns:
        Every figure, and `"ok"`: whether the fresh process gave the same answers.
    """
    # First of all, so that what is missing is not found out after minutes.
    from .picture import draw

    packaged_file()

    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # Models this small gain little from a second thread and lose much to one that has to wait.
    torch.set_num_threads(1)
    try:
        result: dict[str, Any] = {"topics": _topics(out, quick, console)}
    finally:
        torch.set_num_threads(threads)
    # Beside the loading of part 2, which takes one core.
    beside = _reload(out, "topics")
    result["corrections"] = _corrections(out, quick, console)
    console.print()
    result["reloaded"] = {
        "topics": _is_same("topics", beside, console),
        "corrections": _is_same("corrections", _reload(out, "corrections"), console),
    }
    result["ok"] = all(result["reloaded"].values())
    result["seconds"] = time.perf_counter() - start
    result["picture"] = str(draw(result, out / "demo.png"))
    (out / "demo.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    report.write_rows(result["corrections"]["rows"], out / "corrections.csv")
    console.print(
        f"\npicture: {result['picture']}   figures: {out / 'demo.json'}, corrections.csv\n"
        f"talk to it: grace chat --model {out / 'corrections-model'} "
        f"--codebook {out / 'corrections-edits'}"
    )
    console.print(f"done in {result['seconds']:.0f} s")
    return result


def _bar(items: Sequence[Any], what: str) -> Iterator[Any]:
    with progress(what, len(items)) as step:
        for item in items:
            yield item
            step()


def _topics(out: Path, quick: bool, console: Console) -> dict[str, Any]:
    data = load_topics()
    console.print("\n1. A pretrained sentence encoder files messages under eight topics")
    model, tokenizer = part1.build_model(data)
    trr = part1.accuracy(model, tokenizer, data.test)
    stream = part1.stream_of(model, tokenizer, data.stream)
    stream = stream[-QUICK:] if quick else stream
    console.print(
        f"   {len(data.train)} training sentences, upstream test accuracy {trr:.3f}; of "
        f"{len(stream)} requests in the stream it fails {sum(fails for _, fails in stream)}.\n"
        "   The stream has a label shift: wearables, upstream technology, are filed under health "
        "from the middle on\n   and all of them under sport in the last part. A request is edited "
        "if the model, unedited or as edited so far, fails it."
    )
    before = part1.stream_accuracy(model, tokenizer, stream)
    model.save_pretrained(out / "topics-model")
    tokenizer.save_pretrained(out / "topics-model")
    rows: list[dict[str, Any]] = []
    asked: dict[str, torch.Tensor] = {}

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(
            f"   ε = {row['radius']:.3g}: {row['accepted']} of {row['attempted']} edits accepted, "
            f"{number(row['seconds_per_edit'])} s each"
        )

    # What does not have to wait for anything else has the other core.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        tuned = other.submit(_fine_tuned, out / "topics-model", stream)
        if not quick:
            wide = other.submit(_edited, out / "topics-model", stream, 3.0 * part1.RADIUS)
            editor, row = part1.run_stream(
                model, tokenizer, data, stream, 0.1 * part1.RADIUS, _bar, asked
            )
            tell(row)
            editor.detach()
        editor, row = part1.run_stream(model, tokenizer, data, stream, part1.RADIUS, _bar, asked)
        if not quick:
            tell(wide.result())
        tell(row)
        rows.append(tuned.result())
    editor.save_pretrained(out / "topics-edits")
    _remember(out, "topics", editor, list(dict.fromkeys(r.text for r, _ in stream)))
    editor.detach()
    console.print(_topics_table(rows, trr, before))
    cases = ", ".join(f"{case} {n}" for case, n in sorted(rows[-2]["cases"].items()))
    console.print(f"   cases at ε = {part1.RADIUS}: {cases}")
    return {
        "trr_before": trr,
        "stream_accuracy_before": before,
        "stream": len(stream),
        "rows": rows,
    }


def _fine_tuned(directory: Path, stream: list[tuple[Any, bool]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, tokenizer = part1.load_model(directory)
    return part1.run_fine_tuning(model, tokenizer, load_topics(), stream, _silently)


def _edited(directory: Path, stream: list[tuple[Any, bool]], radius: float) -> dict[str, Any]:
    model, tokenizer = part1.load_model(directory)
    return part1.run_stream(model, tokenizer, load_topics(), stream, radius, _silently, {})[1]


def _silently(items: Sequence[Any], what: str) -> Iterator[Any]:
    return iter(items)


def _topics_table(rows: list[dict[str, Any]], trr: float, stream: float) -> Table:
    names = {
        "ε": "radius",
        "edits": "attempted",
        "accepted": "accepted",
        "ES": "es",
        "ERR": "err",
        "ERR acc.": "err_accepted",
        "stream": "stream_accuracy",
        "TRR": "trr",
        "paraphrases": "paraphrase_takes",
        "false fires": "false_fires",
        "keys": "keys",
        "edits/key": "edits_per_key",
        "s/edit": "seconds_per_edit",
    }
    cells = [
        [row["method"], *(_cell(row.get(field)) for field in names.values())]
        for row in sorted(rows, key=lambda row: (row["radius"] is None, row["radius"] or 0.0))
    ]
    unedited = {"TRR": f"{trr:.3f}", "stream": f"{stream:.3f}"}
    cells.append(["unedited", *(unedited.get(name, "–") for name in names)])
    return table(["", *names], cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else str(value)


def _corrections(out: Path, quick: bool, console: Console) -> dict[str, Any]:
    console.print(
        "\n2. SmolLM2-135M-Instruct, a language model, says wrong things; edits correct them"
    )
    with progress("loading SmolLM2"):
        model, tokenizer = load_smollm2()
    asked = part2.load_corrections(QUICK_ERRORS if quick else None)
    editor, figures = part2.run(asked, model, tokenizer, _bar)
    model.save_pretrained(out / "corrections-model")
    tokenizer.save_pretrained(out / "corrections-model")
    editor.save_pretrained(out / "corrections-edits")
    _remember(out, "corrections", editor, [a.text for a in asked if a.role in ("edit", "cloze")])
    figures["undone"] = part2.undo_all(editor, figures["rows"])
    editor.detach()
    for made in report.tables(figures, SHOWN):
        console.print(made)
    console.print("\n".join(f"   {line}" for line in report.lines(figures)))
    return figures


def _remember(out: Path, part: str, editor: GraceEditor, prompts: list[str]) -> None:
    answers = answers_of(editor, prompts)
    (out / f"{part}-answers.json").write_text(json.dumps(answers), encoding="utf-8")


def _reload(out: Path, part: str) -> subprocess.Popen[str]:
    """Begin to load a model and its edits in a fresh process, to compare answers and lookups."""
    command = [sys.executable, "-m", "grace_edit.demo.reload", str(out), part]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _is_same(part: str, fresh: subprocess.Popen[str], console: Console) -> bool:
    """Say what a fresh process found, and whether everything was the same."""
    said, failed = fresh.communicate()
    console.print(f"   {part} in a fresh process: {(said or failed).strip()}")
    return fresh.returncode == 0
