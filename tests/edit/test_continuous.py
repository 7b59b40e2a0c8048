"""Continuous batching (`generate_batch`) gives the tokens of one-by-one generation.

Batches are made small, so that prompts come in pieces and behind generated tokens of others, and
caches so small that requests are thrown out and computed again.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from batch_steps import EDITED, PAGE, PROMPTS, Steps, alone, batched, make_editor, plant
from grace_edit.adaptor.attach import attach
from tiny_models import run_of

LONG = 120  # seconds that nothing here takes


@pytest.fixture(params=["last", "text"])
def editor(request) -> Any:
    return make_editor(request.param)


@pytest.fixture
def edited(editor) -> Any:
    for n in EDITED:
        plant(editor, PROMPTS[n])
    return editor


def test_generate_batch_gives_the_tokens_of_one_by_one_generation(editor):
    unedited = alone(editor.model, PROMPTS)
    assert batched(editor.model, PROMPTS) == unedited
    for n in EDITED:
        plant(editor, PROMPTS[n])
    want = alone(editor.model, PROMPTS)
    changed = [a != b for a, b in zip(want, unedited, strict=True)]
    assert changed[: len(EDITED)] == [True] * len(EDITED)
    assert False in changed
    assert batched(editor.model, PROMPTS) == want


@pytest.mark.parametrize("tokens", [1, 64])
def test_prompts_in_pieces_of_any_size_ask_once(edited, tokens):
    want = alone(edited.model, PROMPTS)
    hit = sum(edited.explain(prompt).hit for prompt in PROMPTS)
    edited.codebook.count_hits = True
    steps = Steps(edited.model, max_batch_tokens=tokens)
    assert list(steps.run(PROMPTS)) == want
    assert sum(edited.codebook.hits.values()) == hit


def test_a_cache_too_small_throws_requests_out_and_they_come_back_edited(edited):
    want = alone(edited.model, PROMPTS, 12)
    steps = Steps(edited.model, length=12, num_blocks=14, max_batch_tokens=8)
    assert steps.run(PROMPTS) == want
    assert steps.thrown_out > 2


def test_a_request_thrown_out_keeps_its_answer_whatever_happens_to_the_edits(editor):
    # Its prompt of 8 ends in the second of three pieces: that one gives no token.
    prompt = PROMPTS[4]
    id = plant(editor, prompt)
    want = alone(editor.model, [prompt])[0]
    editor.codebook.count_hits = True
    steps = Steps(editor.model)
    name = steps.add(prompt)
    steps.until(name, 3)
    editor.delete(id)
    assert alone(editor.model, [prompt])[0] != want
    steps.evict(name)
    steps.until(name, 1)
    steps.evict(name)
    assert steps.finish()[name] == want
    assert steps.thrown_out == 2


def test_an_edit_answers_requests_added_afterwards(editor):
    prompt, other = PROMPTS[4], PROMPTS[6]
    before = alone(editor.model, [prompt, other])
    steps = Steps(editor.model)
    first = steps.add(prompt)
    steps.until(first, 2)
    id = plant(editor, prompt)
    after = alone(editor.model, [prompt])[0]
    second, third = steps.add(prompt), steps.add(other)
    steps.until(second, 1)
    editor.delete(id)
    fourth = steps.add(prompt)
    ended = steps.finish()
    assert [ended[name] for name in (first, third, fourth)] == [*before, before[0]]
    assert ended[second] == after != before[0]


def test_a_request_answered_by_its_text_is_so_from_when_it_was_added():
    editor = make_editor("text")
    prompt = PROMPTS[4]
    unedited = alone(editor.model, [prompt])[0]
    steps = Steps(editor.model)
    first = steps.add(prompt)
    id = plant(editor, prompt)
    answered = alone(editor.model, [prompt])[0]
    second = steps.add(prompt)
    editor.delete(id)
    assert steps.finish() == {first: unedited, second: answered}


def test_what_requests_share_comes_from_before_no_edit_and_holds_no_replaced_row(editor):
    """Prompts that continue each other, each added once what it could share is there."""
    short = run_of(33, 2 * PAGE)  # its end fills a block
    unedited = alone(editor.model, [short])[0]
    prompts = [short, [*short, *unedited], [*short, *run_of(2, PAGE + 1)]]
    prompts.append([*prompts[1], *run_of(9, 3)])
    steps = Steps(editor.model)

    def each_is_right() -> None:
        want = alone(editor.model, prompts)
        for prompt, tokens in [*zip(prompts, want, strict=True)] * 2:
            name = steps.add(prompt)
            assert steps.finish() == {name: tokens}

    each_is_right()
    assert steps.matched > 4 * len(short)
    id = plant(editor, short)
    assert alone(editor.model, [short])[0] != unedited
    each_is_right()
    # What it says now, and then something else, shares no more than the prompt.
    prompts.append([*short, *alone(editor.model, [short])[0], *run_of(9, 3)])
    each_is_right()
    longer = plant(editor, prompts[1], 7)
    each_is_right()
    editor.delete(longer)
    each_is_right()
    editor.delete(id)
    each_is_right()


def test_a_request_thrown_out_shares_nothing_behind_its_answer(editor):
    """Though a longer prompt, unedited, has computed the very tokens that it generated."""
    prompt = run_of(33, 2 * PAGE)
    plant(editor, prompt)
    want = alone(editor.model, [prompt], 12)[0]
    steps = Steps(editor.model, length=12)
    name = steps.add(prompt)
    steps.until(name, 6)
    longer = [*prompt, *want[:6], *run_of(9, 3)]
    steps.until(steps.add(longer), 1)
    assert len(steps.state(name).generated_tokens) < 12
    matched = steps.matched
    steps.evict(name)
    assert steps.finish()[name] == want
    assert steps.matched - matched == len(prompt) - PAGE


def test_edits_from_another_thread_while_batches_run(editor):
    prompts = [PROMPTS[n] for n in EDITED]
    before = alone(editor.model, prompts)
    for n, prompt in enumerate(prompts):
        plant(editor, prompt, n)
    after = alone(editor.model, prompts)
    editor.codebook.undo_limit = 10**6
    for _ in prompts:
        editor.undo()
    manager = editor.model.init_continuous_batching(**Steps.settings())
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for n, prompt in enumerate(prompts):
                plant(editor, prompt, n)
            for _ in prompts:
                editor.undo()

    thread = threading.Thread(target=change, daemon=True)
    manager.start()
    thread.start()
    try:
        names = [manager.add_request(prompt) for _ in range(4) for prompt in prompts]
        ended: dict[str, Any] = {}
        while len(ended) < len(names):
            result = manager.get_result(timeout=LONG)
            assert result is not None
            assert result.error is None
            ended[result.request_id] = result.generated_tokens
    finally:
        stop.set()
        thread.join(LONG)
        manager.stop(timeout=LONG)
    for n, name in enumerate(names):
        assert ended[name] in (before[n % len(prompts)], after[n % len(prompts)])


@pytest.mark.parametrize("replace", ["prompt", "all"])
def test_answers_by_text_replace_what_they_would_in_one_forward(replace):
    editor = make_editor("text", replace)
    for n in EDITED:
        plant(editor, PROMPTS[n])
    want = alone(editor.model, PROMPTS)
    steps = Steps(editor.model, max_batch_tokens=3)
    for _ in range(2):  # the second time from shared blocks
        assert steps.run(PROMPTS) == want
    assert steps.matched > 0
    if replace != "all":
        return
    name = steps.add(PROMPTS[4])
    steps.until(name, 3)
    steps.evict(name)
    assert steps.finish()[name] == want[4]


def test_several_sequences_of_a_request_have_its_answer(edited):
    prompts = [PROMPTS[1], PROMPTS[4], PROMPTS[6]]
    want = alone(edited.model, prompts)
    steps = Steps(edited.model, sampling={"do_sample": True, "top_k": 1}, sequences=3)
    names = [steps.add(prompt) for prompt in prompts]
    ended = steps.finish()
    for name, tokens in zip(names, want, strict=True):
        forks = [f"{name}__child#{n}" for n in range(2)]
        assert [ended[each] for each in (name, *forks)] == [tokens] * 3


def test_sampling_stays_what_the_user_asks_for(editor):
    plant(editor, PROMPTS[4])
    sampling = {"do_sample": True, "top_k": 5, "temperature": 0.7}

    def sampled() -> list[Any]:
        torch.manual_seed(3)
        steps = Steps(editor.model, sampling=sampling, per_request_processors=True)
        names = [steps.add(PROMPTS[n], temperature=0.9) for n in (1, 5, 6)]
        ended = steps.finish()
        kinds = [type(p).__name__ for p in steps.manager.logit_processor.logits_processor]
        return [kinds, steps.manager.logit_processor.tensors_required, *map(ended.get, names)]

    with_edits = sampled()
    editor.detach()
    assert sampled() == with_edits


def test_disabled_when_added_is_disabled_for_good(editor):
    prompt = PROMPTS[4]
    unedited = alone(editor.model, [prompt])[0]
    plant(editor, prompt)
    want = alone(editor.model, [prompt])[0]
    steps = Steps(editor.model)
    with editor.disable(thread_only=True):
        off = steps.add(prompt)
    on = steps.add(prompt)
    with editor.disable():
        assert steps.finish() == {off: unedited, on: want}


def test_a_batch_of_fixed_shapes_is_that_of_any(edited):
    """As graphs are recorded of it: padded, with the same tensors whatever is asked."""
    want = alone(edited.model, PROMPTS)
    steps = Steps(edited.model, max_requests_per_batch=8, max_batch_tokens=16, pads=True)
    places = set()
    for n in range(len(PROMPTS)):
        name = steps.add(PROMPTS[n])
        while steps.waiting(name) or name in steps.processor.scheduler.active_requests:
            steps.step()
            plan = steps.plans[-1]
            assert not plan.empty
            for part in (plan.asking, plan.writes):
                tensors = vars(part).values() if part is not None else ()
                places |= {t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)}
        assert steps.finish()[name] == want[n]
    assert len(places) < 10
    assert steps.run(PROMPTS) == want


@pytest.mark.parametrize(
    ("query", "replace"), [("last", "prompt"), ("last", "all"), ("mean", "last")]
)
def test_what_needs_the_whole_prompt_at_once_is_refused(query, replace):
    editor = make_editor(query, replace)
    attention = editor.model.config._attn_implementation
    with pytest.raises(ValueError, match=f"pieces.*got query='{query}' and replace='{replace}'"):
        editor.model.generate_batch([PROMPTS[0]], **Steps.settings())
    assert editor.model.config._attn_implementation == attention
    with editor.disable():
        assert batched(editor.model, [PROMPTS[0]]) == alone(editor.model, [PROMPTS[0]])


@pytest.mark.parametrize(
    ("module", "cls", "name"),
    [
        ("input_outputs", "ContinuousBatchingIOs", "prepare_batch_tensors"),
        ("cache", "PagedAttentionCache", "search_prefix_match"),
        ("requests", "RequestState", "create_equivalent_initial_request"),
        ("continuous_api", "ContinuousBatchingManager", "_create_batch_processor"),
    ],
)
def test_another_continuous_batching_is_refused_by_name(editor, monkeypatch, module, cls, name):
    import importlib

    path = f"transformers.generation.continuous_batching.{module}"
    monkeypatch.delattr(getattr(importlib.import_module(path), cls), name)
    with pytest.raises(RuntimeError, match=f"{name}; use generate"):
        Steps(editor.model).add(PROMPTS[0])


def test_a_forward_that_goes_past_the_layer_fails_its_requests(edited):
    steps = Steps(edited.model)
    layer = edited.model.model.layers[1].mlp
    layer.forward = lambda x: x
    with pytest.raises(RuntimeError, match="was replaced after attaching"):
        steps.run([PROMPTS[4]])


def test_a_manager_from_before_attaching_is_refused_or_followed(editor):
    prompt = PROMPTS[4]
    plant(editor, prompt)
    want = alone(editor.model, [prompt])[0]
    model, adaptor, layer = editor.model, editor.adaptor, editor.config.layer
    editor.detach()
    steps = Steps(model)
    assert steps.run([prompt])[0] != want
    early = steps.add(prompt)
    attach(model, model.get_submodule(layer), model, adaptor, generates=True)
    with pytest.raises(ValueError, match="packed batch"):
        steps.step()
    steps.unwatch()
    model._cached_continuous_batching_manager = steps.manager
    assert model.init_continuous_batching() is steps.manager
    with pytest.raises(RuntimeError, match=f"{early} was added before the model was edited"):
        steps.step()
    steps.processor.reset()
    assert steps.run([prompt])[0] == want


def test_detached_it_serves_the_unedited_model(edited):
    want = alone(edited.model, PROMPTS)
    steps = Steps(edited.model)
    assert steps.run(PROMPTS) == want
    edited.detach()
    unedited = alone(edited.model, PROMPTS)
    assert unedited != want
    assert steps.run(PROMPTS) == unedited


class _Stream:
    """What asynchronous batching asks of a stream and an event, on a CPU."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()


@pytest.fixture
def streams(monkeypatch) -> None:
    """Let asynchronous batching run on a CPU: in its order, with its two sets of inputs."""
    from transformers.generation import continuous_batching as batching

    inputs = batching.input_outputs
    monkeypatch.setattr(inputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(inputs, "create_device_stream", _Stream)
    monkeypatch.setattr(torch, "Event", _Stream)
    for module in (inputs, batching.continuous_api, batching.model_runner):
        monkeypatch.setattr(module, "stream_context", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        batching.offloading_manager, "stream_context", lambda _: contextlib.nullcontext()
    )


@pytest.mark.usefixtures("streams")
def test_asynchronous_batches_have_rows_of_their_own(edited):
    want = alone(edited.model, PROMPTS, 12)
    small = {"length": 12, "num_blocks": 14, "max_batch_tokens": 8}
    assert batched(edited.model, PROMPTS, use_async_batching=True, **small) == want
