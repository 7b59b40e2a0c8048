"""GraceAdaptor: what stands round one layer and replaces its output where an entry answers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import grace_kernels

from ..codebook.codebook import Codebook
from ..codebook.moments import Held, Moments
from .checkpointing import FollowedForward, FollowedForwards
from .packed import PackedPlan
from .positions import Latched, LatchedPlan, QueryPlan, pooled_mean
from .precision import check_fits
from .state import Captured, LayerReached, Switch, ThreadState
from .text_queries import TextQueries
from .torch_private import share_memory

_SERVING = {"enabled": True, "generation": None, "ends": None, "counts": False}
"""The state of a thread that runs forwards as requests are served, without counting them."""


def _of_thread(name: str) -> Any:
    return property(
        lambda self: getattr(self.thread, name),
        lambda self, value: setattr(self.thread, name, value),
    )


@dataclass(eq=False)
class GraceAdaptor:
    """Look the queries of a forward up and replace rows of the layer's output.

    Holds no weights. `forward`s read it and never change the codebook; only the editor writes.
    The adaptor is set into the wrapped layer by `grace_edit.adaptor.attach`. `enabled`, `plan` and
    what else a call is about belong to the thread that sets them; `switch` is the model's.

    Args:
        codebook: the entries.
        query: `"last"`, `"mean"` or `"text"`.
        replace: `"last"`, `"prompt"`, `"before"` or `"all"`.
        special_ids: token ids that `query="mean"` leaves out.
        mask_token_id: token that asks under `query="last"` in a masked language model.
        text: makes the queries under `query="text"`; None under the others.

    `others` are the adaptors of the model's other layers, `moments` lets requests ask all of them
    as of one time (None: there is one layer), and `place` is the name by which the seam
    has the wrapped layer; `attach` and `detach` set them. `at_start` says that the first token of
    each row asks, and what follows it is no prompt: that of a decoder whose prompt an encoder has
    read.
    """

    codebook: Codebook
    query: str
    replace: str
    special_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    text: TextQueries | None = None
    warned: set[str] = field(default_factory=set, repr=False)
    looked: set[str] = field(default_factory=set, repr=False)  # what a GPU was waited for once
    followed: FollowedForwards = field(default_factory=FollowedForwards, repr=False)
    thread: ThreadState = field(default_factory=ThreadState, repr=False)
    switch: Switch = field(default_factory=Switch, repr=False)
    others: tuple[GraceAdaptor, ...] = field(default=(), init=False, repr=False)
    moments: Moments | None = field(default=None, init=False, repr=False)
    place: str = field(default="", init=False, repr=False)
    at_start: bool = field(default=False, init=False, repr=False)

    enabled = _of_thread("enabled")
    inside = _of_thread("inside")
    plan = _of_thread("plan")
    generation = _of_thread("generation")
    ends = _of_thread("ends")
    forced = _of_thread("forced")
    captures = _of_thread("captures")
    stops = _of_thread("stops")
    witness = _of_thread("witness")
    counts = _of_thread("counts")
    absent = _of_thread("absent")
    moment = _of_thread("moment")

    def __getstate__(self) -> dict[str, Any]:
        own = ("thread", "followed", "switch", "moments")
        return {name: item for name, item in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {"thread": ThreadState(), "followed": FollowedForwards(), "switch": Switch()}
        vars(self).update(state, moments=None, **fresh)

    def move(self, device: torch.device) -> None:
        """Move the codebook to `device`; its dtype never changes with the model's."""
        self.codebook.to(device)

    @contextmanager
    def using(self, **state: Any) -> Iterator[None]:
        """Set attributes for the time of a `with` block and put the old ones back."""
        before = {name: getattr(self, name) for name in state}
        for name, value in state.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def using_all(self, **state: Any) -> Iterator[None]:
        """Do as `using` does, here and in the adaptors of the model's other layers."""
        with ExitStack() as stack:
            for adaptor in (self, *self.others):
                stack.enter_context(adaptor.using(**state))
            yield

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Ask all layers of the model as of one time inside a `with` block."""
        if self.moments is None or self.moment is not None:
            yield
            return
        with self.moments.taken() as moment, self.using_all(moment=moment):
            yield

    def held(self) -> Codebook | Held:
        """Return what the codebook held when this request began; its lock must be held."""
        return self.codebook if self.moment is None else self.moment.of(self.codebook)

    @contextmanager
    def planned(self, plan: QueryPlan) -> Iterator[None]:
        """Let a plan be that of a `with` block, see `GraceEditor.plan`."""
        with ExitStack() as stack:
            stack.enter_context(self.using(plan=plan))
            for other in self.others:
                if other.plan is None:
                    rows = dataclasses.replace(plan, answers=None, kept=None)
                    stack.enter_context(other.using(plan=rows))
            yield

    @contextmanager
    def among_others(self, plans: Sequence[QueryPlan | None] = ()) -> Iterator[None]:
        """Let the other layers answer as they serve inside a `with` block, without counting it.

        For forwards that show or change what this layer does.

        Args:
            plans: of the other layers, in their order; none: they plan each forward themselves.
        """
        serving = {**_SERVING, "forced": None, "captures": None, "witness": None}
        with ExitStack() as stack:
            for number, other in enumerate(self.others):
                plan = plans[number] if plans else None
                stack.enter_context(other.using(**serving, plan=plan))
            yield

    def as_served(self) -> AbstractContextManager[None]:
        """Let all layers answer as requests are served inside a `with` block, without counting it.

        Whatever this thread has turned off or planned.
        """
        return self.using_all(plan=None, **_SERVING)

    @contextmanager
    def disabled(self, *, thread_only: bool = False) -> Iterator[None]:
        """Serve the unedited model inside a `with` block; see `GraceEditor.disable`."""
        off = [] if thread_only else [self.switch, *(other.switch for other in self.others)]
        for switch in off:
            switch.turn_off()
        try:
            with self.using_all(enabled=False):
                yield
        finally:
            for switch in off:
                switch.turn_on()

    def take_room(self, sequences: int) -> Latched:
        """Return room for the answers of a batch, until `self.thread.give_back`."""
        return self.thread.take_room(sequences, self.codebook.values)

    @property
    def active(self) -> bool:
        """Whether a forward has anything to do here at all."""
        if self.absent:
            return False
        enabled = not self.switch.off if self.enabled is None else self.enabled
        return enabled or self.forced is not None or self.captures is not None

    @property
    def reads_text(self) -> bool:
        """Whether a forward is answered by the text of its prompts."""
        return self.text is not None and self.forced is None and self.captures is None

    def answer(self, prompts: Sequence[Sequence[int]], *, served: bool = True) -> Latched:
        """Return the answers to prompts of token ids; under `query="text"` alone.

        Args:
            served: somebody gets them: they are counted as hits, and the witness is told.
        """
        assert self.text is not None
        witness, counts = (self.witness, self.counts) if served else (None, False)
        held = None if self.moment is None else self.held
        return self.text.answer(self.codebook, prompts, witness, counts=counts, held=held)

    def remember(self, start: int, plan: QueryPlan | LatchedPlan | None) -> None:
        """Note what a forward did whose first autograd node was to have the number `start`."""
        self.followed.note(start, plan, self.forced, self.codebook.version)

    def recall(self) -> FollowedForward | None:
        """Return the forward that backward now runs again, see `FollowedForwards`."""
        return self.followed.running_again(self.codebook.version)

    def __call__(self, source: Tensor, hidden: Tensor) -> Tensor:
        """Return the layer's output with the rows that the plan names answered.

        Args:
            source: the layer's input `[..., D]`.
            hidden: its output `[..., V]`; written in place where that is safe.
        """
        plan = self.plan
        if plan is None or not self.active:
            return hidden
        if self.generation is not None:
            self.generation.reached = True
        shape = hidden.shape
        rows = hidden.reshape(-1, shape[-1])
        queries = source.reshape(-1, source.shape[-1])
        if isinstance(plan, LatchedPlan):
            return self._write_generated(rows, plan).view(shape)
        plan = plan if isinstance(plan, PackedPlan) else plan.to(source.device)
        if plan.rows is not None and not len(queries) == len(rows) == plan.rows:
            raise ValueError(
                f"layer must take and give one row per token ({plan.rows} here), got "
                f"{list(source.shape)} in and {list(shape)} out"
            )
        if isinstance(plan, PackedPlan):
            return self._adapt_packed(rows, queries, plan, source, hidden).view(shape)
        if plan.latched or plan.answers is not None:
            return self._write_latched(rows, plan).view(shape)
        if self.reads_text:
            raise ValueError(
                'plan must have answers under query="text", got none: the layer does not see the '
                "text; make them with editor.answers(prompts)"
            )
        query_row = plan.query_row
        if plan.pool is not None:
            queries = pooled_mean(queries.view(*plan.pool.shape, -1), plan.pool)
            each = torch.arange(len(queries), device=queries.device)
            query_row = torch.where(query_row >= 0, each, query_row)
        if self.captures is not None:
            self.captures.append(self._capture(queries, query_row, rows, plan))
            if self.stops:
                raise LayerReached
            return hidden
        if self.forced is not None:
            return _write_rows(rows, plan, self.forced, query_row >= 0).view(shape)
        return self._look_up(rows, queries, query_row, plan, source, hidden).view(shape)

    def _look_up(
        self,
        rows: Tensor,
        queries: Tensor,
        query_row: Tensor,
        plan: QueryPlan,
        source: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return self._answer(rows, queries, query_row, plan, copy=True)
        alias = share_memory(rows, source)
        tracked = torch.is_grad_enabled() and hidden.requires_grad
        with self.codebook.lock:
            return self._answer(rows, queries, query_row, plan, copy=tracked, alias=alias)

    def _adapt_packed(
        self, rows: Tensor, queries: Tensor, plan: PackedPlan, source: Tensor, hidden: Tensor
    ) -> Tensor:
        plan.reached = True
        if plan.asking is not None:
            asking = plan.asking
            with self.using(witness=plan.see if any(plan.witnesses) else None):
                rows = self._look_up(rows, queries, asking.query_row, asking, source, hidden)
        if plan.writes is not None:
            check_fits(self.codebook, None, rows)
            copy = torch.compiler.is_compiling() or share_memory(rows, source)
            rows = plan.writes.into(rows, copy=copy)
        return rows

    def _answer(
        self,
        rows: Tensor,
        queries: Tensor,
        query_row: Tensor,
        plan: QueryPlan,
        *,
        copy: bool,
        alias: bool = False,
    ) -> Tensor:
        book = self.codebook
        check_fits(book, queries, rows)
        held = book if torch.compiler.is_compiling() else self.held()
        start = 0.0 if torch.compiler.is_compiling() else time.perf_counter()
        tensors = (query_row, plan.first_row, plan.last_row, held.keys, held.radii, held.values)
        if queries.dtype != book.keys.dtype or rows.dtype != book.values.dtype:
            rows, index, distance = _answer_cast(held, rows, queries, query_row, plan)
        elif copy:
            rows, index, distance = grace_kernels.adapt(
                rows, queries, *tensors, held.count, sketch=held.sketch
            )
        else:
            # The layer may hand its input on (Dropout in eval mode, Identity).
            rows = rows.clone() if alias else rows
            index, distance = grace_kernels.adapt_(
                rows, queries, *tensors, held.count, sketch=held.sketch
            )
        if not torch.compiler.is_compiling():
            now = held is book  # slots of before may be others' now
            if self.counts and now:
                book.count_answers(index)
            if self.witness is not None and now:
                self.witness(book, index, distance, time.perf_counter() - start)
        if plan.kept is not None:
            plan.kept.index.copy_(index)
            plan.kept.values.copy_(held.values[index.clamp(min=0)])
        generation = self.generation
        if plan.latch and generation is not None and generation.latched is not None:
            generation.latched.index.copy_(index)
            generation.latched.values.copy_(held.values[index.clamp(min=0)])
            generation.answered = True
        return rows

    def _capture(
        self, queries: Tensor, query_row: Tensor, rows: Tensor, plan: QueryPlan
    ) -> Captured:
        asking = query_row.clamp(min=0)
        if plan.pool is None:
            outputs = rows[plan.query_row.clamp(min=0)]
        else:
            outputs = pooled_mean(rows.view(*plan.pool.shape, -1), plan.pool)
        return Captured(queries[asking].detach().clone(), outputs.detach().clone())

    def _write_latched(self, rows: Tensor, plan: QueryPlan) -> Tensor:
        if self.forced is not None:
            return _write_rows(rows, plan, self.forced, plan.query_row >= 0)
        latched = self._latched() if plan.answers is None else plan.answers
        if latched is None:
            return rows
        if self.text is not None:
            check_fits(self.codebook, None, rows)
        answered = (latched.index >= 0) & (plan.query_row >= 0)
        return _write_rows(rows, plan, latched.values, answered)

    def _write_generated(self, rows: Tensor, plan: LatchedPlan) -> Tensor:
        each = rows.view(plan.sequences, -1, rows.shape[1])
        if self.forced is not None:
            return self.forced.to(rows.dtype)[:, None].expand_as(each).reshape(rows.shape)
        latched = self._latched()
        if latched is None:
            return rows
        answered = (latched.index >= 0)[:, None, None]
        values = latched.values.to(rows.dtype)[:, None]
        return torch.where(answered, values, each).view(rows.shape)

    def _latched(self) -> Latched | None:
        generation = self.generation
        return None if generation is None or not generation.answered else generation.latched


def _answer_cast(
    book: Codebook | Held, rows: Tensor, queries: Tensor, query_row: Tensor, plan: QueryPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer under autocast: queries are cast as the keys are, values as the output is."""
    asked = queries[query_row.clamp(min=0)].to(book.keys.dtype)
    index, distance = grace_kernels.lookup(
        asked, book.keys, book.radii, book.count, sketch=book.sketch
    )
    index = torch.where(query_row >= 0, index, -1)
    rows = _write_rows(rows, plan, book.values[index.clamp(min=0)], index >= 0)
    return rows, index, distance


def _write_rows(rows: Tensor, plan: QueryPlan, values: Tensor, answered: Tensor) -> Tensor:
    """Return `rows [R, V]` with the range of each answered sequence set to its `values [B, V]`.

    Plain and differentiable: used where the answer is known already (training, latched answers).
    """
    row = torch.arange(len(rows), device=rows.device)
    inside = (row >= plan.first_row[:, None]) & (row < plan.last_row[:, None]) & answered[:, None]
    replaced = inside.any(dim=0)
    owner = inside.int().argmax(dim=0)
    return torch.where(replaced[:, None], values.to(rows.dtype)[owner], rows)
