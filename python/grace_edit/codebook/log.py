"""A file of records to which one process appends: what was acknowledged is there, whole.

Each record stands in a frame: a mark, a seal, its length, and a SHA-256 of the frame before it, the
length and the record. So none can be altered, left out or exchanged, and the first one is bound to
the snapshot that the file belongs to. To append is to write the frame without its seal, to have it
on the disk (fsync), and to write the seal. Readers take sealed frames: whatever they have seen is
on the disk. A frame at the end that is whole and has no seal is one whose writer died, or a seal
that a power cut took with it: it counts as soon as its writer is gone. One that is not whole was
never acknowledged, and is dropped by the next writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

_MARK = b"GRACElog"
_SEALED, _OPEN = b"sealed.\n", b"written\n"
_HEAD = struct.Struct("<8s8sQ32s")


class LogError(ValueError):
    """A frame that was acknowledged is damaged."""


@dataclass(frozen=True)
class End:
    """Where a part of a log ends that was read: the offset, and the SHA-256 of its last frame."""

    offset: int
    chain: bytes

    @classmethod
    def of_empty(cls, seed: str) -> End:
        """Return the beginning of the log that belongs to a snapshot of this checksum."""
        return cls(0, hashlib.sha256(seed.encode()).digest())

    def after(self, record: bytes) -> End:
        """Return where the next record ends, if it is this one."""
        return End(self.offset + _HEAD.size + len(record), _digest(self.chain, record))


def read(content: bytes, start: End, *, unsealed: bool) -> tuple[list[bytes], End]:
    """Return the records behind `start`, and where they end.

    Args:
        content: what the file holds from the offset of `start` on.
        unsealed: take a whole frame without a seal too, at the end.

    Raises:
        LogError: a sealed frame is damaged, or is not the one that follows.
    """
    records, at, chain = [], 0, start.chain
    while len(content) - at >= _HEAD.size:
        mark, seal, length, digest = _HEAD.unpack_from(content, at)
        record = content[at + _HEAD.size : at + _HEAD.size + length]
        whole = mark == _MARK and len(record) == length and digest == _digest(chain, record)
        if whole and (seal == _SEALED or unsealed):
            records.append(record)
            at, chain = at + _HEAD.size + length, digest
            continue
        # A frame that is being written, or was when its writer died, is the last.
        damaged = mark == _MARK and seal == _SEALED
        if damaged or _MARK + _SEALED in content[at + 1 :]:
            raise LogError(f"the record at byte {start.offset + at} is damaged")
        break
    return records, End(start.offset + at, chain)


def _digest(chain: bytes, record: bytes) -> bytes:
    head = hashlib.sha256(chain + len(record).to_bytes(8, "little"))
    head.update(record)
    return head.digest()


class LogWriter:
    """Appends to a log. One at a time, see `locking`.

    Args:
        path: of the file; made if it is not there.
        end: of what it holds; anything behind is dropped.
    """

    def __init__(self, path: Path, end: End) -> None:
        there = path.exists()
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.path, self.end = path, end
        try:
            if there:
                self._seal_all()
                os.ftruncate(self._handle, end.offset)
            os.fsync(self._handle)
            sync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    def _seal_all(self) -> None:
        # Only the last one can lack its seal.
        at = last = 0
        while at < self.end.offset:
            last = at
            at += _HEAD.size + _HEAD.unpack(os.pread(self._handle, _HEAD.size, at))[2]
        if at:
            os.pwrite(self._handle, _SEALED, last + len(_MARK))

    def append(self, record: bytes) -> None:
        """Append a record; it is on the disk when this returns.

        Raises:
            OSError: as the file system says; the record is not there then. If it is not certain
                that what else is there is on the disk, `sound` is False.
        """
        digest = _digest(self.end.chain, record)
        frame = _HEAD.pack(_MARK, _OPEN, len(record), digest) + record
        offset = self.end.offset
        self.sound = False
        try:
            written = 0
            while written < len(frame):
                written += os.pwrite(self._handle, frame[written:], offset + written)
        except BaseException:
            os.ftruncate(self._handle, offset)
            self.sound = True
            raise
        try:
            os.fsync(self._handle)
            os.pwrite(self._handle, _SEALED, offset + len(_MARK))
        except BaseException:
            # What a disk says once about pages that it lost it does not say again.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, offset)
            raise
        self.end = End(offset + len(frame), digest)
        self.sound = True

    sound = True
    """Whether the file ends where `end` says, with all before it on the disk."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
