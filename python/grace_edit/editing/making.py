"""Making one edit: where it goes, the value that answers it, and what it is committed as."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adaptor.precision import autocast_of, check_fits, own_dtype
from ..codebook.codebook import Codebook
from ..codebook.records import Edit, EditResult, Proposal
from ..config import GraceConfig
from ..families import Family, target_of
from .drift import measure_drift, probes_of
from .training import Fit, fit_value


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

    def make(self, prompt: list[int], target: list[int], value: Tensor | None = None) -> EditResult:
        """Make an edit; nothing is changed where it is refused.

        Args:
            prompt, target: token ids.
            value: `[V]`, used before one is trained, if the edit gets one and it works.

        Raises:
            ValueError: the prompt's query is not finite.
            FloatingPointError: the loss became NaN or infinite.
        """
        book = self._book
        seen = self.family.capture([prompt])
        of_layer = self.family.adaptor.text is None
        check_fits(book, seen.queries if of_layer else None, seen.outputs, editing=True)
        if not bool(torch.isfinite(seen.queries).all()):
            raise ValueError(
                f"layer {self.family.layer} must have finite inputs, got NaN or infinity"
            )
        if self.family.adaptor.text is not None and not bool(seen.queries.any()):
            raise ValueError('prompt must hold a word under query="text", got none')
        paper = self.config.policy == "paper"
        label = self.family.label(prompt, target) if paper else target
        query = seen.queries[0].to(book.keys.dtype)  # under autocast another one
        proposal = book.propose(query, label, prompt=prompt)
        if proposal.case in ("expand", "absorb"):
            if paper:
                proven = self._produces(prompt, target, book.values[proposal.slot])
                note = "" if proven else "the shared value does not produce the target"
                return self._commit(proposal, None, None, note)
            shared = self._share(proposal, prompt, target)
            if shared is not None:
                return self._commit(proposal, *shared)
            proposal = book.propose(query, label, prompt=prompt, own_entry=True)
        if value is not None and self._produces(prompt, target, value):
            return self._commit(proposal, value, None)
        fit = self._fit([prompt], [target], self._first_value(seen.outputs[0]))
        if not fit.reached:
            return _refused(proposal, fit)
        return self._commit(proposal, fit.value, fit)

    @property
    def _book(self) -> Codebook:
        return self.family.adaptor.codebook if self.book is None else self.book

    def _share(
        self, proposal: Proposal, prompt: list[int], target: list[int]
    ) -> tuple[Tensor | None, Fit | None] | None:
        """Find a value for the entry that also answers this edit; None if there is none."""
        stored = self._book.values[proposal.slot]
        if self._produces(prompt, target, stored):
            return None, None
        members = [self._book.edit(member) for member in proposal.members]
        if any(edit.prompt is None for edit in members):
            return None
        prompts = [*(list(edit.prompt or ()) for edit in members), prompt]
        targets = [*(target_of(edit.label) for edit in members), target]
        fit = self._fit(prompts, targets, stored)
        return (fit.value, fit) if fit.reached else None

    def _fit(self, prompts: list[list[int]], targets: list[list[int]], start: Tensor) -> Fit:
        config, paper = self.config, self.config.recipe == "paper"
        scale = float(start.float().square().mean().sqrt().clamp(min=1e-3))
        return fit_value(
            self.family,
            prompts,
            targets,
            start,
            self._book.values.dtype,
            lr=1.0 if paper else config.lr * scale,
            max_steps=100 if paper else config.max_steps,
            margin=config.margin,
            early_stop=not paper,
        )

    def _first_value(self, own_output: Tensor) -> Tensor:
        if self.config.init == "warm" and self.config.recipe != "paper":
            return own_output
        source = torch.Generator().manual_seed(self.config.seed + self._book.version)
        return torch.rand(own_output.shape, generator=source).to(own_output.device)

    def _produces(self, prompt: list[int], target: list[int], value: Tensor) -> bool:
        return self.family.produces([prompt], [target], value[None])[0]

    def _answers(self, edit: Edit, slot: int) -> bool:
        if edit.prompt is None:
            return True
        return self._produces(list(edit.prompt), target_of(edit.label), self._book.values[slot])

    def _commit(
        self, proposal: Proposal, value: Tensor | None, fit: Fit | None, note: str = ""
    ) -> EditResult:
        book = self._book
        others = [i for i in proposal.supersedes if book.edit(i).prompt != proposal.prompt]
        if others:
            note = f"supersedes edits {others} of other prompts, answered by the same entry"
        answers = self._answers if self.config.policy == "default" else None
        result = replace(book.commit(proposal, value, answers=answers), reason=note)
        if fit is not None:
            result = replace(
                result, loss_start=fit.loss_start, loss_end=fit.loss_end, steps=fit.steps
            )
        book.record(result)
        return result


def _refused(proposal: Proposal, fit: Fit) -> EditResult:
    return EditResult(
        id=None,
        case=proposal.case,
        slot=None,
        neighbour=proposal.neighbour,
        distance=proposal.distance,
        radius_before=proposal.radius_before,
        radius_after=proposal.radius_before,
        loss_start=fit.loss_start,
        loss_end=fit.loss_end,
        steps=fit.steps,
        success=False,
        reason=fit.reason,
    )
