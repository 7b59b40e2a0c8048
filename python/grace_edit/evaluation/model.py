"""Asking a model the way it is served: free, and with the target's own tokens put in its mouth.

Both go through `generate` with the KV cache, so an edited model asks its codebook where it always
does, once, at the prompt's end, whatever its configuration. Teacher forcing is the same generation
with every token replaced by the target's.

The one place of this package that knows model families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.attach import find_layer
from .metrics import token_losses
from .records import Target

CAUSAL, SEQ2SEQ, CLASSIFIER = FAMILIES = ("causal", "seq2seq", "classifier")
MOST_TOKENS = 20
"""What an encoder–decoder generates at most, as in the code published with GRACE."""


@dataclass(frozen=True)
class Answer:
    """What a model says by itself: `text`, and the `ids` of its new tokens (its class)."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Forced:
    """What leads at each token of a target, behind the right ones before it.

    Args:
        predicted, wanted: token ids, or one class.
        losses: negative log-likelihood of each wanted one, nats; None for a method that answers
            without the model.
    """

    predicted: list[int]
    wanted: list[int]
    losses: list[float] | None


class AskedModel:
    """A transformers model and its tokenizer.

    Args:
        model: a causal language model, an encoder–decoder or a sequence classifier.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the model is of another kind.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.family = family_of(model)
        self.model.eval()

    # What a record is to this model

    def prompt(self, text: str) -> str:
        """Return a prompt as it is asked: a causal model's ends before the space of its answer."""
        return text.rstrip() if self.family == CAUSAL else text

    def for_editor(self, text: str) -> str | list[int]:
        """Return a prompt as an editor of this model takes it: ids, cut at the end, where the text
        is too long for a classifier."""
        if self.family == CLASSIFIER:
            ids = list(self.tokenizer(text, add_special_tokens=True).input_ids)
            if len(ids) > self.longest:
                return self._prompt_ids(text)
        return self.prompt(text)

    def fits(self, prompt: str, target: Target) -> bool:
        """Say whether the model has positions for a prompt and its target."""
        if self.family != CAUSAL:
            return True
        return self.prompt_length(prompt) + len(self.wanted_ids(prompt, target)) <= self.longest

    def target(self, target: Target) -> Target:
        """Return a target as the model says it: after a prompt with its space, or a class."""
        if self.family == CLASSIFIER:
            return target
        if not isinstance(target, str):
            raise ValueError(f"target must be a text for a language model, got {target!r}")
        return " " + target.strip() if self.family == CAUSAL else target.strip()

    def label(self, target: Target) -> str:
        """Return a target as text, to compare answers with."""
        if self.family == CLASSIFIER:
            return self._class_name(self._class_id(target))
        return str(target).strip()

    @property
    def longest(self) -> int:
        """How many tokens the model has positions for."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else 1 << 30

    def wanted_ids(self, prompt: str, target: Target) -> list[int]:
        """Return a target's token ids behind `prompt`, or its class."""
        if self.family == CLASSIFIER:
            return [self._class_id(target)]
        said = str(self.target(target))
        if self.family == SEQ2SEQ:
            return list(self.tokenizer(said, add_special_tokens=True).input_ids)
        ids = self._prompt_ids(prompt)
        # Some tokenizers begin any text with a word mark; what follows the prompt counts.
        whole = list(self.tokenizer(self.prompt(prompt) + said, add_special_tokens=True).input_ids)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
        return list(self.tokenizer(said, add_special_tokens=False).input_ids)

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = list(self.tokenizer(self.prompt(prompt), add_special_tokens=True).input_ids)
        if self.family == CLASSIFIER and len(ids) > self.longest:
            cut = self.tokenizer(prompt, truncation=True, max_length=self.longest)
            ids = list(cut.input_ids)
        return ids

    def _class_id(self, target: Target) -> int:
        if isinstance(target, int):
            return target
        names = getattr(self.model.config, "label2id", None) or {}
        if target not in names:
            raise ValueError(f"target must be one of {sorted(names)}, got {target!r}")
        return int(names[target])

    def _class_name(self, number: int) -> str:
        names = getattr(self.model.config, "id2label", None) or {}
        return str(names.get(number, number))

    # Asking

    def ask(
        self, prompt: str, target: Target | None, least: int = 1
    ) -> tuple[Answer, Forced | None]:
        """Let the model answer by itself (greedy), then with a target's own tokens.

        By itself a causal model says as many tokens as `target` has, at least `least`; an
        encoder–decoder up to its end token and at most `MOST_TOKENS`; a classifier its class.
        Without a target there is nothing to force.
        """
        wanted = None if target is None else self.wanted_ids(prompt, target)
        if self.family == CLASSIFIER:
            logits = self._class_logits(prompt)
            number = int(logits.argmax())
            answer = Answer(self._class_name(number), [number])
            return answer, None if wanted is None else _forced(logits, wanted)
        tokens = max(least, len(wanted or ()))
        made = self._generate(prompt, MOST_TOKENS if self.family == SEQ2SEQ else tokens)
        new = made.sequences[0].tolist()
        text = str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        answer = Answer(text, new)
        if wanted is None:
            return answer, None
        if new[: len(wanted)] != wanted:
            made = self._generate(prompt, len(wanted), follow=wanted)
        # Else the model said the target by itself: the two ways are one.
        logits = torch.cat(made.logits)[: len(wanted)]
        return answer, _forced(logits.float(), wanted[: len(logits)])

    @torch.no_grad()
    def _class_logits(self, prompt: str) -> Tensor:
        ids = torch.tensor([self._prompt_ids(prompt)], device=self.model.device)
        found: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return found.float()

    @torch.no_grad()
    def _generate(self, prompt: str, tokens: int, follow: Sequence[int] | None = None) -> Any:
        """Return `sequences [1, n]` of the new tokens alone, and raw `logits`, n of `[1, V]`."""
        ids = torch.tensor([self._prompt_ids(prompt)], device=self.model.device)
        skip = 1 if self.family == SEQ2SEQ else ids.shape[1]
        forcing = {} if follow is None else {"logits_processor": [_Follow(follow, skip)]}
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._pad_id(),
            **forcing,
        )
        made.sequences = made.sequences[:, skip:]
        return made

    @torch.no_grad()
    def read(self, prompt: str) -> None:
        """Run a prompt through the model (an encoder–decoder's encoder), for what hooks see."""
        ids = torch.tensor([self._prompt_ids(prompt)], device=self.model.device)
        reader = self.model.get_encoder() if self.family == SEQ2SEQ else self.model
        reader(input_ids=ids, attention_mask=torch.ones_like(ids))

    def _pad_id(self) -> int:
        for owner in (self.tokenizer, self.model.config):
            found = getattr(owner, "pad_token_id", None)
            if found is not None:
                return int(found)
        return 0

    # Training, for methods that change weights

    def training_logits(self, prompt: str, target: Target) -> tuple[Tensor, Tensor]:
        """Return `(logits [n, classes], wanted [n])` of a target, with gradients, in one pass."""
        device = self.model.device
        wanted = torch.tensor(self.wanted_ids(prompt, target), device=device)
        ids = torch.tensor([self._prompt_ids(prompt)], device=device)
        if self.family == CLASSIFIER:
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        elif self.family == SEQ2SEQ:
            logits = self.model(input_ids=ids, labels=wanted[None]).logits[0]
        else:
            whole = torch.cat([ids, wanted[None]], dim=1)
            logits = self.model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1]
        return logits.float(), wanted

    def prompt_length(self, prompt: str) -> int:
        """Return how many tokens a prompt has."""
        return len(self._prompt_ids(prompt))

    def module(self, layer: str) -> nn.Module:
        """Return a layer by its name, as the editor understands names."""
        found: nn.Module = find_layer(self.model, layer)[1]
        return found


def _forced(logits: Tensor, wanted: list[int]) -> Forced:
    return Forced(logits.argmax(dim=-1).tolist(), wanted, token_losses(logits, wanted))


class _Follow:
    """A logits processor that lets generation say given tokens and nothing else."""

    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[:, self.tokens[input_ids.shape[1] - self.start]] = 0.0
        return only


def family_of(model: Any) -> str:
    """Return the family of a model.

    Raises:
        ValueError: it is none of `FAMILIES`.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return SEQ2SEQ
    if name.endswith("ForSequenceClassification"):
        return CLASSIFIER
    if not name.endswith("ForMaskedLM") and callable(getattr(model, "generate", None)):
        return CAUSAL
    raise ValueError(
        f"model must be a causal language model, an encoder-decoder or a sequence classifier, got "
        f"{name}"
    )


def load_model(source: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer by path or hub id, of the family its configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    names = " ".join(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        auto: Any = transformers.AutoModelForSeq2SeqLM
    elif "ForSequenceClassification" in names:
        auto = transformers.AutoModelForSequenceClassification
    else:
        auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype="auto" if dtype is None else dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(source)
