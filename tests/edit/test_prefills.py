"""A value is proven by a generation that takes over what its prompt's first run has left."""

from __future__ import annotations

import pytest
import torch
from test_cutting import counted, first_block
from tiny_models import CAUSAL, run_of, same, state_of

A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 1)


def made(editor, edits=((A, X), (C, Y))):
    """Return what edits came to, and all that is stored."""
    results = [editor.edit(*edit) for edit in edits]
    assert all(result.proven for result in results)
    return results, editor.codebook.keys.clone(), editor.codebook.values.clone()


def equal(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_blocks_below_run_a_prompt_once_for_its_query_and_its_proof(edited, name):
    editor, whole = edited(name), edited(name)
    whole.family.prefills = (whole.adaptor, False)
    before = state_of(editor.model)
    assert equal(made(editor), made(whole))
    assert editor.family.prefills == (editor.adaptor, True)
    assert same(state_of(editor.model), before)
    below = [counted(first_block(each)) for each in (editor, whole)]
    edits = ((run_of(20, 6), X), (run_of(60, 4), X))
    assert equal(made(editor, edits), made(whole, edits))
    # The query, the first forward of training, and the second and third token of the target.
    assert len(below[0]) == 2 * (2 + len(X) - 1)
    assert len(below[1]) == 2 * (3 + len(X) - 1)


def test_a_value_is_proven_for_each_of_several_prompts_and_for_members_of_an_entry(edited):
    books = []
    for shares in (None, False):
        editor = edited("gpt2", radius=50.0)
        if shares is False:
            editor.family.prefills = (editor.adaptor, False)
        result = editor.edit(A, X, paraphrases=[C])
        assert (result.success, result.keys) == (True, 2)
        books.append((result, editor.edit(B, X), editor.codebook.values.clone()))
    assert books[0][:2] == books[1][:2]
    assert torch.equal(books[0][2], books[1][2])


def test_a_model_that_gives_other_bits_each_time_is_proven_by_whole_generations(edited):
    editor, calls = edited("gpt2"), []

    def drift(module, args, output):
        calls.append(1)
        return output + 1e-4 * len(calls)

    first_block(editor).mlp.register_forward_hook(drift)
    editor.edit(A, X)
    assert editor.family.prefills == (editor.adaptor, False)
    editor.edit(C, Y)
    assert editor.family.prefills == (editor.adaptor, False)


def test_a_cache_that_cannot_be_filled_is_filled_by_the_model(edited):
    editor, plain = edited("llama"), edited("llama")
    editor.model.generation_config.cache_implementation = "static"
    got, expected = made(editor), made(plain)
    assert [(r.case, r.distance) for r in got[0]] == [(r.case, r.distance) for r in expected[0]]
    below = counted(first_block(editor))
    assert editor.edit(run_of(20, 6), Y).proven
    assert len(below) == 3


@pytest.mark.parametrize(
    "setting", [{"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
@pytest.mark.parametrize("tried", [False, True])
def test_settings_that_change_the_first_forward_leave_edits_as_they_are(edited, setting, tried):
    editor = edited("gpt2")
    if tried:
        assert editor.edit(C, Y).success
    for name, value in setting.items():
        setattr(editor.model.generation_config, name, value)
    assert editor.edit([*A, *A[:2]], X).success
