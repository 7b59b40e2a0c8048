"""Serving edits that another process makes: the directory is read again when it was saved."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from ..codebook import store
from ..families import Family

log = logging.getLogger("grace_edit")


class Following:
    """Bring the codebook of an attached model to each state that is saved in a directory.

    A single step to requests, and the version is that of the writer. What cannot be read, or
    belongs to another model, is logged, and what was served before goes on being served.

    Args:
        family: of the model, as attached from this directory.
        directory: of saved edits.
        interval: seconds between looks at the directory.
    """

    def __init__(self, family: Family, directory: Path, interval: float = 0.2) -> None:
        self._family, self._directory, self._interval = family, directory, interval
        # Not of now: what was saved since it was attached is read once more.
        self._seen: tuple[int, ...] = ()
        self._of: object = None
        self._stop = threading.Event()
        self.poll()
        self._thread = threading.Thread(target=self._run, name="grace-follow", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Read the directory if it was saved since; returns whether it was.

        Raises:
            StoreError: its files are damaged, or belong to another model.
            OSError: they cannot be read.
        """
        path = self._directory / store.CONFIG
        found = path.stat()
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen == self._seen:
            return False
        book, described, _ = store.load_all(self._directory)
        self._seen = seen
        of = {name: described.get(name) for name in ("serving", "config")}
        of["model"] = (described.get("model") or {}).get("fingerprint")
        if self._of is None:
            self._of = of
        if of != self._of:
            raise store.StoreError(
                f"{self._directory} must hold edits of the model that is served, asked in the same "
                "way, got others; start the server again"
            )
        mine = self._family.adaptor.codebook
        if book.version != mine.version:
            version = book.version
            mine.take_over(book.to(mine.device), "the edits were made elsewhere", version=version)
        return True

    def _run(self) -> None:
        told = ""
        while not self._stop.wait(self._interval):
            try:
                self.poll()
                told = ""
            except Exception as error:
                # Once: it is the same at each look.
                if str(error) != told:
                    told = str(error)
                    log.error("not followed: %s", told)

    def close(self) -> None:
        """Follow no longer."""
        self._stop.set()
        self._thread.join()
