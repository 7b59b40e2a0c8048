"""Learning one value."""

from __future__ import annotations

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing.training import fit_value
from tiny_models import LAYERS, run_of, same, state_of

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)


def fit(editor, target=TARGET, prompts=(PROMPT,), dtype=torch.float32, **kwargs):
    seen = editor.family.capture([prompts[0]])
    settings = {"lr": 0.3, "max_steps": 60, "margin": 0.5, **kwargs}
    targets = [target] * len(prompts)
    return fit_value(
        editor.family,
        prompts,
        targets,
        settings.pop("start", seen.outputs[0]),
        dtype,
        **settings,
    )


def test_a_value_is_trained_until_the_target_is_produced_and_no_further(edited):
    found = fit(edited("gpt2"))
    assert found.reached
    assert 0 < found.steps < 60
    assert found.loss_end < found.loss_start
    assert found.reason == ""


def test_a_start_that_works_already_takes_no_step(edited):
    editor = edited("gpt2")
    first = fit(editor)
    again = fit(editor, start=first.value)
    assert (again.reached, again.steps) == (True, 0)
    assert torch.equal(again.value, first.value)
    # What the model says by itself needs no step either.
    assert fit(editor, target=run_of(14, 3)).steps == 0


def test_without_early_stop_every_step_is_taken(edited):
    assert fit(edited("gpt2"), early_stop=False, max_steps=17).steps == 17


def test_training_is_deterministic_and_draws_no_random_numbers(edited):
    editor = edited("gpt2")
    before = torch.random.get_rng_state()
    assert torch.equal(fit(editor).value, fit(editor).value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_target_out_of_reach_says_so_and_leaves_the_model_alone(edited):
    editor = edited("gpt2")
    before = state_of(editor.model)
    found = fit(editor, max_steps=1, lr=1e-4)
    assert not found.reached
    assert found.steps == 1
    assert "target not produced after 1 steps" in found.reason
    assert same(state_of(editor.model), before)


def test_a_larger_margin_trains_to_a_larger_lead(edited):
    editor = edited("gpt2")

    def lead(margin):
        value = fit(editor, margin=margin, max_steps=100).value
        logits, wanted = editor.family.target_logits([PROMPT], [TARGET], value[None])
        logits = logits.detach()
        own = logits[torch.arange(3), wanted]
        rest = logits.scatter(1, wanted[:, None], float("-inf")).amax(1)
        return float((own - rest).min())

    assert 0.5 <= lead(0.5) < 3.0 <= lead(3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_value_is_verified_in_the_dtype_it_is_stored_in(trained, dtype):
    editor = GraceEditor(trained("gpt2").to(dtype), None, GraceConfig(layer=LAYERS["gpt2"]))
    seen = []
    produces = editor.family.produces

    def watch(prompts, targets, values):
        seen.append(values.dtype)
        return produces(prompts, targets, values)

    editor.family.produces = watch
    found = fit(editor, dtype=dtype)
    assert found.reached
    assert found.value.dtype == dtype
    assert seen
    assert set(seen) == {dtype}
    assert produces([PROMPT], [TARGET], found.value[None]) == [True]


def test_teacher_forcing_that_free_generation_does_not_bear_out_is_trained_further(edited):
    editor = edited("gpt2")
    produces, refusals = editor.family.produces, [1, 2]

    def refuse_twice(*args):
        return [False] if refusals and refusals.pop() else produces(*args)

    editor.family.produces = refuse_twice
    plain = fit(edited("gpt2"))
    found = fit(editor)
    assert found.reached
    assert found.steps > plain.steps


def test_one_value_is_trained_for_several_prompts_together(edited):
    editor = edited("gpt2")
    prompts = [PROMPT, run_of(40, 6), run_of(3, 2)]
    found = fit(editor, prompts=prompts)
    assert found.reached
    for prompt in prompts:
        assert editor.family.produces([prompt], [TARGET], found.value[None]) == [True]


def test_the_targets_loss_is_the_same_in_a_padded_batch_of_different_lengths(edited):
    editor = edited("gpt2")
    prompts, targets = [PROMPT, run_of(40, 6)], [TARGET, run_of(20, 1)]
    width = editor.codebook.values.shape[1]
    values = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    together, wanted = editor.family.target_logits(prompts, targets, values)
    alone = [
        editor.family.target_logits([p], [y], v[None])
        for p, y, v in zip(prompts, targets, values, strict=True)
    ]
    apart = torch.cat([logits for logits, _ in alone])
    # Rounding, which differs with the shape, moves logits of this size by 1e-5; a wrong row by 1.
    assert (together - apart).abs().max() < 1e-3
    assert (together - apart.roll(1, 0)).abs().amax(dim=1).min() > 0.1
    assert wanted.tolist() == [*TARGET, *run_of(20, 1)]


def test_a_loss_that_is_not_finite_is_raised_and_nothing_is_changed(edited):
    editor = edited("gpt2")
    before = state_of(editor.model)
    with pytest.raises(FloatingPointError, match="the loss must be finite, got nan at step 0"):
        fit(editor, start=torch.full_like(editor.codebook.values[0], float("nan")))
    assert same(state_of(editor.model), before)
