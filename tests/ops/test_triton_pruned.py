"""The Triton kernels that take a sketch: the answers of brute force, to the bit, from fewer keys.

Interpreted on a CPU, products as bad as a tensor core's may be, see interpreter.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.sketch_layout import BLOCK, DIRECTIONS, ERROR, MIDDLE, OUTLIERS
from grace_kernels.testing import random_codebook, same_bits

from . import interpreter

pytest.importorskip("triton")
BATCHES = [1, 2, 4, 9, 20]  # one or more for each way to sketch queries
INF = math.inf


@pytest.fixture
def triton() -> Iterator[ModuleType]:
    """The launcher, its kernels interpreted."""
    with interpreter.interpreting() as launcher:
        yield launcher


def agree(
    query: Tensor, keys: Tensor, radii: Tensor, sketch: Sketch, count: int | None = None
) -> Tensor:
    """Assert that a sketch changes no answer; return the slots that answer."""
    rows_in_use = None if count is None else torch.tensor(count)
    args = query, keys, radii, rows_in_use
    index, distance = grace_kernels.lookup(*args, sketch=sketch, backend="triton")
    expected = grace_kernels.lookup(*args, backend="reference")
    assert torch.equal(index, expected[0])
    assert same_bits(distance, expected[1])
    return index


def counted(sketch: Sketch) -> dict[str, int]:
    """Return what has been counted since the last call."""
    counts = sketch.counts()
    sketch.counters.zero_()
    return counts


def groups(
    entries: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return keys in narrow groups of five, far apart, and radii that one group lies within."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(-(-entries // 5), dim, generator=generator)
    keys = centres.repeat_interleave(5, 0)[:entries]
    keys = keys + 0.02 * torch.randn(entries, dim, generator=generator)
    return keys.to(dtype), torch.full((entries,), 0.05 * math.sqrt(dim))


def near(keys: Tensor, rows: list[int], off: float, seed: int = 1) -> Tensor:
    """Return queries off some keys by so much in every element."""
    generator = torch.Generator().manual_seed(seed)
    noise = off * torch.randn(len(rows), keys.shape[1], generator=generator)
    return (keys[rows].float() + noise).to(keys.dtype)


@pytest.mark.parametrize("part", range(4))
def test_random_codebooks_are_answered_as_without_a_sketch(triton: ModuleType, part: int) -> None:
    scored = scanned = hits = 0
    for seed in range(20 * part, 20 * part + 20):
        case = random_codebook(seed)
        sketch = case.sketch()
        index = agree(case.query, case.keys, case.radii, sketch, case.count)
        counts = counted(sketch)
        assert counts["queries"] == len(case.query)
        scored, scanned = scored + counts["scored"], scanned + counts["scanned"]
        hits += int((index >= 0).sum())
    assert scored > 20
    assert scanned > 20
    assert hits > 10


def test_rows_are_written_as_without_a_sketch(triton: ModuleType) -> None:
    written = 0
    for seed in range(100, 124):
        case = random_codebook(seed)
        batch = len(case.query)
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(len(case.keys), 9, generator=generator)
        before = torch.randn(2 * batch + 3, 9, generator=generator)
        source = torch.cat([case.query, case.query])
        query_row = torch.randperm(2 * batch, generator=generator)[:batch]
        query_row[batch // 2] = -1 if batch > 2 else query_row[batch // 2]
        first = 2 * torch.arange(batch)
        codebook = case.keys, case.radii, values
        answers = []
        for sketch, backend in ((case.sketch(), "triton"), (None, "reference")):
            hidden = before.clone()
            count = None if case.count is None else torch.tensor(case.count)
            answer = grace_kernels.adapt_(
                hidden, source, query_row, first, first + 1 + first % 4 // 2, *codebook, count,
                sketch=sketch, backend=backend,
            )  # fmt: skip
            answers.append((hidden, *answer))
        assert all(same_bits(a, b) for a, b in zip(*answers, strict=True)), case.name
        written += int((answers[0][0] != before).any(dim=1).sum())
    assert written > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_of_keys_in_groups_a_few_are_scored_and_none_scanned(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, batch: int
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 2)  # of several steps each
    keys, radii = groups(700, 37, dtype)
    sketch = Sketch.fit(keys, radii)
    rows = [(n * 37) % 700 for n in range(batch)]
    index = agree(near(keys, rows, 0.01), keys, radii, sketch)
    assert (index >= 0).any()
    counts = counted(sketch)
    assert (counts["queries"], counts["pairs"]) == (batch, batch * 700)
    assert batch <= counts["scored"] <= 5 * batch
    assert counts["scanned"] == 0
    agree(near(keys, rows, 3.0), keys, radii, sketch)
    assert counted(sketch)["scored"] == 0


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_radius_that_is_the_distance_to_the_bit_counts(triton: ModuleType, batch: int) -> None:
    # T of the rule is the distance of the key that answers; 0 among others, and large norms, where
    # the query's own rounding is larger than what the sketch leaves.
    hits = 0
    for seed, (scale, offset, off) in enumerate(
        [(1.0, 0.0, 0.1), (1.0, 0.0, 0.0), (1e-3, 30.0, 1e-3), (1e-22, 0.0, 1e-22), (9.0, 300.0, 2)]
    ):
        generator = torch.Generator().manual_seed(seed)
        keys = scale * torch.randn(150, 90, generator=generator) + offset
        query = keys[:batch] + off * torch.randn(batch, 90, generator=generator)
        _, distance = grace_kernels.nearest(query, keys, torch.ones(150), backend="reference")
        for step in (0.0, -INF):
            exact = torch.nextafter(distance[0], torch.tensor(step)) if step else distance[0]
            radii = exact.clone().expand(150).contiguous()
            index = agree(query, keys, radii, Sketch.fit(keys, radii))
            hits += int(index[0] >= 0)
            assert step < 0 or index[0] >= 0
    assert hits == 5


def spied(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Have the workspaces of queries' sketches collected."""
    rooms, make = [], triton._room

    def room(*args: Any) -> tuple[Tensor, Tensor]:
        made = make(*args)
        rooms.append(made[0])
        return made

    monkeypatch.setattr(triton, "_room", room)
    return rooms


@pytest.mark.parametrize("batch", BATCHES)
def test_the_sketch_of_a_query_is_within_the_errors_it_states(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 1)
    rooms = spied(triton, monkeypatch)
    for seed, (dtype, dim, scale, offset) in enumerate(
        [
            (torch.float32, 200, 1.0, 0.0),
            (torch.float32, 65, 1e-3, 50.0),
            (torch.float32, 300, 1e-25, 0.0),
            (torch.bfloat16, 129, 10.0, 3.0),
            (torch.float16, 70, 1.0, 100.0),
            (torch.float32, 20, 1.0, 0.0),  # nothing is left for the residual
        ]
    ):
        generator = torch.Generator().manual_seed(seed)
        keys = (scale * torch.randn(40, dim, generator=generator) + offset).to(dtype)
        query = (3 * scale * torch.randn(batch, dim, generator=generator) + offset).to(dtype)
        sketch = Sketch.fit(keys, torch.ones(40))
        agree(query, keys, torch.ones(40), sketch)
        told = rooms[-1][0, :batch].double()
        low, high, error = told[:, DIRECTIONS : DIRECTIONS + 3].unbind(dim=1)
        coordinates, residual, rounding = sketch._exact(query)
        off = (told[:, :DIRECTIONS] - coordinates).square().sum(dim=1).sqrt()
        assert (off <= error + rounding).all()
        residual = residual - sketch.scales[MIDDLE].double()
        assert (low <= residual + rounding).all()
        assert (high >= residual - rounding).all()
        # And they say something: no more than a thousandth of the query's distance from the centre.
        size = (query.double() - sketch.centre).square().sum(dim=1).sqrt()
        assert (error <= 1e-3 * size + 2.0**-59).all()


@pytest.mark.parametrize("batch", [1, 9])
def test_without_the_error_of_the_sketch_of_a_query_a_hit_would_be_lost(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    # Keys with no error of their own, a query on one of them, a radius of 0: only the rounding of
    # the query's sketch stands between.
    def hits() -> int:
        found = 0
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            keys = 100 * torch.randn(40, 60, generator=generator)
            sketch = Sketch.fit(keys, torch.zeros(40))
            coordinates, residual, _ = sketch._exact(keys)
            stored, _ = sketch._decode()
            # The bound of each key's error is what it is, rounded up by nothing.
            error = torch.cat([residual[:, None], coordinates], 1) - stored[:40]
            index, _ = grace_kernels.lookup(
                keys[:batch], keys, torch.zeros(40), sketch=tight(sketch, error), backend="triton"
            )
            found += int((index >= 0).sum())
        return found

    def tight(sketch: Sketch, error: Tensor) -> Sketch:
        # Codes of e in steps so fine that rounding up hides nothing, one key at a time.
        least = error.square().sum(dim=1).sqrt()
        sketch.scales[ERROR] = float(least[:batch].max()) / 126
        code = (least / sketch.scales[ERROR].double()).ceil().clamp(max=126)
        code = torch.nn.functional.pad(code, (0, 24)).view(-1, BLOCK)
        sketch.head[:, ERROR] = code.to(torch.int8)
        return sketch

    assert hits() == 4 * batch
    monkeypatch.setattr(triton.tiles, "sketch_bound", lambda *_: (0.0, -1e-3))
    assert hits() < 4 * batch


@pytest.mark.parametrize("batch", [1, 9])
def test_with_a_large_error_of_the_sketch_of_a_query_no_key_is_left_out(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    keys, radii = groups(60, 20)
    sketch = Sketch.fit(keys, radii)
    query = near(keys, list(range(batch)), 0.01)
    agree(query, keys, radii, sketch)
    assert counted(sketch)["scored"] < 60 * batch
    monkeypatch.setattr(triton.tiles, "sketch_bound", lambda *_: (0.0, 10.0))
    agree(query, keys, radii, sketch)
    counts = counted(sketch)
    assert counts["scored"] + counts["scanned"] == 60 * batch


def small_list(triton: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Let programs use a sketch with less memory."""
    as_it_is = triton.tiles.sketched
    monkeypatch.setattr(triton.tiles, "sketched", lambda tile: replace(as_it_is(tile), **changes))


@pytest.mark.parametrize(("slices", "batch"), [(1, 1), (3, 4)])
def test_a_slice_of_which_too_much_is_left_is_scanned_alone(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int, slices: int
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: slices)
    keys, radii = groups(330, 24)
    keys[:90] = keys[0] + 0.01 * torch.randn(90, 24, generator=torch.Generator().manual_seed(0))
    sketch = Sketch.fit(keys, radii)
    query = near(keys, [7] * batch, 0.01)
    index = agree(query, keys, radii, sketch)
    assert (index >= 0).all()
    counts = counted(sketch)
    assert counts["scanned"] == batch * (330 if slices == 1 else 128)
    assert counts["scored"] == 0
    # Nothing is out of reach; and then the list itself is too short.
    agree(near(keys, [7] * batch, 0.01), keys, torch.full((330,), 99.0), Sketch.fit(keys, radii))
    far = torch.full((330,), 99.0)
    for room in (4096, 32 * 16):
        small_list(triton, monkeypatch, room=room)
        sketch = Sketch.fit(keys, far)
        agree(query, keys, far, sketch)
        assert counted(sketch) == {
            "queries": batch, "pairs": batch * 330, "scored": 0, "scanned": batch * 330
        }  # fmt: skip


def test_a_list_that_the_head_fills_is_not_relied_upon_though_the_tail_would_empty_it(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 1)
    small_list(triton, monkeypatch, room=32)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(16, 8, generator=generator).sign().repeat_interleave(48, 0)
    keys = torch.cat([20 * signs, torch.randn(768, 32, generator=generator)], dim=1)
    radii = torch.full((768,), 0.5)
    sketch = Sketch.fit(keys, radii)
    row = 48 * 3 + 44  # behind what the list holds of its group
    assert agree(keys[row : row + 1], keys, radii, sketch).item() == row
    assert counted(sketch)["scanned"] == 768


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("outliers", [1, OUTLIERS, 40])
def test_entries_with_large_radii_do_not_spoil_it(
    triton: ModuleType, batch: int, outliers: int
) -> None:
    keys, radii = groups(400, 30, seed=3)
    radii[: 5 * outliers : 5] = 10.0  # one of a group, and no other group as near
    sketch = Sketch.fit(keys, radii)
    aside = near(keys, [399 - 5 * n for n in range(batch)], 0.01)
    index = agree(aside, keys, radii, sketch)
    assert (index >= 0).all()
    counts = counted(sketch)
    if outliers <= OUTLIERS:
        assert counts["scanned"] == 0
        assert counts["scored"] <= 8 * batch
    # A query within a large radius: its group, nearer, blocks or answers.
    for off in (0.01, 1.0, 3.0):
        agree(near(keys, [5 * n for n in range(batch)], off), keys, radii, sketch)


@pytest.mark.parametrize("batch", [1, 9])
def test_what_the_sketch_was_not_told_of_is_found_too(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(triton, "slices_of", lambda *_: 4)
    keys, radii = groups(300, 40, seed=4)
    rows = list(range(299, 299 - batch, -1))
    query = near(keys, rows, 0.01)
    sketch = Sketch.fit(keys, radii, 210)
    sketch.update_radii_(radii, 210, 300)
    assert (agree(query, keys, radii, sketch) >= 0).all()
    counts = counted(sketch)
    assert counts["pairs"] == batch * 210
    assert counts["scanned"] == batch * (300 - 192)
    # The last group reaches far; a covered key, whose radius does not, is nearer and blocks.
    radii[295:] = 500.0
    sketch.update_radii_(radii, 295, 300)
    between = (0.6 * keys[100] + 0.4 * keys[299]).expand(batch, -1)
    assert (agree(between, keys, radii, sketch) == -1).all()
    sketch.extend(keys, 210, 300)
    agree(query, keys, radii, sketch)
    radii[295:] = 0.3
    sketch.refit(keys, radii)  # whose scales reach the new groups
    counted(sketch)
    agree(query, keys, radii, sketch)
    assert counted(sketch)["scanned"] == 0
    sketch.active = False
    agree(query, keys, radii, sketch)
    assert counted(sketch) == {
        "queries": batch, "pairs": 0, "scored": 0, "scanned": 300 * batch
    }  # fmt: skip
    sketch.active = True
    small = sketch.resized(64)
    small.update_radii_(radii, 0, 300)
    agree(query, keys, radii, small)


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_queries_and_keys_that_are_not_finite_are_answered(triton: ModuleType, batch: int) -> None:
    keys, radii = groups(100, 20, seed=5)
    sketch = Sketch.fit(keys, radii)
    keys[7, 3], keys[8, 3], keys[9] = math.nan, INF, 3e38
    sketch.extend(keys, 7, 10)
    for value in (math.nan, INF, -INF, 3e38):
        query = near(keys, [20 + n for n in range(batch)], 0.01)
        query[0, 5] = value
        for reach in (0.2, INF):
            radii[30] = reach
            sketch.update_radii_(radii, 30, 31)
            index = agree(query, keys, radii, sketch)
            counts = counted(sketch)
            # A NaN is a miss and no reason to read; others than it are within reach of everything.
            everything = reach == INF and batch > 1
            assert (counts["scanned"] > 0) == (not math.isnan(value) or everything)
    assert (index[1:] >= 0).all()


def test_dead_slots_and_slots_behind_the_count_do_not_answer(triton: ModuleType) -> None:
    keys, radii = groups(200, 33, seed=6)
    sketch = Sketch.fit(keys, radii)
    for batch in (1, 9):
        rows = [150 + n for n in range(batch)]
        query = near(keys, rows, 0.001)
        assert agree(query, keys, radii, sketch).tolist() == rows
        dead = radii.clone()
        dead[rows] = -INF
        assert not set(agree(query, keys, dead, sketch).tolist()) & set(rows)
        for count in (0, 1, 150, 155, 200):
            agree(query, keys, radii, sketch, count)
        for count in (-5, 2**40):  # a GPU clamps
            index, _ = torch.ops.grace_triton.pruned_lookup(
                query, keys, radii, torch.tensor(count), *sketch.tensors()
            )
            assert index.tolist() == (rows if count > 0 else [-1] * batch)
    assert agree(keys[:9], keys, torch.full((200,), -1.0), sketch).tolist() == [-1] * 9
    duplicate = keys.clone()
    duplicate[180] = duplicate[20]
    assert agree(duplicate[180:181], duplicate, radii, Sketch.fit(duplicate, radii)).item() == 20


def test_more_queries_than_one_launch_takes_and_a_workspace_of_anything(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(math.nan if made.is_floating_point() else 7)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(triton, "_MOST_QUERIES", 10)
    keys, radii = groups(230, 25, seed=7)
    sketch = Sketch.fit(keys, radii)
    rows = list(range(0, 230, 10))
    assert (agree(near(keys, rows, 0.01), keys, radii, sketch) >= 0).all()
    counts = counted(sketch)
    assert (counts["queries"], counts["pairs"]) == (23, 23 * 230)
    counters = triton.tickets.take(torch.device("cpu"), 3)
    assert counters.tolist() == [0] * len(counters)


def test_a_sketch_of_another_shape_is_refused(triton: ModuleType) -> None:
    keys, radii = groups(40, 25)
    tensors = list(Sketch.fit(keys, radii).tensors())
    op = torch.ops.grace_triton.pruned_lookup
    for place, wrong, message in (
        (0, torch.zeros(24), r"centre must be torch.float32 \[25\]"),
        (1, torch.zeros(DIRECTIONS, 25), "directions must be torch.bfloat16"),
        (4, tensors[4][:1], "tail must be"),
        (8, torch.zeros(4), "counters must be torch.int64"),
    ):
        changed = [*tensors[:place], wrong, *tensors[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            op(keys[:1], keys, radii, None, *changed)


def test_the_bounds_of_all_rows_are_small_and_grow_with_the_width(triton: ModuleType) -> None:
    tiles = triton.tiles
    for capability in ((8, 0), (9, 0), (10, 0)):
        for table in tiles.table(capability).values():
            for tile in table:
                assert tiles.sketched(tile).room >= 32 * tile.queries
                bounds = [tiles.sketch_bound(tile, dim) for dim in (64, 768, 4096, 11008)]
                assert bounds == sorted(bounds)
                assert bounds[2][1] < 4e-4
                assert tiles.sketch_bound(tile, 1 << 21) == (INF, INF)
