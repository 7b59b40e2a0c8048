"""Several layers of one model, each with its own codebook, and what a change of one does to others.

An answer of a layer is input of the layers above it. So a change of one codebook can move the
queries of edits above, and can change what edits of any other layer make the model say. Both are
looked for among the stored prompts: a prompt is reached by a change if a layer now answers it with
another value than before. Edits of such prompts are keyed anew, with the queries that a new edit
would have now, and proven as new ones are. Where one fails, the change is taken back.

All codebooks of a model change as one: one thread at a time, one step of undo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .adaptor.text_queries import decide
from .codebook.codebook import Codebook
from .codebook.guard import Guard
from .codebook.policy import fp32
from .codebook.records import Edit, EditResult, Label, UndoError
from .editing.asked import find_keys, wanted_of
from .editing.prefills import Prefills
from .editing.verification import find_unproven
from .families import Family

T = TypeVar("T")


class LayersError(RuntimeError):
    """A change of one layer that edits of others would not survive; all is as it was."""


class Edited(Protocol):
    """An editor of one layer."""

    family: Family


E = TypeVar("E", bound=Edited)


@dataclass(frozen=True)
class _Answers:
    """What a codebook answers N prompts: `hit [N]`, and `values [N, V]`, zeros where it misses."""

    rows: dict[Label, int]
    hit: Tensor
    values: Tensor

    def differ(self, now: _Answers) -> set[Label]:
        """Return the prompts that have another answer now, or were not asked for before."""
        new = {prompt for prompt in now.rows if prompt not in self.rows}
        both = [prompt for prompt in now.rows if prompt in self.rows]
        if not both:
            return new
        was, at = [self.rows[p] for p in both], [now.rows[p] for p in both]
        bits = self.values[was].view(torch.uint8) != now.values[at].view(torch.uint8)
        other = bits.any(dim=1) | (self.hit[was] != now.hit[at])
        return new | {both[row] for row in other.nonzero()[:, 0].tolist()}


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
    _queries: dict[str, dict[Label, Tensor]] = field(default_factory=dict, repr=False)
    _steps: list[_Step] = field(default_factory=list, repr=False)
    _made: list[int] = field(default_factory=list, repr=False)  # steps of undo, by each codebook
    _reached: set[Label] = field(default_factory=set, repr=False)
    _depth: int = 0
    _guard: Guard = field(default_factory=_guard, repr=False)

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
            self._queries[editor.family.layer] = {}
            self._made = [book.storage.journal.made for book in self._books]
            for book in self._books if len(self) > 1 else ():
                book.storage.watcher = self._guard

    @property
    def _families(self) -> list[Family]:
        return [editor.family for editor in self._editors.values()]

    @property
    def _books(self) -> list[Codebook]:
        return [family.adaptor.codebook for family in self._families]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Make what is done inside one step of undo, in all layers, all of it or nothing."""
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
                    for book in books:
                        stack.enter_context(book.transaction())
                    yield
            except BaseException:
                self._forget(self._reached)
                raise
            finally:
                self._depth -= 1
                if not self._depth:
                    reached, self._reached = self._reached, set()
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
                before = self._answers()
                new = [book.storage.next_id for book in self._books]
                made = make()
                self._see_to(before, new)
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
            for book in reversed(step.books):
                book.undo()
            self._steps.pop()
            self._forget(step.reached)
            self._made = [book.storage.journal.made for book in books]

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Let all edits be made anew inside: nothing that was known of them is true then."""
        with self._books[0].changing(), self._guard.open():
            before = [book.version for book in self._books]
            try:
                yield
            finally:
                if before != [book.version for book in self._books]:
                    self._settle()

    def _settle(self) -> None:
        self._steps.clear()
        for known in self._queries.values():
            known.clear()
        self._made = [book.storage.journal.made for book in self._books]

    def _check_steps(self) -> None:
        """Forget what is known if somebody has changed the history of a codebook by itself."""
        if self._made != [book.storage.journal.made for book in self._books]:
            self._settle()

    def _answers(self) -> list[_Answers]:
        """Return what each layer answers the stored prompts of all."""
        prompts: dict[Label, None] = {}
        for book in self._books:
            for edit in _stored(book):
                assert edit.prompt is not None  # by `_stored`
                prompts.update(dict.fromkeys((edit.prompt, *edit.negatives)))
        return [self._answers_of(family, list(prompts)) for family in self._families]

    def _answers_of(self, family: Family, prompts: list[Label]) -> _Answers:
        book, text = family.adaptor.codebook, family.adaptor.text
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        if not prompts or not book.entries:
            nothing = book.values.new_zeros(len(prompts), book.values.shape[1])
            return _Answers(rows, torch.zeros(len(prompts), dtype=torch.bool), nothing.cpu())
        queries = self._queries_of(family, prompts)
        with book.lock:
            if text is None:
                index = book.lookup(torch.stack(queries).to(book.device))[0]
            else:
                index = torch.tensor([slot for slot, _ in decide(book, queries)])
            values = book.values[index.clamp(min=0)]
        hit = index >= 0
        return _Answers(rows, hit.cpu(), torch.where(hit[:, None], values, 0.0).cpu())

    def _queries_of(self, family: Family, prompts: list[Label]) -> list[Tensor]:
        """Return what prompts ask a layer with, each run alone, on the host.

        `[D]` each; under `query="text"` `[S, D]`.
        """
        book, text = family.adaptor.codebook, family.adaptor.text
        before, known = self._queries[family.layer], {}
        own = {} if text is not None else {edit.prompt: edit.id for edit in _stored(book)}
        for prompt in prompts:
            query = before.get(prompt)
            if prompt in own:
                query = book.query_of(own[prompt])
            elif query is None and text is not None:
                query = text.rows(prompt)
            elif query is None:
                query = family.capture([list(prompt)]).queries[0].to(book.keys.dtype).cpu()
            known[prompt] = query
        self._queries[family.layer] = known
        return list(known.values())

    def _forget(self, prompts: Iterable[Label]) -> None:
        for known in self._queries.values():
            for prompt in prompts:
                known.pop(prompt, None)

    def _see_to(self, before: list[_Answers], new_from: list[int]) -> None:
        """Key the edits of all layers that a change reaches anew, and prove them.

        Args:
            before: what `_answers` gave before the change.
            new_from: for each layer the first id of an edit that is made by the change.
        """
        reached: set[Label] = set()
        # Each layer can move those above it, so there are as many rounds as layers, and a last one.
        for _ in range(len(self) + 2):
            pairs = zip(before, self._answers(), strict=True)
            new = set().union(*(was.differ(now) for was, now in pairs)) - reached
            reached |= new
            self._reached |= new
            self._forget(reached)
            moved = [self._key_anew(family, reached) for family in self._families]
            if not new and not any(moved):
                break
        else:
            raise LayersError("the answers of the layers go on changing each other's queries")
        self._prove(reached, new_from)

    def _key_anew(self, family: Family, reached: set[Label]) -> bool:
        """Give the edits of prompts that a change has reached their queries of now; say if any."""
        book = family.adaptor.codebook
        if family.adaptor.text is not None:
            return False
        wholes = {
            edit.whole
            for edit in _stored(book)
            if edit.prompt in reached or not reached.isdisjoint(edit.negatives)
        }
        queries: dict[int, tuple[Tensor, float | None]] = {}
        for id in sorted(wholes):
            edit = book.edit(id)
            if edit.prompt is None:
                continue
            try:
                keys, _ = find_keys(family, book, wanted_of(book, edit), Prefills(family))
            except ValueError as error:
                raise LayersError(f"{_named(family, [id])} cannot be keyed anew: {error}") from None
            records = [edit, *book.parts(id)]
            if len(keys) != len(records):
                raise LayersError(f"two prompts of {_named(family, [id])} would have one query")
            for record, key in zip(records, keys, strict=True):
                radius = None if key.radius is None else fp32(key.radius)
                same = torch.equal(_bits(book.query_of(record.id)), _bits(key.query.cpu()))
                if not same or radius != record.radius:
                    queries[record.id] = (key.query, radius)
        if not queries:
            return False
        before = {edit.whole for edit in _stored(book)}
        book.requery(queries)
        lost = sorted(before - {edit.whole for edit in _stored(book)})
        if lost:
            raise LayersError(f"{_named(family, lost)} would have the query of another edit")
        return True

    def _prove(self, reached: set[Label], new_from: list[int]) -> None:
        new: set[Label] = set()
        for family, first in zip(self._families, new_from, strict=True):
            edits = [edit for edit in _stored(family.adaptor.codebook) if edit.prompt in reached]
            unproven = find_unproven(family, edits, False)
            lost = [id for id in unproven if id < first]
            if lost:
                raise LayersError(
                    f"{_named(family, lost)} would no longer produce its target; delete that first"
                )
            new |= {edit.prompt for edit in edits if edit.whole in unproven and edit.prompt}
        if new:
            # One of another layer that was made for the same prompt is the likely reason.
            same = [
                _named(family, [edit.whole])
                for family, first in zip(self._families, new_from, strict=True)
                for edit in _stored(family.adaptor.codebook)
                if edit.prompt in new and edit.whole < first
            ]
            who = (
                f"{', '.join(same)} answers it too; delete that first" if same else "others answer"
            )
            raise LayersError(f"its target would not be produced by all layers together: {who}")


def _stored(book: Codebook) -> list[Edit]:
    """Return the live edits, and their parts, whose prompts are stored."""
    records = [edit for edit in book.storage.edit_records.values() if edit is not None]
    return sorted(
        (edit for edit in records if edit.live and edit.prompt is not None),
        key=lambda edit: edit.id,
    )


def _places(model: nn.Module) -> dict[str, int]:
    return {name: place for place, (name, _) in enumerate(model.named_modules())}


def _bits(query: Tensor) -> Tensor:
    return query.contiguous().view(torch.uint8)


def _named(family: Family, ids: list[int]) -> str:
    return f"edit {', '.join(map(str, ids[:8]))} of layer {family.layer}"
