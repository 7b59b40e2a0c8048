"""Facts in several wordings, and a small causal language model that learns some on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .data import read_table

RELATIONS = ("capital", "symbol", "author", "currency")
WORDINGS = (1, 2, 3)
EPOCHS = 16
BATCH = 16
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
