"""Small models of every family, trained for seconds on successor sequences (t, t+1, t+2, …).

A random model cannot take a target of several tokens: one replaced row does not make it follow
itself. One that has learned to count takes any run of successors, as a language model takes text.
Tokens 0..3 are special (pad, bos, eos, mask), 4..63 are words, counted round and round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace_edit import GraceConfig, GraceEditor

PAD, BOS, EOS, MASK = 0, 1, 2, 3
FIRST, VOCAB = 4, 64
WORDS = VOCAB - FIRST

SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LAYERS = {
    "gpt2": "transformer.h.1.mlp",
    "llama": "model.layers.1.mlp",
    "qwen2": "model.layers.1.mlp",
    "t5": "encoder.block.1.layer.1.DenseReluDense.wo",
    "bert": "bert.encoder.layer.1.output.dense",
    "bert-mlm": "bert.encoder.layer.1",
}
CAUSAL = ("gpt2", "llama", "qwen2")


def run_of(start: int, length: int) -> list[int]:
    """Return `length` successors from word number `start`."""
    return [FIRST + (start + i) % WORDS for i in range(length)]


def _build(name: str) -> nn.Module:
    import transformers as tf

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **SPECIAL,
    }
    if name == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=64, **SPECIAL
            )
        )
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **common))
    if name == "qwen2":
        return tf.Qwen2ForCausalLM(tf.Qwen2Config(num_key_value_heads=2, **common))
    if name == "t5":
        return tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCAB,
                d_model=48,
                d_ff=96,
                d_kv=12,
                num_layers=2,
                num_heads=4,
                pad_token_id=PAD,
                eos_token_id=EOS,
                decoder_start_token_id=PAD,
            )
        )
    bert = tf.BertConfig(type_vocab_size=1, num_labels=4, **{**common, "mask_token_id": MASK})
    if name == "bert":
        return tf.BertForSequenceClassification(bert)
    return tf.BertForMaskedLM(bert)


def _batch(name: str) -> dict[str, Tensor]:
    """Make one training batch: 32 runs of random length, padded on the right."""
    longest = 12
    starts = torch.randint(WORDS, (32, 1))
    words = FIRST + (starts + torch.arange(longest)) % WORDS
    length = torch.randint(3, longest + 1, (32, 1))
    mask = (torch.arange(longest) < length).long()
    ids = words * mask
    if name in CAUSAL:
        return {"input_ids": words, "labels": words}
    if name == "t5":
        after = FIRST + (starts + length + torch.arange(4)) % WORDS
        labels = torch.cat([after, torch.full((32, 1), EOS)], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if name == "bert":
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": (starts[:, 0] * 4) // WORDS,
        }
    where = torch.rand(ids.shape) < 0.3
    where[:, 1] = True
    where = where & (mask > 0)
    labels = torch.where(where, words, -100)
    return {"input_ids": ids.masked_fill(where, MASK), "attention_mask": mask, "labels": labels}


STEPS = {"gpt2": 200, "llama": 140, "qwen2": 140, "t5": 230, "bert": 50, "bert-mlm": 40}


def _train(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(STEPS[name]):
            loss = model(**_batch(name)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return model.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run models this small on one thread: more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Any]:
    """Return a function that gives a fresh copy of a trained model by name."""
    models: dict[str, nn.Module] = {}

    def copy_of(name: str) -> nn.Module:
        if name not in models:
            models[name] = _train(name)
        return copy.deepcopy(models[name])

    return copy_of


@pytest.fixture
def edited(trained: Callable[[str], Any]) -> Callable[..., GraceEditor]:
    """Return a function that attaches an editor to a fresh copy of a model."""

    def make(name: str, **config: Any) -> GraceEditor:
        config.setdefault("layer", LAYERS[name])
        return GraceEditor(trained(name), None, GraceConfig(**config))

    return make
