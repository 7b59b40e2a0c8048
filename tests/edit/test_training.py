"""Learning one value."""

from __future__ import annotations

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing import lessons, values
from grace_edit.editing.fitting import Settings, Task, Training
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


def log_odds(editor, value, prompt=PROMPT, target=TARGET):
    """Return the log odds of the target's tokens behind a prompt that `value` answers."""
    logits, wanted = editor.family.target_logits([prompt], [target], value[None])
    p = logits.detach().double().softmax(1)[torch.arange(len(wanted)), wanted]
    return (p / (1 - p)).log()


def test_a_larger_margin_trains_to_larger_odds(edited):
    editor = edited("gpt2", layer="transformer.h.0.mlp")

    def least(margin):
        return float(log_odds(editor, fit(editor, margin=margin, max_steps=100).value).min())

    assert 0.5 <= least(0.5) < 3.0 <= least(3.0)


def test_the_probability_is_that_of_the_whole_target_answered_by_the_stored_value(edited):
    editor = edited("gpt2")
    prompts = [PROMPT, run_of(40, 6)]
    found = fit(editor, prompts=prompts, contexts=[(run_of(50, 5), TARGET)])
    each = [log_odds(editor, found.value, p).sigmoid().prod() for p in prompts]
    assert found.probability == pytest.approx(float(min(each)), rel=1e-4)
    assert found.probability > 0.5


def test_a_margin_out_of_reach_costs_as_many_steps_as_the_value_took_and_few_more(edited):
    editor = edited("gpt2")
    plain, wishful = fit(editor), fit(editor, margin=1e6, max_steps=1000)
    assert wishful.reached
    assert plain.steps < wishful.steps <= 2 * plain.steps + 8
    assert wishful.probability > plain.probability


def test_the_first_step_moves_the_odds_as_asked_where_the_layers_scale_says_too_little(edited):
    editor = edited("gpt2")
    start = editor.family.capture([PROMPT]).outputs[0]

    def gain(**kwargs):
        value = fit(editor, target=TARGET[:1], max_steps=1, **kwargs).value
        before, after = (log_odds(editor, v, target=TARGET[:1]) for v in (start, value))
        return float(after - before)

    assert gain(lr=1e-4) < 0.1
    # A step this short is as good as straight: the odds move by what their gradient said.
    assert gain(lr=1e-4, move=0.5) == pytest.approx(0.5, rel=0.2)
    assert gain(lr=1e-4, move=1.0) == pytest.approx(1.0, rel=0.3)
    # A longer one is not shortened.
    assert gain(lr=0.3, move=1e-3) == gain(lr=0.3)


def test_a_value_trained_in_contexts_leads_in_them_too_and_is_proven_in_its_prompt_alone(edited):
    editor = edited("gpt2")
    others = [run_of(50, 5), run_of(3, 2), run_of(20, 7)]
    proven, produces = [], editor.family.produces

    def watch(prompts, targets, values):
        proven.extend(prompts)
        return produces(prompts, targets, values)

    alone = fit(editor, margin=2.9)
    editor.family.produces = watch
    found = fit(editor, margin=2.9, contexts=[(prompt, TARGET) for prompt in others])
    assert found.reached
    for prompt in others:
        assert log_odds(editor, alone.value, prompt).min() < 2.9
        assert log_odds(editor, found.value, prompt).min() >= 2.9
    assert proven == [PROMPT]


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


def test_a_token_that_lacks_little_is_not_left_behind_by_those_that_lack_nothing(edited):
    # By cross entropy a likely token hardly moves; here the margin is reached by all of them.
    editor = edited("gpt2", layer="transformer.h.0.mlp")
    found = fit(editor, margin=4.0, max_steps=60, move=8.0)
    assert found.reached
    assert float(log_odds(editor, found.value).min()) >= 4.0
    assert found.steps <= 20


def test_a_value_far_from_its_target_starts_over_with_slower_steps(edited, monkeypatch):
    starts = []

    class Watched(values.Adam):
        def __init__(self, rows, lr, betas):
            starts.append((lr[0], betas, rows[0].clone()))
            super().__init__(rows, lr, betas)

        def restart(self, row, value, lr, betas):
            super().restart(row, value, lr, betas)
            starts.append((lr, betas, self.values[row].clone()))

    monkeypatch.setattr(values, "Adam", Watched)
    monkeypatch.setattr(values, "log_odds", lambda logits, y: logits[:, 0] * 1e-6 - 9.0)
    editor = edited("gpt2")
    start = editor.family.capture([PROMPT]).outputs[0]
    assert not fit(editor, max_steps=30, move=5.0).reached
    assert [(lr, betas) for lr, betas, _ in starts] == [(0.3, (0.5, 0.99)), (0.3, (0.9, 0.999))]
    assert torch.equal(starts[1][2], start)
    starts.clear()
    fit(editor, max_steps=30, early_stop=False)  # the published recipe never does
    assert [betas for _, betas, _ in starts] == [(0.9, 0.999)]


def likely_and_suppressed(editor, times):
    """Return a target whose log odds are large, and are so the larger, and never generated."""
    with torch.no_grad():
        editor.model.get_output_embeddings().weight.mul_(times)
    likely = editor.family.answer(PROMPT, 1)
    start = editor.family.capture([PROMPT]).outputs[0]
    odds = float(log_odds(editor, start, target=likely).clamp(max=1e4))
    editor.model.generation_config.suppress_tokens = likely
    return likely, start, odds


def test_a_token_far_beyond_the_margin_that_is_not_generated_is_refused_as_any_other(edited):
    editor = edited("llama")
    likely, _, odds = likely_and_suppressed(editor, 1000)
    assert odds > 200  # what they lack of the margin is 0 in fp32
    found = fit(editor, target=likely, max_steps=12)
    assert (found.reached, found.steps) == (False, 12)
    assert torch.isfinite(found.value).all()


def test_the_published_recipe_begins_no_prompts(edited, monkeypatch):
    monkeypatch.setattr(lessons, "_WORTH", 1)
    editor, begun = edited("gpt2"), []
    monkeypatch.setattr(editor.family, "begin", lambda *asked: begun.append(asked))
    fit(editor, early_stop=False, max_steps=2)
    assert begun == []
    fit(editor, max_steps=2)
    assert len(begun) == 1


def test_the_first_step_of_a_value_beyond_the_margin_is_no_leap(edited):
    editor = edited("llama")
    likely, start, odds = likely_and_suppressed(editor, 4)
    assert odds > 8

    def moved(margin):
        value = fit(editor, target=likely, max_steps=1, lr=1e-6, move=1e-3, margin=margin).value
        return float((value - start).abs().max())

    assert moved(odds - 7) < 3 * moved(odds + 7)


def test_logits_may_come_from_another_device_than_the_layers():
    start = torch.zeros(4, device="meta")
    settings = Settings(max_steps=3, margin=5.0, move=0.0, early_stop=True)
    tasks = [Task([[5]], [target], start, 0.1) for target in ([1], [2, 0])]
    together = values.Values.begin(
        [Training(one, settings) for one in tasks], torch.float32, settings
    )
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    odds, entropies = together.look(logits, torch.tensor([1, 2, 0]))
    assert odds.device == entropies.device == together.margins(odds).device == logits.device
    assert odds[0].isinf().tolist() == [False, True]
    chances = logits.softmax(dim=1)
    assert odds[1, 1] == pytest.approx(float(torch.logit(chances[2, 0])), rel=1e-4)
    assert entropies[1] == pytest.approx(-float(chances[[1, 2], [2, 0]].log().mean()), rel=1e-4)
