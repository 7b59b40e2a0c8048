"""What a saved codebook lies in: its files, what vouches for them, and reading them as a whole.

    grace_config.json      format, settings, the caller's own configuration, checksums of the others
    codebook.safetensors   keys, values, radii, stored queries, values that only the history needs,
                           the sketch of the keys if there is one
    edits.jsonl            one line per edit of the history, then one per entry
    edits-….log            where somebody publishes: every change since, see `log`; its name says to
                           which checksum of the configuration it belongs

and further ones that the caller names, such as the map of text keys. The codebooks of further
layers of the same model lie beside, each with files of its own ("layer-2." and so on before their
names), and are described in the same configuration. The configuration vouches for
the others, so the state it describes is either there as a whole or refused. Each file is first
written under its name + ".new" and fsynced; then they are renamed, the configuration last. What an
interruption between the renames leaves is completed on reading.

One writes at a time, see `locking`. Readers wait for nobody: one that finds files which do not
agree, and which somebody has renamed meanwhile, reads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .locking import LOCK, is_held
from .log import End, LogError, read, sync_directory

FORMAT = 4
"""The highest that is read; what an older release reads right is written as 1."""

LOGGED = 3
"""The format of a snapshot to which a log may belong, which an older release would not read."""

SEVERAL = 4
"""The format of the codebooks of several layers."""

CONFIG = "grace_config.json"
TENSORS = "codebook.safetensors"
EDITS = "edits.jsonl"
NEW = ".new"
_PIECE = 1 << 22  # bytes read at a time
_LOG = "edits-{}.log"
LAYER = "layer-{}."
_READINGS = 1000  # of files that somebody renames each time


class StoreError(ValueError):
    """A saved codebook is missing, damaged, too new, or not one that belongs here."""


class SeveralLayersError(StoreError):
    """The saved codebooks of several layers, where that of one is taken."""


def log_of(directory: Path, checksum: str) -> Path:
    """Return where the changes since a snapshot of this checksum are."""
    return directory / _LOG.format(checksum[:16])


def is_being_saved(directory: Path) -> bool:
    """Say whether files may not agree now: a save renames them, or was interrupted."""
    return (directory / (CONFIG + NEW)).exists()


def drop_other_logs(directory: Path, checksum: str) -> None:
    """Remove the logs of snapshots that were replaced."""
    own, gone = log_of(directory, checksum), False
    for path in directory.glob(_LOG.format("*")):
        if path != own:
            path.unlink(missing_ok=True)
            gone = True
    if gone:
        sync_directory(directory)


def several_layers(directory: Path, described: dict[str, Any]) -> SeveralLayersError:
    """Return the error of who takes the codebook of one layer alone; see `describe`."""
    return SeveralLayersError(
        f"{directory}: must hold the edits of one layer here, got those of "
        f"{1 + len(described['layers'])}; GraceEditor.from_pretrained and grace_edit.load attach "
        "them all to a model"
    )


def describe(directory: str | Path) -> dict[str, Any]:
    """Read what `save` wrote about a codebook, without its tensors and records.

    Returns:
        A dict with `format`, `codebook` (sizes, dtypes, policy, version of the snapshot), `config`
        (the caller's), `files` (checksums), `checksum`, and `follows` and `taken` if they are
        there, see `write`; of several layers `layers`, `codebook` and `config` of each further one.

    Raises:
        StoreError: it is missing, altered or of a newer format.
    """
    directory = Path(directory)
    try:
        return _read_config(directory / CONFIG)
    except StoreError:
        return read_saved(directory, False)[0]


def read_log(
    directory: Path, checksum: str, start: End, *, writer: bool = False
) -> tuple[list[bytes], End] | None:
    """Return the records of a log behind `start`, and their end; None: there is no log.

    Args:
        directory, checksum: see `log_of`.
        writer: see `load_saved`.

    Raises:
        StoreError: it is damaged, or does not go on from there.
    """
    path = log_of(directory, checksum)
    while True:
        free = writer or not is_held(directory)
        content = _read_from(path, start.offset)
        if content is None:
            return None
        # A frame without a seal counts if its writer is gone, and not if one came meanwhile.
        asked = free and content and not writer
        if asked and (is_held(directory) or _read_from(path, start.offset) != content):
            continue
        try:
            return read(content, start, unsealed=free)
        except LogError as error:
            raise StoreError(f"{path}: {error}") from error


def _read_from(path: Path, offset: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def render(described: dict[str, Any]) -> bytes:
    """Return a configuration as it stands in its file; what is not finite raises ValueError."""
    return (json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read a piece at a time; raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def checksum_of(described: dict[str, Any]) -> str:
    """Return the checksum of a configuration, and with it of the files that it vouches for."""
    return sha256(render({k: v for k, v in described.items() if k != "checksum"}))


def rename(directory: Path, described: dict[str, Any]) -> None:
    """Put the new files of a save in the place of the old ones, the configuration last.

    Once more after an interruption, it does the rest. Raises OSError as the file system says.
    """
    for name in (*described["files"], CONFIG):
        if (directory / (name + NEW)).exists():
            os.replace(directory / (name + NEW), directory / name)
    sync_directory(directory)


def complete(directory: Path) -> None:
    """Finish a save that was interrupted between its renames, for who holds the lock.

    To be done before anything else is written, or before a log is added to.
    """
    if not (directory / (CONFIG + NEW)).exists():
        return
    try:
        _read_files(directory, _read_config(directory / CONFIG))
    except StoreError:
        try:
            described = _read_config(directory / (CONFIG + NEW))
            _read_files(directory, described)
        except StoreError:
            return
        rename(directory, described)


_Content = tuple[dict[str, Any], dict[str, Any], list[bytes], End]


def read_saved(directory: Path, writer: bool) -> _Content:
    """Return the configuration, the contents it vouches for, and the log behind them.

    What a save changes meanwhile is read again.

    Args:
        writer: this process holds the lock, and no other one can be writing.

    Raises:
        StoreError: a file is missing, damaged or of a newer format.
    """
    unchanged = 0
    for _ in range(_READINGS):
        before = _places(directory)
        try:
            return _read_once(directory, writer)
        except StoreError as error:
            failed = error
        unchanged = unchanged + 1 if _places(directory) == before else 0
        if unchanged == 2:  # clocks are coarse: once may be chance
            break
    raise failed


def _places(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return what tells whether a file was replaced or written, by name."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(LOCK):
                continue
            with contextlib.suppress(OSError):
                found[entry.name] = _place(entry.stat())
    return found


def _place(at: os.stat_result) -> tuple[int, int, int]:
    return at.st_ino, at.st_mtime_ns, at.st_size


def _read_once(directory: Path, writer: bool) -> _Content:
    try:
        described = _read_config(directory / CONFIG)
        files = _read_files(directory, described)
    except StoreError as error:
        # A save that was interrupted between its renames has left the rest of the new state.
        try:
            described = _read_config(directory / (CONFIG + NEW))
            files = _read_files(directory, described)
        except StoreError:
            raise error from None
    start = End.of_empty(described["checksum"])
    found = read_log(directory, described["checksum"], start, writer=writer)
    if found is not None:
        return described, files, *found
    # No log, or one that was removed since because another snapshot is there.
    for path in (directory / CONFIG, directory / (CONFIG + NEW)):
        with contextlib.suppress(StoreError):
            if _read_config(path)["checksum"] == described["checksum"]:
                return described, files, [], start
    raise StoreError(f"{directory / CONFIG}: was replaced while it was read")


def _read_config(path: Path) -> dict[str, Any]:
    content = _read_bytes(path)
    try:
        described = json.loads(content)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise StoreError(f"{path}: not JSON ({error})") from error
    if not isinstance(described, dict) or not isinstance(described.get("format"), int):
        raise StoreError(f"{path}: not the configuration of a saved codebook")
    if described["format"] > FORMAT:
        raise StoreError(
            f"{path}: format must be at most {FORMAT}, got {described['format']}; "
            "it was written by a newer release"
        )
    if described.get("checksum") != checksum_of(described) or content != render(described):
        raise StoreError(f"{path}: checksum differs, the file was altered")
    return described


def _read_files(directory: Path, described: dict[str, Any]) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    named = described.get("files", {})
    for name in dict.fromkeys((TENSORS, EDITS, *named)):
        if Path(name).name != name:
            raise StoreError(f"{directory / CONFIG}: files must lie beside it, got {name!r}")
        read = _map_tensors if name.endswith(TENSORS) else _read_checked
        for candidate in (directory / name, directory / (name + NEW)):
            if candidate.exists():
                found = read(candidate, named.get(name))
                if found is not None:
                    contents[name] = found
                    break
        else:
            _read_bytes(directory / name)  # raises where it is missing
            raise StoreError(f"{directory / name}: checksum differs, truncated or altered")
    return contents


def _read_checked(path: Path, wanted: str | None) -> bytes | None:
    """Return what a file holds, None where that has another checksum."""
    content = _read_bytes(path)
    return content if sha256(content) == wanted else None


def _map_tensors(path: Path, wanted: str | None) -> dict[str, Tensor] | None:
    """Return the tensors of a file as they lie there, None where it has another checksum.

    Their memory is the file's, read when it is looked at; what is written to them stays outside.
    """
    try:
        before = _place(path.stat())
        if sha256_of(path) != wanted:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kinds
            raise StoreError(f"{path}: not a safetensors file ({error})") from error
        # Renamed over in between: what was opened is not what was checked.
        return tensors if _place(path.stat()) == before else None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
