"""What every rank of four does for tests/ops/test_distributed.py: each case is a function.

One process for all of it imports torch and forks the ranks, which takes seconds less than four
interpreters. They find each other by a file and talk over the loopback interface.

    python tests/ops/sharded_ranks.py REPORT.json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import grace_kernels
from grace_kernels.distributed import ShardedCodebook, rebalance
from grace_kernels.testing import (
    INF,
    NAN,
    random_codebook,
    regimes,
    same_bits,
    swap_shows,
)

WORLD = 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Ranks:
    """The groups of 1 to 4 ranks that this rank is in, by size."""

    def __init__(self) -> None:
        made = {size: dist.new_group(list(range(size))) for size in range(1, WORLD + 1)}
        self.rank = dist.get_rank()
        self.mine = {size: group for size, group in made.items() if self.rank < size}


def values_for(keys: Tensor) -> Tensor:
    """Return values `[C, 3]`, some of them -0.0 and NaN, whose bits a sum of floats would lose."""
    generator = torch.Generator().manual_seed(len(keys))
    values = torch.randn(len(keys), 3, generator=generator).to(keys.dtype)
    values[::3, 0], values[::2, 1] = -0.0, NAN
    return values


def sharded(
    keys: Tensor, radii: Tensor, count: int | None, group: dist.ProcessGroup, **options: object
) -> ShardedCodebook:
    """Deal out the slots in use; what stands behind them no rank gets."""
    used = len(keys) if count is None else count
    values = values_for(keys)
    if used == 0:
        return ShardedCodebook(
            keys.shape[1], 3, len(keys), group=group, dtype=keys.dtype, **options
        )
    return ShardedCodebook.from_tensors(
        keys[:used], values[:used], radii[:used], capacity=len(keys), group=group, **options
    )


def check(book: ShardedCodebook, query: Tensor, keys: Tensor, radii: Tensor, count: int | None):
    """Compare both lookups with those of one device, to the bit."""
    for name in ("nearest", "lookup"):
        got = getattr(book, name)(query)
        wanted = getattr(grace_kernels, name)(query, keys, radii, count)
        for what, a, b in zip(("index", "distance"), got, wanted, strict=True):
            assert same_bits(a, b), (name, what, book.layout, a, b)


def check_adapt(
    book: ShardedCodebook, query: Tensor, keys: Tensor, radii: Tensor, count: int | None
) -> None:
    """Compare replaced rows, of which some overlap and some sequences do not ask."""
    batch = len(query)
    hidden = torch.arange(3.0 * (batch + 2)).view(-1, 3).to(keys.dtype)
    wanted, values = hidden.clone(), values_for(keys)
    row = torch.arange(batch)
    asks = torch.where(row % 4 == 3, -1, row)
    last = row + 1 + row % 2
    got = book.adapt_(hidden, query, asks, row, last)
    expected = grace_kernels.adapt_(wanted, query, asks, row, last, keys, radii, values, count)
    for a, b in zip((*got, hidden), (*expected, wanted), strict=True):
        assert same_bits(a, b), (book.layout, a, b)


def sketch_faults(book: ShardedCodebook) -> list[int]:
    """Return the rows that this rank's sketch is wrong about: to be asserted once all are done."""
    assert book.shard.sketch is not None
    assert book.shard.reaches is not None
    return book.shard.sketch.faults(book.shard.keys, book.shard.reaches)


def refused(message: str, call: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Check that a call is refused with a message that begins like this."""
    try:
        call(*args, **kwargs)
    except (TypeError, ValueError) as error:
        said = str(error)
    else:
        said = "nothing"
    assert said.startswith(message), f"{said}, and not: {message}"


def every_regime(group: dist.ProcessGroup, size: int, dtype: torch.dtype) -> None:
    """Shapes, ties, special values, dead slots, counts, no queries."""
    for number, case in enumerate(regimes(dtype)):
        if case.keys.shape[1] == 0:
            continue
        # Each dtype has each case on another number of ranks.
        if size != 1 + (number + DTYPES.index(dtype)) % WORLD:
            continue
        at = (case.query, case.keys, case.radii, case.count)
        book = sharded(*at[1:], group, block=1 + number % 3)
        try:
            check(book, *at)
            check_adapt(book, *at)
        except AssertionError as error:
            raise AssertionError(case.name) from error


def sketches(group: dist.ProcessGroup, size: int) -> None:
    """Sketches change no answer: entries in the way on another rank, outliers, dead slots, ties."""
    wrong = []
    for seed in range(45):
        case = random_codebook(seed)
        if size != 1 + seed % WORLD or len(case.keys) == 0:
            continue
        book = sharded(case.keys, case.radii, case.count, group, block=7, sketch=True)
        check(book, case.query, case.keys, case.radii, case.count)
        check_adapt(book, case.query, case.keys, case.radii, case.count)
        wrong += sketch_faults(book) if book.count else []
    assert wrong == []


def an_entry_on_another_rank_is_in_the_way(group: dist.ProcessGroup, size: int) -> None:
    """The nearest entry does not cover the query, a farther one on another rank would."""
    keys = torch.zeros(8, 40)
    keys[:, 0] = torch.tensor([1.0, 2, 50, 60, 70, 80, 90, 99])
    radii = torch.tensor([0.5, 9.0, 1, 1, 1, 1, 1, 1])
    query = torch.zeros(2, 40)
    query[1, 0] = 1.25
    for sketch in (False, True):
        book = sharded(keys, radii, None, group, block=1, sketch=sketch)
        assert book.lookup(query)[0].tolist() == [-1, 0]
        book.write_([0], radii=torch.tensor([0.25]))
        assert book.lookup(query)[0].tolist() == [-1, 0]
        book.delete_([0])
        assert book.lookup(query)[0].tolist() == [1, 1]


def equal_roots_of_different_squares(group: dist.ProcessGroup, size: int) -> None:
    """The distances tie, the squares do not: the later slot is nearest, on another rank."""
    for dtype in DTYPES:
        keys = torch.zeros(2, 40, dtype=dtype)
        keys[:, 0], keys[0, 1] = 1.0, 2.0**-11.5
        query = torch.zeros(1, 40, dtype=dtype)
        book = sharded(keys, torch.full((2,), 2.0), None, group, block=1)
        index, distance = book.lookup(query)
        assert (index.tolist(), distance.tolist()) == ([1], [1.0])
    for place in (2, 7):
        query, keys = swap_shows(torch.float32, place, 3)
        radii = torch.full((2,), INF)
        check(sharded(keys, radii, None, group, block=1), query, keys, radii, None)


def equal_keys(group: dist.ProcessGroup, size: int) -> None:
    """Of equal keys on several ranks the lowest slot answers, also when it is on the last one."""
    keys = torch.arange(9.0).expand(12, 9).contiguous()
    book = sharded(keys, torch.full((12,), -INF), None, group, block=1)
    for slot in (11, 6, 3, 2):
        book.write_([slot], radii=torch.ones(1))
        assert book.lookup(keys[:1])[0].tolist() == [slot]


def changes(group: dist.ProcessGroup, size: int) -> None:
    """A stream of writes, deletions and growth leaves what the same stream leaves on one device."""
    generator = torch.Generator().manual_seed(5)
    sketch, wrong = size in (2, 4), []
    dim, dtype = 24, DTYPES[size % 3]
    book = ShardedCodebook(dim, 3, 10, group=group, dtype=dtype, block=4, sketch=sketch)
    keys = torch.zeros(10, dim, dtype=dtype)
    values, radii = torch.zeros(10, 3, dtype=dtype), torch.full((10,), -INF)
    for step in range(30):
        if step % 8 == 7:
            more = len(keys) + 13
            keys = torch.cat([keys, keys.new_zeros(13, dim)])
            values = torch.cat([values, values.new_zeros(13, 3)])
            radii = torch.cat([radii, torch.full((13,), -INF)])
            book.grow(more)
        if step == 9:
            book.fit_sketch()
        n = 1 + step % 3
        slots = torch.randperm(min(len(keys), 4 + 2 * step), generator=generator)[:n].tolist()
        if step % 5 == 4:
            keys[slots], values[slots], radii[slots] = 0, 0, -INF
            book.delete_(slots)
        elif step % 5 == 3:
            radii[slots] = torch.tensor([NAN, 2.0, -1.0])[:n]
            book.write_(slots, radii=radii[slots])
        else:
            keys[slots] = torch.randn(n, dim, generator=generator).to(dtype)
            values[slots] = torch.randn(n, 3, generator=generator).to(dtype)
            radii[slots] = torch.rand(n, generator=generator) * step / 2  # beyond all before, later
            book.write_(slots, keys=keys[slots], values=values[slots], radii=radii[slots])
        query = torch.randn(5, dim, generator=generator).to(dtype)
        query[0], query[1] = keys[step % len(keys)], 0
        check(book, query, keys, radii, book.count)
        index, _ = book.lookup(query)
        got = book.values_at(index)
        assert same_bits(got, torch.where(index[:, None] >= 0, values[index], 0))
        wrong += sketch_faults(book) if sketch and step >= 9 else []
    assert wrong == []


def rebalancing(ranks: Ranks, before: int) -> None:
    """From one size of group to each: equal to the bit to what is made there at once."""
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(533, 16, generator=generator)
    radii = torch.rand(533, generator=generator) * 4
    radii[::7] = -INF
    query = torch.randn(6, 16, generator=generator)
    wrong = []
    for after in range(1, WORLD + 1):
        book = None
        if before in ranks.mine:
            book = sharded(keys, radii, 530, ranks.mine[before], block=3, sketch=after == 2)
        moved = rebalance(book, ranks.mine.get(after))
        if (moved is not None) != (after in ranks.mine):
            wrong.append(f"to {after} ranks: this one has {moved}")
        if moved is None:
            continue
        fresh = sharded(keys, radii, 530, ranks.mine[after], block=3, sketch=after == 2)
        try:  # and go on: the other ranks are not all in this group
            check(moved, query, keys, radii, 530)
            check_adapt(moved, query, keys, radii, 530)
            assert moved.form == fresh.form
            assert moved.layout.world == after
            for name in ("keys", "values", "radii"):
                assert same_bits(getattr(moved.shard, name), getattr(fresh.shard, name))
            assert (moved.shard.sketch is not None) == (after == 2)
        except AssertionError as error:
            wrong.append(f"to {after} ranks: {error!r}")
    assert wrong == []
    refused("book must be given", rebalance, None, ranks.mine.get(2))


def a_mesh_and_no_more_than_its_part(ranks: Ranks) -> None:
    """A mesh is taken for a group; each rank reads its own slots and holds its part of the rows."""
    mesh = init_device_mesh("cpu", (WORLD,))
    keys, radii = torch.randn(64, 8), torch.ones(64)
    asked = []

    def rows(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        asked.append((first, last))
        return keys[first:last], keys[first:last], radii[first:last]

    dist.broadcast(keys, 0)
    book = ShardedCodebook.from_rows(rows, 64, group=mesh, block=8)
    first = 8 * ranks.rank
    assert asked == [(0, 1), (first, first + 8), (first + 32, first + 40)]
    assert len(book.shard.keys) == 16
    assert book.nbytes == 16 * (8 * 4 * 2 + 4)
    check(book, keys[:9] + 0.01, keys, radii, None)
    whole = init_device_mesh("cpu", (2, 2))
    refused("group must be a mesh of 1 dimension, got 2", ShardedCodebook, 4, 4, 4, group=whole)


def different_arguments_are_refused(ranks: Ranks) -> None:
    """On every rank, so that none waits for the others."""
    refused("arguments must be the same on every rank", ShardedCodebook, 4, 4, 4 + ranks.rank)
    if 2 not in ranks.mine:
        others = dist.GroupMember.NON_GROUP_MEMBER
        refused("group must hold this rank, got one", ShardedCodebook, 4, 4, 4, group=others)


def wrong_arguments(ranks: Ranks) -> None:
    """Are refused by every rank before anything is sent or written."""
    keys, radii = torch.randn(8, 5), torch.ones(8)
    dist.broadcast(keys, 0)
    book = sharded(keys, radii, None, ranks.mine[WORLD], block=2)
    row, hidden = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3)
    asked, from_tensors = keys[:1].clone(), ShardedCodebook.from_tensors
    cases = (
        ("slots must lie in [0, 8), got 8", book.write_, ([8],), {"radii": radii[:1]}),
        ("slots must lie in [0, 8), got -1", book.delete_, ([-1],), {}),
        ("slots must be different ones, got [1, 1]", book.write_, ([1, 1],), {"radii": radii[:2]}),
        ("keys must have shape [1, 5], got [2, 5]", book.write_, ([1],), {"keys": keys[:2]}),
        ("keys must be torch.float32, got torch.f", book.write_, ([1],), {"keys": keys.half()}),
        ("radii must be a Tensor, got list", book.write_, ([1],), {"radii": [1.0]}),
        ("capacity must lie in [8, 2147483648), got 7", book.grow, (7,), {}),
        ("keys must have 4 columns like query", book.lookup, (torch.zeros(1, 4),), {}),
        ("keys must have the dtype of query", book.nearest, (asked.half(),), {}),
        (
            "query_row must be less than 1, got 3",
            book.adapt_,
            (hidden, asked, row + 3, row, row),
            {},
        ),
        ("last_row must lie in [0, 2], got 9", book.adapt_, (hidden, asked, row, row, row + 9), {}),
        ("values must have 2 columns", book.adapt_, (hidden[:, :2], asked, row, row, row), {}),
        ("key_dim must be at least 1, got 0", ShardedCodebook, (0, 1, 1), {}),
        ("capacity must lie in [0, 2147483648)", ShardedCodebook, (1, 1, 1 << 31), {}),
        ("dtype must be float32", ShardedCodebook, (1, 1, 1), {"dtype": torch.float64}),
        ("block must be at least 1, got 0", ShardedCodebook, (1, 1, 1), {"block": 0}),
        ("group must be a ProcessGroup or a DeviceMesh", ShardedCodebook, (1, 1, 1), {"group": 3}),
        ("radii must have 8 rows like keys", from_tensors, (keys, keys, radii[1:]), {}),
        ("capacity must be at least the", from_tensors, (keys, keys, radii), {"capacity": 5}),
    )
    for message, call, arguments, options in cases:
        refused(message, call, *arguments, **options)
    assert hidden.eq(0).all()
    check(book, keys, keys, radii, None)


def compiled(ranks: Ranks) -> None:
    """A compiled lookup has no graph break, and sees a write without being compiled anew."""
    keys, radii = torch.randn(40, 8), torch.ones(40)
    dist.broadcast(keys, 0)
    book = sharded(keys, radii, None, ranks.mine[WORLD], block=4)
    called = torch.compile(book.lookup, backend="eager", fullgraph=True)
    query = keys[5:9] + 0.01
    assert called(query)[0].tolist() == [5, 6, 7, 8]
    book.delete_([6])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert called(query)[0].tolist() == [5, -1, 7, 8]


def saves_are_the_same_on_every_rank(ranks: Ranks) -> None:
    """Or all ranks refuse them, and none is left waiting."""
    from grace_edit import Codebook
    from grace_edit.codebook import files, store
    from grace_edit.codebook.sharding import load_sharded

    last = ranks.rank == WORLD - 1
    with tempfile.TemporaryDirectory() as name:  # of its own: a file system that is behind
        book = Codebook(4, 2)
        for n in range(5):
            book.insert(torch.full((4,), 9.0 * n), [n], torch.full((2,), float(n)))
        store.save(book, name, {})
        read = load_sharded(name, block=2)
        assert read.lookup(book.keys[:5])[0].tolist() == [0, 1, 2, 3, 4]
        if last:
            book.delete(3)
            store.save(book, name, {})
        refused(f"{name}: must be the same save on every rank, got rank 0", load_sharded, name)
        if last:
            (Path(name) / files.CONFIG).unlink()
        said = f"{name}: must be read by every rank, got on rank 3: "
        refused(f"{name}/{files.CONFIG}: cannot" if last else said, load_sharded, name)


def within(case: Callable[..., None], *more: object) -> Callable[[Ranks, int], None]:
    """Return what runs a case in the group of each size; the ranks that are not in it wait."""

    def run_one(ranks: Ranks, size: int) -> None:
        if size in ranks.mine:
            case(ranks.mine[size], size, *more)

    return run_one


def together(case: Callable[[Ranks], None]) -> Callable[[Ranks, int], None]:
    """Return what runs a case once, on all ranks."""
    return lambda ranks, size: case(ranks) if size == WORLD else None


CASES: dict[str, Callable[[Ranks, int], None]] = {
    "regimes in float32": within(every_regime, torch.float32),
    "regimes in float16": within(every_regime, torch.float16),
    "regimes in bfloat16": within(every_regime, torch.bfloat16),
    "sketches": within(sketches),
    "an entry on another rank is in the way": within(an_entry_on_another_rank_is_in_the_way),
    "equal roots of different squares": within(equal_roots_of_different_squares),
    "equal keys": within(equal_keys),
    "changes": within(changes),
    "rebalancing": rebalancing,
    "a mesh, and no more than its part": together(a_mesh_and_no_more_than_its_part),
    "different arguments are refused": together(different_arguments_are_refused),
    "wrong arguments": together(wrong_arguments),
    "compiled": together(compiled),
    "saves are the same on every rank": together(saves_are_the_same_on_every_rank),
}


def run(rank: int, folder: Path, only: list[str]) -> None:
    """Run the cases as one of the ranks; write what went wrong, by case.

    What fails in a case fails on all ranks of its group alike, so none is left waiting.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240)
    )
    ranks, wrong = Ranks(), {}
    for name in only:
        wrong[name] = ""
        for size in range(1, WORLD + 1):
            try:
                CASES[name](ranks, size)
            except Exception:
                wrong[name] += f"On {size} ranks:\n{traceback.format_exc()}"
            dist.barrier()
        (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


def main(report: str, *only: str) -> None:
    """Fork the ranks, wait for them, and write what each of them met."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.compiler.reset()  # imports what compiles, once for all ranks
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        each = [
            fork.Process(target=run, args=(rank, folder, list(only or CASES)))
            for rank in range(WORLD)
        ]
        for process in each:
            process.start()
        for process in each:
            process.join()
        found = {
            rank: json.loads((folder / f"{rank}.json").read_text())
            for rank in range(WORLD)
            if (folder / f"{rank}.json").exists()
        }
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
