"""What an editor is told: one dataclass, checked where it is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_CHOICES = {
    "policy": ("default", "paper"),
    "recipe": ("default", "paper"),
    "replace": (None, "last", "prompt", "all"),
    "query": (None, "last", "mean", "text"),
    "init": ("warm", "cold"),
}

_NUMBERS = {"radius": False, "lr": False, "margin": False, "drift": True, "max_radius": True}
"""Numbers at least 0, and whether None is allowed."""


CALLABLE = "callable"
"""Stands in saved settings for an encoder that only the caller can give."""


@dataclass(frozen=True)
class GraceConfig:
    """Configure a `GraceEditor`.

    Args:
        layer: name of the layer to wrap, as in `model.named_modules()`: dots or brackets, a unique
            suffix is enough. A block's `mlp` is a good choice.
        radius: deferral radius of a new entry (ε_init), in units of the layer's input distance.
        policy: `"default"`, or `"paper"` for the decisions of the published method.
        recipe: `"default"` trains with early stop; `"paper"` trains a cold value with Adam at
            lr 1.0 for 100 steps and replaces the prompt's tokens before the query.
        replace: which rows of the output an answer replaces: `"last"` (the query token),
            `"prompt"` (up to and including it), `"all"` (every token). None: `"last"` for causal
            language models, `"all"` for encoders.
        query: `"last"` (the last prompt token; the mask position of a masked language model),
            `"mean"` (mean of the prompt's tokens) or `"text"` (made from the prompt's text before
            the model runs, so that other wordings are answered too). None: `"mean"` for encoders,
            `"last"` for decoders.
        encoder: what `query="text"` takes the meaning of words from: `"tokens"` (the model's own
            input embeddings; nothing is run), the path or id of a sentence encoder, or a callable
            that takes a list of B texts and returns `[B, E]`.
        text_map: of `query="text"`, the directory of a map or a `TextMap`. None: the map that comes
            with this package for the model or encoder.
        init: values start at the layer's own output (`"warm"`) or at random from `seed` (`"cold"`).
        lr: least Adam step, in units of the root mean square of the value it starts from. The step
            is longer where it would hardly move the target's logits.
        max_steps: most Adam steps for one value.
        margin: log odds of each target token against all others together, nats, at which training
            stops: 4 is a probability of .98. A value that works and falls short of it is trained on
            for about as many steps as it took, and then taken.
        contexts: how many sentences of other matters, 0..8, a value is trained behind, beside the
            prompt alone, so that it produces the target in other wordings too (causal language
            models with `replace="last"` and a tokenizer; elsewhere none). None: 4 for
            `query="text"`, else 0. `recipe="paper"` uses neither these four nor `init`.
        capacity: entries the codebook holds before it has to grow.
        max_radius: largest radius an entry may be expanded to. None: 3 × `radius`.
        drift: how far a prompt's query moves between execution modes (δ). None: measured when the
            editor attaches.
        seed: of cold values and of the probe prompts.

    Raises:
        ValueError: an argument is out of its range.
    """

    layer: str
    radius: float = 1.0
    policy: str = "default"
    recipe: str = "default"
    replace: str | None = None
    query: str | None = None
    encoder: str | Callable[[list[str]], Any] = "tokens"
    text_map: Any = None
    init: str = "warm"
    lr: float = 0.3
    max_steps: int = 100
    margin: float = 5.0
    contexts: int | None = None
    capacity: int = 1024
    max_radius: float | None = None
    drift: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str) or not self.layer:
            raise ValueError(f"layer must be the name of a layer, got {self.layer!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not callable(self.encoder) and not (isinstance(self.encoder, str) and self.encoder):
            raise ValueError(
                f"encoder must be 'tokens', the name of an encoder or a callable, got "
                f"{self.encoder!r}"
            )
        for name, optional in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < float("inf") or (value == 0 and name in ("radius", "lr")):
                rule = "positive" if name in ("radius", "lr") else "at least 0"
                raise ValueError(f"{name} must be {rule} and finite, got {value}")
        if self.contexts is not None and (
            type(self.contexts) is not int or not 0 <= self.contexts <= 8
        ):
            raise ValueError(f"contexts must be an integer from 0 to 8, got {self.contexts!r}")
        for name, least in (("max_steps", 1), ("capacity", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if callable(self.encoder):
            fields["encoder"] = CALLABLE
        if self.text_map is not None:
            # A map given as such is saved beside the edits, as every other is.
            named = isinstance(self.text_map, (str, os.PathLike))
            fields["text_map"] = os.fspath(self.text_map) if named else None
        return fields
