"""Queries need nothing above the wrapped layer: their forwards end there, with the same bits."""

from __future__ import annotations

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.families import base
from grace_edit.families.base import in_pieces
from text_models import QUESTION, TARGET, text_editor
from tiny_models import CAUSAL, LAYERS, MASK, generated, run_of, same, state_of
from torch import nn

ROWS = [run_of(10, 5), run_of(40, 8), run_of(22, 3), run_of(3, 6)]
ABOVE = {
    "gpt2": "transformer.h.2",
    "llama": "model.layers.2",
    "qwen2": "model.layers.2",
    "t5": "encoder.final_layer_norm",
    "bert": "bert.encoder.layer.2",
    "bert-mlm": "bert.encoder.layer.2",
}


def rows_of(name):
    return [[*row[:1], MASK, *row[2:]] for row in ROWS] if name == "bert-mlm" else ROWS


def counted(module, calls):
    return module.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_nothing_above_the_layer_runs_and_the_queries_have_the_bits_of_a_whole_forward(
    edited, monkeypatch, name, query
):
    editor, rows = edited(name, query=query), rows_of(name)
    calls = []
    counted(editor.model.get_submodule(ABOVE[name]), calls)
    sides = [False, True] if name in CAUSAL else [False]
    found = [editor.family.capture(rows, left=left) for left in sides]
    found += [editor.family.capture([row]) for row in rows]
    asked = editor.queries(rows)
    assert not calls
    monkeypatch.setattr(base, "can_stop", lambda *_: False)
    whole = [editor.family.capture(rows, left=left) for left in sides]
    whole += [editor.family.capture([row]) for row in rows]
    assert len(calls) == len(whole)
    for a, b in zip(found, whole, strict=True):
        assert torch.equal(a.queries, b.queries)
        assert torch.equal(a.outputs, b.outputs)
    assert torch.equal(asked, whole[0].queries)


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_forward_that_ends_early_leaves_the_model_and_the_adaptor_as_they_were(edited, name):
    editor, rows = edited(name), rows_of(name)
    before, given = state_of(editor.model), {"input_ids": torch.tensor(rows[:1])}
    if name == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 20]])
    thread = dict(vars(editor.adaptor.thread))
    with torch.no_grad():
        first = editor.model(**given).logits
        editor.queries(rows)
        assert torch.equal(editor.model(**given).logits, first)
    assert same(state_of(editor.model), before)
    assert vars(editor.adaptor.thread) == thread
    assert torch.is_grad_enabled()


def test_an_error_in_a_forward_that_would_end_early_is_raised(edited):
    editor = edited("gpt2")

    def fail(*_):
        raise RuntimeError("below the layer")

    editor.model.transformer.h[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="below the layer"):
        editor.queries(ROWS)
    assert editor.adaptor.captures is None
    assert not editor.adaptor.stops


def test_edits_explanations_verifications_and_new_keys_run_no_logits_for_their_queries(edited):
    editor, logits = edited("gpt2", radius=0.05), []
    assert editor.edit(ROWS[0], run_of(30, 2)).success
    counted(editor.model.lm_head, logits)
    assert editor.explain(ROWS[0]).hit
    assert editor.verify() == []
    assert logits == []
    editor.rekey()
    assert len(logits) == 2  # of the proof that the value still produces two tokens


def test_under_a_text_query_nothing_runs_for_it_and_the_layer_for_the_first_value(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    below, above = [], []
    counted(editor.model.transformer.h[0], below)
    counted(editor.model.transformer.h[2], above)
    editor.queries([QUESTION])
    editor.explain(QUESTION)
    assert (below, above) == ([], [])
    editor.family.capture([editor.family.encode(QUESTION)])
    assert (len(below), above) == (1, [])
    assert editor.edit(QUESTION, TARGET).success


@pytest.mark.parametrize("where", ["", "transformer.h.1", LAYERS["gpt2"]])
def test_whoever_waits_for_the_end_of_a_forward_sees_it(edited, where):
    editor = edited("gpt2")
    begun, ended = [], []
    module = editor.model.get_submodule(where)
    before = module.register_forward_pre_hook(lambda *_: begun.append(1))
    editor.queries(ROWS)
    assert begun  # alone it waits for nothing
    counted(module, ended)
    begun.clear()
    editor.queries(ROWS)
    assert len(begun) == len(ended) == 1
    before.remove()
    ended.clear()
    editor.queries(ROWS)
    assert not ended


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("layer", ["transformer.h.1.mlp", "transformer.h.1.mlp.c_proj"])
def test_weights_that_accelerate_lends_to_a_layer_are_taken_back(trained, layer, order):
    accelerate = pytest.importorskip("accelerate")
    model, plain = trained("gpt2"), trained("gpt2")
    if order == "before":
        accelerate.cpu_offload(model, execution_device="cpu")
    editor = GraceEditor(model, None, GraceConfig(layer=layer))
    if order == "after":
        accelerate.cpu_offload(model, execution_device="cpu")
    own = GraceEditor(plain, None, GraceConfig(layer=layer))
    assert torch.equal(editor.queries(ROWS), own.queries(ROWS))
    lent = [p for p in model.parameters() if p.device.type != "meta"]
    assert lent == []
    assert generated(model, ROWS, 3) == generated(plain, ROWS, 3)


@pytest.mark.parametrize("taken_away", [False, True])
def test_hooks_of_accelerate_that_lend_nothing_let_a_forward_end(trained, taken_away):
    accelerate = pytest.importorskip("accelerate")
    model = trained("gpt2")
    device_map = {"transformer": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, device_map=device_map, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    if taken_away:
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert "forward" in model.__dict__
    editor, calls = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"])), []
    counted(model.transformer.h[2], calls)
    editor.queries(ROWS)
    assert not calls


class Twice(nn.Module):
    """Runs a module a second time once it is told to."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x))


def test_a_layer_that_runs_twice_is_refused_as_the_first_forward_is_a_whole_one(trained):
    model = trained("gpt2")
    model.transformer.h[1].mlp = Twice(model.transformer.h[1].mlp)
    with pytest.raises(ValueError, match="run once in a forward, got 2 calls"):
        GraceEditor(model, None, GraceConfig(layer="transformer.h.1.mlp.inner"))


def test_batches_hold_so_many_tokens_and_so_many_prompts_and_a_longer_prompt_goes_alone(
    monkeypatch,
):
    monkeypatch.setattr(base, "MOST_TOKENS", 20)
    monkeypatch.setattr(base, "MOST_ROWS", 3)
    assert in_pieces([]) == []
    lengths = [5, 5, 5, 5, 10, 10, 30, 2, 2, 11]
    pieces = [lengths[piece] for piece in in_pieces(lengths)]
    assert pieces == [[5, 5, 5], [5, 10], [10], [30], [2, 2], [11]]


def test_queries_and_verification_stay_within_the_tokens_of_a_forward(edited, monkeypatch):
    editor, seen = edited("gpt2", radius=0.05), []
    for start in (0, 20, 40):
        assert editor.edit(run_of(start, 6), [40]).success
    monkeypatch.setattr(base, "MOST_TOKENS", 13)
    editor.model.transformer.wte.register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    together = editor.queries([run_of(0, 6), run_of(20, 6), run_of(40, 6)])
    assert seen == [12, 6]
    assert together.shape == (3, 48)
    seen.clear()
    assert editor.verify() == []
    assert [n for n in seen if n != 6] == [12, 42, 28]  # together, and beside a longer prompt
