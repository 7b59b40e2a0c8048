"""Edits on disk before they are acknowledged: the directory is saved after each change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..codebook import store
from ..codebook.locking import writing
from ..codebook.records import UndoError
from ..editor import GraceEditor


class Saving:
    """Save a directory of edits after each change, and take back a change that cannot be saved.

    Args:
        editor: of the edits, as loaded from the directory; one that is not there is made.
        directory: as of `save_pretrained`.
    """

    def __init__(self, editor: GraceEditor, directory: Path) -> None:
        self._editor, self._directory = editor, directory
        if not directory.exists():
            editor.save_pretrained(directory)
        self._saved = self._state()

    def __call__(self, change: Callable[[], Any]) -> Any:
        """Run a change and return what it did, once it is saved.

        Raises:
            OSError: it cannot be saved, or another process has saved the directory since, whose
                edits this would drop; nothing has changed then, but for a purge, which stays.
        """
        book = self._editor.codebook
        with book.changing():
            before = book.version
            done = change()
            if book.version == before:
                return done
            try:
                with writing(self._directory):
                    if self._state() != self._saved:
                        raise OSError(
                            f"{self._directory} was saved by another process; start the server "
                            "again to go on from there"
                        )
                    self._editor.save_pretrained(self._directory)
                    self._saved = self._state()
            except BaseException as error:
                try:
                    book.undo()
                except UndoError:  # after a purge there is no way back
                    raise OSError(f"purged here, and still on disk: {error}") from error
                raise
            return done

    def _state(self) -> tuple[int, int, int]:
        found = (self._directory / store.CONFIG).stat()
        return found.st_mtime_ns, found.st_ino, found.st_size
