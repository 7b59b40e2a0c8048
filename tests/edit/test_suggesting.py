"""Suggestions of a layer and of a radius: what they measure, and what they leave as it was."""

from __future__ import annotations

import json

import pytest
import torch
from grace_edit import GraceConfig, suggest_layer, suggest_radius, suggesting
from tiny_models import run_of, same, state_of

import grace_kernels

X, Y = run_of(30, 2), run_of(50, 2)
EDITS = [
    (run_of(10, 5), X, [run_of(12, 3), run_of(20, 4)]),
    (run_of(40, 6), Y, [run_of(45, 2)]),
]


def test_the_layer_whose_values_decode_in_the_most_other_wordings_is_suggested(trained, tmp_path):
    model = trained("gpt2")
    before = state_of(model)
    found = suggest_layer(model, None, EDITS, picture=tmp_path / "layers.png")
    assert [row.layer for row in found.table] == ["transformer.h.1.mlp", "transformer.h.2.mlp"]
    best = max(found.table, key=lambda r: (r.generality, r.accepted, -r.steps))
    assert found.layer == best.layer
    assert f"{best.layer} produce the target in {best.generality:.0%}" in found.reason
    assert all(row.seconds > 0 and 0 < row.probability <= 1 for row in found.table)
    assert json.loads(json.dumps(found.to_dict()))["layer"] == found.layer
    assert (tmp_path / "layers.png").stat().st_size > 1000
    assert same(state_of(model), before)


def test_generality_is_the_share_of_wordings_that_the_forced_value_answers(trained, edited):
    config = GraceConfig(layer="any", margin=0.5)
    found = suggest_layer(trained("gpt2"), None, EDITS, layers=["h.0.mlp", "h.2"], config=config)
    for row, layer in zip(found.table, ("h.0.mlp", "h.2"), strict=True):
        assert row.layer == layer
        editor = edited("gpt2", layer=layer, margin=0.5)
        results = [editor.edit(prompt, target) for prompt, target, _ in EDITS]
        made = [
            editor.family.produces([other], [target], editor.codebook.values[r.slot][None])[0]
            for r, (_, target, others) in zip(results, EDITS, strict=True)
            for other in others
        ]
        assert row.accepted == 1.0
        assert row.generality == sum(made) / 3
        assert row.steps == sum(r.steps for r in results) / 2
        assert row.probability == pytest.approx(sum(r.probability for r in results) / 2)


def test_the_wordings_of_an_edit_that_is_refused_count_as_failed(trained):
    hopeless = GraceConfig(layer="any", max_steps=1, margin=0.5)
    unlikely = [(run_of(10, 5), [7, 60, 9, 33, 5], [run_of(12, 3)])]
    found = suggest_layer(trained("gpt2"), None, unlikely, layers=["h.1.mlp"], config=hopeless)
    assert (found.table[0].accepted, found.table[0].generality) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("edits", "layers"),
    [([], None), ([(X, Y, [])], None), (EDITS, ["h.9.mlp"])],
    ids=["none", "no paraphrases", "unknown layer"],
)
def test_what_cannot_be_measured_is_refused_and_the_model_left_alone(trained, edits, layers):
    model = trained("gpt2")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"edits must be|layer must name"):
        suggest_layer(model, None, edits, layers=layers)
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": ["h.0.mlp", "h.9.mlp"]}, r"layer must name one module, got 'h\.9\.mlp'"),
        ({"picture": "found.jpg"}, r"picture must be a file that ends in .* got found\.jpg"),
        (
            {"picture": "no/where/found.png"},
            "picture must lie in a directory that is there",
        ),
    ],
    ids=["layer", "ending", "directory"],
)
def test_nothing_is_measured_for_what_could_not_be_told_in_the_end(
    trained, edited, monkeypatch, given, message
):
    def work(*_, **__):
        raise AssertionError("something was measured")

    monkeypatch.setattr(suggesting, "bar", work)
    with pytest.raises(ValueError, match=message):
        suggest_layer(trained("gpt2"), None, EDITS, **given)
    if "picture" in given:
        editor = edited("gpt2")
        made = editor.edit(X, Y)
        with pytest.raises(ValueError, match=message):
            suggest_radius(
                editor, [(made.id, X)], {"others": [EDITS[1][0]]}, {"others": 0}, **given
            )


def distance(editor, prompt):
    """Return how far a prompt is from the nearest key, and the slot of that."""
    book = editor.codebook
    query = editor.queries([prompt])
    slot, d = grace_kernels.nearest(query, book.keys[: book.entries], torch.zeros(book.entries))
    return float(d), int(slot)


def test_the_radius_lies_between_the_wordings_that_should_hit_and_those_that_should_not(
    edited, tmp_path
):
    editor = edited("gpt2", radius=1e-3)
    first, second = (editor.edit(prompt, target) for prompt, target, _ in EDITS)
    pool = [run_of(start, length) for start in range(0, 60, 7) for length in (3, 6)]
    measured = sorted((distance(editor, p)[0], i) for i, p in enumerate(pool))
    near = [pool[i] for _, i in measured[:4]]
    far = [pool[i] for _, i in measured[6:]]
    owners = {first.slot: first.id, second.slot: second.id}
    positives = [(owners[distance(editor, p)[1]], p) for p in near]
    version = editor.codebook.version
    found = suggest_radius(
        editor, positives, {"other": far}, {"other": 0.0}, picture=tmp_path / "radius.png"
    )
    assert measured[3][0] < found.radius < measured[6][0]
    assert (found.hit, found.fired) == (1.0, {"other": 0.0})
    assert "other" in found.reason
    assert json.loads(json.dumps(found.to_dict()))["radius"] == found.radius
    assert (tmp_path / "radius.png").stat().st_size > 1000
    assert editor.codebook.version == version
    # A wording that is nearest to another edit's key does not hit, however large the radius.
    wrong = [(first.id if owner == second.id else second.id, p) for owner, p in positives]
    with pytest.raises(ValueError, match="finite distance"):
        suggest_radius(editor, wrong, {}, {})
    mixed = suggest_radius(editor, [*positives, *wrong], {"other": far}, {"other": 0.0})
    assert mixed.hit == 0.5


def test_a_radius_needs_live_edits(edited):
    editor = edited("gpt2", radius=1e-3)
    with pytest.raises(ValueError, match="editor must have edits"):
        suggest_radius(editor, [], {}, {})
    result = editor.edit(*EDITS[0][:2])
    editor.edit(*EDITS[1][:2])
    editor.delete(result.id)
    with pytest.raises(ValueError, match=f"live edits, got {result.id}"):
        suggest_radius(editor, [(result.id, X)], {}, {})


def test_a_wording_may_hit_the_key_of_a_paraphrase(edited):
    editor = edited("gpt2", radius=1e-3)
    prompt, target, others = EDITS[0]
    result = editor.edit(prompt, target, paraphrases=others)
    assert result.success
    found = suggest_radius(editor, [(result.id, p) for p in others], {"far": [Y]}, {"far": 0.0})
    assert found.hit == 1.0
