"""Which version of the codebook, and which edit, answered a request.

A prompt asks the codebook once, at its end, under the codebook's lock; whatever is generated after
that follows from this one answer. So the version that is read there, under the same lock, is the
one that the whole reply comes from, whatever is edited meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..codebook.codebook import Codebook


@dataclass(frozen=True)
class Answered:
    """What the codebook said to one prompt.

    Args:
        version: of the codebook that was asked.
        edit: the id of the edit that answered, None: none did.
        distance, radius: of the entry that answered, None where none did.
        seconds: that asking took.
    """

    version: int
    edit: int | None
    distance: float | None
    radius: float | None
    seconds: float


def read_answer(book: Codebook, slot: int, distance: float, seconds: float) -> Answered:
    """Return what a slot (-1: a miss) says; the codebook's lock must be held."""
    if slot < 0:
        return Answered(book.version, None, None, None, seconds)
    edit = book.edit_of_slot(slot).whole
    return Answered(book.version, edit, distance, float(book.radii[slot]), seconds)


class Trace:
    """One HTTP request: what answered it, and whether its client is still there.

    Args:
        loop: of the server.
        explain: the client wants to know which edit answered.

    Attributes:
        answered: None until the codebook was asked.
        submitted: its generation was handed over; what fails before is the request's fault.
        error: what its generation failed with.
        gone: the client has left; what it asked for ends as soon as it can.
        version: of an answer that is not generated, to be stamped.
        body: of a request that generates.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, explain: bool = False) -> None:
        self.explain = explain
        self.answered: Answered | None = None
        self.submitted = False
        self.error: BaseException | None = None
        self.version: int | None = None
        self.body: dict[str, Any] = {}
        self._gone = threading.Event()
        self._left = asyncio.Event()
        self._leaving: list[Callable[[], None]] = []
        self._loop = loop
        self._known = asyncio.Event()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def leave(self) -> None:
        """Note that the client has left, or was answered to the end."""
        self._gone.set()
        self._left.set()
        self._known.set()
        while self._leaving:
            self._leaving.pop()()

    def at_leaving(self, work: Callable[[], None]) -> None:
        """Have something done in the loop when the client leaves."""
        self._leaving.append(work)

    async def left(self) -> None:
        """Wait until the client leaves."""
        await self._left.wait()

    def see(self, book: Codebook, index: Tensor, distance: Tensor, seconds: float) -> None:
        """Take note of a lookup, as a witness of the thread that generates; see `Witness`."""
        self.take(read_answer(book, int(index[0]), float(distance[0]), seconds))

    def take(self, answered: Answered) -> None:
        """Take note of what answered; called in the thread that generates."""
        self.answered = answered
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        """Note that the generation is over; called in the thread that generates."""
        self.error = error
        self._tell()

    def _tell(self) -> None:
        # A server that stops has closed its loop before the last generation ends.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._known.set)

    async def known(self) -> None:
        """Wait until the codebook was asked, or the generation has ended without."""
        await self._known.wait()

    def headers(self) -> dict[str, str]:
        """Return the stamp of the reply."""
        found = self.answered
        if found is None:
            return {} if self.version is None else {VERSION: str(self.version)}
        stamp = {VERSION: str(found.version)}
        if self.explain:
            stamp[EDIT] = "none" if found.edit is None else str(found.edit)
            if found.edit is not None:
                stamp[DISTANCE], stamp[RADIUS] = f"{found.distance:.6g}", f"{found.radius:.6g}"
        return stamp

    def fields(self) -> dict[str, Any]:
        """Return the stamp of a JSON reply, its field `grace`."""
        found = self.answered
        if found is None:
            return {}
        stamp: dict[str, Any] = {"version": found.version}
        if self.explain:
            stamp["edit"] = found.edit
            stamp["distance"], stamp["radius"] = found.distance, found.radius
        return stamp


EXPLAIN = "x-grace-explain"
VERSION = "x-grace-version"
EDIT = "x-grace-edit"
DISTANCE = "x-grace-distance"
RADIUS = "x-grace-radius"

_current: ContextVar[Trace] = ContextVar("grace_trace")


def current() -> Trace:
    """Return the trace of the request that is being handled."""
    return _current.get()


def begin(trace: Trace) -> Callable[[], None]:
    """Make a trace the current one; returns what puts the former back."""
    token = _current.set(trace)
    return lambda: _current.reset(token)
