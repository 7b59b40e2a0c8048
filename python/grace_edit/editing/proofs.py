"""Proving values by free generation: alone, as they are served, or many in one.

Prompts give the same numbers in one generation as alone, but for rounding. So where a target leads
by far more than that, what a row of several generates is what it generates alone. Everything else
is proven alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adaptor.torch_private import is_compiled
from ..families import Family
from ..families.base import in_pieces
from ..families.projection import logits_seen
from .prefills import Prefills

_SURE = 1.0
"""Nats by which the tokens of a target lead at least, in log odds, where it is proven among others.
A logit would have to be off by half of it to change which is the largest."""

_OFF = _SURE / 4
"""The most by which logits of a row among others may differ from those that it has alone."""

_TOGETHER = 3
"""Prompts that are worth it, as one of them runs alone as well."""

Row = tuple[list[int], list[int], Tensor]
"""A prompt, its target and the value `[V]` that answers it."""


@dataclass(frozen=True)
class Proof:
    """What is to be proven of one value.

    Args:
        rows: every prompt, with its target, answered by this value.
        lead: the least log odds of a target's tokens, nats, in a forward over prompt and target.
        prefills: which some of the prompts were run in; None: none was.
    """

    rows: Sequence[Row]
    lead: float
    prefills: Prefills | None = None


def prove(family: Family, proofs: Sequence[Proof]) -> list[bool]:
    """Say of each value whether the model produces all its targets by itself with it.

    Args:
        family: of the attached model, inside `working`.
        proofs: one for each value.
    """
    alone = [proof.prefills or Prefills(family) for proof in proofs]
    works = _among_others(family, proofs, alone)
    return [
        all((n, i) in works or alone[n].produces(*row) for i, row in enumerate(proof.rows))
        for n, proof in enumerate(proofs)
    ]


def _among_others(
    family: Family, proofs: Sequence[Proof], alone: Sequence[Prefills]
) -> set[tuple[int, int]]:
    """Generate from the prompts that may be together; return value and row of what is proven."""
    # A compiled model would be compiled anew. Codebooks of other layers look up queries, which
    # rounding may take out of a radius.
    if not family.generates or is_compiled(family.model) or family.adaptor.others:
        return set()
    alike: dict[int, list[tuple[int, int]]] = {}
    for n, proof in enumerate(proofs):
        if proof.lead >= _SURE:
            for i, (_, target, _) in enumerate(proof.rows):
                alike.setdefault(len(target), []).append((n, i))
    works: set[tuple[int, int]] = set()
    for length, names in alike.items():
        names.sort(key=lambda name: len(proofs[name[0]].rows[name[1]][0]))
        lengths = [len(proofs[n].rows[i][0]) + length for n, i in names]
        for piece in in_pieces(lengths):
            some = names[piece]
            if len(some) >= _TOGETHER:
                rows = [proofs[n].rows[i] for n, i in some]
                produced = _together(family, rows, alone[some[0][0]])
                if produced is None:
                    return works
                works.update(itertools.compress(some, produced))
    return works


def _together(family: Family, rows: Sequence[Row], alone: Prefills) -> list[bool] | None:
    """Say of each row whether its target is produced; None: rows are not as they are alone.

    Args:
        rows: the first, which has the most padding, is generated alone as well.
        alone: runs it.
    """
    prompts, targets, values = zip(*rows, strict=True)
    with logits_seen(family.model, 0) as among:
        produced = family.produces(prompts, targets, torch.stack(values))
    with logits_seen(family.model, 0) as own:
        works = alone.produces(*rows[0])
    # Its first generation of all is made more than once.
    pairs = zip(among, own[-len(among) :], strict=False)
    same = works == produced[0] and 0 < len(among) <= len(own)
    same = same and all(torch.allclose(one, its, rtol=0, atol=_OFF) for one, its in pairs)
    return produced if same else None
