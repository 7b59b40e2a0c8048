"""Who watches a codebook that is not to be changed by just anybody."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .journal import Place
from .storage import Storage


class Guard:
    """Refuses changes of codebooks, but for those that are made where it is open.

    Args:
        refusal: what the ValueError says.
        of_history: let those be that write to no slot, so that no answer changes.
    """

    def __init__(self, refusal: str, *, of_history: bool = False) -> None:
        self._refusal, self._of_history = refusal, of_history
        self._opened: int | None = None  # by which thread

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let this thread make changes inside a `with` block, by one thread at a time."""
        before, self._opened = self._opened, threading.get_ident()
        try:
            yield
        finally:
            self._opened = before

    def commit(self, storage: Storage, changed: Sequence[Place]) -> None:
        """See `transactions.Watcher`."""
        if self._of_history and all(part is not storage.slots for part, _, _ in changed):
            return
        self._check()

    def _check(self) -> None:
        if self._opened != threading.get_ident():
            raise ValueError(self._refusal)

    def keeps(self, directory: Path) -> bool:
        """See `transactions.Watcher`."""
        return False

    def settled(self, storage: Storage, *, anew: bool = False) -> None:
        """See `transactions.Watcher`."""

    def taken_back(self, storage: Storage) -> None:
        """See `transactions.Watcher`."""

    def replace(self, storage: Storage) -> None:
        """See `transactions.Watcher`."""
        self._check()
