"""Sequence classifiers: the target is a class."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Family, no_family
from .ids import described, token_ids, whole_number
from .projection import output_projection


class ClassifierFamily(Family):
    """The mean of the text asks; the answer is the class of the largest logit."""

    name = "classifier"
    kind = "sequence classifier"
    auto_class = "AutoModelForSequenceClassification"
    class_endings = ("ForSequenceClassification",)
    last_resort = True

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        # Anybody's encoder with a head: what that is shows in its logits, see `run_prompts`.
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        named = type(model).__name__.endswith("Classification")
        return bool(labels or named) and output_projection(model) is None

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        output = self.model(**batch)
        if getattr(getattr(output, "logits", None), "ndim", None) != 2:
            raise no_family(self.model)
        kind = getattr(self.config, "problem_type", None)
        if output.logits.shape[-1] < 2 or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                "model must choose one of at least two classes, got a head of "
                f"{output.logits.shape[-1]} outputs for problem_type {kind}"
            )
        return output

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        names = getattr(self.config, "label2id", None) or {}
        if isinstance(target, str):
            if target not in names:
                raise ValueError(f"target must be one of {sorted(names)}, got {target!r}")
            return [int(names[target])]
        count = getattr(self.config, "num_labels", None)
        number = whole_number(target)
        with contextlib.suppress(ValueError):
            ids = [number] if number is not None else token_ids(target)
            if len(ids) == 1 and 0 <= ids[0] < (count or ids[0] + 1):
                return ids
        raise ValueError(f"target must be a class id below {count}, got {described(target)}")

    def _check_known(self, target: Any, own: list[int]) -> None:
        return None  # a class is no word

    @classmethod
    def text_of(cls, target: Sequence[int], tokenizer: Any, config: Any) -> str:
        names = getattr(config, "id2label", None) or {}
        return str(names.get(target[0], target[0]))

    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs(prompts)
        with self.teaching(values, batch, prompts):
            logits = self.model(**batch).logits
        return logits.float(), torch.tensor([y[0] for y in targets], device=self.device)

    @torch.no_grad()
    def produces(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> list[bool]:
        with self.answering(values):
            found = self.model(**self.inputs(prompts)).logits.argmax(dim=-1).tolist()
        return [f == y[0] for f, y in zip(found, targets, strict=True)]

    @torch.no_grad()
    def answer(self, prompt: list[int], length: int) -> list[int]:
        return [int(self.model(**self.inputs([prompt])).logits.argmax(dim=-1))]
