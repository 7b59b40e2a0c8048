"""The keys of a prompt, made by a map from each of its spans.

A key `[M + L]` holds two parts, each of fixed length:

    meaning   what is asked: W times the weighted mean of the dense part, scaled to length m
    lexical   of whom: the weighted sum of the words' random signs, scaled to length l

    d² = |meaning − meaning'|² + |lexical − lexical'|²

so a sentence is near a key only if it asks the same (in whatever words) of the same subject (in the
same words). `roles` says how surely a word names the subject; two tables over how common a word is
turn that into its weight in either part.

All sums are over integers and below 2^53 in float64, so their bits do not depend on the order of
additions, on BLAS, on threads or on the machine. Then follow one square root, one division and one
product in float64 and one rounding to float32, each rounded as IEEE says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dense import SentenceEncoder, TokenTable
from .roles import FULL
from .spans import spans
from .text_map import TextMap
from .vocabulary import Vocabulary
from .words import folded, words_of

MOST_WORDS = 64
"""Words of a span that are read: the last ones."""
SOMETHING = "something"
"""What an encoder reads in place of the subject."""
_MEANING_BITS = 20


@dataclass(frozen=True)
class Reading:
    """What the map sees in one span.

    Args:
        span: the text.
        words: its words, each once.
        subject: how surely each names the subject, 0..1.
        key: `[D]` float32.
    """

    span: str
    words: list[str]
    subject: list[float]
    key: Tensor

    @property
    def subject_words(self) -> list[str]:
        """The words that name the subject."""
        return [word for word, sure in zip(self.words, self.subject, strict=True) if sure > 0.5]


@dataclass(frozen=True)
class Comparison:
    """Why two prompts are near or far.

    Args:
        mine, other: the readings of the prompt's nearest span, and of the edit's first.
        distance: between their keys (float64, for people; lookups compute their own).
        meaning, lexical: the two terms of its square.
        shared, unshared: words that name the subject in both, and in one of them alone.
    """

    mine: Reading
    other: Reading
    distance: float
    meaning: float
    lexical: float
    shared: list[str]
    unshared: list[str]


class TextKeys:
    """Make the keys of prompts: a map with the dense part that it was trained for.

    Args:
        text_map: the map.
        dense: a `TokenTable` or a `SentenceEncoder`, of the map's kind and width.

    Raises:
        ValueError: they do not belong together. Another fingerprint is not an error here: a map
            serves the finetuned children of a model as well. A codebook must compare
            `fingerprint()` with the one it was made with.

    It keeps the words that it met. Several threads may use it at once.
    """

    def __init__(self, text_map: TextMap, dense: TokenTable | SentenceEncoder) -> None:
        reference = text_map.dense
        if dense.kind != reference.kind:
            raise ValueError(f"dense must be of kind {reference.kind!r}, got {dense.kind!r}")
        self.map = text_map
        self.dense = dense
        self.width = text_map.width
        self.radius = text_map.radius
        self._matrix = text_map.matrix.astype(np.float64)
        # [2, 2, 16]: meaning and lexical part, by role and level.
        self._tables = np.stack([text_map.meaning_weights, text_map.lexical_weights]).astype(float)
        self._met = Vocabulary(text_map, dense)

    def __getstate__(self) -> dict[str, Any]:
        return {"text_map": self.map, "dense": self.dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def keys(self, prompt: str) -> Tensor:
        """Return the keys of a prompt, one per span: `[S, D]` float32, S mostly 1, 8 at most.

        The first is the one an edit of this prompt is stored under.
        """
        found = spans(prompt)
        keys = np.empty((len(found), self.width), dtype=np.float32)
        for key, span in zip(keys, found, strict=True):
            self._write_key(self._look(span), key)
        return torch.from_numpy(keys)

    def read(self, prompt: str) -> list[Reading]:
        """Return what the map sees in each span of a prompt."""
        readings = []
        for span in spans(prompt):
            sentence = self._look(span)
            key = np.empty(self.width, dtype=np.float32)
            self._write_key(sentence, key)
            readings.append(
                Reading(
                    span,
                    [sentence.texts[i] for i in sentence.kept],
                    (sentence.subject[sentence.kept] / FULL).tolist(),
                    torch.from_numpy(key),
                )
            )
        return readings

    def compare(self, prompt: str, other: str) -> Comparison:
        """Say why a prompt is near the prompt of an edit, `other`, or far from it.

        Of the prompt the span that is nearest counts, of the edit's its first, which is its key.
        """
        b = self.read(other)[0]
        a = min(self.read(prompt), key=lambda one: float((one.key - b.key).double().norm()))
        square = (a.key.double() - b.key.double()).square()
        meaning = float(square[: len(self._matrix)].sum())
        lexical = float(square[len(self._matrix) :].sum())
        mine, its = _subject_words(a), _subject_words(b)
        return Comparison(
            mine=a,
            other=b,
            distance=float(np.sqrt(meaning + lexical)),
            meaning=meaning,
            lexical=lexical,
            shared=[word for key, word in mine.items() if key in its],
            unshared=[
                *(word for key, word in mine.items() if key not in its),
                *(word for key, word in its.items() if key not in mine),
            ],
        )

    def fingerprint(self) -> str:
        """Return a hash of the map and of this dense part: equal ones make equal keys."""
        both = f"{self.map.fingerprint()} {self.dense.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def _look(self, span: str) -> _Sentence:
        texts = words_of(span)[-MOST_WORDS:]
        met = self._met
        rows = met.rows(texts)
        while rows is None:
            # Whoever reads the old one still may; the words of one span always fit a new one.
            self._met = met = Vocabulary(self.map, self.dense)
            rows = met.rows(texts)
        if not rows:
            return _Sentence(met, texts, rows, np.zeros(0), [])
        at = np.array(rows)
        subject = self.map.roles.subject_of(
            met.properties[at], met.plain[at], capital=texts[0][:1].isupper()
        )
        first: dict[str, int] = {}
        for i, row in enumerate(rows):
            first.setdefault(met.folded[row], i)
        return _Sentence(met, texts, rows, subject, list(first.values()))

    def _write_key(self, sentence: _Sentence, key: np.ndarray) -> None:
        """Write the key of a sentence into `[D]` float32; zeros for one without a word."""
        if not sentence.rows:
            key[:] = 0
            return
        kept = sentence.kept
        subject = sentence.subject[kept]
        rows = np.array([sentence.rows[i] for i in kept])
        # [2, 2, words]: what each word would weigh in either part in either role.
        either = self._tables[:, :, sentence.met.level[rows]]
        weights = subject * either[:, 0] + (FULL - subject) * either[:, 1]
        numbers, width = sentence.met.numbers[rows], self.map.lexical_width
        if isinstance(self.dense, SentenceEncoder):
            asked = without_subject(sentence.texts, sentence.subject)
            meaning = self._matrix @ self.dense.sentence(asked)
        else:
            meaning = weights[0] @ numbers[:, :-width]
        lexical = weights[1] @ numbers[:, -width:]
        # Not the length of the sum: the signs of two words are orthogonal but for chance.
        squares = float(np.dot(weights[1], weights[1])) + self.map.lexical_floor
        length = math.sqrt(squares * width)
        meaning = _below(meaning, _MEANING_BITS)
        norm = math.sqrt(float(np.dot(meaning, meaning)))
        key[:-width] = meaning * _over(self.map.meaning_length, norm)
        key[-width:] = lexical * _over(self.map.lexical_length, length)


@dataclass(frozen=True)
class _Sentence:
    """The words of a span, their rows of `met`, `subject [words]` float64 of 256, and where each
    word stands first.
    """

    met: Vocabulary
    texts: list[str]
    rows: list[int]
    subject: np.ndarray
    kept: list[int]


def _below(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Bring integers below 2^bits by a power of two, so that their squares can be added exactly."""
    shift = math.frexp(float(np.abs(numbers).max(initial=1.0)))[1] - bits
    return np.rint(numbers * 2.0**-shift) if shift > 0 else numbers


def _over(length: float, norm: float) -> float:
    return length / norm if norm > 0 else 0.0


def without_subject(texts: Sequence[str], subject: np.ndarray) -> str:
    """Return a sentence as an encoder reads it: `SOMETHING` for each run of subject's words."""
    kept: list[str] = []
    for text, weight in zip(texts, subject.tolist(), strict=True):
        if weight <= FULL // 2:
            kept.append(text)
        elif kept[-1:] != [SOMETHING]:
            kept.append(SOMETHING)
    return " ".join(kept)


def _subject_words(reading: Reading) -> dict[str, str]:
    return {
        folded(word): word
        for word, subject in zip(reading.words, reading.subject, strict=True)
        if subject > 0.5
    }
