"""The published adaptor's way, rendered as a peer: its decisions and what it does to a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grace_kernels
from benchmarks.model import Stopwatch, build
from benchmarks.published import PublishedAdaptor, wrap


def separated(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw keys some 20 apart, radii of 1 to 4, and queries at 0.5 and 1.5 radii from keys.

    The last query lies within the radius, made 40, of the last key, nearer to the first, which does
    not cover it.
    """
    generator = torch.Generator().manual_seed(count)
    keys = 4 * torch.randn(count, 16, generator=generator)
    radii = 1 + 3 * torch.rand(count, generator=generator)
    away = nn.functional.normalize(torch.randn(count, 16, generator=generator))
    queries = [keys + far * radii[:, None] * away for far in (0.5, 1.5)]
    radii[-1] = 40
    between = keys[0] + 1.5 * radii[0] * away[0]
    return keys, radii, torch.cat([*(q[:-1] for q in queries), between[None]])


# torch.cdist takes the matrix product beyond 25 keys.
@pytest.mark.parametrize("count", [5, 25, 26, 400])
def test_its_decisions_are_those_of_lookup_where_rounding_does_not_matter(count):
    keys, radii, queries = separated(count)
    adaptor = PublishedAdaptor(nn.Identity(), keys, keys, radii)
    right = grace_kernels.lookup(queries, keys, radii)[0].tolist()
    assert right[: count - 1] == list(range(count - 1))
    assert set(right[count - 1 :]) == {-1}
    assert [adaptor.decide(query) for query in queries] == right


def test_a_hit_replaces_the_last_token_of_the_output_and_a_miss_nothing():
    keys, radii, queries = separated(40)
    values = torch.arange(40.0)[:, None].expand(40, 16)
    layer = nn.Linear(16, 16)
    adaptor = PublishedAdaptor(layer, keys, values, radii)
    with torch.no_grad():
        for query, entry in ((queries[7], 7), (queries[-1], None)):
            tokens = torch.stack([queries[3], query])[None]
            expected = layer(tokens)
            if entry is not None:
                expected[0, 1] = entry
            assert torch.equal(adaptor(tokens), expected)
    with pytest.raises(ValueError, match="hidden_states must hold one sequence, got 2"):
        adaptor(torch.zeros(2, 3, 16))


def test_an_entry_that_is_appended_is_found():
    keys, radii, queries = separated(40)
    adaptor = PublishedAdaptor(nn.Identity(), keys, keys, radii)
    assert adaptor.decide(queries[-1]) == -1
    adaptor.add(queries[-1], queries[-1], 0.5)
    assert adaptor.decide(queries[-1]) == 40
    assert len(adaptor.keys) == len(adaptor.values) == len(adaptor.radii) == 41


def test_every_step_of_decoding_asks():
    model = build({"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 11})
    entry = torch.ones(1, 16), torch.ones(1, 16), torch.ones(1)
    adaptor = wrap(model, "transformer.h.0.mlp", *entry)
    adaptor.decide = Stopwatch(adaptor.decide)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert len(adaptor.decide.seconds) == 5
