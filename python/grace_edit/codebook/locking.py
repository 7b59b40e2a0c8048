"""One writer at a time in a directory of saved edits, among threads and processes.

The lock is a file in the directory that names who holds it. Where the operating system locks files
(`flock`), it lets go of a lock whose process has ended, however it ended. Elsewhere the file is
there as long as it is held, and one whose process is gone from this machine is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("grace_edit")

LOCK = "codebook.lock"
_MADE = LOCK + ".made"  # there only while it is held, where files cannot be locked
_GUARD = LOCK + ".guard"
_SHORT = 2.0  # seconds to wait for who says that it lasts
_PATIENCE = 1.0  # seconds of waiting that nobody is told of
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class _Held(threading.local):
    def __init__(self) -> None:
        self.depth: dict[Path, int] = {}


_held = _Held()


@contextmanager
def writing(directory: str | Path, timeout: float = 600.0) -> Iterator[None]:
    """Be the only one that writes to a directory of saved edits inside a `with` block.

    `save` does this by itself. Hold it yourself from loading to saving, and nobody else's save
    comes in between. The thread that holds it may enter it again. Readers do not wait.

    Args:
        directory: made if it is not there, and taken away again if nothing was written.
        timeout: seconds to wait for others.

    Raises:
        TimeoutError: somebody else is still writing; the message names the machine and process.
        OSError: as the file system says.
    """
    directory = Path(directory).absolute()
    if _held.depth.get(directory):
        _held.depth[directory] += 1
        try:
            yield
        finally:
            _held.depth[directory] -= 1
        return
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        path, handle = _take(directory, timeout)
        _held.depth[directory] = 1
        try:
            yield
        finally:
            del _held.depth[directory]
            _let_go(path, handle)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def take(directory: Path, timeout: float) -> Callable[[], None]:
    """Be the only one that writes to a directory until what is returned is called.

    The thread does not matter, and nobody waits long for it: the lock says that it lasts.

    Raises:
        TimeoutError, OSError: as `writing`.
    """
    path, handle = _take(directory, timeout, lasting=True)
    return lambda: _let_go(path, handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the file system inside a `with` block say where it was, if it does not.

    A full disk names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def is_held(directory: Path) -> bool:
    """Say whether somebody is writing to a directory; no, if it cannot be told."""
    if (directory / _MADE).exists():
        return not _is_stale(directory / _MADE)
    if fcntl is None:
        return False
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def owner_of(directory: Path) -> str | None:
    """Return who is writing to a directory, None: nobody."""
    return _owner(directory) if is_held(directory) else None


def _take(directory: Path, timeout: float, lasting: bool = False) -> tuple[Path, int]:
    start, told = time.monotonic(), False
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            taken = _try(directory, lasting)
        except FileNotFoundError:  # the directory was taken away again
            continue
        if taken is not None:
            return taken
        waited = time.monotonic() - start
        if waited > (min(timeout, _SHORT) if _lasts(directory) else timeout):
            raise TimeoutError(
                f"{directory}: must be written by one process at a time, got "
                f"{_owner(directory)}, that is still writing after {waited:.0f} s; if it is gone, "
                f"remove {directory / LOCK}*"
            )
        if waited > _PATIENCE and not told:
            log.warning("%s: waiting for %s", directory, _owner(directory))
            told = True
        time.sleep(min(0.2, 0.01 + waited / 20))


def _lasts(directory: Path) -> bool:
    owner = _signed(directory / LOCK) or _signed(directory / _MADE)
    return bool(owner.get("lasting"))


def _try(directory: Path, lasting: bool) -> tuple[Path, int] | None:
    """Return file and handle of the lock, None while somebody else holds it."""
    if fcntl is None:
        return _make(directory, lasting)
    path = directory / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one before may have removed the file between our two calls.
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            try:
                _sign(path, handle, lasting)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            return path, handle
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            os.close(handle)
            raise
        os.close(handle)
        path.unlink(missing_ok=True)
        return _make(directory, lasting)
    os.close(handle)
    return None


def _let_go(path: Path, handle: int) -> None:
    if os.name == "nt":  # a file that is open cannot be removed there
        os.close(handle)
        path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
        os.close(handle)


def _sign(path: Path, handle: int, lasting: bool) -> None:
    owner: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    owner |= {"since": time.ctime(), **({"lasting": True} if lasting else {})}
    with naming(path):
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(owner).encode())


def _make(directory: Path, lasting: bool) -> tuple[Path, int] | None:
    """Take the lock by making its file; None: it is there and its owner lives."""
    path = directory / _MADE
    if _is_stale(path):
        # One at a time, or a second one would remove the file that the first has just made.
        guard = path.with_name(_GUARD)
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        try:
            if _is_stale(path):
                path.unlink()
        finally:
            guard.unlink()
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        _sign(path, handle, lasting)
    except OSError:  # a lock that names nobody would stay for good
        _let_go(path, handle)
        raise
    return path, handle


def _is_stale(path: Path) -> bool:
    owner = _signed(path)
    if owner.get("host") != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return False


def _signed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(directory: Path) -> str:
    owner = _signed(directory / LOCK) or _signed(directory / _MADE)
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
