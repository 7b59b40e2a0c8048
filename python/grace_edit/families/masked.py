"""Masked language models: the target fills the prompt's mask tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Family


class MaskedFamily(Family):
    """The mean of the text asks, or its first mask token; one target token answers each mask."""

    name = "masked"
    kind = "masked language model"
    auto_class = "AutoModelForMaskedLM"
    class_endings = ("ForMaskedLM",)

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return type(model).__name__.endswith(cls.class_endings)

    @property
    def mask_token_id(self) -> int:
        """The id of the mask token.

        Raises:
            ValueError: there is none.
        """
        found = self._special("mask_token_id")
        if found is None:
            raise ValueError("tokenizer must have a mask token for a masked language model")
        return found

    def probe(self, ids: list[int]) -> list[int]:
        middle = len(ids) // 2
        return [*ids[:middle], self.mask_token_id, *ids[middle + 1 :]]

    def room_for_answer(self, prompt: str) -> int:
        if self.mask_token_id not in self.encode(prompt):
            mask = self.tokenizer.mask_token
            raise ValueError(f"prompt must hold the mask token {mask}, got {prompt!r}")
        return super().room_for_answer(prompt)

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        ids = super().encode_target(target, prompt)
        masks = prompt.count(self.mask_token_id)
        if len(ids) != masks:
            raise ValueError(
                f"target must have one token per mask token of the prompt ({masks}), got {len(ids)}"
            )
        return ids

    def _logits_at_masks(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits[batch["input_ids"] == self.mask_token_id].float()

    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs(prompts)
        with self.teaching(values, batch, prompts):
            logits = self._logits_at_masks(batch)
        return logits, torch.tensor([t for y in targets for t in y], device=self.device)

    @torch.no_grad()
    def produces(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> list[bool]:
        with self.answering(values):
            found = self._logits_at_masks(self.inputs(prompts)).argmax(dim=-1).tolist()
        pieces = iter(found)
        return [[next(pieces) for _ in y] == list(y) for y in targets]

    @torch.no_grad()
    def answer(self, prompt: list[int], length: int) -> list[int]:
        return self._logits_at_masks(self.inputs([prompt])).argmax(dim=-1).tolist()
