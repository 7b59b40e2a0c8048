"""Attaching and detaching: names, classes, wrappers, copies, unusual layers."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import grace_edit
import pytest
import torch
import transformers
from grace_edit import GraceConfig, GraceEditor
from grace_edit.adaptor.attach import find_layer, shadowed
from tiny_models import CAUSAL, LAYERS, generated, logits_of, run_of, same, state_of
from torch import nn

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER = run_of(40, 6)


class Wrapper(nn.Module):
    """A model inside a model, as PEFT nests them."""

    def __init__(self, inner, name):
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.1.mlp",
        "transformer.h[1].mlp",
        "h.1.mlp",
        "h[1].mlp",
        "transformer.h.1.mlp.weight",
        "h.1.mlp.bias",
        "base_model.model.transformer.h.1.mlp",
        "_orig_mod.transformer.h[1].mlp.weight",
        "module.h.1.mlp",
    ],
)
def test_a_layer_is_found_by_every_spelling_of_its_name(trained, name):
    model = trained("gpt2")
    assert find_layer(model, name) == ("transformer.h.1.mlp", model.transformer.h[1].mlp)


@pytest.mark.parametrize("prefix", [("model", "base_model"), ("_orig_mod",), ("module",)])
def test_a_layer_is_found_behind_the_prefixes_of_wrappers(trained, prefix):
    inner = trained("gpt2")
    model = functools.reduce(Wrapper, prefix, inner)
    found, module = find_layer(model, "transformer.h.1.mlp")
    assert found == ".".join([*reversed(prefix), "transformer.h.1.mlp"])
    assert module is inner.transformer.h[1].mlp
    assert find_layer(model, "transformer.h.0")[1] is inner.transformer.h[0]


def test_an_unknown_name_lists_the_near_ones(trained):
    with pytest.raises(ValueError, match=r"layer must name one module.*h\.1\.mpl.*h\.1\.mlp"):
        find_layer(trained("gpt2"), "transformer.h.1.mpl")


def test_an_ambiguous_name_lists_what_it_could_mean(trained):
    with pytest.raises(ValueError, match=r"'mlp', which is ambiguous.*transformer\.h\.0\.mlp"):
        find_layer(trained("gpt2"), "mlp")


@pytest.mark.parametrize("name", list(LAYERS))
def test_attaching_and_detaching_leaves_every_module_as_it_was(trained, name):
    model = trained(name).train()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    before = state_of(model)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS[name]))
    assert not same(state_of(model), before)
    editor.detach()
    assert same(state_of(model), before)
    editor.detach()
    assert same(state_of(model), before)


def test_an_attached_model_keeps_its_types_names_and_weights(trained):
    model, plain = trained("t5"), trained("t5")
    GraceEditor(model, None, GraceConfig(layer=LAYERS["t5"]))
    layer = model.get_submodule(LAYERS["t5"])
    assert isinstance(layer, nn.Linear)
    assert isinstance(model, type(plain))
    assert type(model).__name__ == type(plain).__name__
    assert torch.equal(layer.weight, plain.get_submodule(LAYERS["t5"]).weight)
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


def test_a_second_attach_is_refused_and_leaves_the_first_working(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    for layer in (LAYERS["gpt2"], "transformer.h.0.mlp"):
        with pytest.raises(ValueError, match="must not carry an adaptor already"):
            GraceEditor(editor.model, None, GraceConfig(layer=layer))
    assert generated(editor.model, [PROMPT], 3) == [TARGET]
    editor.detach()
    second = GraceEditor(editor.model, None, GraceConfig(layer="transformer.h.0.mlp"))
    assert second.edit(PROMPT, TARGET).success


def test_an_editor_that_was_detached_says_so(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    editor.detach()
    assert not editor.status()["attached"]
    assert editor.codebook.entries == 1
    with pytest.raises(ValueError, match="must be attached to its model"):
        editor.edit(PROMPT, TARGET)


@pytest.mark.parametrize(
    "layer", ["transformer", "transformer.wte", "transformer.h.7.mlp", "lm_head"]
)
def test_an_attach_that_fails_leaves_the_model_as_it_was(trained, layer):
    model = trained("gpt2")
    before = state_of(model)
    with pytest.raises(ValueError, match="layer"):
        GraceEditor(model, None, GraceConfig(layer=layer))
    assert same(state_of(model), before)


@pytest.mark.parametrize("kind", ["BertModel", "BertForTokenClassification"])
def test_a_model_of_another_kind_is_refused_by_name(trained, kind):
    model = getattr(transformers, kind)(trained("bert").config)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"model must be a causal.*got {kind}"):
        GraceEditor(model, None, GraceConfig(layer="encoder.layer.1.output.dense"))
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    "layer",
    [
        "transformer.h.1",
        "transformer.h.1.attn",
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.1.mlp.act",
        "transformer.h.1.ln_2",
        "transformer.ln_f",
    ],
)
def test_blocks_attention_with_tuples_projections_and_norms_can_be_wrapped(trained, layer):
    editor = GraceEditor(trained("gpt2"), None, GraceConfig(layer=layer))
    # One token: a norm's or an activation's output says less about what follows.
    result = editor.edit(PROMPT, TARGET[:1])
    assert result.success, result.reason
    assert generated(editor.model, [PROMPT, OTHER], 1) == [TARGET[:1], run_of(46, 1)]
    plain = trained("gpt2")
    assert torch.equal(logits_of(editor.model, OTHER), logits_of(plain, OTHER))


@pytest.mark.parametrize("kind", ["dropout", "identity"])
def test_a_layer_that_hands_its_input_on_does_not_have_it_overwritten(trained, kind):
    model = trained("llama")
    block = model.model.layers[1]

    class Then(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm
            self.handed = nn.Dropout(0.1) if kind == "dropout" else nn.Identity()

        def forward(self, hidden_states):
            normed = self.norm(hidden_states)
            kept = normed.clone()
            out = self.handed(normed)
            self.changed = not torch.equal(kept, normed)
            return out

    block.post_attention_layernorm = Then(block.post_attention_layernorm)
    model.eval()
    layer = "model.layers.1.post_attention_layernorm.handed"
    editor = GraceEditor(model, None, GraceConfig(layer=layer))
    assert editor.edit(PROMPT, TARGET[:1]).success
    assert logits_of(model, PROMPT)[-1].argmax() == TARGET[0]
    assert not block.post_attention_layernorm.changed


def test_a_forward_set_on_the_instance_is_wrapped_and_given_back(trained):
    model = trained("gpt2")
    layer = model.get_submodule(LAYERS["gpt2"])
    calls = []

    def through(module):
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args, **kwargs):
            calls.append(type(module).__name__)
            return inner(*args, **kwargs)

        module.forward = forward
        return forward

    on_layer, on_model = through(layer), through(model)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert editor.edit(PROMPT, TARGET).success
    calls.clear()
    assert generated(model, [PROMPT], 3) == [TARGET]
    assert len(calls) == 6
    assert logits_of(model, PROMPT)[-1].argmax() == TARGET[0]
    assert editor.status()["shadowed"] == []
    editor.detach()
    assert layer.__dict__["forward"] is on_layer
    assert model.__dict__["forward"] is on_model
    assert logits_of(model, PROMPT)[-1].argmax() == run_of(14, 1)[0]


def test_a_forward_that_is_set_later_is_reported_and_generate_warns_if_it_leaves_the_edits_out(
    edited,
):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    layer = editor.model.get_submodule(editor.layer)
    own = nn.Module.__getattribute__(layer, "grace_base").forward
    layer.forward = lambda *args: own(layer, *args)
    assert editor.status()["shadowed"] == [editor.layer]
    assert shadowed(editor.model) == [editor.layer]
    with pytest.warns(UserWarning, match=r"not edited: the forward of \['transformer.h.1.mlp'\]"):
        assert generated(editor.model, [PROMPT], 3) == [run_of(14, 3)]
    del layer.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(editor.model, [PROMPT], 3) == [TARGET]


def test_a_forward_that_is_set_later_and_calls_the_one_before_goes_on_working_after_detach(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    model = editor.model
    for module in (model, model.get_submodule(editor.layer)):
        before = module.forward
        module.forward = lambda *args, before=before, **kwargs: before(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generated(model, [PROMPT], 3) == [TARGET]
    editor.detach()
    assert generated(model, [PROMPT], 3) == [run_of(14, 3)]
    assert logits_of(model, PROMPT)[-1].argmax() == run_of(14, 1)[0]
    again = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert again.edit(PROMPT, TARGET).success
    assert generated(model, [PROMPT], 3) == [TARGET]


@pytest.mark.parametrize("how", ["config", "from_pretrained"])
def test_a_model_made_from_the_class_of_an_attached_one_is_plain(edited, trained, how, tmp_path):
    editor, plain = edited("gpt2"), trained("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    kind = type(editor.model)
    if how == "config":
        made = kind(plain.config).eval()
        made.load_state_dict(plain.state_dict())
    else:
        plain.save_pretrained(tmp_path)
        made = kind.from_pretrained(tmp_path)
    assert torch.equal(logits_of(made, PROMPT), logits_of(plain, PROMPT))
    assert generated(made.double().float(), [PROMPT], 3) == [run_of(14, 3)]
    grace_edit.detach(made)
    second = GraceEditor(made, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert second.edit(PROMPT, TARGET).success
    assert generated(made, [PROMPT], 3) == [TARGET]
    second.detach()
    assert type(made) is type(plain)


def test_a_layer_made_from_the_class_of_a_wrapped_one_is_plain(edited):
    layer = edited("bert").model.get_submodule(LAYERS["bert"])
    made = type(layer)(4, 4).to(torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_hooks_of_the_wrapped_layer_go_on_working(trained):
    model = trained("gpt2")
    layer = model.get_submodule(LAYERS["gpt2"])
    seen = []
    layer.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert editor.edit(PROMPT, TARGET).success
    seen.clear()
    logits_of(model, PROMPT)
    assert torch.equal(seen[0][0, -1], editor.codebook.values[0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_copy_of_an_attached_model_serves_the_edits_on_its_own(edited, name, how):
    editor = edited(name)
    target = TARGET if name == "gpt2" else [*TARGET, 2]
    assert editor.edit(PROMPT, target).success
    model = editor.model

    def ask(m):
        out = m.generate(torch.tensor([PROMPT]), max_new_tokens=len(target), do_sample=False)
        return out[0, -len(target) :].tolist()

    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert ask(twin) == target
    assert twin.__dict__.get("grace", twin.get_submodule(editor.layer).grace) is not editor.adaptor
    editor.undo()
    assert ask(model) != target
    assert ask(twin) == target
    grace_edit.detach(twin)
    assert ask(twin) == ask(model)
    assert not any(hasattr(m, "grace") for m in twin.modules())


@pytest.mark.parametrize("name", list(LAYERS))
def test_save_pretrained_of_an_attached_model_is_that_of_the_plain_one(trained, name, tmp_path):
    model, plain = trained(name), trained(name)
    GraceEditor(model, None, GraceConfig(layer=LAYERS[name]))
    model.save_pretrained(tmp_path / "attached")
    plain.save_pretrained(tmp_path / "plain")
    loaded = type(plain).from_pretrained(tmp_path / "attached")
    assert type(loaded) is type(plain)
    assert loaded.config.architectures == [type(plain).__name__]
    assert same(dict(loaded.state_dict()), dict(plain.state_dict()))
    attached, reference = (
        (tmp_path / kind / "config.json").read_text() for kind in ("attached", "plain")
    )
    assert attached == reference


def test_the_state_dict_holds_no_codebook_and_loads_into_either(edited, trained):
    editor, plain = edited("gpt2"), trained("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    assert editor.model.state_dict().keys() == plain.state_dict().keys()
    editor.model.load_state_dict(plain.state_dict())
    plain.load_state_dict(editor.model.state_dict())
    assert generated(editor.model, [PROMPT], 3) == [TARGET]


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "to"])
def test_casting_the_model_never_casts_the_codebook(edited, move):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    book = editor.codebook
    before = [book.keys.clone(), book.values.clone(), book.radii.clone()]
    model = editor.model.to(torch.bfloat16) if move == "to" else getattr(editor.model, move)()
    assert next(model.parameters()).dtype != torch.float32
    assert same([book.keys, book.values, book.radii], before)
    model.float()


def test_a_move_of_the_model_takes_the_codebook_along(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    editor.model.to("meta")
    book = editor.codebook
    assert {t.device.type for t in (book.keys, book.values, book.radii, book.count)} == {"meta"}


@pytest.mark.parametrize("name", CAUSAL[:2])
def test_a_model_that_was_compiled_before_is_edited_through_its_wrapper(trained, name):
    torch._dynamo.reset()
    inner = trained(name)
    model = torch.compile(inner, backend="eager")
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS[name]))
    assert editor.layer == LAYERS[name]
    assert editor.edit(PROMPT, TARGET).success
    with torch.no_grad():
        assert model(torch.tensor([PROMPT])).logits[0, -1].argmax() == TARGET[0]
    assert generated(model, [PROMPT], 3) == [TARGET]
    editor.detach()
    with torch.no_grad():
        assert model(torch.tensor([PROMPT])).logits[0, -1].argmax() == run_of(14, 1)[0]
    torch._dynamo.reset()


def test_a_model_inside_a_peft_like_wrapper_is_edited_and_generates(trained):
    class Peft(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base_model = Wrapper(inner, "model")
            self.config = inner.config

        def get_base_model(self):
            return self.base_model.model

        def forward(self, *args, **kwargs):
            return self.base_model.model(*args, **kwargs)

        def generate(self, *args, **kwargs):
            return self.base_model.model.generate(*args, **kwargs)

    model = Peft(trained("llama"))
    name = "base_model.model." + LAYERS["llama"]
    editor = GraceEditor(model, None, GraceConfig(layer=name))
    assert editor.edit(PROMPT, TARGET).success
    assert editor.codebook.drift < 1e-4
    assert generated(model, [OTHER, PROMPT], 3)[1] == TARGET
    editor.detach()
    assert generated(model, [PROMPT], 3) == [run_of(14, 3)]
