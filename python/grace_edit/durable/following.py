"""A reader: a served model is brought to each new version of what a writer publishes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .. import serving
from ..codebook import files, store
from ..codebook.files import StoreError
from ..codebook.guard import Guard
from ..codebook.replica import Replica
from ..families import Family

log = logging.getLogger("grace_edit")

_LOOK = 0.05  # seconds between two looks for the first edits


class Follower:
    """Brings the edits of a served model up to those of a directory; see `follow`.

    Attributes:
        family: of the served model.
        error: why the last look brought nothing; None: it went well. The model goes on serving
            the version before, and it is tried again.
    """

    def __init__(
        self, family: Family, directory: Path, saved: store.Saved, interval: float | None
    ) -> None:
        self.family, self.directory = family, directory
        self._book = family.adaptor.codebook
        self._config = saved.config
        self.error: Exception | None = None
        self._one = threading.Lock()  # poll at a time
        self._news = threading.Condition()
        self._closed = threading.Event()
        self._guard = Guard("codebook must be changed by its writer, got a change of a follower")
        self._replica = Replica(self._book, directory, saved, self._check, self._guard.open)
        self._book.storage.watcher = self._guard
        self._thread: threading.Thread | None = None
        if interval is not None:
            self._thread = threading.Thread(
                target=self._run, args=[interval], name="grace-follower", daemon=True
            )
            self._thread.start()

    @property
    def version(self) -> int:
        """The version of the writer that the model serves."""
        return self._replica.version

    @property
    def codebook(self) -> Any:
        """The codebook that answers, which the writer alone changes."""
        return self._book

    def poll(self) -> bool:
        """Look once, and bring the model to the latest version; say whether anything was new.

        Raises:
            StoreError: the directory is damaged, or holds edits of another model, layer or dtype.
            CapacityError: it takes more slots than there are, and the codebook is frozen.
        """
        with self._one:
            try:
                new = self._replica.poll()
            except Exception as error:
                self._tell(error)
                raise
            self._tell(None)
            return new

    def _tell(self, error: Exception | None) -> None:
        with self._news:
            self.error = error
            self._news.notify_all()

    def _check(self, config: dict[str, Any]) -> None:
        for part in ("serving", "model"):
            if self._config.get(part) != config.get(part):
                raise StoreError(
                    f"{self.directory}: edits of another {part} now; follow it with a model anew"
                )

    def _run(self, interval: float) -> None:
        told = ""
        while not self._closed.wait(interval):
            try:
                self.poll()
                told = ""
            except Exception as error:  # the thread must go on
                if str(error) != told:
                    told = str(error)
                    log.error("%s: not followed: %s", self.directory, error)

    def wait(self, version: int, timeout: float = 10.0) -> None:
        """Wait until the model serves this version of the writer, or a later one.

        Args:
            version: as `Publisher.version`, or a reply of `grace serve`, has it.
            timeout: seconds to wait.

        Raises:
            TimeoutError: it does not yet; the message says why, if that is known.
        """
        until = time.monotonic() + timeout
        with self._news:
            while self.version < version:
                left = until - time.monotonic()
                if left <= 0:
                    why = "" if self.error is None else f": {self.error}"
                    raise TimeoutError(
                        f"version must be reached within {timeout} s, got {self.version} "
                        f"of {version}{why}"
                    )
                self._news.wait(left)

    def close(self) -> None:
        """Follow no more. The model goes on serving what it serves until `grace_edit.detach`."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._one:
            if self._book.storage.watcher is self._guard:
                self._book.storage.watcher = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def follow(
    model: nn.Module,
    tokenizer: Any,
    directory: str | Path,
    *,
    interval: float | None = 0.2,
    encoder: Callable[[list[str]], Any] | str | None = None,
    patience: float = 0.0,
) -> Follower:
    """Serve what a writer publishes in a directory, and each new version of it.

    It answers with the writer's bits. Within the capacity the tensors stay where they are: nothing
    is compiled or captured again. A change is a single step to requests, which wait for it as for
    an edit of one's own.

    Args:
        model: the one that the edits were made on, in the same dtype.
        tokenizer: of the model; None: only for edits that need none.
        directory: where a `Publisher` writes, or did; anybody who can read may follow.
        interval: seconds between two looks of a thread; None: call `poll`.
        encoder: of edits with `query="text"`, where it was a callable or lies elsewhere now.
        patience: seconds to wait for the first edits, where nobody has published any yet.

    Raises:
        StoreError, ValueError: as `load`; there are no edits yet.
    """
    directory = Path(directory).absolute()
    saved = _first(directory, patience)
    attached = serving.attach_saved(model, tokenizer, directory, encoder=encoder, saved=saved)
    family, _ = attached[0]
    return Follower(family, directory, saved, interval)


def _first(directory: Path, patience: float) -> store.Saved:
    """Read what is followed, once it is there."""
    until = time.monotonic() + patience
    while True:
        # A save that is being renamed, or was interrupted there, is one as well.
        if (directory / files.CONFIG).exists() or files.is_being_saved(directory):
            return store.load_saved(directory)
        left = until - time.monotonic()
        if left <= 0:
            raise StoreError(
                f"{directory}: must hold published or saved edits to be followed, got none yet; "
                "start the writer first (publish, grace serve), or wait for it with "
                "follow(..., patience=SECONDS)"
            )
        time.sleep(min(left, _LOOK))
