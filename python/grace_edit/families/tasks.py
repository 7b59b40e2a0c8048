"""What differs between model families: how a prompt is run, what a target is, when it is produced.

A task turns prompts and targets into forwards of the attached model. The editor, the training and
the verification are the same for all of them.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.adaptor import Captured, GraceAdaptor
from ..adaptor.forwards import plan_prompts

MOST_ROWS = 32
"""Prompts run in one forward at most, which bounds the memory of `verify` and `rekey`."""


class Task(ABC):
    """A model family. See the subclasses; `task_for(model)` chooses.

    Args:
        model: the model, attached or about to be.
        tokenizer: turns text into ids; None: prompts and targets are token ids already.
    """

    name = ""
    pads_left = False
    default_query = "mean"
    default_replace = "all"

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config: Any = getattr(model, "config", None)
        self.pad_id = self._special("pad_token_id") or 0
        accepted = inspect.signature(type(model).forward).parameters
        self.takes_positions = "position_ids" in accepted

    # -- text and ids ---------------------------------------------------------------------------

    def encode(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt: text (needs the tokenizer) or ids."""
        ids = self._ids(prompt, "prompt", special=True)
        if not ids:
            raise ValueError("prompt must have at least one token, got none")
        if len(ids) > self.longest:
            raise ValueError(f"prompt must have at most {self.longest} tokens, got {len(ids)}")
        return ids

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text of any length, special tokens included."""
        return self._ids(text, "text", special=True)

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        """Return the token ids of an edit's prompt and of its target."""
        ids = self.encode(prompt)
        return ids, self.encode_target(target, ids)

    @property
    def longest(self) -> int:
        """How many tokens the model has positions for."""
        found = getattr(self.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else sys.maxsize

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        """Return a target's own token ids (a class id for a classifier)."""
        ids = self._ids(target, "target", special=False)
        if not ids:
            raise ValueError("target must have at least one token, got none")
        return ids

    def show(self, label: Sequence[int]) -> str:
        """Return a label as a person reads it."""
        if self.tokenizer is None:
            return str(list(label))
        # Generated text ends in an end token and padding; a target may be a special token alone.
        text = self.tokenizer.decode(list(label), skip_special_tokens=True)
        return str(text or self.tokenizer.decode(list(label)))

    def _ids(self, text: Any, name: str, *, special: bool) -> list[int]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} must be a list of token ids when the editor has no tokenizer, "
                    f"got the string {text!r}"
                )
            text = list(self.tokenizer(text, add_special_tokens=special).input_ids)
        ids = text.tolist() if isinstance(text, Tensor) else text
        if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
            raise ValueError(f"{name} must be a string or a list of token ids, got {text!r}")
        size = getattr(self.config, "vocab_size", None)
        for i in ids:
            if i < 0 or (size is not None and i >= size):
                raise ValueError(f"{name} must hold token ids below {size}, got {i}")
        return list(ids)

    def _special(self, name: str) -> int | None:
        found = getattr(self.tokenizer, name, None)
        found = getattr(self.config, name, None) if found is None else found
        return found[0] if isinstance(found, list) else found

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Token ids that are no part of a prompt's text."""
        if self.tokenizer is not None:
            return tuple(sorted(set(self.tokenizer.all_special_ids)))
        named = ("pad", "bos", "eos", "cls", "sep", "mask")
        found = {self._special(f"{name}_token_id") for name in named}
        return tuple(sorted(i for i in found if i is not None))

    @property
    def mask_token_id(self) -> int | None:
        """The token that asks under `query="last"`, for a masked language model."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- forwards -------------------------------------------------------------------------------

    def inputs(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` `[B, T]` (and positions) of padded rows."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for b, row in enumerate(rows):
            span = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[b, span] = torch.tensor(row)
            mask[b, span] = 1
        batch = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if left and self.takes_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    @torch.no_grad()
    def capture(
        self, adaptor: GraceAdaptor, prompts: Sequence[Sequence[int]], *, left: bool = False
    ) -> Captured:
        """Run prompts as one batch and return what the wrapped layer saw, in fp32/16 as it was."""
        with adaptor.using(captures=[], plan=None, generation=None, forced=None):
            assert adaptor.captures is not None
            self.run_prompts(self.inputs(prompts, left=left))
            if len(adaptor.captures) != 1:
                raise RuntimeError(
                    f"layer must run once in a forward, got {len(adaptor.captures)} calls"
                )
            return adaptor.captures[0]

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        """Run a batch of prompts through the model (its encoder, where that is what is edited)."""
        return self.model(**batch)

    @abstractmethod
    def target_logits(
        self,
        adaptor: GraceAdaptor,
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return `(logits [n, classes], wanted [n])` of all target tokens, teacher forced.

        `values [B, V]` answer; they may require grad.
        """

    @abstractmethod
    def produces(
        self,
        adaptor: GraceAdaptor,
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        values: Tensor | None,
    ) -> list[bool]:
        """Return whether the model produces each label by itself, answered by `values [B, V]`.

        `values=None`: by the codebook, as it serves.
        """

    @abstractmethod
    def answer(self, prompt: Sequence[int], length: int) -> list[int]:
        """Return what the model answers now: `length` new tokens, or the class."""


class CausalTask(Task):
    """GPT-2, Llama, Qwen and the like: the target follows the prompt."""

    name = "causal"
    pads_left = True
    default_query = "last"
    default_replace = "last"
    returns_prompt = True

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        ids, label = super().encode_edit(prompt, target)
        if isinstance(prompt, str) and isinstance(target, str):
            # Some tokenizers begin any text with a word mark; what follows the prompt in the whole
            # text is what the model is to say.
            whole = self._ids(prompt + target, "target", special=True)
            if whole[: len(ids)] == ids and len(whole) > len(ids):
                label = whole[len(ids) :]
        if self.returns_prompt and len(ids) + len(label) > self.longest:
            raise ValueError(
                f"prompt and target must have at most {self.longest} tokens together, got "
                f"{len(ids) + len(label)}"
            )
        return ids, label

    def target_logits(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs([[*p, *y] for p, y in zip(prompts, labels, strict=True)])
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        plan = plan_prompts(adaptor, mask, ids, prompt_len=lengths)
        with adaptor.using(plan=plan, forced=values, generation=None):
            logits = self.model(**batch).logits
        row = torch.cat([torch.full((len(y),), b) for b, y in enumerate(labels)])
        pairs = zip(prompts, labels, strict=True)
        col = torch.cat([torch.arange(len(y)) + len(p) - 1 for p, y in pairs])
        wanted = torch.tensor([token for y in labels for token in y], device=self.device)
        return logits[row.to(self.device), col.to(self.device)].float(), wanted

    def produces(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor | None
    ) -> list[bool]:
        longest = max(len(y) for y in labels)
        # One prompt goes in unpadded, as it will be served; several go in as a padded batch.
        with adaptor.using(forced=values, plan=None, generation=None):
            new = self._generate(prompts, longest)
        return [n[: len(y)] == list(y) for n, y in zip(new, labels, strict=True)]

    def answer(self, prompt: Sequence[int], length: int) -> list[int]:
        return self._generate([prompt], length)[0]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        batch = self.inputs(prompts, left=self.pads_left)
        model: Any = self.model
        # generate makes the positions of a left-padded batch itself.
        ids, mask = batch["input_ids"], batch["attention_mask"]
        produced = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.pad_id,
        )
        skip = ids.shape[1] if self.returns_prompt else 1
        return produced[:, skip:].tolist()


class Seq2SeqTask(CausalTask):
    """T5 and the like, edited in the encoder: the decoder produces the target."""

    name = "seq2seq"
    pads_left = False
    default_query = "mean"
    default_replace = "all"
    returns_prompt = False

    def encode_edit(self, prompt: Any, target: Any) -> tuple[list[int], list[int]]:
        return Task.encode_edit(self, prompt, target)

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        # With the end-of-sequence token the family closes a text with, so that decoding stops.
        return self._ids(target, "target", special=True)

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        model: Any = self.model
        return model.get_encoder()(**batch)

    def target_logits(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs(prompts)
        wanted = self.inputs(labels)
        padded = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
        plan = plan_prompts(adaptor, batch["attention_mask"].bool(), batch["input_ids"])
        with adaptor.using(plan=plan, forced=values, generation=None):
            logits = self.model(**batch, labels=padded).logits
        kept = padded != -100
        return logits[kept].float(), padded[kept]


class ClassifierTask(Task):
    """A sequence classifier: the target is a class."""

    name = "classifier"

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        output = self.model(**batch)
        if getattr(getattr(output, "logits", None), "ndim", None) != 2:
            raise ValueError(
                "model must be a causal, encoder-decoder or masked language model or a sequence "
                f"classifier, got {type(self.model).__name__}"
            )
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
        if isinstance(target, (list, tuple)) and len(target) == 1:
            target = target[0]
        count = getattr(self.config, "num_labels", None)
        if type(target) is not int or not 0 <= target < (count or target + 1):
            raise ValueError(f"target must be a class id below {count}, got {target!r}")
        return [target]

    def show(self, label: Sequence[int]) -> str:
        names = getattr(self.config, "id2label", None) or {}
        return str(names.get(label[0], label[0]))

    def target_logits(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs(prompts)
        plan = plan_prompts(adaptor, batch["attention_mask"].bool(), batch["input_ids"])
        with adaptor.using(plan=plan, forced=values, generation=None):
            logits = self.model(**batch).logits
        return logits.float(), torch.tensor([y[0] for y in labels], device=self.device)

    @torch.no_grad()
    def produces(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor | None
    ) -> list[bool]:
        with adaptor.using(forced=values, plan=None, generation=None):
            found = self.model(**self.inputs(prompts)).logits.argmax(dim=-1).tolist()
        return [f == y[0] for f, y in zip(found, labels, strict=True)]

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], length: int) -> list[int]:
        return [int(self.model(**self.inputs([prompt])).logits.argmax(dim=-1))]


class MaskedTask(Task):
    """A masked language model: the target fills the prompt's mask tokens."""

    name = "masked"

    @property
    def mask_token_id(self) -> int | None:
        return self.mask_id

    @property
    def mask_id(self) -> int:
        """The id of the mask token.

        Raises:
            ValueError: there is none.
        """
        found = self._special("mask_token_id")
        if found is None:
            raise ValueError("tokenizer must have a mask token for a masked language model")
        return found

    def encode_target(self, target: Any, prompt: list[int]) -> list[int]:
        ids = super().encode_target(target, prompt)
        masks = prompt.count(self.mask_id)
        if len(ids) != masks:
            raise ValueError(
                f"target must have one token per mask token of the prompt ({masks}), got {len(ids)}"
            )
        return ids

    def _masked_logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).logits[batch["input_ids"] == self.mask_token_id].float()

    def target_logits(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = self.inputs(prompts)
        plan = plan_prompts(adaptor, batch["attention_mask"].bool(), batch["input_ids"])
        with adaptor.using(plan=plan, forced=values, generation=None):
            logits = self._masked_logits(batch)
        return logits, torch.tensor([t for y in labels for t in y], device=self.device)

    @torch.no_grad()
    def produces(
        self, adaptor: GraceAdaptor, prompts: Any, labels: Any, values: Tensor | None
    ) -> list[bool]:
        with adaptor.using(forced=values, plan=None, generation=None):
            found = self._masked_logits(self.inputs(prompts)).argmax(dim=-1).tolist()
        pieces = iter(found)
        return [[next(pieces) for _ in y] == list(y) for y in labels]

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], length: int) -> list[int]:
        return self._masked_logits(self.inputs([prompt])).argmax(dim=-1).tolist()


def task_for(model: nn.Module, tokenizer: Any) -> Task:
    """Return the task of `model`: encoder–decoder, masked, causal, else a classifier.

    Raises:
        ValueError: the model is of no supported kind.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return Seq2SeqTask(model, tokenizer)
    if name.endswith("ForMaskedLM"):
        return MaskedTask(model, tokenizer)
    can_generate = getattr(model, "can_generate", None)
    classifies = name.endswith("Classification") or getattr(config, "num_labels", None)
    if classifies and not (callable(can_generate) and can_generate()):
        return ClassifierTask(model, tokenizer)
    if callable(getattr(model, "generate", None)):
        return CausalTask(model, tokenizer)
    raise ValueError(
        "model must be a causal, encoder-decoder or masked language model or a sequence "
        f"classifier, got {name}"
    )
