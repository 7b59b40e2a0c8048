"""Entries of a codebook in one safetensors file: what other programs write and read.

    keys     [N, D]
    values   [N, V]
    radii    [N] float32
    labels   int64: all labels one after the other, of the `lengths` [N] int64; or, without lengths,
             [N] or [N, L], labels of one length

The file has no history: prompts, members and superseded edits stay behind. One that `write` made
holds, in its metadata and under `beside/`, what a directory of saved edits says beside its codebook
(the model, the settings, a text map), so that `read` gives back all that serving needs.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as render_tensors
from torch import Tensor

from .codebook import Codebook
from .files import NEW, StoreError
from .locking import naming
from .records import Label

_ABOUT = "grace"  # the key of the metadata
_BESIDE = "beside/"


def write(
    codebook: Codebook, path: Path, described: dict[str, Any], beside: dict[str, bytes]
) -> int:
    """Write the live entries of a codebook to a file, in the order of their slots.

    Args:
        codebook: with whatever policy.
        path: of the file; replaced as a whole.
        described, beside: as `store.load_all` returned them.

    Returns:
        How many entries there are.
    """
    with codebook.lock:
        labels = codebook.labels
        live = [slot for slot, label in enumerate(labels) if label is not None]
        at = torch.tensor(live, dtype=torch.int64, device=codebook.device)
        tensors = {
            "keys": codebook.keys[at],
            "values": codebook.values[at],
            "radii": codebook.radii[at],
        }
    own = [labels[slot] or () for slot in live]
    tensors["labels"] = torch.tensor([id for label in own for id in label], dtype=torch.int64)
    tensors["lengths"] = torch.tensor([len(label) for label in own], dtype=torch.int64)
    for name, content in beside.items():
        tensors[_BESIDE + name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    maximum = codebook.max_radius
    settings = {
        "policy": codebook.policy,
        "radius": codebook.radius,
        "drift": codebook.drift,
        "max_radius": maximum if math.isfinite(maximum) else None,
    }
    about = json.dumps({"settings": settings, "described": described}, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, render_tensors(plain, metadata={_ABOUT: about}))
    return len(live)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole, or leave what was there and nothing else.

    Raises:
        OSError: as the file system says, with the name of the file.
    """
    new = path.with_name(path.name + NEW)
    try:
        with naming(path):
            new.write_bytes(content)
            os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def read(
    path: Path, like: tuple[Codebook, dict[str, Any], dict[str, bytes]] | None = None
) -> tuple[Codebook, dict[str, Any], dict[str, bytes]]:
    """Make a codebook of a file of entries; see `Codebook.from_tensors`.

    Args:
        path: of the file.
        like: what `store.load_all` gives of other edits of the same model, layer and query, whose
            settings and description are taken; None: those in the file.

    Returns:
        Codebook, description and files beside, as `store.save` takes them.

    Raises:
        StoreError: not such a file, or the file does not say of which model it is.
        ValueError: a tensor is not as said.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own kinds
        raise StoreError(f"{path}: not a safetensors file ({error})") from error
    settings: dict[str, Any]
    if like is not None:
        book, described, beside = like
        names = ("policy", "radius", "drift", "max_radius")
        settings = {name: getattr(book, name) for name in names}
    else:
        try:
            about = json.loads(metadata[_ABOUT])
            settings, described = dict(about["settings"]), about["described"]
            settings["max_radius"] = settings["max_radius"] or math.inf
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path}: does not say of which model it is; name edits of the same model, layer "
                "and query whose description is to be taken"
            ) from error
        beside = {
            name.removeprefix(_BESIDE): tensor.numpy().tobytes()
            for name, tensor in tensors.items()
            if name.startswith(_BESIDE)
        }
    missing = [name for name in ("keys", "values", "radii", "labels") if name not in tensors]
    if missing:
        raise StoreError(f"{path}: must hold keys, values, radii and labels, got no {missing[0]}")
    keys, values, radii = (tensors[name] for name in ("keys", "values", "radii"))
    if like is not None:
        _check_like(like[0], keys, values)
    labels = _labels(tensors["labels"], tensors.get("lengths"))
    made = Codebook.from_tensors(keys, values, radii, labels, **settings)
    return made, described, beside


def _check_like(book: Codebook, keys: Tensor, values: Tensor) -> None:
    for name, got, wanted in (("keys", keys, book.keys), ("values", values, book.values)):
        if got.dtype != wanted.dtype or got.ndim != 2 or got.shape[1] != wanted.shape[1]:
            raise ValueError(
                f"{name} must be [N, {wanted.shape[1]}] {wanted.dtype}, as of the edits that they "
                f"are to be like, got {list(got.shape)} {got.dtype}"
            )


def _labels(labels: Tensor, lengths: Tensor | None) -> list[Label]:
    if labels.dtype not in (torch.int64, torch.int32) or labels.ndim > 2:
        raise ValueError(
            f"labels must be int64 [N] or [N, L], got {labels.dtype} {list(labels.shape)}"
        )
    if lengths is None:
        rows = labels[:, None] if labels.ndim == 1 else labels
        return [tuple(row) for row in rows.tolist()]
    counts = lengths.tolist()
    if labels.ndim != 1 or sum(counts) != len(labels) or min(counts, default=0) < 0:
        raise ValueError(f"labels must be as long as lengths say, {sum(counts)}, got {len(labels)}")
    flat, made, start = labels.tolist(), [], 0
    for count in counts:
        made.append(tuple(flat[start : start + count]))
        start += count
    return made
