"""What a change of one layer does to the edits of others, where several are edited.

An answer of a layer is input of the layers above it. So a change of one codebook can move the
queries of edits above, and can change what edits of any other layer make the model say. Both are
looked for among the stored prompts: a prompt is reached by a change if a layer now answers it with
another value than before. Edits of such prompts are keyed anew, with the queries that a new edit
would have now, and proven as new ones are. Where one fails, the change is taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adaptor.text_queries import decide
from .codebook.codebook import Codebook
from .codebook.policy import fp32
from .codebook.records import Edit, Label
from .editing.asked import find_keys, wanted_of
from .editing.prefills import Prefills
from .editing.verification import find_unproven
from .families import Family


class LayersError(RuntimeError):
    """A change of one layer that edits of others would not survive; all is as it was."""


@dataclass(frozen=True)
class Answers:
    """What a codebook answers N prompts: `hit [N]`, and `values [N, V]`, zeros where it misses."""

    rows: dict[Label, int]
    hit: Tensor
    values: Tensor

    def differ(self, now: Answers) -> set[Label]:
        """Return the prompts that have another answer now, or were not asked for before."""
        new = {prompt for prompt in now.rows if prompt not in self.rows}
        both = [prompt for prompt in now.rows if prompt in self.rows]
        if not both:
            return new
        was, at = [self.rows[p] for p in both], [now.rows[p] for p in both]
        bits = self.values[was].view(torch.uint8) != now.values[at].view(torch.uint8)
        other = bits.any(dim=1) | (self.hit[was] != now.hit[at])
        return new | {both[row] for row in other.nonzero()[:, 0].tolist()}


class Reach:
    """Finds the prompts that changes of layers reach, and sees to their edits.

    It knows what stored prompts asked each layer with, so that only those are run again that a
    change has reached. What is known of a state that is no more has to be forgotten.
    """

    def __init__(self) -> None:
        self._queries: dict[str, dict[Label, Tensor]] = {}
        self._reached: set[Label] = set()

    def answers(self, families: Sequence[Family]) -> list[Answers]:
        """Return what each layer answers the stored prompts of all."""
        prompts: dict[Label, None] = {}
        for book in _books(families):
            for edit in _stored(book):
                assert edit.prompt is not None  # by `_stored`
                prompts.update(dict.fromkeys((edit.prompt, *edit.negatives)))
        return [self._answers_of(family, list(prompts)) for family in families]

    def _answers_of(self, family: Family, prompts: list[Label]) -> Answers:
        book, text = family.adaptor.codebook, family.adaptor.text
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        if not prompts or not book.entries:
            nothing = book.values.new_zeros(len(prompts), book.values.shape[1])
            return Answers(rows, torch.zeros(len(prompts), dtype=torch.bool), nothing.cpu())
        queries = self._queries_of(family, prompts)
        with book.lock:
            if text is None:
                index = book.lookup(torch.stack(queries).to(book.device))[0]
            else:
                index = torch.tensor([slot for slot, _ in decide(book, queries)])
            values = book.values[index.clamp(min=0)]
        hit = index >= 0
        return Answers(rows, hit.cpu(), torch.where(hit[:, None], values, 0.0).cpu())

    def _queries_of(self, family: Family, prompts: list[Label]) -> list[Tensor]:
        """Return what prompts ask a layer with, each run alone, on the host.

        `[D]` each; under `query="text"` `[S, D]`.
        """
        book, text = family.adaptor.codebook, family.adaptor.text
        before, known = self._queries.get(family.layer, {}), {}
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

    def take(self) -> set[Label]:
        """Return the prompts reached since the last call."""
        reached, self._reached = self._reached, set()
        return reached

    def forget(self, prompts: Iterable[Label] | None = None) -> None:
        """Forget the queries of prompts; None: of those reached since they were taken."""
        gone = self._reached if prompts is None else prompts
        for known in self._queries.values():
            for prompt in gone:
                known.pop(prompt, None)

    def see_to(
        self, families: Sequence[Family], before: Sequence[Answers], new_from: Sequence[int]
    ) -> None:
        """Key the edits of all layers that a change reaches anew, and prove them.

        Args:
            families: of the layers, the lower ones first.
            before: what `answers` gave before the change.
            new_from: for each layer the first id of an edit that is made by the change.

        Raises:
            LayersError: an edit of a reached prompt cannot be keyed anew, or does not hold.
        """
        reached: set[Label] = set()
        # Each layer can move those above it, so there are as many rounds as layers, and a last one.
        for _ in range(len(families) + 2):
            pairs = zip(before, self.answers(families), strict=True)
            new = set().union(*(was.differ(now) for was, now in pairs)) - reached
            reached |= new
            self._reached |= new
            self.forget(reached)
            moved = [_key_anew(family, reached) for family in families]
            if not new and not any(moved):
                break
        else:
            raise LayersError("the answers of the layers go on changing each other's queries")
        _prove(families, reached, new_from)


def _key_anew(family: Family, reached: set[Label]) -> bool:
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


def _prove(families: Sequence[Family], reached: set[Label], new_from: Sequence[int]) -> None:
    new: set[Label] = set()
    for family, first in zip(families, new_from, strict=True):
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
            for family, first in zip(families, new_from, strict=True)
            for edit in _stored(family.adaptor.codebook)
            if edit.prompt in new and edit.whole < first
        ]
        who = f"{', '.join(same)} answers it too; delete that first" if same else "others answer"
        raise LayersError(f"its target would not be produced by all layers together: {who}")


def _books(families: Sequence[Family]) -> list[Codebook]:
    return [family.adaptor.codebook for family in families]


def _stored(book: Codebook) -> list[Edit]:
    """Return the live edits, and their parts, whose prompts are stored."""
    records = [edit for edit in book.storage.edit_records.values() if edit is not None]
    return sorted(
        (edit for edit in records if edit.live and edit.prompt is not None),
        key=lambda edit: edit.id,
    )


def _bits(query: Tensor) -> Tensor:
    return query.contiguous().view(torch.uint8)


def _named(family: Family, ids: list[int]) -> str:
    return f"edit {', '.join(map(str, ids[:8]))} of layer {family.layer}"
