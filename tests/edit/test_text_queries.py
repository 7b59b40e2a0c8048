"""`query="text"`: the text of a prompt asks, once, before the layer runs, however it is served."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import transformers as tf
from grace_edit import Codebook, GraceConfig, GraceEditor, QueryPlan, detach
from grace_edit.adaptor import text_queries
from grace_edit.adaptor.text_queries import TextQueries
from text_models import (
    HASTY,
    NEIGHBOUR,
    OTHER,
    QUESTION,
    REWORDED,
    TARGET,
    TWO_SPANS,
    text_editor,
    tokenizer,
)
from tiny_models import CAUSAL, LAYERS, generated, padded, run_of, watching

import grace_kernels

WORDS = tokenizer()
MODES = pytest.mark.parametrize("replace", ["last", "prompt", "all"])


def ids_of(text):
    return WORDS(text, add_special_tokens=False).input_ids


def chat_of(*said):
    turns = [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]
    text = WORDS.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return ids_of(text)


ASKED, ANSWER = ids_of(QUESTION), ids_of(TARGET)
AGAIN, NEAR, FAR = ids_of(REWORDED), ids_of(NEIGHBOUR), ids_of(OTHER)


@pytest.fixture
def editor(trained, request):
    """Return an editor of the GPT-2 with the question edited, and rewordings close enough."""
    made = text_editor(trained("gpt2"), "gpt2")
    assert made.edit(QUESTION, TARGET).success
    return made


def edited(trained, name="gpt2", **config):
    made = text_editor(trained(name), name, **config)
    assert made.edit(QUESTION, TARGET).success
    return made


@MODES
@pytest.mark.parametrize("name", CAUSAL)
def test_alone_batched_padded_with_and_without_a_cache_the_tokens_are_the_same(
    trained, name, replace
):
    editor = edited(trained, name, replace=replace)
    own = generated(editor.model, [ASKED], 4)[0]
    assert own[:3] == ANSWER
    again = generated(editor.model, [AGAIN], 4)[0]
    with editor.disable():
        plain = generated(editor.model, [NEAR, FAR], 4)
        assert generated(editor.model, [AGAIN], 4)[0] != again
    for use_cache in (True, False):
        batch = generated(editor.model, [AGAIN, FAR, ASKED, NEAR], 4, use_cache=use_cache)
        assert batch == [again, plain[1], own, plain[0]]


def test_the_layer_runs_no_operator_and_each_request_is_looked_up_once(editor):
    asked = editor.adaptor.text.requests
    with watching(editor.model) as calls:
        generated(editor.model, [ASKED, FAR], 4)
        generated(editor.model, [ASKED, FAR], 4, use_cache=False)
    assert calls == [0] * 8
    assert editor.adaptor.text.requests == asked + 4


@MODES
def test_beams_sampling_and_several_sequences_get_the_answer(trained, replace):
    editor = edited(trained, replace=replace)
    beams = generated(editor.model, [FAR, ASKED], 3, num_beams=3)
    assert beams[1] == ANSWER
    with editor.disable():
        assert beams[0] == generated(editor.model, [FAR], 3, num_beams=3)[0]
    several = generated(editor.model, [ASKED], 3, num_beams=3, num_return_sequences=3)
    assert ANSWER in several
    sampled = generated(editor.model, [ASKED], 3, do_sample=True, top_k=1, num_return_sequences=3)
    assert sampled == [ANSWER] * 3


def test_a_static_cache_gives_the_same_tokens(trained):
    editor = edited(trained, "llama", replace="all")
    dynamic = generated(editor.model, [AGAIN, ASKED], 4)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert generated(editor.model, [AGAIN, ASKED], 4, **static) == dynamic
    assert dynamic[1][:3] == ANSWER


@pytest.mark.parametrize("size", [1, 3, 5, 8, 16])
def test_a_prefill_in_chunks_reads_the_whole_prompt(trained, size):
    editor = edited(trained, "llama")
    whole = generated(editor.model, [AGAIN, ASKED, FAR], 4)
    assert whole[1][:3] == ANSWER
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunked = generated(editor.model, [AGAIN, ASKED, FAR], 4, prefill_chunk_size=size)
    assert chunked == whole


def test_assisted_generation_reads_the_prompt_without_the_guesses(editor):
    prompt = [*ids_of(TARGET), *ASKED]
    assert not editor.explain([*prompt, *ids_of(OTHER)]).hit
    plain = generated(editor.model, [prompt], 4)
    assert generated(editor.model, [prompt], 4, prompt_lookup_num_tokens=3) == plain
    assistant = copy.deepcopy(editor.model)
    detach(assistant)
    assert generated(editor.model, [ASKED], 4, assistant_model=assistant)[0][:3] == ANSWER


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_later_turns_ask_with_the_users_last_turn_whether_the_history_is_given_or_cached(
    trained, name
):
    editor = edited(trained, name)
    first = chat_of(OTHER)
    cache = tf.DynamicCache()
    said = generated(editor.model, [first], 2, past_key_values=cache)[0]
    rest = ids_of("<end> <user> " + QUESTION + " <end> <assistant>")
    whole = [*first, *said, *rest]
    assert editor.explain(whole).hit
    plain = generated(editor.model, [whole], 3)[0]
    with editor.disable():
        assert generated(editor.model, [whole], 3)[0] != plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turned = generated(editor.model, [whole], 3, past_key_values=copy.deepcopy(cache))[0]
    assert turned == plain
    # Only the new tokens, under a mask of all of them: transformers takes that too.
    computed = cache.get_seq_length()
    new = torch.tensor([whole[computed:]])
    mask = torch.ones(1, len(whole), dtype=torch.long)
    out = editor.model.generate(
        new, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    assert out[0, new.shape[1] :].tolist() == plain


def test_a_chat_and_the_plain_sentence_are_the_same_query(trained):
    editor = edited(trained)
    chat = chat_of(OTHER, TARGET, QUESTION)
    found = editor.explain(chat)
    assert found.hit
    assert found.distance == 0
    assert not editor.explain(chat_of(QUESTION, TARGET, OTHER)).hit
    editor.undo()
    assert editor.edit(chat, ANSWER).success
    assert generated(editor.model, [chat], 3)[0] == ANSWER
    assert editor.explain(QUESTION).distance == 0
    assert editor.explain(REWORDED).hit


def test_plain_forwards_ask_with_all_that_the_mask_marks(editor):
    model = editor.model
    with torch.no_grad():
        alone = model(torch.tensor([ASKED])).logits[0, -1]
        assert int(alone.argmax()) == ANSWER[0]
        for left in (False, True):
            ids, mask = padded([ASKED, AGAIN, FAR], left=left)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=places).logits
            last = logits[:, -1] if left else logits[torch.arange(3), mask.sum(1) - 1]
            assert int(last[0].argmax()) == ANSWER[0]
            with editor.disable():
                plain = model(ids, attention_mask=mask, position_ids=places).logits
            changed = (logits != plain).any(dim=2).sum(dim=1).tolist()
            assert changed[0] >= 1
            assert changed[1] >= 1
            assert changed[2] == 0
        # With past nobody asks, unless a plan says so.
        past = model(torch.tensor([FAR]), use_cache=True).past_key_values
        step = model(torch.tensor([ASKED]), past_key_values=copy.deepcopy(past)).logits
        row = torch.tensor([len(ASKED) - 1])
        plan = QueryPlan(row, row, row + 1, answers=editor.answers([QUESTION]))
        with editor.plan(plan):
            planned = model(torch.tensor([ASKED]), past_key_values=past).logits
    assert not torch.equal(step, planned)
    assert int(planned[0, -1].argmax()) == ANSWER[0]


@torch.no_grad()
def test_what_the_mask_leaves_out_is_not_read_whatever_stands_there(editor):
    ids = torch.tensor([[*FAR, *ASKED], [*ASKED, *FAR]])
    assert [editor.explain(row).hit for row in ids.tolist()] == [False, False]
    mask = torch.ones_like(ids)
    mask[0, : len(FAR)] = mask[1, len(ASKED) :] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = editor.model(ids, attention_mask=mask, position_ids=places).logits
    assert logits[[0, 1], [-1, len(ASKED) - 1]].argmax(dim=1).tolist() == [ANSWER[0]] * 2
    out = editor.model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=3, do_sample=False)
    assert out[0, ids.shape[1] :].tolist() == ANSWER


def test_a_plan_without_answers_and_a_call_without_ids_are_refused(editor):
    row = torch.tensor([1])
    with (
        editor.plan(QueryPlan(row, row, row + 1)),
        pytest.raises(ValueError, match="plan must have"),
    ):
        editor.model(torch.tensor([ASKED]))
    embeds = editor.model.get_input_embeddings()(torch.tensor([ASKED]))
    with pytest.raises(ValueError, match="input_ids must be given"):
        editor.model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids must be given"):
        editor.model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with editor.disable():
        editor.model(inputs_embeds=embeds)


def test_an_edit_in_between_changes_no_answer_that_was_begun(editor):
    class Undo(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            if editor.codebook.edits:
                editor.undo()
            return scores

    ids = torch.tensor([ASKED])
    out = editor.model.generate(
        ids, max_new_tokens=3, do_sample=False, use_cache=False, logits_processor=[Undo()]
    )
    assert out[0, len(ASKED) :].tolist() == ANSWER
    assert generated(editor.model, [ASKED], 3)[0] != ANSWER


def test_undo_delete_and_disable(editor):
    with editor.disable():
        plain = generated(editor.model, [ASKED, AGAIN], 3)
    assert generated(editor.model, [ASKED], 3)[0] == ANSWER
    editor.delete(0)
    assert generated(editor.model, [ASKED, AGAIN], 3) == plain
    editor.undo()
    assert generated(editor.model, [ASKED], 3)[0] == ANSWER
    second = editor.edit(QUESTION, "six seven")
    assert second.success
    assert generated(editor.model, [ASKED], 2)[0] == ids_of("six seven")
    editor.undo()
    assert generated(editor.model, [ASKED], 3)[0] == ANSWER


def test_the_queries_have_the_same_bits_whatever_stands_beside(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    text = editor.adaptor.text
    one = text.rows(AGAIN).clone()
    fresh = TextQueries(text.keys, text.reader)
    assert torch.equal(fresh.rows(AGAIN), one)
    assert torch.equal(editor.queries([OTHER, REWORDED])[1], one[0])
    half = copy.deepcopy(editor.model).bfloat16()
    assert torch.equal(half.grace.text.rows(AGAIN), one)
    assert torch.equal(TextQueries(half.grace.text.keys, text.reader).rows(AGAIN), one)


def test_no_forward_is_run_for_queries(editor):
    runs = []
    handle = editor.model.register_forward_pre_hook(lambda *_: runs.append(1))
    editor.queries([QUESTION, OTHER])
    handle.remove()
    assert not runs


def test_two_threads_are_answered_at_once(editor):
    wanted = generated(editor.model, [ASKED, AGAIN, NEAR], 3)
    said = []

    def serve():
        for _ in range(6):
            said.append(generated(editor.model, [ASKED, AGAIN, NEAR], 3))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        assert editor.edit(OTHER, "nine ten").success
        editor.undo()
    for thread in threads:
        thread.join()
    assert said == [wanted] * 12


def test_the_same_edits_one_by_one_in_a_batch_and_verified(trained):
    edits = [(QUESTION, TARGET), (OTHER, "six seven"), (TWO_SPANS, "nine ten")]
    one, many = (text_editor(trained("gpt2"), "gpt2") for _ in range(2))
    for edit in edits:
        assert one.edit(*edit).success
    assert all(result.success and not result.fragile for result in many.edit_batch(edits))
    assert torch.equal(one.codebook.keys, many.codebook.keys)
    # Values are trained in a forward of several rows, whose last bits differ by machine: what they
    # make the model say counts.
    for prompt, _ in edits:
        assert many.answer(prompt, 2) == one.answer(prompt, 2)
    assert many.codebook.drift == 0
    assert many.codebook.keys.dtype == torch.float32
    assert many.verify() == []
    many.codebook.radii[0] = -1.0
    (lost,) = many.verify()
    assert (lost.edit_id, lost.distance) == (0, 0.0)


def test_rekeying_in_another_dtype_keeps_the_keys(editor):
    keys = editor.codebook.keys[:1].clone()
    editor.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"rekey\(\)"):
        editor.model(torch.tensor([ASKED]))
    (result,) = editor.rekey()
    assert result.success
    assert torch.equal(editor.codebook.keys[:1], keys)
    assert editor.codebook.values.dtype == torch.bfloat16
    assert generated(editor.model, [ASKED], 3)[0] == ANSWER


@pytest.mark.parametrize(("name", "target"), [("bert", 2), ("t5", TARGET), ("bert-mlm", "three")])
def test_encoders_take_edits_by_text(trained, name, target):
    editor = text_editor(trained(name), name)
    if name == "bert-mlm":
        asked, again = "The capital of Australia is <mask>", "the capital of Australia is <mask>"
        far = "The author called Smith wrote <mask>"
    else:
        asked, again, far = QUESTION, REWORDED, OTHER
    plain = editor.answer(far)
    assert editor.edit(asked, target).success
    assert editor.explain(again).hit
    assert not editor.explain(far).hit
    assert editor.answer(far) == plain
    prompts = [editor.family.encode(p) for p in (far, asked)]
    assert editor.family.produces([prompts[1]], [editor.codebook.edit(0).label], None) == [True]
    assert editor.family.produces(prompts, [editor.codebook.edit(0).label] * 2, None)[1]
    assert editor.verify() == []


def test_a_prompt_without_a_word_and_an_editor_without_a_tokenizer_are_refused(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    with pytest.raises(ValueError, match="must hold a word"):
        editor.edit("<pad> <bos>", TARGET)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        GraceEditor(
            trained("gpt2"),
            None,
            GraceConfig(layer=LAYERS["gpt2"], query="text", text_map=editor.config.text_map),
        )
    with pytest.raises(ValueError, match="text_map must be given"):
        GraceEditor(trained("gpt2"), WORDS, GraceConfig(layer=LAYERS["gpt2"], query="text"))


class Rows:
    """Keys of prompts that are numbers: what `TextQueries` asks with is given."""

    def __init__(self, rows):
        self.rows = rows

    def keys(self, text):
        return self.rows[int(text)]

    def text(self, ids):
        return str(ids[0])


@pytest.mark.parametrize("seed", range(6))
def test_the_nearest_row_of_a_prompt_decides_as_the_definition_says(seed):
    source = torch.Generator().manual_seed(seed)
    book = Codebook(3, 2, capacity=64)
    for number in range(24):
        key = torch.randint(-2, 3, (3,), generator=source).float()
        value = torch.full((2,), float(number))
        if not any(torch.equal(key, k) for k in book.keys[: int(book.count)]):
            book.insert(key, [number], value, prompt=[number])
    # Radii of any size, so that rows hit, miss beside a nearer key, and tie.
    count = int(book.count)
    book.radii[:count] = torch.rand(count, generator=source) * 2 - 0.3
    rows = [
        torch.randint(-5, 6, (int(n), 3), generator=source).float() / 2
        for n in torch.randint(1, 4, (60,), generator=source)
    ]
    text = TextQueries(Rows(rows), Rows(rows))
    prompts = [[n] for n in range(60)]
    together = text.answer(book, prompts)
    for n, its in enumerate(rows):
        slot, distance = grace_kernels.nearest(its, book.keys, book.radii, book.count)
        nearest = int(distance.argmin())  # the first of equal ones
        covered = bool(distance[nearest] <= book.radii[slot[nearest]])
        wanted = int(slot[nearest]) if covered else -1
        assert int(together.index[n]) == wanted
        assert int(text.answer(book, [[n]]).index) == wanted
        if covered:
            assert torch.equal(together.values[n], book.values[wanted])
    mixed = [n for n, its in enumerate(rows) if len({*(book.lookup(its)[0] >= 0).tolist()}) == 2]
    assert mixed, "the seed must show prompts of which one row hits and another misses"


def test_among_many_entries_the_nearest_row_of_a_prompt_decides_too():
    """As many as have a sketch, by which a row that misses is then asked how near it is."""
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(4200, 16, generator=source)
    radii = torch.where(torch.rand(4200, generator=source) < 0.5, 2.0, 0.1)
    book = Codebook.from_tensors(
        keys, torch.arange(4200.0)[:, None], radii, [(n,) for n in range(4200)], policy="nearest"
    )
    book.delete(4)
    assert book.sketch is not None
    assert book.sketch.active
    away = torch.randn(200, 2, 16, generator=source) * torch.rand(200, 2, 1, generator=source)
    rows = list(keys[torch.randint(4200, (200, 2), generator=source)] + 0.5 * away)
    dead = book.keys[int((book.radii == -float("inf")).nonzero()[0])]  # which decides nothing
    rows.append(torch.stack([dead, keys[5] + 0.001]))
    text = TextQueries(Rows(rows), Rows(rows))
    found = text.answer(book, [[n] for n in range(201)]).index.tolist()
    slot, distance = grace_kernels.nearest(torch.cat(rows), book.keys, book.radii, book.count)
    covered = distance <= book.radii[slot]
    best = torch.arange(201) * 2 + distance.view(201, 2).argmin(dim=1)
    assert found == torch.where(covered, slot, -1)[best].tolist()
    assert found[-1] == 5
    doubtful = covered.view(201, 2).sum(dim=1) == 1
    assert int(doubtful.sum()) > 50
    assert 0 < int((doubtful & ~covered[best]).sum()) < int(doubtful.sum())


def test_the_own_prompt_of_an_edit_is_answered_by_it_where_two_spans_are_equally_near(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    assert len(editor.adaptor.text.rows(ids_of(TWO_SPANS))) == 2
    assert editor.edit(HASTY, "nine ten").success
    assert editor.edit(TWO_SPANS, TARGET).success
    assert editor.explain(TWO_SPANS).edit_id == 1
    assert generated(editor.model, [ids_of(TWO_SPANS)], 3)[0] == ANSWER
    assert editor.verify() == []


def test_the_rows_of_a_prompt_are_made_once_and_not_kept_for_ever(editor, monkeypatch):
    made = []
    text = editor.adaptor.text
    keys = type(text.keys).keys
    monkeypatch.setattr(type(text.keys), "keys", lambda own, t: made.append(t) or keys(own, t))
    monkeypatch.setattr(text_queries, "_KEPT", 2)
    generated(editor.model, [FAR, FAR], 2, num_beams=2)
    assert len(made) == 1
    for n in range(4):
        text.rows(run_of(n, 3))
    text.rows(FAR)
    assert len(made) == 6


def test_explaining_says_which_words_and_which_part_decided(editor):
    found = editor.explain(REWORDED)
    assert found.hit
    assert found.text.span == "The capital city of Australia is"
    assert found.text.subject == ["Australia"] == found.text.shared
    assert found.text.edit_span == QUESTION
    assert found.text.decides == "meaning"
    assert found.text.meaning + found.text.lexical == pytest.approx(found.distance**2, rel=1e-4)
    missed = editor.explain(NEIGHBOUR)
    assert not missed.hit
    assert missed.text.decides == "lexical"
    assert set(missed.text.unshared) == {"Austria", "Australia"}
    assert editor.explain(QUESTION).text.decides is None
    editor.undo()
    empty = editor.explain(NEIGHBOUR)
    assert empty.edit_id is None
    assert empty.text.subject == ["Austria"]
    assert empty.to_dict()["text"]["edit_span"] is None


def test_status_names_what_makes_the_keys_and_what_they_cost(editor):
    assert editor.status()["text"]["us_per_request"] is None
    generated(editor.model, [ASKED, FAR], 2)
    text = editor.status()["text"]
    assert (text["encoder"], text["map"], text["width"]) == ("tokens", "tiny", 64)
    assert text["requests"] == 2
    assert text["us_per_request"] > 0
    assert editor.status()["query"] == "text"
    assert editor.status()["fragile"] == []
