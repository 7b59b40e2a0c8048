"""Forwards that go on from prompts that were begun: about the numbers of whole ones, for less."""

from __future__ import annotations

import pytest
import test_more_families as more
import torch
import transformers
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing import lessons
from grace_edit.editing.lessons import Lessons
from grace_edit.families import begun as begun_prompts
from tiny_models import CAUSAL, LAYERS, MASK, run_of, same, state_of

SYSTEM = run_of(60, 3)
ASKED = [
    ([*SYSTEM, *run_of(10, 9)], run_of(30, 3)),
    ([*SYSTEM, *run_of(40, 14)], [51]),
    ([*SYSTEM, *run_of(22, 4)], run_of(5, 2)),
]
ALONE = [[(run_of(10, 1), run_of(30, 2)), (run_of(40, 6), [51])], [(run_of(10, 12), [7, 9])], ASKED]


@pytest.fixture
def any_editor(edited):
    def make(name):
        return more.attached(name)[0] if name in more.KINDS else edited(name)

    return make


def values_of(editor, count):
    source = torch.Generator().manual_seed(3)
    width = editor.family.capture([ASKED[0][0]]).outputs.shape[1]
    return torch.randn(count, width, generator=source).requires_grad_(True)


def logits_and_slopes(logits, values):
    (slopes,) = torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 5].sum(), [values])
    return logits.detach(), slopes


def counted(editor):
    """Note how many tokens the wrapped layer is given, forward by forward."""
    seen = []
    layer = editor.model.get_submodule(editor.layer)
    layer.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("asked", ALONE, ids=["one token", "one prompt", "begin alike"])
@pytest.mark.parametrize("name", [*CAUSAL, *more.CAUSAL])
def test_logits_and_slopes_are_those_of_whole_forwards(any_editor, name, asked, monkeypatch):
    monkeypatch.setattr(begun_prompts, "_PAYS", 1)
    editor = any_editor(name)
    family = editor.family
    prompts, targets = [p for p, _ in asked], [y for _, y in asked]
    with family.working():
        values = values_of(editor, len(asked))
        begun = family.begin(prompts, 4)
        assert begun is not None
        for _ in range(2):  # what was begun is as it was
            whole, wanted = family.target_logits(prompts, targets, values)
            found, also = begun.target_logits(family, targets, values)
            assert torch.equal(wanted, also)
            for one, other in zip(
                logits_and_slopes(found, values), logits_and_slopes(whole, values), strict=True
            ):
                assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_training_runs_the_last_tokens_and_the_targets_alone(edited, name, monkeypatch):
    monkeypatch.setattr(lessons, "_WORTH", 10)
    monkeypatch.setattr(begun_prompts, "_PAYS", 6)
    editor = edited(name)
    seen = counted(editor)
    before = state_of(editor.model)
    with editor.family.working(), Lessons(editor.family, ASKED) as taught:
        assert seen == [3, 3 * 13]  # what all begin with, and the rest of each
        for value in (values_of(editor, 3), values_of(editor, 3) + 1):
            seen.clear()
            taught.target_logits(value)
        assert editor.family.goes_on == (16, 10)
        assert seen == [3 * 3]  # three last tokens, each with room for two of a target
    assert same(state_of(editor.model), before)


def test_short_prompts_are_not_begun(edited):
    editor = edited("gpt2")
    seen = counted(editor)
    with editor.family.working(), Lessons(editor.family, ASKED) as taught:
        assert seen == []
        taught.target_logits(values_of(editor, 3))
    assert editor.family.goes_on == (0, 0)


def test_a_model_whose_last_tokens_depend_on_something_else_runs_whole(edited, monkeypatch):
    monkeypatch.setattr(lessons, "_WORTH", 10)
    editor = edited("gpt2")
    prompts, targets = [p for p, _ in ASKED], [y for _, y in ASKED]

    def by_length(module, args, output):
        return output * output.shape[1]

    editor.model.transformer.h[2].mlp.register_forward_hook(by_length)
    with editor.family.working():
        values = values_of(editor, 3)
        whole, _ = editor.family.target_logits(prompts, targets, values)
        with Lessons(editor.family, ASKED) as taught:
            assert torch.equal(taught.target_logits(values)[0], whole)
        assert editor.family.goes_on is None
        with Lessons(editor.family, ASKED) as taught:
            assert torch.equal(taught.target_logits(values)[0], whole)


def test_what_is_added_to_all_logits_does_not_hide_that_log_odds_differ(edited, monkeypatch):
    monkeypatch.setattr(lessons, "_WORTH", 10)
    editor = edited("gpt2")
    mlp, head = editor.model.transformer.h[2].mlp, editor.model.lm_head
    mlp.register_forward_hook(lambda module, args, output: output * output.shape[1])
    head.register_forward_hook(lambda module, args, output: output + 1e5)
    with editor.family.working():
        with Lessons(editor.family, ASKED) as taught:
            taught.target_logits(values_of(editor, 3))
        assert editor.family.goes_on is None


@pytest.mark.parametrize("replace", ["prompt", "all"])
def test_where_more_than_the_last_token_is_answered_nothing_is_begun(edited, replace):
    editor = edited("gpt2", replace=replace)
    with editor.family.working():
        assert editor.family.begin([p for p, _ in ASKED], 4) is None


def test_beside_another_layer_nothing_is_begun(edited):
    editor = edited("gpt2")
    editor.add_layer("transformer.h.2.mlp")
    with editor.family.working():
        assert editor.family.begin([p for p, _ in ASKED], 4) is None


@pytest.mark.parametrize("name", ["t5", "bert", "bert-mlm"])
def test_other_families_begin_nothing(edited, name):
    editor = edited(name)
    prompts = [[*run_of(10, 3), MASK, 4]] if name == "bert-mlm" else [run_of(10, 5)]
    with editor.family.working():
        assert editor.family.begin(prompts, 4) is None


@pytest.mark.parametrize("name", CAUSAL)
def test_an_edit_is_the_same_but_for_rounding(edited, name, monkeypatch):
    found = []
    for worth in (10**9, 1):
        monkeypatch.setattr(lessons, "_WORTH", worth)
        editor = edited(name)
        result = editor.edit(run_of(10, 6), run_of(30, 3))
        assert result.success
        assert editor.family.goes_on == ((5, 0) if worth == 1 else (0, 0))
        found.append((editor.codebook.values[0].clone(), result))
    (whole, first), (begun, second) = found
    assert (first.case, first.steps) == (second.case, second.steps)
    assert torch.allclose(whole, begun, rtol=1e-3, atol=1e-3)


def test_an_attached_editor_tries_again(edited):
    editor = edited("gpt2")
    editor.family.goes_on = None
    adaptor = editor.adaptor
    editor.detach()
    editor.family.attach(LAYERS["gpt2"], adaptor)
    assert editor.family.goes_on == (0, 0)


def test_what_some_prompts_begin_with_runs_once_for_these(edited, monkeypatch):
    monkeypatch.setattr(begun_prompts, "_PAYS", 10)
    editor = edited("gpt2")
    one, two = run_of(20, 6), run_of(40, 4)
    asked = [[*one, 3, 5], [*two, 7, 9, 11], [*one, 8, 1, 2, 5], [*two, 4, 6], [50, 51]]
    seen = counted(editor)
    with editor.family.working():
        begun = editor.family.begin(asked, 2)
        # The two beginnings, padded to one length; of each row three tokens at most are left.
        assert seen == [2 * 6, 5 * 3]
        values = values_of(editor, 5)
        targets = [[9], [8, 7], [6], [5], [4]]
        whole, _ = editor.family.target_logits(asked, targets, values)
        found, _ = begun.target_logits(editor.family, targets, values)
        assert (found - whole).abs().max() <= 1e-4 * whole.abs().max()
        some, _ = begun.only([1, 4]).target_logits(editor.family, [[8, 7], [4]], values[[1, 4]])
        assert (some - whole[[1, 2, 5]]).abs().max() <= 1e-4 * whole.abs().max()


def window_of_columns(monkeypatch):
    """Return a GPT-Neo, whose local attention counts columns, padding too, and which has 64."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=64,
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=12,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    monkeypatch.setattr(lessons, "_WORTH", 1)
    monkeypatch.setattr(begun_prompts, "_PAYS", 1)
    return GraceEditor(model, None, GraceConfig(layer="transformer.h.1.mlp", radius=1e-3))


def test_padding_between_tokens_that_is_wider_than_any_before_is_tried_anew(monkeypatch):
    editor = window_of_columns(monkeypatch)
    one, two = run_of(20, 6), run_of(40, 4)
    asked = [([*one, 3, 5], [9]), ([*one, 8, 1, *run_of(4, 14)], [7]), ([*two, 4], [6])]
    asked.append(([*two, 5, 9], [4]))
    with editor.family.working():
        with Lessons(editor.family, asked[:1]) as taught:
            taught.target_logits(values_of(editor, 1))
        assert editor.family.goes_on == (7, 0)
        values = values_of(editor, 4)
        prompts, targets = [p for p, _ in asked], [y for _, y in asked]
        whole, _ = editor.family.target_logits(prompts, targets, values)
        with Lessons(editor.family, asked) as taught:
            assert torch.equal(taught.target_logits(values)[0], whole)
        assert editor.family.goes_on is None


def test_no_more_columns_are_taken_than_the_model_has(monkeypatch):
    editor = window_of_columns(monkeypatch)
    start = run_of(20, 30)
    asked = [[*start, 3, 5], [*start, 7, 9], [*run_of(4, 40), 5]]
    with editor.family.working():
        # 30 that two begin with and 40 of the third are more than 64: nothing is shared.
        assert editor.family.begin(asked, 4).mask.shape[1] == 40
        assert editor.family.begin(asked, 25) is None


def test_a_cache_of_a_models_own_is_not_gone_on_from(edited):
    class OwnCache(transformers.DynamicCache):
        """Holds something beside its layers."""

    editor = edited("gpt2")
    forward = editor.model.transformer.forward

    def with_own(*args, **kwargs):
        return forward(*args, **{**kwargs, "past_key_values": OwnCache()})

    with editor.family.working():
        editor.model.transformer.forward = with_own
        assert editor.family.begin([p for p, _ in ASKED], 4) is None
        del editor.model.transformer.forward
        assert editor.family.begin([p for p, _ in ASKED], 4) is not None
