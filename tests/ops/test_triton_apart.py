"""The Triton kernels in two launches: the form `apart`, see grace_kernels/triton/forms.py.

Interpreted, as in test_triton.py. With `--gpu` tests that ask for a `place` run in this form too.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import grace_kernels
from grace_kernels.testing import same_bits, ties_within_rounding
from grace_kernels.triton import forms

from . import interpreter, problems
from .test_adapt import expected_hidden, problem, rows
from .test_triton import agree, codebook

pytest.importorskip("triton")
INF, NAN = math.inf, math.nan


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """What is launched while the form is in use, interpreted."""
    with interpreter.interpreting() as launcher, pytest.MonkeyPatch.context() as patch:
        found: list[str] = []

        class Watched:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                found.append(self.name)
                return self.kernel[grid]

        for name in ("lookup_kernels", "scan_kernels", "answer_kernels"):
            kernels = [Watched(name, kernel) for kernel in getattr(launcher, name)]
            patch.setattr(launcher, name, kernels)
        forms.use("apart")
        try:
            yield found
        finally:
            forms.use("")


def launcher() -> ModuleType:
    return importlib.import_module("grace_kernels.triton.lookup")


@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.bfloat16, 40)]
)
def test_answers_are_the_same_in_two_launches(
    launches: list[str], dtype: torch.dtype, batch: int
) -> None:
    query, keys, radii = codebook(dtype, batch, 280, 70)
    index = agree(query, keys, radii)
    agree(query, keys, radii, count=67 if batch < 9 else 0)
    assert batch < 9 or {-1} < set(index.tolist())
    assert launches == ["scan_kernels", "answer_kernels"] * 4


@pytest.mark.parametrize("number", [0, 10, 20])
def test_random_codebooks_are_answered_and_written_to_the_bit(
    launches: list[str], number: int
) -> None:
    made = problems.random_problem(number, large=False)
    right = problems.answers(problems.onto(made, problems.CPU), "reference")
    with problems.poisoned():
        mine = problems.answers(problems.onto(made, problems.CPU), "triton")
    assert problems.differences(right, mine) == []
    assert set(launches) <= {"scan_kernels", "answer_kernels"}


@pytest.mark.parametrize("slices", [1, 3])
def test_an_undecided_slice_is_decided_by_what_its_groups_left(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, slices: int
) -> None:
    monkeypatch.setattr(launcher(), "slices_of", lambda *_: slices)
    query, keys = ties_within_rounding(torch.float32, 20, 40, 1.0, 1, 4.0)
    keys = torch.cat([keys, keys + 50.0, keys + 60.0, keys + 70.0])  # two tiles of 64: crowded
    keys = keys.view(4, 20, 40).transpose(0, 1).reshape(80, 40)
    radii = torch.full((80,), INF)
    asking = query.expand(5, 40).clone()
    asking[0], asking[1] = INF, NAN  # from all alike, and nothing
    agree(asking, keys, radii)
    asking = asking[2:]
    winner, distance = grace_kernels.nearest(asking[:1], keys, radii, backend="reference")
    short = torch.full((80,), 0.5 * distance.item())
    short[winner] = distance.item()  # just reaches it
    assert agree(asking[:2], keys, short).tolist() == [winner.item()] * 2
    short[winner] = math.nextafter(distance.item(), 0) * (1 - 2.0**-23)
    assert agree(asking[:2], keys, short).tolist() == [-1] * 2
    keys[66:] = asking[0]  # behind the count, in the groups of a tile
    agree(asking[:2], keys, radii, count=66)
    radii[winner] = -INF  # a dead slot does not come back
    assert winner.item() not in agree(asking[:2], keys, radii, count=66).tolist()


def test_what_a_form_has_no_margin_for_is_wrong(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher().tiles, "error_bound", lambda *_: (0.0, 0.0))
    wrong = 0
    for seed in range(4):
        query, keys = ties_within_rounding(torch.float32, 40, 300, 1.0, seed, 4.0)
        query, radii = query.expand(6, -1), torch.full((40,), INF)
        index, _ = grace_kernels.nearest(query, keys, radii, backend="triton")
        expected, _ = grace_kernels.nearest(query, keys, radii, backend="reference")
        wrong += int(not torch.equal(index, expected))
    assert wrong > 0


def test_many_equal_keys_in_many_slices_leave_the_lowest(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher(), "slices_of", lambda *_: 70)  # more than are looked at together
    keys, radii, query = torch.zeros(70, 8), torch.ones(70), torch.zeros(2, 8)
    keys[0] = query[1] = 1.0
    index, _ = grace_kernels.lookup(query, keys, radii, backend="triton")
    assert index.tolist() == [1, 0]
    radii[1:68] = -INF
    index, _ = grace_kernels.lookup(query, keys, radii, backend="triton")
    assert index.tolist() == [68, 0]


def test_rows_are_written_from_a_source_that_is_read_until_then(launches: list[str]) -> None:
    generator = torch.Generator().manual_seed(5)
    keys, values = torch.randn(2, 12, 16, generator=generator)
    both = keys.clone()
    every = torch.arange(12)
    index, _ = grace_kernels.adapt_(
        both, both, every, 11 - every, 12 - every, keys, torch.zeros(12), values, backend="triton"
    )
    assert index.tolist() == every.tolist()
    assert torch.equal(both, values.flip(0))
    p = problem()
    expected = expected_hidden(p)
    index, _ = grace_kernels.adapt_(**p, count=torch.tensor(99), backend="triton")
    assert index.tolist() == [5, -1, -1, 2, 2]
    assert same_bits(p["hidden"], expected)
    p = problem()
    changes = {"query_row": rows(4, 9, 2**33, 7, 1)}  # out of range: asks nothing
    index, distance = grace_kernels.adapt_(**{**p, **changes}, backend="triton")
    assert distance[1:3].tolist() == [INF] * 2
    assert launches == ["scan_kernels", "answer_kernels"] * 3


def test_every_row_of_a_tile_can_be_the_nearest(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = launcher().tiles
    tile = tiles.choose((9, 0), 2, 16)
    monkeypatch.setattr(tiles, "choose", lambda *_: replace(tile, keys=32, groups=8))
    keys = torch.zeros(96, 20)
    keys[:, 0] = 10.0
    for place in range(0, 96, 37):
        here = keys.clone()
        near = [place, (place + 1) % 96, (place + 40) % 96]
        here[near, 0] = 1.0
        query = torch.zeros(5, 20, dtype=torch.bfloat16)
        index, _ = grace_kernels.nearest(
            query, here.to(torch.bfloat16), torch.ones(96), backend="triton"
        )
        assert index.tolist() == [min(near)] * 5


def test_it_is_off_unless_it_is_asked_for_and_unknown_names_are_refused(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys, radii = codebook(torch.float32, 5, 20, 8)
    forms.use("")
    grace_kernels.lookup(query, keys, radii, backend="triton")
    assert launches == ["lookup_kernels"]
    with pytest.raises(ValueError, match="TRITON_FORMS must be some of apart, got together"):
        forms.use("apart,together")
    monkeypatch.setattr(forms, "_chosen", None)
    assert not forms.apart()
    monkeypatch.setattr(forms, "_chosen", None)
    monkeypatch.setenv("GRACE_KERNELS_TRITON_FORMS", "apart")
    assert forms.apart()


def test_a_scan_of_few_queries_has_as_many_programs_as_registers_and_memory_allow() -> None:
    tiles = launcher().tiles
    programs = {
        (batch, slots): forms.scanning(
            (9, 0), tiles.choose((9, 0), 2, batch, slots, 4096), 2
        ).resident
        for batch in (1, 2, 8, 20)
        for slots in (0, 10_000)
    }
    in_float32 = tiles.choose((9, 0), 4, 8)
    assert forms.registers((9, 0), in_float32, 4) is None
    assert forms.scanning((9, 0), in_float32, 4) == in_float32
    for other in ((8, 0), (10, 0)):
        assert forms.registers(other, tiles.choose(other, 2, 1), 2) is None
    assert programs == {
        (1, 0): 3, (1, 10_000): 4, (2, 0): 4, (2, 10_000): 4, (8, 0): 3, (8, 10_000): 2,
        (20, 0): 2, (20, 10_000): 1,
    }  # fmt: skip


def test_a_launch_that_fails_says_so(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise OSError("out of resources")

    monkeypatch.setattr(launcher(), "answer_kernels", [Broken()] * 3)
    p = problem()
    before: Tensor = p["hidden"].clone()
    with pytest.raises(RuntimeError, match=r"did not start on cpu.*out of resources"):
        grace_kernels.adapt_(**p, backend="triton")
    assert same_bits(p["hidden"], before)
