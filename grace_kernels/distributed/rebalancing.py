"""A codebook dealt out anew: to more ranks, or to fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .arguments import process_group
from .codebook import Form, ShardedCodebook
from .layout import Layout
from .shard import Shard

_AT_ONCE = 64  # blocks on their way per rank


def rebalance(
    book: ShardedCodebook | None,
    group: dist.ProcessGroup | DeviceMesh | None,
    *,
    over: dist.ProcessGroup | DeviceMesh | None = None,
    device: torch.device | str | None = None,
) -> ShardedCodebook | None:
    """Return a codebook dealt out to the ranks of another group: ranks join, or leave.

    Collective over `over`. Rows go straight from the rank that holds them to the one that will.
    What comes out depends on the codebook and the number of ranks alone. `book` stays as it was, so
    a rank needs memory for both until it lets `book` go.

    Args:
        book: None on a rank that has none yet.
        group: the new one; None on a rank that will not be in it.
        over: a group that holds the ranks of both; None: the default group.
        device: of this rank; None: that of `book`, or the CPU.

    Returns:
        The new codebook, with sketches fitted anew; None on a rank that is not in `group`.

    Raises:
        TypeError, ValueError: an argument is wrong, or no rank has a codebook.
    """
    everyone = process_group(over)
    target = None if group is None else process_group(group)
    plan = _Plan.agree(everyone, book, None if target is None else dist.get_rank(target))
    made, form = None, plan.form
    if target is not None:
        if device is None:
            device = "cpu" if book is None else book.shard.keys.device
        made = ShardedCodebook(
            form.key_dim,
            form.value_dim,
            form.capacity,
            group=target,
            dtype=form.dtype,
            value_dtype=form.value_dtype,
            device=device,
            block=form.block,
            sketch=form.sketch,
        )
    _move(plan, None if book is None else book.shard, None if made is None else made.shard)
    if made is not None:
        made.set_count(form.count)
        made.fit_sketch()
    return made


@dataclass(frozen=True)
class _Plan:
    """Who holds and who will hold the slots, as all ranks of a group agree on.

    Attributes:
        group: the ranks of both.
        form: of the codebook, as its ranks say.
        old, new: global ranks, in the order of the groups.
    """

    group: dist.ProcessGroup
    form: Form
    old: tuple[int, ...]
    new: tuple[int, ...]

    @classmethod
    def agree(
        cls, group: dist.ProcessGroup, book: ShardedCodebook | None, new_rank: int | None
    ) -> _Plan:
        """Collect what each rank holds, and which rank it will be.

        Raises:
            ValueError: no rank has a codebook, or they have different ones.
        """
        told: list[Any] = [None] * dist.get_world_size(group)
        mine = None if book is None else (book.rank, book.form)
        dist.all_gather_object(told, (dist.get_rank(), mine, new_rank), group)
        holders = sorted((held[0], at) for at, held, _ in told if held is not None)
        forms = [held[1] for _, held, _ in told if held is not None]
        if not forms:
            raise ValueError("book must be given on the ranks that hold it, got None on all")
        if any(form != forms[0] for form in forms):
            raise ValueError(f"book must be one on all ranks, got {forms}")
        takers = sorted((rank, at) for at, _, rank in told if rank is not None)
        old, new = tuple(at for _, at in holders), tuple(at for _, at in takers)
        return cls(group, forms[0], old, new)


def _move(plan: _Plan, source: Shard | None, target: Shard | None) -> None:
    """Send this rank's rows to their new owners, from `source`, and take its own to `target`."""
    if not plan.new:
        return
    me, form = dist.get_rank(), plan.form
    old, new = Layout(len(plan.old), form.block), Layout(len(plan.new), form.block)
    waiting: list[dist.P2POp] = []
    # Windows of blocks are the same on every rank, so each send finds its receiver.
    window = _AT_ONCE * max(old.world, new.world)
    for number, (owner, row, first, last) in enumerate(old.blocks(form.count)):
        if number % window == 0:
            _finish(waiting)
        giver, taker = plan.old[owner], plan.new[new.owner(first)]
        size, there = last - first, new.row(first)
        for name in ("keys", "values", "radii"):
            given = getattr(source, name)[row : row + size] if me == giver else None
            taken = getattr(target, name)[there : there + size] if me == taker else None
            if given is not None and taken is not None:
                taken.copy_(given)
            elif given is not None:
                waiting.append(dist.P2POp(dist.isend, given, taker, plan.group))
            elif taken is not None:
                waiting.append(dist.P2POp(dist.irecv, taken, giver, plan.group))
    _finish(waiting)


def _finish(waiting: list[dist.P2POp]) -> None:
    if waiting:
        for work in dist.batch_isend_irecv(waiting):
            work.wait()
    waiting.clear()
