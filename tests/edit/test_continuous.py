"""Continuous batching (`generate_batch`): the tokens of one-by-one generation, whatever the batches.

Batches are made small, so that prompts come in pieces and behind generated tokens of others, and
caches so small that requests are thrown out and computed again.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from batch_steps import EDITED, LENGTH, PAGE, PROMPTS, Steps, alone, batched, make_editor, plant
from tiny_models import LAYERS, build, run_of


@pytest.fixture(params=["last", "text"])
def editor(request) -> Any:
    return make_editor(request.param)


@pytest.fixture
def edited(editor) -> Any:
    for n in EDITED:
        plant(editor, PROMPTS[n])
    return editor


def test_tokens_are_those_of_one_by_one_generation(editor):
    unedited = alone(editor.model, PROMPTS)
    assert batched(editor.model, PROMPTS) == unedited
    for n in EDITED:
        plant(editor, PROMPTS[n])
    want = alone(editor.model, PROMPTS)
    changed = [a != b for a, b in zip(want, unedited, strict=True)]
    assert changed[: len(EDITED)] == [True] * len(EDITED)
    assert False in changed
    for tokens in (3, 5, 64):
        assert batched(editor.model, PROMPTS, max_batch_tokens=tokens) == want


def test_a_cache_too_small_throws_requests_out_and_they_come_back_edited(edited):
    want = alone(edited.model, PROMPTS, 12)
    steps = Steps(edited.model, length=12, num_blocks=14, max_batch_tokens=8)
    names = [steps.add(prompt) for prompt in PROMPTS]
    thrown_out = 0
    own = steps.processor.scheduler.add_waiting_request

    def add_waiting_request(state: Any) -> None:
        nonlocal thrown_out
        thrown_out += state._true_initial_tokens > 0
        own(state)

    steps.processor.scheduler.add_waiting_request = add_waiting_request
    ended = steps.finish()
    assert [ended[name] for name in names] == want
    assert thrown_out > 2


def test_a_request_thrown_out_keeps_its_answer(edited):
    """Whatever happens to the edits, and where the prompt's end is not in its last piece."""
    edited.codebook.count_hits = True
    want = alone(edited.model, PROMPTS[:5])
    before = sum(edited.codebook.hits.values())
    steps = Steps(edited.model)
    names = [steps.add(prompt) for prompt in PROMPTS[:5]]
    while min(len(s.generated_tokens) for s in map(steps.state, names)) < 2 if len(
        steps.processor.scheduler.active_requests
    ) == 5 else True:
        steps.step()
    while edited.codebook.live:
        edited.delete(edited.codebook.live[0].id)
    for name in names:
        steps.evict(name)
    ended = steps.finish()
    assert [ended[name] for name in names] == want
    del before
