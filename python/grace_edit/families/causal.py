"""Causal language models, GPT-2 to Qwen: the target follows the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.torch_private import is_compiled
from .base import MASKED, Begun, Family, can_generate, has_encoder_and_decoder
from .begun import begin
from .ids import is_chat
from .projection import rows_alone
from .turns import answer_ids


class CausalFamily(Family):
    """The last token of the prompt asks; the answer is what `generate` appends."""

    name = "causal"
    kind = "causal language model"
    auto_class = "AutoModelForCausalLM"
    class_endings = ("ForCausalLM", "LMHeadModel")
    generates = True
    pads_left = True
    takes_contexts = True
    default_query = "last"
    default_replace = "last"

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return can_generate(model) and not has_encoder_and_decoder(model)

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        answers = is_chat(prompt) and isinstance(target, str)
        if answers and not target.strip():
            raise ValueError(f"target must not be empty, got {target!r}")
        ids, own = super().encode_edit(prompt, target)
        if answers:
            # Whoever answers a message ends his turn, and once.
            self.check_end(own)
            own = answer_ids(self.model, self.tokenizer, prompt, target.strip())
            self._check_room(ids, own)
        self.check_end(own)
        return ids, own

    def remark(self, prompt: Any, target: Any) -> str:
        """Say that a target lacks the space before its first word.

        Told by the tokenizer: with a space the target would begin with another token. Only between
        letters of alphabets that have capitals, and digits: others are written without spaces.
        """
        if not (isinstance(prompt, str) and isinstance(target, str) and target):
            return ""
        if not (_is_spaced(target[0]) and (_is_spaced(prompt[-1:]) or prompt[-1:] in ",;:.!?")):
            return ""
        try:
            own = self.encode_pair(prompt, target)[1]
            spaced = self.encode_pair(prompt, f" {target}")[1]
        except ValueError:  # with a space there is no room for it
            return ""
        if own[:1] == spaced[:1]:
            return ""
        return (
            f"the target begins without a space, so that the answer reads {prompt[-9:] + target!r};"
            f" write {' ' + target!r} where a new word is meant"
        )

    def encode_pair(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        ids, own = super().encode_pair(prompt, target)
        text = self._text_of(prompt)
        if text is not None and isinstance(target, str):
            # Some tokenizers begin any text with a word mark; what follows the prompt in the whole
            # text is what the model is to say.
            whole = self._ids(text[0] + target, "target", special=text[1])
            if whole[: len(ids)] == ids and len(whole) > len(ids):
                own = whole[len(ids) :]
        self._check_room(ids, own)
        return ids, own

    def _check_room(self, ids: list[int], own: list[int]) -> None:
        if len(ids) + len(own) > self.longest:
            raise ValueError(
                f"prompt and target must have at most {self.longest} tokens together, got "
                f"{len(ids) + len(own)}"
            )

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        # Where the forward does not end at the layer: a vocabulary's logits are wanted of nobody.
        accepted = inspect.signature(type(self.model).forward).parameters
        if "logits_to_keep" not in accepted or is_compiled(self.model):
            return self.model(**batch)
        return self.model(**batch, logits_to_keep=1)

    def label(self, prompt: list[int], target: list[int]) -> list[int]:
        return [*([MASKED] * len(prompt)), *target]

    def room_for_answer(self, prompt: str) -> int:
        room = self.longest - len(self.encode(prompt))
        if not room:
            raise ValueError(f"prompt must fit {self.longest - 1} tokens, got {self.longest}")
        return room

    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs([[*p, *y] for p, y in zip(prompts, targets, strict=True)])
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        row = torch.cat([torch.full((len(y),), b) for b, y in enumerate(targets)])
        pairs = zip(prompts, targets, strict=True)
        column = torch.cat([torch.arange(len(y)) + len(p) - 1 for p, y in pairs])
        row, column = row.to(self.device), column.to(self.device)
        with self.teaching(values, batch, prompts, lengths), rows_alone(self.model, row, column):
            logits = self.model(**batch).logits
        wanted = torch.tensor([token for y in targets for token in y], device=self.device)
        return (logits if logits.ndim == 2 else logits[row, column]).float(), wanted

    def begin(self, prompts: Sequence[list[int]], room: int) -> Begun | None:
        adaptor = self.adaptor
        # Under other replacements, or with edits of layers that may have others, tokens before the
        # last one are answered too.
        if adaptor.replace != "last" or adaptor.others or is_compiled(self.model):
            return None
        with adaptor.disabled(thread_only=True):
            return begin(self, prompts, self.longest - room)

    def produces(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> list[bool]:
        # One prompt goes in unpadded, as it will be served; several go in as a padded batch.
        with self.answering(values):
            produced = self.generate(prompts, max(map(len, targets)))
        new = produced[:, max(map(len, prompts)) :].tolist()
        return [n[: len(y)] == list(y) for n, y in zip(new, targets, strict=True)]

    def answer(self, prompt: list[int], length: int) -> list[int]:
        return self.generate([prompt], length)[0, len(prompt) :].tolist()


def _is_spaced(letter: str) -> bool:
    """Say whether a character is a digit, or a letter of an alphabet with capitals."""
    return letter.isdigit() or letter.lower() != letter.upper()
