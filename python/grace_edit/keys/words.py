"""Words: how a text is cut, what of a word is compared, how common it is, its random signs."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
"""Kana, Chinese and Thai are written without spaces: each character is a word."""
_WORDS = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")

RAREST = 15
"""Level of a word that the table of common words does not hold."""


def words_of(text: str) -> list[str]:
    """Cut a text into words; punctuation marks are words of their own."""
    return _WORDS.findall(text.replace("’", "'"))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where each of the words of `words_of` begins and ends."""
    return [match.span() for match in _WORDS.finditer(text)]


@lru_cache(maxsize=1 << 16)
def folded(word: str) -> str:
    """Return a word without case and accents: what two words are compared by."""
    plain = unicodedata.normalize("NFKD", word.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c)) or word


def stable_hash(word: str) -> int:
    """Return 32 bits that depend on the folded word alone (CRC-32 of its UTF-8 bytes)."""
    return zlib.crc32(folded(word).encode("utf-8", "surrogatepass"))


def signs(words: Sequence[str], width: int) -> np.ndarray:
    """Return `[len(words), width]` float64 of ±1, pseudo-random but the same for a folded word.

    Two different words agree in half of the places, so their product is near 0. One place per word,
    as in a plain hashed bag of words, makes two words the same word once in 2 `width` pairs: among
    500 edits that happens to every other query.

    Bits come from a 64-bit mix (splitmix64) of the word's hash and the place.
    """
    seed = np.array([stable_hash(word) for word in words], dtype=np.uint64) << np.uint64(32)
    with np.errstate(over="ignore"):
        place = np.arange(1, width + 1, dtype=np.uint64)
        z = (seed[:, None] + place) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z & np.uint64(1), 1.0, -1.0)


class CommonWords:
    """How common words are: 0 for the most common, 14 for the last of the table, 15 for the rest.

    Args:
        hashes: `[N]` uint32, `stable_hash` of each word.
        levels: `[N]` uint8, 0..14.
    """

    def __init__(self, hashes: np.ndarray, levels: np.ndarray) -> None:
        self.hashes = np.asarray(hashes, dtype=np.uint32)
        self.levels = np.asarray(levels, dtype=np.uint8)
        self._levels = dict(zip(self.hashes.tolist(), self.levels.tolist(), strict=True))

    def level(self, word: str) -> int:
        """Return 0..15; punctuation counts as most common."""
        if not (word.isalnum() or any(c.isalnum() for c in word)):
            return 0
        return self._levels.get(stable_hash(word), RAREST)

    @classmethod
    def ranked(cls, words: Sequence[str]) -> CommonWords:
        """Make the table of words given from the most common to the least.

        Levels are even steps of the logarithm of the rank.
        """
        first: dict[int, int] = {}
        for word in words:
            first.setdefault(stable_hash(word), len(first))
        ranks = np.fromiter(first.values(), dtype=np.float64, count=len(first))
        levels = np.floor(RAREST * np.log1p(ranks) / np.log1p(len(first)))
        order = np.argsort(np.fromiter(first, dtype=np.uint32, count=len(first)), kind="stable")
        hashes = np.fromiter(first, dtype=np.uint32, count=len(first))
        return cls(hashes[order], levels[order].clip(0, RAREST - 1).astype(np.uint8))
