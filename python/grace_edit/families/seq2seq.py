"""Encoder–decoders such as T5: the encoder reads the prompt, the decoder produces the target.

Edited in the encoder, its tokens ask and are replaced. Edited in the decoder, the token it starts
with asks: behind the first attention to what the encoder read it knows the prompt, and it is there
in every way to run the decoder, step by step or whole, with a cache and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.adaptor import GraceAdaptor
from ..adaptor.attach import find_layer, is_attached
from .base import MASKED, Family, can_generate, has_encoder_and_decoder


class Seq2SeqFamily(Family):
    """The prompt is asked about once; the answer is what the decoder says.

    The seam is the encoder or the decoder, whichever is edited. A generation runs the encoder once,
    and computes the decoder's first token once with a cache, and the same each time without one: so
    nothing has to be latched.
    """

    name = "seq2seq"
    kind = "encoder-decoder"
    auto_class = "AutoModelForSeq2SeqLM"
    class_endings = ("ForConditionalGeneration",)
    decodes = False
    """The wrapped layer is in the decoder."""

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return can_generate(model) and has_encoder_and_decoder(model)

    @classmethod
    def is_named_by(cls, class_name: str, config: Any) -> bool:
        return super().is_named_by(class_name, config) and config.is_encoder_decoder

    def seam(self, layer: str) -> nn.Module:
        model: Any = self.model
        for part in (model.get_encoder(), model.get_decoder()):
            prefix = next(name for name, module in model.named_modules() if module is part)
            if layer.startswith(prefix + "."):
                return part
        raise ValueError(
            f"layer must be in the encoder or the decoder of an encoder-decoder, got {layer!r}"
        )

    def asks_by(self, layer: str) -> tuple[str, str]:
        return ("last", "last") if self._in_decoder(layer) else super().asks_by(layer)

    def _in_decoder(self, layer: str) -> bool:
        name, _ = find_layer(self.model, layer)
        model: Any = self.model
        return self.seam(name) is model.get_decoder()

    def attach(self, layer: str, adaptor: GraceAdaptor, *, further: bool = False) -> None:
        self.decodes = self._in_decoder(layer)
        others = [m.__dict__["grace"] for m in self.model.modules() if is_attached(m)]
        if further and (self.decodes or any(other.at_start for other in others)):
            raise ValueError(
                "layer must be in the encoder where several layers are edited, as all of them, got "
                f"{layer!r}"
            )
        if self.decodes and (adaptor.query, adaptor.replace) not in (
            ("last", "last"),
            ("last", "prompt"),
        ):
            raise ValueError(
                "a layer of the decoder must be edited with query='last' and replace='last', got "
                f"query={adaptor.query!r} and replace={adaptor.replace!r}: there the token that "
                "the decoder starts with asks, for all of the prompt; take a layer of the encoder "
                "for others"
            )
        adaptor.at_start = self.decodes
        super().attach(layer, adaptor, further=further)

    def check_queries(self, queries: Sequence[Tensor]) -> None:
        if self.decodes and all(torch.equal(one, queries[0]) for one in queries):
            raise ValueError(
                f"layer must see the prompt, got {self.layer!r}, which stands before the decoder's "
                "first attention to it; take one behind that, as the feed-forward layer of a block"
            )

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        # With the end-of-sequence token the family closes a text with, so that decoding stops.
        return self._ids(target, "target", special=True)

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        ids, own = super().encode_edit(prompt, target)
        self.check_end(own)
        return ids, own

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        model: Any = self.model
        if not self.decodes:
            return model.get_encoder()(**batch)
        nothing = torch.zeros_like(batch["input_ids"][:, :1])
        start = model.prepare_decoder_input_ids_from_labels(labels=nothing)
        return model(**batch, decoder_input_ids=start)

    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, wanted = self.inputs(prompts), self.inputs(targets)
        padded = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, MASKED)
        answering = (
            self.answering(values) if self.decodes else self.teaching(values, batch, prompts)
        )
        with answering:
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
