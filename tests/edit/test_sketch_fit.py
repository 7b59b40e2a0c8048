"""When the sketch of a codebook is fitted anew, and when it goes out of use."""

from __future__ import annotations

import io
import math

import pytest
import sketched_books
import torch
from codebook_streams import VALUE_DIM
from grace_edit import Codebook, progress
from sketched_books import (
    WORTH,
    add,
    agree,
    counted,
    fits,
    pruned,
    queries_near,
    since_fit,
    spread_out,
)

import grace_kernels
from grace_kernels.sketch import OUTLIERS, UNKNOWN


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sketched_books.make_small_ones_worth_a_sketch(monkeypatch)


def test_it_is_fitted_when_enough_slots_are_used_and_whenever_they_have_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = fits(monkeypatch)
    book = Codebook(16, VALUE_DIM, capacity=512, radius=0.5)
    add(book, 4 * WORTH + 10)
    assert seen == [WORTH, 2 * WORTH, 4 * WORTH]
    assert book.sketch is not None
    assert (book.sketch.rows, since_fit(book).written) == (4 * WORTH + 10, 10)
    book.delete(book.ids[0])
    assert len(seen) == 3


def test_it_is_fitted_anew_where_new_keys_are_out_of_the_reach_of_its_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = spread_out(250, capacity=512)
    seen = fits(monkeypatch)
    add(book, 20)
    assert (seen, since_fit(book).unknown) == ([], 0)
    add(book, 2, scale=100.0)
    assert (seen, since_fit(book).unknown) == ([], 2)  # 2 of 272 in use
    assert agree(book) >= 2 * 12
    add(book, 1, scale=100.0)  # 3 of 273
    assert (seen, since_fit(book).unknown) == ([273], 0)
    codes = book.sketch.head[:, 1].flatten()[:273]  # type: ignore[union-attr]
    assert not (codes == UNKNOWN).any()
    agree(book)


def test_where_lookups_gained_nothing_and_slots_were_added_it_is_fitted_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = spread_out(100, capacity=512)
    seen = fits(monkeypatch)
    add(book, 9)
    counted(book, 1000, 100_000, 50, 50_000)  # half: not yet
    add(book, 1)
    counted(book, 255, 100_000, 50, 100_000)  # too few to tell
    add(book, 1)
    assert seen == []
    counted(book, 256, 100_000, 50, 50_001)
    add(book, 1)
    assert seen == [112]
    assert book.sketch is not None
    assert book.sketch.active
    assert book.sketch.counts()["queries"] == 0


def test_where_lookups_gained_nothing_and_nothing_is_new_it_goes_out_of_use_until_the_next_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = spread_out(100, capacity=512)
    seen = fits(monkeypatch)
    sketch = book.sketch
    assert sketch is not None
    counted(book, 256, 100_000, 0, 100_000)
    book.lookup(book.keys[:4])
    assert sketch.active  # nothing is decided in a lookup
    add(book, 1)
    assert (sketch.active, int(sketch.covered), seen) == (False, 0, [])
    status = book.describe_sketch()
    assert status is not None
    assert (status["rows"], status["active"]) == (0, False)
    agree(book)
    add(book, 8)
    assert not sketch.active
    assert sketch.faults(book.keys, book.radii) == []  # kept true all the same
    assert sketch.rows == 109
    book.check()
    add(book, 1)
    assert (sketch.active, int(sketch.covered), seen) == (True, 110, [110])
    agree(book)


@pytest.mark.skipif(
    not grace_kernels.build_info()["cpu"]["available"], reason="the reference does not count"
)
def test_lookups_that_the_sketch_does_not_help_are_counted_and_put_it_out_of_use() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 16, generator=draw)
    values = torch.zeros(200, VALUE_DIM)
    for radius in (0.5, 1e3):
        labels = [[i] for i in range(200)]
        radii = torch.full((200,), radius)
        book = Codebook.from_tensors(keys, values, radii, labels, capacity=256)
        book.lookup(torch.randn(300, 16, generator=draw))
        status = book.describe_sketch()
        assert status is not None
        assert status["queries"] == 300
        assert (status["scanned"] > 0.9) == (radius > 1)
        add(book, 1)
        assert book.sketch is not None
        assert book.sketch.active == (radius < 1)
        agree(book)


def test_radii_that_were_large_once_do_not_put_it_out_of_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = spread_out(100, capacity=512, max_radius=math.inf)
    sketch = book.sketch
    assert sketch is not None
    with book.transaction():
        for row in range(40):
            book.storage.slots.write_radius(row, 1e4)
    assert float(sketch.radius_bound) == 1e4
    book.undo()
    assert float(sketch.radius_bound) == 1e4
    query = queries_near(book, 12, 0)
    assert pruned(book, query)[2] == 12 * 100
    seen = fits(monkeypatch)
    counted(book, 256, 100_000, 0, 100_000)
    add(book, 1)
    assert (sketch.active, float(sketch.radius_bound), seen) == (True, 0.5, [])
    assert sketch.counts()["pairs"] == 0
    assert pruned(book, query)[2] < 12 * (OUTLIERS + 10)
    agree(book)


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"),
    [
        pytest.param(True, 0.0, True, id="a terminal, and it takes long"),
        pytest.param(True, 1000.0, False, id="soon done"),
        pytest.param(False, 0.0, False, id="no terminal"),
    ],
)
def test_a_fit_shows_progress_on_a_terminal_where_it_takes_long(
    terminal: bool, patience: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    spread_out(WORTH)
    assert ("fitting the sketch" in screen.getvalue()) == shown
    assert (screen.getvalue() == "") != shown
