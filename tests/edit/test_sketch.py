"""The sketch that a codebook keeps: true after every change, fitted when that pays, saved, shown.

`pruned` looks queries up by what the sketch says alone, so that a sketch that has become wrong
shows here on any machine, whether its kernels are built or not.
"""

from __future__ import annotations

import io
import json
import math
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, state
from grace_edit import Codebook, GraceEditor, QueryPlan, progress
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.codebook import sketch_upkeep as sketching
from grace_edit.codebook import store
from grace_edit.codebook.store import CONFIG, TENSORS, StoreError
from safetensors.torch import load_file, save_file
from tiny_models import run_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grace_kernels
from grace_kernels import Sketch
from grace_kernels.reference import squared_distances
from grace_kernels.sketch import _STATE, OUTLIERS, UNKNOWN, worthwhile

WORTH = 40  # rows; more than a sketch lists as outliers, so that its bound of radii counts


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= WORTH)


def pruned(book: Codebook, query: Tensor) -> tuple[Tensor, Tensor, int]:
    """Look queries up among the keys that the sketch cannot exclude; count those as well."""
    sketch, rows = book.sketch, book._row_count
    assert sketch is not None
    covered = min(int(sketch.covered), rows)
    bounds = torch.full((len(query), rows), -math.inf, dtype=torch.float64)
    bounds[:, :covered] = sketch.lower_bounds(query)[:, :covered]
    distance = squared_distances(query, book.keys[:rows]).double().sqrt().float()
    outliers = [row for row in sketch.outliers.tolist() if 0 <= row < rows]
    within = distance[:, outliers].masked_fill(
        ~(distance[:, outliers] <= book.radii[outliers]), math.inf
    )
    hit = within.amin(dim=1) if outliers else torch.full((len(query),), math.inf)
    most = torch.maximum(sketch.radius_bound, torch.where(hit < math.inf, hit, -math.inf)).double()
    left = bounds <= (most * (1 + 2.0**-22) + 2.0**-74)[:, None]
    left[:, outliers] = True
    left &= book.radii[:rows] != -math.inf
    least = distance.masked_fill(~left, math.inf)
    index = least.argmin(dim=1) if rows else torch.zeros(len(query)).long()
    reach = least.amin(dim=1) if rows else hit
    answered = (reach < math.inf) & (reach <= book.radii[index])
    found = torch.where(answered, index, -1), torch.where(answered, reach, math.inf)
    return *found, int(left.sum())


def queries_near(book: Codebook, number: int, seed: int) -> Tensor:
    """Return queries at some of the keys, close to others and just anywhere."""
    draw = torch.Generator().manual_seed(seed)
    live = (book.radii != -math.inf).nonzero()[:, 0]
    dim = book.keys.shape[1]
    free = 2 * torch.randn(number, dim, generator=draw)
    if len(live):
        at = live[torch.randint(len(live), (number,), generator=draw)]
        away = torch.tensor([0.0, 0.1, 0.5])[torch.randint(3, (number,), generator=draw)]
        near = book.keys[at].float() + away[:, None] * torch.randn(number, dim, generator=draw)
        free[::2], free[1::4] = near[::2], near[1::4]
    return free.to(book.keys.dtype)


def agree(book: Codebook, seed: int = 0) -> int:
    """Compare lookups with, without and by the sketch, to the bit; count the keys left to read."""
    query = queries_near(book, 12, seed)
    plain = grace_kernels.lookup(query, book.keys, book.radii, book.count)
    assert [bits(t) for t in book.lookup(query)] == [bits(t) for t in plain]
    if book.sketch is None:
        return 0
    *found, read = pruned(book, query)
    assert [bits(t) for t in found] == [bits(t) for t in plain]
    if book._upkeep.rows and not any(book._upkeep.stale.values()):
        assert book.sketch.faults(book.keys, book.radii) == []
    else:
        assert not book.sketch.active
    return read


def spread_out(count: int, dim: int = 16, seed: int = 0, **how: Any) -> Codebook:
    """Return imported entries in a space with one long direction, radius 0.5."""
    draw = torch.Generator().manual_seed(seed)
    keys = 2 * torch.rand(count, dim, generator=draw) - 1
    keys[:, 0] *= 30
    labels = [[i] for i in range(count)]
    values = torch.randn(count, VALUE_DIM, generator=draw)
    return Codebook.from_tensors(keys, values, torch.full((count,), 0.5), labels, **how)


def add(book: Codebook, count: int, scale: float = 1.0) -> None:
    """Insert entries of the kind that `spread_out` imports."""
    draw = torch.Generator().manual_seed(1 + book._next_id)
    for _ in range(count):
        key = 2 * torch.rand(book.keys.shape[1], generator=draw) - 1
        key[0] *= 30
        book.insert(key * scale, [book._next_id], torch.zeros(VALUE_DIM))


# ---------------------------------------------------------------------- true after every change


def test_the_rule_is_about_rows_and_not_yet_measured() -> None:
    assert [worthwhile(rows) for rows in (0, 4095, 4096, 10**6)] == [False] * 2 + [True] * 2


def test_a_sketch_stands_by_and_covers_nothing_until_enough_rows_are_in_use() -> None:
    assert Codebook(4, 2, capacity=WORTH - 1).sketch is None
    book = Codebook(4, VALUE_DIM, capacity=WORTH)
    stands = book.sketch
    assert stands is not None
    where = [tensor.data_ptr() for tensor in stands.tensors()]
    for i in range(WORTH):
        assert (int(stands.covered), stands.active) == (0, False)
        book.insert(torch.full((4,), 9.0 * i), [i], torch.zeros(VALUE_DIM))
        agree(book, i)
    assert (int(stands.covered), stands.active) == (WORTH, True)
    assert book.sketch is stands
    assert [tensor.data_ptr() for tensor in stands.tensors()] == where
    assert agree(book) <= 12 * (OUTLIERS + 3)
    book.check()


@pytest.mark.parametrize("policy", ["default", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sketch_stays_true_whatever_is_done_to_a_codebook(
    policy: str, seed: int, tmp_path: Path
) -> None:
    stream = Stream(seed, spread=6.0, labels=4)
    choose = stream.random
    book = Codebook(3, VALUE_DIM, capacity=WORTH // 2, policy=policy, drift=0.01)
    done: dict[str, int] = {}
    capacities, states = set(), set()
    for step in range(220):
        kind = choose.choice(["insert"] * 9 + ["delete", "undo", "undo", "fail", "batch", "purge"])
        kind = "load" if step % 60 == 59 else kind
        query, label, value, prompt = stream.next()
        if kind == "insert":
            book.insert(query, label, value, prompt)
        elif kind in ("delete", "purge") and book.ids:
            book.delete(choose.choice(book.ids), purge=kind == "purge")
        elif kind == "undo" and book._undo:
            book.undo()
        elif kind in ("fail", "batch"):
            before = state(book)
            try:
                with book.transaction():
                    for _ in range(choose.randrange(1, 30)):
                        query, label, value, prompt = stream.next()
                        book.insert(query, label, value, prompt)
                    agree(book, step)
                    if kind == "fail":
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert state(book) == before
        elif kind == "load":
            store.save(book, tmp_path, {})
            book, _ = store.load(tmp_path)
        done[kind] = done.get(kind, 0) + 1
        agree(book, step)
        capacities.add(book.capacity)
        states.add(None if book.sketch is None else book.sketch.active)
        if step % 20 == 0:
            book.check()
    book.check()
    assert len(done) == 7
    assert len(capacities) >= 3
    assert {None, True} <= states


def test_growth_takes_the_sketch_along_and_its_undo_takes_it_back() -> None:
    book = spread_out(WORTH - 1)
    assert book.sketch is None
    add(book, 1)  # a sketch is made, and fitted at once
    made = book.sketch
    assert made is not None
    assert (int(made.covered), made.active) == (WORTH, True)
    book.undo()
    assert (book.sketch, book.capacity) == (None, WORTH - 1)
    add(book, WORTH)
    grown = book.sketch
    assert grown is not None
    assert book.capacity == 4 * WORTH - 4
    assert (grown.capacity, int(grown.covered)) == (160, 2 * WORTH - 1)
    agree(book)
    book.undo()
    assert book.sketch is not None
    assert (book.sketch.capacity, int(book.sketch.covered)) == (96, 2 * WORTH - 2)
    agree(book)
    book.check()


def test_growth_amid_a_change_does_not_take_a_sketch_into_use_that_was_not_told_of_it() -> None:
    book = spread_out(WORTH)
    near = book.keys[3] + 0.01  # splits entry 3 and needs a new row
    seen = []

    def answers(edit: Any, slot: int) -> bool:
        return True

    def looked(capacity: int) -> None:
        resize(capacity)
        assert book.sketch is not None
        seen.append((int(book.sketch.covered), sum(map(len, book._upkeep.stale.values()))))

    resize, book._resize = book._resize, looked  # type: ignore[method-assign]
    plan = book.propose(near, [999])
    assert plan.case == "split"
    book.commit(plan, torch.zeros(VALUE_DIM), answers=answers)
    assert seen == [(0, 1)]
    assert int(book.sketch.covered) == WORTH + 1  # type: ignore[union-attr]
    agree(book)


def test_a_lookup_amid_a_change_is_not_misled_and_the_sketch_is_back_at_its_end() -> None:
    book = spread_out(WORTH)
    with book.lock, book.transaction():
        key = book.keys[5].clone()
        book._write("keys", 5, torch.full_like(key, 7.0))
        book._write("radii", 6, 9.0)
        assert not book.sketch.active  # type: ignore[union-attr]
        agree(book)
        assert book.lookup(torch.full_like(key, 7.1)[None])[0].tolist() == [5]
        with suppress(KeyboardInterrupt), book.transaction():
            book._write("keys", 5, key)
            book._write("keys", 8, key + 1)
            raise KeyboardInterrupt
        assert book.sketch.active  # type: ignore[union-attr]
        agree(book)
        assert book.lookup(torch.full_like(key, 7.1)[None])[0].tolist() == [5]
    agree(book)
    book.undo()
    assert book.lookup(key[None])[0].tolist() == [5]
    agree(book)


@pytest.mark.parametrize("where", ["extend", "update_radii_", "refit"])
@pytest.mark.parametrize("how", ["insert", "delete", "undo"])
def test_an_interruption_while_the_sketch_is_told_misleads_nobody(
    where: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = spread_out(WORTH, capacity=4 * WORTH)
    add(book, WORTH - 1 if where == "refit" and how == "insert" else 20)
    if where == "refit" and how != "insert":
        book._upkeep.unknown = 1000  # fitted anew at the next change
    real, calls = getattr(Sketch, where), 0

    def interrupted(self: Sketch, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if where == "refit":
            real(self, *args, **kwargs)
        raise KeyboardInterrupt

    before = state(book)
    monkeypatch.setattr(Sketch, where, interrupted)
    change = {
        "insert": lambda: add(book, 1),
        "delete": lambda: book.delete(book.ids[-3]),
        "undo": book.undo,
    }[how]
    with pytest.raises(KeyboardInterrupt):
        change()
    assert calls > 0
    if how != "undo":
        assert state(book) == before
    agree(book)
    monkeypatch.undo()
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= WORTH)
    add(book, 1)
    assert book.sketch.active  # type: ignore[union-attr]
    agree(book)
    book.check()


def test_changes_and_fits_within_the_capacity_write_into_the_same_memory() -> None:
    book = Codebook(16, VALUE_DIM, capacity=4 * WORTH, radius=0.5)
    assert book.sketch is not None
    before = [tensor.data_ptr() for tensor in book.sketch.tensors()]
    add(book, 3 * WORTH)
    for id in (5, 50, 100):
        book.delete(id)
    for _ in range(10):
        book.undo()
    assert book._upkeep.rows == 2 * WORTH
    assert [tensor.data_ptr() for tensor in book.sketch.tensors()] == before
    agree(book)


def test_a_served_lookup_with_a_sketch_reads_no_value_of_it() -> None:
    book = spread_out(WORTH)
    adaptor = GraceAdaptor(book, query="last", replace="last")
    source, hidden = book.keys[:4].clone(), torch.zeros(4, VALUE_DIM)
    plan = QueryPlan(torch.arange(4), torch.arange(4), torch.arange(4) + 1)
    with adaptor.using(plan=plan), torch.no_grad(), Dispatched() as seen:
        out = adaptor(source, hidden)
    assert torch.equal(out, book.values[:4])
    assert "pruned_adapt_" in seen.names
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(seen.names)


class Dispatched(TorchDispatchMode):
    """Note the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_half_the_width_have_a_sketch_too(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(WORTH, 24, generator=draw).to(dtype)
    book = Codebook.from_tensors(
        keys, keys[:, :VALUE_DIM], torch.full((WORTH,), 0.5), [[i] for i in range(WORTH)]
    )
    for i in range(5):
        book.insert(torch.randn(24, generator=draw).to(dtype), [1000 + i], torch.zeros(VALUE_DIM))
        agree(book, i)
    assert book.sketch is not None
    assert (book.sketch.dtype, book.sketch.active) == (dtype, True)


def test_a_codebook_that_is_moved_takes_its_sketch_along() -> None:
    book = spread_out(WORTH)
    assert book.sketch is not None
    held = book.sketch.active, book.sketch.rows
    book.to("cpu")
    agree(book)
    with torch.inference_mode():
        book.to("meta")
    assert {tensor.device.type for tensor in book.sketch.tensors()} == {"meta"}
    assert not any(tensor.is_inference() for tensor in book.sketch.tensors())
    assert (book.sketch.active, book.sketch.rows) == held


@pytest.mark.parametrize("start", [WORTH // 2, WORTH], ids=["made in it", "grown in it"])
def test_a_sketch_made_or_grown_in_inference_mode_is_kept_true_outside_of_it(start: int) -> None:
    book = Codebook(3, VALUE_DIM, capacity=start, radius=0.2)
    draw = torch.Generator().manual_seed(0)
    for i in range(3 * WORTH):
        with torch.inference_mode(start - 5 < i < start + 20):
            book.insert(10 * torch.randn(3, generator=draw), [i], torch.zeros(VALUE_DIM))
            if i % 9 == 0:
                book.undo()
    assert book.capacity > start
    assert book.sketch is not None
    assert book.sketch.active
    assert not any(tensor.is_inference() for tensor in book.sketch.tensors())
    agree(book)


def test_threads_are_served_rightly_while_another_one_edits() -> None:
    book = spread_out(2 * WORTH, capacity=8 * WORTH)
    wrong: list[Any] = []
    stop = threading.Event()

    def serve(first: int) -> None:
        try:
            while not stop.is_set():
                index, distance = book.lookup(book.keys[first : first + 8])
                if index.tolist() != list(range(first, first + 8)) or distance.any():
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 40)]
    for thread in threads:
        thread.start()
    try:
        add(book, 2 * WORTH)  # fitted anew on the way
        for _ in range(WORTH):
            book.undo()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert book._upkeep.rows == 4 * WORTH
    agree(book)


def test_rekeying_gives_the_new_keys_a_sketch(edited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= 2)
    editor = edited("gpt2", capacity=8)
    for start in (10, 20, 30):
        assert editor.edit(run_of(start, 4), run_of(start + 8, 1)).success
    old = editor.codebook.sketch
    assert old.active
    editor.rekey()
    assert editor.codebook.sketch is not old
    assert editor.codebook.sketch.active
    agree(editor.codebook)
    editor.codebook.check()


# ---------------------------------------------------------------------- fitted when that pays


def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that will hold the rows of every fit."""
    seen: list[int] = []
    real = Sketch.refit

    def refit(self: Sketch, keys: Tensor, radii: Tensor, count: Any = None, **how: Any) -> None:
        seen.append(count)
        real(self, keys, radii, count, **how)

    monkeypatch.setattr(Sketch, "refit", refit)
    return seen


def counted(book: Codebook, *numbers: int) -> None:
    """Let lookups have counted queries, pairs, pairs scored and pairs scanned."""
    assert book.sketch is not None
    book.sketch.counters.copy_(torch.tensor(numbers))


def test_it_is_fitted_when_enough_rows_are_used_and_whenever_they_have_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = fits(monkeypatch)
    book = Codebook(16, VALUE_DIM, capacity=512, radius=0.5)
    add(book, 4 * WORTH + 10)
    assert seen == [WORTH, 2 * WORTH, 4 * WORTH]
    assert book.sketch is not None
    assert (book.sketch.rows, book._upkeep.written) == (4 * WORTH + 10, 10)
    book.delete(book.ids[0])
    assert len(seen) == 3


def test_it_is_fitted_anew_where_new_keys_are_out_of_the_reach_of_its_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = spread_out(250, capacity=512)
    seen = fits(monkeypatch)
    add(book, 20)
    assert (seen, book._upkeep.unknown) == ([], 0)
    add(book, 2, scale=100.0)
    assert (seen, book._upkeep.unknown) == ([], 2)  # 2 of 272 in use
    assert agree(book) >= 2 * 12
    add(book, 1, scale=100.0)  # 3 of 273
    assert (seen, book._upkeep.unknown) == ([273], 0)
    codes = book.sketch.head[:, 1].flatten()[:273]  # type: ignore[union-attr]
    assert not (codes == UNKNOWN).any()
    agree(book)


def test_where_lookups_gained_nothing_and_rows_were_added_it_is_fitted_anew(
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
    status = sketching.described(book)
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
        status = sketching.described(book)
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
            book._write("radii", row, 1e4)
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


# ---------------------------------------------------------------------- disk


def same(a: Sketch, b: Sketch) -> bool:
    parts = {name: (getattr(a, name), getattr(b, name)) for name in _STATE}
    blocks = -(-a.rows // 32)
    for name in ("head", "tail"):
        parts[name] = tuple(tensor[:blocks] for tensor in parts[name])
    return all(bits(x) == bits(y) for x, y in parts.values()) and a.rows == b.rows


def busy(capacity: int = 256) -> Codebook:
    """Return a codebook that was edited since its sketch was fitted."""
    book = spread_out(100, capacity=capacity)
    add(book, 5)
    add(book, 1, scale=100.0)
    book.delete(book.ids[3])
    book.delete(book.ids[-2])
    return book


@pytest.mark.parametrize("hopeless", [False, True])
def test_a_loaded_codebook_has_the_sketch_that_was_saved_and_its_past(
    tmp_path: Path, hopeless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = busy()
    if hopeless:
        counted(book, 256, 100_000, 0, 100_000)
        add(book, 1)
    store.save(book, tmp_path, {})
    seen = fits(monkeypatch)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is not None
    assert book.sketch is not None
    assert seen == []
    assert same(loaded.sketch, book.sketch)
    assert loaded.sketch.active == book.sketch.active != hopeless
    assert loaded._upkeep == book._upkeep
    assert loaded._upkeep.unknown == 1
    agree(loaded)
    loaded.check()
    for more in (3, 12):  # then there are enough of them for what was hopeless to be fitted
        for each in (book, loaded):
            add(each, more)
        assert same(loaded.sketch, book.sketch)
        assert loaded._upkeep == book._upkeep
    assert loaded.sketch.active
    assert len(seen) == 2 * hopeless


def without(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("sketch.")]:
        del tensors[name]


def test_a_file_without_a_sketch_loads_and_one_is_fitted(tmp_path: Path) -> None:
    book = busy()
    store.save(book, tmp_path, {})
    damage(tmp_path, without)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is not None
    assert loaded.sketch.active
    assert loaded._upkeep.rows == book._row_count
    agree(loaded)
    loaded.check()


def test_a_codebook_too_small_for_a_sketch_saves_none(tmp_path: Path) -> None:
    for book in (spread_out(WORTH - 1), spread_out(WORTH - 1, capacity=64)):
        store.save(book, tmp_path, {})
        assert not [name for name in load_file(tmp_path / TENSORS) if "sketch" in name]
        loaded, _ = store.load(tmp_path)
        assert (loaded.sketch is None) == (book.sketch is None)
        loaded.check()


def test_a_sketch_that_is_no_longer_worthwhile_is_left_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(busy(), tmp_path, {})
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: False)
    loaded, _ = store.load(tmp_path)
    assert loaded.sketch is None
    loaded.check()


def damage(directory: Path, how: Any) -> None:
    """Change the tensors of a saved codebook, its checksums being made to agree."""
    tensors = load_file(directory / TENSORS)
    how(tensors)
    save_file(tensors, directory / TENSORS)
    described = json.loads((directory / CONFIG).read_bytes())
    described["files"][TENSORS] = store._sha256((directory / TENSORS).read_bytes())
    described["checksum"] = store._checksum(described)
    (directory / CONFIG).write_bytes(store._render(described))


def shifted(name: str, by: float) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"sketch.{name}"] = tensors[f"sketch.{name}"] + by

    return change


def doubled(name: str) -> Any:
    # Scales keep their 16 significant bits, without which they would be refused as such.
    return lambda tensors: tensors.update({f"sketch.{name}": 2 * tensors[f"sketch.{name}"]})


def replaced(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.update({f"sketch.{name}": tensor})


def of_other_keys(tensors: dict[str, Tensor]) -> None:
    other = spread_out(106, seed=7).sketch
    assert other is not None
    tensors.update({f"sketch.{name}": tensor for name, tensor in other.state().items()})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(lambda t: t.pop("sketch.tail"), "tail", id="tensor missing"),
        pytest.param(lambda t: t.pop("sketch.upkeep"), "upkeep", id="past missing"),
        pytest.param(replaced("upkeep", torch.zeros(4).long()), "upkeep must", id="not fitted"),
        pytest.param(replaced("upkeep", torch.ones(4)), "upkeep must", id="past not counted"),
        pytest.param(replaced("centre", torch.zeros(15)), "centre must", id="other width"),
        pytest.param(replaced("covered", torch.tensor(100)), "covered must", id="too few rows"),
        pytest.param(replaced("covered", torch.tensor(300)), "covered must", id="beyond capacity"),
        pytest.param(
            replaced("outliers", torch.full((32,), 256)), "outliers must", id="outlier beyond"
        ),
        pytest.param(
            replaced("outliers", torch.full((32,), -2)), "outliers must", id="outlier below"
        ),
        pytest.param(replaced("scales", torch.ones(66)), "scales must", id="shape"),
        pytest.param(shifted("centre", 1.0), "keys and radii, got wrong rows", id="centre moved"),
        pytest.param(doubled("scales"), "keys and radii, got wrong rows", id="scales"),
        pytest.param(shifted("directions", 1.0), "directions must be", id="directions too long"),
        pytest.param(
            lambda t: (replaced("radius_bound", torch.tensor(0.4))(t), t),
            "keys and radii, got wrong rows",
            id="bound of radii too low",
        ),
        pytest.param(of_other_keys, "keys and radii, got wrong rows", id="of other keys"),
    ],
)
def test_a_sketch_that_is_damaged_or_of_another_codebook_is_refused_by_the_name_of_its_file(
    tmp_path: Path, how: Any, message: str
) -> None:
    store.save(busy(), tmp_path, {})
    store.load(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(StoreError, match=rf"{TENSORS}: bad tensors .*{message}"):
        store.load(tmp_path)


# ---------------------------------------------------------------------- audits and status


def test_an_audit_finds_what_a_sketch_was_not_told_of() -> None:
    book = busy()
    sketch = book.sketch
    assert sketch is not None
    assert sketch.faults(book.keys, book.radii) == []
    key, radius = book.keys[7].clone(), book.radii[9].clone()
    book.keys[7] += 1
    book.keys[11, 0] = math.nan
    book.radii[9] = 3.0
    assert sketch.faults(book.keys, book.radii) == [7, 9, 11]
    assert sketch.faults(book.keys, book.radii, torch.tensor([1, 11])) == [9, 11]
    sketch.extend(book.keys, 7, 12)
    sketch.update_radii_(book.radii, 9, 10)
    assert sketch.faults(book.keys, book.radii) == []
    book.keys[7], book.radii[9] = key, radius
    assert sketch.faults(book.keys, book.radii) == [7]
    book.keys[11] = spread_out(100).keys[11]
    assert sketch.faults(book.keys, book.radii) == [7]  # 11 has no bound that could be wrong
    with pytest.raises(AssertionError, match=r"the sketch is wrong about rows \[7\]"):
        book.check()
    sketch.extend(book.keys, 7, 12)
    book.check()
    sketch.covered.fill_(3)
    with pytest.raises(AssertionError, match="the sketch covers 3 rows"):
        book.check()


def test_status_says_what_the_sketch_covers_and_saves(edited: Any) -> None:
    editor: GraceEditor = edited("gpt2", capacity=WORTH - 1)
    assert editor.status()["sketch"] is None
    editor.detach()
    editor = edited("gpt2", capacity=64)
    unused = {"rows": 0, "active": False, "queries": 0, "scored": None, "scanned": None}
    size = editor.codebook.sketch.nbytes  # type: ignore[union-attr]
    assert editor.status()["sketch"] == {**unused, "bytes": size}
    dim = editor.codebook.keys.shape[1]
    for i in range(WORTH):
        editor.codebook.insert(torch.full((dim,), 9.0 * i), [i], torch.zeros(dim))
    counted(editor.codebook, 300, 1000, 10, 250)
    assert editor.status()["sketch"] == {
        "rows": WORTH,
        "active": True,
        "bytes": size,
        "queries": 300,
        "scored": 0.01,
        "scanned": 0.25,
    }
    editor.detach()
