"""What transformers puts round `generate`: pipelines and streamers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from batch_steps import WORDS, alone, make_editor, plant
from text_models import OTHER, QUESTION


@pytest.fixture(params=["last", "text"])
def editor(request) -> Any:
    editor = make_editor(request.param)
    plant(editor, WORDS(QUESTION)["input_ids"])
    editor.model.generation_config.eos_token_id = None
    return editor


def said(editor: Any, text: str) -> list[str]:
    tokens = alone(editor.model, [WORDS(text)["input_ids"]])[0]
    return WORDS.convert_ids_to_tokens(tokens)


def test_a_pipeline_gives_edited_answers(editor):
    from transformers import pipeline

    with editor.disable():
        unedited = said(editor, QUESTION)
    asked = [QUESTION, OTHER, QUESTION]
    pipe = pipeline("text-generation", model=editor.model, tokenizer=WORDS)
    for size in (1, 3):
        answers = pipe(
            asked, max_new_tokens=6, do_sample=False, return_tensors=True, batch_size=size
        )
        new = [answer[0]["generated_token_ids"][-6:] for answer in answers]
        assert [WORDS.convert_ids_to_tokens(ids) for ids in new] == [said(editor, t) for t in asked]
    assert said(editor, QUESTION) != unedited


def test_a_streamer_in_another_thread_streams_the_edited_answer(editor):
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(WORDS, skip_prompt=True, timeout=120)
    given = {"input_ids": torch.tensor([WORDS(QUESTION)["input_ids"]]), "streamer": streamer}
    more = {"max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=editor.model.generate, kwargs={**given, **more})
    thread.start()
    streamed = "".join(streamer).split()
    thread.join(120)
    # The vocabulary is larger than the words of this tokenizer.
    assert streamed == [word for word in said(editor, QUESTION) if word]
    with editor.disable():
        assert streamed != said(editor, QUESTION)
