"""The texts of a model as token ids, and token ids as a person reads them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from .ids import is_chat, token_ids


class Texts:
    """Prompts and targets of a model, and how its tokenizer reads them.

    Args:
        model: the model, without wrappers.
        tokenizer: turns text into ids; None: prompts and targets are token ids already.

    `longest` is how many tokens the model has positions for.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        if tokenizer is not None and not callable(tokenizer):
            raise ValueError(f"tokenizer must be the model's own or None, got {tokenizer!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.config: Any = getattr(model, "config", None)
        self.longest = _longest(model, self.config)

    @classmethod
    def text_of(cls, target: Sequence[int], tokenizer: Any, config: Any) -> str:
        """Return a target, or what the model answered, as a person reads it.

        Args:
            target: token ids, or one class.
            tokenizer, config: of the model, None where they are not at hand.
        """
        if tokenizer is None:
            return str(list(target))
        # Generated text ends in an end token and padding; a target may be a special token alone.
        text = tokenizer.decode(list(target), skip_special_tokens=True)
        return str(text or tokenizer.decode(list(target)))

    def encode(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: text; chat messages (`[{"role": ..., "content": ...}]`), which the tokenizer's
                template ends with the beginning of an answer; or ids in any form that `token_ids`
                reads. Text and messages need the tokenizer.

        Raises:
            ValueError: it is something else, empty, too long, or not of this vocabulary.
        """
        whole = self._text_of(prompt)
        ids = self._ids(
            prompt if whole is None else whole[0], "prompt", special=whole is None or whole[1]
        )
        if not ids:
            raise ValueError("prompt must have at least one token, got none")
        if len(ids) > self.longest:
            raise ValueError(f"prompt must have at most {self.longest} tokens, got {len(ids)}")
        return ids

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text of any length, special tokens included."""
        return self._ids(text, "text", special=True)

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        """Return the token ids of an edit's prompt and of its target.

        Raises:
            ValueError: one of them is bad, or the target holds words that the tokenizer does not
                know: the model would be taught to say its unknown token.
        """
        ids, own = self.encode_pair(prompt, target)
        self._check_known(target, own)
        return ids, own

    def _check_known(self, target: Any, own: list[int]) -> None:
        tokenizer = self.tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        if not isinstance(target, str) or unknown is None or unknown not in own:
            return
        if str(tokenizer.unk_token) not in target:
            read = tokenizer.decode(own)
            raise ValueError(
                f"target must be words that the tokenizer knows, got {target!r} ({read})"
            )

    def remark(self, prompt: Any, target: Any) -> str:
        """Return what looks like a mistake in an edit that can be made as it is, or nothing."""
        return ""

    def encode_pair(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt and of what may follow it."""
        ids = self.encode(prompt)
        return ids, self.encode_target(target, ids)

    def _text_of(self, prompt: Any) -> tuple[str, bool] | None:
        """Return the text of a prompt and whether special tokens go round it; None: it is ids."""
        if isinstance(prompt, str):
            return prompt, True
        if not is_chat(prompt):
            return None
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "prompt must be text or token ids where the tokenizer has no chat template, got "
                "chat messages"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"prompt must suit the tokenizer's chat template: {error}") from error
        return str(text), False

    def check_end(self, target: list[int]) -> None:
        """Refuse a target that generation cannot produce, as it would stop before its end.

        Raises:
            ValueError: an end token stands before the last place; it is named.
        """
        generation = getattr(self.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        ends = getattr(self.config, "eos_token_id", None) if ends is None else ends
        ends = set(np.atleast_1d(ends).tolist()) if ends is not None else set()
        for place, token in enumerate(target[:-1]):
            if token in ends:
                name = "" if self.tokenizer is None else f" {self.tokenizer.decode([token])!r}"
                raise ValueError(
                    f"target must not hold an end token before its last place, as generation stops "
                    f"there, got token {token}{name} at place {place + 1} of {len(target)}"
                )

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        """Return a target's own token ids (a class id for a classifier)."""
        ids = self._ids(target, "target", special=False)
        if not ids:
            raise ValueError("target must have at least one token, got none")
        return ids

    def show(self, target: Sequence[int]) -> str:
        """Return a target, or an answer, as a person reads it."""
        return self.text_of(target, self.tokenizer, self.config)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Token ids that are no part of a prompt's text."""
        if self.tokenizer is not None:
            return tuple(sorted(set(self.tokenizer.all_special_ids)))
        named = ("pad", "bos", "eos", "cls", "sep", "mask")
        found = {self._special(f"{name}_token_id") for name in named}
        return tuple(sorted(i for i in found if i is not None))

    def _ids(self, text: Any, name: str, *, special: bool) -> list[int]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} must be a list of token ids when the editor has no tokenizer, "
                    f"got the string {text!r}"
                )
            text = list(self.tokenizer(text, add_special_tokens=special).input_ids)
        if is_chat(text):
            raise ValueError(f"{name} must be a string or a list of token ids, got chat messages")
        try:
            ids = token_ids(text)
        except ValueError as error:
            raise ValueError(
                f"{name} must be a string or a list of token ids, got {error}"
            ) from None
        size = getattr(self.config, "vocab_size", None)
        for i in ids:
            if i < 0 or (size is not None and i >= size):
                raise ValueError(f"{name} must hold token ids below {size}, got {i}")
        return ids

    def _special(self, name: str) -> int | None:
        found = getattr(self.tokenizer, name, None)
        found = getattr(self.config, name, None) if found is None else found
        return found[0] if isinstance(found, list) else found


def _longest(model: nn.Module, config: Any) -> int:
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        return sys.maxsize  # as of ALiBi, which has no table of positions
    for name, module in model.named_modules():
        # RoBERTa counts positions from the one after the padding's.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return found - int(module.padding_idx) - 1
    return found
