"""Adam for many values at once, each with a step, betas and a beginning of its own.

The update is that of torch.optim.Adam, which has one step and one age for all rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Betas = tuple[float, float]
_EPS = 1e-8


class Adam:
    """Moves the rows of `values [N, V]` against their gradients, each as if it were alone.

    Args:
        values: float32; changed in place.
        lr: of each row, absolute; `self.lr` may be changed between steps.
        betas: of all rows at first.
    """

    def __init__(self, values: Tensor, lr: Sequence[float], betas: Betas) -> None:
        self.values = values
        self.lr = list(lr)
        self._betas = [betas] * len(lr)
        self._age = [0] * len(lr)
        self._mean = torch.zeros_like(values)
        self._square = torch.zeros_like(values)

    def only(self, rows: Sequence[int]) -> Adam:
        """Return one that goes on with some of the rows, in memory of its own."""
        rows = list(rows)
        made = Adam(self.values[rows], [self.lr[n] for n in rows], (0.0, 0.0))
        made._betas, made._age = [self._betas[n] for n in rows], [self._age[n] for n in rows]
        made._mean, made._square = self._mean[rows], self._square[rows]
        return made

    def restart(self, row: int, value: Tensor, lr: float, betas: Betas) -> None:
        """Set one row to `value [V]` and forget all that moved it; the next step is its first."""
        self.lr[row], self._betas[row], self._age[row] = lr, betas, 0
        self.values[row] = value
        self._mean[row] = self._square[row] = 0.0

    def step(self, gradients: Tensor, rows: Sequence[int]) -> None:
        """Move some of the rows; the others stay as they are, whatever their gradients."""
        moving = set(rows)
        columns = []  # numbers in double precision until they are whole, as torch has them
        for row, ((first, second), lr) in enumerate(zip(self._betas, self.lr, strict=True)):
            if row not in moving:
                columns.append((0.0, 0.0, 0.0, 1.0, 0.0, 1.0))
                continue
            self._age[row] += 1
            age = self._age[row]
            step, root = lr / (1 - first**age), (1 - second**age) ** 0.5
            columns.append((1.0, step, 1 - first, second, 1 - second, root))
        told = torch.tensor(columns, dtype=torch.float32).to(self.values.device)
        moves, step, first, second, rest, root = told.T[..., None]
        gradients = torch.where(moves > 0, gradients, 0.0)
        self._mean.lerp_(gradients, first)
        self._square.mul_(second).add_(rest * gradients * gradients)
        self.values.sub_(step * self._mean / (self._square.sqrt() / root).add_(_EPS))
