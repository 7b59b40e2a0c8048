"""A codebook that is brought to each new state of a directory, in the memory that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import adopting, files, redo, snapshot, store
from .codebook import Codebook
from .files import StoreError
from .log import End


class Replica:
    """Brings a codebook to what a directory holds; one thread at a time.

    What somebody publishes costs what changed. What was saved as a whole is read as a whole, and
    rows that are equal already stay. Within the capacity the tensors stay where they are.

    Args:
        book: what `saved` held; nothing else changes it from now on.
        directory: where it was read.
        saved: what was read.
        check: is given the caller's `config` of what was saved as a whole, before it is taken;
            what it raises keeps it out.
        changing: what each change is made in.

    Attributes:
        version: of the writer, that the codebook holds.
        end: of the log that was read.
    """

    def __init__(
        self,
        book: Codebook,
        directory: Path,
        saved: store.Saved,
        check: Callable[[dict[str, Any]], None],
        changing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._book, self._directory = book, directory
        self._check, self._changing = check, changing
        self._checksum, self.end = saved.checksum, saved.end
        self.version = book.version
        self._rows: set[int] = set()

    @property
    def log(self) -> Path:
        """Where the changes since the last snapshot are, if there is a log."""
        return files.log_of(self._directory, self._checksum)

    def take_rows(self) -> set[int]:
        """Return the slots whose key, value or radius was written since the last call."""
        rows, self._rows = self._rows, set()
        return rows

    def poll(self) -> bool:
        """Look once and take what is new; say whether anything was.

        Raises:
            StoreError: the directory is damaged.
            CapacityError: it takes more slots than there are, and the codebook is frozen.
            ValueError: another dtype or width.
        """
        described = files.describe(self._directory)
        if described["checksum"] != self._checksum:
            if described.get("follows") != self.end.chain.hex():
                # The rest of the log before may be there still; what is gone comes as a whole.
                return self._reload()
            self._checksum = described["checksum"]
            self.end = End.of_empty(self._checksum)
        try:
            found = files.read_log(self._directory, self._checksum, self.end)
        except StoreError:
            return self._reload()  # which says what is damaged
        if found is None or not found[0]:
            if found is not None or self.end.offset == 0:
                return False
            return self._reload()
        before = self.version
        for record in found[0]:
            rows, version = redo.rows_of(record), redo.version_of(record)
            end = self.end.after(record)
            with self._changing():
                redo.apply(self._book.storage, record)
                self._rows |= rows
                self.end, self.version = end, version
        return self.version != before  # a writer that comes or goes notes it

    def _reload(self) -> bool:
        saved = store.load_saved(self._directory)
        self._check(saved.config)
        # Saved again as it was: another version would not be the writer's.
        if not snapshot.same(self._book.storage, saved.codebook.storage):
            with self._changing():
                self._rows |= adopting.adopt(self._book.storage, saved.codebook.storage)
        self._checksum, self.end = saved.checksum, saved.end
        self.version = saved.codebook.version
        return True
