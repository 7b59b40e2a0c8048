"""Counters of arrivals that nobody clears: zeroed once, and put back to zero by every launch.

A launch counts the programs that have finished with a block of queries; the last one stores zero
back. Launches that may run at the same time need counters of their own: eager calls have those of
their device, stream and thread, and a call that is captured into a graph gets fresh ones, since the
graph may be replayed beside anything. A stream is told by its handle: one from outside torch must
not be destroyed while a call on it is under way.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_SLAB = 1 << 20  # counters allocated at a time, 4 MiB
_CAPTURES = 1 << 19  # left over, by eager calls, for captures

_lock = threading.Lock()
_slabs: dict[torch.device, tuple[Tensor, int]] = {}  # and how many counters are given out
_kept: list[Tensor] = []  # slabs are never freed: a graph may use their counters
_own: dict[tuple[torch.device, int, int], Tensor] = {}


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the one that kernels are launched on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def take(device: torch.device, blocks: int) -> Tensor:
    """Return int32 counters `[>= blocks]` for a launch on the current stream of `device`.

    Raises:
        RuntimeError: a graph is being captured and no counters are left.
    """
    if device.type != "cuda":
        return _of_thread(device, 0, blocks)
    if torch.cuda.is_current_stream_capturing():
        return _fresh(device, blocks, capturing=True)
    return _of_thread(device, torch.cuda.current_stream(device).cuda_stream, blocks)


def _of_thread(device: torch.device, stream: int, blocks: int) -> Tensor:
    slab = _slabs.get(device)
    if slab is None or slab[1] + _CAPTURES > _SLAB:  # captures, which cannot allocate, need some
        with _lock:
            _reserve(device, _CAPTURES)
    key = (device, stream, threading.get_ident())
    counters = _own.get(key)
    if counters is None or counters.shape[0] < blocks:
        counters = _own[key] = _fresh(device, max(16, blocks), capturing=False)
    return counters


def _fresh(device: torch.device, blocks: int, *, capturing: bool) -> Tensor:
    with _lock:
        if not capturing:
            _reserve(device, blocks + _CAPTURES)
        slab, used = _slabs.get(device, (None, _SLAB))
        if slab is None or used + blocks > _SLAB:
            raise RuntimeError(
                f"device must be warmed up before a lookup is captured into a graph, got {device} "
                "without counters; call grace_kernels.warmup or the operator itself first"
            )
        _slabs[device] = (slab, used + blocks)
        return slab[used : used + blocks]


def _reserve(device: torch.device, blocks: int) -> None:
    """See to it that `blocks` counters are left."""
    _, used = _slabs.get(device, (None, _SLAB))
    if used + blocks <= _SLAB and device in _slabs:
        return
    made: list[Tensor] = []
    errors: list[Exception] = []

    def allocate() -> None:
        try:
            made.append(torch.zeros(_SLAB, dtype=torch.int32, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            errors.append(error)

    # In a thread of its own, since torch may be directing this one's allocations into the memory of
    # a graph that it is warming up, and takes that back.
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    if errors:
        raise RuntimeError(
            f"counters of arrivals on {device} could not be allocated: {errors[0]}"
        ) from errors[0]
    _kept.append(made[0])
    _slabs[device] = (made[0], 0)
