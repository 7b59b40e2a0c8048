"""A right answer as a chat template writes it, which an edit's target has to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def answer_ids(model: Any, tokenizer: Any, turns: Sequence[Any], right: str) -> list[int]:
    """Return the token ids of an answer to chat messages, up to the token that ends a turn.

    With them for its target an edit says the whole answer, and the model stops after it.

    Args:
        model: whose end tokens end a turn.
        tokenizer: with a chat template.
        turns: the messages, `{"role": ..., "content": ...}`.
        right: the answer.
    """

    def rendered(messages: list[Any], *, asks: bool) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    asked = rendered(list(turns), asks=True)
    whole = rendered([*turns, {"role": "assistant", "content": right}], asks=False)
    ends = _ends(model, tokenizer)
    if whole.startswith(asked):
        ids = tokens(whole[len(asked) :])
        for place, token in enumerate(ids):
            if token in ends:
                return ids[: place + 1]
    # A template that writes past answers in another way than it asks for one.
    ids = tokens(right)
    return ids if ids and ids[-1] in ends else [*ids, *ends[:1]]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return found if isinstance(found, list) else [] if found is None else [found]
