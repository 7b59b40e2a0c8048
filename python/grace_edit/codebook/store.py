"""Codebooks on disk: written so that a crash never leaves a wrong state that loads.

What lies where, and how it is read as a whole, is in `files`. Each file is first written under its
name + ".new" and fsynced; then they are renamed, the configuration last.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import redo, snapshot
from .codebook import Codebook
from .files import (
    CONFIG,
    EDITS,
    LAYER,
    LOGGED,
    NEW,
    SEVERAL,
    TENSORS,
    StoreError,
    checksum_of,
    complete,
    drop_other_logs,
    log_of,
    read_saved,
    rename,
    render,
    several_layers,
    sha256,
    sha256_of,
)
from .locking import naming, writing
from .log import End, sync_directory
from .storage import Storage

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
_DTYPES["float64"] = torch.float64


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
    render({"each": [config, *(kept.config for kept in further)]})  # raises before it writes
    taken = storage.taken if taken is None else taken
    complete(directory)
    each = [("", storage, config, beside or {})]
    for n, kept in enumerate(further, 2):
        each.append((LAYER.format(n), kept.codebook.storage, kept.config, kept.beside))
    made = [prefix + TENSORS for prefix, *_ in each]
    names = [*made, *(prefix + name for prefix, *_, its in each for name in (EDITS, *its)), CONFIG]
    files: dict[str, bytes] = {}
    layers: list[dict[str, Any]] = []
    try:
        with naming(directory), storage.changing:
            for prefix, one, its_config, its in each:
                # Straight from the codebook's memory: its tensors may be most of what there is.
                tensors, records = snapshot.content_of(one)
                settings, number = snapshot.settings_of(one), snapshot.format_of(one)
                _write_tensors(tensors, directory / (prefix + TENSORS + NEW))
                del tensors
                files[prefix + EDITS] = records.encode()
                files |= {prefix + name: content for name, content in its.items()}
                layers.append({"codebook": settings, "config": its_config})
        checksums = {name: sha256_of(directory / (name + NEW)) for name in made}
        checksums |= {name: sha256(content) for name, content in files.items()}
        number = LOGGED if logged else SEVERAL if further else number
        described: dict[str, Any] = {
            "format": number,
            **layers[0],
            **({"layers": layers[1:]} if further else {}),
            "files": checksums,
            **({} if follows is None else {"follows": follows}),
            **({} if taken <= storage.version else {"taken": taken}),
        }
        described["checksum"] = checksum_of(described)
        files[CONFIG] = render(described)
        for name, content in files.items():
            with open(directory / (name + NEW), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # safetensors makes its file for the owner alone; who may read the others reads it too.
        for name in made:
            path = directory / (name + NEW)
            os.chmod(path, (directory / (CONFIG + NEW)).stat().st_mode & 0o777)
        sync_directory(directory)
    except OSError:  # the disk may be full: what is not complete takes no room
        for name in reversed(names):
            with contextlib.suppress(OSError):
                (directory / (name + NEW)).unlink(missing_ok=True)
        raise
    rename(directory, described)
    drop_other_logs(directory, described["checksum"])
    _drop_other_layers(directory, names)
    return str(described["checksum"])


def _drop_other_layers(directory: Path, names: Sequence[str]) -> None:
    """Remove the files of further layers that a snapshot before had."""
    for path in directory.glob(LAYER.format("*") + "*"):
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

    Raises:
        StoreError: as `load_all`; or there are several layers, and `several` is False.
    """
    directory = Path(directory)
    described, files, records, end = read_saved(directory, writer)
    others = described.get("layers", [])
    if others and not several:
        raise several_layers(directory, described)
    book = _filled(directory, described, files, "", mapped)
    further = []
    for n, other in enumerate(others, 2):
        prefix = LAYER.format(n)
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
        own = {name: found for name, found in own.items() if not name.startswith(LAYER[:-3])}
    named = {name.removeprefix(prefix): found for name, found in own.items()}
    return {name: found for name, found in named.items() if name not in (TENSORS, EDITS)}


def _size(found: Any) -> int:
    return len(found) if isinstance(found, bytes) else sum(x.nbytes for x in found.values())


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
