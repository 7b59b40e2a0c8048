"""Generation: one lookup per sequence, the same tokens however they are computed."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, QueryPlan
from tiny_models import (
    CAUSAL,
    EOS,
    LAYERS,
    generated,
    logits_of,
    padded,
    run_of,
    watching,
)

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHERS = [run_of(40, 6), run_of(3, 2), run_of(22, 9)]
FOLLOWS = [run_of(46, 5), run_of(5, 5), run_of(31, 5)]
MODES = [("last", "last"), ("prompt", "last"), ("all", "last"), ("last", "mean"), ("all", "mean")]
mode = pytest.mark.parametrize(("replace", "query"), MODES, ids=["-".join(m) for m in MODES])


def answers(editor, length=5, **kwargs):
    return generated(editor.model, [PROMPT], length, **kwargs)[0]


@mode
def test_with_and_without_the_cache_alone_and_in_a_padded_batch_the_tokens_are_the_same(
    edited, replace, query
):
    editor = edited("gpt2", replace=replace, query=query)
    assert editor.edit(PROMPT, TARGET).success
    cached = answers(editor)
    assert cached[:3] == TARGET
    assert answers(editor, use_cache=False) == cached
    for use_cache in (True, False):
        batch = generated(editor.model, [OTHERS[0], PROMPT, *OTHERS[1:]], 5, use_cache=use_cache)
        assert batch[1] == cached
        assert [batch[0], *batch[2:]] == FOLLOWS
        turned = generated(editor.model, [*OTHERS[1:], PROMPT, OTHERS[0]], 5, use_cache=use_cache)
        assert turned == [*batch[2:], batch[1], batch[0]]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_causal_families_answer_alike_with_and_without_the_cache_and_batched(edited, name):
    editor = edited(name)
    assert editor.edit(PROMPT, TARGET).success
    cached = answers(editor)
    assert cached[:3] == TARGET
    assert answers(editor, use_cache=False) == cached
    assert generated(editor.model, [OTHERS[2], PROMPT], 5) == [FOLLOWS[2], cached]


@mode
def test_generated_tokens_are_never_looked_up_however_large_the_radius(edited, replace, query):
    editor = edited("gpt2", replace=replace, query=query, radius=1000.0)
    assert editor.edit(PROMPT, TARGET).success
    assert answers(editor)[:3] == TARGET
    assert answers(editor, use_cache=False)[:3] == TARGET
    with watching(editor.model) as calls:
        answers(editor)
    assert calls == [1, 0, 0, 0, 0]
    with watching(editor.model) as calls:
        answers(editor, use_cache=False)
    assert calls == [1, 0, 0, 0, 0]


def test_a_prompt_of_one_token_is_looked_up_once_and_its_continuation_is_not(edited):
    editor = edited("gpt2", radius=0.5)
    prompt = run_of(7, 1)
    assert editor.edit(prompt, TARGET).success
    assert generated(editor.model, [prompt], 3)[0] == TARGET
    assert generated(editor.model, [prompt], 3, use_cache=False)[0] == TARGET
    with watching(editor.model) as calls:
        generated(editor.model, [prompt, run_of(20, 1)], 3)
    assert calls == [1, 0, 0]
    assert generated(editor.model, [OTHERS[0], prompt], 3)[1] == TARGET


@mode
def test_a_prefill_in_chunks_gives_the_same_tokens(edited, replace, query):
    editor = edited("llama", replace=replace, query=query)
    assert editor.edit(PROMPT, TARGET).success
    whole = generated(editor.model, [PROMPT, OTHERS[2]], 4)
    assert whole[0][:3] == TARGET
    for size in (1, 3, 4, 8, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert generated(editor.model, [PROMPT, OTHERS[2]], 4, prefill_chunk_size=size) == whole


def test_a_chunked_prefill_looks_up_in_the_chunk_that_holds_the_end_only(edited):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    with watching(editor.model) as calls:
        assert generated(editor.model, [OTHERS[2]], 3, prefill_chunk_size=4)[0] == FOLLOWS[2][:3]
    # Chunks of 4, 4 and 1 tokens, then two decode steps; a chunk in which nobody asks may run one.
    assert calls[2:] == [1, 0, 0]


def test_chunks_given_up_for_a_mode_that_needs_the_whole_prompt_are_warned_about(edited):
    editor = edited("llama", replace="prompt")
    assert editor.edit(OTHERS[2], TARGET).success
    with pytest.warns(UserWarning, match="prefill_chunk_size is ignored: replace='prompt'"):
        assert generated(editor.model, [OTHERS[2]], 3, prefill_chunk_size=4) == [TARGET]
    config = editor.model.generation_config
    config.prefill_chunk_size = 4
    with pytest.warns(UserWarning, match="prefill_chunk_size is ignored"):
        assert generated(editor.model, [OTHERS[2]], 3) == [TARGET]
    assert config.prefill_chunk_size == 4


@mode
def test_a_static_cache_gives_the_same_tokens(edited, replace, query):
    editor = edited("llama", replace=replace, query=query)
    assert editor.edit(PROMPT, TARGET).success
    dynamic = generated(editor.model, [PROMPT, OTHERS[2]], 5)
    editor.model.generation_config.disable_compile = True
    static = generated(editor.model, [PROMPT, OTHERS[2]], 5, cache_implementation="static")
    assert static == dynamic


@mode
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_beam_search_answers_in_every_beam(edited, replace, query, use_cache):
    editor = edited("gpt2", replace=replace, query=query)
    assert editor.edit(PROMPT, TARGET).success
    kwargs = {"num_beams": 3, "use_cache": use_cache}
    assert answers(editor, 3, **kwargs) == TARGET
    batch = generated(editor.model, [OTHERS[0], PROMPT], 3, **kwargs)
    assert batch == [FOLLOWS[0][:3], TARGET]
    several = generated(editor.model, [PROMPT], 3, num_return_sequences=3, **kwargs)
    assert several[0] == TARGET
    assert len({tuple(row) for row in several}) == 3


def test_sampling_with_a_seed_gives_the_same_tokens_with_and_without_the_cache(edited):
    editor = edited("gpt2", margin=6.0)
    assert editor.edit(PROMPT, TARGET).success
    found = []
    for use_cache in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            found.append(
                generated(
                    editor.model,
                    [PROMPT],
                    3,
                    do_sample=True,
                    num_return_sequences=4,
                    use_cache=use_cache,
                )
            )
    assert found[0] == found[1]
    assert found[0].count(TARGET) >= 2


def test_serving_draws_no_random_numbers(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    before = torch.random.get_rng_state()
    answers(editor)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("given", ["everything", "new-tokens"])
def test_the_next_turn_asks_at_its_own_end_with_the_first_in_the_cache(edited, given, replace):
    editor = edited("llama", replace=replace)
    model = editor.model
    first = torch.tensor([OTHERS[0]])
    second = torch.tensor([PROMPT])
    whole = torch.cat([first, torch.tensor([FOLLOWS[0][:2]]), second], dim=1)
    assert editor.edit(whole[0].tolist(), TARGET).success
    expected = generated(model, [whole[0].tolist()], 4)[0]
    assert expected[:3] == TARGET

    turn = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = turn.past_key_values
    seen = cache.get_seq_length()
    assert turn.sequences[0, 6:8].tolist() == FOLLOWS[0][:2]
    assert seen == 8
    ids = whole if given == "everything" else second
    with watching(model) as calls, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
        )
    told = [str(w.message) for w in warned if "past_key_values holds earlier" in str(w.message)]
    assert len(told) == (replace != "last")
    assert all(f"replace='{replace}'" in text for text in told)
    # What was computed before the second turn's prompt is not replaced: only "last" is exact.
    if replace == "last":
        assert out[0, ids.shape[1] :].tolist() == expected
    assert calls == [1, 0, 0, 0]


def test_a_later_turn_with_a_pooled_query_warns(edited):
    editor = edited("llama", query="mean")
    assert editor.edit(PROMPT, TARGET).success
    ids = torch.tensor([OTHERS[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turn = editor.model.generate(
            ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
    with pytest.warns(UserWarning, match="past_key_values holds.*query='mean'"):
        editor.model.generate(
            turn.sequences, past_key_values=turn.past_key_values, max_new_tokens=2, do_sample=False
        )


def test_generate_inside_a_plan_is_refused(edited):
    editor = edited("llama")
    row = torch.tensor([3])
    with editor.plan(QueryPlan(row, row, row + 1)):
        with pytest.raises(ValueError, match=r"generate must be called outside editor\.plan"):
            answers(editor)


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_edit_while_text_is_generated_does_not_change_the_answer_that_was_begun(
    edited, use_cache
):
    editor = edited("gpt2", replace="all")
    result = editor.edit(PROMPT, TARGET)
    assert result.success
    expected = answers(editor, use_cache=use_cache)

    class Deletes:
        tokens = 0

        def put(self, value):
            self.tokens += 1
            if self.tokens == 2:  # the prompt, then the first token
                editor.delete(result.id)

        def end(self):
            pass

    assert answers(editor, use_cache=use_cache, streamer=Deletes()) == expected
    assert answers(editor) == run_of(14, 5)


def test_the_next_turn_without_a_mask_asks_at_its_end(edited):
    editor = edited("llama")
    model = editor.model
    whole = [*OTHERS[0], *FOLLOWS[0][:2], *PROMPT]
    assert editor.edit(whole, TARGET).success
    turn = model.generate(
        torch.tensor([OTHERS[0]]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    out = model.generate(
        torch.tensor([whole]),
        past_key_values=turn.past_key_values,
        max_new_tokens=3,
        do_sample=False,
    )
    assert out[0, len(whole) :].tolist() == TARGET


def test_prompts_may_come_by_position_by_either_name_and_without_a_mask(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    ids = torch.tensor([PROMPT])
    calls = [
        lambda **k: editor.model.generate(ids, **k),
        lambda **k: editor.model.generate(inputs=ids, **k),
        lambda **k: editor.model.generate(input_ids=ids, **k),
        lambda **k: editor.model.generate(ids, attention_mask=torch.ones_like(ids), **k),
    ]
    for call in calls:
        assert call(max_new_tokens=3, do_sample=False)[0, 4:].tolist() == TARGET


def test_embeddings_in_place_of_ids_are_answered(edited):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    model = editor.model
    embeds = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    for mask in (None, torch.ones(1, 4, dtype=torch.long)):
        out = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=3, do_sample=False
        )
        assert out[0].tolist() == TARGET


def test_a_generation_config_object_works_as_keywords_do(edited):
    from transformers import GenerationConfig

    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    config = GenerationConfig(max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)
    out = editor.model.generate(torch.tensor([PROMPT]), generation_config=config)
    assert out[0, 4:].tolist() == TARGET
    assert config.to_dict()["max_new_tokens"] == 3


def test_a_streamer_gets_the_edited_tokens(edited):
    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    streamer = Collect()
    answers(editor, 3, streamer=streamer)
    assert streamer.tokens == [*PROMPT, *TARGET, "end"]


def test_assisted_generation_gives_the_edited_tokens(edited, trained):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    plain = answers(editor, 6)
    assert plain[:3] == TARGET
    assert answers(editor, 6, assistant_model=trained("llama")) == plain
    assert answers(editor, 6, prompt_lookup_num_tokens=2) == plain


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("leaves_after", [1, 2], ids=["below the layer", "above it"])
def test_an_assistant_that_leaves_early_is_no_reason_for_a_warning(edited, replace, leaves_after):
    editor = edited("llama", replace=replace)
    assert editor.edit(PROMPT, TARGET).success
    plain = answers(editor, 6)
    assert plain[:3] == TARGET
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers(editor, 6, assistant_early_exit=leaves_after) == plain


def test_batched_t5_generates_the_target_with_beams_and_without_the_cache(edited):
    editor = edited("t5")
    target = [*TARGET, EOS]
    assert editor.edit(PROMPT, target).success
    rows = [run_of(40, 6), PROMPT, run_of(3, 3)]
    ids, mask = padded(rows, left=False)
    plain = editor.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert plain[1, 1:5].tolist() == target
    assert plain[0, 1:5].tolist() == run_of(46, 4)
    for kwargs in ({"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}):
        out = editor.model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **kwargs
        )
        assert out[1, 1:5].tolist() == target
    with watching(editor.model.get_encoder()) as calls:
        editor.model.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert calls == [1]


def test_unedited_prompts_generate_what_the_unedited_model_does_and_disable_brings_it_back(
    edited, trained
):
    editor = edited("gpt2")
    plain = trained("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    rows = [run_of(s, 5) for s in range(0, 60, 7)]
    assert generated(editor.model, rows, 6) == generated(plain, rows, 6)
    with editor.disable():
        assert answers(editor) == generated(plain, [PROMPT], 5)[0]
        assert torch.equal(logits_of(editor.model, PROMPT), logits_of(plain, PROMPT))
    assert answers(editor)[:3] == TARGET


def test_an_exception_inside_generate_leaves_nothing_behind(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success

    class Stop(Exception):
        pass

    class Streamer:
        def put(self, value):
            raise Stop

        def end(self):
            pass

    with pytest.raises(Stop):
        answers(editor, streamer=Streamer())
    assert editor.adaptor.generation is None
    assert editor.adaptor.plan is None
    assert answers(editor)[:3] == TARGET


@pytest.mark.parametrize("name", CAUSAL)
def test_a_layer_named_without_its_prefix_generates_too(trained, name):
    short = LAYERS[name].split(".", 1)[1]
    editor = GraceEditor(trained(name), None, GraceConfig(layer=short))
    assert editor.layer == LAYERS[name]
    assert editor.edit(PROMPT, TARGET).success
    assert answers(editor)[:3] == TARGET


@mode
@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_leaves_unedited_prompts_alone_and_edited_ones_edited(
    edited, trained, replace, query, use_cache
):
    editor, plain = edited("llama", replace=replace, query=query), trained("llama")
    how = {"guidance_scale": 1.5, "use_cache": use_cache}
    rows = [OTHERS[0], PROMPT, OTHERS[2]]
    for negative in (None, torch.tensor([run_of(50, 4)] * 3)):
        given = {**how, "negative_prompt_ids": negative}
        assert generated(editor.model, rows, 3, **given) == generated(plain, rows, 3, **given)
    assert editor.edit(PROMPT, TARGET).success
    for negative in (None, torch.tensor([run_of(50, 4)] * 3)):
        given = {**how, "negative_prompt_ids": negative}
        expected = generated(plain, rows, 3, **given)
        got = generated(editor.model, rows, 3, **given)
        assert [got[0], got[2]] == [expected[0], expected[2]]
        # Where generated rows are replaced too, guidance drives them away from the unguided ones.
        assert got[1][:1] == TARGET[:1] if replace == "all" else got[1] == TARGET


def test_a_processor_that_asks_the_model_for_another_prompt_gets_that_prompts_answer(
    edited, trained
):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    asked = []

    def process(ids, scores):
        for row in (PROMPT, OTHERS[0], OTHERS[1]):
            asked.append(int(logits_of(editor.model, row)[-1].argmax()))
        return scores

    assert generated(editor.model, [OTHERS[2]], 3, logits_processor=[process]) == [FOLLOWS[2][:3]]
    assert asked == [TARGET[0], FOLLOWS[0][0], FOLLOWS[1][0]] * 3
    asked.clear()
    assert generated(editor.model, [PROMPT], 3, logits_processor=[process]) == [TARGET]
    assert asked == [TARGET[0], FOLLOWS[0][0], FOLLOWS[1][0]] * 3


def test_a_value_is_proven_for_the_prompt_alone_where_generation_is_guided(edited):
    editor = edited("llama")
    editor.model.generation_config.guidance_scale = 1.5
    layer, seen = editor.model.get_submodule(editor.layer), []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out[0, -1].clone()))
    value = torch.full((1, 48), 3.0)
    with editor.family.answering(value):
        editor.family.generate([PROMPT], 2)
    handle.remove()
    # The prompt, its last token as guidance asks it, and a step of either.
    assert [bool((row == 3.0).all()) for row in seen] == [True, False, False, False]
    assert editor.edit(PROMPT, TARGET).success
    assert answers(editor, 3) == TARGET


@mode
@pytest.mark.parametrize("how", ["own", "of the class", "calls ours"])
def test_a_prepare_inputs_that_is_set_on_the_instance_does_not_leave_the_edits_out(
    edited, trained, replace, query, how
):
    model = trained("llama")
    keep = model.prepare_inputs_for_generation  # as prompt tuning has it from before
    editor = GraceEditor(model, None, GraceConfig(LAYERS["llama"], replace=replace, query=query))
    assert editor.edit(PROMPT, TARGET).success
    expected = {c: answers(editor, 5, use_cache=c) for c in (True, False)}
    assert expected[True][:3] == TARGET
    ours = model.prepare_inputs_for_generation
    given = {
        "own": keep,
        "of the class": types.MethodType(
            type(model).grace_base.prepare_inputs_for_generation, model
        ),
        "calls ours": lambda *args, **kwargs: ours(*args, **kwargs),
    }[how]
    for _ in range(2):
        model.prepare_inputs_for_generation = given
        for use_cache in (True, False):
            assert answers(editor, 5, use_cache=use_cache) == expected[use_cache]
        batch = generated(model, [OTHERS[0], PROMPT], 5)
        assert batch == [FOLLOWS[0], expected[True]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert answers(editor, 5, prefill_chunk_size=2) == expected[True]
    editor.detach()
    assert model.__dict__["prepare_inputs_for_generation"] is given
    assert generated(model, [PROMPT], 3) == [run_of(14, 3)]


def test_rows_that_prompt_tuning_puts_before_the_prompt_are_not_taken_for_it(edited):
    editor = edited("llama")
    model = editor.model
    own, table = model.prepare_inputs_for_generation, model.get_input_embeddings()
    virtual = table(torch.tensor([[50, 51]])).detach()

    def prepare(ids, **kwargs):
        first = kwargs["past_key_values"].get_seq_length() == 0
        mask = kwargs.pop("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        mask = torch.cat([torch.ones(len(ids), 2).long(), mask], dim=1)
        inputs = own(ids, attention_mask=mask, **{**kwargs, "position_ids": None})
        inputs["attention_mask"], inputs["position_ids"] = mask, None
        if first:
            rows = torch.cat([virtual.expand(len(ids), -1, -1), table(ids)], dim=1)
            inputs |= {"input_ids": None, "inputs_embeds": rows}
        return inputs

    model.prepare_inputs_for_generation = prepare
    seen = []
    layer = model.get_submodule(editor.layer)
    before = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    generated(model, [PROMPT], 1)
    before.remove()
    assert len(seen[0]) == 2 + len(PROMPT)
    value = torch.full_like(seen[0][-1], 3.0)
    editor.codebook.insert(seen[0][-1], [9], value)
    after = layer.register_forward_hook(lambda _, args, out: seen.append(out[0].clone()))
    generated(model, [PROMPT], 2)
    after.remove()
    assert torch.equal(seen[1][-1], value)
    assert not (seen[1][:-1] == 3.0).all(dim=1).any()


def test_a_generate_that_is_set_on_the_instance_is_reported(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    assert editor.status()["shadowed"] == []
    own = type(editor.model).grace_base.generate
    editor.model.generate = types.MethodType(own, editor.model)
    assert editor.status()["shadowed"] == ["generate"]
    assert answers(editor, 3) == TARGET
