"""The cores of a CPU, shared between requests and the edit that is being made.

Each thread that runs a model has a team of torch's threads of its own. Two full teams on the same
cores wait for each other at the end of every operation, which costs more than half the cores do.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adaptor.torch_private import is_compiled

_RECENT = 5.0
"""Seconds after which no request is thought to be generated any more."""


class Cores:
    """Gives an edit half of the threads while requests are generated, and these the other half.

    Whoever is alone has all of them. How many an edit has does not change while it is made, as the
    last bits of a forward may depend on it. On an accelerator, and for a compiled model, nothing is
    done.

    Args:
        model: runs in the threads of requests, and in that of the edits.
        clock: tells the time, in seconds.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all = torch.get_num_threads()
        self._editor: int | None = None  # the thread that makes an edit
        self._asked = -math.inf  # when a request was last at work
        self._mine = threading.local()
        shared = next(model.parameters()).device.type == "cpu" and not is_compiled(model)
        self._hook = model.register_forward_pre_hook(self._begins) if shared else None

    @property
    def _half(self) -> int:
        return max(1, self._all // 2)

    def _begins(self, *_: Any) -> None:
        if self._editor == threading.get_ident():
            return
        self._asked = self._clock()
        self._take(self._all if self._editor is None else self._half)

    def _take(self, threads: int) -> None:
        if getattr(self._mine, "threads", None) != threads:
            self._mine.threads = threads
            torch.set_num_threads(threads)

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Make an edit inside a `with` block, by one thread at a time."""
        if self._hook is None:
            yield
            return
        alone = self._clock() - self._asked > _RECENT
        self._take(self._all if alone else self._half)
        self._editor = threading.get_ident()
        try:
            yield
        finally:
            self._editor = None

    def close(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
