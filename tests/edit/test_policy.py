"""The decision table, row by row and at its boundaries."""

from __future__ import annotations

import math
import random

import pytest
import torch
from grace_edit.codebook.policy import (
    add_up,
    decide,
    decide_nearest,
    decide_paper,
    fp32,
    label_key,
    own_radius,
)
from grace_edit.codebook.records import Decision


def above(number: float) -> float:
    """Return the next fp32 above `number`."""
    return torch.nextafter(torch.tensor(number), torch.tensor(math.inf)).item()


def below(number: float) -> float:
    """Return the next fp32 below `number`."""
    return torch.nextafter(torch.tensor(number), torch.tensor(-math.inf)).item()


@pytest.mark.parametrize(
    ("distance", "radius", "same", "expected"),
    [
        pytest.param(math.inf, None, False, Decision("add", None, 1.0), id="empty codebook"),
        pytest.param(0.0, 0.5, False, Decision("update", 0.5, None), id="its key, other label"),
        pytest.param(0.0, 0.5, True, Decision("absorb", 0.5, None), id="its key, same label"),
        pytest.param(0.0, 0.0, True, Decision("absorb", 0.0, None), id="radius 0 covers its key"),
        pytest.param(above(1.5), 0.5, True, Decision("add", 0.5, 1.0), id="just beyond both"),
        pytest.param(above(1.5), 0.5, False, Decision("add", 0.5, 1.0), id="beyond, other label"),
        pytest.param(1.5, 0.5, True, Decision("expand", 1.5, None), id="just within both"),
        pytest.param(1.5, 0.5, False, Decision("split", 0.5, 0.75), id="within, other label"),
        pytest.param(0.5, 0.5, True, Decision("absorb", 0.5, None), id="on the rim"),
        pytest.param(
            above(0.5), 0.5, True, Decision("expand", above(0.5), None), id="just over the rim"
        ),
        pytest.param(
            3.0, 2.5, True, Decision("expand", 3.0, None), id="reaches the largest radius"
        ),
        pytest.param(above(3.0), 2.5, True, Decision("add", 2.5, 1.0), id="would exceed it"),
        pytest.param(
            above(3.0), 4.0, True, Decision("absorb", 4.0, None), id="beyond it but covered"
        ),
        pytest.param(
            3.2, 2.5, False, Decision("split", fp32(1.6), 1.0), id="it binds one label only"
        ),
        pytest.param(0.8, 0.1, False, Decision("split", fp32(0.1), 0.4), id="split: min of each"),
        pytest.param(0.8, 1.0, False, Decision("split", 0.4, 0.4), id="split: halves"),
    ],
)
def test_the_first_row_of_the_table_that_matches_decides(
    distance: float, radius: float | None, same: bool, expected: Decision
) -> None:
    distance = fp32(distance)
    radius = None if radius is None else fp32(radius)
    got = decide(distance, radius, same, radius=1.0)
    rounded = [None if r is None else fp32(r) for r in (got.neighbour_radius, got.new_radius)]
    wanted = [
        None if r is None else fp32(r) for r in (expected.neighbour_radius, expected.new_radius)
    ]
    assert (got.case, rounded, got.fragile) == (expected.case, wanted, False)


def test_the_sum_of_radii_is_rounded_to_fp32_before_it_is_compared() -> None:
    total = fp32(0.1) + fp32(0.7)  # lies between two fp32 numbers
    assert fp32(total) != total
    assert decide(fp32(total), fp32(0.7), True, radius=fp32(0.1), max_radius=9.0).case == "expand"
    assert decide(above(fp32(total)), fp32(0.7), True, radius=fp32(0.1), max_radius=9.0).case == (
        "add"
    )


def test_expanding_reaches_the_query_and_the_drift_and_not_an_ulp_more() -> None:
    source = random.Random(0)
    for _ in range(2000):
        distance = fp32(source.uniform(0, 3) * 10 ** source.uniform(-6, 3))
        drift = fp32(source.uniform(0, 1) * 10 ** source.uniform(-12, 0))
        reach = add_up(distance, drift)
        exact = distance + drift  # fp64: exact here, or far closer than an fp32 step
        assert reach >= distance
        assert reach == fp32(reach)
        assert below(reach) < exact <= reach or math.isclose(reach, exact, rel_tol=1e-15)
        assert add_up(distance, 0.0) == distance
    assert add_up(1.0, 1e-30) == above(1.0)  # lost in fp64, but not here


def test_the_largest_radius_counts_the_drift() -> None:
    assert decide(2.9, 2.0, True, radius=1.0, drift=0.0).case == "expand"
    assert decide(fp32(2.9), 2.0, True, radius=1.0, drift=fp32(0.2)).case == "add"
    assert decide(1.9, 1.0, True, radius=1.0, max_radius=1.5).case == "add"


def test_expanding_adds_the_drift() -> None:
    assert decide(1.5, 1.0, True, radius=1.0, drift=0.25) == Decision("expand", 1.75, None)


@pytest.mark.parametrize(
    ("distance", "radius", "same", "drift", "fragile"),
    [
        pytest.param(1.0, 1.0, False, 0.5, True, id="conflict at twice the drift"),
        pytest.param(above(1.0), 1.0, False, 0.5, False, id="conflict just beyond that"),
        pytest.param(0.5, 0.25, True, 0.25, False, id="radius as large as the drift"),
        pytest.param(0.25, 0.25, True, above(0.25), True, id="radius smaller than the drift"),
        pytest.param(1.05, 0.1, False, 0.5, True, id="split of an entry smaller than it"),
        pytest.param(9.0, 0.1, False, 0.5, False, id="far from a small entry"),
        pytest.param(9.0, 0.1, False, 1.5, True, id="drift larger than every new radius"),
    ],
)
def test_an_edit_that_the_drift_can_move_out_is_fragile(
    distance: float, radius: float, same: bool, drift: float, fragile: bool
) -> None:
    got = decide(distance, fp32(radius), same, radius=1.0, drift=drift)
    assert got.fragile is fragile


@pytest.mark.parametrize(
    ("distance", "radius", "same", "expected"),
    [
        pytest.param(math.inf, None, False, Decision("add", None, 1.0), id="empty codebook"),
        pytest.param(0.0, 0.5, False, Decision("update", 1.0, None), id="its key, other label"),
        pytest.param(0.0, 0.5, True, Decision("absorb", 1.0, None), id="its key, same label"),
        pytest.param(0.1, 0.5, True, Decision("add", 0.5, 1.0), id="within it, same label"),
        pytest.param(0.1, 0.5, False, Decision("add", 0.5, 1.0), id="within it, other label"),
        pytest.param(1.2, 0.5, True, Decision("add", 0.5, 1.0), id="balls overlap"),
        pytest.param(9.0, 0.5, False, Decision("add", 0.5, 1.0), id="far"),
    ],
)
def test_where_the_nearest_decides_every_edit_gets_the_full_radius_and_changes_no_other(
    distance: float, radius: float | None, same: bool, expected: Decision
) -> None:
    assert decide_nearest(fp32(distance), radius, same, radius=1.0) == expected


def test_where_the_nearest_decides_only_a_contradiction_within_twice_the_drift_is_fragile() -> None:
    assert decide_nearest(0.5, 1.0, False, radius=1.0, drift=0.25).fragile
    assert not decide_nearest(above(0.5), 1.0, False, radius=1.0, drift=0.25).fragile
    assert not decide_nearest(0.5, 1.0, True, radius=1.0, drift=0.25).fragile
    assert decide_nearest(9.0, 1.0, True, radius=1.0, drift=above(1.0)).fragile


def test_an_entry_of_its_own_ends_half_way_to_another_label() -> None:
    assert own_radius(math.inf, radius=1.0) == 1.0
    assert own_radius(2.0, radius=1.0) == 1.0
    assert own_radius(1.5, radius=1.0) == 0.75


@pytest.mark.parametrize(
    ("distance", "radius", "same", "expected"),
    [
        pytest.param(math.inf, None, False, Decision("add", None, 1.0), id="empty codebook"),
        pytest.param(1.5, 0.5, True, Decision("expand", 1.5, None), id="just within both"),
        pytest.param(above(1.5), 0.5, True, Decision("add", 0.5, 1.0), id="just beyond both"),
        pytest.param(0.5, 0.5, True, Decision("absorb", 0.5, None), id="on the rim"),
        pytest.param(
            2.0, 1.5, False, Decision("split", fp32(1.0 - fp32(1e-5)), 1.0), id="half minus 1e-5"
        ),
        pytest.param(
            1.0, 0.1, False, Decision("split", fp32(0.5 - fp32(1e-5)), 0.5), id="it may enlarge"
        ),
        pytest.param(
            4.0, 3.5, False, Decision("split", fp32(2.0 - fp32(1e-5)), 2.0), id="larger than new"
        ),
        pytest.param(
            0.0, 1.0, False, Decision("split", fp32(-fp32(1e-5)), 0.0), id="negative at its key"
        ),
        pytest.param(50.0, 49.5, True, Decision("expand", 50.0, None), id="no largest radius"),
    ],
)
def test_the_paper_policy_takes_the_published_decisions(
    distance: float, radius: float | None, same: bool, expected: Decision
) -> None:
    radius = None if radius is None else fp32(radius)
    assert decide_paper(fp32(distance), radius, same, radius=1.0) == expected


def test_the_published_code_compares_means_of_label_tensors() -> None:
    assert label_key([-100, -100, 4, 6], "paper") == label_key([-100, -100, 5, 5], "paper")
    assert label_key([-100, 5], "paper") != label_key([-100, -100, 5], "paper")
    assert label_key([4, 6], "default") != label_key([5, 5], "default")
