"""What an edit of a real language model costs: whole, cut, by the published recipe, in a batch.

CPU seconds of one process, kinds in turn on the same edits. `whole` is the editor as it was before
any of this: every forward whole, cross entropy, Adam as usual by `lr` alone; `cut` is the default.
Then the codebook alone, without a model: what an edit and a delete cost beside many others.

    python -m benchmarks.edit_cost MODEL RECORDS OUT.json [--query text]

MODEL is a folder of a causal language model, RECORDS a file of CounterFact records (JSON Lines).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.codebook.codebook import Codebook

Pair = tuple[str, str]
_BATCH = 64


def pairs_of(records: Path, count: int) -> list[Pair]:
    """Return prompts and targets of the first records."""
    found = []
    for line in records.read_text(encoding="utf-8").splitlines()[:count]:
        asked = json.loads(line)["requested_rewrite"]
        prompt = asked["prompt"].format(asked["subject"])
        found.append((prompt, " " + asked["target_new"]["str"]))
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that a call took, of all threads, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _cross_entropy(odds: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of tokens with log odds `[N, T]`, whatever the margins."""
    return torch.nn.functional.softplus(-odds).mean(dim=1)


class Kind:
    """One way of making the same edits, on a model of its own."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], layer: str, **config: Any) -> None:
        self.whole = config.pop("whole", False)
        self.editor = GraceEditor(*load(), GraceConfig(layer=layer, **config))
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.accepted = 0

    def edit(self, pair: Pair, *, counts: bool = True) -> None:
        """Make an edit; the first one of an editor does not count."""
        with ExitStack() as changed:
            if self.whole:
                family = self.editor.family
                family.cuts, family.prefills = False, (family.adaptor, False)
                family.goes_on = None
                module = "grace_edit.families.base.can_stop"
                changed.enter_context(mock.patch(module, return_value=False))
                changed.enter_context(mock.patch("grace_edit.editing.making._FIRST_MOVE", 0.0))
                training = "grace_edit.editing.training."
                changed.enter_context(mock.patch(training + "_shortfall", _cross_entropy))
                changed.enter_context(mock.patch("grace_edit.editing.values._QUICK", (0.9, 0.999)))
            seconds, result = timed(lambda: self.editor.edit(*pair))
        if counts:
            self.seconds.append(seconds)
            self.steps.append(result.steps)
            self.accepted += result.success

    def told(self) -> dict[str, Any]:
        """Return the figures of what was counted."""
        return {
            "edits": len(self.seconds),
            "accepted": self.accepted,
            "steps": statistics.mean(self.steps),
            "median_s": statistics.median(self.seconds),
            "mean_s": statistics.mean(self.seconds),
        }


def one_by_one(
    load: Callable[[], tuple[Any, Any]],
    layer: str,
    query: str | None,
    pairs: Sequence[Pair],
    paper: int,
) -> dict[str, Any]:
    """Make edits in each way in turn."""
    kinds = {
        "whole": Kind(load, layer, whole=True, query=query),
        "cut": Kind(load, layer, query=query),
        "published recipe": Kind(
            load, layer, whole=True, query=query, recipe="paper", replace="last"
        ),
    }
    for kind in kinds.values():
        if kind.editor.config.recipe != "paper":
            kind.edit(pairs[0], counts=False)
    for number, pair in enumerate(pairs[1:]):
        for name, kind in kinds.items():
            if name != "published recipe" or number < paper:
                kind.edit(pair)
    told = {name: kind.told() for name, kind in kinds.items()}
    cut, few = kinds["cut"].seconds, kinds["published recipe"].seconds
    each = [whole / own for whole, own in zip(kinds["whole"].seconds, cut, strict=True)]
    published = [theirs / own for theirs, own in zip(few, cut[: len(few)], strict=True)]
    told["whole / cut"] = {"sums": sum(kinds["whole"].seconds) / sum(cut), **_spread(each)}
    told["published / cut"] = {"sums": sum(few) / sum(cut[: len(few)]), **_spread(published)}
    return told


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def together(
    load: Callable[[], tuple[Any, Any]], layer: str, query: str | None, pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Make the same edits in one batch and, on another model, one by one."""
    alone, batch = (Kind(load, layer, query=query) for _ in range(2))
    for kind in (alone, batch):
        kind.edit(pairs[0], counts=False)
    rest = pairs[1:]
    watched = dict.fromkeys(("reading", "training", "all but these"), 0.0)
    maker = "grace_edit.editing.making.EditMaker."

    def note(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seconds, result = timed(lambda: own(*args, **kwargs))
            watched[name] += seconds
            return result

        return call

    from grace_edit.editing.making import EditMaker

    with (
        mock.patch(maker + "read", note("reading", EditMaker.read)),
        mock.patch(maker + "train_many", note("training", EditMaker.train_many)),
    ):
        wall = time.perf_counter()
        batched, results = timed(lambda: batch.editor.edit_batch(rest))
        wall = time.perf_counter() - wall
    watched["all but these"] = batched - sum(watched.values())
    for pair in rest:
        alone.edit(pair)
    single = sum(alone.seconds)
    return {
        "edits": len(rest),
        "one_by_one_s": single,
        "batch_s": batched,
        "batch_wall_s": wall,
        "ratio": single / batched,
        "accepted": [alone.accepted, sum(result.success for result in results)],
        "steps": [statistics.mean(alone.steps), statistics.mean(r.steps for r in results)],
        "batch_s_by_part": watched,
    }


def without_a_model(edits: int, width: int, rounds: int = 7) -> dict[str, Any]:
    """Make and delete edits in a codebook that has many, all made one by one."""
    book = Codebook(width, width, capacity=edits + 64)
    source = torch.Generator().manual_seed(0)
    for number in range(edits):
        book.insert(torch.randn(width, generator=source), [number], torch.zeros(width))
    made, deleted, undone = [], [], []
    for number in range(rounds):
        query = torch.randn(width, generator=source)
        made.append(timed(lambda q=query, n=number: book.insert(q, [n], q))[0])  # type: ignore[misc]
        at = (number + 1) * edits // (rounds + 2)
        deleted.append(timed(lambda i=at: book.delete(i))[0])  # type: ignore[misc]
        undone.append(timed(book.undo)[0])
    columns = {"insert_s": made, "delete_s": deleted, "undo_s": undone}
    medians = {name: statistics.median(seconds) for name, seconds in columns.items()}
    return {"edits": edits, "width": width, "rounds": rounds, **medians}


def main() -> None:
    """Measure and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", default="model.layers.24.mlp")
    parser.add_argument("--query", help="as in GraceConfig; text: each edit in four contexts too")
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--paper", type=int, default=3, help="edits by the published recipe")
    parser.add_argument("--parts", default="edit,batch,codebook")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        return model, AutoTokenizer.from_pretrained(arguments.model)

    told: dict[str, Any] = {
        "layer": arguments.layer,
        "query": arguments.query,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
    }
    how = (arguments.layer, arguments.query)
    pairs = pairs_of(arguments.records, max(arguments.edits, _BATCH) + 1)
    steps = {
        "edit": lambda: one_by_one(load, *how, pairs[: arguments.edits + 1], arguments.paper),
        "batch": lambda: together(load, *how, pairs[: _BATCH + 1]),
        "codebook": lambda: [without_a_model(n, 768) for n in (1_000, 10_000)],
    }
    for name in arguments.parts.split(","):
        told[name] = steps[name]()
        print(name, json.dumps(told[name], indent=2), flush=True)
    told["load_average_after"] = os.getloadavg()[0]
    arguments.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
