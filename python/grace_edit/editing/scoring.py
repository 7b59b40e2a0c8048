"""How probable a continuation is to the model as it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..families import Family
from ..families.base import in_pieces


@dataclass(frozen=True)
class Score:
    """How probable a continuation is, in natural logarithms.

    Args:
        log_probability: of the whole continuation, the sum over its tokens.
        tokens: its token ids (or its class).
        log_probabilities: of each token, given the prompt and the tokens before it.
        greedy: each token is the most probable one in its place.
    """

    log_probability: float
    tokens: list[int]
    log_probabilities: list[float]
    greedy: bool


@torch.no_grad()
def score(family: Family, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    """Return the score of each `(prompt, continuation)`, run teacher forced in batches."""
    scores = []
    for piece in in_pieces([len(prompt) + len(own) for prompt, own in pairs]):
        prompts, targets = [p for p, _ in pairs[piece]], [y for _, y in pairs[piece]]
        logits, wanted = family.target_logits(prompts, targets, None)
        chosen = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)
        best = (logits.argmax(dim=1) == wanted).tolist()
        start, each = 0, chosen.tolist()
        for own in targets:
            its = slice(start, start + len(own))
            start += len(own)
            scores.append(Score(sum(each[its]), list(own), each[its], all(best[its])))
    return scores
