"""Small models of every family, trained for seconds on successor sequences (t, t+1, t+2, …).

A random model cannot take a target of several tokens: one replaced row does not make it follow
itself. One that has learned to count takes any run of successors, as a language model takes text.
Tokens 0..3 are special (pad, bos, eos, mask), 4..63 are words, counted round and round.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def build(name: str) -> nn.Module:
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


def train(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(STEPS[name]):
            loss = model(**_batch(name)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return model.eval()


def trained_once(once: Callable[..., Path]) -> Callable[[str], Any]:
    """Return a function that gives a fresh copy of a trained model by name.

    Args:
        once: the fixture: each is trained by one process of a run, for all folders of tests.
    """
    models: dict[str, nn.Module] = {}

    def copy_of(name: str) -> nn.Module:
        if name not in models:
            path = once(f"{name}.pt", lambda path: torch.save(train(name).state_dict(), path))
            with torch.random.fork_rng(devices=[]):
                models[name] = build(name).eval()
            models[name].load_state_dict(torch.load(path))
        return copy.deepcopy(models[name])

    return copy_of


class CountGrace(TorchDispatchMode):
    """Count calls of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("grace"):
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask` of rows padded on one side."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    for b, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[b, span] = torch.tensor(row)
    return ids, (ids != PAD).long()


def generated(model: Any, rows: Sequence[Sequence[int]], length: int, **kwargs: Any) -> list[Any]:
    """Return the new tokens of a greedy `generate` over rows padded on the left."""
    ids, mask = padded(rows, left=True)
    kwargs.setdefault("do_sample", False)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=length, **kwargs)
    return out[:, ids.shape[1] :].tolist()


@torch.no_grad()
def logits_of(model: Any, row: Sequence[int], **kwargs: Any) -> Tensor:
    """Return the logits of one prompt run alone."""
    return model(input_ids=torch.tensor([list(row)]), **kwargs).logits[0]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that an editor must leave as it was."""
    return {
        name: {
            "class": type(module),
            "dict": {
                k: v for k, v in module.__dict__.items() if not isinstance(v, (dict, nn.Module))
            },
            "keys": list(module.__dict__),
            "hooks": {
                k: list(v.items())
                for k, v in module.__dict__.items()
                if "hooks" in k and isinstance(v, dict)
            },
            "parameters": {
                k: (id(p), p.detach().clone(), p.requires_grad, p.grad)
                for k, p in module._parameters.items()
                if p is not None
            },
            "buffers": {k: b.clone() for k, b in module._buffers.items() if b is not None},
            "generate": getattr(module, "generate", None),
        }
        for name, module in model.named_modules()
    }


def same(a: Any, b: Any) -> bool:
    """Say whether two states are equal, tensors to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def book_of(codebook: Any) -> dict[str, Any]:
    """Return a codebook's whole state but what other memory holds."""
    n = codebook.entries
    count = int(codebook.count)
    return {
        "keys": codebook.keys.clone(),
        "values": codebook.values.clone(),
        "radii": codebook.radii.clone(),
        "count": count,
        "entries": n,
        "history": list(codebook.history),
        "ids": list(codebook.ids),
        "members": [codebook.members(slot) for slot in range(count)],
        "queries": [codebook.query_of(edit.id) for edit in codebook.history],
    }


def decisions_of(results: Sequence[Any]) -> list[Any]:
    """Return results of edits without what the last bits of a forward move."""
    moved: dict[str, Any] = {"loss_start": None, "loss_end": None, "steps": 0, "probability": None}
    return [replace(result, **moved) for result in results]


def but_values(codebook: Any) -> dict[str, Any]:
    """Return a codebook's whole state but values and what their training said."""
    state = book_of(codebook)
    state["history"] = [replace(e, result=decisions_of([e.result])[0]) for e in state["history"]]
    del state["values"]
    return state


@contextmanager
def watching(model: nn.Module) -> Iterator[list[int]]:
    """Count, per forward of the model, how many grace operators ran in it."""
    counts: list[int] = []
    with CountGrace() as mode:
        before = [0]

        def start(*_: Any) -> None:
            before[0] = mode.calls.total()

        def end(*_: Any) -> None:
            counts.append(mode.calls.total() - before[0])

        handles = [model.register_forward_pre_hook(start), model.register_forward_hook(end)]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()
