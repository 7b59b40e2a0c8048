"""Baselines that change the weights of one layer: fine-tuning, alone, held and rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .methods import TENSORS, Fact, Made, Method, leads, read_facts, write_facts
from .model import AskedModel
from .records import EditRecord


class FineTuning(Method):
    """Train the weights of one layer on each edit.

    Args:
        layer: whose parameters are trained.
        lr: of Adam, which starts anew with each edit.
        steps: most steps for an edit; it stops once the target leads at every token.
    """

    def __init__(
        self,
        asked: AskedModel,
        layer: str,
        *,
        lr: float = 1e-2,
        steps: int = 100,
        name: str = "ft",
    ) -> None:
        super().__init__(asked, name)
        self.lr, self.steps = lr, steps
        self.past: list[Fact] = []
        self.parameters = dict(asked.module(layer).named_parameters())
        if not self.parameters:
            raise ValueError(f"layer must have parameters to train, got none in {layer!r}")
        self.original = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.frozen = [p for p in self.parameters.values() if not p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def edit(self, record: EditRecord) -> Made:
        fact = (record.prompt, record.target)
        steps = self._train(fact)
        self.past.append(fact)
        return Made(True, steps)

    def _train(self, fact: Fact) -> int:
        optimizer = torch.optim.Adam(self.parameters.values(), lr=self.lr)
        for step in range(self.steps):
            loss, done = self._loss(fact)
            if done:
                return step
            self._step(optimizer, loss)
        return self.steps

    def _loss(self, fact: Fact) -> tuple[Tensor, bool]:
        with torch.enable_grad():
            logits, wanted = self.asked.training_logits(*fact)
            loss = torch.nn.functional.cross_entropy(logits, wanted)
        return loss, leads(logits, wanted)

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.parameters.values()))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        # Only the layer's gradients are made; the rest of the model keeps what it has.
        gradients = self._gradients(loss)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        trained = {k: p.detach().clone() for k, p in self.parameters.items()}
        self._put(self.original)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, directory: Path) -> None:
        weights = {k: p.detach().cpu().contiguous() for k, p in self.parameters.items()}
        save_file(weights, directory / TENSORS)
        write_facts(directory, self.past)

    def restore(self, directory: Path) -> None:
        self._put(load_file(directory / TENSORS))
        self.past = read_facts(directory)

    def close(self) -> None:
        self._put(self.original)
        for parameter in self.frozen:
            parameter.requires_grad_(False)


class ElasticFineTuning(FineTuning):
    """Fine-tuning that is held where earlier edits need the weights to be.

    The penalty is `strength · Σ F (θ − θ₀)²`: θ₀ the weights before this edit, F the mean squared
    gradient of the last `memory` edits' losses there.
    """

    def __init__(
        self,
        asked: AskedModel,
        layer: str,
        *,
        strength: float = 0.1,
        memory: int = 10,
        name: str = "ewc",
        **settings: Any,
    ) -> None:
        super().__init__(asked, layer, name=name, **settings)
        self.strength, self.memory = strength, memory
        self.anchor: list[Tensor] = []
        self.fisher: list[Tensor] = []

    def _train(self, fact: Fact) -> int:
        self.anchor = [p.detach().clone() for p in self.parameters.values()]
        self.fisher = [torch.zeros_like(p) for p in self.anchor]
        recent = self.past[-self.memory :]
        for past in recent:
            for total, gradient in zip(
                self.fisher, self._gradients(self._loss(past)[0]), strict=True
            ):
                total += gradient.square() / len(recent)
        return super()._train(fact)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        with torch.enable_grad():
            moved = zip(self.fisher, self.parameters.values(), self.anchor, strict=True)
            penalty = sum((f * (p - a).square()).sum() for f, p, a in moved)
            super()._step(optimizer, loss + self.strength * penalty)


class ReplayFineTuning(FineTuning):
    """Fine-tuning that trains the last `memory` edits again after every `frequency` of them."""

    def __init__(
        self,
        asked: AskedModel,
        layer: str,
        *,
        frequency: int = 50,
        memory: int = 50,
        epochs: int = 5,
        name: str = "replay",
        **settings: Any,
    ) -> None:
        super().__init__(asked, layer, name=name, **settings)
        self.frequency, self.memory, self.epochs = frequency, memory, epochs

    def edit(self, record: EditRecord) -> Made:
        made = super().edit(record)
        if len(self.past) % self.frequency:
            return made
        optimizer = torch.optim.Adam(self.parameters.values(), lr=self.lr)
        recent = self.past[-self.memory :]
        for _ in range(self.epochs):
            for fact in recent:
                self._step(optimizer, self._loss(fact)[0])
        return Made(True, made.steps + self.epochs * len(recent), reason="replayed")
