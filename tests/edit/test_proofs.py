"""Many values are proven in one generation where each of them is as it would be alone."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from grace_edit.editing import lessons, proofs, training
from grace_edit.editing.proofs import Proof, prove
from grace_edit.families.projection import logits_seen
from tiny_models import run_of

PROMPTS = [run_of(start, length) for start, length in ((10, 5), (22, 3), (30, 5), (41, 4), (52, 2))]
NEXT = [run_of(15, 2), run_of(25, 1), run_of(35, 2), run_of(45, 2), run_of(54, 2)]
"""What a model that counts on says."""


@pytest.fixture
def editor(edited):
    """Return an editor that works."""
    made = edited("llama")
    with made.family.working():
        yield made


def asked(editor, lead=5.0, targets=NEXT):
    """Return proofs of prompts that are answered by what the layer says of them anyway."""
    outputs = [editor.family.capture([prompt]).outputs[0] for prompt in PROMPTS]
    each = enumerate(zip(PROMPTS, targets, outputs, strict=True))
    return [Proof([prompt], [y], output, lead, n) for n, (prompt, y, output) in each]


class Watched:
    """What proofs ran: how many prompts at once in each generation."""

    def __init__(self, editor, monkeypatch):
        self.ran, generate = [], type(editor.model).generate

        def noted(model, *args, **kwargs):
            self.ran.append(len(kwargs["input_ids"]))
            return generate(model, *args, **kwargs)

        monkeypatch.setattr(type(editor.model), "generate", noted)

    def take(self):
        ran, self.ran[:] = list(self.ran), []
        return ran


def begun(editor):
    return editor.family.begin(PROMPTS, 4)


def test_prompts_are_proven_in_one_generation_and_one_of_them_alone(editor, monkeypatch):
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    editor.family.prefills = (editor.adaptor, True)
    assert prove(editor.family, every, start) == [True] * 5
    assert watched.take() == [5, 1]
    assert prove(editor.family, every, start) == [True] * 5  # what was begun is as it was
    assert watched.take() == [5, 1]


def test_the_first_proof_of_all_is_among_others_too(editor, monkeypatch):
    # Alone it is generated three times: whole, and cut, as is tried then, and for its answer.
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    assert editor.family.prefills is None
    assert prove(editor.family, every, start) == [True] * 5
    first, *rest = watched.take()
    assert (first, set(rest)) == (5, {1})
    assert len(rest) <= 3


def test_a_target_that_is_not_produced_among_others_is_asked_alone(editor, monkeypatch):
    targets = [*NEXT[:2], [1, 2], *NEXT[3:]]
    every, watched = asked(editor, targets=targets), Watched(editor, monkeypatch)
    assert prove(editor.family, every, begun(editor)) == [True, True, False, True, True]
    assert watched.take() == [5, 1, 1]


def test_a_value_of_several_prompts_works_where_it_works_for_each(editor, monkeypatch):
    one, *others = asked(editor)
    prompts, targets = PROMPTS[1:4], [*NEXT[1:3], [1, 2]]
    # One value for three prompts: it is the first's own, and the others say something else.
    several = Proof(prompts, targets, others[0].value, 5.0, 1)
    right = editor.family.produces(prompts[:1], targets[:1], others[0].value[None])
    assert right == [True]
    assert prove(editor.family, [one, several, others[-1]], begun(editor)) == [True, False, True]
    assert prove(editor.family, [several], None) == [False]


@pytest.mark.parametrize("why", ["little lead", "few", "nothing begun", "looks at the prompt"])
def test_what_may_differ_among_others_is_proven_alone(editor, monkeypatch, why):
    every = asked(editor, lead=0.9 if why == "little lead" else 5.0)
    every = every[:2] if why == "few" else every
    if why == "looks at the prompt":
        editor.model.generation_config.no_repeat_ngram_size = 3
    start, watched = begun(editor), Watched(editor, monkeypatch)
    assert all(prove(editor.family, every, None if why == "nothing begun" else start))
    assert set(watched.take()) == {1}


def test_some_of_what_was_begun_are_proven_by_their_own_rows(editor, monkeypatch):
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    ran, only = [], type(start).only

    def noted(begun, rows):
        ran.append(list(rows))
        return only(begun, rows)

    monkeypatch.setattr(type(start), "only", noted)
    editor.family.prefills = (editor.adaptor, True)
    assert prove(editor.family, every[::2], start) == [True] * 3
    assert watched.take() == [3, 1]
    assert ran == [[0, 2, 4]]


@pytest.mark.parametrize("off", [1e-3, 0.2, 0.3])
def test_rows_that_are_not_as_alone_are_proven_alone_from_then_on(editor, monkeypatch, off):
    def by_size(module, args, output):
        output = output.clone()
        output[-1] += off * (len(output) > 1)  # where the prompt with the most padding stands
        return output

    editor.model.get_output_embeddings().register_forward_hook(by_size)
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    editor.family.prefills = (editor.adaptor, True)
    assert start.ran[-1][1] == max(padding for _, padding in start.ran)
    assert all(prove(editor.family, every, start))
    # All logits move by as much, so what is produced is the same; that they move is seen.
    assert watched.take() == ([5, 1] if off < 0.25 else [5, 1, 1, 1, 1, 1, 1])
    assert all(prove(editor.family, every, start))
    assert watched.take() == ([5, 1] if off < 0.25 else [1] * 5)


def test_where_no_logits_are_seen_values_are_proven_alone(editor, monkeypatch):
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    monkeypatch.setattr(editor.model, "get_output_embeddings", lambda: None)
    assert all(prove(editor.family, every, start))
    assert watched.take() == [5, *[1] * 6]


def test_many_are_proven_in_pieces(editor, monkeypatch):
    monkeypatch.setattr(proofs, "_MOST", 3)
    every, start, watched = asked(editor), begun(editor), Watched(editor, monkeypatch)
    editor.family.prefills = (editor.adaptor, True)
    assert prove(editor.family, every, start) == [True] * 5
    assert watched.take() == [3, 1, 1, 1]  # two that are left are not worth it


@pytest.mark.parametrize("of", ["class", "instance"])
def test_a_generate_of_a_models_own_is_asked_as_ever(editor, monkeypatch, of):
    every, start = asked(editor), begun(editor)
    base, ran = type(editor.model).grace_base, []
    generate = base.generate

    def own(model, input_ids, attention_mask, max_new_tokens, **settings):
        assert "past_key_values" not in settings
        ran.append(len(input_ids))
        how = {"attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
        return generate(model, input_ids=input_ids, **how, **settings)

    if of == "class":
        monkeypatch.setattr(base, "generate", own)
    else:
        editor.model.__dict__["generate"] = functools.partial(own, editor.model)
    assert all(prove(editor.family, every, start))
    assert set(ran) == {1}


def test_a_batch_warns_of_no_cache(edited, monkeypatch):
    monkeypatch.setattr(lessons, "_WORTH", 1)
    editor = edited("gpt2", query="mean")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pairs = [(prompt, run_of(3 * n, 2)) for n, prompt in enumerate(PROMPTS)]
        assert all(result.success for result in editor.edit_batch(pairs))
    assert not [one for one in told if "past_key_values" in str(one.message)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_of_a_batch_wait_for_each_other_with_their_proofs(edited, monkeypatch, name):
    monkeypatch.setattr(lessons, "_WORTH", 1)
    editor = edited(name)
    assert editor.edit(run_of(5, 3), run_of(33, 1)).success  # the first proof of all tries more
    watched, calls, own = Watched(editor, monkeypatch), [], training.prove

    def noted(family, proofs, begun):
        watched.take()
        for proof in proofs:
            rows = range(proof.first, proof.first + len(proof.prompts))
            assert begun.only(list(rows)).prompts == proof.prompts
        proven = own(family, proofs, begun)
        calls.append((sum(len(proof.prompts) for proof in proofs), watched.take()))
        return proven

    monkeypatch.setattr(training, "prove", noted)
    pairs = [(prompt, run_of(3 * n, 2)) for n, prompt in enumerate(PROMPTS)]
    pairs[3] = (PROMPTS[3], NEXT[3])  # what it says anyway: it needs few steps, and waits
    # One of several prompts: the rows of the others come behind all of its own.
    edits = [(*pairs[0], [run_of(60, 3)]), *pairs[1:]]
    results = editor.edit_batch(edits)
    assert all(result.success and result.proven for result in results)
    assert results[3].steps < min(result.steps for result in results[:3])
    assert calls[0][0] >= 3  # half of them
    together = [(count, ran) for count, ran in calls if count >= 3]
    assert all(ran == [count, 1] for count, ran in together)
    with editor.family.working():
        for prompt, target in pairs:
            assert editor.family.produces([prompt], [target], None) == [True]


def test_going_on_from_what_was_begun_says_what_whole_generations_say(editor):
    values = torch.stack([proof.value for proof in asked(editor)])
    wrong = [*NEXT[:4], [1, 2]]
    assert begun(editor).produces(editor.family, wrong, values) == [True] * 4 + [False]
    some, targets = begun(editor).only([4, 1]), [NEXT[4], NEXT[1]]
    assert some.produces(editor.family, targets, -values[[4, 1]]) != [True, True]
    for row, number in enumerate((4, 1)):
        with logits_seen(editor.model, row) as among:
            assert some.produces(editor.family, targets, values[[4, 1]]) == [True, True]
        with logits_seen(editor.model, 0) as alone:
            editor.family.produces([PROMPTS[number]], [NEXT[number]], values[number][None])
        for one, its in zip(among, alone, strict=False):
            assert torch.allclose(one, its, rtol=0, atol=1e-3)
