"""A prompt behind other sentences: what a value is trained on so that it answers other wordings."""

from __future__ import annotations

from typing import Any

from ..families import Family
from ..keys.prompts import chat_frame

SENTENCES = (
    "The meeting was moved to Thursday.",
    "See the second chapter for details.",
    "Nobody in the room said a word.",
    "Here is something else worth knowing.",
    "It had rained since early morning.",
    "The second plan was never carried out.",
    "He closed the drawer and went home.",
    "The hall was still half empty.",
)
"""Of no subject and no relation in particular, and short, as every step runs them. The first ones
are used."""


def behind_sentences(
    family: Family, prompt: list[int], target: list[int], count: int
) -> list[list[int]]:
    """Return `prompt` behind each of the first `count` sentences.

    In a chat they stand at the beginning of what the user said last.

    Args:
        prompt, target: token ids.
        count: sentences, at most those there are.

    Returns:
        Token ids of at most `count` prompts: of those that leave room for the target within the
        longest input of the model. None where the editor has no tokenizer.
    """
    tokenizer = family.tokenizer
    if tokenizer is None or not count:
        return []
    special = set(family.special_ids)
    first = next((i for i, token in enumerate(prompt) if token not in special), len(prompt))
    text = _decoded(tokenizer, prompt)
    kept = _encoded(tokenizer, text) == prompt
    start = _said_from(tokenizer, text, len(_decoded(tokenizer, prompt[:first])))
    between = "" if text[start : start + 1].isspace() else " "
    found = []
    for sentence in SENTENCES[:count]:
        if kept:
            ids = _encoded(tokenizer, text[:start] + sentence + between + text[start:])
        else:
            # What the tokenizer decodes it does not encode as it was: the ids are put together.
            ids = [*prompt[:first], *_encoded(tokenizer, sentence + "\n"), *prompt[first:]]
        if len(ids) + len(target) <= family.longest:
            found.append(ids)
    return found


def _said_from(tokenizer: Any, text: str, plain: int) -> int:
    """Return where in a prompt's text begins what the user said last; `plain` if it is no chat."""
    frame = chat_frame(tokenizer)
    turn = -1 if frame is None else text.rfind(frame.opening)
    return plain if frame is None or turn < 0 else turn + len(frame.opening)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
