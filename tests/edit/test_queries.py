"""What answers stored queries, when a new key comes."""

from __future__ import annotations

import math

import pytest
import torch
from grace_edit.codebook.journal import Journal
from grace_edit.codebook.queries import Queries
from torch import Tensor

from grace_kernels import nearest


def by_looking_at_all(queries: Queries, key: Tensor, slot: int) -> dict[int, tuple[int, float]]:
    """Return the answers that a key changes, by index, after a look at every query."""
    found = {}
    one = torch.full((1,), math.inf)
    distances = nearest(queries.vectors[: queries.count], key[None], one)[1].tolist()
    for index, distance in enumerate(distances):
        held, was = queries.answer(index)
        if distance < was or (distance == was and slot < held):
            found[index] = (slot, distance)
    return found


@pytest.mark.parametrize("smallest", [pytest.param(1.0, id="ones"), pytest.param(1e-23, id="dust")])
def test_a_key_draws_what_a_look_at_every_query_says(smallest: float) -> None:
    # Whole numbers, many of them equal or 0, and dust that no rounded distance tells from 0.
    source = torch.Generator().manual_seed(3)
    journal = Journal()
    journal.begin()
    queries, drawn = Queries(3, torch.float32, journal), 0
    for id in range(40):
        vector = torch.randint(-1, 2, (3,), generator=source) * torch.tensor([1.0, 1.0, smallest])
        if id % 5 == 0:
            vector = vector * 1e-20
        index = queries.add(vector, id)
        if id % 7:
            exact = id % 2 == 0
            queries.set_answer(index, int(20 + id), 0.0 if exact else 2.5)
    for slot in (70, 10, 30):
        for key in torch.randint(-1, 2, (12, 3), generator=source) * 1.0:
            key[2] *= smallest
            if slot == 10:
                key = key * 1e-20
            expected = by_looking_at_all(queries, key, slot)
            before = {index: queries.answer(index) for index in range(queries.count)}
            ids = queries.draw(key, slot)
            assert sorted(ids) == [int(queries.owners[index]) for index in sorted(expected)]
            after = {index: queries.answer(index) for index in range(queries.count)}
            assert after == {**before, **expected}
            drawn += len(ids)
    assert drawn > 20
