"""Saved edits on several devices: each rank reads its own slots from the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from .store import TENSORS, StoreError, describe

if TYPE_CHECKING:
    from grace_kernels.distributed import ShardedCodebook


def load_sharded(directory: str | Path, **options: Any) -> ShardedCodebook:
    """Read the entries of saved edits, to be looked up by several ranks together.

    Collective. Each rank reads the keys, values and radii of its own slots, a block at a time, and
    none reads or holds all of them. For that reason the checksum of the tensors, which takes all of
    their bytes, is not compared; `store.load` does. History and stored queries are not read: what
    comes back serves, and is changed by `write_`, not by edits.

    Args:
        directory: what `store.save` or `GraceEditor.save_pretrained` wrote.
        options: `capacity, group, device, block, sketch`, as `ShardedCodebook.from_rows` takes
            them. The capacity is that of the saved codebook unless given.

    Raises:
        StoreError: a file is missing, or the tensors are not what the description says.
        TypeError, ValueError: as `ShardedCodebook`; there are no entries.
    """
    from grace_kernels.distributed import ShardedCodebook  # here: few need it

    settings = describe(directory)["codebook"]
    path = Path(directory) / TENSORS
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own kinds
        raise StoreError(f"{path}: not a safetensors file ({error})") from error
    with file:
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
