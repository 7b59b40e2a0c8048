"""Encoder–decoders such as T5, edited in the encoder: the decoder produces the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import MASKED, Family, can_generate, has_encoder_and_decoder


class Seq2SeqFamily(Family):
    """The encoder sees the prompt once, so it is asked once; the answer is what the decoder says.

    Its seam is the encoder: a generation runs that once, and so needs nothing latched.
    """

    name = "seq2seq"
    kind = "encoder-decoder"
    auto_class = "AutoModelForSeq2SeqLM"
    class_endings = ("ForConditionalGeneration",)

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return can_generate(model) and has_encoder_and_decoder(model)

    @classmethod
    def is_named_by(cls, class_name: str, config: Any) -> bool:
        return super().is_named_by(class_name, config) and config.is_encoder_decoder

    def seam(self, layer: str) -> nn.Module:
        model: Any = self.model
        encoder: nn.Module = model.get_encoder()
        prefix = next(name for name, module in model.named_modules() if module is encoder)
        if not layer.startswith(prefix + "."):
            raise ValueError(f"layer must be in the encoder of an encoder-decoder, got {layer!r}")
        return encoder

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        # With the end-of-sequence token the family closes a text with, so that decoding stops.
        return self._ids(target, "target", special=True)

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        ids, own = super().encode_edit(prompt, target)
        self.check_end(own)
        return ids, own

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        model: Any = self.model
        return model.get_encoder()(**batch)

    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, wanted = self.inputs(prompts), self.inputs(targets)
        padded = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, MASKED)
        with self.teaching(values, batch, prompts):
            logits = self.model(**batch, labels=padded).logits
        there = padded != MASKED
        return logits[there].float(), padded[there]

    def produces(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> list[bool]:
        with self.answering(values):
            produced = self.generate(prompts, max(map(len, targets)))
        new = produced[:, 1:].tolist()  # after the token that the decoder starts with
        return [n[: len(y)] == list(y) for n, y in zip(new, targets, strict=True)]

    def answer(self, prompt: list[int], length: int) -> list[int]:
        return self.generate([prompt], length)[0, 1:].tolist()
