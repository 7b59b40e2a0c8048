"""What the codebooks of one model hold at one time, for requests that ask one after the other.

A change of one layer may change others, and a while passes until all is proven. Until then those
who ask are answered from what was there before, in every layer; then all of it is there at once.
Who has begun to ask before goes on with what was there then. Nothing is copied for that unless
somebody asks meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_kernels import lookup

from .codebook import Codebook

_ROWS = ("keys", "values", "radii")


@dataclass(eq=False)
class Held:
    """What a codebook held, as lookups read it; without a sketch, which changes no answer."""

    keys: Tensor
    values: Tensor
    radii: Tensor
    count: Tensor
    sketch: None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.radii.device

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entry that answers each query; see `Codebook.lookup`."""
        return lookup(query, self.keys, self.radii, self.count)


class Moment:
    """One time, for as long as somebody asks as of then; made by `Moments.taken`."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self.users = 0
        self.held: dict[Codebook, Held] = {}  # by codebooks that have changed since

    def of(self, book: Codebook) -> Codebook | Held:
        """Return what a codebook held then: itself if that is still so. Its lock must be held."""
        if self._moments.is_changing_here:
            return book
        return self.held.get(book) or self._moments.before(book) or book


class Moments:
    """Lets changes of several codebooks be seen at once. One thread at a time changes them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # taken before that of a codebook, never after
        self._now = Moment(self)
        self._used: set[Moment] = set()
        self._changer: int | None = None
        self._before: dict[Codebook, Held] = {}
        self._publishing = False

    @property
    def is_changing_here(self) -> bool:
        """Whether this thread is the one that changes the codebooks, and sees what it does."""
        return self._changer == threading.get_ident()

    @property
    def used(self) -> int:
        """How many times somebody asks as of now."""
        with self._lock:
            return len(self._used)

    @contextmanager
    def taken(self) -> Iterator[Moment | None]:
        """Ask as of now inside a `with` block; None: this thread changes the codebooks."""
        if self.is_changing_here:
            yield None
            return
        with self._lock:
            moment = self._now
            moment.users += 1
            self._used.add(moment)
        try:
            yield moment
        finally:
            with self._lock:
                moment.users -= 1
                if not moment.users:
                    self._used.discard(moment)

    def before(self, book: Codebook) -> Held | None:
        """Return what a codebook held before the change that goes on; None: it holds that still.

        Its lock must be held.
        """
        held = self._before.get(book)
        if held is None and self._changer is not None:
            held = _before_transaction(book)
            if held is not None:
                self._before[book] = held
        return held

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let no other thread see what is done inside, until `publish` is called or all is undone.

        Transactions of the codebooks begin and end inside, or `leave` was called before.
        """
        self._changer = threading.get_ident()
        try:
            yield
        finally:
            self._changer = None
            self._before.clear()
            if self._publishing:
                self._now = Moment(self)
                self._publishing = False
            # Asked of the lock, not of a note: an interrupt may come between taking it and noting.
            with suppress(RuntimeError):  # it is not held
                self._lock.release()

    def leave(self, books: Sequence[Codebook]) -> None:
        """Keep what codebooks hold, whose storage is to be replaced by another one."""
        for book in books:
            with book.lock:
                self._before[book] = _held(book)

    def publish(self, books: Sequence[Codebook], *, by_undo: bool = False) -> None:
        """Let what was done be seen when `changing` ends. Who asks as of before is seen to.

        Nobody begins to ask in between: what follows until then must not take long.

        Args:
            by_undo: the codebooks are not changed yet, and no transaction will.
        """
        self._lock.acquire()
        self._publishing = True
        for book in books:
            lacking = [moment for moment in self._used if book not in moment.held]
            if not lacking:
                continue
            with book.lock:
                held = _copy(book) if by_undo else self.before(book)
            if held is not None:
                for moment in lacking:
                    moment.held[book] = held


def _held(book: Codebook) -> Held:
    count = torch.tensor(book.storage.slots.in_use, dtype=torch.int64, device=book.device)
    return Held(book.keys, book.values, book.radii, count)


def _copy(book: Codebook) -> Held:
    held = _held(book)
    with torch.inference_mode(False):
        return Held(held.keys.clone(), held.values.clone(), held.radii.clone(), held.count)


def _before_transaction(book: Codebook) -> Held | None:
    """Return what a codebook held before its open transaction; None: lookups find that still."""
    slots = book.storage.slots
    old = book.storage.journal.before_open(slots)
    if not any(table in (*_ROWS, "in_use") for table, _ in old):
        return None
    held = _copy(book)
    for (table, key), was in old.items():
        if table in _ROWS:
            getattr(held, table)[key] = 0 if was is None else was
        elif table == "in_use":
            held.count.fill_(was)
    return held
