"""A value is proven by a generation that takes over what its prompt's first run has left."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from grace_edit.editing.prefills import Prefills
from test_cutting import counted, first_block
from text_models import text_editor
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


ALIKE = [run_of(start, 5) for start in (10, 20, 30, 40, 50)]


def exact_rows(editor):
    """Let products give a row the same bits among others as alone, as many processors do."""
    linear = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        rows = [linear(row[None], weight, bias) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).reshape(*x.shape[:-1], -1)

    return mock.patch("torch.nn.functional.linear", by_row)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_prompts_of_a_length_are_run_together_and_seen_as_alone(edited, name):
    editor = edited(name)
    with editor.family.working(), exact_rows(editor):
        alone, ahead = Prefills(editor.family), Prefills(editor.family)
        below = counted(first_block(editor))
        ahead.read_ahead([*ALIKE, C, ALIKE[0]])
        # All five at once, the first, middle and last of them; the one of another length not yet.
        assert len(below) == 4
        for prompt in ALIKE:
            seen, own = ahead.capture(prompt), alone.capture(prompt)
            assert torch.equal(seen.queries, own.queries)
            assert torch.equal(seen.outputs, own.outputs)
        assert len(below) == 4 + len(ALIKE)
        value = torch.zeros_like(seen.outputs[0])
        assert ahead.produces(ALIKE[2], [1], value) == alone.produces(ALIKE[2], [1], value)
        below.clear()
        ahead.produces(ALIKE[3], [1], value)
        assert below == []  # what was kept of it among the others serves its proof


def test_where_a_row_has_other_bits_among_others_each_runs_alone(edited):
    editor = edited("llama")

    def by_size(module, args, output):
        return output * (1 + 1e-6 * len(output))

    first_block(editor).mlp.register_forward_hook(by_size)
    with editor.family.working(), exact_rows(editor):
        ahead = Prefills(editor.family)
        ahead.read_ahead(ALIKE)
        below = counted(first_block(editor))
        seen = ahead.capture(ALIKE[1])
        assert len(below) == 1
        assert torch.equal(seen.queries, editor.family.capture([ALIKE[1]]).queries)


def test_what_is_kept_of_a_prompt_among_others_counts_too(edited):
    # The layer sees the same, but a cache that a proof would go on from would not hold it.
    editor = edited("llama")
    attention = first_block(editor).self_attn
    forward = attention.k_proj.forward

    def by_size(x):
        return forward(x) * (1 + 1e-6 * (len(x) - 1))

    editor.model.get_submodule("model.layers.2").self_attn.k_proj.forward = by_size
    attention.k_proj.forward = by_size
    with editor.family.working(), exact_rows(editor):
        ahead = Prefills(editor.family)
        ahead.read_ahead(ALIKE)
        below = counted(first_block(editor))
        ahead.capture(ALIKE[1])
        assert len(below) == 1


def test_under_text_prompts_of_all_lengths_are_run_together_whatever_their_bits(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    prompts = [run_of(start, 3 + n % 3) for n, start in enumerate((10, 20, 30, 40, 50))]

    def by_size(module, args, output):
        return output * (1 + 1e-6 * len(output))

    first_block(editor).mlp.register_forward_hook(by_size)
    with editor.family.working():
        ahead = Prefills(editor.family)
        ahead.read_ahead([*prompts, prompts[0]])
        below = counted(first_block(editor))
        for prompt in prompts:
            seen, own = ahead.capture(prompt), editor.family.capture([prompt])
            assert torch.equal(seen.queries, own.queries)
            assert torch.allclose(seen.outputs, own.outputs, rtol=1e-3, atol=1e-4)
        assert len(below) == len(prompts)  # those that were compared with
