"""Activation checkpointing: which forward of the model is it that backward runs again?

The layer then runs once more by itself, without the model round it that planned its rows. What was
planned is found again by the number of the autograd node that backward is at.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from .positions import LatchedPlan, QueryPlan
from .torch_private import next_node_number, running_node_number

_MOST_FORWARDS = 64


@dataclass(eq=False)
class FollowedForward:
    """A forward of the model that autograd followed; its nodes are numbered `start..end-1`.

    `version` is the codebook's.
    """

    start: int
    end: int
    plan: QueryPlan | LatchedPlan | None
    forced: Tensor | None
    version: int


class FollowedForwards:
    """The last forwards that autograd followed, of all threads.

    Not per thread: a GPU's backward runs in a thread of its own.
    """

    def __init__(self) -> None:
        self.recent: deque[FollowedForward] = deque(maxlen=_MOST_FORWARDS)

    def note(
        self, start: int, plan: QueryPlan | LatchedPlan | None, forced: Tensor | None, version: int
    ) -> None:
        """Note what a forward did whose first autograd node was to have the number `start`."""
        end = next_node_number()
        if end > start:
            self.recent.append(FollowedForward(start, end, plan, forced, version))

    def running_again(self, version: int) -> FollowedForward | None:
        """Return the forward that activation checkpointing, within backward, now runs again.

        None: no forward of the model was followed, so none was edited.

        Raises:
            RuntimeError: that forward is not known, or the codebook's version is another one now.
        """
        at = running_node_number()
        if not self.recent or at is None:
            return None
        found = [f for f in self.recent if f.start <= at < f.end]
        # Threads count their nodes apart, so two of them can each have one of this number.
        if len({(id(f.plan), id(f.forced)) for f in found}) != 1:
            raise RuntimeError(
                "activation checkpointing must run a forward of the edited model again, one of the "
                f"last {_MOST_FORWARDS} and no other thread's, got {len(found)} that it could be; "
                "call backward earlier, or train inside editor.disable()"
            )
        if found[-1].plan is not None and found[-1].version != version:
            raise RuntimeError(
                "backward with activation checkpointing must see the edits of its forward (version "
                f"{found[-1].version} of the codebook), got version {version}; edit after backward"
            )
        return found[-1]
