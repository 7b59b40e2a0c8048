"""Many values are proven in one generation where each of them is as it would be alone."""

from __future__ import annotations

import pytest
from grace_edit.editing import proofs
from grace_edit.editing.proofs import Proof, prove
from tiny_models import run_of

ALIKE = [run_of(n, 5) for n in (10, 20, 30, 40, 50)]
NEXT = [run_of(n + 5, 2) for n in (10, 20, 30, 40, 50)]  # what a model that counts on says


@pytest.fixture
def editor(edited):
    """Return an editor that works."""
    made = edited("llama")
    with made.family.working():
        yield made


def asked(editor, lead=5.0, targets=NEXT, prompts=ALIKE):
    """Return proofs of prompts that are answered by what the layer says of them anyway."""
    outputs = [editor.family.capture([prompt]).outputs[0] for prompt in prompts]
    rows = zip(prompts, targets, outputs, strict=True)
    return [Proof([row], lead) for row in rows]


def generations(editor, monkeypatch):
    """Return a list to which each generation adds its number of prompts."""
    found, produces = [], editor.family.produces

    def noted(prompts, targets, values):
        found.append(len(prompts))
        return produces(prompts, targets, values)

    monkeypatch.setattr(editor.family, "produces", noted)
    return found


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5, 5), (2, 4, 5, 3, 5)])
def test_prompts_are_proven_in_one_generation_and_one_of_them_alone(editor, monkeypatch, lengths):
    prompts = [prompt[-length:] for prompt, length in zip(ALIKE, lengths, strict=True)]
    every, ran = asked(editor, prompts=prompts), generations(editor, monkeypatch)
    assert prove(editor.family, every) == [True] * 5
    assert ran == [5, 1]


def test_a_target_that_is_not_produced_among_others_is_asked_alone(editor, monkeypatch):
    targets = [*NEXT[:2], [1, 2], *NEXT[3:]]
    every, ran = asked(editor, targets=targets), generations(editor, monkeypatch)
    assert prove(editor.family, every) == [True, True, False, True, True]
    assert ran == [5, 1, 1]


def test_a_value_of_several_prompts_works_where_it_works_for_each(editor, monkeypatch):
    every = asked(editor)
    rows = [proof.rows[0] for proof in every]
    wrong = (rows[4][0], [1, 2], rows[4][2])
    ran = generations(editor, monkeypatch)
    assert prove(editor.family, [Proof(rows[:2], 5.0), Proof([rows[2], wrong], 5.0)]) == [
        True,
        False,
    ]
    assert ran == [4, 1, 1]


@pytest.mark.parametrize("why", ["little lead", "targets", "few", "other layers", "compiled"])
def test_what_may_differ_among_others_is_proven_alone(editor, monkeypatch, why):
    every = asked(editor, lead=0.9 if why == "little lead" else 5.0)
    if why == "targets":
        every = asked(editor, targets=[run_of(10 * n + 15, 1 + n) for n in range(5)])
    elif why == "few":
        every = every[:2]
    elif why == "other layers":
        monkeypatch.setattr(editor.adaptor, "others", (editor.adaptor,))
    elif why == "compiled":
        monkeypatch.setattr(proofs, "is_compiled", lambda model: True)
    ran = generations(editor, monkeypatch)
    if why == "other layers":
        monkeypatch.setattr(editor.family, "produces", lambda p, t, v: ran.append(len(p)) or [True])
    assert all(prove(editor.family, every))
    assert set(ran) == {1}


@pytest.mark.parametrize("off", [1e-3, 0.5])
def test_rows_that_are_not_as_alone_are_proven_alone(editor, monkeypatch, off):
    def by_size(module, args, output):
        return output + off * (len(output) > 1)

    editor.model.get_output_embeddings().register_forward_hook(by_size)
    every, ran = asked(editor), generations(editor, monkeypatch)
    assert all(prove(editor.family, every))
    # All logits move by as much, so what is produced is the same; that they move is seen.
    assert ran == ([5, 1] if off < 0.25 else [5, 1, 1, 1, 1, 1, 1])


def test_values_wait_for_each_other_with_their_proofs(edited, monkeypatch):
    editor = edited("llama")
    ran = generations(editor, monkeypatch)
    pairs = [(prompt, run_of(3 * n, 2)) for n, prompt in enumerate(ALIKE)]
    results = editor.edit_batch(pairs)
    assert all(result.success and result.proven for result in results)
    assert len({result.steps for result in results}) > 1
    assert max(ran) >= 3
    assert len(ran) < 5 + 2
    with editor.family.working():
        for prompt, target in pairs:
            assert editor.family.produces([prompt], [target], None) == [True]
