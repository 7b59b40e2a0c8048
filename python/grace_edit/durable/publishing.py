"""The writer: every change of an editor's codebook is on the disk before its call returns."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import serving
from ..codebook import files, locking, redo, snapshot, store
from ..codebook.journal import Place
from ..codebook.log import End, LogWriter
from ..codebook.storage import Storage
from ..editor import GraceEditor

log = logging.getLogger("grace_edit")

_LEAST = 16 << 20  # bytes of a log before it is worth a snapshot
_AHEAD = 1 << 20  # versions that somebody may see of changes that are not kept, in a row


class Publisher:
    """Keeps what an editor does in a directory; see `publish`. Also a context manager."""

    def __init__(self, editor: GraceEditor, directory: Path, release: Callable[[], None]) -> None:
        self._editor, self._release = editor, release
        self.directory = directory
        self._log: LogWriter | None = None
        self._snapshot_bytes = 0
        self._due = True  # a snapshot, before anything is appended
        self._appended = False  # something that is not yet final in memory
        self._astray = False  # the log may hold what was taken back
        self._hits_kept = 0  # of those counted in this process, by the last snapshot
        self._closed = False
        with editor.codebook.changing() as storage:
            if storage.journal.is_open:
                raise ValueError("cannot publish inside a transaction: end it first")
            if len(editor.layers) > 1:
                raise ValueError(
                    f"editor must be that of one layer to be published, got {list(editor.layers)}; "
                    "save_pretrained writes several"
                )
            if storage.watcher is not None:
                raise ValueError(
                    "editor must not be published or follow already, got one that does"
                )
            self._open(storage)
            storage.watcher = self

    def _open(self, storage: Storage) -> None:
        # Readers tell by the configuration what is new, so it must be the one that is gone on from.
        files.complete(self.directory)
        if not (self.directory / files.CONFIG).exists():
            self._write(storage)
            return
        saved = store.load_saved(self.directory, writer=True)
        if not snapshot.same(saved.codebook.storage, storage):
            raise ValueError(
                f"directory must hold the editor's own edits or none, got others in "
                f"{self.directory}: make the editor of them with GraceEditor.from_pretrained"
            )
        described, beside = serving.describe(self._editor.family, self._editor.config)
        other = _other_part(saved, described, beside)
        if other and (storage.live_edits or storage.past):
            raise ValueError(
                f"directory must hold edits of the editor's own model, got others in "
                f"{self.directory}: their {other} differs"
            )
        files.drop_other_logs(self.directory, saved.checksum)
        self._log = LogWriter(files.log_of(self.directory, saved.checksum), saved.end)
        self._snapshot_bytes = saved.snapshot_bytes
        same = saved.codebook.capacity == storage.slots.capacity
        self._due = not same or saved.format < files.LOGGED or other is not None
        try:
            self._mark(storage, self._ahead(storage))
        except OSError:
            self._log.close()
            raise

    @property
    def version(self) -> int:
        """The version of the codebook, which is on the disk unless a change is under way."""
        return self._editor.codebook.version

    @property
    def log_bytes(self) -> int:
        """Bytes of changes since the last snapshot."""
        return 0 if self._log is None else self._log.end.offset

    def keeps(self, directory: Path) -> bool:
        """Say whether changes are kept in this directory."""
        return directory.exists() and directory.samefile(self.directory)

    def commit(self, storage: Storage, changed: Sequence[Place]) -> None:
        """Have a change on the disk; see `codebook.storage.Watcher`."""
        if self._due or self._log is None or storage.purged:
            # It holds the change already; a log would hold what was purged as well.
            self._appended = True
            self._write(storage, follows=False)
            return
        record, end = redo.render(storage, changed, self._ahead(storage)), self._log.end
        self._appended = True
        try:
            self._log.append(record)
        except BaseException:
            # What is not certain to be gone would come back, if this process died.
            self._appended = not self._log.sound or self._log.end != end
            raise

    def settled(self, storage: Storage, *, anew: bool = False) -> None:
        """Make a snapshot where one is due; see `codebook.storage.Watcher`."""
        self._appended = False
        self._due = self._due or anew
        if self._due or self.log_bytes > max(_LEAST, self._snapshot_bytes):
            self._try_to_write(storage)

    def _try_to_write(self, storage: Storage) -> None:
        try:
            self._write(storage)
        except OSError as error:
            # What was acknowledged is there all the same.
            log.error(
                "%s: no snapshot now, tried again at the next change: %s", self.directory, error
            )

    def taken_back(self, storage: Storage) -> None:
        """Let what is on the disk be what it was; see `codebook.storage.Watcher`."""
        if self._appended:
            self._appended = False
            self._due = self._astray = True
            self._try_to_write(storage)

    def replace(self, storage: Storage) -> None:
        """Make a snapshot of what takes over; see `codebook.storage.Watcher`."""
        self._write(storage, follows=False)

    def fold(self) -> None:
        """Fold the log in: write a snapshot and drop the log, which holds nothing else then.

        The edits and their history stay; `Codebook.compact` forgets of them.

        Raises:
            OSError: as the file system says; nothing is lost.
        """
        with self._editor.codebook.changing() as storage:
            self._require_open()
            self._write(storage)

    def close(self) -> None:
        """End publishing: later changes are the editor's alone. The directory can be written to."""
        if self._closed:
            return
        with self._editor.codebook.changing() as storage:
            self._closed = True
            try:
                if self._due:
                    self._write(storage)
                elif self._hits_of(storage) > self._hits_kept:  # no log has them
                    self._try_to_write(storage)
                with contextlib.suppress(OSError):  # versions leave a gap then
                    self._mark(storage, storage.taken)
            finally:
                if storage.watcher is self:
                    storage.watcher = None
                if self._log is not None:
                    self._log.close()
                self._release()

    def _ahead(self, storage: Storage) -> int:
        """Return a version that is not reached before the next record says more.

        Readers may see a change before it is on the disk, and versions that come to nothing. Who
        goes on after a crash begins behind them, or one version would name two states.
        """
        return max(storage.version, storage.taken) + _AHEAD

    def _mark(self, storage: Storage, taken: int) -> None:
        if self._log is not None:
            self._log.append(redo.render(storage, (), taken))

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("publisher must be open, got one that was closed")

    def _hits_of(self, storage: Storage) -> int:
        with storage.lock:
            storage.gather_hits()
            return storage.hits.total

    def _write(self, storage: Storage, *, follows: bool = True) -> None:
        described, beside = serving.describe(self._editor.family, self._editor.config)
        self._due = True
        before = self._log
        chain = None
        if before is not None and follows and before.sound and not self._astray:
            chain = before.end.chain.hex()
        ahead, hits = self._ahead(storage), self._hits_of(storage)
        checksum = store.write(
            storage, self.directory, described, beside, chain, ahead, logged=True
        )
        path = files.log_of(self.directory, checksum)
        self._log = LogWriter(path, End.of_empty(checksum))
        if before is not None:
            before.close()
        names = (files.CONFIG, files.TENSORS, files.EDITS, *beside)
        self._snapshot_bytes = sum((self.directory / name).stat().st_size for name in names)
        self._due = self._astray = False
        self._hits_kept = hits


def _other_part(
    saved: store.Saved, described: dict[str, Any], beside: dict[str, bytes]
) -> str | None:
    """Name what makes saved edits those of another model or layer; None: nothing does."""
    was, now = saved.config.get("serving", {}), described["serving"]
    layers = str(was.get("layer")), str(now.get("layer"))
    # A wrapper puts something before the name.
    if not (layers[0].endswith(layers[1]) or layers[1].endswith(layers[0])):
        return "layer"
    for part in ("query", "replace"):
        if was.get(part) != now.get(part):
            return part
    # What is above the layer may differ, if whoever loaded the edits has allowed it.
    below = [of.get("model", {}).get("fingerprint", {}) for of in (saved.config, described)]
    if below[0].get("below") != below[1].get("below"):
        return "model"
    return "text map" if saved.beside != beside else None


def publish(editor: GraceEditor, directory: str | Path, *, timeout: float = 10.0) -> Publisher:
    """Keep every change of an editor in a directory, before the call that makes it returns.

    From then on an edit, batch, delete, undo, purge, `compact` or `rekey` that has returned is on
    the disk, whatever happens to the process. One that cannot be kept (the disk is full) raises
    OSError, and the codebook is as it was. Readers wait for no disk.

    The directory is what `save_pretrained` writes, and a log beside; whatever reads saved edits
    reads both. What `count_hits` counts is kept by snapshots alone, of which `close` makes one.

    Args:
        editor: its codebook is new or that of the directory (`GraceEditor.from_pretrained`).
        directory: made if it is not there.
        timeout: seconds to wait for another writer.

    Returns:
        A publisher, the only writer until it is closed.

    Raises:
        TimeoutError: another process publishes there; the message names it.
        ValueError: the directory holds other edits or those of another model, or the editor is
            published already.
        StoreError: the directory is damaged.
        OSError: as the file system says.
    """
    directory = Path(directory).absolute()
    release = locking.take(directory, timeout)
    try:
        return Publisher(editor, directory, release)
    except BaseException:
        release()
        raise
