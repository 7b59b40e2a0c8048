"""Small models on disk, and a way to run the command line as a person would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_edit.cli import app
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
TEXT = """
the capital of france is germany italy spain austria poland norway sweden paris berlin rome madrid
vienna warsaw oslo stockholm who wrote it where river long good bad film a an this that was very not
"""
WORDS = TEXT.split()


def word_tokenizer(*, closes: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; `closes` puts [CLS] and [SEP] round a text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if closes:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[EOS]",
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make models of this size ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its processes how wide its own terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of two blocks and its tokenizer."""
    torch.manual_seed(0)
    size = len(SPECIAL) + len(WORDS)
    config = GPT2Config(
        vocab_size=size,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=4,
        eos_token_id=4,
        pad_token_id=0,
        initializer_range=0.2,
    )
    where = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(where)
    word_tokenizer(closes=False).save_pretrained(where)
    return where


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random BERT that tells three classes apart, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.2,
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
    )
    where = tmp_path_factory.mktemp("models") / "bert"
    BertForSequenceClassification(config).save_pretrained(where)
    word_tokenizer(closes=True).save_pretrained(where)
    return where


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random BERT that fills in [MASK], and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(closes=True)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.2,
    )
    where = tmp_path_factory.mktemp("models") / "masked"
    BertForMaskedLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def grace() -> Callable[..., Any]:
    """`grace("codebook", directory, ...)`: exit code, stdout and stderr, apart."""

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def edits_file(tmp_path: Path) -> Callable[..., Path]:
    """Write pairs of prompt and target as a file of edits."""

    def write(*pairs: tuple[str, Any]) -> Path:
        path = tmp_path / "edits.jsonl"
        lines = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in pairs]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
