"""Adam over rows: each moves as by torch.optim.Adam alone."""

from __future__ import annotations

import pytest
import torch
from grace_edit.editing.adam import Adam

LR = [1.0, 0.3, 0.01]


class Alone:
    """One row, moved by torch's own."""

    def __init__(self, start: torch.Tensor, lr: float, betas: tuple[float, float]) -> None:
        self.value = start.clone().requires_grad_(True)
        self.adam = torch.optim.Adam([self.value], lr=lr, betas=betas)

    def step(self, gradient: torch.Tensor) -> None:
        self.value.grad = gradient.clone()
        self.adam.step()


def gradients(steps: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(3)
    size = 10.0 ** torch.randint(-4, 4, (steps, 3, 1), generator=source)
    return torch.randn(steps, 3, 40, generator=source) * size


def check(rows: Adam, alone: list[Alone], numbers: range | list[int] = range(3)) -> None:
    for n, row in enumerate(numbers):
        assert torch.allclose(rows.values[n], alone[row].value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999)])
def test_rows_move_as_they_do_alone_whatever_the_others_do(betas):
    start, given = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)), gradients(40)
    rows, alone = Adam(start.clone(), LR, betas), [Alone(start[n], LR[n], betas) for n in range(3)]
    for step, gradient in enumerate(given[:20]):
        moving = [0, 1, 2] if step % 3 else [2]
        rows.step(gradient, moving)
        for n in moving:
            alone[n].step(gradient[n])
    check(rows, alone)
    # One begins anew, with other betas; of the others nothing is forgotten.
    rows.restart(0, start[0], 0.5, (0.9, 0.99))
    alone[0] = Alone(start[0], 0.5, (0.9, 0.99))
    for gradient in given[20:30]:
        rows.step(gradient, [0, 1, 2])
        for n in range(3):
            alone[n].step(gradient[n])
    check(rows, alone)
    before = rows.values.clone()
    fewer = rows.only([2, 0])
    for gradient in given[30:]:
        fewer.step(gradient[[2, 0]], [0, 1])
        for n in (2, 0):
            alone[n].step(gradient[n])
    check(fewer, alone, [2, 0])
    assert torch.equal(rows.values, before)  # memory of its own


def test_a_row_that_does_not_move_keeps_its_bits_whatever_its_gradient():
    start = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    rows = Adam(start.clone(), LR, (0.9, 0.999))
    rows.step(gradients(1)[0], [0, 1, 2])
    before, given = rows.values.clone(), gradients(2)[1]
    given[1] = float("nan")
    rows.step(given, [0, 2])
    assert torch.equal(rows.values[1], before[1])
    assert not torch.equal(rows.values[0], before[0])
    rows.step(gradients(1)[0], [0, 1, 2])
    assert torch.isfinite(rows.values).all()
