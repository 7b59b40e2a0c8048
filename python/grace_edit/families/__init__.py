"""The kinds of models that can be edited, a file each; `base` is what they share."""

from __future__ import annotations

from typing import Any

from torch import nn

# Each file makes a subclass of Family. They are asked in this order whether a model is theirs: the
# classifier, which takes any encoder with a head, comes last.
from . import causal, seq2seq, masked, classifier  # noqa: F401 # isort: skip
from .base import Family, no_family, target_of

__all__ = ["FAMILIES", "Family", "family_of", "target_of"]

FAMILIES: dict[str, type[Family]] = {family.name: family for family in Family.__subclasses__()}
"""By the name that saved edits and `--task` know them by."""


def family_of(model: nn.Module, tokenizer: Any) -> Family:
    """Return the family of `model`, which runs it.

    Raises:
        ValueError: the model is of no supported kind.
    """
    for family in FAMILIES.values():
        if family.recognises(model):
            return family(model, tokenizer)
    raise no_family(model)
