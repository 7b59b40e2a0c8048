"""The text of a prompt from its token ids, with a chat template of ChatML's form."""

from __future__ import annotations

import pytest
from grace_edit.keys.prompts import TAIL, PromptReader
from keys_lab import CHATML, byte_tokenizer

QUESTION = "What is the capital of Norway?"


@pytest.fixture(scope="module")
def chat() -> object:
    return byte_tokenizer(CHATML)


def _ids(tokenizer: object, turns: list[tuple[str, str]], *, asks: bool = True) -> list[int]:
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": role, "content": said} for role, said in turns],
        tokenize=False,
        add_generation_prompt=asks,
    )
    return list(tokenizer(text)["input_ids"])  # type: ignore[operator]


def test_a_plain_prompt_is_read_whole() -> None:
    tokenizer = byte_tokenizer()
    reader = PromptReader(tokenizer)
    assert reader.frame is None
    assert (
        reader.text(tokenizer(" It rained. " + QUESTION)["input_ids"]) == "It rained. " + QUESTION
    )
    assert reader.text([]) == ""


@pytest.mark.parametrize("asks", [True, False], ids=["answer asked for", "no generation prompt"])
@pytest.mark.parametrize(
    "before",
    [
        [],
        [("system", "Be brief. Speak of the capital of Peru.")],
        [("user", "Where is Peru?"), ("assistant", "In America.")],
        [
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hi"),
            ("user", "x"),
            ("assistant", "The capital of Peru is Lima."),
        ],
    ],
    ids=["one turn", "system", "two turns", "system and three turns"],
)
def test_in_a_chat_the_last_turn_of_the_user_is_read(
    chat: object, before: list[tuple[str, str]], asks: bool
) -> None:
    ids = _ids(chat, [*before, ("user", QUESTION)], asks=asks)
    assert PromptReader(chat).text(ids) == QUESTION


def test_the_users_turn_is_still_read_behind_the_beginning_of_an_answer(chat: object) -> None:
    ids = _ids(chat, [("user", QUESTION)]) + list(chat("The capital of")["input_ids"])  # type: ignore[operator]
    assert PromptReader(chat).text(ids) == QUESTION


def test_a_plain_prompt_to_a_chat_model_is_read_whole(chat: object) -> None:
    ids = chat("The capital of Norway is")["input_ids"]  # type: ignore[operator]
    assert PromptReader(chat).text(ids) == "The capital of Norway is"


def test_of_a_long_prompt_the_end_is_read(chat: object) -> None:
    ids = _ids(chat, [("user", "word " * TAIL + QUESTION)], asks=False)
    assert PromptReader(chat).text(ids).endswith("word " + QUESTION)
    # The opening of the turn lies before what is read: the text is taken as it is.
    assert len(PromptReader(chat).text(ids)) <= TAIL


def test_a_template_that_refuses_or_marks_nothing_is_no_chat() -> None:
    assert PromptReader(byte_tokenizer("{{ raise_exception('no') }}")).frame is None
    assert (
        PromptReader(byte_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")).frame
        is None
    )
