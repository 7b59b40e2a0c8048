"""Codebooks on disk: files written so that a crash never leaves a wrong state that loads.

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
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import redo, snapshot
from .codebook import Codebook
from .locking import LOCK, is_held, writing
from .log import End, LogError, read, sync_directory
from .storage import Storage

FORMAT = 4
"""The highest that is read; what an older release reads right is written as 1."""

LOGGED = 3
"""The format of a snapshot to which a log may belong, which an older release would not read."""

SEVERAL = 4
"""The format of the codebooks of several layers."""

CONFIG = "grace_config.json"
TENSORS = "codebook.safetensors"
EDITS = "edits.jsonl"
_NEW = ".new"
_PIECE = 1 << 22  # bytes read at a time
_LOG = "edits-{}.log"
_LAYER = "layer-{}."
_READINGS = 1000  # of files that somebody renames each time
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
_DTYPES["float64"] = torch.float64


class StoreError(ValueError):
    """A saved codebook is missing, damaged, too new, or not one that belongs here."""


class SeveralLayersError(StoreError):
    """The saved codebooks of several layers, where that of one is taken."""


@dataclass(frozen=True)
class Kept:
    """A codebook as it is saved: with the caller's `config` for it, and further files by name."""

    codebook: Codebook
    config: dict[str, Any]
    beside: dict[str, bytes] = field(default_factory=dict)


def save(
    codebook: Codebook,
    directory: str | Path,
    config: dict[str, Any],
    beside: dict[str, bytes] | None = None,
    further: Sequence[Kept] = (),
) -> None:
    """Write a codebook with its whole history, and the caller's `config`, to a directory.

    An earlier save there is replaced. If that is interrupted, `load` finds the old state or the new
    one. Another save to the same directory, in whatever process, is waited for; see `writing`.
    Steps of undo are not saved.

    Args:
        codebook: outside a transaction; one that another thread has opened is waited for.
        directory: made if it is not there.
        config: what JSON can hold; `load` returns it.
        beside: further files by name, saved with the same care; `load_all` returns them.
        further: the codebooks of further layers, whose changes wait for those of this one; they are
            saved in the same step.

    Raises:
        TypeError, ValueError: `config` is not JSON. Nothing is written.
        TimeoutError: another process has been writing there for too long.
        OSError: as the file system says.
    """
    with codebook.changing() as storage:  # before anybody's lock is waited for
        if storage.journal.is_open:
            raise ValueError("cannot save inside a transaction: end it first")
        if storage.watcher is not None and storage.watcher.keeps(Path(directory)):
            storage.watcher.settled(storage, anew=True)
            return
    with writing(directory), codebook.changing() as storage:
        write(storage, Path(directory), config, beside, further=further)


def write(
    storage: Storage,
    directory: Path,
    config: dict[str, Any],
    beside: dict[str, bytes] | None = None,
    follows: str | None = None,
    taken: int | None = None,
    logged: bool = False,
    further: Sequence[Kept] = (),
) -> str:
    """Do what `save` does, for who holds the lock of the directory and changes the codebook alone.

    Logs of other snapshots are removed.

    Args:
        follows: what the log before ended with, if this snapshot holds just that.
        taken: the highest version that may be seen before the log says more; None: as it was.
        logged: a log may be written beside it.
        further: see `save`.

    Returns:
        The checksum of the configuration, to which a log belongs.
    """
    _render({"each": [config, *(kept.config for kept in further)]})  # raises before it writes
    taken = storage.taken if taken is None else taken
    complete(directory)
    each = [("", storage, config, beside or {})]
    for n, kept in enumerate(further, 2):
        each.append((_LAYER.format(n), kept.codebook.storage, kept.config, kept.beside))
    made = [prefix + TENSORS for prefix, *_ in each]
    names = [*made, *(prefix + name for prefix, *_, its in each for name in (EDITS, *its)), CONFIG]
    files: dict[str, bytes] = {}
    layers: list[dict[str, Any]] = []
    try:
        with storage.changing:
            for prefix, one, its_config, its in each:
                # Straight from the codebook's memory: its tensors may be most of what there is.
                tensors, records = snapshot.content_of(one)
                settings, number = snapshot.settings_of(one), snapshot.format_of(one)
                _write_tensors(tensors, directory / (prefix + TENSORS + _NEW))
                del tensors
                files[prefix + EDITS] = records.encode()
                files |= {prefix + name: content for name, content in its.items()}
                layers.append({"codebook": settings, "config": its_config})
        checksums = {name: _sha256_of(directory / (name + _NEW)) for name in made}
        checksums |= {name: _sha256(content) for name, content in files.items()}
        number = LOGGED if logged else SEVERAL if further else number
        described: dict[str, Any] = {
            "format": number,
            **layers[0],
            **({"layers": layers[1:]} if further else {}),
            "files": checksums,
            **({} if follows is None else {"follows": follows}),
            **({} if taken <= storage.version else {"taken": taken}),
        }
        described["checksum"] = _checksum(described)
        files[CONFIG] = _render(described)
        for name, content in files.items():
            with open(directory / (name + _NEW), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # safetensors makes its file for the owner alone; who may read the others reads it too.
        for name in made:
            path = directory / (name + _NEW)
            os.chmod(path, (directory / (CONFIG + _NEW)).stat().st_mode & 0o777)
        sync_directory(directory)
    except OSError:  # the disk may be full: what is not complete takes no room
        for name in reversed(names):
            with contextlib.suppress(OSError):
                (directory / (name + _NEW)).unlink(missing_ok=True)
        raise
    _rename(directory, described)
    drop_other_logs(directory, described["checksum"])
    _drop_other_layers(directory, names)
    return str(described["checksum"])


def log_of(directory: Path, checksum: str) -> Path:
    """Return where the changes since a snapshot of this checksum are."""
    return directory / _LOG.format(checksum[:16])


def is_being_saved(directory: Path) -> bool:
    """Say whether files may not agree now: a save renames them, or was interrupted."""
    return (directory / (CONFIG + _NEW)).exists()


def drop_other_logs(directory: Path, checksum: str) -> None:
    """Remove the logs of snapshots that were replaced."""
    own, gone = log_of(directory, checksum), False
    for path in directory.glob(_LOG.format("*")):
        if path != own:
            path.unlink(missing_ok=True)
            gone = True
    if gone:
        sync_directory(directory)


def _drop_other_layers(directory: Path, names: Sequence[str]) -> None:
    """Remove the files of further layers that a snapshot before had."""
    for path in directory.glob(_LAYER.format("*") + "*"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # which has no number, and says what the file system said
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def load(
    directory: str | Path, device: torch.device | str = "cpu", *, mapped: bool = False
) -> tuple[Codebook, dict[str, Any]]:
    """Read what `save` wrote: the codebook, equal to the bit, and the caller's `config`.

    Args:
        directory, device, mapped: as for `load_all`.

    Raises:
        StoreError: as `load_all`.
    """
    return load_all(directory, device, mapped=mapped)[:2]


def load_all(
    directory: str | Path, device: torch.device | str = "cpu", *, mapped: bool = False
) -> tuple[Codebook, dict[str, Any], dict[str, bytes]]:
    """Read what `save` wrote: codebook, `config`, and the files that were saved beside.

    Args:
        directory: what `save` wrote.
        device: where the codebook is to be.
        mapped: on a CPU, let the keys and values of a full codebook stay in the file, mapped into
            memory: it takes no copy, and what is changed stays out of the file. Saving to the
            directory again is safe; nobody may write *into* the file meanwhile, as `cp` over it
            does.

    Raises:
        StoreError: naming the file: it is missing, truncated, altered, of a newer format, or does
            not agree with the others.
    """
    saved = load_saved(directory, mapped=mapped)
    book = saved.codebook.to(device)
    book.storage.slots.maintain_sketch()
    return book, saved.config, saved.beside


@dataclass
class Saved:
    """What a directory holds: the snapshot with what its log says was done since.

    Attributes:
        codebook, config, beside: as `load_all` returns them.
        checksum: of the configuration.
        format: of the snapshot.
        end: of the log that was read; `changes` are in it.
        snapshot_bytes: the size of the files but the log.
        further: the codebooks of further layers.
    """

    codebook: Codebook
    config: dict[str, Any]
    beside: dict[str, bytes]
    checksum: str
    format: int
    end: End
    changes: int
    snapshot_bytes: int
    further: list[Kept] = field(default_factory=list)


def load_saved(
    directory: str | Path, *, writer: bool = False, mapped: bool = False, several: bool = False
) -> Saved:
    """Read what `save` wrote and what a log says was done since; see `load_all`.

    Args:
        writer: this process holds the lock, and no other one can be writing.
        mapped: see `load_all`.
        several: the caller takes the codebooks of several layers too.
    """
    directory = Path(directory)
    described, files, records, end = _read(directory, writer)
    others = described.get("layers", [])
    if others and not several:
        raise several_layers(directory, described)
    book = _filled(directory, described, files, "", mapped)
    further = []
    for n, other in enumerate(others, 2):
        prefix = _LAYER.format(n)
        one = _filled(directory, other, files, prefix, mapped)
        its = _beside(files, prefix)
        further.append(Kept(one, other["config"], its))
    book.storage.taken = described.get("taken", 0)
    changes = 0
    for record in records:
        try:
            changes += redo.apply(book.storage, record)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            path = log_of(directory, described["checksum"])
            raise StoreError(f"{path}: bad record ({error!r})") from error
    book.storage.journal.forget("the codebook was loaded")
    beside, size = _beside(files, ""), sum(map(_size, files.values()))
    checksum, number = described["checksum"], described["format"]
    return Saved(book, described["config"], beside, checksum, number, end, changes, size, further)


def several_layers(directory: Path, described: dict[str, Any]) -> SeveralLayersError:
    """Return the error of who takes the codebook of one layer alone; see `describe`."""
    return SeveralLayersError(
        f"{directory}: must hold the edits of one layer here, got those of "
        f"{1 + len(described['layers'])}; GraceEditor.from_pretrained and grace_edit.load attach "
        "them all to a model"
    )


def _filled(
    directory: Path, described: dict[str, Any], files: dict[str, Any], prefix: str, mapped: bool
) -> Codebook:
    """Return a codebook from the files that begin with `prefix`."""
    tensors = files[prefix + TENSORS]
    try:
        settings = described["codebook"]
        adopt = mapped and settings["rows"] == settings["capacity"] > 0
        book = _empty(settings, 1 if adopt else settings["capacity"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory / CONFIG}: bad settings ({error!r})") from error
    try:
        snapshot.fill_tensors(book.storage, tensors, settings, adopt=adopt)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory / (prefix + TENSORS)}: bad tensors ({error!r})") from error
    try:
        snapshot.fill_records(book.storage, files[prefix + EDITS].decode(), tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(f"{directory / (prefix + EDITS)}: bad record ({error!r})") from error
    return book


def _beside(files: dict[str, Any], prefix: str) -> dict[str, bytes]:
    """Return the files that were saved beside the codebook of a layer, by the caller's names."""
    own = {name: found for name, found in files.items() if name.startswith(prefix)}
    if not prefix:
        own = {name: found for name, found in own.items() if not name.startswith(_LAYER[:-3])}
    named = {name.removeprefix(prefix): found for name, found in own.items()}
    return {name: found for name, found in named.items() if name not in (TENSORS, EDITS)}


def _size(found: Any) -> int:
    return len(found) if isinstance(found, bytes) else sum(x.nbytes for x in found.values())


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
        return _read(directory, False)[0]


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


def _render(described: dict[str, Any]) -> bytes:
    return (json.dumps(described, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _checksum(described: dict[str, Any]) -> str:
    return _sha256(_render({k: v for k, v in described.items() if k != "checksum"}))


def _rename(directory: Path, described: dict[str, Any]) -> None:
    for name in (*described["files"], CONFIG):
        if (directory / (name + _NEW)).exists():
            os.replace(directory / (name + _NEW), directory / name)
    sync_directory(directory)


def complete(directory: Path) -> None:
    """Finish a save that was interrupted between its renames, for who holds the lock.

    To be done before anything else is written, or before a log is added to.
    """
    if not (directory / (CONFIG + _NEW)).exists():
        return
    try:
        _read_files(directory, _read_config(directory / CONFIG))
    except StoreError:
        try:
            described = _read_config(directory / (CONFIG + _NEW))
            _read_files(directory, described)
        except StoreError:
            return
        _rename(directory, described)


_Content = tuple[dict[str, Any], dict[str, Any], list[bytes], End]


def _read(directory: Path, writer: bool) -> _Content:
    """Return the configuration, the contents it vouches for, and the log behind them."""
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
            described = _read_config(directory / (CONFIG + _NEW))
            files = _read_files(directory, described)
        except StoreError:
            raise error from None
    start = End.of_empty(described["checksum"])
    found = read_log(directory, described["checksum"], start, writer=writer)
    if found is not None:
        return described, files, *found
    # No log, or one that was removed since because another snapshot is there.
    for path in (directory / CONFIG, directory / (CONFIG + _NEW)):
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
    if described.get("checksum") != _checksum(described) or content != _render(described):
        raise StoreError(f"{path}: checksum differs, the file was altered")
    return described


def _read_files(directory: Path, described: dict[str, Any]) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    named = described.get("files", {})
    for name in dict.fromkeys((TENSORS, EDITS, *named)):
        if Path(name).name != name:
            raise StoreError(f"{directory / CONFIG}: files must lie beside it, got {name!r}")
        read = _map_tensors if name.endswith(TENSORS) else _read_checked
        for candidate in (directory / name, directory / (name + _NEW)):
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
    return content if _sha256(content) == wanted else None


def _map_tensors(path: Path, wanted: str | None) -> dict[str, Tensor] | None:
    """Return the tensors of a file as they lie there, None where it has another checksum.

    Their memory is the file's, read when it is looked at; what is written to them stays outside.
    """
    try:
        before = _place(path.stat())
        if _sha256_of(path) != wanted:
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


def _empty(settings: dict[str, Any], capacity: int) -> Codebook:
    maximum, autocast = settings["max_radius"], settings.get("autocast")
    book = Codebook(
        settings["key_dim"],
        settings["value_dim"],
        radius=settings["radius"],
        policy=settings["policy"],
        capacity=capacity,
        dtype=_DTYPES[settings["dtype"]],
        value_dtype=_DTYPES[settings["value_dtype"]],
        drift=settings["drift"],
        max_radius=math.inf if maximum is None else maximum,
        autocast=None if autocast is None else _DTYPES[autocast],
    )
    if not 0 <= settings["rows"] <= settings["capacity"]:
        raise ValueError(f"rows must lie in [0, {settings['capacity']}], got {settings['rows']}")
    storage = book.storage
    storage.version = settings["version"]
    storage.next_id, storage.next_value_id = settings["next_id"], settings["next_stamp"]
    storage.journal.forget("the codebook was loaded")
    return book
