"""Batches of edits: values trained together, decisions and proofs as one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grace_edit.editing import batching, making, training
from grace_edit.editing.fitting import Task
from grace_edit.editing.training import fit_values
from text_models import NEIGHBOUR, OTHER, QUESTION, TARGET, text_editor
from tiny_models import but_values, decisions_of, generated, run_of, same, state_of

A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 3)
# Conflicts inside the batch: shared and split balls, a repeated edit, two that are superseded.
CONFLICTS = [
    (A, X), (B, X), (C, Y), (A, Y), (B, Y), (run_of(3, 2), X), (C, Y), (run_of(12, 7), X[:1]),
    (run_of(3, 2), Y), (run_of(25, 4), Y[:2]),
]  # fmt: skip


@pytest.fixture
def near(edited) -> float:
    """Return the distance between the queries of A and B."""
    editor = edited("gpt2")
    queries = torch.cat([editor.queries([prompt]) for prompt in (A, B)])
    return float(torch.dist(*queries))


@pytest.mark.parametrize("radius", [0.8, 1.5])
def test_a_batch_decides_as_one_by_one_with_conflicts_inside_it(edited, near, radius):
    one, batch = edited("gpt2", radius=near * radius), edited("gpt2", radius=near * radius)
    singles = [one.edit(*pair) for pair in CONFLICTS]
    results = batch.edit_batch(CONFLICTS)
    assert decisions_of(results) == decisions_of(singles)
    assert len({r.case for r in results}) >= 3
    assert same(but_values(batch.codebook), but_values(one.codebook))
    assert torch.allclose(batch.codebook.values, one.codebook.values, rtol=1e-2, atol=1e-2)
    batch.codebook.check()
    for edit in batch.codebook.history:
        if edit.live:
            target = list(edit.label)
            assert generated(batch.model, [edit.prompt], len(target))[0] == target


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_every_kind_of_model_takes_a_batch(edited, name):
    targets = (2, 1, 3) if name == "bert" else (X, Y[:2], run_of(5, 1))
    edits = list(zip((A, C, run_of(25, 3)), targets, strict=True))
    one, batch = edited(name), edited(name)
    singles = [one.edit(*pair) for pair in edits]
    results = batch.edit_batch(edits)
    assert all(r.success for r in results)
    assert decisions_of(results) == decisions_of(singles)
    assert same(but_values(batch.codebook), but_values(one.codebook))
    assert [r.steps for r in results] == [r.steps for r in singles]


def test_texts_are_trained_together_with_their_contexts(trained):
    edits = [(QUESTION, TARGET), (NEIGHBOUR, "five six"), (OTHER, "one"), (QUESTION, "nine ten")]
    one, batch = (text_editor(trained("gpt2"), "gpt2", contexts=2) for _ in range(2))
    singles = [one.edit(*pair) for pair in edits]
    assert decisions_of(batch.edit_batch(edits)) == decisions_of(singles)
    assert same(but_values(batch.codebook), but_values(one.codebook))


def test_values_trained_together_are_those_trained_alone(edited):
    editor = edited("gpt2")
    family, how = editor.family, {"max_steps": 100, "margin": 3.0, "move": 6.0}
    tasks = []
    for prompts, target in (([A], X), ([B, C], Y), ([run_of(25, 4)], X[:1]), ([C], Y)):
        start = family.capture([prompts[0]]).outputs[0]
        contexts = [(run_of(2, 5), Y)] if prompts == [C] else []
        tasks.append(Task(prompts, [target] * len(prompts), start, 0.3, contexts))
    before = state_of(editor.model)
    together = fit_values(family, tasks, torch.float32, **how)
    assert same(state_of(editor.model), before)
    alone = [fit_values(family, [task], torch.float32, **how)[0] for task in tasks]
    assert len({fit.steps for fit in alone}) > 1  # they do not end together
    for fit, single in zip(together, alone, strict=True):
        assert (fit.reached, fit.steps) == (True, single.steps)
        assert torch.allclose(fit.value, single.value, rtol=1e-3, atol=1e-3)
        assert fit.loss_end == pytest.approx(single.loss_end, rel=1e-3)


def test_one_that_is_done_early_does_not_pay_for_the_steps_of_others(edited, monkeypatch):
    editor, sizes = edited("gpt2", margin=0.1), []
    step = training._step

    def noted(family, lessons, together):
        sizes.append(len(together.trainings))
        return step(family, lessons, together)

    monkeypatch.setattr(training, "_step", noted)
    easy = [(run_of(n, 4), run_of(n + 4, 2)) for n in (5, 15, 25)]  # what the model says anyway
    results = editor.edit_batch([*easy, (A, X)])
    assert [r.steps == 0 for r in results] == [True, True, True, False]
    assert sizes[0] == 4
    assert set(sizes[1:]) == {1}


def test_an_edit_that_fails_together_is_trained_alone(edited, monkeypatch):
    editor = edited("gpt2")
    many = making.fit_values
    monkeypatch.setattr(
        making,
        "fit_values",
        lambda *a, **k: [replace(fit, reached=False, reason="bits") for fit in many(*a, **k)],
    )
    assert all(r.success for r in editor.edit_batch([(A, X), (C, Y)]))


def poisoned(editor, token):
    """Let whatever runs a token be NaN from there on, and no other."""
    model = editor.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.transformer.wte.weight[token] = float("nan")
    return editor


@pytest.mark.parametrize("init", ["warm", "cold"])
def test_an_edit_whose_loss_is_not_finite_fails_alone(edited, init):
    edits = [(C, Y), (A, X), (run_of(25, 4), Y[:2]), (B, Y)]  # the second runs X[0]
    one, batch = (poisoned(edited("gpt2", init=init), X[0]) for _ in range(2))
    singles = []
    for prompt, target in edits:
        if target == X:
            with pytest.raises(FloatingPointError, match="got nan at step 0"):
                one.edit(prompt, target)
        else:
            singles.append(one.edit(prompt, target))
    results = batch.edit_batch(edits)
    failed = results.pop(1)
    assert (failed.success, failed.id, failed.proven) == (False, None, False)
    assert failed.reason == "the loss must be finite, got nan at step 0"
    assert decisions_of(results) == decisions_of(singles)
    assert same(but_values(batch.codebook), but_values(one.codebook))
    batch.codebook.check()


def test_a_value_that_is_not_finite_as_it_is_stored_fails_alone(edited):
    editor = edited("gpt2")
    family, how = editor.family, {"max_steps": 100, "margin": 3.0, "move": 6.0}
    start = family.capture([A]).outputs[0]
    tasks = [Task([A], [X], start, 0.3), Task([C], [Y], torch.full_like(start, float("inf")), 0.3)]
    first, second = fit_values(family, tasks, torch.float32, **how)
    assert first.reached
    assert first.finite
    assert (second.reached, second.finite, second.steps) == (False, False, 0)
    assert "must be finite" in second.reason


def test_an_edit_that_an_earlier_one_of_the_batch_answers_is_not_trained(edited, monkeypatch):
    editor, trained = edited("gpt2"), []
    many = making.fit_values

    def noted(family, tasks, *args, **kwargs):
        trained.extend(task.prompts[0] for task in tasks)
        return many(family, tasks, *args, **kwargs)

    monkeypatch.setattr(making, "fit_values", noted)
    results = editor.edit_batch([(A, X), (C, Y), (A, X)])
    assert results[2].case == "absorb"
    assert trained == [A, C]


def test_long_prompts_share_no_forward(edited, monkeypatch):
    editor, groups = edited("gpt2"), []
    many = making.fit_values

    def noted(family, tasks, *args, **kwargs):
        groups.append([len(task.prompts[0]) for task in tasks])
        return many(family, tasks, *args, **kwargs)

    monkeypatch.setattr(making, "fit_values", noted)
    monkeypatch.setattr(batching, "_MOST_TOKENS", 40)
    prompts = [run_of(7 * n, length) for n, length in enumerate((4, 30, 6, 5, 37))]
    results = editor.edit_batch([(prompt, X) for prompt in prompts])
    assert [r.id for r in results] == list(range(5))
    assert groups == [[4, 5, 6]]


def test_as_many_prompts_are_run_ahead_as_may_be_kept(edited, monkeypatch):
    edits = [(A, X), (C, Y), (run_of(25, 3), X), (run_of(3, 2), Y)]  # 5, 6, 3 and 2 tokens
    batch, ahead = edited("gpt2"), []
    read = making.EditMaker.read
    monkeypatch.setattr(batching, "_MOST_KEPT", 11)

    def reads(maker, wanted, prefills):
        ahead.append((len(wanted.prompt), batch.codebook.edits))
        return read(maker, wanted, prefills)

    monkeypatch.setattr(making.EditMaker, "read", reads)
    results = batch.edit_batch(edits)
    assert [result.success for result in results] == [True] * 4
    # The third would be too much; then the rest, behind what was made.
    assert ahead == [(5, 0), (6, 0), (3, 2), (2, 2)]
