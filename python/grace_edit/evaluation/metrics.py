"""The field's metrics as pure functions over texts, token ids, logits and lists of scores.

A score is of one answer; `DEFINITIONS` says which answers each of the field's names is a mean of.
Means of nothing are None, never 0 or 1.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DEFINITIONS = {
    "ES": "score of each edit's own prompt right after it was made",
    "ERR": "score, now, of the prompts of all past edits",
    "TRR": "score, now, on upstream data, that has nothing to do with the edits",
    "ARR": "score, now, on continuations of the edited passages that no edit changes",
    "generality": "score, now, of the edits' prompts in other words",
    "portability": "score, now, of questions whose answer follows from an edit",
    "fires": "share of prompts that an edit answers, now",
    "unchanged": "share of prompts whose answer is, now, that of the unedited model",
}
"""What is averaged under each name; a score is one of those below."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return `text` as SQuAD compares it: lower case, no punctuation, articles or extra spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(answer: str, wanted: str) -> bool:
    """Say whether an answer is the wanted text, spaces round it aside.

    With as many tokens generated as the target has, this is "the model produces the target".
    """
    return answer.strip() == wanted.strip()


def f1(answer: str, wanted: Iterable[str]) -> float:
    """Return the best word F1 of an answer over the right ones, normalised as in SQuAD."""
    return max((_f1_of(normalized(answer), normalized(one)) for one in wanted), default=0.0)


def _f1_of(answer: str, wanted: str) -> float:
    mine, theirs = answer.split(), wanted.split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(mine), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def grace_f1(produced: Sequence[int], wanted: Sequence[int], pad_id: int | None) -> float:
    """Return the F1 that the code published with GRACE computes, for parity with its figures.

    Both sides are token ids with the end-of-sequence token in them; repeated tokens are shared
    once. So a wholly wrong answer of one token gets 0.5, the end token being shared: use `f1` for
    anything but a comparison with published numbers.

    Args:
        produced: what the model generated (T5's start token is padding, which is left out).
        wanted: the target's ids.
        pad_id: left out of `produced` where that is longer than one token.
    """
    mine = list(produced)
    if len(mine) > 1:
        mine = [token for token in mine if token != pad_id]
    shared = len(set(mine) & set(wanted))
    if shared == 0 or not mine:
        return 0.0
    precision, recall = shared / len(mine), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def token_accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the share of target tokens that lead, each asked behind the right ones before it.

    This is EasyEdit's teacher-forced `rewrite_acc`. It also compares predictions before an edit
    with those after it (EasyEdit's locality).

    Raises:
        ValueError: they differ in length, or there is no token.
    """
    if len(predicted) != len(wanted) or not wanted:
        raise ValueError(
            f"predicted must have as many tokens as wanted, at least one, got {len(predicted)} "
            f"for {len(wanted)}"
        )
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def token_losses(logits: Tensor, wanted: Sequence[int]) -> list[float]:
    """Return the negative log-likelihood of each token, nats: `logits [n, classes]`, n ids."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    places = torch.tensor(list(wanted), device=logits.device)
    return [-found for found in logs.gather(1, places[:, None]).squeeze(1).tolist()]


def perplexity(losses: Sequence[float]) -> float:
    """Return exp of the mean loss of a text's tokens, +inf where it overflows.

    Raises:
        ValueError: there is no token.
    """
    if not losses:
        raise ValueError("losses must hold at least one token's, got none")
    try:
        return math.exp(math.fsum(losses) / len(losses))
    except OverflowError:
        return math.inf


def mean(scores: Iterable[float | bool | None]) -> float | None:
    """Return the mean of the scores that are there (not None, not NaN), None if none is."""
    found = [float(score) for score in scores if score is not None and score == score]
    return math.fsum(found) / len(found) if found else None


def edits_per_key(edits: int, keys: int) -> float | None:
    """Live edits for one entry of the codebook, None without an entry."""
    return edits / keys if keys else None
