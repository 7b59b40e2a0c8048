"""GraceAdaptor: what stands round one layer and replaces its output where an entry answers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import grace_kernels

from ..codebook.codebook import Codebook
from .positions import KeptPlan, QueryPlan, pooled_mean
from .torch_private import next_node_number, running_node_number, share_memory


@dataclass
class Captured:
    """What a layer saw at its queries: `queries [B, D]`, its own `outputs [B, V]` there."""

    queries: Tensor
    outputs: Tensor


@dataclass
class Kept:
    """Answers of one batch, kept from the prompt for the tokens after it.

    Args:
        index: `[B]`, the entry that answers each sequence, -1 for none.
        values: `[B, V]`, their values as they were then: an edit in between changes no answer that
            was begun.
    """

    index: Tensor
    values: Tensor


@dataclass
class Generation:
    """State of one `generate` call: where the prompt ends and what answered.

    Args:
        prompt_len: columns of the prompt.
        plan: of the forward that comes next.
        planned: some forward had a plan.
        reached: the wrapped layer ran in one of them.
        computed: columns that were computed before the forward that comes next, None before the
            first.
        kept: where the answers go if later forwards need them.
        answered: they are there.
    """

    prompt_len: int
    plan: QueryPlan | KeptPlan | None = None
    planned: bool = False
    reached: bool = False
    computed: int | None = None
    kept: Kept | None = None
    answered: bool = False


@dataclass(eq=False)
class _Forward:
    """A forward of the model that autograd followed; its nodes are numbered `start..end-1`."""

    start: int
    end: int
    plan: QueryPlan | KeptPlan | None
    forced: Tensor | None
    version: int


_MOST_FORWARDS = 64
_MOST_SPARE = 8  # batch sizes
_MOST_PLACES = 32  # tensors of plans


class _Running(threading.local):
    """What a thread is doing with the layer: several may serve at once, while one edits."""

    def __init__(self) -> None:
        # In every thread, not on the class: a compiled model wants to find in each of them what it
        # found in the one that compiled it.
        self.enabled = True
        self.inside = False  # the model's forward is running
        self.plan: QueryPlan | KeptPlan | None = None
        self.generation: Generation | None = None
        self.forced: Tensor | None = None
        self.captures: list[Captured] | None = None
        self.spare: dict[int, Kept] = {}  # by the number of sequences
        self.places: dict[tuple[str, torch.Size, torch.device], Tensor] = {}


def _of_running(name: str) -> Any:
    return property(
        lambda self: getattr(self.running, name),
        lambda self, value: setattr(self.running, name, value),
    )


@dataclass(eq=False)
class GraceAdaptor:
    """Look the queries of a forward up and replace rows of the layer's output.

    Holds no weights. `forward`s read it and never change the codebook; only the editor writes.
    The adaptor is set into the wrapped layer by `grace_edit.adaptor.attach`. `enabled`, `plan` and
    what else a call is about belong to the thread that sets them.

    Args:
        codebook: the entries.
        query: `"last"` or `"mean"`.
        replace: `"last"`, `"prompt"`, `"before"` or `"all"`.
        special_ids: token ids that `query="mean"` leaves out.
        mask_token_id: token that asks under `query="last"` in a masked language model.
    """

    codebook: Codebook
    query: str
    replace: str
    special_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    warned: set[str] = field(default_factory=set, repr=False)
    looked: set[str] = field(default_factory=set, repr=False)  # what a GPU was waited for once
    # Not per thread: a GPU's backward runs in a thread of its own.
    forwards: deque[_Forward] = field(
        default_factory=lambda: deque(maxlen=_MOST_FORWARDS), repr=False
    )
    running: _Running = field(default_factory=_Running, repr=False)

    enabled = _of_running("enabled")
    inside = _of_running("inside")
    plan = _of_running("plan")
    generation = _of_running("generation")
    forced = _of_running("forced")
    captures = _of_running("captures")

    def __getstate__(self) -> dict[str, Any]:
        own = ("running", "forwards")
        return {name: item for name, item in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, running=_Running(), forwards=deque(maxlen=_MOST_FORWARDS))

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

    def keep(self, sequences: int) -> Kept:
        """Return room for the answers of a batch, until `release` gives it back.

        One generation of a thread after the other gets the same memory, which a CUDA graph of the
        decode step then finds where it was recorded.
        """
        like = self.codebook.values
        kept: Kept | None = self.running.spare.pop(sequences, None)
        if kept is not None and _alike(kept.values, like):
            return kept
        with torch.inference_mode(False):  # it may be written to in either mode
            return Kept(
                torch.empty(sequences, dtype=torch.int64, device=like.device),
                like.new_empty(sequences, like.shape[1]),
            )

    def release(self, kept: Kept) -> None:
        """Take the room for answers back for the next generation of this thread."""
        spare = self.running.spare
        spare[len(kept.index)] = kept
        if len(spare) > _MOST_SPARE:
            del spare[next(iter(spare))]

    def settle(self, plan: QueryPlan) -> QueryPlan:
        """Return `plan` in memory that is the same for every plan of its shape in this thread.

        For a model whose whole forward is compiled: a CUDA graph then finds the plan where it was
        recorded. Good until the next plan of this shape.
        """
        return replace(
            plan,
            query_row=self._settled("query_row", plan.query_row),
            first_row=self._settled("first_row", plan.first_row),
            last_row=self._settled("last_row", plan.last_row),
            pool=None if plan.pool is None else self._settled("pool", plan.pool),
        )

    def _settled(self, name: str, tensor: Tensor) -> Tensor:
        # A pool may be a view of a larger mask: the copy is contiguous.
        places, key = self.running.places, (name, tensor.shape, tensor.device)
        place = places.pop(key, None)
        if place is None:
            with torch.inference_mode(False):
                place = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        places[key] = place
        if len(places) > _MOST_PLACES:
            del places[next(iter(places))]
        return place.copy_(tensor)

    @property
    def active(self) -> bool:
        """Whether a forward has anything to do here at all."""
        return self.enabled or self.forced is not None or self.captures is not None

    def remember(self, start: int, plan: QueryPlan | KeptPlan | None) -> None:
        """Note what a forward did whose first autograd node was to have the number `start`."""
        end = next_node_number()
        if end > start:
            version = self.codebook.version
            self.forwards.append(_Forward(start, end, plan, self.forced, version))

    def recall(self) -> _Forward | None:
        """Return the forward that activation checkpointing, within backward, now runs again.

        It is told by the number of the autograd node that backward is at. None: no forward of the
        model was followed, so none was edited.

        Raises:
            RuntimeError: that forward is not known, or the edits have changed since.
        """
        at = running_node_number()
        if not self.forwards or at is None:
            return None
        found = [f for f in self.forwards if f.start <= at < f.end]
        # Threads count their nodes apart, so two of them can each have one of this number.
        if len({(id(f.plan), id(f.forced)) for f in found}) != 1:
            raise RuntimeError(
                "activation checkpointing must run a forward of the edited model again, one of the "
                f"last {_MOST_FORWARDS} and no other thread's, got {len(found)} that it could be; "
                "call backward earlier, or train inside editor.disable()"
            )
        if found[-1].plan is not None and found[-1].version != self.codebook.version:
            raise RuntimeError(
                "backward with activation checkpointing must see the edits of its forward (version "
                f"{found[-1].version} of the codebook), got version {self.codebook.version}; edit "
                "after backward"
            )
        return found[-1]

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
        if isinstance(plan, KeptPlan):
            return self._continue(rows, plan).view(shape)
        plan = plan.to(source.device)
        if plan.rows is not None and not len(queries) == len(rows) == plan.rows:
            raise ValueError(
                f"layer must take and give one row per token ({plan.rows} here), got "
                f"{list(source.shape)} in and {list(shape)} out"
            )
        if plan.latched:
            return self._write_kept(rows, plan).view(shape)
        query_row = plan.query_row
        if plan.pool is not None:
            queries = pooled_mean(queries.view(*plan.pool.shape, -1), plan.pool)
            each = torch.arange(len(queries), device=queries.device)
            query_row = torch.where(query_row >= 0, each, query_row)
        if self.captures is not None:
            self.captures.append(self._capture(queries, query_row, rows, plan))
            return hidden
        if self.forced is not None:
            return _write_rows(rows, plan, self.forced, query_row >= 0).view(shape)
        if torch.compiler.is_compiling():
            rows = self._answer(rows, queries, query_row, plan, copy=True)
        else:
            alias = share_memory(rows, source)
            tracked = torch.is_grad_enabled() and hidden.requires_grad
            with self.codebook.lock:
                rows = self._answer(rows, queries, query_row, plan, copy=tracked, alias=alias)
        return rows.view(shape)

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
        tensors = (query_row, plan.first_row, plan.last_row, book.keys, book.radii, book.values)
        if copy:
            rows, index, _ = grace_kernels.adapt(
                rows, queries, *tensors, book.count, sketch=book.sketch
            )
        else:
            # The layer may hand its input on (Dropout in eval mode, Identity).
            rows = rows.clone() if alias else rows
            index, _ = grace_kernels.adapt_(rows, queries, *tensors, book.count, sketch=book.sketch)
        generation = self.generation
        if plan.latch and generation is not None and generation.kept is not None:
            generation.kept.index.copy_(index)
            generation.kept.values.copy_(book.values[index.clamp(min=0)])
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

    def _write_kept(self, rows: Tensor, plan: QueryPlan) -> Tensor:
        if self.forced is not None:
            return _write_rows(rows, plan, self.forced, plan.query_row >= 0)
        kept = self._answers()
        return rows if kept is None else _write_rows(rows, plan, kept.values, kept.index >= 0)

    def _continue(self, rows: Tensor, plan: KeptPlan) -> Tensor:
        each = rows.view(plan.sequences, -1, rows.shape[1])
        if self.forced is not None:
            return self.forced.to(rows.dtype)[:, None].expand_as(each).reshape(rows.shape)
        kept = self._answers()
        if kept is None:
            return rows
        answered = (kept.index >= 0)[:, None, None]
        values = kept.values.to(rows.dtype)[:, None]
        return torch.where(answered, values, each).view(rows.shape)

    def _answers(self) -> Kept | None:
        generation = self.generation
        return None if generation is None or not generation.answered else generation.kept


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape[1] == b.shape[1]


def check_fits(book: Codebook, queries: Tensor, outputs: Tensor) -> None:
    """Refuse what a layer takes and gives on another device than its codebook's, or in another
    dtype than that its edits were made in.

    Raises:
        ValueError: naming the remedy.
    """
    if not queries.device == outputs.device == book.device:
        where = " and ".join(sorted({str(queries.device), str(outputs.device)}))
        raise ValueError(
            f"the wrapped layer must run on the device of its codebook ({book.device}), got "
            f"{where}; call editor.codebook.to(device) where the layer was moved by itself"
        )
    if queries.dtype != book.keys.dtype or outputs.dtype != book.values.dtype:
        raise ValueError(
            f"the wrapped layer must run in the dtypes of its codebook ({book.keys.dtype} in, "
            f"{book.values.dtype} out), got {queries.dtype} in, {outputs.dtype} out; call "
            "editor.rekey() to make the edits anew in these dtypes"
        )


def _write_rows(rows: Tensor, plan: QueryPlan, values: Tensor, answered: Tensor) -> Tensor:
    """Return `rows [R, V]` with the range of each answered sequence set to its `values [B, V]`.

    Plain and differentiable: used where the answer is known already (training, kept answers).
    """
    row = torch.arange(len(rows), device=rows.device)
    inside = (row >= plan.first_row[:, None]) & (row < plan.last_row[:, None]) & answered[:, None]
    replaced = inside.any(dim=0)
    owner = inside.int().argmax(dim=0)
    return torch.where(replaced[:, None], values.to(rows.dtype)[owner], rows)
