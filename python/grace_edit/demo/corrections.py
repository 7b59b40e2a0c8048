"""Part 2: a real language model says wrong things, and edits correct them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import GraceConfig
from ..editor import GraceEditor
from .data import read_table
from .smollm2 import LAYER

CONFIG = GraceConfig(layer=LAYER, query="text")
LENGTH = 10
"""Tokens of an answer."""
BATCH = 32
WORDINGS = ("cloze", "question", "chat")
"""Other ways to ask for a corrected answer: to be continued, asked, asked in the chat template."""
NEAR = ("neighbour", "same subject")
"""What an edit must leave alone: the same question about another subject, another question."""
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Asked:
    """A prompt of the data.

    Args:
        fact: number of the error it belongs to, from 1.
        role: `"edit"`, or one of `WORDINGS` or `NEAR`.
        text: as written; what a chat asks is put into the template by `prompts_of`.
        answer: the right one of its fact.
    """

    fact: int
    role: str
    text: str
    answer: str


def load_corrections(most: int | None = None) -> list[Asked]:
    """Read the errors of SmolLM2 and what is asked around them.

    The wordings were written before any of them was tried, and none was changed afterwards.

    Args:
        most: the first so many errors alone.
    """
    rows = read_table("corrections.tsv")
    answers = {row["fact"]: row["answer"] for row in rows if row["role"] == "edit"}
    found = [Asked(int(r["fact"]), r["role"], r["prompt"], answers[r["fact"]]) for r in rows]
    return [asked for asked in found if most is None or asked.fact <= most]


def prompts_of(tokenizer: Any, asked: Sequence[Asked]) -> list[str]:
    """Return the prompts as the model gets them."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one.text}], tokenize=False, add_generation_prompt=True
        )
        if one.role == "chat"
        else one.text
        for one in asked
    ]


def ask(model: Any, tokenizer: Any, asked: Sequence[Asked]) -> list[str]:
    """Answer prompts, those of a role in batches of their own, which have much the same length."""
    prompts = prompts_of(tokenizer, asked)
    answers = [""] * len(asked)
    for role in dict.fromkeys(one.role for one in asked):
        places = [i for i, one in enumerate(asked) if one.role == role]
        found = generate(model, tokenizer, [prompts[i] for i in places])
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
    return answers


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Answer prompts by free greedy generation with the KV cache, in left-padded batches."""
    answers: list[str] = []
    for i in range(0, len(prompts), BATCH):
        batch = tokenizer(
            list(prompts[i : i + BATCH]),
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        produced = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=LENGTH,
            do_sample=False,
        )
        new = produced[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def is_right(answer: str, wanted: str) -> bool:
    """Say whether an answer names what was asked for."""
    return wanted in " ".join(answer.split())


def run(
    asked: Sequence[Asked], model: Any, tokenizer: Any, progress: Progress
) -> tuple[GraceEditor, dict[str, Any]]:
    """Correct the errors by edits, ask everything before and after.

    Returns:
        The editor, still attached, and the figures: counts, and a row for every prompt.
    """
    prompts = prompts_of(tokenizer, asked)
    before = ask(model, tokenizer, asked)
    editor = GraceEditor(model, tokenizer, CONFIG)
    edits = {one.fact: one for one in asked if one.role == "edit"}
    start = time.perf_counter()
    results = {}
    for one in progress(list(edits.values()), "correcting errors"):
        results[one.fact] = editor.edit(one.text, f" {one.answer}")
    seconds = time.perf_counter() - start
    after = ask(model, tokenizer, asked)
    fact_of = {result.id: fact for fact, result in results.items() if result.success}
    rows = []
    for one, prompt, old, new in zip(asked, prompts, before, after, strict=True):
        why = editor.explain(prompt)
        rows.append(
            {
                "fact": one.fact,
                "role": one.role,
                "prompt": one.text,
                "wanted": one.answer,
                "before": old,
                "after": new,
                "right_before": is_right(old, one.answer),
                "right_after": is_right(new, one.answer),
                "unchanged": old == new,
                "fired": why.hit,
                "own_edit": why.hit and fact_of.get(why.edit_id) == one.fact,
                "distance": why.distance,
                "radius": why.radius,
            }
        )
    return editor, {
        "errors": len(edits),
        "accepted": len(fact_of),
        "refused": {edits[f].text: r.reason for f, r in results.items() if not r.success},
        "steps": sum(result.steps for result in results.values()),
        "seconds_per_edit": seconds / len(edits),
        "keys": editor.codebook.entries,
        "counts": {role: counts(rows, role) for role in ("edit", *WORDINGS, *NEAR)},
        "rows": rows,
    }


def counts(rows: Sequence[dict[str, Any]], role: str) -> dict[str, int]:
    """Return how many prompts of a role there are, and of how many each thing is true."""
    mine = [row for row in rows if row["role"] == role]
    true = Counter(name for row in mine for name, value in row.items() if value is True)
    names = ("right_before", "right_after", "unchanged", "fired", "own_edit")
    return {"prompts": len(mine), **{name: true[name] for name in names}}


def undo_all(editor: GraceEditor, rows: Sequence[dict[str, Any]]) -> int:
    """Undo every edit; return how many of the edited prompts are answered as before the first."""
    for _ in range(sum(edit.live for edit in editor.codebook.history)):
        editor.undo()
    edited = [row for row in rows if row["role"] == "edit"]
    now = generate(editor.model, editor.tokenizer, [row["prompt"] for row in edited])
    return sum(answer == row["before"] for answer, row in zip(now, edited, strict=True))
