"""Taking changes back: what each place held before it changed.

The parts of the storage (slots, queries, records) are made of places, each named by a table and a
key: ("radii", 7), ("edits", 12), ("in_use", None). Before a part changes one of its places it calls
`Journal.note`, which keeps what the place holds, once per transaction. So a change costs time for
what it touches, however large the codebook is; and a step of undo costs memory for what it changed:
places that hold in the end what they held before are let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from .records import UndoError
from .tensors import same_bits

UNDO_LIMIT = 100
"""Steps of undo that a new codebook keeps."""


class Part(Protocol):
    """A part of the storage whose changes can be taken back."""

    def held(self, table: str, key: Any) -> Any:
        """Return what a place holds, in a form that stays as it is when the place changes."""

    def put_back(self, table: str, key: Any, old: Any) -> None:
        """Let a place hold again what `held` returned for it."""


Place = tuple[Part, str, Any]
"""A part, a table of it and a key."""

_Step = dict[Place, Any]  # in the order of the first change of each place


class Journal:
    """The open transactions, the innermost last, and the steps of undo, the latest last.

    `made` counts the steps that there ever were.
    """

    def __init__(self) -> None:
        self.made = 0
        self._open: list[_Step] = []
        self._steps: list[_Step] = []
        self._beginning = "the codebook was made"
        self._limit = UNDO_LIMIT
        self._dropped = False
        self._undone: _Step = {}

    @property
    def is_open(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._open)

    @property
    def steps(self) -> int:
        """How many times `undo` may be called."""
        return len(self._steps)

    @property
    def limit(self) -> int:
        """How many steps are kept at most, the latest."""
        return self._limit

    @limit.setter
    def limit(self, steps: int) -> None:
        if type(steps) is not int or steps < 0:
            raise ValueError(f"undo_limit must be a whole number of at least 0, got {steps!r}")
        self._limit = steps
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        if len(self._steps) > self._limit:
            del self._steps[: len(self._steps) - self._limit]
            self._dropped = True

    def note(self, part: Part, table: str, key: Any = None) -> None:
        """Keep what a place holds; to be called before it changes, within a transaction."""
        place = (part, table, key)
        if place not in self._open[-1]:
            self._open[-1][place] = part.held(table, key)

    def write(self, part: Part, table: str, key: Any, new: Any) -> None:
        """Let a place hold what `held` returned elsewhere, within a transaction."""
        self.note(part, table, key)
        part.put_back(table, key, new)

    def begin(self) -> None:
        """Open a transaction."""
        self._open.append({})

    def end(self) -> None:
        """Close the innermost transaction: it becomes a part of the outer one, or a step of undo.

        One in which nothing changed is no step.
        """
        step = self._open.pop()
        if self._open:
            for place, old in step.items():
                self._open[-1].setdefault(place, old)
            return
        changed = {place: old for place, old in step.items() if not _holds(place, old)}
        if changed:
            self._steps.append(changed)
            self.made += 1
            self._drop_oldest()

    def changed(self) -> list[Place] | None:
        """Return the places that the open transaction left different; None: it is not the last."""
        if len(self._open) > 1:
            return None
        return [place for place, old in self._open[-1].items() if not _holds(place, old)]

    def before_open(self, part: Part) -> dict[tuple[str, Any], Any]:
        """Return what places of a part held before the open transactions, by table and key."""
        found: dict[tuple[str, Any], Any] = {}
        for step in self._open:
            for (owner, table, key), old in step.items():
                if owner is part:
                    found.setdefault((table, key), old)
        return found

    @property
    def is_nested(self) -> bool:
        """Whether the innermost transaction is inside another one."""
        return len(self._open) > 1

    def noted(self, table: str) -> Iterator[Any]:
        """Return what undoing or rolling back could put into the places of a table."""
        for step in (*self._steps, *self._open):
            yield from (old for (_, name, _), old in step.items() if name == table)

    def roll_back(self) -> None:
        """Close the innermost transaction and take back what was changed in it."""
        _put_back(self._open.pop())

    def require_step(self) -> None:
        """Raise UndoError unless there is something to undo and no transaction is open."""
        if self._open:
            raise UndoError("cannot undo inside a transaction: end it first")
        if not self._steps and self._dropped:
            raise UndoError(
                f"cannot undo: only the last {self._limit} steps were kept (undo_limit)"
            )
        if not self._steps:
            raise UndoError(f"cannot undo: nothing has changed since {self._beginning}")

    def before_last(self, part: Part, table: str, key: Any = None) -> Any:
        """Return what `undo` would put back in a place; None where it leaves that as it is."""
        return self._steps[-1].get((part, table, key))

    def undo(self) -> dict[Place, Any]:
        """Take the last step back; return what `redo` needs, by the places that it changed."""
        step = self._steps.pop()
        redo = {place: place[0].held(*place[1:]) for place in reversed(step)}
        _put_back(step)
        self._undone = step
        return redo

    def redo(self, redo: dict[Place, Any]) -> None:
        """Take back the `undo` that has just returned this."""
        _put_back(redo)
        self._steps.append(self._undone)

    def forget(self, event: str) -> None:
        """Let nothing that was done before now be undone, for the reason of `event`.

        Args:
            event: what the error says then, after "nothing has changed since".
        """
        self._beginning, self._dropped = event, False
        self._steps.clear()


def _holds(place: tuple[Part, str, Any], old: Any) -> bool:
    """Say whether a place holds what it held when that was noted."""
    part, table, key = place
    now = part.held(table, key)
    if isinstance(now, Tensor) and isinstance(old, Tensor):
        return same_bits(now, old)
    return not isinstance(now, Tensor) and not isinstance(old, Tensor) and bool(now == old)


def _put_back(step: _Step) -> None:
    # Backwards: slots beyond the old capacity are written before the tensors shrink.
    for (part, table, key), old in reversed(step.items()):
        part.put_back(table, key, old)
