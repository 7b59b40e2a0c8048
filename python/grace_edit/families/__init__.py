"""The kinds of models that can be edited, a file each; `base` is what they share."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adaptor.attach import core_of

# Each file makes a subclass of Family. In the order in which --task offers them.
from . import causal, seq2seq, classifier, masked  # noqa: F401 # isort: skip
from .base import Family, no_family, target_of

__all__ = ["FAMILIES", "Family", "bare", "family_of", "target_of"]

FAMILIES: dict[str, type[Family]] = {family.name: family for family in Family.__subclasses__()}
"""By the name that saved edits and `--task` know them by."""


def bare(model: Any) -> nn.Module:
    """Return the model without wrappers.

    Raises:
        ValueError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model that was loaded, got {model!r:.100}")
    return core_of(model)


def family_of(model: nn.Module, tokenizer: Any) -> Family:
    """Return the family of `model`, which runs it.

    Raises:
        ValueError: the model is of no supported kind.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: family.last_resort):
        if family.recognises(model):
            return family(model, tokenizer)
    raise no_family(model)
