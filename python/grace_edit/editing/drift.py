"""Measuring δ: how far a prompt's query moves between execution modes."""

from __future__ import annotations

import torch

import grace_kernels

from ..adaptor.precision import autocast_of, own_dtype, without_autocast
from ..adaptor.state import Captured
from ..families import Family

_SENTENCES = (
    "The committee met on Tuesday",
    "Rain fell all night and the river rose above the old stone bridge",
    "She answered",
    "Nobody at the station could say when the next train to the coast would leave",
    "Three of the seven samples",
    "The library opens at nine, but the reading room on the second floor is closed until spring",
    "A short walk",
    "Prices rose again in March after two quiet months",
)


def measure_drift(family: Family, seed: int) -> tuple[float, Captured]:
    """Return δ and what the layer saw at the probes.

    δ is the largest canonical distance between a probe's query computed alone and in one padded
    batch of eight (padded on the right, and on the left where the family generates that way).
    Inside `torch.autocast` also that between the query inside and the one outside.

    Args:
        family: of the attached model.
        seed: of the probes where there is no tokenizer.
    """
    probes = probes_of(family, seed)
    alone = [family.capture([ids]) for ids in probes]
    family.check_queries([seen.queries for seen in alone])
    dtype = own_dtype(family.model.get_submodule(family.layer), alone[0].queries)
    others = [family.capture(probes, left=left).queries for left in {False, family.pads_left}]
    if autocast_of(family.device) is not None:
        with without_autocast():
            others += [torch.cat([family.capture([ids]).queries for ids in probes])]
    drift = 0.0
    for other in others:
        for one, moved in zip(alone, other.to(dtype), strict=True):
            radii = torch.zeros(1, device=moved.device)
            _, distance = grace_kernels.nearest(one.queries.to(dtype), moved[None], radii)
            drift = max(drift, float(distance))
    return drift, alone[0]


def probes_of(family: Family, seed: int) -> list[list[int]]:
    """Return prompts of different lengths that the model takes, as token ids."""
    if family.tokenizer is not None:
        texts = [family.tokens(sentence) for sentence in _SENTENCES]
    else:
        source = torch.Generator().manual_seed(seed)
        special = set(family.special_ids)
        words = [i for i in range(int(family.config.vocab_size)) if i not in special]
        picks = (torch.randint(len(words), (2 + 2 * n,), generator=source) for n in range(8))
        texts = [[words[int(i)] for i in pick] for pick in picks]
    return [family.probe(ids[: family.longest]) for ids in texts]
