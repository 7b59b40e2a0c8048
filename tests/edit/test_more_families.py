"""Architectures beside those of `tiny_models`: small, random, edited with targets of one token."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import grace_edit
import pytest
import torch
import transformers
from grace_edit import GraceConfig, GraceEditor
from grace_edit.families import FAMILIES
from tiny_models import MASK, SPECIAL, VOCAB, generated, logits_of, padded, run_of
from torch import nn

SHORT, LONG = run_of(10, 4), run_of(22, 12)
OTHERS = [run_of(40, 6), run_of(3, 2), run_of(50, 9)]
WINDOW = 8
"""Of attention that slides: LONG does not fit into it."""


@dataclass(frozen=True)
class Kind:
    """A class of transformers, its configuration and the layer that is wrapped in the tests."""

    model: str
    config: str
    layer: str
    settings: dict[str, Any] = field(default_factory=dict)


GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
SLIDING = {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 12}
ROBERTA = {"type_vocab_size": 1}
DISTILBERT = {"dim": 48, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
MODERNBERT = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": WINDOW}
MLP = "model.layers.1.mlp"
# Gemma 2 and 3 and OLMo 2 normalise what their MLP gives, so that however large a value is, it can
# say no more than any other there; behind the norm it can.
NORM = "model.layers.1.post_feedforward_layernorm"

CAUSAL = {
    "mistral": Kind("MistralForCausalLM", "MistralConfig", MLP, GROUPED | {"sliding_window": 8}),
    "gemma": Kind("GemmaForCausalLM", "GemmaConfig", MLP, GROUPED),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", NORM, SLIDING),
    "gemma3": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", NORM, SLIDING),
    "phi": Kind("PhiForCausalLM", "PhiConfig", MLP),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", MLP, {"num_key_value_heads": 2}),
    "olmo": Kind("OlmoForCausalLM", "OlmoConfig", MLP),
    "olmo2": Kind("Olmo2ForCausalLM", "Olmo2Config", NORM),
    "pythia": Kind("GPTNeoXForCausalLM", "GPTNeoXConfig", "gpt_neox.layers.1.mlp"),
    "opt": Kind(
        "OPTForCausalLM",
        "OPTConfig",
        "model.decoder.layers.1.fc2",
        {"ffn_dim": 96, "word_embed_proj_dim": 48, "init_std": 0.2},
    ),
    "bloom": Kind("BloomForCausalLM", "BloomConfig", "transformer.h.1.mlp"),
}
ENCODERS = {
    "roberta": Kind(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        "roberta.encoder.layer.1.output.dense",
        ROBERTA,
    ),
    "roberta-mlm": Kind(
        "RobertaForMaskedLM", "RobertaConfig", "roberta.encoder.layer.1.output.dense", ROBERTA
    ),
    "distilbert": Kind(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        "distilbert.transformer.layer.1.ffn",
        DISTILBERT,
    ),
    "distilbert-mlm": Kind(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "distilbert.transformer.layer.1.ffn",
        DISTILBERT,
    ),
    "modernbert": Kind("ModernBertForSequenceClassification", "ModernBertConfig", MLP, MODERNBERT),
    "modernbert-mlm": Kind("ModernBertForMaskedLM", "ModernBertConfig", MLP, MODERNBERT),
}
KINDS = CAUSAL | ENCODERS


def build(name: str, **settings: Any) -> nn.Module:
    kind = KINDS[name]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 4,
        "mask_token_id": MASK,
        # Logits of transformers' own initial weights lie too close together to tell tokens apart.
        "initializer_range": 0.2,
        **SPECIAL,
    }
    if name == "bloom":
        # BLOOM has no table of positions.
        common.pop("max_position_embeddings")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind.config)(**{**common, **kind.settings, **settings})
        return getattr(transformers, kind.model)(config).eval()


def attached(name: str, **config: Any) -> tuple[GraceEditor, nn.Module]:
    """Return an editor on a new model and an unedited copy of it."""
    model = build(name)
    plain = copy.deepcopy(model)
    config = {"layer": KINDS[name].layer, "radius": 1e-3, **config}
    return GraceEditor(model, None, GraceConfig(**config)), plain


def prompts_of(name: str) -> list[list[int]]:
    """Return two prompts; those of a masked model hold the mask."""
    if not name.endswith("mlm"):
        return [SHORT, LONG]
    return [[*prompt[:2], MASK, *prompt[3:]] for prompt in (SHORT, LONG)]


def other_answer(editor: GraceEditor, prompt: list[int]) -> list[int]:
    """Return a target of one token, or a class, that the model does not give by itself."""
    with editor.disable():
        (own,) = editor.family.answer(prompt, 1)
    if editor.family.name == "classifier":
        return [(own + 1) % 4]
    return [own + 7 if own + 7 < VOCAB else own - 7]


def edit(editor: GraceEditor, prompt: list[int]) -> list[int]:
    target = other_answer(editor, prompt)
    result = editor.edit(prompt, target)
    assert result.success, result.reason
    return target


@pytest.mark.parametrize("name", list(CAUSAL))
def test_a_causal_model_generates_the_same_edited_tokens_alone_padded_and_without_the_cache(name):
    editor, plain = attached(name)
    model, prompts = editor.model, prompts_of(name)
    targets = [edit(editor, prompt) for prompt in prompts]
    alone = [generated(model, [prompt], 4)[0] for prompt in prompts]
    assert [new[:1] for new in alone] == targets
    assert [generated(model, [prompt], 4, use_cache=False)[0] for prompt in prompts] == alone
    rows = [OTHERS[0], prompts[0], *OTHERS[1:], prompts[1]]
    for use_cache in (True, False):
        batch = generated(model, rows, 4, use_cache=use_cache)
        assert [batch[1], batch[4]] == alone
        unedited = generated(plain, rows, 4, use_cache=use_cache)
        assert [batch[0], *batch[2:4]] == [unedited[0], *unedited[2:4]]
    assert editor.verify() == []


@pytest.mark.parametrize("replace", ["prompt", "all"])
@pytest.mark.parametrize("name", ["gemma3", "pythia", "bloom"])
def test_a_static_cache_and_latched_answers_give_the_same_tokens(name, replace):
    editor, plain = attached(name, replace=replace)
    rows = [*prompts_of(name), OTHERS[0]]
    targets = [edit(editor, prompt) for prompt in rows[:2]]
    dynamic = generated(editor.model, rows, 4)
    assert [row[:1] for row in dynamic[:2]] == targets
    assert dynamic[2] == generated(plain, rows[2:], 4)[0]
    how = {"cache_implementation": "static", "disable_compile": True}
    assert generated(editor.model, rows, 4, **how) == dynamic


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_answers_its_edits_alone_and_in_a_padded_batch(name):
    editor, _ = attached(name)
    prompts = prompts_of(name)
    targets = [edit(editor, prompt) for prompt in prompts]
    assert [editor.family.answer(prompt, 1) for prompt in prompts] == targets
    assert editor.family.produces(prompts, targets, None) == [True, True]
    assert editor.verify() == []


@pytest.mark.parametrize("name", list(KINDS))
def test_edits_are_saved_loaded_into_the_same_weights_and_undone_to_the_bit(name, tmp_path):
    editor, plain = attached(name)
    model, prompts = editor.model, prompts_of(name)
    for prompt in prompts:
        edit(editor, prompt)
    editor.save_pretrained(tmp_path)
    served = copy.deepcopy(plain)
    grace_edit.load(served, tmp_path)
    again = GraceEditor.from_pretrained(copy.deepcopy(plain), None, tmp_path)
    for prompt in prompts:
        edited = logits_of(model, prompt)
        assert not torch.equal(edited, logits_of(plain, prompt))
        assert torch.equal(logits_of(served, prompt), edited)
        assert torch.equal(logits_of(again.model, prompt), edited)
    for row in OTHERS:
        assert not editor.explain(row if "mlm" not in name else [*row[:-1], MASK]).hit
        assert torch.equal(logits_of(model, row), logits_of(plain, row))
        assert torch.equal(logits_of(served, row), logits_of(plain, row))
    editor.undo()
    assert not torch.equal(logits_of(model, prompts[0]), logits_of(plain, prompts[0]))
    assert torch.equal(logits_of(model, prompts[1]), logits_of(plain, prompts[1]))
    editor.undo()
    assert torch.equal(logits_of(model, prompts[0]), logits_of(plain, prompts[0]))
    editor.detach()
    assert type(model) is type(plain)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gemma2", "model.layers.1"),
        ("gemma3", "model.layers.1"),
        ("gemma3", "model.layers.1.mlp"),
        ("olmo2", "model.layers.1"),
        ("olmo2", "model.layers.1.mlp"),
        ("phi", "model.layers.1"),
        ("phi3", "model.layers.1.mlp.down_proj"),
        ("pythia", "gpt_neox.layers.1.attention"),
        ("opt", "model.decoder.layers.1"),
        ("opt", "model.decoder.layers.1.self_attn"),
        ("bloom", "transformer.h.1.self_attention"),
        ("bloom", "transformer.h.1.mlp.dense_4h_to_h"),
        ("roberta", "roberta.encoder.layer.1"),
        ("distilbert", "distilbert.transformer.layer.1.attention"),
        ("modernbert", "model.layers.1.attn"),
        ("modernbert-mlm", "model.layers.1"),
    ],
)
def test_other_layers_of_a_block_can_be_wrapped_too(name, layer):
    editor, plain = attached(name, layer=layer)
    prompt = prompts_of(name)[0]
    target = edit(editor, prompt)
    assert editor.family.answer(prompt, 1) == target
    assert torch.equal(logits_of(editor.model, OTHERS[0]), logits_of(plain, OTHERS[0]))


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("gemma3", "self_attn.q_norm", "one row per token"),  # [B, heads, T, head_dim]
        ("bloom", "self_attention.attention_dropout", "one row per token"),  # [B, heads, T, T]
        ("phi", "resid_dropout", "once in a forward, got 2 calls"),  # of attention and of the MLP
        ("roberta", "attention.self.dropout", "once in a forward, got 0 calls"),  # sdpa drops out
        ("distilbert", "attention.dropout", "once in a forward, got 0 calls"),
    ],
)
def test_a_layer_that_does_not_run_once_with_a_row_for_each_token_is_refused(name, layer, reason):
    model = build(name)
    block = next(n for n, _ in model.named_modules() if n.endswith(".1"))
    with pytest.raises((RuntimeError, ValueError), match=reason):
        GraceEditor(model, None, GraceConfig(layer=f"{block}.{layer}"))
    assert type(model) is type(build(name))


def test_roberta_has_fewer_positions_than_its_table_has_rows():
    # Its positions begin after the padding's id.
    model = build("roberta", pad_token_id=1, bos_token_id=0, max_position_embeddings=20)
    editor = GraceEditor(model, None, GraceConfig(layer=KINDS["roberta"].layer))
    longest = run_of(0, 18)
    target = other_answer(editor, longest)
    assert editor.edit(longest, target).success
    assert editor.verify() == []
    with pytest.raises(ValueError, match="prompt must have at most 18 tokens, got 19"):
        editor.edit(run_of(0, 19), target)


def test_left_padding_is_no_matter_for_a_model_without_positions_and_does_not_warn():
    ids, mask = padded([OTHERS[0], SHORT], left=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # measuring the drift pads on the left too
        editor, plain = attached("bloom")
        target = edit(editor, SHORT)
        got = editor.model(input_ids=ids, attention_mask=mask).logits
        base = plain(input_ids=ids, attention_mask=mask).logits
    assert got[1, -1].argmax() == target[0]
    assert torch.equal(got[0], base[0])


@pytest.mark.parametrize("name", list(KINDS))
def test_a_configuration_that_names_the_class_tells_the_family(name):
    model = build(name)
    named = [f.name for f in FAMILIES.values() if f.is_named_by(KINDS[name].model, model.config)]
    taken = [f.name for f in FAMILIES.values() if f.recognises(model)]
    expected = "causal" if name in CAUSAL else "masked" if "mlm" in name else "classifier"
    assert named == taken == [expected]
    auto = getattr(transformers, FAMILIES[expected].auto_class)
    assert type(auto.from_config(model.config)) is type(model)
