"""`query="text"`: queries made from the text of prompts, before the layer runs.

A prompt has one row of `[D]` per span, mostly one. It is answered by the entry nearest to any of
them, if that entry's radius covers it. Where two rows are equally near, the earlier span decides:
an edit is stored under its first span, so its own prompt is always answered by it.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from grace_kernels import lookup, nearest

from ..codebook.codebook import Codebook
from ..codebook.moments import Held
from ..keys.prompts import TAIL, PromptReader
from ..keys.text_keys import TextKeys
from .positions import Latched, Witness
from .precision import without_autocast

_KEPT = 256
"""Prompts whose rows are kept: the steps and the beams of one request make them once."""


class TextQueries:
    """Make the queries of prompts from their token ids, and look them up.

    Args:
        keys: from text to keys.
        reader: from ids to text.

    `requests` and `seconds` count what was asked and how long that took, reading, keys and lookup
    together. Several threads may ask at once.
    """

    def __init__(self, keys: TextKeys, reader: PromptReader) -> None:
        self.keys = keys
        self.reader = reader
        self.requests = 0
        self.seconds = 0.0
        self._rows: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"keys": self.keys, "reader": self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def about(self) -> dict[str, Any]:
        """Say what makes the keys, as JSON can hold it."""
        dense = self.keys.map.dense
        return {
            "encoder": getattr(self.keys.dense, "reference", dense.kind),
            "map": dense.name,
            "width": self.keys.width,
            "map_fingerprint": self.keys.map.fingerprint(),
            "fingerprint": self.keys.fingerprint(),
        }

    def describe(self) -> dict[str, Any]:
        """Return `about`, and how many prompts asked and their mean cost in microseconds."""
        cost = 1e6 * self.seconds / self.requests if self.requests else None
        return {**self.about(), "requests": self.requests, "us_per_request": cost}

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt from which its spans are taken."""
        return self.reader.text(ids)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return the queries `[S, D]` of a prompt, float32 on the CPU, one per span.

        A prompt without a word asks with zeros.
        """
        known = tuple(ids[-TAIL:])
        with self._lock:
            rows = self._rows.get(known)
            if rows is not None:
                self._rows.move_to_end(known)
                return rows
        with torch.inference_mode(False), without_autocast():  # the same bits everywhere
            rows = self.keys.keys(self.reader.text(known))
        with self._lock:
            self._rows[known] = rows
            if len(self._rows) > _KEPT:
                self._rows.popitem(last=False)
        return rows

    def key(self, ids: Sequence[int]) -> Tensor:
        """Return the key `[D]`, float32 on the CPU, under which an edit of a prompt is stored."""
        return self.rows(ids)[0]

    def answer(
        self,
        book: Codebook,
        prompts: Sequence[Sequence[int]],
        witness: Witness | None = None,
        *,
        counts: bool = True,
        held: Callable[[], Codebook | Held] | None = None,
    ) -> Latched:
        """Say which entry answers each of B prompts, and with which value.

        Args:
            book: of keys of this width.
            prompts: token ids without padding.
            witness: is told of the lookup; its seconds are those of keys and lookup together.
            counts: whether the answers count as hits.
            held: returns what the codebook is asked as, under its lock; None: itself.

        Returns:
            On the device of the codebook. Equal prompts have equal answers.
        """
        start = time.perf_counter()
        known = [tuple(ids[-TAIL:]) for ids in prompts]
        # Nothing is made for an empty codebook, and nothing under the lock: an encoder is slow.
        asks = bool(book.entries) or held is not None
        rows = {ids: self.rows(ids) for ids in known} if asks else {}
        with book.lock:
            asked = book if held is None else held()
            slots = dict(zip(rows, decide(asked, [*rows.values()]), strict=True)) if rows else {}
            found = [slots.get(ids, (-1, float("inf"))) for ids in known]
            index = torch.tensor([s for s, _ in found], dtype=torch.int64, device=book.device)
            now = asked is book  # slots of before may be others' now
            if counts and now:
                book.count_answers(index)
            if witness is not None and now:
                near = torch.tensor([d for _, d in found])
                witness(book, index, near, time.perf_counter() - start)
            answered = Latched(index, asked.values[index.clamp(min=0)])
        if counts:
            with self._lock:
                self.requests += len(prompts)
                self.seconds += time.perf_counter() - start
        return answered


def decide(book: Codebook | Held, each: Sequence[Tensor]) -> list[tuple[int, float]]:
    """Return the slot that answers each prompt of queries `[S, D]` and how far it is; -1: none.

    The lock of the codebook must be held.
    """
    rows = torch.cat(list(each)).to(book.device)
    index, distance = book.lookup(rows)
    slots, distances = index.tolist(), distance.tolist()
    found: list[tuple[int, float]] = []
    doubtful: dict[int, range] = {}
    start = 0
    for number, its in enumerate(each):
        at = range(start, start + len(its))
        start += len(its)
        hits = [row for row in at if slots[row] >= 0]
        best = min(hits, key=distances.__getitem__) if hits else at[0]
        found.append((slots[best], distances[best]))
        # A row that misses may be nearer to a key that does not cover it, which then decides.
        if 0 < len(hits) < len(at):
            doubtful[number] = at
    missed = [row for at in doubtful.values() for row in at if slots[row] < 0]
    if not missed:
        return found
    reach = max(found[number][1] for number in doubtful)
    for row, near in zip(missed, _how_near(book, rows[missed], reach), strict=True):
        distances[row] = near
    for number, at in doubtful.items():
        best = min(at, key=distances.__getitem__)
        found[number] = (slots[best], distances[best])
    return found


def _how_near(book: Codebook | Held, rows: Tensor, reach: float) -> list[float]:
    """Return how far the nearest key of each row `[B, D]` is; of one beyond `reach`, or +inf."""
    sketch = book.sketch
    if sketch is None or not sketch.active or rows.device.type != "cpu":
        return list(nearest(rows, book.keys, book.radii, book.count)[1].tolist())
    reaches = torch.where(book.radii == -math.inf, -math.inf, reach)
    found = lookup(rows, book.keys, reaches, book.count, sketch=sketch.within(reach))
    return list(found[1].tolist())
