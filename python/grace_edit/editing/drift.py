"""Measuring δ: how far a prompt's query moves between execution modes."""

from __future__ import annotations

import torch

import grace_kernels

from ..adaptor.adaptor import Captured, GraceAdaptor
from ..families.tasks import MaskedTask, Task

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


def measure_drift(task: Task, adaptor: GraceAdaptor, seed: int) -> tuple[float, Captured]:
    """Return δ and what the layer saw at the probes.

    δ is the largest canonical distance between a probe's query computed alone and in one padded
    batch of eight (padded on the right, and on the left where the family generates that way).

    Args:
        task, adaptor: of the attached model.
        seed: of the probes where there is no tokenizer.
    """
    probes = _probes(task, seed)
    alone = [task.capture(adaptor, [ids]) for ids in probes]
    drift = 0.0
    for left in {False, task.pads_left}:
        batch = task.capture(adaptor, probes, left=left)
        for one, padded in zip(alone, batch.queries, strict=True):
            radii = torch.zeros(1, device=padded.device)
            _, distance = grace_kernels.nearest(one.queries, padded[None], radii)
            drift = max(drift, float(distance))
    return drift, alone[0]


def _probes(task: Task, seed: int) -> list[list[int]]:
    if task.tokenizer is not None:
        probes = [task.tokens(sentence) for sentence in _SENTENCES]
    else:
        source = torch.Generator().manual_seed(seed)
        special = set(task.special_ids)
        words = [i for i in range(int(task.config.vocab_size)) if i not in special]
        picks = (torch.randint(len(words), (2 + 2 * n,), generator=source) for n in range(8))
        probes = [[words[int(i)] for i in pick] for pick in picks]
    probes = [ids[: task.longest] for ids in probes]
    if isinstance(task, MaskedTask):
        for ids in probes:
            ids[len(ids) // 2] = task.mask_id
    return probes
