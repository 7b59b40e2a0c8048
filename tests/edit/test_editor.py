"""The editor on real models: every case of an edit, refusals, asking, taking back."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace

import grace_edit
import pytest
import torch
import transformers
from grace_edit import CapacityError, GraceConfig, GraceEditor, UndoError
from grace_edit.codebook import retention, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.editing import making
from grace_edit.editing.fitting import Fit
from grace_edit.families import base, family_of
from tiny_models import LAYERS, book_of, generated, logits_of, run_of, same, state_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# B ends like A but is shorter, so that its query is near; C is far from both.
A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 3)
FAR = [51, 7, 33, 18, 44, 26]  # no step alone leads there


@pytest.fixture
def near(edited) -> float:
    """Return the distance between the queries of A and B."""
    editor = edited("gpt2")
    # Each alone, as edits are made and explained: a padded batch may give other bits.
    queries = torch.cat([editor.queries([prompt]) for prompt in (A, B, C)])
    apart = torch.cdist(queries.double(), queries.double())
    assert 0 < apart[0, 1] < apart[0, 2] / 2
    return float(apart[0, 1])


def answer(editor, prompt, length=3):
    return generated(editor.model, [prompt], length)[0]


def test_a_first_edit_adds_an_entry_with_the_initial_radius(edited):
    editor = edited("gpt2", radius=0.25)
    result = editor.edit(A, X)
    assert (result.id, result.case, result.slot, result.neighbour) == (0, "add", 0, -1)
    assert result.distance == math.inf
    assert result.success
    assert result.loss_end < result.loss_start
    assert result.steps > 0
    assert editor.codebook.radii[0] == 0.25
    assert torch.equal(editor.codebook.keys[0], editor.queries([A])[0])
    assert answer(editor, A) == X


def test_a_far_edit_adds_another_entry(edited):
    editor = edited("gpt2")
    assert editor.edit(A, X).success
    assert editor.edit(C, X).case == "add"
    assert answer(editor, A) == answer(editor, C) == X
    assert editor.status()["entries"] == 2


def test_a_query_within_the_radius_takes_the_edit_and_one_outside_does_not(edited, near):
    editor = edited("gpt2", radius=near * 1.01)
    assert editor.edit(A, X).success
    assert editor.explain(B).hit
    assert answer(editor, B) == X
    smaller = edited("gpt2", radius=near * 0.99)
    assert smaller.edit(A, X).success
    assert not smaller.explain(B).hit
    assert answer(smaller, B) == run_of(15, 3)


def test_an_edit_with_the_same_label_that_is_covered_is_absorbed(edited, near):
    editor = edited("gpt2", radius=near * 1.5)
    assert editor.edit(A, X).success
    result = editor.edit(B, X)
    assert (result.case, result.slot, result.steps) == ("absorb", 0, 0)
    assert editor.codebook.entries == 1
    assert editor.codebook.members(0) == (0, 1)
    assert answer(editor, A) == answer(editor, B) == X


def test_an_edit_with_the_same_label_that_is_near_expands_the_entry_by_the_drift(edited, near):
    editor = edited("gpt2", radius=near * 0.7)
    assert editor.edit(A, X).success
    result = editor.edit(B, X)
    assert result.case == "expand"
    assert result.radius_before == pytest.approx(near * 0.7)
    assert result.distance == pytest.approx(near)
    assert result.radius_after >= result.distance + editor.codebook.drift
    assert result.radius_after == pytest.approx(result.distance + editor.codebook.drift)
    assert editor.codebook.entries == 1
    assert answer(editor, A) == answer(editor, B) == X
    assert editor.verify() == []


def test_an_edit_with_another_label_that_is_near_splits_the_ball(edited, near):
    editor = edited("gpt2", radius=near * 1.5)
    assert editor.edit(A, X).success
    result = editor.edit(B, Y)
    assert (result.case, result.neighbour, result.slot) == ("split", 0, 1)
    assert result.distance == pytest.approx(near)
    assert editor.codebook.radii[:2].tolist() == pytest.approx([near / 2] * 2)
    assert (answer(editor, A), answer(editor, B)) == (X, Y)


def test_an_edit_of_the_same_prompt_updates_it_and_supersedes_the_earlier_one(edited):
    editor = edited("gpt2")
    first = editor.edit(A, X)
    result = editor.edit(A, Y)
    assert (result.case, result.slot, result.distance) == ("update", first.slot, 0.0)
    assert answer(editor, A) == Y
    assert editor.codebook.ids == [1]
    assert editor.codebook.edit(0).state == "superseded"
    again = editor.edit(A, Y)
    assert again.case == "absorb"
    assert editor.codebook.ids == [2]


def test_a_value_that_does_not_serve_a_new_member_is_trained_on_all_of_them(edited, monkeypatch):
    # A value that barely works for the first prompt: steps this short do not overshoot.
    monkeypatch.setattr(making, "_FIRST_MOVE", 0.0)
    editor = edited("gpt2", radius=100.0, margin=0.0, lr=0.05, max_steps=300)
    assert editor.edit(A, X).success
    before = editor.codebook.values[0].clone()
    prompts = [A]
    retrained = 0
    for prompt in (C, run_of(3, 2), run_of(22, 9), run_of(55, 4)):
        result = editor.edit(prompt, X)
        assert (result.case, result.slot) == ("absorb", 0)
        retrained += result.steps > 0
        prompts.append(prompt)
        assert [answer(editor, p) for p in prompts] == [X] * len(prompts)
    assert retrained
    assert not torch.equal(editor.codebook.values[0], before)


def test_a_member_that_no_shared_value_serves_gets_an_entry_of_its_own(edited, monkeypatch):
    editor = edited("gpt2", radius=100.0)
    fit_value, produces = making.fit_value, editor.family.produces

    def never_together(family, prompts, targets, start, *args, **kwargs):
        if len(prompts) > 1:
            return Fit(start, False, 1.0, 1.0, 3, "never")
        return fit_value(family, prompts, targets, start, *args, **kwargs)

    assert editor.edit(A, X).success
    value = editor.codebook.values[0].clone()
    monkeypatch.setattr(making, "fit_value", never_together)
    editor.family.produces = lambda prompts, targets, values: (
        [False] if torch.equal(values[0], value) else produces(prompts, targets, values)
    )
    result = editor.edit(C, X)
    editor.family.produces = produces
    assert (result.case, result.slot, result.success) == ("add", 1, True)
    assert torch.equal(editor.codebook.values[0], value)
    assert answer(editor, A) == answer(editor, C) == X


def test_a_target_that_is_not_reached_is_refused_with_a_reason_and_changes_nothing(edited):
    editor = edited("gpt2")
    assert editor.edit(C, X).success
    editor.config = GraceConfig(layer=editor.config.layer, max_steps=1, lr=1e-4)
    before, version = book_of(editor.codebook), editor.codebook.version
    result = editor.edit(A, FAR)
    assert not result.success
    assert result.id is None
    assert result.slot is None
    assert (result.case, result.steps) == ("add", 1)
    assert "target not produced after 1 steps" in result.reason
    assert same(book_of(editor.codebook), before)
    assert editor.codebook.version == version
    assert answer(editor, A) == run_of(15, 3)


def test_prompts_and_targets_that_make_no_sense_are_named(edited):
    editor = edited("gpt2")
    for prompt, target, message in (
        ([], X, "prompt must have at least one token"),
        (A, [], "target must have at least one token"),
        ("text", X, "prompt must be a list of token ids when the editor has no tokenizer"),
        (A, "text", "target must be a list of token ids"),
        ([1.5], X, "prompt must be a string or a list of token ids"),
        (A, [True], "target must be a string or a list of token ids"),
        (None, X, "prompt must be a string"),
    ):
        with pytest.raises(ValueError, match=message):
            editor.edit(prompt, target)
    with pytest.raises(ValueError, match=r"edits\[1\]: target must have at least one token"):
        editor.edit_batch([(A, X), (B, [])])
    assert editor.codebook.entries == 0


def test_what_is_no_model_no_tokenizer_and_no_configuration_is_refused(trained, tmp_path):
    model, config = trained("gpt2"), GraceConfig(layer=LAYERS["gpt2"])
    for given, message in (
        (("gpt2", None, config), "model must be a model that was loaded, got 'gpt2'"),
        ((config, None, model), "model must be a model that was loaded, got GraceConfig"),
        ((model, "gpt2", config), "tokenizer must be the model's own or None, got 'gpt2'"),
        ((model, None, LAYERS["gpt2"]), "config must be a GraceConfig, got 'transformer"),
        ((model, None, {"layer": "h.0"}), "config must be a GraceConfig, got {'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            GraceEditor(*given)
    with pytest.raises(ValueError, match="model must be a model that was loaded, got 'x'"):
        grace_edit.load("x", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a model that was loaded, got 'x'"):
        grace_edit.suggest_layer("x", None, [])


@pytest.mark.parametrize("id", ["0", None, [0], 1.5, 7, -1], ids=repr)
def test_what_is_no_id_of_an_edit_is_a_key_error_that_shows_it(edited, id):
    editor = edited("gpt2")
    made = editor.edit(A, X)
    message = f"id must be that of an edit in the history, got {re.escape(repr(id))}"
    for call in (editor.delete, editor.codebook.edit, editor.codebook.parts):
        with pytest.raises(KeyError, match=message):
            call(id)
    assert editor.codebook.ids == [made.id]
    editor.delete(torch.tensor([made.id])[0].numpy()[()])  # any whole number that is one
    assert editor.codebook.ids == []


@pytest.mark.parametrize("length", [0, -1, 1.5, None, True], ids=repr)
def test_an_answer_has_at_least_one_token(edited, length):
    with pytest.raises(ValueError, match=f"max_new_tokens must be an integer of .*, got {length}"):
        edited("gpt2").answer(A, max_new_tokens=length)


def test_an_editor_and_its_codebook_say_what_they_are(edited):
    editor = edited("gpt2")
    editor.edit(A, X)
    book = "Codebook(1 edits, 1 entries, version 1)"
    assert repr(editor.codebook) == book
    assert repr(editor) == f"GraceEditor('{LAYERS['gpt2']}', {book})"
    editor.detach()
    assert repr(editor).endswith(", detached)")


def test_token_ids_beyond_the_vocabulary_are_refused_by_name(edited):
    editor = edited("gpt2")
    with pytest.raises(ValueError, match="prompt must hold token ids below 64, got 64"):
        editor.edit([*A, 64], X)
    with pytest.raises(ValueError, match="target must hold token ids below 64, got -1"):
        editor.edit(A, [-1])


def test_a_tensor_of_ids_is_as_good_as_a_list(edited):
    editor = edited("gpt2")
    assert editor.edit(torch.tensor(A), torch.tensor(X)).success
    assert answer(editor, A) == X


@pytest.mark.parametrize("config", [{"init": "cold"}, {"recipe": "paper", "replace": "all"}])
def test_a_batch_whose_values_start_anywhere_is_made_one_by_one_to_the_bit(edited, near, config):
    edits = [(A, X), (B, X), (C, Y), (A, Y), (B, Y), (run_of(3, 2), X)]
    one = edited("gpt2", radius=near * 0.8, **config)
    all_at_once = edited("gpt2", radius=near * 0.8, **config)
    singles = [one.edit(*pair) for pair in edits]
    batch = all_at_once.edit_batch(edits)
    assert batch == singles
    assert same(book_of(all_at_once.codebook), book_of(one.codebook))
    assert torch.equal(logits_of(one.model, A), logits_of(all_at_once.model, A))


def test_a_batch_is_one_step_of_undo(edited):
    editor = edited("gpt2")
    assert editor.edit(A, X).success
    before = book_of(editor.codebook)
    editor.edit_batch([(B, Y), (C, X)])
    assert editor.codebook.edits == 3
    editor.undo()
    assert same(book_of(editor.codebook), before)
    assert answer(editor, A) == X
    editor.undo()
    with pytest.raises(UndoError):
        editor.undo()


def test_a_refused_edit_does_not_stop_a_batch(edited, monkeypatch):
    editor = edited("gpt2")
    produce = making.EditMaker.train

    def train(maker, prompts, targets, start, prefills=None):
        if prompts == [B]:
            return Fit(start, False, 1.0, 1.0, 9, "never")
        return produce(maker, prompts, targets, start, prefills)

    fit_values = making.fit_values

    def fit_many(family, tasks, *args, **kwargs):
        fits = fit_values(family, tasks, *args, **kwargs)
        return [
            replace(fit, reached=task.prompts != [B]) for fit, task in zip(fits, tasks, strict=True)
        ]

    monkeypatch.setattr(making.EditMaker, "train", train)
    monkeypatch.setattr(making, "fit_values", fit_many)
    results = editor.edit_batch([(A, X), (B, Y), (C, X)])
    assert [r.success for r in results] == [True, False, True]
    assert [r.id for r in results] == [0, None, 1]
    assert answer(editor, C) == X


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_batch_that_breaks_takes_all_of_its_edits_back(edited, monkeypatch, error):
    editor = edited("gpt2")
    assert editor.edit(A, X).success
    model, before = state_of(editor.model), book_of(editor.codebook)
    finish, calls = making.EditMaker.finish, []

    def third_breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return finish(*args, **kwargs)

    monkeypatch.setattr(making.EditMaker, "finish", third_breaks)
    with pytest.raises(type(error)):
        editor.edit_batch([(C, X), (run_of(3, 2), Y), (run_of(22, 9), X), (B, Y)])
    assert same(book_of(editor.codebook), before)
    assert same(state_of(editor.model), model)
    assert answer(editor, A) == X
    editor.undo()
    assert editor.codebook.entries == 0


POINTS = ["capture", "training", "second-step", "verification", "commit", "repair", "after"]


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
@pytest.mark.parametrize("point", POINTS)
def test_whatever_breaks_an_edit_leaves_model_and_codebook_as_they_were(
    edited, monkeypatch, near, point, error
):
    editor = edited("gpt2", radius=near * 1.5)
    model = editor.model
    assert editor.edit(A, X).success
    model.transformer.h[0].train()
    model.transformer.h[2].mlp.dropout.train()
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    model.transformer.wpe.weight.grad = torch.ones_like(model.transformer.wpe.weight)
    state, book = state_of(model), book_of(editor.codebook)
    version = editor.codebook.version

    def breaking(owner, name, on_call=1):
        inner, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == on_call:
                raise error
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    family, codebook = editor.family, editor.codebook
    owner, name, on_call = {
        "capture": (editor.adaptor, "_capture", 1),
        "training": (family, "target_logits", 1),
        "second-step": (family, "target_logits", 2),
        "verification": (family, "produces", 1),
        "commit": (retention, "carry_out", 1),
        "repair": (retention, "repair", 1),
        "after": (codebook.storage, "end_change", 1),
    }[point]
    breaking(owner, name, on_call)
    with pytest.raises(type(error)):
        editor.edit(B, Y)
    monkeypatch.undo()
    assert same(state_of(model), state)
    assert same(book_of(codebook), book)
    assert codebook.version == version
    adaptor = editor.adaptor
    assert (adaptor.plan, adaptor.generation, adaptor.forced, adaptor.captures) == (None,) * 4
    assert adaptor.active
    codebook.check()
    model.eval()
    assert answer(editor, A) == X
    assert editor.edit(B, Y).success


def test_an_edit_touches_no_parameter_no_gradient_and_no_mode(edited):
    editor = edited("llama")
    editor.model.train()
    editor.model.model.layers[0].eval()
    before = state_of(editor.model)
    assert editor.edit(A, X).success
    editor.explain(A)
    editor.verify()
    editor.answer(A)
    assert same(state_of(editor.model), before)


def test_a_model_in_training_is_asked_as_it_will_be_served(edited):
    editor = edited("gpt2")
    served = editor.queries([A])
    assert editor.edit(A, X).success
    editor.model.train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in editor.model.modules())
    assert torch.equal(editor.queries([A]), served)
    assert editor.answer(A, 3) == str(X)
    assert editor.verify() == []
    assert editor.edit(C, Y).success
    editor.model.eval()
    assert answer(editor, C) == Y


def test_explain_tells_the_entry_its_distance_and_the_runner_up(edited, near):
    editor = edited("gpt2", radius=near * 0.4)
    empty = editor.explain(A)
    assert (empty.hit, empty.edit_id, empty.slot, empty.runner_up) == (False, None, -1, None)
    assert editor.edit(C, Y).success
    assert editor.edit(A, X).success
    found = editor.explain(A)
    assert (found.hit, found.edit_id, found.slot, found.distance) == (True, 1, 1, 0.0)
    assert found.label == str(X)
    assert found.runner_up["edit_id"] == 0
    assert found.runner_up["label"] == str(Y)
    missed = editor.explain(B)
    assert (missed.hit, missed.edit_id) == (False, 1)
    assert missed.distance == pytest.approx(near)
    assert missed.radius == pytest.approx(near * 0.4)
    assert json.loads(json.dumps(missed.to_dict()))["edit_id"] == 1


def test_status_counts_and_says_what_serves(edited):
    editor = edited("gpt2", capacity=7, drift=0.25)
    assert editor.edit(A, X).success
    status = editor.status()
    assert status["layer"] == "transformer.h.1.mlp"
    assert (status["entries"], status["edits"], status["capacity"]) == (1, 1, 7)
    assert (status["query"], status["replace"]) == ("last", "last")
    assert (status["attached"], status["fragile"], status["shadowed"]) == (True, [], [])
    assert status["drift"] == editor.codebook.drift == 0.25
    assert status["version"] == editor.codebook.version > 0


def test_verify_finds_nothing_in_a_sound_codebook_and_an_entry_that_was_shrunk_by_hand(edited):
    editor = edited("gpt2")
    for start, length in ((10, 5), (40, 6), (3, 2), (22, 9)):
        assert editor.edit(run_of(start, length), X).success
    assert editor.verify() == []
    editor.codebook.radii[2] = -1.0
    found = editor.verify()
    assert {(m.edit_id, m.mode) for m in found} == {
        (2, "alone"),
        (2, "batched"),
        (2, "padded"),
    }
    assert {m.radius for m in found} == {-1.0}
    assert found[0].distance == 0.0


def test_verify_looks_at_more_edits_than_go_into_one_forward(edited, monkeypatch):
    monkeypatch.setattr(base, "MOST_ROWS", 2)
    editor = edited("gpt2")
    for start in (0, 10, 20, 30, 40):
        assert editor.edit(run_of(start, 4), [40]).success
    assert editor.verify() == []
    editor.codebook.radii[4] = -1.0
    assert {m.edit_id for m in editor.verify()} == {4}


def test_undo_brings_the_answer_before_back_and_delete_the_one_it_superseded(edited):
    editor = edited("gpt2")
    first = editor.edit(A, X)
    second = editor.edit(A, Y)
    assert answer(editor, A) == Y
    editor.delete(second.id)
    assert answer(editor, A) == X
    editor.undo()
    assert answer(editor, A) == Y
    editor.delete(second.id)
    editor.delete(first.id)
    assert answer(editor, A) == run_of(15, 3)
    assert editor.codebook.entries == 0
    with pytest.raises(KeyError):
        editor.delete(first.id)


def test_a_purged_edit_is_gone_from_the_history_and_cannot_be_undone(edited):
    editor = edited("gpt2")
    result = editor.edit(A, X)
    editor.delete(result.id, purge=True)
    assert editor.codebook.history == []
    assert answer(editor, A) == run_of(15, 3)
    with pytest.raises(UndoError):
        editor.undo()


def test_a_frozen_full_codebook_refuses_to_grow_and_an_open_one_grows(edited):
    editor = edited("gpt2", capacity=1)
    assert editor.edit(A, X).success
    editor.frozen = True
    assert editor.frozen
    before, version = book_of(editor.codebook), editor.codebook.version
    with pytest.raises(CapacityError):
        editor.edit(C, X)
    assert same(book_of(editor.codebook), before)
    assert editor.codebook.version == version
    editor.frozen = False
    assert editor.edit(C, X).success
    assert editor.codebook.capacity == 2
    assert answer(editor, A) == answer(editor, C) == X


def test_who_looks_for_merging_is_told_why_there_is_none_and_what_there_is(edited):
    editor = edited("gpt2")
    with pytest.raises(AttributeError, match=r"cannot be merged into weights; detach\(\)"):
        editor.merge_and_unload()
    assert not hasattr(editor, "merge_and_unload")
    assert not hasattr(GraceEditor, "merge_and_unload")
    with pytest.raises(AttributeError, match="has no attribute 'merge'"):
        editor.merge  # noqa: B018


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", ""),
        ("layer", None),
        ("radius", 0.0),
        ("radius", math.inf),
        ("radius", math.nan),
        ("policy", "best"),
        ("recipe", "fast"),
        ("replace", "first"),
        ("query", "max"),
        ("init", "hot"),
        ("lr", -1.0),
        ("margin", -0.1),
        ("max_steps", 0),
        ("max_steps", 1.5),
        ("capacity", 0),
        ("drift", -1.0),
        ("max_radius", math.nan),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be"):
        GraceConfig(**{"layer": "h.1.mlp", field: value})


def test_every_decision_is_logged(edited, caplog):
    editor = edited("gpt2")
    with caplog.at_level(logging.INFO, logger="grace_edit"):
        editor.edit(A, X)
        editor.edit_batch([(B, Y), (C, X)])
    assert len([r for r in caplog.records if "'case'" in r.getMessage()]) == 3


def test_a_fragile_edit_says_so(edited, near):
    editor = edited("gpt2", drift=near, radius=near * 2)
    assert editor.edit(A, X).fragile is False
    result = editor.edit(B, Y)
    assert result.case == "split"
    assert result.fragile
    assert editor.status()["fragile"] == [1]


def test_no_live_edit_of_a_conflicting_stream_ever_loses_its_answer(edited):
    editor = edited("gpt2", radius=20.0)
    wanted = {}
    for n in range(60):
        prompt = run_of((n * 7) % 60, 1 + n % 3)
        target = [(X, Y, run_of(20, 2))[n % 3], run_of(5, 1)][n % 4 == 3]
        result = editor.edit(prompt, target)
        assert result.success, result.reason
        wanted[tuple(prompt)] = target
        if n % 6 == 5 or n < 6:
            rows = [list(p) for p in wanted]
            got = generated(editor.model, rows, 3)
            lost = [p for p, g in zip(wanted, got, strict=True) if g[: len(wanted[p])] != wanted[p]]
            assert not lost, (n, lost)
    cases = {e.result.case for e in editor.codebook.history}
    assert {"split", "expand", "add"} <= cases
    assert editor.verify() == []
    editor.codebook.check()


def test_the_published_policy_compares_labels_that_begin_with_a_causal_models_masked_prompt(edited):
    editor = edited("gpt2", policy="paper")
    assert editor.edit(A, X).success
    assert editor.codebook.edit(0).label == (*[-100] * len(A), *X)
    assert editor.explain(A).label == str(X)
    assert editor.answer(A, 3) == str(X)
    assert edited("gpt2").edit(A, X).success
    encoder = edited("bert", policy="paper")
    assert encoder.edit(A, 2).success
    assert encoder.codebook.edit(0).label == (2,)


@pytest.mark.parametrize("policy", ["default", "paper"])
@pytest.mark.parametrize(("name", "target"), [("bert", 0), ("bert", 1), ("t5", run_of(30, 1))])
def test_the_published_recipe_edits_encoders_in_its_hundred_steps(edited, name, target, policy):
    editor = edited(name, policy=policy, recipe="paper")
    assert editor.status()["replace"] == "before"
    result = editor.edit(A, target)
    assert result.success
    assert result.steps == 100
    assert editor.family.produces([A], [editor.codebook.edit(0).label[-1:]], None)[0]
    assert editor.edit(A, target).case == "absorb"


def test_the_published_recipe_cannot_reach_a_causal_model_that_asks_at_its_last_token(edited):
    # It replaces the tokens before the query only, whose keys and values the last token may ignore.
    result = edited("gpt2", recipe="paper").edit(A, X)
    assert not result.success
    assert "after 100 steps" in result.reason


def test_an_edit_shared_by_the_published_policy_without_proof_says_so(edited):
    editor = edited("bert", policy="paper", radius=1e6)
    first, second = editor.edit(A, 1), editor.edit(B, 1)
    assert (first.reason, first.proven, second.case) == ("", True, "absorb")
    made = editor.family.produces([B], [[1]], None)[0]
    assert (second.reason == "") == second.proven == made
    editor.codebook.values[0] = -editor.codebook.values[0]
    third = editor.edit(A, 1)
    assert third.case == "absorb"
    made = editor.family.produces([A], [[1]], None)[0]
    assert (third.reason == "") == third.proven == made


def test_what_is_proven_is_saved_and_not_made_up(edited, tmp_path):
    editor = edited("gpt2")
    refused = edited("gpt2", max_steps=1, margin=50.0).edit(A, FAR)
    assert (refused.success, refused.proven) == (False, False)
    assert editor.edit(A, X).proven
    book = editor.codebook
    book.insert(book.keys[0] + 1000, [3], book.values[0])
    store.save(book, tmp_path, {})
    lines = (tmp_path / "edits.jsonl").read_text().splitlines()
    assert [json.loads(line).get("proven") for line in lines[:2]] == [True, False]
    loaded, _ = store.load(tmp_path)
    assert [edit.result.proven for edit in loaded.history] == [True, False]
    rows = torch.eye(2)
    imported = Codebook.from_tensors(rows, rows, torch.ones(2), [[1], [2]])
    assert imported.edit(1).result.proven is False


def test_an_update_names_the_edits_of_other_prompts_that_it_supersedes(edited, near):
    editor = edited("gpt2", radius=near * 1.01)
    assert editor.edit(A, X).id == 0
    assert editor.edit(B, X).case in ("absorb", "expand")
    result = editor.edit(A, Y)
    assert result.case == "update"
    assert "[1]" in result.reason
    assert editor.codebook.ids == [2]


def test_edits_that_are_forgotten_as_they_are_superseded_are_named_all_the_same(edited, near):
    editor = edited("gpt2", radius=near * 1.5)
    editor.codebook.history_limit = 0
    assert editor.edit(A, X).id == 0
    assert editor.edit(B, X).case in ("absorb", "expand")
    assert "[1]" in editor.edit(A, Y).reason
    assert [edit.id for edit in editor.codebook.history] == [2]
    editor.codebook.check()


def test_edits_are_logged_only_once_they_are_made(edited, caplog, monkeypatch):
    editor = edited("gpt2")
    real, calls = making.EditMaker.finish, []

    def second_is_interrupted(maker, read, **how):
        calls.append(read)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(maker, read, **how)

    monkeypatch.setattr(making.EditMaker, "finish", second_is_interrupted)
    with caplog.at_level(logging.INFO, logger="grace_edit"), pytest.raises(KeyboardInterrupt):
        editor.edit_batch([(A, X), (C, Y)])
    assert not caplog.records
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, logger="grace_edit"):
        editor.edit_batch([(A, X), (C, Y)])
    assert len(caplog.records) == 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_verify_runs_even_a_single_prompt_beside_a_longer_one(edited, monkeypatch, name):
    editor = edited(name, drift=0.0)
    assert editor.edit(A, 1 if name == "bert" else X).success
    honest, batches = editor.family.capture, []

    def drifts(prompts, *, left=False):
        # What padding does to a query's bits is up to the machine, so it is made up here.
        seen = honest(prompts, left=left)
        batches.append((list(map(len, prompts)), left))
        return replace(seen, queries=seen.queries + 9.0) if len(prompts) > 1 else seen

    monkeypatch.setattr(editor.family, "capture", drifts)
    assert [misfire.mode for misfire in editor.verify()] == ["padded"]
    (lengths, left) = next(batch for batch in batches if len(batch[0]) > 1)
    assert lengths[0] == len(A) < lengths[1]
    assert left == (name == "llama")


def test_a_longer_prompt_than_the_model_has_positions_for_is_refused_by_name(edited):
    editor = edited("gpt2")
    longest = editor.family.longest
    for ask in (lambda: editor.edit(run_of(0, 4) * 20, X), lambda: editor.explain([1] * 70)):
        with pytest.raises(ValueError, match=f"prompt must have at most {longest} tokens"):
            ask()
    with pytest.raises(ValueError, match=f"at most {longest} tokens together, got {longest + 2}"):
        editor.edit((run_of(5, 1) * longest)[: longest - 1], X)
    assert editor.codebook.edits == 0


def test_a_model_with_few_positions_can_be_attached(trained):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64,
            n_positions=8,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    editor = GraceEditor(model.eval(), None, GraceConfig(layer="h.1.mlp", margin=0.0))
    # What it says by itself: whether so small a model can say anything else is a matter of luck.
    own = answer(editor, [1, 2, 3], 1)
    assert editor.edit([1, 2, 3], own).success
    assert editor.explain([1, 2, 3]).hit


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "regression"}])
def test_a_head_that_chooses_no_class_is_refused(settings):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **settings,
    )
    model = transformers.BertForSequenceClassification(config)
    before = state_of(model)
    with pytest.raises(ValueError, match="at least two classes"):
        GraceEditor(model, None, GraceConfig(layer="layer.0.output"))
    assert same(before, state_of(model))


def test_a_caller_in_inference_mode_or_with_his_own_generation_settings_can_edit(edited):
    editor = edited("gpt2")
    with torch.inference_mode():
        assert editor.edit(A, X).success
    editor.model.generation_config.return_dict_in_generate = True
    assert editor.edit(C, Y).success


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": None}, "margin must be a number, got None"),
        ({"radius": "1"}, "radius must be a number, got '1'"),
        ({"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"max_steps": True}, "max_steps must be an integer of at least 1, got True"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"drift": -1.0}, "drift must be at least 0 and finite, got -1.0"),
    ],
)
def test_a_bad_setting_is_refused_where_it_is_given(settings, message):
    with pytest.raises(ValueError, match=message):
        GraceConfig(layer="mlp", **settings)


def test_a_target_is_what_follows_the_prompt_in_the_whole_text():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁": 1, "▁a": 2, "▁b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    always = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

    class Marks:
        """Begins every text with a word mark of its own, as SentencePiece tokenizers do."""

        all_special_ids: tuple[int, ...] = ()

        def __call__(self, text, add_special_tokens=True):
            ids = always(text.strip()).input_ids
            return transformers.BatchEncoding({"input_ids": [1, *ids] if text[0] == " " else ids})

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    )
    family = family_of(model, Marks())
    assert family.encode_target(" b", []) == [1, 3]
    assert family.encode_edit("a", " b") == ([2], [3])
