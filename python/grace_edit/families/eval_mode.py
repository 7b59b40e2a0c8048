"""Eval mode for the time in which a model is being edited."""

from __future__ import annotations

import threading

from torch import nn


class EvalMode:
    """A context in which a model is in eval mode; afterwards each module is in its own again.

    Where several threads are inside at a time, the last one that leaves puts it back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside = 0
        self._training: list[nn.Module] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
        try:
            with self._lock:
                for module in self._model.modules():
                    if module.training:
                        self._training.append(module)
                        module.training = False
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for module in self._training:
                    module.training = True
                self._training = []
