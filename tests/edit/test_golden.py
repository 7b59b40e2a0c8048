"""`policy="paper"` against what the published code decided on the same streams."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from grace_edit.codebook.codebook import Codebook
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("add", "split", "expand", "absorb")
PADDING = -1000000


@pytest.mark.parametrize("name", ["paper_same_length", "paper_mixed_length", "paper_dense"])
def test_the_paper_policy_decides_every_edit_as_the_published_code_did(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        radius = float(file.metadata()["epsilon_init"])
        g = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    book = Codebook(g["queries"].shape[1], 2, radius=radius, policy="paper", capacity=8)

    for m in range(len(g["queries"])):
        label = g["labels"][m][g["labels"][m] != PADDING]
        result = book.insert(g["queries"][m], label, torch.full((2,), float(m)))
        got = (result.id, result.case, result.slot, result.neighbour, book.entries)
        want = (
            m,
            CASES[g["case"][m]],
            int(g["slot"][m]),
            int(g["neighbour"][m]),
            int(g["keys_after"][m]),
        )
        assert got == want, f"edit {m}"
        if m == 0:
            assert result.distance == math.inf
            assert result.radius_before is None
            assert result.radius_after is None
        else:
            assert result.distance == pytest.approx(g["distance"][m].item(), abs=1e-3)
            for radius_got, column in (
                (result.radius_before, "neighbour_radius_before"),
                (result.radius_after, "neighbour_radius_after"),
            ):
                assert radius_got == pytest.approx(g[column][m].item(), rel=1e-3)
        if result.case in ("add", "split"):
            assert result.slot is not None
            new = book.radii[result.slot].item()
            assert new == pytest.approx(g["new_radius"][m].item(), rel=1e-3)
        fired = int(book.lookup(g["queries"][m][None])[0]) >= 0
        assert book.nearest_two(g["queries"][m])[0][0] == int(g["chosen_after"][m])
        # At the rim the published code's rounding may fall on the other side.
        slot, distance = book.nearest_two(g["queries"][m])[0]
        if abs(distance - book.radii[slot].item()) > 1e-3:
            assert fired == bool(g["fired_after"][m])
        assert fired or not bool(g["fired_after"][m])

    count = int(book.count)
    assert torch.equal(book.keys[:count], g["final_keys"])
    torch.testing.assert_close(book.radii[:count], g["final_radii"], rtol=1e-3, atol=1e-5)
    book.check()
