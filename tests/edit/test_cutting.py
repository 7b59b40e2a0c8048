"""The cut forward: the bits of a whole one, without what lies below the layer."""

from __future__ import annotations

import threading

import pytest
import test_more_families as more
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.adaptor.torch_private import is_compiled
from grace_edit.editing import lessons
from grace_edit.editing.cutting import CutForward
from tiny_models import CAUSAL, EOS, LAYERS, MASK, logits_of, run_of, same, state_of
from torch import nn

PROMPTS = [run_of(10, 4), run_of(40, 7)]


def ids_of(editor):
    """Return two prompts and their targets as a family takes them."""
    name = editor.family.name
    if name == "masked":
        return [[*p[:1], MASK, *p[2:]] for p in PROMPTS], [[20], [31]]
    return PROMPTS, [[2], [0]] if name == "classifier" else [run_of(30, 3), [*run_of(5, 1), EOS]]


def values_of(editor, count):
    source = torch.Generator().manual_seed(3)
    width = editor.family.capture(ids_of(editor)[0][:1]).outputs.shape[1]
    return [torch.randn(width, generator=source).requires_grad_(True) for _ in range(count)]


def logits_and_slopes(editor, cut, values):
    prompts, targets = ids_of(editor)
    found = []
    for value in values:

        def forward(family, value=value):
            return family.target_logits(prompts, targets, value.expand(2, -1))[0]

        logits = forward(editor.family) if cut is None else cut.run(forward)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 5 % 4].sum(), [value])
        found += [logits.detach(), slope]
    return found


def counted(module):
    """Count the forwards of a module's first part that holds weights."""
    calls = []
    leaf = next(m for m in module.modules() if list(m.parameters(recurse=False)))
    leaf.register_forward_hook(lambda *_: calls.append(1))
    return calls


def first_block(editor):
    """Return the first of the blocks that the wrapped layer is in one of."""
    way = editor.layer.split(".")
    number = next(i for i, part in enumerate(way) if part.isdigit())
    return editor.model.get_submodule(".".join([*way[:number], "0"]))


@pytest.fixture
def any_editor(edited):
    def make(name):
        return more.attached(name)[0] if name in more.KINDS else edited(name)

    return make


@pytest.mark.parametrize("name", [*LAYERS, *more.KINDS])
def test_logits_and_slopes_have_the_bits_of_whole_forwards_and_the_blocks_below_run_once(
    any_editor, name
):
    editor = any_editor(name)
    with editor.family.working():
        values = values_of(editor, 4)
        whole = logits_and_slopes(editor, None, values)
        before = state_of(editor.model)
        below = counted(first_block(editor))
        for runs in (2, 3):  # the first time a whole one is compared with
            with CutForward(editor.family) as cut:
                got = logits_and_slopes(editor, cut, values)
            assert len(below) == runs
            assert editor.family.cuts is True
            assert all(map(torch.equal, got, whole))
    assert not torch.equal(whole[0], whole[2])
    for name, module in editor.model.named_modules():
        assert list(module.__dict__) == before[name]["keys"]


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert-mlm"])
def test_an_edit_stores_the_bits_that_whole_forwards_lead_to(edited, name):
    books = []
    for cuts in (True, False):
        editor = edited(name)
        editor.family.cuts = cuts
        prompts, targets = ids_of(editor)
        result = editor.edit(prompts[0], targets[0])
        assert result.success
        books.append((editor.codebook.values[0].clone(), result))
    assert torch.equal(books[0][0], books[1][0])
    assert books[0][1] == books[1][1]


def test_a_model_that_gives_other_bits_each_time_runs_whole(edited):
    editor = edited("gpt2")
    block = first_block(editor)
    calls = []

    def drift(module, args, output):
        calls.append(1)
        return output + 1e-3 * len(calls)

    block.mlp.register_forward_hook(drift)
    editor.family.model.transformer.h[2].register_forward_hook(drift)
    with editor.family.working(), CutForward(editor.family) as cut:
        logits_and_slopes(editor, cut, values_of(editor, 3))
    assert editor.family.cuts is False
    below = counted(block)
    with editor.family.working(), CutForward(editor.family) as cut:
        logits_and_slopes(editor, cut, values_of(editor, 3))
    assert len(below) == 3 + 1  # one told the layer's width


def test_the_model_is_left_as_it_was_when_training_breaks_off(edited):
    editor = edited("gpt2")
    before = state_of(editor.model)

    def breaks_off():
        with CutForward(editor.family) as cut:
            logits_and_slopes(editor, cut, values_of(editor, 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        breaks_off()
    assert same(state_of(editor.model), before)


def test_two_threads_cut_at_the_same_time_and_the_model_is_not_touched(edited):
    editor = edited("gpt2")
    values = values_of(editor, 2)
    whole = logits_and_slopes(editor, None, values)
    before = state_of(editor.model)
    got = []

    def meanwhile():
        with CutForward(editor.family) as mine:
            got.extend(logits_and_slopes(editor, mine, values))

    with CutForward(editor.family) as cut:
        logits_and_slopes(editor, cut, values)
        assert same(state_of(editor.model), before)
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()
        got += logits_and_slopes(editor, cut, values)
    assert all(map(torch.equal, got, whole * 2))
    assert same(state_of(editor.model), before)


@pytest.mark.parametrize("inside", [False, True])
def test_other_forwards_are_whole_meanwhile(edited, inside):
    editor = edited("gpt2")
    other = run_of(20, 4)
    plain = logits_of(editor.model, other)
    values = values_of(editor, 2)
    seen = []

    def ask():
        with torch.no_grad():
            seen.append(editor.model(input_ids=torch.tensor([other])).logits[0])

    def ask_in_a_thread():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    def once(*_):
        handle.remove()
        ask_in_a_thread()

    with CutForward(editor.family) as cut:
        logits_and_slopes(editor, cut, values)
        if inside:
            # Just before the cut forward is given the first thing that was kept.
            handle = editor.model.transformer.wte.register_forward_pre_hook(once)
            logits_and_slopes(editor, cut, values[:1])
        else:
            ask()
            ask_in_a_thread()
    assert seen
    assert all(torch.equal(logits, plain) for logits in seen)


def test_a_forward_that_sets_out_otherwise_runs_on_by_itself(edited):
    # A module called out of its turn: from there on nothing of what was kept is used.
    editor = edited("gpt2")
    value = values_of(editor, 1)
    whole = logits_and_slopes(editor, None, value)
    with CutForward(editor.family) as cut:
        logits_and_slopes(editor, cut, value)

        def detour(family):
            family.model.transformer.h[1].ln_1(torch.zeros(1, 1, 48))
            prompts, targets = ids_of(editor)
            return family.target_logits(prompts, targets, value[0].expand(2, -1))[0]

        assert torch.equal(cut.run(detour), whole[0])


def test_what_was_compiled_is_not_cut(edited):
    editor = edited("gpt2")
    assert not is_compiled(editor.model)
    editor.model.transformer.h[2].compile()
    assert is_compiled(editor.model)
    given = []

    def forward(family):
        given.append(family)
        return torch.zeros(1)

    with CutForward(editor.family) as cut:
        cut.run(forward)
        cut.run(forward)
    assert given == [editor.family] * 2

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(nn.Linear(2, 2))

    assert is_compiled(Holder())
    linear = nn.Linear(2, 2)
    assert not is_compiled(linear)
    linear.forward = torch.compile(linear.forward)
    assert is_compiled(linear)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_output_projection_is_given_the_tokens_of_the_targets_alone(edited, name):
    editor = edited(name)
    prompts, targets = ids_of(editor)
    (value,) = values_of(editor, 1)
    rows = []
    head = editor.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[:-1]))
    logits, _ = editor.family.target_logits(prompts, targets, value.expand(2, -1))
    assert rows == [torch.Size([sum(map(len, targets))])]
    handle.remove()
    # All rows, picked afterwards: the same up to rounding.
    batch = editor.family.inputs([[*p, *y] for p, y in zip(prompts, targets, strict=True)])
    lengths = torch.tensor([len(p) for p in prompts])
    with editor.family.teaching(value.expand(2, -1), batch, prompts, lengths):
        whole = editor.model(**batch).logits
    picked = [
        whole[b, len(p) - 1 + i] for b, p in enumerate(prompts) for i in range(len(targets[b]))
    ]
    assert (logits - torch.stack(picked)).abs().max() < 1e-4
    assert logits_of(editor.model, prompts[0]).ndim == 2  # other forwards give them all


def test_an_attached_editor_tries_again_on_a_model_it_is_attached_to_anew(trained):
    editor = GraceEditor(trained("gpt2"), None, GraceConfig(layer=LAYERS["gpt2"]))
    editor.family.cuts = False
    adaptor = editor.adaptor
    editor.detach()
    editor.family.attach(LAYERS["gpt2"], adaptor)
    assert editor.family.cuts is None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_hook_stands_on_the_models_own_output_projection_meanwhile(edited, monkeypatch, name):
    # Another thread that compiles the model, or runs it, would meet it.
    monkeypatch.setattr(lessons, "_WORTH", 1)
    editor, found = edited(name), []
    head = editor.model.get_output_embeddings()

    def note(module, args, output):
        found.append(len(head._forward_hooks) + len(head._forward_pre_hooks))

    first_block(editor).register_forward_hook(note)
    edits = [(run_of(start, 5), run_of(start + 20, 2)) for start in (10, 20, 30, 40)]
    assert editor.edit(run_of(5, 3), run_of(33, 1)).success
    assert all(result.success for result in editor.edit_batch(edits))
    assert len(found) > 8
    assert set(found) == {0}
