"""Small trained models with a tokenizer of one token per word.

The models count (see tests/edit/tiny_models.py): "w4 w5 w6" goes on "w7 w8". An edit makes one go
on otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "edit"))

from grace_edit.evaluation import AskedModel
from tiny_models import FIRST, VOCAB, trained_once
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CLOSES = ("t5",)


def word_tokenizer(*, closes: bool) -> PreTrainedTokenizerFast:
    """One token per word; `closes` puts the end token behind a text, as T5's does."""
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3}
    vocabulary |= {f"w{i}": i for i in range(FIRST, VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closes:
        made.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run models this small on one thread: more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(once: Callable[..., Path]) -> Callable[[str], tuple[Any, Any]]:
    """Return a function that gives a fresh copy of a trained model and its tokenizer by name."""
    trained = trained_once(once)
    return lambda name: (trained(name), word_tokenizer(closes=name in CLOSES))


@pytest.fixture
def asked(pair: Callable[[str], tuple[Any, Any]]) -> Callable[[str], AskedModel]:
    """Return a function that gives a fresh model, ready to be asked, by name."""
    return lambda name: AskedModel(*pair(name))
