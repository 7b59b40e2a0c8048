"""The text of a prompt from its token ids; in a chat, what its user said last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TAIL = 512
"""Tokens of a prompt that are read: the last ones. The spans that ask stand at its end."""

_SAID = ("Zanzibar", "Quito", "Oslo")


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes round a turn of the user.

    Args:
        opening: before it.
        closing: behind it.
    """

    opening: str
    closing: str

    def last_turn(self, text: str) -> str | None:
        """Return what the user said last, None where `text` holds no turn of this template."""
        start = text.rfind(self.opening)
        if start < 0:
            return None
        said = text[start + len(self.opening) :]
        end = said.find(self.closing)
        return said[:end] if end >= 0 else said


class PromptReader:
    """Read prompts from token ids.

    Args:
        tokenizer: as transformers makes it. A chat template of its own is recognised by what it
            writes round a user's turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.frame = chat_frame(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text that spans are taken from: the user's last turn, or all of the prompt.

        Args:
            ids: without padding. Of more than 512 only the last are read.

        An edit's prompt must be read in this way too, from its ids: what a tokenizer decodes is not
        always what it was given.
        """
        ids = list(ids)[-TAIL:]
        if self.frame is not None:
            said = self.frame.last_turn(self._tokenizer.decode(ids, skip_special_tokens=False))
            if said is not None:
                return said.strip()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """Find out what the tokenizer's chat template writes round a user's turn.

    Chats are rendered and read back as requests are. The opening is what stands before the user's
    turn whether or not it is the first; the closing is what stands behind it whether an answer
    follows, is asked for, or neither.

    Returns:
        None where there is no chat template, or none that marks turns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    first, answer, second = _SAID
    try:
        one = _rendered(tokenizer, [("user", first)])
        bare = _rendered(tokenizer, [("user", first)], asks=False)
        two = _rendered(tokenizer, [("user", first), ("assistant", answer), ("user", second)])
    except Exception:  # templates are programs of their own and refuse what they like
        return None
    if not (first in one and first in bare and all(two.count(said) == 1 for said in _SAID)):
        return None
    before, behind = one.split(first, 1)
    turn = two.split(first, 1)[1]
    between, rest = turn.split(answer, 1)
    opening = _common_end(before, rest.split(second, 1)[0])
    closing = _common_start(_common_start(behind, between), bare.split(first, 1)[1])
    if not opening.strip() or not closing.strip():
        return None
    return ChatFrame(opening, closing.rstrip())


def _rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], *, asks: bool = True) -> str:
    messages = [{"role": role, "content": said} for role, said in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _common_start(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]
