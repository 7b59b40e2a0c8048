"""Part 2: a small causal language model learns facts on the spot, and edits change some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ..config import GraceConfig
from ..editor import GraceEditor
from .data import read_table

RELATIONS = ("capital", "symbol", "author", "currency")
WORDINGS = (1, 2, 3)
LAYER = "transformer.h.0.mlp"
REPLACE = "all"
"""One vector at the prompt's tokens alone could not make this small model say every name of several
words: up to 5 of 43 edits were refused, by how its training turned out."""
RADIUS = 2.5
EPOCHS = 16
BATCH = 16
CHANGED = 8
"""Every eighth fact is changed."""
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Fact:
    """A fact and its wordings: prompts that end right before the answer."""

    relation: str
    subject: str
    answer: str
    prompts: tuple[str, ...]


def load_facts() -> list[Fact]:
    """Read the bundled facts of the demo's relations with their wordings."""
    templates = {
        (row["relation"], int(row["wording"])): row["template"]
        for row in read_table("relations.tsv")
    }
    return [
        Fact(
            row["relation"],
            row["subject"],
            row["answer"],
            tuple(templates[row["relation"], w].format(subject=row["subject"]) for w in WORDINGS),
        )
        for row in read_table("facts.tsv")
        if row["relation"] in RELATIONS
    ]


def build_tokenizer(facts: Sequence[Fact]) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of the facts' words; spaces belong to the word they precede."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.WordLevelTrainer(
        special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False
    )
    words.train_from_iterator(
        (f"{prompt} {fact.answer}" for fact in facts for prompt in fact.prompts), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(
    facts: Sequence[Fact], tokenizer: Any, progress: Progress, epochs: int = EPOCHS
) -> GPT2LMHeadModel:
    """Train a small GPT-2 on every wording of every fact (seeded, about a minute on two cores)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=96,
            n_layer=3,
            n_head=4,
            # Larger, untied embeddings learn the facts in a quarter of the epochs.
            initializer_range=0.08,
            tie_word_embeddings=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = GPT2LMHeadModel(config)
        _train(model, _sequences(facts, tokenizer), progress, epochs)
    return model.eval()


def _sequences(facts: Sequence[Fact], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Return `(token ids, length of the prompt)`; every answer ends with end-of-sequence."""
    found = []
    for fact in facts:
        answer = tokenizer(" " + fact.answer).input_ids + [tokenizer.eos_token_id]
        for prompt in fact.prompts:
            ids = tokenizer(prompt).input_ids
            found.append((ids + answer, len(ids)))
    return found


def _train(
    model: GPT2LMHeadModel,
    sequences: list[tuple[list[int], int]],
    progress: Progress,
    epochs: int,
) -> None:
    # Sequences of a length go together: nothing is padded, nothing computed in vain.
    by_length: dict[tuple[int, int], list[list[int]]] = {}
    for ids, prompt in sequences:
        by_length.setdefault((len(ids), prompt), []).append(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    steps = epochs * sum(-(-len(rows) // BATCH) for rows in by_length.values())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    model.train()
    for _ in progress(range(epochs), "training a small language model on facts"):
        batches: list[tuple[Tensor, int]] = []
        for (_, prompt), rows in by_length.items():
            table = torch.tensor(rows)[torch.randperm(len(rows))]
            batches += [(piece, prompt) for piece in table.split(BATCH)]
        for number in torch.randperm(len(batches)).tolist():
            ids, prompt = batches[number]
            hidden = model.transformer(input_ids=ids[:, :-1]).last_hidden_state[:, prompt - 1 :]
            logits = model.lm_head(hidden)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, prompt:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Answer prompts by free greedy generation with the KV cache, in left-padded batches."""
    answers: list[str] = []
    for i in range(0, len(prompts), 64):
        batch = tokenizer(list(prompts[i : i + 64]), padding=True, return_tensors="pt")
        produced = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
        )
        new = produced[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def changes(facts: Sequence[Fact]) -> list[tuple[Fact, str]]:
    """Return the facts to change, each with a new answer: that of another of its relation."""
    chosen = list(facts)[::CHANGED]
    changed = []
    for relation in RELATIONS:
        mine = [fact for fact in chosen if fact.relation == relation]
        others = [f.answer for f in facts if f.relation == relation]
        for number, fact in enumerate(mine):
            options = [a for a in others[CHANGED * number + 3 :] + others if a != fact.answer]
            changed.append((fact, options[0]))
    return changed


def run(
    facts: Sequence[Fact], model: GPT2LMHeadModel, tokenizer: Any, radius: float, progress: Progress
) -> tuple[GraceEditor, dict[str, Any]]:
    """Change facts by edits and compare every answer with the one before."""
    firsts = [fact.prompts[0] for fact in facts]
    before = generate(model, tokenizer, firsts)
    known = sum(b == fact.answer for b, fact in zip(before, facts, strict=True))
    changed = changes(facts)
    others = [p for f in facts for p in f.prompts[1:]]
    before_others = dict(zip(others, generate(model, tokenizer, others), strict=True))
    editor = GraceEditor(model, tokenizer, GraceConfig(layer=LAYER, radius=radius, replace=REPLACE))
    start = time.perf_counter()
    results = []
    eos = tokenizer.eos_token
    for fact, answer in progress(changed, "changing facts"):
        # With end-of-sequence, so that generation stops after the new answer as it does elsewhere.
        results.append(editor.edit(fact.prompts[0], f" {answer}{eos}"))
    seconds = time.perf_counter() - start
    after = dict(zip(firsts, generate(model, tokenizer, firsts), strict=True))
    wanted = {fact.prompts[0]: answer for fact, answer in changed}
    untouched = [fact for fact in facts if fact.prompts[0] not in wanted]
    was = dict(zip(firsts, before, strict=True))
    paraphrases = [(p, answer) for fact, answer in changed for p in fact.prompts[1:]]
    takes = generate(model, tokenizer, [p for p, _ in paraphrases])
    far = [p for fact in untouched for p in fact.prompts[1:]]
    after_far = generate(model, tokenizer, far)
    figures = {
        "facts": len(facts),
        "known_before": known,
        "radius": radius,
        "attempted": len(changed),
        "accepted": sum(r.success for r in results),
        "answered_after": sum(after[p] == a for p, a in wanted.items()),
        "paraphrases": len(paraphrases),
        "paraphrases_take": sum(t == a for t, (_, a) in zip(takes, paraphrases, strict=True)),
        "untouched": len(untouched),
        "unchanged": sum(after[f.prompts[0]] == was[f.prompts[0]] for f in untouched),
        "untouched_paraphrases": len(far),
        "unchanged_paraphrases": sum(
            a == before_others[p] for a, p in zip(after_far, far, strict=True)
        ),
        "keys": editor.codebook.entries,
        "seconds_per_edit": seconds / len(changed),
        "examples": [
            {
                "prompt": fact.prompts[0],
                "before": was[fact.prompts[0]],
                "asked for": answer,
                "after": after[fact.prompts[0]],
            }
            for fact, answer in changed[:: max(1, len(changed) // 8)]
        ],
    }
    return editor, figures
