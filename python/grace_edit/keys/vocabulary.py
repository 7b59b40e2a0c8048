"""What is kept of the words that a map has met: rows of numbers, so that a sentence takes them at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import numpy as np

from .dense import SentenceEncoder, TokenTable
from .roles import PROPERTIES, describe
from .text_map import W_BITS, TextMap
from .words import folded, signs

_MOST = 1 << 15
"""Words that are kept; whoever needs room for more begins with an empty vocabulary."""
_PRODUCTS = 1 << 18
"""Numbers multiplied in one call of BLAS at most: for more OpenBLAS wakes threads, which then wait
in a loop for more work on a core that the lookup wants."""


class Vocabulary:
    """Words that were met. Several threads may ask at once; a row never changes.

    Args:
        text_map: how common words are, W, the width of the lexical part.
        dense: of the map.

    Attributes:
        texts, folded: of each row.
        properties: `[rows, 9]` float64, see `roles`.
        plain: `[rows]` bool, neither capital nor digit.
        level: `[rows]` int64.
        numbers: `[rows, M + L]` float64 integers, its share in the meaning and its signs; `[rows,
            L]` for an encoder, which reads sentences.
    """

    def __init__(self, text_map: TextMap, dense: TokenTable | SentenceEncoder) -> None:
        self._map = text_map
        self._dense = dense if isinstance(dense, TokenTable) else None
        self._matrix = text_map.matrix.astype(np.float64).T
        self._piece = max(1, _PRODUCTS // self._matrix.size)
        self._rows: dict[str, int] = {}
        self._lock = Lock()
        width = text_map.lexical_width + (len(text_map.matrix) if self._dense else 0)
        self.texts: list[str] = []
        self.folded: list[str] = []
        # Memory that nobody has written to takes no room.
        self.properties = np.empty((_MOST, len(PROPERTIES)))
        self.plain = np.empty(_MOST, dtype=bool)
        self.level = np.empty(_MOST, dtype=np.int64)
        self.numbers = np.empty((_MOST, width))

    def rows(self, texts: Sequence[str]) -> list[int] | None:
        """Return the row of each word; None where there is no room for those that are new."""
        try:
            return [self._rows[text] for text in texts]
        except KeyError:
            with self._lock:
                new = list(dict.fromkeys(text for text in texts if text not in self._rows))
                if len(self.texts) + len(new) > _MOST:
                    return None
                if new:  # another thread may have met them
                    self._meet(new)
            return [self._rows[text] for text in texts]

    def _meet(self, new: list[str]) -> None:
        first = len(self.texts)
        at = slice(first, first + len(new))
        words = [describe(text, self._map.common) for text in new]
        self.properties[at] = [word.properties for word in words]
        self.plain[at] = [word.plain for word in words]
        self.level[at] = [word.level for word in words]
        numbers = self.numbers[at]
        width = self._map.lexical_width
        numbers[:, -width:] = signs(new, width)
        if self._dense is not None:
            vectors = self._dense.words(new)
            for start in range(0, len(new), self._piece):
                piece = slice(start, start + self._piece)
                share = vectors[piece] @ self._matrix
                np.rint(share / (1 << W_BITS), out=numbers[piece, :-width])
        self.texts += new
        self.folded += [folded(text) for text in new]
        # Last: from now on others find them.
        self._rows.update(zip(new, range(first, first + len(new)), strict=True))
