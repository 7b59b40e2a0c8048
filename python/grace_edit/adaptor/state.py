"""What a forward leaves behind for the next one: of a generation, and of a thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codebook.moments import Moment
from .packed import PackedPlan
from .positions import Latched, LatchedPlan, QueryPlan, Witness
from .told import PromptEnds

_MOST_ROOMS = 8  # batch sizes whose room for answers waits to be used again
_MOST_PINNED = 32  # tensors of plans


class LayerReached(BaseException):
    """Ends a forward whose wrapped layer has shown what was asked of it.

    Not an `Exception`, which a model's own code may catch.
    """


@dataclass
class Captured:
    """What a layer saw at its queries: `queries [B, D]`, its own `outputs [B, V]` there."""

    queries: Tensor
    outputs: Tensor


@dataclass
class Generation:
    """State of one `generate` call: where the prompt ends and what answered.

    Args:
        prompt_len: columns of the prompt.
        plan: of the forward that comes next.
        prepared: generate has prepared a forward, to which `plan` belongs. Any other that runs
            inside generate (guidance, a logits processor that asks the model) is none of its own.
        planned: some forward had a plan.
        reached: the wrapped layer ran in one of them.
        computed: columns that were computed before the forward that comes next, None before the
            first.
        latched: where the answers go if later forwards need them.
        answered: they are there.
        ids: `[B, n]`, the last columns of the sequence that were seen so far, where the text of the
            prompt asks.
    """

    prompt_len: int
    plan: QueryPlan | LatchedPlan | None = None
    prepared: bool = False
    planned: bool = False
    reached: bool = False
    computed: int | None = None
    latched: Latched | None = None
    answered: bool = False
    ids: Tensor | None = None


class Switch:
    """Whether a model is edited, for all threads; several may turn it off at a time.

    Attributes:
        off: somebody has turned it off and not yet on again.
    """

    def __init__(self) -> None:
        self.off = False
        self._turned_off = 0
        self._lock = threading.Lock()

    def turn_off(self) -> None:
        """Turn it off, until `turn_on` is called once for each call of this."""
        with self._lock:
            self._turned_off += 1
            self.off = True

    def turn_on(self) -> None:
        """Take one `turn_off` back."""
        with self._lock:
            self._turned_off -= 1
            self.off = self._turned_off > 0


class ThreadState(threading.local):
    """What a thread is doing with the layer: several may serve at once, while one edits.

    Its memory for answers and plans is used again and again, so that a CUDA graph finds them where
    it was recorded.
    """

    def __init__(self) -> None:
        # In every thread, not on the class: a compiled model wants to find in each of them what it
        # found in the one that compiled it.
        # None: what the model's switch says; a generation that has begun does not ask it again.
        self.enabled: bool | None = None
        self.inside = False  # the model's forward is running
        self.plan: QueryPlan | LatchedPlan | PackedPlan | None = None
        self.generation: Generation | None = None
        self.ends: PromptEnds | None = None  # of the prompts of plain forwards
        self.forced: Tensor | None = None
        self.captures: list[Captured] | None = None
        self.stops = False  # a capture ends its forward
        self.witness: Witness | None = None
        self.counts = True  # answers are those of a request
        self.absent = False  # nothing is asked, as if the layer had no adaptor
        self.moment: Moment | None = None  # as of which codebooks are asked; None: as they are
        self.rooms: dict[int, Latched] = {}  # free ones, by the number of sequences
        self.pinned: dict[tuple[str, torch.Size, torch.device], Tensor] = {}

    def take_room(self, sequences: int, like: Tensor) -> Latched:
        """Return room for the answers of a batch, until `give_back`.

        Args:
            sequences: B.
            like: values of the codebook, for width, dtype and device.
        """
        room = self.rooms.pop(sequences, None)
        if room is not None and _alike(room.values, like):
            return room
        with torch.inference_mode(False):  # it may be written to in either mode
            return Latched(
                torch.empty(sequences, dtype=torch.int64, device=like.device),
                like.new_empty(sequences, like.shape[1]),
            )

    def give_back(self, room: Latched) -> None:
        """Take room for answers back, for the next generation of this thread."""
        self.rooms[len(room.index)] = room
        if len(self.rooms) > _MOST_ROOMS:
            del self.rooms[next(iter(self.rooms))]

    def pin(self, plan: QueryPlan) -> QueryPlan:
        """Return a copy of `plan` in memory that is the same for every plan of its shape.

        Good until the next plan of this shape is pinned in this thread.
        """
        return replace(
            plan,
            query_row=self._pin("query_row", plan.query_row),
            first_row=self._pin("first_row", plan.first_row),
            last_row=self._pin("last_row", plan.last_row),
            pool=None if plan.pool is None else self._pin("pool", plan.pool),
        )

    def _pin(self, name: str, tensor: Tensor) -> Tensor:
        # A pool may be a view of a larger mask: the copy is contiguous.
        key = (name, tensor.shape, tensor.device)
        place = self.pinned.pop(key, None)
        if place is None:
            with torch.inference_mode(False):
                place = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.pinned[key] = place
        if len(self.pinned) > _MOST_PINNED:
            del self.pinned[next(iter(self.pinned))]
        return place.copy_(tensor)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape[1] == b.shape[1]
