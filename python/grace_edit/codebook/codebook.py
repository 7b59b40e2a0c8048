"""The codebook: entries that answer queries, the edits they answer for, and every change to them.

An edit is made in two steps, so that a model can be asked in between and none is needed here:
`propose` decides and changes nothing, `commit` does it as one transaction. `insert` is both. After
every change of the default policy the query of every live edit hits an entry of that edit's label.

The method is that of Hartvigsen et al., "Aging with GRACE" (NeurIPS 2023, arXiv 2211.11031).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grace_kernels import lookup

from . import audit, importing, planning, replay
from . import policy as rules
from . import sketch_upkeep as sketching
from .records import Edit, EditResult, Label, Proposal
from .retention import Answers, Retention

_KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Codebook(Retention):
    """Keys, values and radii with the edits they answer for.

    Tensors that a lookup reads, all on one device: `keys [C, D]`, `values [C, V]`, `radii [C]`
    float32 (-inf: dead) and `count`, an int64 scalar: rows `0..count-1` are in use, dead ones among
    them included. Every change within the capacity C is written into these same tensors, so a
    compiled model or a captured graph reads it at its next run. C doubles when it is exceeded,
    which (like taking that back) replaces the tensors and, on CUDA, warns that captured graphs must
    be captured again; while `frozen` is True it raises CapacityError instead. Dead rows are reused,
    the lowest first, and hold zeros. `version` goes up with every change, undoing included, and
    never down.

    `sketch` is a `grace_kernels.Sketch` of the keys, with which lookups read fewer of them, or None
    where the capacity is too small for one to pay. It is kept true by every change and answers
    nothing by itself. Fitting it to a large codebook takes seconds, within the change that makes it
    worthwhile; see `grace_edit.codebook.sketch_upkeep`.

    One thread may change a codebook while others serve from it: each of `commit`, `delete` and
    `undo` is a single step to an uncompiled lookup, which waits for its end. A compiled model or a
    captured graph has no such lock: edit between its calls, on the CUDA stream that it runs on or
    after waiting for it.

    Args:
        key_dim, value_dim: D and V.
        radius: of a new entry, the method's one hyperparameter; in the units of the keys.
        policy: "default", or "paper" for the decisions of the code published with the paper.
        capacity: rows to start with.
        dtype: of keys and queries: float32, float16 or bfloat16.
        value_dtype: of values; None means `dtype`.
        drift: how far the query of one prompt moves between batches.
        max_radius: to which an entry may grow; None means 3 * radius.
        device: where the tensors are. Stored queries stay on the host.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        *,
        radius: float = 1.0,
        policy: str = rules.DEFAULT,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
        value_dtype: torch.dtype | None = None,
        drift: float = 0.0,
        max_radius: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (
            ("key_dim", key_dim),
            ("value_dim", value_dim),
            ("capacity", capacity),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius must be positive and finite, got {radius}")
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"drift must be finite and not negative, got {drift}")
        if max_radius is not None and not max_radius > 0:
            raise ValueError(f"max_radius must be positive, got {max_radius}")
        if policy not in rules.POLICIES:
            raise ValueError(f"policy must be one of {', '.join(rules.POLICIES)}, got {policy}")
        if dtype not in _KEY_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        value_dtype = value_dtype or dtype
        if not value_dtype.is_floating_point:
            raise ValueError(f"value_dtype must be a floating point type, got {value_dtype}")
        super().__init__(key_dim, value_dim, capacity, dtype, value_dtype, device)
        self.policy = policy
        self.radius = rules.fp32(radius)
        self.drift = rules.fp32(drift)
        self.max_radius = rules.fp32(3.0 * self.radius if max_radius is None else max_radius)

    # ------------------------------------------------------------------ reading

    @property
    def capacity(self) -> int:
        """Number of rows allocated."""
        return len(self.radii)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.radii.device

    @property
    def entries(self) -> int:
        """Number of live entries."""
        return self._row_count - len(self._holes)

    @property
    def edits(self) -> int:
        """Number of live edits."""
        return self._live_edits

    @property
    def ids(self) -> list[int]:
        """The ids of the live edits, ascending."""
        imported = [i for i in range(len(self._imported_labels)) if i not in self._edits]
        return sorted(imported + [e.id for e in self._edits.values() if e is not None and e.live])

    @property
    def history(self) -> list[Edit]:
        """Every edit that was not purged, superseded and deleted ones included, by id."""
        numbers = sorted({*range(len(self._imported_labels)), *self._edits})
        return [self._edit(i) for i in numbers if self._edits.get(i, True) is not None]

    @property
    def labels(self) -> list[Label | None]:
        """The label of each row in use; None for a dead one."""
        entries = (self._entry(slot) for slot in range(self._row_count))
        return [None if entry is None else entry.label for entry in entries]

    def edit(self, id: int) -> Edit:
        """Return the edit of the history with this id.

        Raises:
            KeyError: there is none, or it was purged.
        """
        return self._edit(id)

    def query_of(self, id: int) -> Tensor:
        """Return a copy, `[D]` on the host, of the stored query of an edit of the history.

        Raises:
            KeyError: the id is unknown.
        """
        return self._stored_query(self._edit(id)).detach().cpu().clone()

    def members(self, slot: int) -> tuple[int, ...]:
        """Return the ids of the edits that a row answers for, ascending; none for a dead row."""
        entry = self._entry(slot)
        return () if entry is None else entry.members

    def edit_of_slot(self, slot: int) -> Edit:
        """Return the edit whose query is the key of a live row.

        Raises:
            KeyError: the row is dead or not in use.
        """
        entry = self._entry(slot)
        if entry is None:
            raise KeyError(f"slot must hold a live entry, got {slot}")
        return self._edit(entry.owner)

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entry that answers each query: `[B, D]` -> (`[B]` int64, `[B]` float32).

        A miss is index -1 and distance +inf. See `grace_kernels.lookup`.
        """
        with self.lock:
            return lookup(query, self.keys, self.radii, self._row_count, sketch=self.sketch)

    def nearest_two(self, query: Tensor) -> list[tuple[int, float]]:
        """Return slot and distance of the nearest entry to `[D]` and of the runner-up.

        Whatever their radii; fewer than two where there are fewer entries.
        """
        query = planning.check_query(self, query)
        found: list[tuple[int, float]] = []
        radii = self.radii[: self._row_count].clone()
        for _ in range(2):
            slot, distance = self._nearest(query, radii)
            if slot >= 0:
                found.append((slot, distance))
                radii[slot] = -math.inf
        return found

    # ------------------------------------------------------------------ making an edit

    def propose(
        self,
        query: Tensor,
        label: Sequence[int] | Tensor,
        prompt: Sequence[int] | None = None,
        *,
        own_entry: bool = False,
    ) -> Proposal:
        """Decide what an edit would do; nothing changes.

        A live edit with the same prompt, or else with the same query (0 and -0 being the same), is
        superseded and its stored query used instead of `query`. Its entry stays where it is: the
        decision is taken against the codebook as it stands, and an edit that comes back with
        another label meets its old entry at distance 0, which is the case "update".

        Args:
            query: `[D]`, finite, of the dtype of the keys.
            label: the target's ids, or one class. With the policy "paper" the label tensor as the
                published code sees it, -100s included.
            prompt: the prompt's ids, if known.
            own_entry: give the edit an entry of its own, at most half way to the nearest entry of
                another label, although an existing one would take it; for an edit that its value
                could not satisfy. At distance 0 the entry there takes the edit's value.

        Returns:
            The proposal, good for `commit` until the next change.

        Raises:
            TypeError, ValueError: an argument is of a wrong type, shape, dtype or value.
        """
        return planning.propose(self, query, label, prompt, own_entry)

    def commit(
        self,
        proposal: Proposal,
        value: Tensor | None,
        *,
        answers: Answers | None = None,
    ) -> EditResult:
        """Do what `proposal` says, then give each live edit that lost its label its own entry.

        Args:
            proposal: made by `propose` since the last change.
            value: `[V]`, cast to the dtype of the values. It must answer the new edit and, where
                the case is expand or absorb, every one of `proposal.members` (trained together); it
                then replaces the entry's. None leaves that value, which must answer the new edit.
            answers: called with an edit and a slot, where the entry that answers a live edit has
                changed to one of the same label whose value was not seen to answer it; False gives
                that edit an entry of its own with the value that answered it before. It may look at
                the codebook, not change it. None: for edits made with None an equal label is
                enough, others get an entry of their own.

        Returns:
            The result, with a new id.

        Raises:
            ValueError: the proposal is stale, or `value` is missing, misshapen or not finite.
            CapacityError: the codebook is frozen and full.
            Any exception, also of `answers`, leaves the codebook as it was, to the bit.
        """
        if proposal.version != self.version:
            raise ValueError(
                f"proposal must be of the codebook's version {self.version}, got {proposal.version}"
            )
        if value is not None:
            value = planning.check_value(self, value)
        elif proposal.slot < 0 or proposal.case == "update":
            raise ValueError(f"value must be a tensor for the case {proposal.case}, got None")
        with self.lock, self.transaction():
            held = self._entry(proposal.slot)
            stamp = held.stamp if held is not None and value is None else self._next_stamp
            new = Edit(
                id=self._next_id,
                label=proposal.label,
                prompt=proposal.prompt,
                row=self._new_query_row(proposal.query, self._next_id),
                slot=-1,
                stamp=stamp,
                verified=None if answers is None else frozenset({stamp}),
                result=EditResult(
                    None, proposal.case, None, proposal.neighbour, proposal.distance, None, None
                ),
            )
            affected = self._apply(proposal, new, value)
            fragile = self._repair(affected, answers, new.id) or proposal.fragile
            new = self._edit(new.id)
            result = EditResult(
                id=new.id,
                case=proposal.case,
                slot=new.slot,
                neighbour=proposal.neighbour,
                distance=proposal.distance,
                radius_before=proposal.radius_before,
                radius_after=proposal.radius_after,
                fragile=fragile,
            )
            self._put("_edits", new.id, replace(new, result=result))
            self._prune_pool()
            self._bump()
            sketching.settle(self)
            self._next_id += 1
            self._next_stamp += value is not None
        return result

    def record(self, result: EditResult) -> None:
        """Keep a result in the history in place of the one that `commit` returned for this edit.

        For what only the caller knows of an edit: losses, steps, reason. Part of the same step of
        undo when called in the transaction of the `commit`; `version` stays.

        Raises:
            KeyError: the id is unknown.
        """
        if result.id is None:
            raise KeyError("id must be that of an edit in the history, got None")
        with self.lock, self.transaction():
            self._put("_edits", result.id, replace(self._edit(result.id), result=result))

    def insert(
        self,
        query: Tensor,
        label: Sequence[int] | Tensor,
        value: Tensor,
        prompt: Sequence[int] | None = None,
    ) -> EditResult:
        """Make an edit whose value is given, without a model: `propose`, then `commit`.

        An edit that is expanded or absorbed into an entry with other members is answered by that
        entry's value; `value` is not used then, as nothing says that it would answer the others.

        Args and raises: as `propose` and `commit`; `value` must be a tensor.
        """
        value = planning.check_value(self, value)
        proposal = self.propose(query, label, prompt)
        shared = proposal.case in ("expand", "absorb") and bool(proposal.members)
        return self.commit(proposal, None if shared else value)

    # ------------------------------------------------------------------ taking back

    def delete(self, id: int, purge: bool = False) -> None:
        """Take an edit back, as if it had never been made.

        The decisions over the remaining history are taken again in order, with the stored queries
        and without a model: keys, radii, labels and members become what a new codebook fed the
        remaining edits would have, up to the order of the rows. Edits that this one superseded come
        back. An entry takes the value that answers its edit now; a member for which that value was
        not verified gets an entry of its own. Freed rows are zeroed. Costs about as much as making
        all the edits again without training.

        Args:
            id: of a live or superseded edit; with `purge` also of one deleted before.
            purge: also erase it (prompt, label, query) from the history and end the undo there.

        Raises:
            KeyError: the id is unknown.
        """
        with self.lock:
            replay.delete(self, id, purge)

    # ------------------------------------------------------------------ whole codebooks

    @classmethod
    def from_tensors(
        cls,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Sequence[int]],
        *,
        radius: float = 1.0,
        policy: str = rules.DEFAULT,
        capacity: int | None = None,
        drift: float = 0.0,
        max_radius: float | None = None,
    ) -> Codebook:
        """Return a codebook of given entries, millions at once; row i is edit i.

        Later edits and deletions find these rows as they are given: no decision made them, so none
        is replayed for them.

        Args:
            keys: `[N, D]` float32, float16 or bfloat16, finite and, by default policy, distinct.
            values: `[N, V]`, finite, on the same device.
            radii: `[N]` float32; by default policy not negative, so that each key answers itself.
            labels: N labels.
            radius, policy, drift, max_radius: as for a new codebook.
            capacity: rows to allocate; None means N.

        Raises:
            ValueError: a shape, dtype or value is not as said.
        """
        count = len(keys)
        if keys.ndim != 2 or values.ndim != 2 or radii.ndim != 1:
            shapes = [list(t.shape) for t in (keys, values, radii)]
            raise ValueError(f"keys, values and radii must be [N, D], [N, V] and [N], got {shapes}")
        if not len(values) == len(radii) == len(labels) == count:
            sizes = f"{count}, {len(values)}, {len(radii)} and {len(labels)}"
            raise ValueError(f"keys, values, radii and labels must agree in length, got {sizes}")
        if radii.dtype != torch.float32:
            raise ValueError(f"radii must be float32, got {radii.dtype}")
        if capacity is not None and capacity < count:
            raise ValueError(f"capacity must be at least {count}, got {capacity}")
        book = cls(
            keys.shape[1],
            values.shape[1],
            radius=radius,
            policy=policy,
            capacity=max(1, count) if capacity is None else capacity,
            dtype=keys.dtype,
            value_dtype=values.dtype,
            drift=drift,
            max_radius=max_radius,
            device=keys.device,
        )
        importing.fill(book, keys.detach(), values.detach(), radii.detach(), labels)
        return book

    def to(self, device: torch.device | str) -> Codebook:
        """Move the tensors to `device`, to the bit, and return this codebook.

        Stored queries stay on the host. Dtypes never change.
        """
        names = ("keys", "values", "radii", "count", "_label_ids")
        with self.lock, torch.inference_mode(False):
            moved = {name: getattr(self, name).to(device) for name in names}
            sketch = None if self.sketch is None else self.sketch.to(device)
            vars(self).update(moved, sketch=sketch)
        return self

    def number_from(self, id: int) -> None:
        """Give the next edit this id, the one after it the next, and so on.

        Raises:
            ValueError: the id has been given already, or a later one.
        """
        if id < self._next_id:
            raise ValueError(f"id must be at least {self._next_id}, got {id}")
        self._next_id = id

    def succeed(self, old: Codebook, reason: str) -> None:
        """Take the place of another codebook: go on with its ids and its `version`.

        Nothing that was done before can be undone.

        Args:
            old: the codebook that this one replaces.
            reason: what happened, for the error of `undo`: "the editor was rekeyed".
        """
        self._next_id = max(self._next_id, old._next_id)
        self.version = old.version + 1
        self._undo.clear()
        self._undo_end = reason

    def describe_sketch(self) -> dict[str, Any] | None:
        """Return the state of the sketch for a person, None where there is none.

        `rows` in use that lookups use it for, `active`, `bytes`; of `queries` since the fit, the
        shares of pairs that were `scored` one by one and `scanned` as without a sketch, None before
        the first.
        """
        return sketching.described(self)

    def check(self) -> None:
        """Verify everything a codebook promises, the retention of every live edit first of all.

        For tests: it looks every stored query up.

        Raises:
            AssertionError: naming what does not hold.
        """
        audit.check(self)
