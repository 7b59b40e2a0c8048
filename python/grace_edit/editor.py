"""GraceEditor: make, undo, delete, explain, save and load edits of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grace_kernels

from . import rekeying, serving
from .adaptor import attach as attaching
from .adaptor.adaptor import Captured, GraceAdaptor, check_fits
from .adaptor.positions import QueryPlan
from .codebook.codebook import Codebook
from .codebook.records import Edit, EditResult, Proposal
from .config import GraceConfig
from .editing.drift import measure_drift
from .editing.training import Fit, fit_value
from .editing.verification import Misfire, find_misfires, find_unproven, target_of
from .families.tasks import MOST_ROWS, Task, task_for
from .progress import bar

log = logging.getLogger("grace_edit")


@dataclass(frozen=True)
class Explanation:
    """What the codebook says to one prompt.

    Args:
        hit: an entry answers.
        edit_id: the edit that made the nearest entry, None in an empty codebook.
        slot: its slot, −1 in an empty codebook.
        distance: from the prompt's query to its key (+inf in an empty codebook).
        radius: its deferral radius (NaN in an empty codebook).
        label: its label as text.
        runner_up: the second nearest entry as `{"edit_id", "slot", "distance", "radius", "label"}`,
            None if there is none.
    """

    hit: bool
    edit_id: int | None
    slot: int
    distance: float
    radius: float
    label: str
    runner_up: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


class GraceEditor:
    """Edit a trained model without touching its weights.

    Args:
        model: a transformers model: causal (GPT-2, Llama, Qwen), encoder–decoder (T5, edited in the
            encoder), sequence classifier or masked language model (BERT).
        tokenizer: its tokenizer; None: prompts and targets are lists of token ids.
        config: a `GraceConfig`; at least the layer.

    Raises:
        ValueError: unknown or ambiguous layer, a model of no supported kind, or a model that
            carries an adaptor already.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: GraceConfig) -> None:
        self._start(model, tokenizer, config, None)

    def _start(
        self, model: nn.Module, tokenizer: Any, config: GraceConfig, codebook: Codebook | None
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        core = attaching.core_of(model)
        self.task: Task = task_for(core, tokenizer)
        self.layer, module = attaching.find_layer(core, config.layer)
        seam = serving.seam_of(core, self.layer)
        head = getattr(core, "get_output_embeddings", lambda: None)()
        if module is head:
            raise ValueError(
                f"layer must be inside the model, got its output projection {self.layer!r}, to "
                "which generate gives the last token only"
            )
        replace = config.replace or self.task.default_replace
        if config.recipe == "paper" and config.replace in (None, "prompt"):
            replace = "before"
        query = config.query or self.task.default_query
        self.adaptor = GraceAdaptor(
            codebook or Codebook(1, 1),
            query=query,
            replace=replace,
            special_ids=self.task.special_ids if query == "mean" else (),
            mask_token_id=self.task.mask_token_id if query == "last" else None,
        )
        attaching.attach(core, module, seam, self.adaptor)
        self._attached = True
        if codebook is None:
            try:
                with self._working():
                    self.adaptor.codebook = self._new_codebook()
            except BaseException:
                self.detach()
                raise

    def _new_codebook(self, capacity: int | None = None) -> Codebook:
        drift, seen = measure_drift(self.task, self.adaptor, self.config.seed)
        config = self.config
        return Codebook(
            seen.queries.shape[-1],
            seen.outputs.shape[-1],
            radius=config.radius,
            policy=config.policy,
            capacity=capacity or config.capacity,
            dtype=seen.queries.dtype,
            value_dtype=seen.outputs.dtype,
            drift=drift if config.drift is None else config.drift,
            max_radius=config.max_radius,
            device=seen.queries.device,
        )

    # -- editing --------------------------------------------------------------------------------

    @property
    def codebook(self) -> Codebook:
        """The entries: `keys`, `values`, `radii`, `count`, `ids`, `version`."""
        return self.adaptor.codebook

    def edit(self, prompt: Any, target: Any) -> EditResult:
        """Make the model answer `prompt` with `target`.

        Trains one value, proves by free generation that the model produces the target with the
        value as it is stored, and only then commits it. An edit of a prompt that was edited before
        supersedes that edit.

        Args:
            prompt: a string or a list of token ids.
            target: a string or token ids; for a classifier a class id or label name.

        Returns:
            The decision and its figures. `success=False` with a `reason` if the target could not be
            reached; the codebook is then as it was. A `reason` beside `success=True` says what
            else happened: edits of other prompts that an update superseded, or that
            `policy="paper"` shared a value without proving it.

        Raises:
            ValueError: bad prompt or target, or a query that is not finite.
            FloatingPointError: the loss became NaN or infinite.
            CapacityError: the codebook is frozen and full.
        """
        ids, label = self.task.encode_edit(prompt, target)
        with self._working(), self.codebook.transaction():
            result = self._edit(ids, label)
        log.info("edit %s", result.to_dict())
        return result

    def edit_batch(
        self, edits: Sequence[tuple[Any, Any]], *, progress: bool = False
    ) -> list[EditResult]:
        """Make many edits, with the same decisions as one by one in this order.

        All or nothing on an exception (Ctrl-C included), and one step for `undo`. An edit that is
        refused (`success=False`) does not stop the others.

        Args:
            edits: pairs `(prompt, target)`.
            progress: show a progress bar on stderr.
        """
        encoded = []
        for number, (prompt, target) in enumerate(edits):
            try:
                encoded.append(self.task.encode_edit(prompt, target))
            except ValueError as error:
                raise ValueError(f"edits[{number}]: {error}") from error
        with self._working(), self.codebook.transaction():
            results = [self._edit(*pair) for pair in bar(encoded, "editing", progress)]
        for result in results:
            log.info("edit %s", result.to_dict())
        return results

    def _edit(self, ids: list[int], target: list[int], value: Tensor | None = None) -> EditResult:
        """Make an edit; `value [V]` is used, if the edit gets one and it works, before training."""
        book = self.codebook
        seen = self._capture([ids])
        if not bool(torch.isfinite(seen.queries).all()):
            raise ValueError(f"layer {self.layer} must have finite inputs, got NaN or infinity")
        # The published code compares label tensors; a causal model's begin with the masked prompt.
        masked = self.config.policy == "paper" and self.task.name == "causal"
        label = [-100] * len(ids) + target if masked else target
        query = seen.queries[0]
        proposal = book.propose(query, label, prompt=ids)
        if proposal.case in ("expand", "absorb"):
            if self.config.policy == "paper":
                proven = self._produces(ids, target, book.values[proposal.slot])
                note = "" if proven else "the shared value does not produce the target"
                return self._commit(proposal, None, None, note)
            shared = self._share(proposal, ids, target)
            if shared is not None:
                return self._commit(proposal, *shared)
            proposal = book.propose(query, label, prompt=ids, own_entry=True)
        if value is not None and self._produces(ids, target, value):
            return self._commit(proposal, value, None)
        fit = self._fit([ids], [target], self._first_value(seen.outputs[0]))
        if not fit.reached:
            return _refused(proposal, fit)
        return self._commit(proposal, fit.value, fit)

    def _share(
        self, proposal: Proposal, ids: list[int], target: list[int]
    ) -> tuple[Tensor | None, Fit | None] | None:
        """Find a value for the entry that also answers this edit; None if there is none."""
        book = self.codebook
        stored = book.values[proposal.slot]
        if self._produces(ids, target, stored):
            return None, None
        members = [book.edit(member) for member in proposal.members]
        if any(edit.prompt is None for edit in members):
            return None
        prompts = [*(list(edit.prompt or ()) for edit in members), ids]
        labels = [*(target_of(edit) for edit in members), target]
        fit = self._fit(prompts, labels, stored)
        return (fit.value, fit) if fit.reached else None

    def _fit(self, prompts: list[list[int]], labels: list[list[int]], start: Tensor) -> Fit:
        config, paper = self.config, self.config.recipe == "paper"
        scale = float(start.float().square().mean().sqrt().clamp(min=1e-3))
        return fit_value(
            self.task,
            self.adaptor,
            prompts,
            labels,
            start,
            self.codebook.values.dtype,
            lr=1.0 if paper else config.lr * scale,
            max_steps=100 if paper else config.max_steps,
            margin=config.margin,
            early_stop=not paper,
        )

    def _first_value(self, own_output: Tensor) -> Tensor:
        if self.config.init == "warm" and self.config.recipe != "paper":
            return own_output
        source = torch.Generator().manual_seed(self.config.seed + self.codebook.version)
        return torch.rand(own_output.shape, generator=source).to(own_output.device)

    def _commit(
        self, proposal: Proposal, value: Tensor | None, fit: Fit | None, note: str = ""
    ) -> EditResult:
        others = [i for i in proposal.supersedes if self.codebook.edit(i).prompt != proposal.prompt]
        if others:
            note = f"supersedes edits {others} of other prompts, answered by the same entry"
        answers = self._answers if self.config.policy == "default" else None
        result = replace(self.codebook.commit(proposal, value, answers=answers), reason=note)
        if fit is not None:
            result = replace(
                result, loss_start=fit.loss_start, loss_end=fit.loss_end, steps=fit.steps
            )
        self.codebook.record(result)
        return result

    def _answers(self, edit: Edit, slot: int) -> bool:
        if edit.prompt is None:
            return True
        return self._produces(list(edit.prompt), target_of(edit), self.codebook.values[slot])

    def _produces(self, ids: list[int], target: list[int], value: Tensor) -> bool:
        return self.task.produces(self.adaptor, [ids], [target], value[None])[0]

    def _capture(self, prompts: Sequence[list[int]], *, left: bool = False) -> Captured:
        seen = self.task.capture(self.adaptor, prompts, left=left)
        check_fits(self.codebook, seen.queries, seen.outputs)
        return seen

    def delete(self, edit_id: int, *, purge: bool = False) -> None:
        """Take an edit back, as if it had never been made; edits it superseded come back.

        No forward of the model is needed. Entries whose only edit it was are freed.

        Args:
            edit_id: as in `EditResult.id`.
            purge: also erase it from the history; `undo` cannot bring it back.

        Raises:
            KeyError: no live edit has this id.
        """
        self.codebook.delete(edit_id, purge=purge)

    def undo(self) -> None:
        """Take the last edit, batch or delete back, bitwise; `version` still increases.

        Raises:
            UndoError: there is nothing to undo, or it was purged.
        """
        self.codebook.undo()

    def rekey(self, *, progress: bool = False) -> list[EditResult]:
        """Make every live edit anew on the model as it is now, after a change of dtype or device.

        Runs each stored prompt again for its key and takes the decisions again in the order of the
        ids, which the edits keep. A value that still works, cast to the new dtype, stays; another
        is trained anew. δ is measured anew unless the configuration names it.

        All or nothing: on any exception the edits are as they were. Afterwards the history holds
        the live edits alone and there is nothing to undo; `version` goes up.

        Args:
            progress: show a progress bar on stderr.

        Returns:
            The new results, one per live edit.

        Raises:
            ValueError: an edit has no stored prompt, or the codebook is frozen.
            RuntimeError: an edit's target cannot be reached on the model as it is now, or its query
                has become that of another one.
        """
        return rekeying.rekey(self, progress)

    # -- asking ---------------------------------------------------------------------------------

    def explain(self, prompt: Any) -> Explanation:
        """Say which entry answers `prompt` or would come nearest, and how far it is."""
        ids = self.task.encode(prompt)
        with self._working():
            query = self._capture([ids]).queries
        found = [self._describe(slot, d) for slot, d in self.codebook.nearest_two(query[0])]
        if not found:
            return Explanation(False, None, -1, float("inf"), float("nan"), "", None)
        first = found[0]
        hit = int(self.codebook.lookup(query)[0]) >= 0
        return Explanation(hit, **first, runner_up=found[1] if len(found) > 1 else None)

    def _describe(self, slot: int, distance: float) -> dict[str, Any]:
        edit = self.codebook.edit_of_slot(slot)
        return {
            "edit_id": edit.id,
            "slot": slot,
            "distance": distance,
            "radius": float(self.codebook.radii[slot]),
            "label": self.task.show(target_of(edit)),
        }

    def answer(self, prompt: Any, max_new_tokens: int = 8) -> str:
        """Return the edited model's answer to `prompt` as text (greedy, KV cache) or class name."""
        with self._working():
            return self.task.show(self.task.answer(self.task.encode(prompt), max_new_tokens))

    def queries(self, prompts: Sequence[Any]) -> Tensor:
        """Return the queries of prompts as `[B, D]`, run in padded batches."""
        encoded = [self.task.encode(prompt) for prompt in prompts]
        pieces = [encoded[i : i + MOST_ROWS] for i in range(0, len(encoded), MOST_ROWS)]
        with self._working():
            return torch.cat([self.task.capture(self.adaptor, piece).queries for piece in pieces])

    def status(self) -> dict[str, Any]:
        """Return what is attached where, how full it is and what serves it."""
        book = self.codebook
        return {
            "layer": self.layer,
            "query": self.adaptor.query,
            "replace": self.adaptor.replace,
            "entries": book.entries,
            "edits": book.edits,
            "capacity": book.capacity,
            "version": book.version,
            "drift": book.drift,
            "fragile": [edit.id for edit in self._live() if edit.result.fragile],
            "sketch": book.describe_sketch(),
            "backend": grace_kernels.build_info(),
            "attached": self._attached,
            "shadowed": attaching.shadowed(self.model),
        }

    def verify(self, *, progress: bool = False) -> list[Misfire]:
        """Run every stored prompt again, alone, batched and padded, and list edits that miss.

        Returns:
            One `Misfire` per edit and mode in which no entry with the edit's label answers.
        """
        edits = [edit for edit in self._live() if edit.prompt is not None]
        with self._working():
            return find_misfires(self.task, self.adaptor, edits, progress)

    def _live(self) -> list[Edit]:
        return [edit for edit in self.codebook.history if edit.live]

    # -- modes ----------------------------------------------------------------------------------

    def disable(self) -> AbstractContextManager[None]:
        """Serve the unedited model inside a `with` block."""
        return self.adaptor.using(enabled=False)

    def plan(self, plan: QueryPlan) -> AbstractContextManager[None]:
        """Name the rows that ask yourself inside a `with` block (packed batches, past tokens)."""
        return self.adaptor.using(plan=plan)

    @property
    def frozen(self) -> bool:
        """Whether growth past the capacity is refused (captured graphs hold the buffers)."""
        return self.codebook.frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self.codebook.frozen = value

    def merge_and_unload(self) -> None:
        """Refuse: there is nothing that could be merged."""
        raise TypeError(
            "a GRACE edit cannot be merged into weights: whether it answers depends on a distance "
            "test at run time; use save_pretrained and grace_edit.load to serve it elsewhere"
        )

    def detach(self) -> None:
        """Leave the model as it was before the editor came; edits stay in `editor.codebook`."""
        if self._attached:
            attaching.detach(self.model)
            self._attached = False

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Run the model in eval mode; everything is put back, whatever happens."""
        if not self._attached:
            raise ValueError("editor must be attached to its model, got one that was detached")
        training = [module for module in self.model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with torch.inference_mode(False):
                yield
        finally:
            for module in training:
                module.training = True

    # -- disk -----------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the edits to `directory`: `grace_config.json`, `codebook.safetensors`,
        `edits.jsonl`."""
        model, task = self.task.model, self.task.name
        serving.save(model, self.layer, task, self.adaptor, self.config, directory)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        tokenizer: Any,
        directory: str | Path,
        *,
        allow_above: bool = False,
        progress: bool = False,
    ) -> GraceEditor:
        """Attach saved edits to `model` and go on editing.

        Args:
            directory: what `save_pretrained` wrote.
            allow_above: accept a model that differs from the saved one only above the wrapped
                layer, after proving every edit on it anew.
            progress: show a progress bar while proving.

        Raises:
            StoreError: a file is missing, truncated, altered or of a newer format, or the edits
                belong to another model, layer or dtype; the message names which.
        """
        saved = serving.read(attaching.core_of(model), directory, allow_above=allow_above)
        editor = cls.__new__(cls)
        editor._start(model, tokenizer, saved.config, saved.codebook)
        try:
            if saved.differs_above:
                editor._prove_all(directory, progress)
        except BaseException:
            editor.detach()
            raise
        return editor

    def _prove_all(self, directory: str | Path, progress: bool) -> None:
        edits = [edit for edit in self._live() if edit.prompt is not None]
        with self._working():
            lost = find_unproven(self.task, self.adaptor, edits, progress)
        if lost:
            raise serving.StoreError(
                f"{directory}: the model must produce every edit's target, got {len(lost)} that "
                f"it does not (edits {lost[:8]})"
            )


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
