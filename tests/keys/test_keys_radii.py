"""Radii from distances, by cases computed by hand."""

from __future__ import annotations

import math

import pytest
from grace_edit.keys.radii import suggest_radius


def test_the_radius_is_half_way_between_the_last_positive_and_the_first_negative() -> None:
    found = suggest_radius([0.5, 1.0, 3.0], {"near": [2.0, 4.0]}, {"near": 0.0})
    assert found.radius == 1.5
    assert found.hit == pytest.approx(2 / 3)
    assert found.fired == {"near": 0.0}
    assert found.bound_by == "near"


def test_as_many_negatives_may_fire_as_the_bound_allows() -> None:
    far = [1.0, 2.0, 3.0, 4.0]
    assert suggest_radius([0.5, 2.5], {"near": far}, {"near": 0.25}).radius == pytest.approx(1.25)
    found = suggest_radius([0.5, 2.5], {"near": far}, {"near": 0.5})
    assert found.radius == 2.75
    assert found.fired == {"near": 0.5}


def test_the_stricter_kind_decides_and_is_named() -> None:
    found = suggest_radius(
        [0.5, 1.25], {"near": [3.0], "other": [1.5, 9.0]}, {"near": 0.0, "other": 0.0}
    )
    assert found.radius == 1.375
    assert found.bound_by == "other"
    assert "'other'" in found.reason


def test_without_a_negative_in_the_way_the_farthest_positive_is_reached() -> None:
    found = suggest_radius([0.5, 1.25, math.inf], {"near": []}, {"near": 0.0})
    assert found.radius == 1.25
    assert found.bound_by is None
    assert found.hit == pytest.approx(2 / 3)
    assert "66.7%" in found.reason


def test_without_a_positive_the_radius_stays_below_the_first_negative() -> None:
    found = suggest_radius([math.inf], {"near": [2.0]}, {"near": 0.0})
    assert 1.999 < found.radius < 2.0
    assert found.fired == {"near": 0.0}


def test_the_table_lists_rates_in_ascending_radii() -> None:
    found = suggest_radius([0.5, 1.0, 3.0], {"near": [2.0, 4.0]}, {"near": 0.0})
    radii = [rate.radius for rate in found.table]
    assert radii == sorted(radii)
    assert 1.5 in radii
    assert found.table[0].hit == pytest.approx(1 / 3)  # 0.75
    assert found.table[-1].fired == {"near": 0.5}  # 2.25


@pytest.mark.parametrize(
    ("positives", "negatives", "bounds", "said"),
    [
        ([1.0], {"a": [1.0]}, {"b": 0.0}, "bounds must name"),
        ([1.0], {"a": [1.0]}, {"a": 1.5}, "must be in 0..1, got 1.5"),
        ([-1.0], {"a": [1.0]}, {"a": 0.0}, "positives must be distances"),
        ([1.0], {"a": [math.nan]}, {"a": 0.0}, "negatives"),
        ([math.inf], {"a": []}, {"a": 0.0}, "must hold a finite distance"),
        ([0.0], {"a": [0.0]}, {"a": 0.0}, "no radius keeps the bound of 'a'"),
    ],
)
def test_what_gives_no_radius_is_refused(
    positives: list[float], negatives: dict[str, list[float]], bounds: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        suggest_radius(positives, negatives, bounds)
