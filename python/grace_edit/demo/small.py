"""A small language model that knows a few sentences: made in a second, for a first try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GPT2LMHeadModel

from .facts import Fact, build_model, build_tokenizer

EPOCHS = 40


def small_gpt2(sentences: Mapping[str, str]) -> tuple[GPT2LMHeadModel, Any]:
    """Train a GPT-2 of three layers to continue each prompt as told; return it and its tokenizer.

    Args:
        sentences: a continuation for each prompt. Their words, split at spaces, are all that the
            tokenizer knows: a target of an edit has to be among them.
    """
    facts = [Fact("", "", answer, (prompt,)) for prompt, answer in sentences.items()]
    tokenizer = build_tokenizer(facts)
    return build_model(facts, tokenizer, lambda epochs, what: epochs, EPOCHS), tokenizer
