"""Which words of a prompt name its subject: a small network over properties that any word has.

"The mother tongue of Marta Holm is": the subject's words must be met again, the others may
be said in other words. No list of names and no model is asked: how common a word is, capitals,
digits, its place, and the same of two words on either side tell. All arithmetic is on integers, so
that a weight has the same bits everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .words import RAREST, CommonWords, folded

UNIT = RAREST * RAREST
"""A feature is an integer of this unit: levels and their squares fit without rounding."""
FULL = 256
"""A weight of one."""

_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by did do does for from had has have her his how in is it its "
        "not of on or that the their these this those to was were what when where which who with",
    )
)

PROPERTIES = (
    "there is a word",
    "level",
    "level squared",
    "rarest",
    "capital, not first",
    "capital inside",
    "digit",
    "punctuation",
    "function word",
)
OFFSETS = (0, -1, 1, -2, 2)
"""Of the words whose properties are looked at."""
GLOBALS = (
    "first",
    "last",
    "capital, first",
    "first, level",
    "as rare as any",
    "text has capitals",
    "text has capitals, level",
    "neither capital nor digit in a text with capitals",
    "rarest in a text without capitals",
)
FEATURES = len(PROPERTIES) * len(OFFSETS) + len(GLOBALS)
_CAPITAL = PROPERTIES.index("capital, not first")
_LEVEL, _RAREST = PROPERTIES.index("level"), PROPERTIES.index("rarest")
_REACH = max(OFFSETS)


@dataclass(frozen=True)
class Word:
    """What is known of a word wherever it stands.

    Args:
        text: as written.
        level: 0 (most common) to 15.
        properties: `PROPERTIES` where it is not the first word, in `UNIT`s.
        capital: does it begin with a capital.
        plain: neither capital nor digit.
    """

    text: str
    level: int
    properties: tuple[int, ...]
    capital: bool
    plain: bool


def describe(text: str, common: CommonWords) -> Word:
    """Look at one word alone."""
    level = common.level(text)
    capital = text[:1].isupper()
    letters = text.isalpha()
    digit = not letters and any(c.isdigit() for c in text)
    flags = (
        level == RAREST,
        capital,
        not text[1:].islower() and any(c.isupper() for c in text[1:]),
        digit,
        not letters and not any(c.isalnum() for c in text),
        folded(text) in _FUNCTION_WORDS,
    )
    properties = (UNIT, level * RAREST, level * level, *(UNIT * flag for flag in flags))
    return Word(text, level, properties, capital, not capital and not digit)


def features(words: Sequence[Word]) -> np.ndarray:
    """Return `[len(words), FEATURES]` float64 integers, in `UNIT`s, of the words of a sentence."""
    return _features(
        np.array([word.properties for word in words], dtype=np.float64),
        np.array([word.plain for word in words]),
        capital=words[0].capital,
    )


def _features(properties: np.ndarray, plain: np.ndarray, *, capital: bool) -> np.ndarray:
    n, wide = properties.shape
    padded = np.zeros((n + 2 * _REACH, wide))
    padded[_REACH : _REACH + n] = properties
    padded[_REACH, _CAPITAL] = 0  # a sentence begins with a capital whatever its first word is
    found = np.zeros((n, FEATURES))
    for i, offset in enumerate(OFFSETS):
        found[:, i * wide : (i + 1) * wide] = padded[_REACH + offset : _REACH + offset + n]
    whole = found[:, len(OFFSETS) * wide :]  # the columns of `GLOBALS`
    level = properties[:, _LEVEL]
    whole[0, 0] = whole[-1, 1] = UNIT
    whole[0, 2] = UNIT * capital
    whole[0, 3] = level[0]
    whole[level == level.max(), 4] = UNIT
    if padded[:, _CAPITAL].any():
        whole[:, 5] = UNIT
        whole[:, 6] = level
        whole[plain, 7] = UNIT
    else:
        whole[:, 8] = properties[:, _RAREST]
    return found


class Roles:
    """The network: one hidden layer of ReLUs, then a table that turns a logit into a weight.

    Args:
        hidden: `[H, FEATURES + 1]` int16, weights and, last, the bias of the hidden layer.
        output: `[H + 1]` int16, weights and, last, the bias of the logit.

    Numbers are in 1/256. A logit is cut to 1/16 and to ±8.

    Raises:
        ValueError: shapes do not fit.
    """

    def __init__(self, hidden: np.ndarray, output: np.ndarray) -> None:
        self.hidden = np.asarray(hidden, dtype=np.int16)
        self.output = np.asarray(output, dtype=np.int16)
        if self.hidden.ndim != 2 or self.hidden.shape[1] != FEATURES + 1:
            raise ValueError(
                f"hidden must have shape [H, {FEATURES + 1}], got {list(self.hidden.shape)}"
            )
        if self.output.shape != (len(self.hidden) + 1,):
            raise ValueError(
                f"output must have shape [{len(self.hidden) + 1}], got {list(self.output.shape)}"
            )
        # Integers below 2^53 in float64: products by BLAS, exact in any order.
        self._weights = np.ascontiguousarray(self.hidden[:, :-1].T, dtype=np.float64)
        self._bias = self.hidden[:, -1] * float(UNIT)
        self._output = self.output[:-1].astype(np.float64)
        self._output_bias = float(self.output[-1]) * UNIT * 256

    def subject(self, words: Sequence[Word]) -> np.ndarray:
        """Return `[len(words)]` int64, 0..256: how surely each word names the subject."""
        sure = self._weigh(features(words)) if words else np.zeros(0)
        return sure.astype(np.int64)

    def subject_of(self, properties: np.ndarray, plain: np.ndarray, *, capital: bool) -> np.ndarray:
        """Return the same as float64, from what is known of each word.

        Args:
            properties: `[words, 9]` float64, at least one word.
            plain: `[words]` bool.
            capital: does the first begin with a capital.
        """
        return self._weigh(_features(properties, plain, capital=capital))

    def _weigh(self, x: np.ndarray) -> np.ndarray:
        logit = np.maximum(x @ self._weights + self._bias, 0) @ self._output + self._output_bias
        step = np.floor_divide(logit, UNIT * 256 * 16) + 128
        return _SIGMOID[step.clip(0, 255).astype(np.int64)]


def _sigmoid_table() -> np.ndarray:
    # No entry lies nearer than 0.007 to where its rounding changes, so any exp gives this table.
    x = (np.arange(256) - 128 + 0.5) / 16
    return np.rint(FULL / (1 + np.exp(-x)))


_SIGMOID = _sigmoid_table()
