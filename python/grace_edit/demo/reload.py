"""Part 3: load a saved model and its edits in a fresh process; the answers must be the same.

python -m grace_edit.demo.reload DIRECTORY topics|facts
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from .. import serving
from ..adaptor.adaptor import GraceAdaptor
from . import facts, topics

THREADS = 1
"""Of the demo, here and there: more would change the order of the model's additions."""


@torch.no_grad()
def answers_of(
    model: Any, adaptor: GraceAdaptor, tokenizer: Any, prompts: list[str]
) -> dict[str, Any]:
    """Return what an attached model answers, and a hash of the lookups' index and distance bits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt")
        with adaptor.using(captures=[]):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            query = adaptor.captures[0].queries
        index, distance = adaptor.codebook.lookup(query)
        digest.update(index.numpy().tobytes() + distance.numpy().tobytes())
    ask = topics.predict if isinstance(model, topics.MiniLMForSequenceClassification) else None
    answers = ask(model, tokenizer, prompts) if ask else facts.generate(model, tokenizer, prompts)
    return {"prompts": prompts, "answers": answers, "lookups": digest.hexdigest()}


def main(directory: Path, part: str) -> int:
    """Compare with what the demo wrote; 0 if everything is the same."""
    torch.set_num_threads(THREADS)
    kind = topics.MiniLMForSequenceClassification if part == "topics" else GPT2LMHeadModel
    model = kind.from_pretrained(directory / f"{part}-model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / f"{part}-model")
    adaptor = serving.load(model, directory / f"{part}-edits")
    saved = json.loads((directory / f"{part}-answers.json").read_text(encoding="utf-8"))
    now = answers_of(model, adaptor, tokenizer, saved["prompts"])
    same = sum(a == b for a, b in zip(now["answers"], saved["answers"], strict=True))
    bits = "the same bits" if now["lookups"] == saved["lookups"] else "OTHER BITS"
    print(f"{same}/{len(saved['answers'])} answers the same, lookups: {bits}")
    return int(now != saved)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
