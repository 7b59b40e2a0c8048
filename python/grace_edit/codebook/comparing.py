"""Comparing queries with each other, many at once: how far apart at least, and which are equal."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from .records import TieError

_BLOCK = 1 << 22  # pairs of queries that are compared at a time
_MOST_ROWS = 256  # of these queries, whose rows and columns are half of them in vain
_TINY = 1e-30  # more than what is lost of a square that is too small for float32


class Bounds:
    """How far queries are from each other at least and at most, by products of matrices.

    Args:
        queries: `[N, D]` finite, on the host, in the order in which they are reached.
        names: of each query, see `Names`.

    `slack` is `[N]` float32, see `of`. What is reached is compared with all that came before.

    Raises:
        TieError: from `reach` or `of`: the queries are too large for squares in float32.
    """

    def __init__(self, queries: Tensor, names: list[bytes]) -> None:
        self._names, self._asked = names, 0
        # Moved together, so that the products are about as large as the distances.
        near = queries.float()
        near = near - near.mean(dim=0)
        squares = torch.cat([rows.double().square().sum(1) for rows in near.split(_MOST_ROWS)])
        # Of the products and of what else is rounded, each operation being off by 2**-24 of what
        # it is about at most; twice that.
        self._off = (queries.shape[1] + 32) * 2.0**-23
        self._near = near.numpy()
        self.slack = (2.0 * self._off * squares + 4.0 * _TINY).float().numpy()
        self._least = (squares * (1.0 - self._off) - _TINY).float().numpy()
        self._rows = max(1, min(_MOST_ROWS, _BLOCK // max(1, len(queries))))
        self._start, self._end, self._block = 0, 0, np.zeros((0, 0), dtype=np.float32)
        self._single: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.float32))

    def reach(self, number: int) -> None:
        """Compare the queries up to this one, which will be asked for now, and some that follow."""
        self._asked = number
        if number >= self._end:
            self._start = number
            self._end = min(number + self._rows, len(self._near))
            self._block = self._compare(self._start, self._end)

    def of(self, number: int) -> tuple[np.ndarray, np.float32]:
        """Return squares `[n]` float32 of the least distances from a query to the n reached.

        Those of the largest distances are larger by the sum of both queries' `slack`, of which the
        query's own is returned too.
        """
        if self._names[number] == self._names[self._asked]:
            number = self._asked
        if self._start <= number < self._end:
            return self._block[number - self._start], self.slack[number]
        if self._single[0] != number or len(self._single[1]) < self._end:
            self._single = number, self._compare(number, number + 1)[0]
        return self._single[1], self.slack[number]

    def _compare(self, start: int, end: int) -> np.ndarray:
        # By numpy, as torch may be set to products that are less exact.
        with np.errstate(all="ignore"):
            block: np.ndarray = (-2.0 * self._near[start:end]) @ self._near[: self._end].T
            block += self._least[: self._end]
            block += self._least[start:end, None]
        if not np.isfinite(block).all():
            raise TieError
        return block


class Names:
    """What equal queries share, -0 and 0 being equal: `each` of them has the name of the first."""

    def __init__(self, queries: Tensor) -> None:
        # A sum of all numbers with odd factors tells most apart; those that share one are compared.
        source = torch.Generator().manual_seed(0)
        self._factors = torch.randint(-(2**62), 2**62, queries.shape[1:], generator=source) * 2 + 1
        self._words = _words(queries)
        self._alike: dict[int, list[int]] = defaultdict(list)
        self.each: list[bytes] = []
        for number, (words, total) in enumerate(
            zip(self._words, self._sums(self._words), strict=True)
        ):
            name = self._find(words, total)
            if name is None:
                self._alike[total].append(number)
                name = number.to_bytes(8, "big")
            self.each.append(name)

    def find(self, query: Tensor) -> bytes | None:
        """Return the name of a query `[D]` from elsewhere; None: none of these equals it."""
        words = _words(query)
        return self._find(words, self._sums(words[None])[0])

    def _find(self, words: Tensor, total: int) -> bytes | None:
        same = (n for n in self._alike.get(total, ()) if torch.equal(self._words[n], words))
        first = next(same, None)
        return None if first is None else self.each[first]

    def _sums(self, words: Tensor) -> list[int]:
        sums: list[int] = []
        for rows in words.split(_MOST_ROWS):
            sums += (rows.long() * self._factors).sum(1).tolist()
        return sums


def _words(queries: Tensor) -> Tensor:
    plain = (queries + 0.0).contiguous()
    return plain.view(torch.int32 if plain.element_size() == 4 else torch.int16)
