"""How well trained values decode in other wordings, hits forced: `results/values.md`.

    python -m benchmarks.values MODEL RECORDS [--count 40] [--layers 20,24,27] [--contexts 0,4]

MODEL is a folder of a causal language model, RECORDS a file of CounterFact records (JSON Lines).
Per layer and number of contexts every record is trained once, to the largest margin; the values
that reached the smaller ones are taken on the way: training towards those would have stopped there.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing.making import EditMaker
from torch import Tensor

MARGINS = (0.5, 2.0, 5.0, 8.0)


@dataclass
class Row:
    """What was counted for one layer, number of contexts and margin."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    produced: list[bool] = field(default_factory=list)


class Watch:
    """Notes the value, step and time at which training first has each margin."""

    def __init__(self, family: Any, target: list[int]) -> None:
        self.family, self.target = family, target
        self.own = family.target_logits
        self.begun = time.perf_counter()
        self.steps = -1
        self.reached: dict[float, tuple[int, float, float, Tensor]] = {}
        self.last: tuple[int, float, float, Tensor] | None = None

    def __enter__(self) -> Watch:
        self.family.target_logits = self
        return self

    def __exit__(self, *_: Any) -> None:
        del self.family.target_logits

    def __call__(self, prompts: Any, targets: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        logits, wanted = self.own(prompts, targets, values)
        p = logits.detach().double().softmax(1).gather(1, wanted[:, None])[:, 0]
        if self.last is None or not torch.equal(self.last[3], values[0]):
            self.steps += 1
        odds = float((p / (1 - p).clamp(min=1e-12)).log().min())
        here = float(p[: len(self.target)].prod())
        now = time.perf_counter() - self.begun
        self.last = (self.steps, now, here, values[0].detach().clone())
        for margin in MARGINS:
            if odds >= margin:
                self.reached.setdefault(margin, self.last)
        return logits, wanted


def measure(
    model: Any, tokenizer: Any, layer: str, contexts: int, records: list[dict[str, Any]]
) -> dict[float, Row]:
    """Train every record's value and ask its published rewordings, answered by it."""
    config = GraceConfig(layer=layer, contexts=contexts, margin=max(MARGINS), drift=0.0)
    editor = GraceEditor(model, tokenizer, config)
    rows = {margin: Row() for margin in MARGINS}
    family, maker = editor.family, EditMaker(editor.family, config)
    with family.working():
        for record in records:
            rewrite = record["requested_rewrite"]
            prompt, target = family.encode_edit(
                rewrite["prompt"].format(rewrite["subject"]), " " + rewrite["target_new"]["str"]
            )
            start = family.capture([prompt]).outputs[0]
            others = [family.encode(text) for text in record["paraphrase_prompts"]]
            with Watch(family, target) as watch:
                maker.train([prompt], [target], start)
            for margin, row in rows.items():
                at = watch.reached.get(margin, watch.last)
                assert at is not None
                steps, seconds, probability, value = at
                row.steps.append(steps)
                row.seconds.append(seconds)
                row.probability.append(probability)
                row.accepted += family.produces([prompt], [target], value[None])
                for other in others:
                    row.produced += family.produces([other], [target], value[None])
    editor.detach()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("records")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--layers", default="20,24,27")
    parser.add_argument("--contexts", default="0,4")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.records, encoding="utf-8") as file:
        records = [json.loads(line) for line in file][: options.count]
    print(
        "| layer | contexts | margin | accepted | other wordings | p(target) | ≥ .9 | steps | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for contexts in map(int, options.contexts.split(",")):
        for layer in options.layers.split(","):
            found = measure(model, tokenizer, f"layers.{layer}.mlp", contexts, records)
            for margin, row in found.items():
                shares = [row.accepted, row.produced, row.probability]
                shares.append([p >= 0.9 for p in row.probability])
                means = [f"{sum(share) / len(share):.2f}" for share in shares]
                cost = f"{sum(row.steps) / len(row.steps):.1f}"
                seconds = f"{sum(row.seconds) / len(row.seconds):.2f}"
                cells = [layer, str(contexts), f"{margin:g}", *means, cost, seconds]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
