"""Values that are trained in the same forwards, as rows of one tensor.

Each has its own log odds, steps and end: a row depends on no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .adam import Adam
from .fitting import Settings, Training

_QUICK, _USUAL = (0.5, 0.99), (0.9, 0.999)
"""Betas of Adam. The usual ones look back over more steps than most values take."""


class Values:
    """Values `[N, V]` that are trained in the same forwards."""

    def __init__(
        self, trainings: Sequence[Training], dtype: torch.dtype, settings: Settings, adam: Adam
    ) -> None:
        self.trainings, self.settings = list(trainings), settings
        self._dtype, self._adam = dtype, adam
        # The same memory, which the optimizer writes.
        self.values = adam.values.detach().requires_grad_(True)
        # The first row of each value in a forward, and behind them how many rows there are.
        self.starts = [0, *itertools.accumulate(len(own.task.asked) for own in self.trainings)]
        sizes = [own.tokens for own in self.trainings]
        # Where in `[N, most tokens of one value]` each token of the forwards stands.
        self._most = max(sizes)
        places = [n * self._most + at for n, size in enumerate(sizes) for at in range(size)]
        self._places, self._sizes = torch.tensor(places), torch.tensor(sizes)

    @staticmethod
    def begin(trainings: Sequence[Training], dtype: torch.dtype, settings: Settings) -> Values:
        """Start all values where their tasks say."""
        values = torch.stack([own.task.start.detach().float() for own in trainings])
        betas = _QUICK if settings.early_stop else _USUAL
        return Values(
            trainings, dtype, settings, Adam(values, [own.task.lr for own in trainings], betas)
        )

    def only(self, rows: Sequence[int]) -> Values:
        """Return some of the values, which go on."""
        trainings = [self.trainings[n] for n in rows]
        return Values(trainings, self._dtype, self.settings, self._adam.only(rows))

    def rows_of(self, values: Sequence[int]) -> list[int]:
        """Return which rows of a forward belong to some of the values."""
        return [row for n in values for row in range(self.starts[n], self.starts[n + 1])]

    def stored(self) -> Tensor:
        """Return the values as they will be stored."""
        return self.values.to(self._dtype)

    def answers(self, stored: Tensor) -> Tensor:
        """Return which value `[rows, V]` answers each row of a forward."""
        counts = [len(own.task.asked) for own in self.trainings]
        if len(set(counts)) == 1:
            return stored[:, None].expand(-1, counts[0], -1).flatten(0, 1)
        # Sums of gradients have an order, which those of repeated indices have not on every device.
        each = zip(stored.split(1), counts, strict=True)
        return torch.cat([value.expand(count, -1) for value, count in each])

    def look(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return log odds `[N, T]` of the wanted tokens, inf behind them, and mean cross entropies.

        Args:
            logits: `[n, classes]`, at the tokens wanted `[n]`, of all values in order.
        """
        # They may come from another device than the layer's.
        self._places, self._sizes = self._places.to(logits.device), self._sizes.to(logits.device)
        odds = log_odds(logits, wanted)
        entropy = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        sums = self._spread(entropy, 0.0).sum(dim=1)
        return self._spread(odds, float("inf")), sums / self._sizes

    def _spread(self, of_tokens: Tensor, rest: float) -> Tensor:
        spread = of_tokens.new_full((len(self.trainings) * self._most,), rest)
        return spread.scatter(0, self._places, of_tokens).view(-1, self._most)

    def margins(self, odds: Tensor) -> Tensor:
        """Return the margin `[N, 1]` that each value is to reach, nats, beside its log odds."""
        return odds.new_tensor([own.margin for own in self.trainings])[:, None]

    def step(self, gradients: Tensor, moving: Sequence[int]) -> None:
        """Take a step of Adam; far from the target after a third of them, start over more slowly.

        Steps as long as the first gradient tells, which soon forget the ones before, may leap over
        what they look for again and again.
        """
        adam, begins = self._adam, [n for n in moving if self.trainings[n].steps == 0]
        slopes = gradients.abs().sum(dim=1).tolist() if begins else []
        for n in begins:
            adam.lr[n] = _first_step(self.trainings[n].task.lr, self.trainings[n].move, slopes[n])
        goes_on = []
        for n in moving:
            task = self.trainings[n].task
            if self.trainings[n].is_hopeless and adam.lr[n] > task.lr:
                adam.restart(n, task.start.float(), task.lr, _USUAL)
            else:
                goes_on.append(n)
            self.trainings[n].steps += 1
        adam.step(gradients, goes_on)


def log_odds(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the log odds `[n]` of the wanted tokens against all others together, nats."""
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    return own - logits.scatter(1, wanted[:, None], float("-inf")).logsumexp(dim=1)


def _first_step(lr: float, move: float, slope: float) -> float:
    """Return the step with which Adam first moves the log odds by `move`, and at least `lr`.

    Its first step changes each number of the value by the step's length against its gradient. That
    of a log odds counts the less the farther it is beyond the margin; `move` is given as so much.

    Args:
        slope: sum of the gradient's absolute values.
    """
    return max(lr, move / slope) if slope > 0 else lr
