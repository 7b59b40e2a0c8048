"""Caches, adapters, quantised and offloaded weights: the tokens are those of one by one, uncached.

Here is what others set round or into a model. The rest of "Where edits are right" (docs) is tested
beside what it concerns.
"""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, load
from grace_edit.adaptor.fingerprint import fingerprint
from tiny_models import LAYERS, generated, padded, run_of
from torch import nn

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
ROWS = [run_of(40, 6), PROMPT, run_of(22, 9), run_of(7, 1), run_of(3, 2)]
DOWN = "model.layers.1.mlp.down_proj"


def one_by_one(model: Any, rows: Any = ROWS, length: int = 5) -> list[Any]:
    return [generated(model, [row], length, use_cache=False)[0] for row in rows]


def serves(editor: GraceEditor, model: Any = None) -> bool:
    """Say whether a model gives the edited answer, and the rest as one by one, in a batch too."""
    model = editor.model if model is None else model
    batch = generated(model, ROWS, 5)
    with editor.disable():
        unedited = one_by_one(model)
    assert unedited[1][:3] != TARGET
    assert batch == one_by_one(model)
    assert [*batch[:1], *batch[2:]] == [*unedited[:1], *unedited[2:]]
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].argmax()
    return batch[1][:3] == TARGET and plain == TARGET[0]


BACKENDS = {
    "fp8": {},
    "quanto": {"nbits": 4, "q_group_size": 4, "residual_length": 4},
    "hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 4, "residual_length": 4},
}
NEEDS = {"fp8": "torch", "quanto": "optimum", "hqq": "hqq"}


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("replace", ["last", "all"])
def test_a_quantised_cache_gives_the_same_tokens(edited, backend, replace):
    if importlib.util.find_spec(NEEDS[backend]) is None:
        pytest.skip(f"{NEEDS[backend]} is not installed")
    editor = edited("llama", replace=replace)
    assert editor.edit(PROMPT, TARGET).success
    how = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": backend, **BACKENDS[backend]},
    }
    with editor.disable():
        assert generated(editor.model, ROWS, 6, **how) == one_by_one(editor.model, length=6)
    expected = one_by_one(editor.model, length=6)
    assert expected[1][:3] == TARGET
    assert generated(editor.model, ROWS, 6, **how) == expected
    assert generated(editor.model, ROWS, 3, num_beams=3, **how)[1] == TARGET


@pytest.mark.parametrize("query", ["last", "mean"])
def test_batches_of_one_to_eight_give_the_tokens_of_one_by_one(edited, query):
    editor = edited("llama", query=query)
    assert editor.edit(PROMPT, TARGET).success
    rows = [*ROWS, run_of(50, 3), PROMPT, run_of(33, 5)]
    expected = one_by_one(editor.model, rows, 4)
    assert expected[1][:3] == expected[6][:3] == TARGET
    for size in range(1, 9):
        assert generated(editor.model, rows[8 - size :], 4) == expected[8 - size :]
        ids, mask = padded(rows[:size], left=False)
        with torch.no_grad():
            logits = editor.model(input_ids=ids, attention_mask=mask).logits
        ends = logits[torch.arange(size), mask.sum(1) - 1].argmax(-1)
        assert ends.tolist() == [row[0] for row in expected[:size]]


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_weights_that_accelerate_keeps_elsewhere_give_the_same_tokens(edited, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, editor = edited("llama"), edited("llama")
    if how == "device_map":
        parts = {"model": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(editor.model, device_map=parts, force_hooks=True)
    elif how == "cpu_offload":
        accelerate.cpu_offload(editor.model, execution_device="cpu")
    else:
        accelerate.disk_offload(editor.model, tmp_path, execution_device="cpu")
    for each in (plain, editor):
        assert each.edit(PROMPT, TARGET).success
    assert torch.equal(editor.codebook.values, plain.codebook.values)
    assert serves(editor)
    assert generated(editor.model, ROWS, 5) == generated(plain.model, ROWS, 5)


class Added(nn.Module):
    """Adds to what a layer gives, as a LoRA does, and can be taken off again."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.more = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@pytest.mark.parametrize("asked_first", ["generate", "forward"])
def test_what_is_put_round_the_layer_and_taken_off_again_is_followed(edited, asked_first):
    editor = edited("llama", layer=DOWN, radius=0.05)
    model = editor.model
    assert editor.edit(PROMPT, TARGET).success
    own = model.get_submodule(DOWN)
    put(model, DOWN, Added(own))
    if asked_first == "generate":
        assert generated(model, [PROMPT], 3) == [TARGET]
    assert serves(editor)
    # The answer is the value alone, and nothing that is added to it.
    seen = []
    handle = model.get_submodule(DOWN).register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPT]))
    handle.remove()
    assert torch.equal(seen[0][0, -1], editor.codebook.values[0])
    assert type(own) is nn.Linear
    assert editor.verify() == []
    assert editor.edit(run_of(41, 3), TARGET).success

    put(model, DOWN, own)
    assert serves(editor)
    editor.detach()
    assert type(own) is nn.Linear
    assert generated(model, [PROMPT], 3) == [run_of(14, 3)]


def test_a_copy_of_the_layer_that_comes_in_its_place_serves_the_edits_as_they_are_now(edited):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    layer = editor.model.get_submodule(LAYERS["llama"])
    put(editor.model, LAYERS["llama"], nn.Sequential(copy.deepcopy(layer)))
    assert serves(editor)
    editor.undo()
    assert generated(editor.model, [PROMPT], 3) == [run_of(14, 3)]


def test_a_wrapper_that_adds_nothing_is_left_as_it_is(edited):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, x):
            return self.module(x)

    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    wrapper = Wrapper(editor.model.get_submodule(LAYERS["llama"]))
    put(editor.model, LAYERS["llama"], wrapper)
    assert serves(editor)
    assert type(wrapper) is Wrapper


def lora(model: Any, layers: list[str]) -> Any:
    """Put a LoRA that moves what the model says into layers of a model."""
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM", init_lora_weights=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        made = peft.get_peft_model(model, how)
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    return made


ON_LORA = pytest.mark.parametrize("layer", [LAYERS["llama"], DOWN])
TARGETS = ["q_proj", "gate_proj", "down_proj"]


@ON_LORA
def test_edits_of_a_model_with_a_lora_are_saved_loaded_and_merged(trained, layer, tmp_path):
    peft = pytest.importorskip("peft")
    model = lora(trained("llama"), TARGETS)
    editor = GraceEditor(model, None, GraceConfig(layer=layer, radius=0.05))
    assert editor.layer == layer
    assert editor.edit(PROMPT, TARGET).success
    assert serves(editor)
    assert serves(editor, editor.family.model)
    editor.save_pretrained(tmp_path / "edits")
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(trained("llama"), tmp_path / "lora")
    load(again, tmp_path / "edits")
    assert generated(again, ROWS, 5) == generated(model, ROWS, 5)
    with pytest.raises(ValueError, match="edits of another model"):
        load(trained("llama"), tmp_path / "edits")

    merged = model.merge_and_unload()
    assert merged is editor.family.model
    assert serves(editor, merged)
    assert editor.verify() == []
    editor.detach()
    assert not any("Grace" in type(module).__name__ for module in merged.modules())


@ON_LORA
def test_a_lora_that_comes_after_the_edits_is_edited_and_merged_too(edited, layer):
    editor = edited("llama", layer=layer, radius=0.05)
    assert editor.edit(PROMPT, TARGET).success
    model = lora(editor.model, TARGETS)
    # It moves what the layer takes, so keys are made anew.
    editor.rekey()
    assert serves(editor, model)
    assert editor.edit(run_of(41, 3), TARGET).success
    with model.disable_adapter():
        assert generated(model, [run_of(50, 3)], 3) == [run_of(53, 3)]
    merged = model.merge_and_unload()
    assert serves(editor, merged)
    lora(merged, TARGETS).unload()
    editor.rekey()
    assert serves(editor)


class Quantised(ABC):
    """A mixin as quantisers have it: without a layout of nn.Module's."""

    @abstractmethod
    def forward(self, x):
        """Multiply."""


class Int8(Quantised, nn.Linear):
    """Numbers in int8 and a scale for each row, as bitsandbytes and quanto hold them."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8:
        made = cls(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach() / scale).round().to(torch.int8)
        made.weight = nn.Parameter(numbers, requires_grad=False)
        made.register_buffer("scale", scale)
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale)


def quantised(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            put(model, name, Int8.of(module))
    return model


@pytest.mark.parametrize("layer", [LAYERS["llama"], DOWN])
def test_a_model_with_int8_weights_is_edited_saved_and_loaded(trained, layer, tmp_path):
    editor = GraceEditor(quantised(trained("llama")), None, GraceConfig(layer=layer, radius=0.05))
    assert editor.edit(PROMPT, TARGET).success
    assert serves(editor)
    editor.save_pretrained(tmp_path)
    again = quantised(trained("llama"))
    load(again, tmp_path)
    assert generated(again, ROWS, 5) == generated(editor.model, ROWS, 5)
    with pytest.raises(ValueError, match="edits of another model"):
        load(trained("llama"), tmp_path)
    editor.detach()
    assert type(editor.model.get_submodule(DOWN)) is Int8


class Parts(torch.Tensor):
    """A weight made of other tensors that answers no operator, as torchao's answer few."""

    @staticmethod
    def __new__(cls, numbers, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)
        made.numbers, made.scale = numbers, scale
        return made

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Parts(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{func} of {cls.__name__}")


def test_a_weight_made_of_other_tensors_has_the_fingerprint_of_all_of_them():
    def of(numbers, scale):
        model = nn.Module()
        parts = Parts(torch.tensor(numbers, dtype=torch.int8), torch.tensor(scale))
        model.weight = nn.Parameter(parts, requires_grad=False)
        return fingerprint(model, "layer")

    same = of([1, 2], [0.5])
    assert of([1, 2], [0.5]) == same
    assert of([1, 3], [0.5]) != same
    assert of([1, 2], [0.25]) != same


def test_a_model_that_gives_no_gradient_is_refused_with_the_reason(trained):
    class Stops(nn.Module):
        def forward(self, x):
            return x.detach()

    model = trained("llama")
    model.model.norm = nn.Sequential(model.model.norm, Stops())
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["llama"]))
    with pytest.raises(ValueError, match="must let gradients pass"):
        editor.edit(PROMPT, TARGET)
    assert editor.codebook.entries == 0
