"""Argument checks of sharded codebooks, on top of those of `grace_kernels.validation`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """Return a process group that this rank is in; None: the default one.

    Raises:
        TypeError: it is neither group nor mesh.
        ValueError: it does not hold this rank, a mesh has several dimensions, or there is no group.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of 1 dimension, got {group.ndim}")
        group = group.get_group()
    if group is None:
        if not dist.is_initialized():
            raise ValueError("group must be given where torch.distributed has none, got None")
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must hold this rank, got one that does not")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def check_same(group: dist.ProcessGroup, arguments: tuple[Any, ...]) -> None:
    """Raise, on every rank, unless all ranks were given these arguments."""
    given: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(given, arguments, group)
    if any(other != given[0] for other in given):
        raise ValueError(f"arguments must be the same on every rank, got {given}")


def check_rows(name: str, tensor: object, like: Tensor) -> None:
    """Raise unless `tensor` has the dtype and the shape of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, got {tensor.dtype}")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(tensor.shape)}")
