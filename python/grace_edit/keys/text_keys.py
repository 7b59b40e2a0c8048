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
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dense import SentenceEncoder, TokenTable
from .roles import FULL, Word, describe
from .spans import spans
from .text_map import W_BITS, TextMap
from .words import folded, signs, words_of

MOST_WORDS = 64
"""Words of a span that are read: the last ones."""
SOMETHING = "something"
"""What an encoder reads in place of the subject."""
_CACHED = 1 << 15
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

    It keeps the words that it met. Use from several threads is safe: at worst a word is looked at
    twice.
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
        self._lexical = text_map.lexical_weights.astype(np.int64)
        self._meaning = text_map.meaning_weights.astype(np.int64)
        self._words: OrderedDict[str, _Known] = OrderedDict()

    def keys(self, prompt: str) -> Tensor:
        """Return the keys of a prompt, one per span: `[S, D]` float32, S mostly 1, 8 at most.

        The first is the one an edit of this prompt is stored under.
        """
        return torch.from_numpy(np.stack([self._key(self._look(span)) for span in spans(prompt)]))

    def read(self, prompt: str) -> list[Reading]:
        """Return what the map sees in each span of a prompt."""
        sentences = [self._look(span) for span in spans(prompt)]
        return [
            Reading(
                sentence.span,
                [sentence.words[i].word.text for i in sentence.kept],
                (sentence.subject[sentence.kept] / FULL).tolist(),
                torch.from_numpy(self._key(sentence)),
            )
            for sentence in sentences
        ]

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
        words = self._known(words_of(span)[-MOST_WORDS:])
        first: dict[str, int] = {}
        for i, one in enumerate(words):
            first.setdefault(one.folded, i)
        subject = self.map.roles.subject([one.word for one in words])
        return _Sentence(span, words, subject, list(first.values()))

    def _key(self, sentence: _Sentence) -> np.ndarray:
        if not sentence.words:
            return np.zeros(self.width, dtype=np.float32)
        known = [sentence.words[i] for i in sentence.kept]
        subject = sentence.subject[sentence.kept]
        level = np.array([one.word.level for one in known])
        weights = _mixed(self._lexical, subject, level)
        lexical = weights @ np.stack([one.signs for one in known])
        # Not the length of the sum: the signs of two words are orthogonal but for chance.
        squares = np.dot(weights, weights) + self.map.lexical_floor
        length = np.sqrt(squares * self.map.lexical_width)
        if isinstance(self.dense, SentenceEncoder):
            words = [one.word for one in sentence.words]
            asked = without_subject(words, sentence.subject)
            meaning = self._matrix @ self.dense.sentence(asked)
        else:
            meaning = _mixed(self._meaning, subject, level) @ np.stack(
                [one.meaning for one in known]
            )
        meaning = _below(meaning, _MEANING_BITS)
        both = [
            meaning * _over(self.map.meaning_length, np.sqrt(np.dot(meaning, meaning))),
            lexical * _over(self.map.lexical_length, length),
        ]
        return np.concatenate(both).astype(np.float32)

    def _known(self, texts: Sequence[str]) -> list[_Known]:
        found = [self._words.get(text) for text in texts]
        new = list(dict.fromkeys(t for t, one in zip(texts, found, strict=True) if one is None))
        if new:
            met = self._meet(new)
            found = [one or met[text] for text, one in zip(texts, found, strict=True)]
        return [one for one in found if one is not None]

    def _meet(self, texts: list[str]) -> dict[str, _Known]:
        meaning = np.zeros((len(texts), 0))
        if isinstance(self.dense, TokenTable):
            meaning = np.rint(self.dense.words(texts) @ self._matrix.T / (1 << W_BITS))
        drawn = signs(texts, self.map.lexical_width)
        met = {
            text: _Known(describe(text, self.map.common), folded(text), meaning[i], drawn[i])
            for i, text in enumerate(texts)
        }
        self._words.update(met)
        while len(self._words) > _CACHED:
            self._words.popitem(last=False)
        return met


@dataclass(frozen=True)
class _Known:
    """What is kept of a word that was met: `meaning [M]` and `signs [L]` hold integers."""

    word: Word
    folded: str
    meaning: np.ndarray
    signs: np.ndarray


@dataclass(frozen=True)
class _Sentence:
    """The words of a span, `subject [words]` int64 of 256, and where each word stands first."""

    span: str
    words: list[_Known]
    subject: np.ndarray
    kept: list[int]


def _mixed(table: np.ndarray, subject: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return `[words]` float64 integers: what each word weighs, by its role and its level."""
    mixed = subject * table[0, level] + (FULL - subject) * table[1, level]
    return mixed.astype(np.float64)


def _below(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Bring integers below 2^bits by a power of two, so that their squares can be added exactly."""
    largest = float(np.abs(numbers).max(initial=1.0))
    shift = max(0, int(np.frexp(largest)[1]) - bits)
    return np.rint(np.ldexp(numbers, -shift))


def _over(length: float, norm: float) -> float:
    return length / norm if norm > 0 else 0.0


def without_subject(words: Sequence[Word], subject: np.ndarray) -> str:
    """Return a sentence as an encoder reads it: `SOMETHING` for each run of subject's words."""
    kept: list[str] = []
    for word, weight in zip(words, subject.tolist(), strict=True):
        if weight <= FULL // 2:
            kept.append(word.text)
        elif kept[-1:] != [SOMETHING]:
            kept.append(SOMETHING)
    return " ".join(kept)


def _subject_words(reading: Reading) -> dict[str, str]:
    return {
        folded(word): word
        for word, subject in zip(reading.words, reading.subject, strict=True)
        if subject > 0.5
    }
