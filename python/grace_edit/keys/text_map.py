"""The map from a sentence to a key, and the keys of a prompt.

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
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as render_arrays
from torch import Tensor

from .dense import SentenceEncoder, TokenTable
from .roles import FULL, Roles, Word, describe
from .spans import spans
from .words import RAREST, CommonWords, folded, signs, words_of

FORMAT = 1
MAP = "text_map.safetensors"
SETTINGS = "text_map.json"
MOST_WORDS = 64
"""Words of a span that are read: the last ones."""
WEIGHT_LIMIT = 1023
_CACHED = 1 << 15
_W_BITS = 13
"""W is stored in multiples of 2^-13."""
_MEANING_BITS = 20
_NEAR = 0.95
"""Cosine to the probes from which on a dense part is the one a map was learned for."""
SOMETHING = "something"
"""What an encoder reads in place of the subject."""


@dataclass(frozen=True)
class DenseReference:
    """Which dense part a map was trained for.

    Args:
        kind: `"tokens"` or `"encoder"`.
        name: of the model or encoder, for people.
        width: E.
        fingerprint: of the dense part, `dense.fingerprint()`.
        unit: of a token table's numbers; 0 for an encoder.
    """

    kind: str
    name: str
    width: int
    fingerprint: str
    unit: float = 0.0


@dataclass(frozen=True)
class TextMap:
    """What is learned. Arrays are integers; see `fit` for how they come about.

    Args:
        roles: which words name the subject.
        common: how common words are.
        lexical_weights: `[2, 16]` int16, 0..1023: of a word that names the subject and of one that
            does not, by its level, in the lexical part.
        meaning_weights: `[2, 16]` int16, 0..1023, the same in the meaning part.
        matrix: `[M, E]` int16, W in multiples of 2^-13.
        centre: `[E]` int32, of a token table; empty for an encoder.
        probe: `[P, E]` int16, vectors of the dense part, `dense.probe()`.
        lexical_width: L.
        lexical_floor: added to the sum of the squares of a span's lexical weights (in their unit,
            1/128, times 1/256) before the lexical part is divided by its root: a span of few words
            that name anything gets a shorter lexical part.
        meaning_length, lexical_length: m and l.
        dense: the dense part it was trained for.
        radius: the recommended radius of every edit.
        trained: what it was trained and measured on, for people.
    """

    roles: Roles
    common: CommonWords
    lexical_weights: np.ndarray
    meaning_weights: np.ndarray
    matrix: np.ndarray
    centre: np.ndarray
    probe: np.ndarray
    lexical_width: int
    lexical_floor: int
    meaning_length: float
    lexical_length: float
    dense: DenseReference
    radius: float = 1.0
    trained: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D, the width of a key."""
        return len(self.matrix) + self.lexical_width

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is stored in `text_map.safetensors`."""
        arrays = {
            "roles.hidden": self.roles.hidden,
            "roles.output": self.roles.output,
            "common.hashes": self.common.hashes,
            "common.levels": self.common.levels,
            "lexical_weights": self.lexical_weights.astype(np.int16),
            "meaning_weights": self.meaning_weights.astype(np.int16),
            "matrix": self.matrix.astype(np.int16),
            "centre": self.centre.astype(np.int32),
            "probe": self.probe.astype(np.int16),
        }
        # safetensors writes memory as it lies, whatever the strides.
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def settings(self) -> dict[str, Any]:
        """Return what is stored in `text_map.json`."""
        return {
            "format": FORMAT,
            "lexical_width": self.lexical_width,
            "lexical_floor": self.lexical_floor,
            "meaning_length": self.meaning_length,
            "lexical_length": self.lexical_length,
            "radius": self.radius,
            "dense": asdict(self.dense),
            "trained": self.trained,
        }

    def fingerprint(self) -> str:
        """Return a hash of everything that decides a key."""
        numbers = hashlib.sha256(render_arrays(self.arrays()))
        numbers.update(
            json.dumps(
                [
                    FORMAT,
                    self.lexical_width,
                    self.lexical_floor,
                    self.meaning_length,
                    self.lexical_length,
                    asdict(self.dense),
                ]
            ).encode()
        )
        return numbers.hexdigest()[:16]

    def fits(self, dense: TokenTable | SentenceEncoder) -> bool:
        """Say whether a dense part is the one this map was learned for, or a close child of it.

        Another dtype, a finetuned child and added tokens fit; another model or tokenizer does not.
        """
        if dense.kind != self.dense.kind:
            return False
        mine, its = self.probe.astype(np.float64), dense.probe().astype(np.float64)
        if mine.shape != its.shape:
            return False
        lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(its, axis=1)
        return bool(((mine * its).sum(axis=1) >= _NEAR * lengths).all())

    def save(self, directory: str | Path) -> None:
        """Write the map to a directory, which is made if it is not there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """Return the files that a map is saved as, by their names."""
        text = json.dumps(self.settings(), indent=1, ensure_ascii=False)
        return {MAP: render_arrays(self.arrays()), SETTINGS: (text + "\n").encode()}

    @classmethod
    def load(cls, directory: str | Path) -> TextMap:
        """Read a map.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of a newer format.
        """
        directory = Path(directory)
        files = {name: (directory / name).read_bytes() for name in (SETTINGS, MAP)}
        return cls.from_files(files, directory)

    @classmethod
    def from_files(cls, files: dict[str, bytes], directory: str | Path = "") -> TextMap:
        """Make a map of what `files` returned; `directory` is where it was, for errors.

        Raises:
            ValueError: it is damaged or of a newer format.
        """
        try:
            settings = json.loads(files[SETTINGS])
            arrays = parse_arrays(files[MAP])
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{directory}: the text map is damaged: {error}") from None
        if settings.get("format") != FORMAT:
            raise ValueError(
                f"{Path(directory) / SETTINGS}: format must be {FORMAT}, got "
                f"{settings.get('format')}"
            )
        return cls.from_parts(arrays, settings)

    @classmethod
    def from_parts(cls, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> TextMap:
        """Make a map of `arrays()` and `settings()`.

        Raises:
            ValueError: parts are missing or do not fit.
        """
        try:
            made = cls(
                roles=Roles(arrays["roles.hidden"], arrays["roles.output"]),
                common=CommonWords(arrays["common.hashes"], arrays["common.levels"]),
                lexical_weights=arrays["lexical_weights"],
                meaning_weights=arrays["meaning_weights"],
                matrix=arrays["matrix"],
                centre=arrays["centre"],
                probe=arrays["probe"],
                lexical_width=int(settings["lexical_width"]),
                lexical_floor=int(settings["lexical_floor"]),
                meaning_length=float(settings["meaning_length"]),
                lexical_length=float(settings["lexical_length"]),
                dense=DenseReference(**settings["dense"]),
                radius=float(settings["radius"]),
                trained=settings.get("trained", {}),
            )
        except KeyError as error:
            raise ValueError(f"the text map has no {error}") from None
        except TypeError as error:
            raise ValueError(f"the text map is damaged: {error}") from None
        made._check()
        return made

    def _check(self) -> None:
        for name in ("lexical_weights", "meaning_weights"):
            table = getattr(self, name)
            if table.shape != (2, RAREST + 1) or table.min() < 0 or table.max() > WEIGHT_LIMIT:
                raise ValueError(
                    f"{name} must have shape [2, {RAREST + 1}] and lie in 0..{WEIGHT_LIMIT}, got "
                    f"shape {list(table.shape)}"
                )
        if self.matrix.ndim != 2 or self.matrix.shape[1] != self.dense.width:
            raise ValueError(
                f"matrix must have shape [M, {self.dense.width}], got {list(self.matrix.shape)}"
            )


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
            meaning = np.rint(self.dense.words(texts) @ self._matrix.T / (1 << _W_BITS))
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
