"""Part 3: load a saved model and its edits in a fresh process; the answers must be the same.

python -m grace_edit.demo.reload DIRECTORY topics|corrections
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..editor import GraceEditor
from . import corrections, topics


def answers_of(editor: GraceEditor, prompts: list[str]) -> dict[str, Any]:
    """Return what an edited model answers, and a hash of which entry is nearest and how near."""
    answers: Callable[..., list[str]]
    if isinstance(editor.model, topics.MiniLMForSequenceClassification):
        answers = topics.predict
        found = [
            (n["hit"], n["slot"], n["distance"]) for n in topics.nearest_entries(editor, prompts)
        ]
    else:
        answers = corrections.generate
        found = [(why.hit, why.slot, why.distance) for why in map(editor.explain, prompts)]
    digest = hashlib.sha256(b"".join(struct.pack("<?qd", *one) for one in found))
    return {
        "prompts": prompts,
        "answers": answers(editor.model, editor.tokenizer, prompts),
        "lookups": digest.hexdigest(),
        # More threads would change the order of the model's additions.
        "threads": torch.get_num_threads(),
    }


def main(directory: Path, part: str) -> int:
    """Compare with what the demo wrote; 0 if everything is the same."""
    saved = json.loads((directory / f"{part}-answers.json").read_text(encoding="utf-8"))
    torch.set_num_threads(saved["threads"])
    kind = topics.MiniLMForSequenceClassification if part == "topics" else AutoModelForCausalLM
    model = kind.from_pretrained(directory / f"{part}-model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / f"{part}-model")
    editor = GraceEditor.from_pretrained(model, tokenizer, directory / f"{part}-edits")
    now = answers_of(editor, saved["prompts"])
    same = sum(a == b for a, b in zip(now["answers"], saved["answers"], strict=True))
    bits = "the same bits" if now["lookups"] == saved["lookups"] else "OTHER BITS"
    print(f"{same}/{len(saved['answers'])} answers the same, lookups: {bits}")
    return int(now != saved)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
