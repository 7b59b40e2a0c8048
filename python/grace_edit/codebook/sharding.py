"""Saved edits on several devices: each rank reads its own slots from the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from . import redo
from .log import End
from .store import (
    TENSORS,
    StoreError,
    describe,
    is_being_saved,
    log_of,
    read_log,
    several_layers,
)

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
            hold none, as after `Publisher.compact()`.
        options: `capacity, group, device, block, sketch`, as `ShardedCodebook.from_rows` takes
            them. The capacity is that of the saved codebook unless given.

    Raises:
        StoreError: a file is missing, the tensors are not what the description says, there are
            changes in a log, several layers were saved, or somebody is saving.
        TypeError, ValueError: as `ShardedCodebook`; there are no entries.
    """
    from grace_kernels.distributed import ShardedCodebook  # here: few need it

    described = describe(directory)
    if "layers" in described:
        raise several_layers(Path(directory), described)
    settings = described["codebook"]
    path = Path(directory) / TENSORS
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own kinds
        raise StoreError(f"{path}: not a safetensors file ({error})") from error
    with file:
        # What is open stays as it is; that it belongs to the description is to be seen now.
        _check_alone(Path(directory), described["checksum"])
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

        def rows(first: int, last: int) -> tuple[Tensor, ...]:
            return tuple(part[first:last] for part in parts.values())

        options.setdefault("capacity", settings["capacity"])
        return ShardedCodebook.from_rows(rows, settings["rows"], **options)


def _check_alone(directory: Path, checksum: str) -> None:
    if is_being_saved(directory) or describe(directory)["checksum"] != checksum:
        raise StoreError(f"{directory}: was saved while it was read, or a save was interrupted")
    found = read_log(directory, checksum, End.of_empty(checksum))
    changes = sum(map(redo.changes_something, found[0])) if found is not None else 0
    if changes:
        raise StoreError(
            f"{log_of(directory, checksum)}: must hold no changes to be read by rank, got "
            f"{changes} since the snapshot; let its writer make one: Publisher.compact()"
        )
