"""Changes of a storage: all of one or nothing, told to who watches, and taken back by undo."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .journal import Journal, Place
from .slots import Slots


class Watcher(Protocol):
    """Who is told of every change, in the thread that makes it, which holds `changing` alone."""

    def commit(self, storage: Any, changed: Sequence[Place]) -> None:
        """Take note of a change that is about to be final; what is raised takes it back."""

    def keeps(self, directory: Path) -> bool:
        """Say whether changes are kept in this directory."""

    def settled(self, storage: Any, *, anew: bool = False) -> None:
        """Be told that the change is final.

        Args:
            anew: so is another one of which no place tells.
        """

    def taken_back(self, storage: Any) -> None:
        """Be told that a change was taken back, perhaps after `commit`."""

    def replace(self, storage: Any) -> None:
        """Take note that this storage is about to take over; what is raised prevents it."""


class Transactions(ABC):
    """The part of a `Storage` that begins, ends and takes back what is written to it.

    Attributes:
        journal: what the places held before.
        lock: held while slots change; must be held while they are read in another thread.
        changing: held by the thread that changes the codebook, from the first look on which its
            decision rests to the end of its transaction. Those who only read never take it.
        version: goes up with every change, and never down.
        taken: the highest version that somebody may have seen of a writer that died since.
        watcher: is told of every change; None: nobody. Not copied with the storage.
        purged: whether an edit was purged within the open transaction.
    """

    slots: Slots

    def __init__(self) -> None:
        self.journal = Journal()
        self.lock = threading.RLock()
        self.changing = threading.RLock()
        self.version = 0
        self.taken = 0
        self.watcher: Watcher | None = None
        self.purged = False
        self._changed = False  # version went up within the open transaction

    def __getstate__(self) -> dict[str, Any]:
        own = ("lock", "changing", "watcher")
        return {k: item for k, item in vars(self).items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock(), changing=threading.RLock())
        self.watcher = None

    @abstractmethod
    def gather_hits(self) -> None:
        """Note whose the hits are so far, before a slot changes hands."""

    @contextmanager
    def change(self) -> Iterator[None]:
        """Make what is done inside a single step to lookups, and a `transaction`.

        They wait for what is done inside, and not for the watcher, who may wait for a disk.
        """
        with self.transaction(), self.lock, self.transaction():
            self.gather_hits()
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is done inside one step of undo, all of it or nothing; may be nested.

        That of another thread is waited for: what it is told is done stays done.
        """
        with self.changing:
            yield from self._transaction()

    def _transaction(self) -> Iterator[None]:
        self.journal.begin()
        try:
            yield
            with self.lock:
                self.slots.tell_sketch()
            told = self._tell_watcher()
        except BaseException:
            with self.lock:
                self.gather_hits()
                self.journal.roll_back()
                if not self.journal.is_open:
                    if self._changed:  # somebody may have seen a version in between
                        self.version = self.next_version()
                    self._changed = False
                self.slots.tell_sketch()
            if self.watcher is not None and not self.journal.is_open:
                self.watcher.taken_back(self)
            raise
        if self.journal.is_nested:
            with self.lock:  # others may look what was there before
                self.journal.end()
        else:
            self.journal.end()
        if not self.journal.is_open:
            if self.purged:
                self.journal.forget("a purge")
            self.purged = self._changed = False
        if told and self.watcher is not None:
            self.watcher.settled(self)

    @contextmanager
    def exchange(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Make what is done inside a single step to lookups, all of it or nothing.

        For what is too much to be noted place by place: inside, attributes of the storage and of
        its slots are replaced by others, and only these rows are written. `changing` is held.

        Args:
            rows: by the name of a tensor of `slots`, the slots `[n]` written there.
        """
        own, put_back = dict(vars(self)), self.slots.keep(rows)
        with self.lock:
            try:
                yield
            except BaseException:
                vars(self).update(own)
                put_back()
                raise

    def _tell_watcher(self) -> bool:
        """Tell the watcher of the end of the outermost transaction, if it changed anything."""
        changed = None if self.watcher is None else self.journal.changed()
        if self.watcher is None or changed is None or not (changed or self._changed):
            return False
        self.watcher.commit(self, changed)
        return True

    def undo(self) -> None:
        """Take the last step back; only `version`, ids and value ids go on.

        Raises:
            UndoError: there is none, or a transaction is open.
        """
        with self.changing:
            self._undo()

    def _undo(self) -> None:
        self.journal.require_step()
        capacity = self.journal.before_last(self.slots, "capacity")
        if capacity is not None and not self.slots.frozen:
            self.slots.warn_of_new_memory(capacity)
        with self.lock:
            self.gather_hits()
            redo = self.journal.undo()
            self.version = self.next_version()
            self.slots.maintain_sketch()
        if self.watcher is None:
            return
        try:
            self.watcher.commit(self, list(redo))
        except BaseException:
            with self.lock:
                self.gather_hits()
                self.journal.redo(redo)
                self.version = self.next_version()
                self.slots.maintain_sketch()
            self.watcher.taken_back(self)
            raise
        self.watcher.settled(self)

    def next_version(self) -> int:
        """Return the version of the next change, a number that nobody has seen before."""
        return max(self.version, self.taken) + 1
