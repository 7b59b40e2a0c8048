"""Several layers of one model: what each answers, and what a change of one does to the others."""

from __future__ import annotations

import copy
import math
import os
import random
import threading
import warnings
from dataclasses import replace

import grace_edit
import pytest
import torch
from grace_edit import (
    Codebook,
    GraceConfig,
    GraceEditor,
    LayersError,
    QueryPlan,
    StoreError,
    UndoError,
)
from grace_edit.cli.output import describe_error
from grace_edit.codebook import snapshot, store
from grace_edit.engines.vllm.saved import Described, NotServed
from text_models import NEIGHBOUR, QUESTION, TARGET, text_editor
from tiny_models import generated, logits_of, padded, run_of, same, state_of

pytestmark = pytest.mark.filterwarnings("error:generate was not edited")

LOWER = {
    "gpt2": "transformer.h.0.mlp",
    "llama": "model.layers.0.mlp",
    "t5": "encoder.block.0.layer.1.DenseReluDense.wo",
    "bert": "bert.encoder.layer.0.output.dense",
}
UPPER = {
    "gpt2": "transformer.h.2.mlp",
    "llama": "model.layers.2.mlp",
    "t5": "encoder.block.1.layer.1.DenseReluDense.wo",
    "bert": "bert.encoder.layer.2.output.dense",
}
ONE, TWO, THREE = run_of(10, 4), run_of(40, 6), run_of(22, 9)
TO_ONE, TO_TWO = run_of(30, 3), run_of(55, 3)
OTHER, NEAR = run_of(3, 2), run_of(9, 4)


@pytest.fixture
def pair(trained):
    """Return a function that gives the editors of a lower and an upper layer of one model."""

    def make(name="gpt2", upper=None, **config):
        config.setdefault("radius", 0.5)
        lower = GraceEditor(trained(name), None, GraceConfig(layer=LOWER[name], **config))
        return lower, lower.add_layer(UPPER[name], **(upper or {}))

    return make


@pytest.fixture
def answering(pair):
    """Return the editors of two layers, each of which answers one prompt."""
    lower, upper = pair()
    assert lower.edit(ONE, TO_ONE).success
    assert upper.edit(TWO, TO_TWO).success
    return lower, upper


def storages(editor):
    return [each.codebook.storage for each in editor.layers.values()]


def kept(editor):
    """Return copies of all codebooks of a model, without versions."""
    return [copy.deepcopy(storage) for storage in storages(editor)]


def unchanged(editor, before):
    for storage, was in zip(storages(editor), before, strict=True):
        was.version = storage.version
        was.next_id, was.next_value_id = storage.next_id, storage.next_value_id
        if not snapshot.same(storage, was):
            return False
        editor.codebook.check()
    return True


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_both_layers_answer_however_the_tokens_are_computed(pair, name):
    lower, upper = pair(name)
    assert lower.edit(ONE, TO_ONE).success
    assert upper.edit(TWO, TO_TWO).success
    model, rows = lower.model, [ONE, TWO, THREE, OTHER]
    alone = [generated(model, [row], 4, use_cache=False)[0] for row in rows]
    assert [alone[0][:3], alone[1][:3]] == [TO_ONE, TO_TWO]
    assert alone[2:] == [run_of(31, 4), run_of(5, 4)]
    assert [generated(model, [row], 4)[0] for row in rows] == alone
    assert generated(model, rows, 4) == alone
    beams = generated(model, rows, 4, num_beams=2)
    assert [beam[:3] for beam in beams[:2]] == [TO_ONE, TO_TWO]
    if name == "llama":
        assert generated(model, rows, 4, cache_implementation="static") == alone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert generated(model, rows, 4, prefill_chunk_size=3) == alone
    assert upper.verify() == lower.verify() == []


@pytest.mark.parametrize("replace", ["prompt", "all"])
def test_answers_that_replace_more_rows_are_latched_in_each_layer(pair, replace):
    lower, upper = pair(replace="last", upper={"replace": replace, "query": "mean"})
    assert lower.edit(ONE, TO_ONE).success
    assert upper.edit(TWO, TO_TWO).success
    alone = [generated(lower.model, [row], 4, use_cache=False)[0] for row in (ONE, TWO)]
    assert [row[:3] for row in alone] == [TO_ONE, TO_TWO]
    assert generated(lower.model, [ONE, TWO], 4) == alone


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_encoders_are_edited_in_several_layers(pair, name):
    lower, upper = pair(name, radius=0.05)
    wanted = (2, 3) if name == "bert" else ([*run_of(50, 2), 2], [*run_of(20, 2), 2])
    assert lower.edit(ONE, wanted[0]).success
    assert upper.edit(TWO, wanted[1]).success
    with lower.family.working():
        for editor, prompt, target in ((lower, ONE, wanted[0]), (upper, TWO, wanted[1])):
            target = editor.family.encode_target(target, prompt)
            for family in (lower.family, upper.family):
                assert family.produces([prompt], [target], None) == [True]


def test_an_unedited_prompt_has_the_bits_of_the_model_and_detach_leaves_it_as_it_was(trained):
    model = trained("gpt2")
    before, plain = state_of(model), copy.deepcopy(model)
    lower = GraceEditor(model, None, GraceConfig(layer=LOWER["gpt2"], radius=0.5))
    upper = lower.add_layer(UPPER["gpt2"])
    assert upper.edit(TWO, TO_TWO).success
    assert torch.equal(logits_of(model, ONE), logits_of(plain, ONE))
    upper.detach()
    assert same(state_of(model), before)
    with pytest.raises(ValueError, match="detached"):
        lower.edit(ONE, TO_ONE)
    assert GraceEditor(model, None, GraceConfig(layer=LOWER["gpt2"])).layers.keys() == {
        LOWER["gpt2"]
    }


def test_an_edit_below_keys_the_edits_above_of_its_prompts_anew_as_fresh_ones(pair):
    lower, upper = pair(radius=5.0, upper={"radius": 9.5})
    asked = {"paraphrases": [THREE], "negatives": [NEAR]}
    first = upper.edit(ONE, TO_ONE, **asked)
    second = upper.edit(TWO, TO_TWO)
    old = list(upper.codebook.live_keys)
    queries = [upper.codebook.query_of(edit.id) for edit in old]
    assert lower.edit(NEAR, TO_TWO).success  # the negative alone
    assert torch.equal(upper.codebook.query_of(first.id), queries[0])
    assert upper.codebook.edit(first.id).radius != old[0].radius
    lower.undo()
    assert upper.codebook.live_keys == old
    assert lower.edit(ONE, TO_ONE, paraphrases=[NEAR]).success

    book = upper.codebook
    now = [(book.query_of(edit.id), edit.radius) for edit in book.live_keys]
    assert [edit.id for edit in book.live_keys] == [first.id, first.id + 1, second.id]
    assert not torch.equal(now[0][0], queries[0])  # reached
    assert torch.equal(now[1][0], queries[1])  # the paraphrase is not
    assert torch.equal(now[2][0], queries[2])
    assert old[0].radius != now[0][1] < 9.5
    book.check()
    assert upper.verify() == []
    assert upper.explain(ONE).edit_id == first.id
    assert generated(lower.model, [ONE, TWO, THREE], 3) == [TO_ONE, TO_TWO, TO_ONE]

    upper.delete(first.id)
    again = upper.edit(ONE, TO_ONE, **asked)
    for part, (query, radius) in zip((0, 1), now, strict=False):
        assert torch.equal(book.query_of(again.id + part), query)
        assert book.edit(again.id + part).radius == radius


@pytest.mark.parametrize("order", ["lower first", "upper first"])
def test_an_edit_that_would_cost_an_edit_of_another_layer_is_refused_with_the_reason(pair, order):
    earlier, later = pair() if order == "lower first" else pair()[::-1]
    assert earlier.edit(ONE, TO_ONE).success
    before = kept(earlier)
    refused = later.edit(ONE, TO_TWO)
    assert not refused.success
    assert refused.id is None
    assert f"edit 0 of layer {earlier.layer}" in refused.reason
    assert refused.reason.endswith("delete that first")
    assert unchanged(later, before)
    assert generated(later.model, [ONE], 3) == [TO_ONE]
    assert later.edit(TWO, TO_TWO).success
    later.undo()
    later.undo()
    assert [book.codebook.ids for book in later.layers.values()] == [[], []]


def test_an_edit_that_moves_a_key_above_over_its_own_prompt_is_refused(pair):
    lower, upper = pair(radius=1000.0, upper={"radius": 6.0})
    assert upper.edit(ONE, TO_TWO).success
    assert not upper.explain(NEAR).hit
    before = kept(lower)
    # Its answer is for both prompts, whose queries above come to lie near each other.
    result = lower.edit(NEAR, TO_ONE)
    assert not result.success
    assert result.reason.endswith("others answer")
    assert unchanged(lower, before)


def test_an_edit_of_a_prompt_that_a_layer_below_answers_is_made_with_that_answer_in_place(pair):
    lower, upper = pair(radius=1000.0, upper={"radius": 0.5})
    assert lower.edit(ONE, TO_ONE).success
    assert lower.explain(TWO).hit  # whatever it is asked
    result = upper.edit(TWO, TO_TWO)
    assert generated(lower.model, [ONE, TWO, THREE], 3)[:2] == [TO_ONE, TO_TWO]
    # What it was trained with is what is served, where both layers ask at the prompt's end.
    served = math.exp(upper.score(TWO, TO_TWO).log_probability)
    assert served == pytest.approx(result.probability, abs=1e-4)
    assert torch.equal(upper.codebook.query_of(0), upper.queries([TWO])[0])
    with lower.adaptor.using(absent=True):
        assert not torch.equal(upper.codebook.query_of(0), upper.queries([TWO])[0])


def test_deleting_below_keys_anew_above_and_undo_brings_every_bit_back_in_all_layers(pair):
    lower, upper = pair()
    assert upper.edit(ONE, TO_ONE).success
    original = upper.codebook.query_of(0)
    below = lower.edit(ONE, TO_ONE)
    assert not torch.equal(upper.codebook.query_of(0), original)
    before = kept(lower)
    lower.delete(below.id)
    assert torch.equal(upper.codebook.query_of(0), original)
    assert generated(lower.model, [ONE], 3) == [TO_ONE]
    upper.undo()  # of all layers there is one history
    assert unchanged(lower, before)
    assert lower.codebook.ids == upper.codebook.ids == [0]
    lower.codebook.count_hits = True
    assert lower.expire(0.0) == [0]
    assert torch.equal(upper.codebook.query_of(0), original)
    lower.undo()
    assert lower.codebook.ids == [0]
    assert not torch.equal(upper.codebook.query_of(0), original)
    lower.undo()
    assert torch.equal(upper.codebook.query_of(0), original)
    assert lower.codebook.ids == []
    lower.undo()
    assert upper.codebook.ids == []
    with pytest.raises(UndoError, match="nothing has changed"):
        lower.undo()


def test_a_delete_that_an_edit_above_does_not_survive_raises_and_changes_nothing(pair):
    lower, upper = pair()
    assert lower.edit(ONE, TO_ONE).success
    with upper.family.working():
        seen = upper.family.capture([ONE])
    # It answers with what the layer gives by itself below an edit: without that, for nothing.
    with lower.layers.changing():
        upper.codebook.insert(seen.queries[0], TO_ONE, seen.outputs[0], ONE)
    before = kept(lower)
    with pytest.raises(LayersError, match=f"edit 0 of layer {upper.layer} would no longer"):
        lower.delete(0)
    assert unchanged(lower, before)
    assert generated(lower.model, [ONE], 3) == [TO_ONE]
    upper.delete(0)
    lower.delete(0)
    assert generated(lower.model, [ONE], 3) == [run_of(14, 3)]


def test_a_batch_is_one_step_of_undo_and_a_refused_edit_in_it_stops_no_other(pair):
    lower, upper = pair()
    assert upper.edit(ONE, TO_ONE).success
    before = kept(lower)
    results = lower.edit_batch([(ONE, TO_TWO), (TWO, TO_TWO), (ONE, TO_ONE)])
    assert [result.success for result in results] == [False, True, True]
    assert generated(lower.model, [ONE, TWO], 3) == [TO_ONE, TO_TWO]
    lower.undo()
    assert unchanged(lower, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda book, query: book.delete(0),
        lambda book, query: book.delete_all([0]),
        lambda book, query: book.undo(),
        lambda book, query: book.insert(query, TO_TWO, torch.ones(book.values.shape[1])),
        lambda book, query: book.requery({0: (query, None)}),
        lambda book, query: book.take_over(Codebook(1, 1), "a test"),
    ],
    ids=["delete", "delete_all", "undo", "insert", "requery", "take_over"],
)
def test_a_change_of_a_codebook_by_itself_is_refused_with_the_remedy(answering, change):
    lower, upper = answering
    before = kept(lower)
    for editor in (lower, upper):
        with pytest.raises(ValueError, match=r"by its editor .* call edit, .* delete, expire"):
            change(editor.codebook, editor.codebook.keys[0] + 0.1)
    assert unchanged(lower, before)
    assert generated(lower.model, [ONE, TWO], 3) == [TO_ONE, TO_TWO]
    lower.undo()
    lower.undo()
    assert (lower.codebook.ids, upper.codebook.ids) == ([], [])


def test_a_codebook_may_forget_by_itself_which_ends_the_undo_and_not_the_editing(answering):
    lower, upper = answering
    upper.delete(0)
    assert upper.codebook.compact() == 1
    with pytest.raises(UndoError, match="compacted"):
        lower.undo()
    assert lower.edit(TWO, TO_TWO).success
    lower.undo()
    assert lower.codebook.ids == [0]
    with upper.codebook.transaction(), pytest.raises(ValueError, match="inside a transaction"):
        lower.edit(TWO, TO_TWO)


def test_an_interruption_leaves_all_layers_as_they_were(pair, monkeypatch):
    lower, upper = pair()
    assert upper.edit(ONE, TO_ONE).success
    before = kept(lower)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("grace_edit.reach.find_unproven", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lower.edit(ONE, TO_ONE)
    assert unchanged(lower, before)
    monkeypatch.undo()
    assert lower.edit(ONE, TO_ONE).success
    assert generated(lower.model, [ONE], 3) == [TO_ONE]


def test_text_keys_stay_and_their_edits_are_proven_where_a_layer_below_answers_too(trained):
    model = trained("gpt2")
    upper = text_editor(model, "gpt2")
    lower = upper.add_layer(LOWER["gpt2"], query="last", radius=0.5)
    assert list(upper.layers) == [lower.layer, upper.layer]  # the lower one first
    assert upper.edit(QUESTION, TARGET).success
    key, before = upper.codebook.query_of(0), kept(upper)
    assert not lower.edit(QUESTION, NEIGHBOUR).success
    assert unchanged(upper, before)
    assert lower.edit(QUESTION, TARGET).success
    assert torch.equal(upper.codebook.query_of(0), key)
    assert upper.answer(QUESTION, 3) == TARGET
    assert upper.adaptor.text.requests > 0
    asked = upper.adaptor.text.requests
    lower.undo()
    assert lower.edit(NEIGHBOUR, TARGET).success
    assert upper.adaptor.text.requests == asked  # an edit is no request


def test_disable_covers_all_layers_of_every_thread_or_of_one(answering):
    lower, upper = answering
    plain = [run_of(14, 3), run_of(46, 3)]
    query = upper.queries([ONE])
    with upper.disable():
        assert torch.equal(upper.queries([ONE]), query)  # as it would ask
        assert generated(lower.model, [ONE, TWO], 3) == plain
        assert lower.edit(THREE, TO_ONE).success  # with the other layer in place all the same
    found = []
    with lower.disable(thread_only=True):
        assert generated(lower.model, [ONE, TWO], 3) == plain
        serve = lambda: found.append(generated(lower.model, [ONE, TWO], 3))  # noqa: E731
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    assert found == [[TO_ONE, TO_TWO]]


def test_plain_forwards_are_told_of_prompts_for_all_layers(answering):
    lower, upper = answering
    whole = [*ONE, *TO_ONE]
    with lower.prompts([ONE, TWO]):
        assert logits_of(lower.model, whole)[len(ONE) - 1 : -1].argmax(-1).tolist() == TO_ONE
    with upper.prompts([ONE, TWO]):
        assert logits_of(lower.model, whole)[len(ONE) - 1 : -1].argmax(-1).tolist() == TO_ONE
    assert upper.score(ONE, TO_ONE).greedy
    assert lower.score(TWO, TO_TWO).greedy
    ids, mask = padded([ONE, TWO], left=False)
    last = torch.tensor([len(ONE) - 1, len(TWO) - 1])
    start = torch.arange(2) * ids.shape[1]
    plan = QueryPlan(start + last, start + last, start + last + 1, rows=ids.numel())
    with torch.no_grad(), lower.plan(plan):
        logits = lower.model(input_ids=ids, attention_mask=mask).logits
    assert logits[[0, 1], last].argmax(-1).tolist() == [TO_ONE[0], TO_TWO[0]]
    nobody = replace(plan, query_row=torch.full((2,), -1))
    with torch.no_grad(), lower.plan(nobody):
        logits = lower.model(input_ids=ids, attention_mask=mask).logits
    assert logits[[0, 1], last].argmax(-1).tolist() == [run_of(14, 1)[0], run_of(46, 1)[0]]
    with (
        torch.no_grad(),
        lower.plan(plan),
        pytest.raises(ValueError, match=r"outside editor\.plan"),
    ):
        generated(lower.model, [ONE], 1)


def test_edits_of_a_layer_are_no_hits_of_another(pair):
    lower, upper = pair(radius=1000.0, upper={"radius": 0.5})
    assert lower.edit(ONE, TO_ONE).success
    lower.codebook.count_hits = True
    assert upper.edit(TWO, TO_TWO).success
    assert lower.codebook.hits == {0: 0}
    generated(lower.model, [TWO], 2)
    assert lower.codebook.hits == {0: 1}


def test_all_layers_are_saved_and_loaded_in_one_step(answering, trained, tmp_path, monkeypatch):
    lower, upper = answering
    upper.save_pretrained(tmp_path / "edits")
    loaded = GraceEditor.from_pretrained(trained("gpt2"), None, tmp_path / "edits")
    assert list(loaded.layers) == [lower.layer, upper.layer]
    for mine, its in zip(storages(lower), storages(loaded), strict=True):
        assert snapshot.same(mine, its)
    assert generated(loaded.model, [ONE, TWO], 3) == [TO_ONE, TO_TWO]
    assert loaded.edit(THREE, TO_ONE).success
    loaded.undo()

    # A save that dies leaves all layers as they were, or all as they are now.
    assert upper.edit(THREE, TO_ONE).success
    assert lower.edit(OTHER, TO_TWO).success
    real, left = os.replace, [0]

    def dies(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*args)

    for renamed in range(5):
        left[0] = renamed
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dies)
            with pytest.raises(KeyboardInterrupt):
                lower.save_pretrained(tmp_path / "edits")
        books = store.load_saved(tmp_path / "edits", several=True)
        now = [0, 1] if renamed else [0]
        assert (books.codebook.ids, books.further[0].codebook.ids) == (now, now)
    lower.save_pretrained(tmp_path / "edits")

    model = trained("gpt2")
    adaptor = grace_edit.load(model, tmp_path / "edits")
    assert generated(model, [ONE, TWO, THREE], 3) == [TO_ONE, TO_TWO, TO_ONE]
    with adaptor.disabled():
        assert generated(model, [ONE, TWO], 3) == [run_of(14, 3), run_of(46, 3)]
    grace_edit.detach(model)

    single = GraceEditor(model, None, GraceConfig(layer=LOWER["gpt2"]))
    single.save_pretrained(tmp_path / "edits")
    assert not list((tmp_path / "edits").glob("layer-*"))
    assert len(GraceEditor.from_pretrained(trained("gpt2"), None, tmp_path / "edits").layers) == 1


def test_what_takes_one_layer_refuses_several_with_the_remedy(answering, trained, tmp_path):
    lower, upper = answering
    lower.save_pretrained(tmp_path)
    remedy = "GraceEditor.from_pretrained and grace_edit.load attach them all"
    for take in (
        store.load,
        store.load_all,
        lambda path: grace_edit.follow(trained("gpt2"), None, path, interval=None),
    ):
        with pytest.raises(StoreError, match=remedy):
            take(tmp_path)
    with pytest.raises(StoreError) as refused:
        store.load(tmp_path)
    assert describe_error(refused.value)[0] == 4  # at the command line a conflict
    with pytest.raises(NotServed, match=remedy):
        Described(str(tmp_path))
    with pytest.raises(ValueError, match="save_pretrained writes several"):
        grace_edit.publish(upper, tmp_path / "published")
    with pytest.raises(ValueError, match="continuous batching serves the edits of one layer"):
        lower.model.init_continuous_batching()
    (tmp_path / "layer-2.edits.jsonl").write_text("")
    with pytest.raises(StoreError, match=r"layer-2\.edits\.jsonl"):
        grace_edit.load(trained("gpt2"), tmp_path)


def test_a_layer_that_cannot_be_added_leaves_the_others_as_they_are(answering):
    lower, upper = answering
    for layer, why in (
        ("transformer.h.0", "inside another"),
        ("transformer.h.0.mlp.c_fc", "inside another"),
        (UPPER["gpt2"], "carry an adaptor already"),
        ("transformer.h.9.mlp", "is not in the model"),
        ("lm_head", "output projection"),
        ("transformer.wte", "layer must"),
    ):
        with pytest.raises(ValueError, match=why):
            lower.add_layer(layer)
        assert list(upper.layers) == [lower.layer, upper.layer]
    with pytest.raises(ValueError, match="policy"):
        lower.add_layer("transformer.h.1.mlp", policy="paper")
    assert generated(lower.model, [ONE, TWO], 3) == [TO_ONE, TO_TWO]
    third = upper.add_layer("transformer.h.1.mlp")
    assert list(third.layers) == [lower.layer, third.layer, upper.layer]
    assert third.edit(THREE, TO_ONE).success
    assert generated(lower.model, [ONE, TWO, THREE], 3) == [TO_ONE, TO_TWO, TO_ONE]


def test_rekey_makes_all_layers_anew_on_another_dtype_or_none(pair):
    lower, upper = pair()
    assert upper.edit(ONE, TO_ONE).success
    assert lower.edit(ONE, TO_ONE).success
    assert upper.edit(TWO, TO_TWO).success
    upper.codebook.frozen = True
    before = kept(lower)
    with pytest.raises(ValueError, match="frozen"):
        lower.rekey()
    assert unchanged(lower, before)
    lower.undo()
    assert upper.codebook.ids == [0], "what was done before can be undone"
    upper.codebook.frozen = False
    again = upper.edit(TWO, TO_TWO).id
    lower.model.to(torch.bfloat16)
    with lower.disable():
        assert [result.id for result in upper.rekey()] == [0, again]
    assert {book.codebook.keys.dtype for book in lower.layers.values()} == {torch.bfloat16}
    assert generated(lower.model, [ONE, TWO], 3) == [TO_ONE, TO_TWO]
    assert lower.verify() == upper.verify() == []


def test_editors_of_one_model_change_one_after_the_other(answering):
    lower, upper = answering
    done, errors = [], []

    def delete():
        try:
            lower.delete(0)
            done.append(lower.codebook.ids)
        except Exception as error:
            errors.append(error)

    with upper.codebook.changing():
        thread = threading.Thread(target=delete)
        thread.start()
        thread.join(0.3)
        assert (done, errors) == ([], [])
    thread.join()
    assert (done, errors) == ([[]], [])


@pytest.mark.parametrize("seed", [34, 53])
def test_after_every_change_all_edits_hold_and_what_is_known_of_queries_is_true(pair, seed):
    lower, upper = pair(radius=4.0)
    middle = lower.add_layer("transformer.h.1.mlp", radius=1.0)
    editors, choose = [lower, middle, upper], random.Random(seed)
    prompts = [run_of(8, 5), run_of(30, 3)]
    refused = 0
    for _ in range(9):
        editor = choose.choice(editors)
        what = choose.choice(["edit", "edit", "edit", "delete", "undo"])
        try:
            if what == "edit":
                target = run_of(choose.choice([20, 50]), 1)
                refused += not editor.edit(choose.choice(prompts), target).success
            elif what == "undo":
                editor.undo()
            elif editor.codebook.ids:
                editor.delete(choose.choice(editor.codebook.ids))
        except (LayersError, UndoError):
            refused += 1
        for one in editors:
            one.codebook.check()
            with one.family.working():
                live = one.codebook.live_keys
                for edit in live:
                    prompt = list(edit.prompt)
                    assert one.family.produces([prompt], [list(edit.label)], None) == [True]
                    assert torch.equal(one.codebook.query_of(edit.id), one.queries([prompt])[0])
                for prompt, query in lower.layers._reach._queries.get(one.layer, {}).items():
                    assert torch.equal(query, one.queries([list(prompt)])[0])
    assert refused


def test_other_queries_give_the_codebook_that_edits_made_with_them_give():
    source = torch.Generator().manual_seed(0)
    queries = torch.randn(24, 3, generator=source)
    moved = {prompt: torch.randn(3, generator=source) for prompt in (2, 5, 18)}
    books = [Codebook(3, 2, radius=0.8), Codebook(3, 2, radius=0.8)]
    for id, query in enumerate(queries):
        prompt = id - (id % 4 == 3)  # every fourth edit supersedes the one before
        for book, its in zip(books, (query, moved.get(prompt, query)), strict=True):
            book.insert(its, [id % 2], torch.full((2,), float(id)), [prompt])
    now = {prompt + (prompt != 5): (query, None) for prompt, query in moved.items()}
    books[0].requery(now)
    for book in books:
        book.check()
    made = [
        {
            (book.query_of(entry.owner).numpy().tobytes(), entry.label, entry.members, radius)
            for slot, radius in enumerate(book.radii[: int(book.count)].tolist())
            if (entry := book.storage.entry(slot)) is not None
        }
        for book in books
    ]
    assert made[0] == made[1]
    with pytest.raises(KeyError, match="must be that of an edit"):
        books[0].requery({99: (queries[0], None)})
