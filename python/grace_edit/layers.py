"""Several layers of one model, each with its own codebook, which change as one.

One thread at a time, one step of undo, seen by requests at once. What a change of one layer does
to the edits of others is seen to by `reach`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from torch import nn

from .codebook.codebook import Codebook
from .codebook.guard import Guard
from .codebook.moments import Moments
from .codebook.records import EditResult, Label, UndoError
from .families import Family
from .reach import LayersError, Reach

__all__ = ["Layers", "LayersError"]

T = TypeVar("T")


class Edited(Protocol):
    """An editor of one layer."""

    family: Family


E = TypeVar("E", bound=Edited)


@dataclass(frozen=True)
class _Step:
    """A step of undo: the codebooks that it changed, and the prompts that it reached."""

    books: list[Codebook]
    reached: set[Label]


def _guard() -> Guard:
    return Guard(
        "codebook must be changed by its editor where several layers are edited, got a change by "
        "itself, which edits of the other layers might not survive: call edit, edit_batch, delete, "
        "expire or undo of the editor, editor.layers[NAME]",
        of_history=True,
    )


@dataclass(eq=False)
class Layers(Mapping[str, E], Generic[E]):
    """The editors of a model by the full names of their layers, the lower layers first.

    Changes go through `change`, `edit` and `undo`, which see to the other layers; others that would
    change an answer are refused. Of a model with one layer these are no more than its codebook's
    own, and nothing is refused.
    """

    _editors: dict[str, E] = field(default_factory=dict)
    _reach: Reach = field(default_factory=Reach, repr=False)
    _steps: list[_Step] = field(default_factory=list, repr=False)
    _made: list[int] = field(default_factory=list, repr=False)  # steps of undo, by each codebook
    _depth: int = 0
    _guard: Guard = field(default_factory=_guard, repr=False)
    _moments: Moments = field(default_factory=Moments, repr=False)

    def __getitem__(self, layer: str) -> E:
        return self._editors[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._editors)

    def __len__(self) -> int:
        return len(self._editors)

    def add(self, editor: E) -> None:
        """Take in the editor of one more layer, which is attached and has made no edit."""
        book = editor.family.adaptor.codebook
        if self._editors:
            book.take_turns_with(self._books[0])
        with book.changing():
            if len(self) == 1:
                only = self._books[0]
                self._steps = [_Step([only], set())] * only.storage.journal.steps
            self._editors[editor.family.layer] = editor
            places = _places(editor.family.model)
            self._editors = dict(sorted(self._editors.items(), key=lambda item: places[item[0]]))
            self._made = [book.storage.journal.made for book in self._books]
            for family in self._families if len(self) > 1 else ():
                family.adaptor.codebook.storage.watcher = self._guard
                family.adaptor.moments = self._moments

    @property
    def _families(self) -> list[Family]:
        return [editor.family for editor in self._editors.values()]

    @property
    def _books(self) -> list[Codebook]:
        return [family.adaptor.codebook for family in self._families]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Make what is done inside one step of undo, in all layers, all of it or nothing.

        Raises:
            ValueError: a transaction of one of several codebooks is open.
        """
        books = self._books
        if len(books) == 1:
            with books[0].transaction():
                yield
            return
        with books[0].changing(), self._guard.open():
            if not self._depth:
                self._check_steps()
                if any(book.storage.journal.is_open for book in books):
                    raise ValueError(
                        "cannot change a layer inside a transaction of one codebook where several "
                        "layers are edited: end it first"
                    )
            made = [book.storage.journal.made for book in books]
            self._depth += 1
            try:
                with ExitStack() as stack:
                    outermost = self._depth == 1
                    if outermost:  # others see it when all is done
                        stack.enter_context(self._moments.changing())
                    for book in books:
                        stack.enter_context(book.transaction())
                    yield
                    if outermost:
                        self._moments.publish(books)
            except BaseException:
                self._reach.forget()
                raise
            finally:
                self._depth -= 1
                if not self._depth:
                    reached = self._reach.take()
                    self._made = [book.storage.journal.made for book in books]
            if self._depth:
                return
            pairs = zip(books, made, strict=True)
            changed = [book for book, before in pairs if book.storage.journal.made > before]
            if changed:
                self._steps.append(_Step(changed, reached))
                del self._steps[: -max(book.undo_limit for book in books) or None]

    def change(self, make: Callable[[], T]) -> T:
        """Change one layer, then see to the edits of all that this reaches.

        Args:
            make: changes the codebook of one layer.

        Returns:
            What `make` returns.

        Raises:
            LayersError: an edit of another layer, or the one just made, would no longer hold.
        """
        with self.changing():
            if len(self) == 1:
                return make()
            with self._families[0].adaptor.as_served():
                before = self._reach.answers(self._families)
                new = [book.storage.next_id for book in self._books]
                made = make()
                self._reach.see_to(self._families, before, new)
                return made

    def edit(self, make: Callable[[], EditResult]) -> EditResult:
        """Make an edit by `make`; one that other layers' edits do not survive is refused."""
        results: list[EditResult] = []

        def made() -> EditResult:
            results.append(make())
            return results[0]

        try:
            return self.change(made)
        except LayersError as error:
            made_of = results[0]
            return replace(
                made_of,
                id=None,
                slot=None,
                radius_after=made_of.radius_before,
                success=False,
                proven=False,
                reason=str(error),
            )

    def undo(self) -> None:
        """Take the last step back, in all layers that it changed.

        Raises:
            UndoError: there is none, or a codebook was changed otherwise since.
        """
        books = self._books
        if len(books) == 1:
            books[0].undo()
            return
        with books[0].changing(), self._guard.open():
            self._check_steps()
            if not self._steps:
                for book in books:
                    if not book.storage.journal.steps:
                        book.storage.journal.require_step()
                raise UndoError("cannot undo: a layer's codebook was changed by itself since")
            step = self._steps[-1]
            for book in step.books:
                book.storage.journal.require_step()
            with self._moments.changing():
                self._moments.publish(step.books, by_undo=True)
                for book in reversed(step.books):
                    book.undo()
            self._steps.pop()
            self._reach.forget(step.reached)
            self._made = [book.storage.journal.made for book in books]

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Let all edits be made anew inside: nothing that was known of them is true then."""
        books = self._books
        with books[0].changing(), self._guard.open(), ExitStack() as stack:
            before = [book.version for book in books]
            # Inside a change they will refuse to be replaced, and that goes on.
            alone = len(books) > 1 and not self._depth
            if alone:
                stack.enter_context(self._moments.changing())
                self._moments.leave(books)
            try:
                yield
                if alone:
                    self._moments.publish(books)
            finally:
                if before != [book.version for book in books]:
                    self._settle()

    def _settle(self) -> None:
        self._steps.clear()
        self._reach = Reach()
        self._made = [book.storage.journal.made for book in self._books]

    def _check_steps(self) -> None:
        """Forget what is known if somebody has changed the history of a codebook by itself."""
        if self._made != [book.storage.journal.made for book in self._books]:
            self._settle()


def _places(model: nn.Module) -> dict[str, int]:
    return {name: place for place, (name, _) in enumerate(model.named_modules())}
