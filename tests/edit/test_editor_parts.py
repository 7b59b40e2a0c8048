"""Edits with paraphrases and negatives on real models."""

from __future__ import annotations

import random

import pytest
import torch
from grace_edit import GraceEditor
from grace_edit.editing import making
from grace_edit.editing.asked import radius_outside, read_wanted
from grace_edit.editing.fitting import Fit
from text_models import NEIGHBOUR, OTHER, QUESTION, REWORDED, TARGET, text_editor
from tiny_models import book_of, but_values, decisions_of, generated, run_of, same

# B ends like A but is shorter, so that its query is near; C and D are far from both.
A, B, C, D = run_of(10, 5), run_of(11, 4), run_of(40, 6), run_of(52, 5)
X, Y = run_of(30, 3), run_of(50, 3)


def answer(editor, prompt, length=3):
    return generated(editor.model, [prompt], length)[0]


def near_of(editor) -> float:
    a, b = (editor.queries([prompt])[0].double() for prompt in (A, B))
    return float((a - b).norm())


def test_an_edit_answers_its_paraphrases_with_one_value_under_one_id(edited):
    editor = edited("gpt2", radius=0.01)
    before = [answer(editor, prompt) for prompt in (A, C, D)]
    result = editor.edit(A, X, paraphrases=[C, D])
    assert result.success
    assert (result.id, result.keys, editor.codebook.ids) == (0, 3, [0])
    assert editor.status()["edits"] == 1
    assert editor.codebook.entries == 3
    assert [answer(editor, prompt) for prompt in (A, C, D)] == [X, X, X]
    values = editor.codebook.values
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert editor.verify() == []
    editor.codebook.check()
    found = [editor.explain(prompt) for prompt in (A, C, D)]
    assert [(f.hit, f.edit_id, f.key) for f in found] == [(True, 0, 0), (True, 0, 1), (True, 0, 2)]
    assert editor.edit(B, Y).id == 3
    editor.delete(0)
    assert [answer(editor, prompt) for prompt in (A, C, D)] == before
    assert editor.codebook.ids == [3]
    editor.undo()
    assert [answer(editor, prompt) for prompt in (A, C, D, B)] == [X, X, X, Y]
    editor.undo()
    editor.undo()
    assert editor.codebook.entries == 0


def test_verify_looks_at_paraphrases_and_names_their_edit(edited):
    editor = edited("gpt2", radius=0.01)
    editor.edit(B, Y)
    id = editor.edit(A, X, paraphrases=[C]).id
    part = editor.codebook.parts(id)[0]
    editor.codebook.radii[part.slot] = -1.0
    assert {(miss.edit_id, miss.mode) for miss in editor.verify()} == {
        (id, "alone"),
        (id, "batched"),
        (id, "padded"),
    }


@pytest.mark.parametrize("which", [A, C])
def test_an_edit_of_any_of_its_prompts_supersedes_all_of_an_edit_and_says_so(edited, which):
    editor = edited("gpt2", radius=0.01)
    unedited = {str(prompt): answer(editor, prompt) for prompt in (A, C)}
    old = editor.edit(A, X, paraphrases=[C])
    new = editor.edit(which, Y, paraphrases=[D])
    other = C if which is A else A
    assert editor.codebook.ids == [new.id]
    assert ("supersedes edits [0] of other prompts" in new.reason) == (which is C)
    assert (answer(editor, which), answer(editor, D)) == (Y, Y)
    assert answer(editor, other) == unedited[str(other)]
    editor.delete(new.id)
    assert editor.codebook.ids == [old.id]
    assert (answer(editor, A), answer(editor, C)) == (X, X)
    editor.codebook.check()


def test_an_edit_is_refused_whole_where_one_value_does_not_serve_a_paraphrase(edited, monkeypatch):
    editor = edited("gpt2")
    before, produces = book_of(editor.codebook), editor.family.produces

    def stubborn(prompts, targets, values):
        return [False] if prompts == [C] else produces(prompts, targets, values)

    monkeypatch.setattr(editor.family, "produces", stubborn)
    result = editor.edit(A, X, paraphrases=[D, C])
    assert (result.success, result.id) == (False, None)
    assert result.reason.endswith("with the value that all share paraphrases[1] missed it")
    assert same(book_of(editor.codebook), before)


def test_a_paraphrase_near_the_prompt_joins_its_entry(edited):
    editor = edited("gpt2")
    near = near_of(editor)
    editor = edited("gpt2", radius=near * 1.5)
    result = editor.edit(A, X, paraphrases=[B])
    assert (result.keys, editor.codebook.entries) == (2, 1)
    assert editor.codebook.members(0) == (0,)
    editor.codebook.check()
    editor.delete(0)
    assert editor.codebook.entries == 0


def test_a_paraphrase_in_anothers_entry_takes_its_value_only_where_that_works(edited, monkeypatch):
    editor = edited("gpt2")
    near = near_of(editor)
    for works in (True, False):
        editor = edited("gpt2", radius=near * 1.5)
        assert editor.edit(B, X).success
        stored, produces = editor.codebook.values[0].clone(), editor.family.produces

        def choosy(prompts, targets, values, stored=stored, produces=produces, works=works):
            if values is not None and torch.equal(values[0], stored):
                return [works]
            return produces(prompts, targets, values)

        monkeypatch.setattr(editor.family, "produces", choosy)
        assert editor.edit(C, X, paraphrases=[A]).success
        monkeypatch.setattr(editor.family, "produces", produces)
        assert editor.codebook.entries == (2 if works else 3)
        assert answer(editor, A) == answer(editor, B) == answer(editor, C) == X
        editor.codebook.check()


def test_a_negative_is_outside_every_key_and_stays_there(edited):
    editor = edited("gpt2")
    near = near_of(editor)
    editor = edited("gpt2", radius=near * 1.5)
    plain = editor.edit(A, X)
    assert editor.explain(B).hit
    editor.undo()
    result = editor.edit(A, X, paraphrases=[C], negatives=[B])
    assert (result.success, plain.success) == (True, True)
    assert editor.codebook.radii[0].item() == pytest.approx(near / 2)  # the paraphrase is far off
    assert not editor.explain(B).hit
    assert editor.codebook.edit(result.id).negatives == (tuple(B),)
    # By default an edit of the same label would have expanded the entry over B.
    assert editor.edit(run_of(12, 3), X).case == "add"
    assert editor.codebook.radii[0].item() == pytest.approx(near / 2)
    editor.codebook.check()


def test_a_radius_ends_half_way_between_the_farthest_prompt_and_the_nearest_negative(edited):
    editor = edited("gpt2", radius=1e3)
    query = {str(p): editor.queries([p])[0] for p in (A, B, C)}
    wanted = (query[str(A)].double() - query[str(B)].double()).norm()
    wanted = (wanted + (query[str(A)].double() - query[str(C)].double()).norm()) / 2
    assert editor.edit(A, X, paraphrases=[B], negatives=[C]).success
    assert editor.codebook.radii[0].item() == pytest.approx(float(wanted), rel=1e-5)


def test_a_negative_at_the_very_edge_is_a_miss():
    one = torch.zeros(2)
    assert 0.0 < radius_outside(one, [one], [torch.tensor([[1e-20, 0.0]])], 1.0) < 1e-20
    # A prompt of its own just before it: half way between them no fp32 is left, and the rule for
    # ties would take the negative's side.
    other = torch.tensor([1.0 + 2.0**-23, 0.0])
    beyond = torch.tensor([1.0 + 2.0**-22, 0.0])
    assert radius_outside(one, [one, other], [beyond[None]], 5.0) == float(other[0])


@pytest.mark.parametrize("which", [A, C])
def test_a_negative_that_is_a_prompt_of_the_edit_is_an_error(edited, which):
    editor = edited("gpt2")
    with pytest.raises(ValueError, match=r"negatives\[1\] must differ from the prompts"):
        editor.edit(A, X, paraphrases=[C], negatives=[D, which])
    assert editor.codebook.entries == 0


def test_the_published_policy_has_one_key_per_edit(edited):
    editor = edited("gpt2", policy="paper")
    for further in ({"paraphrases": [B]}, {"negatives": [B]}):
        with pytest.raises(ValueError, match='must be left out with policy="paper"'):
            editor.edit(A, X, **further)


def test_a_batch_takes_edits_with_paraphrases_in_every_form(edited):
    one, two = edited("gpt2", radius=0.01), edited("gpt2", radius=0.01)
    edits = [
        (A, X, [C]),
        {"prompt": D, "target": Y, "negatives": [B]},
        (B, Y),
        [run_of(3, 2), X, [], [A]],
    ]
    batch = one.edit_batch(edits)
    singly = [
        two.edit(A, X, [C]),
        two.edit(D, Y, negatives=[B]),
        two.edit(B, Y),
        two.edit(run_of(3, 2), X, negatives=[A]),
    ]
    assert decisions_of(batch) == decisions_of(singly)
    assert [result.keys for result in batch] == [2, 1, 1, 1]
    assert same(but_values(one.codebook), but_values(two.codebook))
    one.undo()
    assert one.codebook.entries == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param((A,), "edit must be", id="no target"),
        pytest.param({"prompt": A}, "edit must have prompt, target", id="no target by name"),
        pytest.param(
            {"prompt": A, "target": X, "other": 1}, "edit must have prompt", id="another name"
        ),
        pytest.param((A, X, "text"), "paraphrases must be a list of prompts", id="a string"),
        pytest.param((A, X, [B, []]), r"paraphrases\[1\]: prompt must", id="empty paraphrase"),
        pytest.param((A, X, (), [[]]), r"negatives\[0\]: prompt must", id="empty negative"),
    ],
)
def test_an_edit_of_another_form_is_refused_by_name(edited, edit, message):
    editor = edited("gpt2")
    with pytest.raises(ValueError, match=message):
        read_wanted(editor.family, edit)


def test_a_paraphrase_that_is_given_twice_or_is_the_prompt_adds_no_key(edited):
    editor = edited("gpt2")
    assert editor.edit(A, X, paraphrases=[C, A, C]).keys == 2


def test_paraphrases_and_negatives_are_saved_and_rekeyed(edited, trained, tmp_path):
    editor = edited("gpt2", radius=2.0)
    editor.edit(B, Y)
    id = editor.edit(A, X, paraphrases=[C], negatives=[D, run_of(20, 3)]).id
    later = editor.edit(run_of(3, 2), Y).id
    editor.save_pretrained(tmp_path)
    served = GraceEditor.from_pretrained(trained("gpt2"), None, tmp_path)
    assert same(book_of(served.codebook), book_of(editor.codebook))
    assert [answer(served, prompt) for prompt in (A, C, B)] == [X, X, Y]
    served.model.bfloat16()
    results = served.rekey()
    assert [result.id for result in results] == [0, id, later]
    assert served.codebook.ids == [0, id, later]
    assert [list(part.prompt) for part in served.codebook.parts(id)] == [C]
    assert served.codebook.edit(id).negatives == (tuple(D), tuple(run_of(20, 3)))
    assert [answer(served, prompt) for prompt in (A, C, B)] == [X, X, Y]
    for negative in (D, run_of(20, 3)):
        found = served.explain(negative)
        assert not (found.hit and found.edit_id == id)
    served.codebook.check()
    served.delete(id)
    assert answer(served, C) != X


@pytest.mark.parametrize("name", ["t5", "bert", "bert-mlm"])
def test_encoders_take_paraphrases_too(edited, name):
    editor = edited(name, radius=0.05)
    prompts, target = [A, C], {"t5": X, "bert": 1, "bert-mlm": [X[0]]}[name]
    if name == "bert-mlm":
        prompts = [[*A, 3], [*C, 3]]
    result = editor.edit(prompts[0], target, paraphrases=prompts[1:])
    assert (result.success, result.keys) == (True, 2)
    assert all(editor.explain(prompt).edit_id == result.id for prompt in prompts)
    assert editor.verify() == []


def test_no_edit_of_several_prompts_loses_one_in_a_conflicting_stream(edited, monkeypatch):
    """A stream of edits, several keys each, deletes and undos; values are not trained in it."""
    editor = edited("gpt2", radius=2.0)
    source = random.Random(3)

    def fit(family, prompts, targets, start, dtype, **_):
        return Fit(torch.rand(start.shape).to(dtype), True, 1.0, 0.0, 1)

    monkeypatch.setattr(making, "fit_value", fit)
    monkeypatch.setattr(
        editor.family, "produces", lambda p, t, v: [source.random() < 0.7 for _ in p]
    )
    prompts = [run_of(start, length) for start in range(0, 60, 5) for length in (3, 4, 6)]
    for number in range(60):
        own, *others = source.sample(prompts, source.choice([1, 1, 2, 3]))
        negatives = [p for p in source.sample(prompts, source.choice([0, 1])) if p != own]
        negatives = [p for p in negatives if p not in others]
        assert editor.edit(own, source.choice([X, Y]), others, negatives).success
        editor.codebook.check()
        for prompt in (own, *others):
            assert editor.explain(prompt).hit
        if number % 6 == 5:
            editor.delete(source.choice(editor.codebook.ids))
            editor.codebook.check()
        if number % 10 == 9:
            editor.undo()
            editor.codebook.check()
    keys = {id: 1 + len(editor.codebook.parts(id)) for id in editor.codebook.ids}
    assert sum(count > 1 for count in keys.values()) > 3


def test_with_keys_from_text_every_prompt_has_an_entry_and_a_negative_stays_outside(trained):
    probe = text_editor(trained("gpt2"), "gpt2")
    probe.edit(QUESTION, TARGET)
    away = probe.explain(NEIGHBOUR).distance
    assert away > 0.0
    editor = text_editor(trained("gpt2"), "gpt2", radius=away * 1.5)
    assert editor.codebook.policy == "nearest"
    editor.edit(QUESTION, TARGET)
    assert editor.explain(NEIGHBOUR).hit
    result = editor.edit(QUESTION, TARGET, paraphrases=[OTHER], negatives=[NEIGHBOUR])
    assert (result.success, result.keys, editor.codebook.entries) == (True, 2, 2)
    assert [editor.explain(p).key for p in (QUESTION, REWORDED, OTHER)] == [0, 0, 1]
    assert editor.answer(OTHER, 3) == editor.answer(QUESTION, 3) == TARGET
    assert not editor.explain(NEIGHBOUR).hit
    assert editor.codebook.radii[0].item() < away
    near = editor.edit(NEIGHBOUR, "one two").id  # and is edited itself without harm to the other
    assert editor.explain(NEIGHBOUR).edit_id == near
    assert editor.explain(QUESTION).edit_id == result.id
    assert editor.verify() == []
    editor.codebook.check()
    editor.delete(result.id)
    assert editor.codebook.ids == [0, near]  # what it superseded is back
    assert editor.explain(OTHER).edit_id != result.id
    editor.codebook.check()
