"""ShardedCodebook: keys, values and radii dealt out to the ranks of a process group.

A lookup takes one all-reduce of 8 bytes per query: each rank looks among its own keys, and the
least of the ranks' ballots (`ballots.py`) is the answer, with its distance and whether it is a hit,
on all of them. `adapt_` takes a second one, of the winners' values.

A MIN over packed numbers, not a gathering of everybody's pairs: the bytes do not grow with the
ranks, there is nothing left to compare afterwards, and no rank can come to another answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import api, reference
from ..sketch import worthwhile
from ..validation import KEY_DTYPES, VALUE_DTYPES, check_adapt
from . import ballots
from .arguments import check_rows, check_same, process_group
from .layout import Layout
from .shard import Shard

Rows = Callable[[int, int], Sequence[Any]]
BLOCK = 1024  # slots; megabytes to read or to send at once, and few compared with a shard


@dataclass(frozen=True)
class Form:
    """Sizes, dtypes and options of a codebook; see `ShardedCodebook`."""

    key_dim: int
    value_dim: int
    capacity: int
    dtype: torch.dtype
    value_dtype: torch.dtype
    block: int
    sketch: bool | None
    count: int


class ShardedCodebook:
    """A codebook over several ranks, which answers as `grace_kernels` does with all of it in one.

    Index, distance and replaced rows have the same bits at any number of ranks, ties included.
    Every rank of the group makes the same calls with the same arguments in the same order, as with
    the collectives of torch: the queries of a layer whose input all ranks have (tensor parallel),
    and the same changes. Arguments are checked before anything is sent, so what is refused is
    refused by all. Changes are made in place, and seen by compiled models and captured graphs,
    until `grow` takes new memory.

    Which rank holds a slot follows from its number, see `Layout`. Slots are those of the whole
    codebook everywhere.

    Args:
        key_dim, value_dim: D and V.
        capacity: slots there is memory for on all ranks together, less than 2^31.
        group: a process group or a DeviceMesh of one dimension, which must hold this rank; None:
            the default group.
        dtype: of keys and queries, float32, float16 or bfloat16.
        value_dtype: of values, if it differs; float64 too.
        device: of this rank.
        block: neighbouring slots that one rank holds before the next rank's turn.
        sketch: whether each rank keeps a `Sketch` of its keys, once `fit_sketch` is called; None:
            where it has slots enough for one to pay.

    Attributes:
        layout, rank: who holds what, and which rank of the group this one is.
        capacity, count: slots there is memory for, and in use, on all ranks together.
        shard: what this rank holds.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a size or dtype is wrong, the group does not hold this rank, or the ranks were
            given different arguments.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        capacity: int,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        dtype: torch.dtype = torch.float32,
        value_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        block: int = BLOCK,
        sketch: bool | None = None,
    ) -> None:
        value_dtype = value_dtype or dtype
        for name, size in (("key_dim", key_dim), ("value_dim", value_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= capacity < ballots.SLOTS:
            raise ValueError(f"capacity must lie in [0, {ballots.SLOTS}), got {capacity}")
        if dtype not in KEY_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        if value_dtype not in VALUE_DTYPES:
            raise ValueError(
                f"value_dtype must be float32, float16, bfloat16 or float64, got {value_dtype}"
            )
        self.group = process_group(group)
        self.layout = Layout(dist.get_world_size(self.group), block)
        self.rank = dist.get_rank(self.group)
        self.capacity = capacity
        self.count = 0
        self.wants_sketch = sketch
        self._largest = -math.inf  # no live radius is above it, NaN apart
        check_same(self.group, (key_dim, value_dim, capacity, dtype, value_dtype, block))
        rows = self.layout.rows(capacity, self.rank)
        self.shard = Shard(rows, key_dim, value_dim, dtype, value_dtype, torch.device(device))

    @classmethod
    def from_rows(
        cls, rows: Rows, count: int, *, capacity: int | None = None, **options: Any
    ) -> ShardedCodebook:
        """Make a codebook of entries that each rank reads for itself, a block at a time.

        Collective. No rank reads more than a block that is not its own.

        Args:
            rows: called with a first slot and a last slot + 1, returns their keys `[n, D]`, values
                `[n, V]` and radii `[n]` float32: slices of a file, say.
            count: how many entries there are; 1 at least.
            capacity: slots there is to be memory for; None: `count`.
            options: `group, device, block, sketch` as for the class.

        Raises:
            TypeError, ValueError: as the class, or a slice has a wrong shape or dtype.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        keys, values, _ = rows(0, 1)
        capacity = count if capacity is None else capacity
        if capacity < count:
            raise ValueError(f"capacity must be at least the count of {count}, got {capacity}")
        made = cls(
            keys.shape[1],
            values.shape[1],
            capacity,
            dtype=keys.dtype,
            value_dtype=values.dtype,
            **options,
        )
        check_same(made.group, (count,))
        shard = made.shard
        for owner, row, first, last in made.layout.blocks(count):
            if owner != made.rank:
                continue
            each = zip(
                ("keys", "values", "radii"),
                (shard.keys, shard.values, shard.radii),
                rows(first, last),
                strict=True,
            )
            for name, held, given in each:
                target = held[row : row + last - first]
                check_rows(f"rows({first}, {last}), its {name},", given, target)
                target.copy_(given)
        made.set_count(count)
        made.fit_sketch()
        return made

    @classmethod
    def from_tensors(
        cls, keys: Tensor, values: Tensor, radii: Tensor, **options: Any
    ) -> ShardedCodebook:
        """Make a codebook of tensors `[C, D]`, `[C, V]` and `[C]` float32, C at least 1.

        Collective. Each rank copies its own rows, so tensors that are mapped from a file are read
        in part. See `from_rows` for options and errors.

        Raises:
            ValueError: values or radii have another number of rows than keys.
        """
        for name, tensor in (("values", values), ("radii", radii)):
            if len(tensor) != len(keys):
                raise ValueError(f"{name} must have {len(keys)} rows like keys, got {len(tensor)}")
        return cls.from_rows(
            lambda first, last: (keys[first:last], values[first:last], radii[first:last]),
            len(keys),
            **options,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        shard = self.shard
        held = [shard.keys, shard.values, shard.radii]
        held += [] if shard.reaches is None else [shard.reaches]
        sketch = 0 if shard.sketch is None else shard.sketch.nbytes
        return sum(tensor.nbytes for tensor in held) + sketch

    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest live entry of each query, whatever its radius.

        Collective: one all-reduce of 8 B bytes.

        Args:
            query: `[B, D]`, the dtype of the keys, on this rank's device; the same on every rank.

        Returns:
            index: `[B]` int64, the slot; among exact ties the lowest; -1 where there is none.
            distance: `[B]` float32, +inf where there is none. Both as `grace_kernels.nearest`
            returns them on one device, to the bit, and the same on every rank.

        Raises:
            TypeError, ValueError: as `grace_kernels.nearest`.
        """
        slot, distance, _ = self._vote(query.detach(), self.shard.nearest(query))
        return slot, distance

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entry that answers each query: its nearest, if that entry's radius covers it.

        Collective: one all-reduce of 8 B bytes. Arguments and errors as for `nearest`.

        Returns:
            index: `[B]` int64, the slot that answers, -1 for a miss.
            distance: `[B]` float32, +inf for a miss. Both as `grace_kernels.lookup`.
        """
        slot, distance, hit = self._vote(query.detach(), self.shard.nearest_within_reach(query))
        return slot.masked_fill(~hit, -1), distance.masked_fill(~hit, math.inf)

    def _vote(self, query: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return slot, distance and hit of the nearest of all ranks' nearest rows (-1: none)."""
        shard = self.shard
        at = row.clamp(min=0)
        s = reference.paired_squared_distances(query, shard.keys[at])
        s = torch.where(s.isnan(), math.inf, s)
        hit = ballots.distance_of(s) <= shard.radii[at]
        ballot = ballots.cast(s, self.layout.slot(at, self.rank), hit, row >= 0)
        if len(ballot):
            dist.all_reduce(ballot, dist.ReduceOp.MIN, self.group)
        return ballots.read(ballot)

    def values_at(self, index: Tensor) -> Tensor:
        """Return the values of slots `[B]` int64, `[B, V]` with their own bits; zeros for -1.

        Collective: one all-reduce of B V elements. `index` is the same on every rank.
        """
        held = self.shard.values
        mine = (index >= 0) & (self.layout.owner(index) == self.rank)
        at = torch.where(mine, self.layout.row(index), 0)
        rows = torch.where(mine[:, None], held[at], 0)
        if rows.numel():
            # As bytes: all but one rank add zeros, and a sum of floats would lose the sign of -0.
            dist.all_reduce(rows.view(torch.uint8), dist.ReduceOp.SUM, self.group)
        return rows

    def adapt_(
        self, hidden: Tensor, source: Tensor, query_row: Tensor, first_row: Tensor, last_row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Replace rows of a layer's output, in place, where an entry answers the layer's input.

        Collective: an all-reduce of 8 B bytes and one of B V elements.

        Args:
            hidden: `[R, V]`, written to, the dtype of the values.
            source: `[S, D]`, the rows that ask, the dtype of the keys.
            query_row, first_row, last_row: `[B]` int64. All as for `grace_kernels.adapt_`, and the
                same on every rank.

        Returns:
            index, distance: `[B]`, as `lookup`; -1 and +inf where a sequence does not ask.

        Raises:
            TypeError, ValueError, RuntimeError: as `grace_kernels.adapt_`.
        """
        shard, rows = self.shard, (query_row, first_row, last_row)
        keys, radii, values = shard.keys, shard.radii, shard.values
        check_adapt(hidden, source, *rows, keys, radii, values, shard.count)
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            reference.check_rows(*rows, len(source), len(hidden))
        asks = (query_row >= 0) & (query_row < len(source))
        if len(source) == 0:  # nobody asks, and there is no row to take instead
            source = source.new_zeros(1, source.shape[1])
        index, distance = self.lookup(source[torch.where(asks, query_row, 0)])
        index, distance = index.masked_fill(~asks, -1), distance.masked_fill(~asks, math.inf)
        # The winners as a codebook of their own, with their numbers for keys: what writes them, and
        # where ranges overlap says whose rows stand, is the operator itself.
        each = torch.arange(len(index), device=index.device)
        number = each[:, None].float()
        cover = torch.where(index >= 0, 0.0, -math.inf)
        api.adapt_(
            hidden,
            number,
            torch.where(index >= 0, each, -1),
            first_row,
            last_row,
            number,
            cover,
            self.values_at(index),
        )
        return index, distance

    def write_(
        self,
        slots: Sequence[int],
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        radii: Tensor | None = None,
    ) -> None:
        """Write entries, or a part of them, into slots; a slot past `count` comes into use.

        Sends nothing. Slots that come into use and are not written to are dead.

        Args:
            slots: n different ones, less than `capacity`.
            keys, values, radii: `[n, D]`, `[n, V]` and `[n]` float32 in the dtypes of the codebook,
                on any device; the same on every rank. None: those of the slots stay. A new entry
                needs all three; a radius of -inf makes a slot dead.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing was written.
        """
        slots = [int(slot) for slot in slots]
        for slot in slots:
            if not 0 <= slot < self.capacity:
                raise ValueError(f"slots must lie in [0, {self.capacity}), got {slot}")
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots must be different ones, got {slots}")
        shard = self.shard
        given = {"keys": keys, "values": values, "radii": radii}
        for name, tensor in given.items():
            if tensor is not None:
                like = getattr(shard, name)
                check_rows(name, tensor, like[:1].expand(len(slots), *like.shape[1:]))
        if not slots:
            return
        if radii is not None:
            largest = radii.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max()
            if largest.item() > self._largest:
                self._set_largest(largest.item())
        mine = [n for n, slot in enumerate(slots) if self.layout.owner(slot) == self.rank]
        if max(slots) >= self.count:
            self.set_count(max(slots) + 1)
        if mine:
            parts = [None if tensor is None else tensor[mine] for tensor in given.values()]
            shard.write([self.layout.row(slots[n]) for n in mine], *parts)

    def delete_(self, slots: Sequence[int]) -> None:
        """Make slots dead and erase what they held. Sends nothing; errors as for `write_`.

        They stay in use, and may be written again.
        """
        shard, n = self.shard, len(slots)
        self.write_(slots, radii=torch.full((n,), -math.inf))
        self.write_(
            slots,
            keys=shard.keys.new_zeros(n, shard.keys.shape[1]),
            values=shard.values.new_zeros(n, shard.values.shape[1]),
        )

    def grow(self, capacity: int) -> None:
        """Take memory for more slots. Sends nothing. Captured graphs have to be captured anew.

        Raises:
            ValueError: `capacity` is less than it was, or 2^31 or more.
        """
        if not self.capacity <= capacity < ballots.SLOTS:
            raise ValueError(
                f"capacity must lie in [{self.capacity}, {ballots.SLOTS}), got {capacity}"
            )
        self.shard.grow(self.layout.rows(capacity, self.rank))
        self.capacity = capacity

    def fit_sketch(self) -> None:
        """Fit each rank's sketch to its keys as they are now, if it is to have one.

        Collective: one all-reduce of 4 bytes. A sketch is told of every change; it is worth fitting
        anew when the slots have doubled, or when large radii are gone: every rank's sketch leaves
        what the largest radius of the whole codebook reaches.
        """
        shard = self.shard
        live = shard.radii.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        largest = live.amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        shard.sketch = shard.reaches = None
        self._set_largest(largest.item())
        rows = self.layout.rows(self.count, self.rank)
        wanted = worthwhile(rows) if self.wants_sketch is None else self.wants_sketch
        if wanted:
            shard.fit_sketch(rows)

    @property
    def form(self) -> Form:
        """What there is to say about the codebook but for what it holds."""
        shard = self.shard
        return Form(
            shard.keys.shape[1],
            shard.values.shape[1],
            self.capacity,
            shard.keys.dtype,
            shard.values.dtype,
            self.layout.block,
            self.wants_sketch,
            self.count,
        )

    def set_count(self, count: int) -> None:
        """Let the first `count` slots be those in use, in place. Sends nothing."""
        self.count = count
        self.shard.set_count(self.layout.rows(count, self.rank))

    def _set_largest(self, largest: float) -> None:
        self._largest = largest
        self.shard.set_reach(largest)
