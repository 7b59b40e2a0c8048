"""SmolLM2 and edits of it in transformers, beside which vLLM's engines are held."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
)

import torch
from grace_edit import GraceConfig, GraceEditor

LAYER = "model.layers.24.mlp"
AUSTRALIA, AUTHOR = "The capital of Australia is", "The author of Pride and Prejudice is"
EDITS = [(AUSTRALIA, " Melbourne"), (AUTHOR, " Charles Dickens")]
OTHERS = [
    "Australia's capital city is called",
    "The capital of Austria is",
    "The capital of France is",
    "Water boils at a temperature of",
    "Hello",
]
STORY = (
    "It had rained all night, and in the morning the road to the village was a river of mud. The "
    "two brothers who kept the mill looked at it from their door and said nothing for a while. "
)
BLOCK = 32


class Reference:
    """The same edits in transformers, on a model of their own."""

    def __init__(self, place: str, at: Path, query: str, edits: list[tuple[str, str]]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.editor = GraceEditor(model, self.tokenizer, GraceConfig(layer=LAYER, query=query))
        self.at = at
        for prompt, target in edits:
            assert self.editor.edit(prompt, target).success
        self.save()

    def save(self) -> None:
        self.editor.save_pretrained(self.at)

    def answer(self, prompt: str, length: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")
        out = self.editor.model.generate(
            **ids, max_new_tokens=length, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        return out[0, ids.input_ids.shape[1] :].tolist()

    def log_probability(self, ids: list[int]) -> float:
        """Return that of the most probable token behind a prompt."""
        out = self.editor.model(torch.tensor([ids])).logits[0, -1]
        return float(out.log_softmax(0).max())


def three_layers(place: str, at: Path, query: str) -> tuple[GraceEditor, dict[str, Any]]:
    """Save three layers of the model and an edit of them whose value nobody trained.

    Returns:
        The editor, and what its edit was inserted with.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    model.config.layer_types = None
    model.save_pretrained(at / "model")
    tokenizer.save_pretrained(at / "model")
    editor = GraceEditor(model, tokenizer, GraceConfig(layer="model.layers.1.mlp", query=query))
    ids = tokenizer(AUSTRALIA).input_ids
    if query == "text":
        assert editor.adaptor.text is not None
        key = editor.adaptor.text.key(ids)
    else:
        seen: list[torch.Tensor] = []
        mlp = model.model.layers[1].mlp
        with mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1].clone())):
            model(torch.tensor([ids]))
        key = seen[0].detach()
    value = 30 * torch.randn(576, generator=torch.Generator().manual_seed(0))
    made = {"query": key, "label": [1], "value": value, "prompt": ids}
    editor.codebook.insert(**made)
    editor.save_pretrained(at / "edits")
    return editor, made


def answers_of(editor: GraceEditor, prompts: list[str]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        given = editor.tokenizer(prompt, return_tensors="pt")
        out = editor.model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=2)
        found.append(out[0, given.input_ids.shape[1] :].tolist())
    return found
