"""Saved edits on several devices: each rank reads its own slots from the files."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from . import redo
from .files import (
    TENSORS,
    StoreError,
    describe,
    is_being_saved,
    log_of,
    read_log,
    several_layers,
)
from .log import End

if TYPE_CHECKING:
    from grace_kernels.distributed import ShardedCodebook


def load_sharded(directory: str | Path, **options: Any) -> ShardedCodebook:
    """Read the entries of saved edits, to be looked up by several ranks together.

    Collective. Each rank reads the keys, values and radii of its own slots, a block at a time, and
    none reads or holds all of them. For that reason the checksum of the tensors, which takes all of
    their bytes, is not compared; `store.load` does. History and stored queries are not read: what
    comes back serves, and is changed by `write_`, not by edits.

    Args:
        directory: what `store.save` or `GraceEditor.save_pretrained` wrote. Where it is published,
            the changes since the last snapshot lie in a log, which is not read by rank: it must
            hold none, as after `Publisher.fold()`.
        options: `capacity, group, device, block, sketch`, as `ShardedCodebook.from_rows` takes
            them. The capacity is that of the saved codebook unless given.

    What the ranks have opened is compared before a row is read: unless all have the same save, all
    of them raise, and none waits. So no two ranks serve different versions.

    Raises:
        StoreError: the ranks found different saves; a file is missing, the tensors are not what the
            description says, there are changes in a log, several layers were saved, or somebody is
            saving.
        TypeError, ValueError: as `ShardedCodebook`; there are no entries.
    """
    from grace_kernels.distributed import ShardedCodebook, process_group  # here: few need them

    group = process_group(options.get("group"))
    with contextlib.ExitStack() as files:
        opened, refused = None, None
        try:
            opened = _open(Path(directory), files)
        except StoreError as error:
            refused = error
        _agree(group, Path(directory), opened, refused)
        assert opened is not None
        settings, parts = opened.settings, opened.parts

        def rows(first: int, last: int) -> tuple[Tensor, ...]:
            return tuple(part[first:last] for part in parts)

        options.setdefault("capacity", settings["capacity"])
        return ShardedCodebook.from_rows(rows, settings["rows"], **options)


@dataclass
class _Opened:
    """A snapshot of which rows can be read: what is open stays as it is."""

    checksum: str
    settings: dict[str, Any]
    parts: list[Any]


def _open(directory: Path, files: contextlib.ExitStack) -> _Opened:
    described = describe(directory)
    if "layers" in described:
        raise several_layers(directory, described)
    settings = described["codebook"]
    path = directory / TENSORS
    try:
        file = files.enter_context(safe_open(path, framework="pt"))
    except Exception as error:  # safetensors raises its own kinds
        raise StoreError(f"{path}: not a safetensors file ({error})") from error
    # What is open stays as it is; that it belongs to the description is to be seen now.
    _check_alone(directory, described["checksum"])
    parts = {name: file.get_slice(name) for name in ("keys", "values", "radii")}
    wanted = {
        "keys": [settings["rows"], settings["key_dim"]],
        "values": [settings["rows"], settings["value_dim"]],
        "radii": [settings["rows"]],
    }
    for name, part in parts.items():
        if list(part.get_shape()) != wanted[name]:
            raise StoreError(
                f"{path}: {name} must have shape {wanted[name]}, got {part.get_shape()}"
            )
    return _Opened(described["checksum"], settings, [*parts.values()])


def _agree(
    group: dist.ProcessGroup, directory: Path, opened: _Opened | None, refused: StoreError | None
) -> None:
    """Raise on every rank unless each has opened the same save; none is left waiting."""
    own = (None, str(refused)) if opened is None else (opened.checksum, opened.settings["version"])
    each: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(each, own, group)
    if refused is not None:
        raise refused
    for rank, (checksum, told) in enumerate(each):
        if checksum is None:
            raise StoreError(f"{directory}: must be read by every rank, got on rank {rank}: {told}")
    if len({checksum for checksum, _ in each}) > 1:
        saves = ", ".join(
            f"rank {rank} version {version} ({checksum[:8]})"
            for rank, (checksum, version) in enumerate(each)
        )
        raise StoreError(
            f"{directory}: must be the same save on every rank, got {saves}; let nobody save while "
            "the ranks load, and load again"
        )


def _check_alone(directory: Path, checksum: str) -> None:
    if is_being_saved(directory) or describe(directory)["checksum"] != checksum:
        raise StoreError(f"{directory}: was saved while it was read, or a save was interrupted")
    found = read_log(directory, checksum, End.of_empty(checksum))
    changes = sum(map(redo.changes_something, found[0])) if found is not None else 0
    if changes:
        raise StoreError(
            f"{log_of(directory, checksum)}: must hold no changes to be read by rank, got "
            f"{changes} since the snapshot; let its writer make one: Publisher.fold()"
        )
