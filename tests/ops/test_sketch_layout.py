"""The layout of a sketch is said once for Python and once for C++: they must say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from grace_kernels import Sketch
from grace_kernels import sketch_layout as layout

HEADER = Path(__file__).parents[2] / "csrc" / "sketch_layout.h"


def said_in_cpp() -> dict[str, int]:
    """Return the constants of the header by name."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    said: dict[str, int] = {}
    for statement in re.findall(r"constexpr int ([^;]+);", text):
        for constant in statement.split(","):
            name, _, value = constant.partition("=")
            said[name.strip()] = eval(value, {}, said)
    return said


@pytest.mark.skipif(not HEADER.exists(), reason="no source tree")
def test_cpp_and_python_agree_on_every_number() -> None:
    assert said_in_cpp() == {
        "kDirections": layout.DIRECTIONS,
        "kHead": layout.HEAD,
        "kBlockSlots": layout.BLOCK,
        "kOutliers": layout.OUTLIERS,
        "kUnknown": layout.UNKNOWN,
        "kCounters": len(layout.COUNTERS),
        "kResidual": layout.RESIDUAL,
        "kError": layout.ERROR,
        "kCoordinates": layout.COORDINATES,
        "kHeadNumbers": layout.HEAD_NUMBERS,
        "kTailNumbers": layout.TAIL_NUMBERS,
        "kMiddle": layout.MIDDLE,
        "kScales": layout.MIDDLE + 1,
        "kHeadBytes": layout.HEAD_NUMBERS * layout.BLOCK,
        "kTailBytes": layout.TAIL_NUMBERS * layout.BLOCK,
    }


@pytest.mark.parametrize("name", ["pruned_lookup", "pruned_adapt_"])
def test_operators_take_the_tensors_in_the_order_of_the_layout(name: str) -> None:
    arguments = getattr(torch.ops.grace, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    assert names[names.index("count") + 1 :] == list(layout.NAMES)


def test_a_sketch_stored_by_an_earlier_version_has_this_layout() -> None:
    # What is on disk must stay readable: these are the shapes of version 0.1.
    stored = {name: list(t.shape) for name, t in Sketch(70, 5, torch.float32).state().items()}
    assert stored == {
        "centre": [5],
        "directions": [64, 5],
        "scales": [67],
        "head": [0, 10, 32],
        "tail": [0, 56, 32],
        "covered": [],
        "radius_bound": [],
        "outliers": [32],
    }
