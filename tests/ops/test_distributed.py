"""Codebooks dealt out to 1 to 4 processes: what `sharded_ranks.py` does, and its parts alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from grace_kernels import reference
from grace_kernels.distributed import Layout, ShardedCodebook, ballots
from grace_kernels.testing import same_bits

from .sharded_ranks import CASES, WORLD

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What went wrong, by rank and case, of all cases in one run of four processes."""
    path = tmp_path_factory.mktemp("ranks") / "report.json"
    script = Path(__file__).with_name("sharded_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=300
    )
    assert path.exists(), done.stderr
    return dict(json.loads(path.read_text()), stderr=done.stderr)


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_answer_as_one_device_does(case: str, reports: dict) -> None:
    for rank in map(str, range(WORLD)):
        assert case in reports.get(rank, {}), f"rank {rank} did not end it: {reports['stderr']}"
        assert reports[rank][case] == "", reports[rank][case]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_every_slot_has_one_row_on_one_rank_and_rows_rise_with_it(world: int, block: int) -> None:
    layout = Layout(world, block)
    for count in (0, 1, block, 3 * block + 2, 2 * world * block, 50):
        held = [
            [layout.slot(row, rank) for row in range(layout.rows(count, rank))]
            for rank in range(world)
        ]
        assert sorted(slot for each in held for slot in each) == list(range(count))
        assert all(each == sorted(each) for each in held)
        assert max(map(len, held)) - min(map(len, held)) <= block
        for rank, each in enumerate(held):
            assert all(layout.owner(slot) == rank for slot in each)
            assert [layout.row(slot) for slot in each] == list(range(len(each)))
        blocks = list(layout.blocks(count))
        assert [slot for *_, first, end in blocks for slot in range(first, end)] == list(
            range(count)
        )
        assert all(
            (owner, row) == (layout.owner(first), layout.row(first))
            for owner, row, first, _ in blocks
        )


def test_the_least_ballot_is_of_the_least_square_and_of_equals_of_the_lowest_slot() -> None:
    tiny, one = torch.finfo(torch.float32).smallest_normal, 1.0
    squares = [0.0, 1e-45, tiny, one, math.nextafter(one, 2) + 1e-7, 3.4e38, math.inf]
    slots = [0, 1, 4097, ballots.SLOTS - 1]
    pairs = [(s, slot, hit) for s in squares for slot in slots for hit in (False, True)]
    s, slot, hit = (torch.tensor(each) for each in zip(*pairs, strict=True))
    named = torch.ones(len(pairs), dtype=torch.bool)
    cast = ballots.cast(s.float(), slot, hit, named)
    order = [(a, b) for a, b, _ in pairs]
    assert order == sorted(order)
    assert (cast[::2].diff() > 0).all()
    assert cast.max() < ballots.NONE
    assert cast.min() >= 0
    read_slot, distance, read_hit = ballots.read(cast)
    assert torch.equal(read_slot, slot)
    assert torch.equal(read_hit, hit)
    assert same_bits(distance, ballots.distance_of(s.float()))
    none = ballots.read(ballots.cast(s.float(), slot, hit, ~named))
    assert (none[0] == -1).all()
    assert (none[1] == math.inf).all()
    assert not none[2].any()


def test_pairs_are_scored_as_all_with_all_are() -> None:
    query, keys = torch.randn(5, 300), torch.randn(5, 300)
    whole = reference.squared_distances(query, keys)
    assert same_bits(reference.paired_squared_distances(query, keys), whole.diagonal())


def test_a_group_is_needed() -> None:
    with pytest.raises(ValueError, match="group must be given where"):
        ShardedCodebook(4, 4, 4)
