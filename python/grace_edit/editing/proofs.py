"""Proving values by free generation: alone, as they are served, or many in one.

Prompts give the same numbers in one generation as alone, but for rounding. So where a target leads
by far more than that, what a row of several generates is what it generates alone. Of each such
generation one row, that with the most padding, is generated alone as well, and what the output
projection gives is compared. Everything else is proven alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from ..families.base import Begun
from ..families.projection import logits_seen
from .cutting import Twin
from .prefills import Prefills

_SURE = 1.0
"""Nats by which the tokens of a target lead at least, in log odds, where it is proven among others.
It leads in logits by no less, as the others together have at least the logit of the largest of
them. So a logit would have to be off by half of it to change which is the largest."""

_OFF = _SURE / 4
"""The most by which logits of a row among others may differ from those that it has alone."""

_TOGETHER, _MOST = 3, 32
"""Prompts that are worth it, as one of them runs alone as well, and how many run at once at most:
what was begun of them is copied."""

_PLAIN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
    *("use_cache", "output_attentions", "output_hidden_states", "_from_model_config"),
}
"""Settings of a generation that greedy ones of a given length make nothing else of. Others may look
at the prompt's own tokens, forbid some of the target's, or take one row at a time."""


@dataclass(frozen=True)
class Proof:
    """What is to be proven of one value.

    Args:
        prompts, targets: token ids; all of them are answered by the value.
        value: `[V]`, as it will be stored.
        lead: the least log odds of a target's tokens, nats, in a forward over prompt and target.
        first: row of its first prompt among what was begun; the others follow it.
        prefills: which some of the prompts were run in; None: none was.
    """

    prompts: Sequence[list[int]]
    targets: Sequence[list[int]]
    value: Tensor
    lead: float
    first: int = 0
    prefills: Prefills | None = None


def prove(family: Family, proofs: Sequence[Proof], begun: Begun | None) -> list[bool]:
    """Say of each value whether the model produces all its targets by itself with it.

    Args:
        family: of the attached model, inside `working`.
        proofs: one for each value.
        begun: their prompts, among others; None: each is run.
    """
    works = set() if begun is None else _among_others(family, proofs, begun)
    found = []
    for n, proof in enumerate(proofs):
        alone = proof.prefills or Prefills(family)
        pairs = zip(proof.prompts, proof.targets, strict=True)
        each = ((n, i) in works or alone.produces(*p, proof.value) for i, p in enumerate(pairs))
        found.append(all(each))
    return found


def _among_others(family: Family, proofs: Sequence[Proof], begun: Begun) -> set[tuple[int, int]]:
    """Go on from all prompts whose targets lead; return value and prompt of what was produced."""
    sure = [(n, proof) for n, proof in enumerate(proofs) if proof.lead >= _SURE]
    names = [(n, i) for n, proof in sure for i in range(len(proof.prompts))]
    works: set[tuple[int, int]] = set()
    for start in range(0, len(names), _MOST):
        some = names[start : start + _MOST]
        if len(some) >= _TOGETHER and family.among_others and _is_plain(family.model):
            produced = _together(family, proofs, some, begun)
            family.among_others = produced is not None
            works.update(itertools.compress(some, produced or ()))
    return works


def _together(
    family: Family, proofs: Sequence[Proof], names: Sequence[tuple[int, int]], begun: Begun
) -> list[bool] | None:
    """Say what is produced of each value and prompt named.

    None where the prompt with the most padding has other logits than it has alone.
    """
    rows = begun.only([proofs[n].first + i for n, i in names])
    padding = [padding for _, padding in rows.ran]
    at = padding.index(max(padding))
    targets = [proofs[n].targets[i] for n, i in names]
    twin = Twin(family).family  # other threads may use the model itself meanwhile
    with logits_seen(twin.model, at) as among:
        produced = rows.produces(twin, targets, torch.stack([proofs[n].value for n, _ in names]))
    n, i = names[at]
    with logits_seen(twin.model, 0) as own:
        (works,) = twin.produces([proofs[n].prompts[i]], [targets[at]], proofs[n].value[None])
    # Those among others may be longer.
    same = works == produced[at] and 0 < len(own) <= len(among)
    for one, its in zip(among, own, strict=False):
        same = same and torch.allclose(one, its, rtol=0, atol=_OFF)
    return produced if same else None


def _is_plain(model: Any) -> bool:
    """Say whether a model generates as transformers does, with plain settings."""
    from transformers import GenerationMixin

    own = getattr(type(model), "grace_base", type(model))
    if "generate" in model.__dict__ or own.generate is not GenerationMixin.generate:
        return False
    config = getattr(model, "generation_config", None)
    return config is not None and set(config.to_diff_dict()) <= _PLAIN
