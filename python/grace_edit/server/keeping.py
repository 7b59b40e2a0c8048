"""Edits on disk before they are acknowledged: the directory is saved after each change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..editor import GraceEditor


class Saving:
    """Save a directory of edits after each change, and take back a change that cannot be saved.

    Args:
        editor: of the edits.
        directory: as of `save_pretrained`.
    """

    def __init__(self, editor: GraceEditor, directory: Path) -> None:
        self._editor, self._directory = editor, directory
        if not directory.exists():
            editor.save_pretrained(directory)

    def __call__(self, change: Callable[[], Any]) -> Any:
        book = self._editor.codebook
        with book.changing():
            before = book.version
            done = change()
            if book.version == before:
                return done
            try:
                self._editor.save_pretrained(self._directory)
            except BaseException:
                book.undo()
                raise
            return done
