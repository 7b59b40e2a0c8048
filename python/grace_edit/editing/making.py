"""Making one edit: where it goes, the value that answers it, and what it is committed as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adaptor.precision import autocast_of, own_dtype
from ..codebook.codebook import Codebook
from ..codebook.records import Edit, EditResult, Proposal
from ..config import GraceConfig
from ..families import Family, target_of
from ..families.base import MOST_ROWS
from .asked import Key, Wanted, find_keys
from .contexts import behind_sentences
from .drift import measure_drift, probes_of
from .fitting import Fit, Task
from .prefills import Prefills
from .training import fit_value, fit_values

_FIRST_MOVE = 8.0
"""Nats by which the first step is to raise the log odds of the target's tokens."""

_CONTEXTS_OF_TEXT = 4
"""Sentences that values are trained behind under `query="text"`, see `GraceConfig.contexts`."""


@dataclass(frozen=True)
class Read:
    """An edit whose prompts were run: its keys, the layer's own `output [V]` at its prompt, and
    what is kept of these runs."""

    wanted: Wanted
    keys: list[Key]
    output: Tensor
    prefills: Prefills

    @property
    def prompts(self) -> list[list[int]]:
        """Its prompt and its paraphrases."""
        return [self.wanted.prompt, *self.wanted.paraphrases]


@dataclass(frozen=True)
class EditMaker:
    """Makes edits of an attached model as a configuration says.

    Args:
        family: of the attached model.
        config: how values are trained and entries shared.
        book: the codebook that takes the edits; None: the one that serves.
    """

    family: Family
    config: GraceConfig
    book: Codebook | None = None

    def new_codebook(self, capacity: int) -> Codebook:
        """Return an empty codebook of the layer's widths, dtypes, device and drift."""
        config, family, policy = self.config, self.family, self.config.policy
        if family.adaptor.text is None:
            drift, seen = measure_drift(family, config.seed)
        else:
            drift, seen = 0.0, family.capture(probes_of(family, config.seed)[:1])
            if policy == "default":
                policy = "nearest"  # keys made from text: their balls overlap, the nearest is right
        layer = family.model.get_submodule(family.layer)
        value_dtype = own_dtype(layer, seen.outputs)
        of_layer = family.adaptor.text is None
        return Codebook(
            seen.queries.shape[-1],
            seen.outputs.shape[-1],
            radius=config.radius,
            policy=policy,
            capacity=capacity,
            dtype=own_dtype(layer, seen.queries) if of_layer else seen.queries.dtype,
            value_dtype=value_dtype,
            drift=drift if config.drift is None else config.drift,
            max_radius=config.max_radius,
            autocast=autocast_of(seen.outputs.device) if of_layer else None,
            device=seen.outputs.device,
        )

    def make(self, wanted: Wanted, value: Tensor | None = None) -> EditResult:
        """Make an edit; nothing is changed where it is refused.

        Its prompt and all its paraphrases are answered by one value, or it is refused.

        Args:
            wanted: the edit.
            value: `[V]`, used before one is trained, if the edit gets one and it works.

        Raises:
            ValueError: a query is not finite, that of a negative is one of the edit's own, or the
                policy is "paper" and the edit has paraphrases or negatives.
            FloatingPointError: the loss became NaN or infinite.
        """
        return self.finish(self.read(wanted), value)

    def read(self, wanted: Wanted, prefills: Prefills | None = None) -> Read:
        """Run the prompts of an edit; the first step of `make`, whose ValueErrors it raises.

        Args:
            prefills: runs them; None: its own.
        """
        paper = self.config.policy == "paper"
        if paper and (wanted.paraphrases or wanted.negatives):
            raise ValueError(
                'paraphrases and negatives must be left out with policy="paper", whose edits have '
                f"one key, got {len(wanted.paraphrases)} and {len(wanted.negatives)}"
            )
        prefills = prefills or Prefills(self.family)
        keys, output = find_keys(self.family, self.takes, wanted, prefills)
        return Read(wanted, keys, output, prefills)

    def propose(self, read: Read, **given: Any) -> Proposal:
        """Propose an edit by its first key, see `Codebook.propose`."""
        wanted, label = read.wanted, read.wanted.target
        if self.config.policy == "paper":
            label = self.family.label(wanted.prompt, label)
        return self._propose(read.keys[0], label, negatives=wanted.negatives, **given)

    def finish(self, read: Read, value: Tensor | None = None, fit: Fit | None = None) -> EditResult:
        """Decide, train and commit; what follows `read` in `make`.

        Args:
            read: the edit.
            value: as for `make`.
            fit: one of `train_many` for this edit, used if the edit gets a value of its own. It
                depends on nothing in the codebook. Where it did not reach the target, the value is
                trained alone.
        """
        book, target, keys, prompts = self.takes, read.wanted.target, read.keys, read.prompts
        remark = read.wanted.remark
        paper = self.config.policy == "paper"
        proposal = self.propose(read)
        if proposal.case in ("expand", "absorb"):
            if paper:
                proven = self._produce(prompts, target, book.values[proposal.slot], read.prefills)
                note = remark if proven else "the shared value does not produce the target"
                return self._commit(keys, proposal, None, None, note, proven=proven)
            shared = self._share(proposal, read)
            if shared is not None:
                return self._commit(keys, proposal, *shared, remark)
            proposal = self.propose(read, own_entry=True)
        if value is not None and self._produce(prompts, target, value, read.prefills):
            return self._commit(keys, proposal, value, None, remark)
        if fit is None or not fit.reached:
            start = self._first_value(read.output)
            fit = self.train(prompts, [target] * len(prompts), start, read.prefills)
        if not fit.reached:
            return _refused(proposal, fit, self._failed(read, fit))
        return self._commit(keys, proposal, fit.value, fit, remark)

    def attempt(self, read: Read, fit: Fit | None = None) -> EditResult:
        """Do as `finish`, of an edit among others: a value that becomes NaN or infinite refuses it.

        Such an error comes from training, so nothing was changed.
        """
        try:
            return self.finish(read, fit=fit)
        except FloatingPointError as error:
            return _refused(self.propose(read), None, str(error))

    def _propose(self, key: Key, label: Sequence[int], **given: Any) -> Proposal:
        return self.takes.propose(key.query, label, key.prompt, radius=key.radius, **given)

    def _failed(self, read: Read, fit: Fit) -> str:
        """Return why a value was refused, and for which of several prompts."""
        prompts, target = read.prompts, read.wanted.target
        if len(prompts) == 1:
            return fit.reason
        kept = [self._produce([each], target, fit.value, read.prefills) for each in prompts]
        names = ["the prompt", *(f"paraphrases[{i}]" for i in range(len(prompts) - 1))]
        failed = [name for name, works in zip(names, kept, strict=True) if not works]
        if not failed:
            return fit.reason
        return f"{fit.reason}; with the value that all share {', '.join(failed)} missed it"

    @property
    def takes(self) -> Codebook:
        """The codebook that takes the edits."""
        return self.family.adaptor.codebook if self.book is None else self.book

    def _share(self, proposal: Proposal, read: Read) -> tuple[Tensor | None, Fit | None] | None:
        """Find a value for the entry that also answers this edit; None if there is none."""
        prompts, target = read.prompts, read.wanted.target
        stored = self.takes.values[proposal.slot]
        if self._produce(prompts, target, stored, read.prefills):
            return None, None
        members = [self.takes.edit(member) for member in proposal.members]
        if any(edit.prompt is None for edit in members):
            return None
        every = [*(list(edit.prompt or ()) for edit in members), *prompts]
        targets = [*(target_of(edit.label) for edit in members), *[target] * len(prompts)]
        fit = self.train(every, targets, stored, read.prefills)
        return (fit.value, fit) if fit.reached else None

    def train(
        self,
        prompts: list[list[int]],
        targets: list[list[int]],
        start: Tensor,
        prefills: Prefills | None = None,
    ) -> Fit:
        """Train one value `[V]` from `start` that makes every prompt produce its target.

        Args:
            prefills: which some of the prompts were run in.
        """
        task, dtype = self._task(prompts, targets, start, prefills), self.takes.values.dtype
        how = {"lr": task.lr, "contexts": task.contexts, **self._settings()}
        return fit_value(self.family, prompts, targets, start, dtype, prefills=task.prefills, **how)

    @property
    def starts_warm(self) -> bool:
        """Whether what a value is trained from depends on its own edit alone."""
        return self.config.init == "warm" and self.config.recipe != "paper"

    def task(self, read: Read) -> Task:
        """Return what a value of this edit alone is to do; where values start warm."""
        prompts = read.prompts
        targets = [read.wanted.target] * len(prompts)
        return self._task(prompts, targets, read.output, read.prefills)

    def train_many(self, tasks: Sequence[Task]) -> list[Fit]:
        """Train a value for each task, all in the same forwards."""
        return fit_values(self.family, tasks, self.takes.values.dtype, **self._settings())

    def _task(
        self,
        prompts: list[list[int]],
        targets: list[list[int]],
        start: Tensor,
        prefills: Prefills | None,
    ) -> Task:
        paper = self.config.recipe == "paper"
        scale = float(start.float().square().mean().sqrt().clamp(min=1e-3))
        lr = 1.0 if paper else self.config.lr * scale
        contexts = [] if paper else self._contexts(prompts, targets)
        return Task(prompts, targets, start, lr, contexts, prefills or Prefills(self.family))

    def _settings(self) -> dict[str, Any]:
        config, paper = self.config, self.config.recipe == "paper"
        return {
            "max_steps": 100 if paper else config.max_steps,
            "margin": config.margin,
            "move": 0.0 if paper else _FIRST_MOVE,
            "early_stop": not paper,
        }

    def _contexts(
        self, prompts: list[list[int]], targets: list[list[int]]
    ) -> list[tuple[list[int], list[int]]]:
        """Return the prompts behind other sentences, with their targets, on which to train too."""
        count = self.config.contexts
        if count is None:
            count = _CONTEXTS_OF_TEXT if self.config.query == "text" else 0
        if not self.family.takes_contexts or self.family.adaptor.replace != "last":
            return []
        made = [
            (behind, target)
            for prompt, target in zip(prompts, targets, strict=True)
            for behind in behind_sentences(self.family, prompt, target, count)
        ]
        return made[: max(0, MOST_ROWS - len(prompts))]

    def _first_value(self, own_output: Tensor) -> Tensor:
        if self.starts_warm:
            return own_output
        source = torch.Generator().manual_seed(self.config.seed + self.takes.version)
        return torch.rand(own_output.shape, generator=source).to(own_output.device)

    def _produce(
        self,
        prompts: list[list[int]],
        target: list[int],
        value: Tensor,
        prefills: Prefills | None = None,
    ) -> bool:
        # One prompt at a time: the way each was served when its query was recorded.
        prefills = prefills or Prefills(self.family)
        return all(prefills.produces(prompt, target, value) for prompt in prompts)

    def _answers(self, edit: Edit, slot: int) -> bool:
        if edit.prompt is None:
            return True
        return self._produce([list(edit.prompt)], target_of(edit.label), self.takes.values[slot])

    def _commit(
        self,
        keys: list[Key],
        proposal: Proposal,
        value: Tensor | None,
        fit: Fit | None,
        note: str = "",
        *,
        proven: bool = True,
    ) -> EditResult:
        book = self.takes
        answers = self._answers if self.config.policy == "default" else None
        others = _replaced(book, proposal, proposal)
        with book.transaction():
            result = book.commit(proposal, value, answers=answers)
            shared = book.values[proposal.slot].clone() if value is None else value
            fragile = result.fragile
            for key in keys[1:]:
                further = self._propose(key, proposal.label, part_of=result.id)
                own: Tensor | None = shared
                if further.case in ("expand", "absorb"):
                    if self._takes(key, further, shared):
                        own = None
                    else:
                        further = self._propose(
                            key, proposal.label, part_of=result.id, own_entry=True
                        )
                others |= _replaced(book, further, proposal)
                fragile = book.commit(further, own, answers=answers).fragile or fragile
            if others:
                told = f"supersedes edits {sorted(others)} of other prompts, which had an entry or "
                told += "a prompt that is now this edit's"
                note = f"{told}; {note}" if note else told
            result = replace(result, reason=note, fragile=fragile, keys=len(keys), proven=proven)
            if fit is not None:
                result = replace(
                    result,
                    loss_start=fit.loss_start,
                    loss_end=fit.loss_end,
                    steps=fit.steps,
                    probability=fit.probability,
                )
            book.record(result)
        return result

    def _takes(self, key: Key, proposal: Proposal, shared: Tensor) -> bool:
        """Say whether the entry that a further key falls to answers it as its edit does."""
        stored = self.takes.values[proposal.slot]
        if torch.equal(stored, shared):
            return True
        return self._produce([key.prompt], target_of(proposal.label), stored)


def _replaced(book: Codebook, proposal: Proposal, whole: Proposal) -> set[int]:
    """Return the edits of other prompts than the whole edit's that a proposal supersedes.

    Asked before it is committed: afterwards they may be forgotten.
    """
    return {id for id in proposal.supersedes if book.edit(id).prompt != whole.prompt}


def _refused(proposal: Proposal, fit: Fit | None, reason: str) -> EditResult:
    return EditResult(
        id=None,
        case=proposal.case,
        slot=None,
        neighbour=proposal.neighbour,
        distance=proposal.distance,
        radius_before=proposal.radius_before,
        radius_after=proposal.radius_before,
        loss_start=None if fit is None else fit.loss_start,
        loss_end=None if fit is None else fit.loss_end,
        steps=0 if fit is None else fit.steps,
        success=False,
        probability=None if fit is None else fit.probability,
        proven=False,
        reason=reason,
    )
