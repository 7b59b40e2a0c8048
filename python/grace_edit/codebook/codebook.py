"""The codebook: entries that answer queries, the edits they answer for, and every change to them.

An edit is made in two steps, so that a model can be asked in between and none is needed here:
`propose` decides and changes nothing, `commit` does it as one transaction. `insert` is both. After
every change of the default policy the query of every live edit hits an entry of that edit's label.

The method is that of Hartvigsen et al., "Aging with GRACE" (NeurIPS 2023, arXiv 2211.11031).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from . import audit, deletion, expiry, importing, past, planning, requerying, retention
from . import policy as rules
from .contents import Contents
from .records import EditResult, Proposal
from .retention import Answers
from .settings import Settings
from .storage import Storage


class Codebook(Contents):
    """Keys, values and radii with the edits they answer for.

    Tensors that a lookup reads, all on one device: `keys [C, D]`, `values [C, V]`, `radii [C]`
    float32 (-inf: dead) and `count`, an int64 scalar: slots `0..count-1` are in use, dead ones
    among them included. Every change within the capacity C is written into these same tensors, so a
    compiled model or a captured graph reads it at its next run. C doubles when it is exceeded,
    which (like taking that back) replaces the tensors and, on CUDA, warns that captured graphs must
    be captured again; while `frozen` is True it raises CapacityError instead. Dead slots are
    reused, the lowest first, and hold zeros. `version` goes up with every change, undoing included,
    and never down.

    `sketch` is a `grace_kernels.Sketch` of the keys, with which lookups read fewer of them, or None
    where the capacity is too small for one to pay. It is kept true by every change and answers
    nothing by itself. Fitting it to a large codebook takes seconds, within the change that makes it
    worthwhile; see `grace_edit.codebook.sketch_upkeep`.

    Threads may change a codebook while others serve from it. Changes wait for each other: a
    transaction belongs to the thread that opened it, and whatever another thread has been told is
    done stays done. Lookups do not wait for that: each of `commit`, `delete` and `undo` is a single
    step to an uncompiled lookup, which waits for the end of this step alone. A compiled model or a
    captured graph has no such lock: edit between its calls, on the CUDA stream that it runs on or
    after waiting for it.

    Args:
        key_dim, value_dim: D and V.
        radius: of a new entry, the method's one hyperparameter; in the units of the keys.
        policy: "default"; "nearest" for keys whose balls overlap (made from text): every edit has
            an entry of its own with the full radius, and the nearest decides; or "paper" for the
            decisions of the code published with the paper.
        capacity: slots to start with.
        dtype: of keys and queries: float32, float16 or bfloat16.
        value_dtype: of values; None means `dtype`.
        drift: how far the query of one prompt moves between batches.
        max_radius: to which an entry may grow; None means 3 * radius.
        autocast: the dtype of `torch.autocast` under which queries move by no more than `drift`
            too; None: there it may be more.
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
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        settings = Settings.checked(policy, radius, drift, max_radius, autocast)
        sizes = (key_dim, value_dim, capacity)
        self.storage = Storage(*sizes, dtype, value_dtype or dtype, device, settings)

    def propose(
        self,
        query: Tensor,
        label: Sequence[int] | Tensor,
        prompt: Sequence[int] | None = None,
        *,
        own_entry: bool = False,
        radius: float | None = None,
        part_of: int | None = None,
        negatives: Sequence[Sequence[int]] = (),
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
            radius: of the entry it gets, at most; None: the codebook's. An edit that is given one
                has an entry of its own, which does not grow later.
            part_of: the edit made last, of which this is a further key: a paraphrase with the same
                label. They have one id, that of the edit, and are superseded and deleted together.
                Wrap `commit` of all of them in one `transaction` to have one step of undo.
            negatives: prompts that the edit must not answer, kept with it; `radius` sees to it.

        Returns:
            The proposal, good for `commit` until the next change. Where other threads change the
            codebook too, do both inside one `transaction`.

        Raises:
            TypeError, ValueError: an argument is of a wrong type, shape, dtype or value.
        """
        checked = planning.check_radius(radius)
        with self.lock:
            proposal = planning.propose(
                self.storage, query, label, prompt, own_entry, checked, part_of, negatives
            )
            if part_of is not None:
                planning.check_part(self.storage, proposal)
            return proposal

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
        with self.changing() as storage:
            if proposal.version != storage.version:
                raise ValueError(
                    f"cannot commit: the codebook has changed since the proposal was made (version "
                    f"{proposal.version}, now {storage.version}); propose the edit again"
                )
            if value is not None:
                value = planning.check_value(value, storage.slots.values)
            elif proposal.slot < 0 or proposal.case == "update":
                raise ValueError(f"value must be a tensor for the case {proposal.case}, got None")
            with storage.change():
                result = retention.commit(storage, proposal, value, answers)
                if result.id is not None and proposal.part_of is None:
                    storage.hits.note_made(result.id)
                return result

    @contextmanager
    def changing(self) -> Iterator[Storage]:
        """Let no other thread change the codebook inside a `with` block, whose turn is waited for.

        Every change does this by itself; it may be nested. Lookups do not wait.

        Yields:
            The storage, which `take_over` may have exchanged while another thread was waited for.
        """
        with self.storage.changing:
            yield self.storage

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Group what is done inside into one step of undo, all of it or nothing.

        Any exception, KeyboardInterrupt included, restores everything to the bit (`version`, which
        only goes up, and the numbering of ids apart) and is raised on. Transactions nest: an inner
        one that fails takes back its own part only. Those of other threads are waited for.
        """
        with self.changing() as storage, storage.transaction():
            yield

    def record(self, result: EditResult) -> None:
        """Keep a result in the history in place of the one that `commit` returned for this edit.

        For what only the caller knows of an edit: losses, steps, reason. Part of the same step of
        undo when called in the transaction of the `commit`; `version` stays.

        Raises:
            KeyError: the id is unknown.
        """
        if result.id is None:
            raise KeyError("id must be that of an edit in the history, got None")
        with self.changing() as storage, storage.change():
            storage.put_edit(replace(storage.edit(result.id), result=result))

    def insert(
        self,
        query: Tensor,
        label: Sequence[int] | Tensor,
        value: Tensor,
        prompt: Sequence[int] | None = None,
        *,
        radius: float | None = None,
        part_of: int | None = None,
    ) -> EditResult:
        """Make an edit whose value is given, without a model: `propose`, then `commit`.

        An edit that is expanded or absorbed into an entry with other members is answered by that
        entry's value; `value` is not used then, as nothing says that it would answer the others.

        Args and raises: as `propose` and `commit`; `value` must be a tensor.
        """
        with self.changing():
            value = planning.check_value(value, self.values)
            proposal = self.propose(query, label, prompt, radius=radius, part_of=part_of)
            shared = proposal.case in ("expand", "absorb") and bool(proposal.members)
            return self.commit(proposal, None if shared else value)

    def delete(self, id: int, purge: bool = False) -> None:
        """Take an edit back with all its keys, as if it had never been made.

        The decisions that this one can have touched are taken again in order, with the stored
        queries and without a model: keys, radii, labels and members become what a new codebook fed
        the remaining edits would have, up to the order of the slots. Edits that this one superseded
        come back. An entry takes the value that answers its edit now; a member for which that value
        was not verified gets an entry of its own. Freed slots are zeroed. Edits too far away to be
        concerned keep what they have. Costs a pass over the stored queries for each step from
        neighbour to neighbour, and making again the edits found so, without training: all of them
        where most are near each other, for which their queries are multiplied with each other.
        Where entries are at exactly equal distances, where most edits are near each other and some
        were imported, and with the policy "paper", each is looked up and made in its turn instead,
        which takes several times as long, and lookups wait for it.

        Args:
            id: of a live or superseded edit; with `purge` also of one deleted before.
            purge: also erase it (prompt, label, query) from the history and end the undo there.

        Raises:
            KeyError: the id is unknown, or that of a part.
        """
        with self.changing() as storage:
            deletion.delete(storage, [id], purge)

    def delete_all(self, ids: Sequence[int], purge: bool = False) -> None:
        """Take several edits back as `delete` takes one, all or none, as one step of undo.

        What they touched is decided again once, not once for each. So keys, radii and labels are
        those after deleting them one by one, while an entry may keep another value of its label.

        Raises:
            KeyError: as `delete`, for any of them.
        """
        with self.changing() as storage:
            deletion.delete(storage, ids, purge)

    def expire(
        self, unused_for: float, keep: Collection[int] = (), *, dry_run: bool = False
    ) -> list[int]:
        """Delete the edits that answered nobody for long, as one step of undo.

        Those that they superseded go with them: what is out of use must not bring back what is out
        of date. An edit that was never used counts from its making, or from when counting began.

        Args:
            unused_for: seconds of the wall clock.
            keep: ids of edits that stay.
            dry_run: say which would go, and change nothing.

        Returns:
            The ids of the deleted edits, ascending.

        Raises:
            ValueError: hits are not counted (`count_hits`), or `unused_for` is negative or NaN.
            KeyError: an id to keep is unknown.
        """
        with self.changing() as storage:
            return expiry.expire(storage, unused_for, keep, dry_run=dry_run)

    @property
    def last_hit(self) -> dict[int, int | None] | None:
        """When each live edit's entries last answered, in seconds since 1970, by id ascending.

        None for an edit that never did; None instead of all where nothing is counted, see
        `count_hits`. Saved, shared and not part of `undo` as `hits` are. Waits for the device.
        """
        with self.lock:
            return expiry.last_hits(self.storage)

    def requery(self, queries: Mapping[int, tuple[Tensor, float | None]]) -> None:
        """Give edits other queries, as if they had been made with these.

        All decisions are taken again in order, without a model: afterwards the codebook is what the
        history gives with the new queries, up to the order of the slots. Each edit keeps its id and
        the value that answers it. Edits whose queries are equal then supersede each other.

        Args:
            queries: by the id of an edit, or of a part, its query `[D]` and the radius of its new
                entry (None: the codebook's).

        Raises:
            KeyError: an id is unknown, or that of an edit without a stored prompt.
            TypeError, ValueError: a query or a radius is not one.
        """
        with self.changing() as storage:
            requerying.requery(storage, queries)

    def take_turns_with(self, other: Codebook) -> None:
        """Let changes of this codebook and of another one wait for each other from now on.

        To be called before another thread knows this one.
        """
        self.storage.changing = other.storage.changing

    def compact(self, keep: int = 0) -> int:
        """Forget deleted and superseded edits, with all that only they need, and the undo.

        A forgotten edit is gone as if purged: its record, query and value. One that was superseded
        does not come back when the edit that superseded it is deleted, and `history` does not name
        it. What is served does not change. By the default policy a later `delete` takes the
        decisions again without the forgotten edits, so an entry that one of them had made smaller
        or larger has then the radius that it would have had without it.

        Memory of stored queries and retired values is given back. The capacity stays, as compiled
        models and captured graphs hold the tensors.

        Args:
            keep: how many of these edits stay, the latest by id.

        Returns:
            How many edits were forgotten.

        Raises:
            ValueError: `keep` is negative, or a transaction is open.
        """
        if type(keep) is not int or keep < 0:
            raise ValueError(f"keep must be a whole number of at least 0, got {keep!r}")
        with self.changing() as storage:
            if storage.journal.is_open:
                raise ValueError("cannot compact inside a transaction: end it first")
            with storage.change():
                forgotten = past.compact(storage, keep)
            with storage.lock:
                past.pack(storage)
            if storage.watcher is not None:
                storage.watcher.settled(storage, anew=True)
            return forgotten

    def undo(self) -> None:
        """Take the last operation or transaction back, to the bit; up to `undo_limit` times.

        Only `version` goes up instead, and the ids that were given out stay used.

        Raises:
            UndoError: there is nothing to undo: nothing was done, or what was done lies before a
                purge or before loading. Or a transaction is open.
        """
        with self.changing() as storage:
            storage.undo()

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
        copy: bool = True,
    ) -> Codebook:
        """Return a codebook of given entries, millions at once; row i becomes slot i and edit i.

        Later edits and deletions find these entries as they are given: no decision made them, so
        none is replayed for them.

        Args:
            keys: `[N, D]` float32, float16 or bfloat16, finite and, by default policy, distinct.
            values: `[N, V]`, finite, on the same device.
            radii: `[N]` float32; by default policy not negative, so that each key answers itself.
            labels: N labels.
            radius, policy, drift, max_radius: as for a new codebook.
            capacity: slots to allocate; None means N.
            copy: False: `keys` and `values` become the codebook's own memory where they fill it,
                and nobody else writes to them from then on.

        Raises:
            ValueError: a shape, dtype or value is not as said.
        """
        importing.check_shapes(keys, values, radii, labels, capacity)
        capacity = max(1, len(keys)) if capacity is None else capacity
        adopt = not copy and capacity == len(keys)
        book = cls(
            keys.shape[1],
            values.shape[1],
            radius=radius,
            policy=policy,
            capacity=1 if adopt else capacity,
            dtype=keys.dtype,
            value_dtype=values.dtype,
            drift=drift,
            max_radius=max_radius,
            device=keys.device,
        )
        tensors = (keys.detach(), values.detach(), radii.detach())
        importing.fill(book.storage, *tensors, labels, adopt=adopt)
        return book

    def to(self, device: torch.device | str) -> Codebook:
        """Move the tensors to `device`, to the bit, and return this codebook.

        Stored queries stay on the host. Dtypes never change.
        """
        with self.changing() as storage, storage.lock:
            storage.gather_hits()
            storage.slots.move_to(device)
        return self

    def number_from(self, id: int) -> None:
        """Give the next edit this id, the one after it the next, and so on.

        Raises:
            ValueError: the id has been given already, or a later one.
        """
        if id < self.storage.next_id:
            raise ValueError(f"id must be at least {self.storage.next_id}, got {id}")
        self.storage.next_id = id

    def take_over(self, other: Codebook, reason: str) -> None:
        """Hold from now on what another codebook holds; ids and `version` go on.

        A single step to lookups; a change that was waiting for its turn finds the new content.
        Nothing that was done before can be undone.

        Args:
            other: known to this thread alone, and not to be used any more.
            reason: what happened, for the error of `undo`: "the editor was rekeyed".

        Raises:
            ValueError: a transaction is open.
        """
        with self.changing() as old:
            if old.journal.is_open:
                raise ValueError("cannot replace the content inside a transaction: end it first")
            new = other.storage
            new.journal.forget(reason)
            new.version, new.next_id = old.next_version(), max(new.next_id, old.next_id)
            if old.watcher is not None:
                old.watcher.replace(new)
            with old.lock:
                new.succeed(old)
                self.storage = new

    def check(self) -> None:
        """Verify everything a codebook promises, the retention of every live edit first of all.

        For tests: it looks every stored query up.

        Raises:
            AssertionError: naming what does not hold.
        """
        audit.check(self.storage)
