"""GraceEditor: make, undo, delete, explain, save and load edits of a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import grace_kernels

from . import rekeying, serving
from .adaptor import attach as attaching
from .adaptor.adaptor import GraceAdaptor
from .adaptor.positions import Latched, QueryPlan
from .adaptor.told import PromptEnds
from .codebook.codebook import Codebook
from .codebook.records import Edit, EditResult
from .config import GraceConfig
from .editing.asked import Wanted, read_wanted
from .editing.attaching import attach_new
from .editing.batching import Together
from .editing.explanation import Explanation, explain
from .editing.making import EditMaker
from .editing.scoring import Score, score
from .editing.verification import Misfire, find_misfires
from .families import Family, bare, family_of
from .families.ids import is_chat, token_ids, whole_number
from .layers import Layers
from .progress import bar

log = logging.getLogger("grace_edit")


class GraceEditor:
    """Edit a trained model without touching its weights.

    Several threads may use one editor. `edit`, `edit_batch`, `delete`, `undo` and `rekey` wait for
    each other, from the first look at the codebook to the end, so none takes back what another one
    reported as done; so do changes by `editor.codebook`. Requests never wait for a value to be
    trained.

    Args:
        model: a transformers model: causal (GPT-2, Llama, Qwen, ...), encoder–decoder (T5, edited
            in the encoder or the decoder), sequence classifier or masked language model (BERT,
            RoBERTa, ...).
        tokenizer: its tokenizer; None: prompts and targets are lists of token ids.
        config: a `GraceConfig`; at least the layer.

    Raises:
        ValueError: unknown or ambiguous layer, a model of no supported kind, a model that carries
            an adaptor already, or `query="text"` without a tokenizer or a map that fits.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: GraceConfig) -> None:
        family = family_of(bare(model), tokenizer)
        if not isinstance(config, GraceConfig):
            raise ValueError(f"config must be a GraceConfig, got {config!r}")
        attach_new(family, config)
        self.model, self.family, self.config = model, family, config
        self.layers: Layers[GraceEditor] = Layers()
        self.layers.add(self)

    @classmethod
    def _of(
        cls, model: nn.Module, family: Family, config: GraceConfig, layers: Layers[GraceEditor]
    ) -> GraceEditor:
        """Return the editor of an attached layer."""
        editor = cls.__new__(cls)
        editor.model, editor.family, editor.config = model, family, config
        editor.layers = layers
        layers.add(editor)
        return editor

    def add_layer(self, layer: str, **settings: Any) -> GraceEditor:
        """Edit one more layer of the same model, with a codebook of its own.

        A prompt is answered in every layer whose codebook it hits, the lower ones first. An edit
        is trained and proven with the answers of the other layers in place. What it changes for
        edits of other layers is looked for among their stored prompts: those that it reaches are
        keyed anew, where their queries come from the layer, and proven again. If one no longer
        holds, the edit is refused with the reason, and a `delete` raises; all is as it was.

        `editor.layers` maps the names of the layers to their editors. They are saved and loaded
        together, `undo` takes the last change back in whichever layer it was, `disable` and
        `detach` are of all layers. `explain`, `status`, `verify` and `delete` are of one. A change
        of an answer by `codebook` itself is refused: the editor's own sees to the other layers.

        Args:
            layer: its name, as in `GraceConfig`.
            settings: of the `GraceConfig`, where they are to differ from this editor's.

        Raises:
            ValueError: an unknown or ambiguous layer, one that has a codebook already or lies in
                one that has, `policy="paper"`, or edits that are published or followed.
        """
        config = dataclasses.replace(self.config, **{"layer": layer, **settings})
        with self.codebook.changing() as storage:
            if "paper" in (config.policy, self.config.policy):
                raise ValueError('policy must be "default" where several layers are edited')
            if storage.watcher is not None and len(self.layers) == 1:
                raise ValueError("editor must not be published where several layers are edited")
            family = self.family.beside()
            attach_new(family, config, further=True)
            return self._of(self.model, family, config, self.layers)

    def __repr__(self) -> str:
        state = "" if self.family.attached else ", detached"
        return f"GraceEditor({self.layer!r}, {self.codebook!r}{state})"

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None: there is none."""
        return self.family.tokenizer

    @property
    def adaptor(self) -> GraceAdaptor:
        """What stands round the layer."""
        return self.family.adaptor

    @property
    def layer(self) -> str:
        """The full name of the wrapped layer."""
        return self.family.layer

    @property
    def codebook(self) -> Codebook:
        """The entries: `keys`, `values`, `radii`, `count`, `ids`, `version`."""
        return self.adaptor.codebook

    def edit(
        self,
        prompt: Any,
        target: Any,
        paraphrases: Sequence[Any] = (),
        negatives: Sequence[Any] = (),
    ) -> EditResult:
        """Make the model answer `prompt`, and each of `paraphrases`, with `target`.

        Trains one value, proves by free generation that the model produces the target with the
        value as it is stored, and only then commits it. An edit of a prompt that was edited before
        supersedes that edit.

        An edit with paraphrases has a key for each of them and one value, trained on all of them
        together and proven for each. It is one edit: one id, one step of undo; one that takes over
        any of its prompts supersedes it as a whole. Where paraphrases or negatives are not given,
        none are made up: with `query="text"` the map knows how wordings differ, with the layer's
        own input nothing does.

        Args:
            prompt: a string, chat messages (`[{"role": ..., "content": ...}]`), or token ids: a
                list, a tensor or array `[T]` or `[1, T]`, or what a tokenizer returned.
            target: a string or token ids; for a classifier a class id or label name. It may end
                with an end token, after which the model stops. A string that answers chat messages
                is the whole answer: what the template ends it with is added.
            paraphrases: other wordings of the prompt.
            negatives: prompts that this edit must not answer. The radius of each of its keys ends
                before the nearest of them, half way to it from the edit's own other prompts, and
                does not grow later. Another edit near a negative may still answer it.

        Returns:
            The decision and its figures. `success=False` with a `reason` if the target could not be
            reached, for the prompt or for a paraphrase; the codebook is then as it was. A `reason`
            beside `success=True` says what else happened: edits of other prompts that it
            superseded, that `policy="paper"` shared a value without proving it, or that the target
            seems to lack the space before its first word.

        Raises:
            ValueError: bad prompt or target, a query that is not finite, a negative with the query
                of one of the edit's prompts, or paraphrases with `policy="paper"`.
            FloatingPointError: the loss became NaN or infinite.
            CapacityError: the codebook is frozen and full.
        """
        wanted = read_wanted(self.family, (prompt, target, paraphrases, negatives))
        with self.layers.changing(), self.family.working():
            result = self.layers.edit(lambda: self._maker.make(wanted))
        log.info("edit %s", result.to_dict())
        return result

    def edit_batch(
        self, edits: Sequence[Sequence[Any] | Mapping[str, Any]], *, progress: bool = False
    ) -> list[EditResult]:
        """Make many edits, with the same decisions as one by one in this order.

        Values are trained in common forwards, where they start from the layer's own output
        (`init="warm"`). Keys, radii and cases are those of one by one, while values and losses may
        differ in their last bits, and then in the steps they took. Values whose targets lead by far
        more than rounding are proven in one generation, all others alone, and one that fails is
        trained alone before it is refused. Where several layers are edited, all are trained alone.

        All or nothing on an exception (Ctrl-C included), and one step for `undo`. An edit that is
        refused (`success=False`) does not stop the others; nor does one whose loss becomes NaN or
        infinite, where `edit` raises: here it is refused with that reason.

        Args:
            edits: each `(prompt, target)`, with `paraphrases` and `negatives` behind them if there
                are any, or a mapping with these names.
            progress: show a progress bar on stderr.
        """
        encoded = []
        for number, edit in enumerate(edits):
            try:
                encoded.append(read_wanted(self.family, edit))
            except ValueError as error:
                raise ValueError(f"edits[{number}]: {error}") from error
        with self.layers.changing(), self.family.working():
            numbers = bar(range(len(encoded)), "editing", progress)
            if len(self.layers) == 1:
                together = Together(self._maker, encoded)
                results = [together.make(n) for n in numbers]
            else:  # what one does to other layers may change what the next is trained to
                results = [self.layers.edit(partial(self._attempt, encoded[n])) for n in numbers]
        for result in results:
            log.info("edit %s", result.to_dict())
        return results

    def _attempt(self, wanted: Wanted) -> EditResult:
        return self._maker.attempt(self._maker.read(wanted))

    @property
    def _maker(self) -> EditMaker:
        return EditMaker(self.family, self.config)

    def delete(self, edit_id: int, *, purge: bool = False) -> None:
        """Take an edit back, as if it had never been made; edits it superseded come back.

        No forward of the model is needed. Entries whose only edit it was are freed.

        Args:
            edit_id: as in `EditResult.id`.
            purge: also erase it from the history; `undo` cannot bring it back.

        Raises:
            KeyError: no live edit has this id.
            LayersError: without it, edits of other layers would no longer hold.
        """
        if len(self.layers) == 1:
            self.codebook.delete(edit_id, purge=purge)
            return
        with self.layers.changing(), self.family.working():
            self.layers.change(lambda: self.codebook.delete(edit_id, purge=purge))

    def expire(
        self, unused_for: float, keep: Collection[int] = (), *, dry_run: bool = False
    ) -> list[int]:
        """Delete the edits that answered nobody for `unused_for` seconds, as one step of undo.

        By what `codebook.count_hits` has noted, which must be on. See `Codebook.expire`.

        Args:
            keep: ids of edits that stay.
            dry_run: say which would go, and change nothing.

        Returns:
            The ids of the deleted edits, those that they had superseded among them.

        Raises:
            ValueError: hits are not counted, or `unused_for` is negative or NaN.
            KeyError: an id to keep is unknown.
            LayersError: as `delete`.
        """
        expire = partial(self.codebook.expire, unused_for, keep, dry_run=dry_run)
        if dry_run or len(self.layers) == 1:
            return expire()
        with self.layers.changing(), self.family.working():
            return self.layers.change(expire)

    def undo(self) -> None:
        """Take the last edit, batch or delete back, bitwise; `version` still increases.

        Of several layers the last one, whichever it was in, with what it did to the others.

        Raises:
            UndoError: there is nothing to undo, or it was purged.
        """
        self.layers.undo()

    def rekey(self, *, progress: bool = False) -> list[EditResult]:
        """Make every live edit anew on the model as it is now, after a change of dtype or device.

        Inside `torch.autocast` edits are made that answer inside it and outside.

        Runs each stored prompt again for its key and takes the decisions again in the order of the
        ids, which the edits keep. A value that still works, cast to the new dtype, stays; another
        is trained anew. δ is measured anew unless the configuration names it.

        All or nothing: on any exception the edits are as they were. Afterwards the history holds
        the live edits alone and there is nothing to undo; `version` goes up. Of several layers all
        are made anew, the lower ones first.

        Args:
            progress: show a progress bar on stderr.

        Returns:
            The new results, one per live edit of this layer.

        Raises:
            ValueError: an edit has no stored prompt, the codebook is frozen, or a transaction is
                open.
            RuntimeError: an edit's target cannot be reached on the model as it is now, or its
                query has become that of another one.
        """
        layers = [(editor.family, editor.config) for editor in self.layers.values()]
        with self.layers.anew():
            results = rekeying.rekey(layers, progress)
        return results[list(self.layers).index(self.layer)]

    def explain(self, prompt: Any) -> Explanation:
        """Say which entry answers `prompt` or would come nearest, and how far it is."""
        ids = self.family.encode(prompt)
        with self.family.working():
            return explain(self.family, ids)

    def answer(self, prompt: Any, max_new_tokens: int = 8) -> str:
        """Return the edited model's answer to `prompt` as text (greedy, KV cache) or class name.

        Args:
            prompt: as in `edit`.
            max_new_tokens: most tokens of the answer, at least 1, unless an end token comes first;
                a class takes none.

        Raises:
            ValueError: bad prompt or length.
        """
        if (whole_number(max_new_tokens) or 0) < 1:
            raise ValueError(
                f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}"
            )
        ids = self.family.encode(prompt)
        with self.family.working():
            return self.family.show(self.family.answer(ids, max_new_tokens))

    def score(self, prompt: Any, continuation: Any) -> Score:
        """Say how probable `continuation` is after `prompt` to the model as it serves.

        One forward over both; the codebook is asked at the prompt's end.

        Args:
            prompt: as in `edit`.
            continuation: as a target in `edit`; end tokens may stand anywhere in it. Of a masked
                model the tokens of the masks, each scored by itself; of a classifier a class.

        Raises:
            ValueError: bad or too long.
        """
        return self.score_batch([(prompt, continuation)])[0]

    def score_batch(self, pairs: Sequence[Sequence[Any]]) -> list[Score]:
        """Return the `score` of each `(prompt, continuation)`, run in padded batches.

        Raises:
            ValueError: a pair is bad or too long; the message names it.
        """
        encoded = []
        for number, pair in enumerate(pairs):
            try:
                prompt, continuation = pair
                encoded.append(self.family.encode_pair(prompt, continuation))
            except ValueError as error:
                raise ValueError(f"pairs[{number}]: {error}") from error
        with self.family.working():
            return score(self.family, encoded)

    def prompts(
        self,
        prompts: Sequence[Any] | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Say where the prompts end in plain forwards of this thread inside a `with` block.

        For evaluation harnesses, which run a prompt and its continuation in one forward: by itself
        that takes the whole for prompt. `generate` and this editor's own methods need none of it.

        Args:
            prompts: each row's prompt is the longest of these that it begins with; a row that
                begins with none goes unedited, with a warning.
            lengths: in place of prompts, `[B]`, how many tokens of each row are prompt, padding on
                either side not counted; 0: the row goes unedited.

        Raises:
            ValueError: both or none are given; inside the block, lengths that do not suit the
                batch, or a forward with past, but for lengths under `query="last"` and
                `replace="last"`.
        """
        if (prompts is None) == (lengths is None):
            raise ValueError("prompts or lengths must be given, and not both")
        encoded = None if prompts is None else self._encode_each(prompts)
        counts = None if lengths is None else token_ids(lengths)
        return self.adaptor.using_all(ends=PromptEnds(counts, encoded))

    def queries(self, prompts: Sequence[Any]) -> Tensor:
        """Return the queries of prompts as `[B, D]`, run in padded batches.

        Raises:
            ValueError: a prompt is bad or too long; the message names it.
        """
        encoded = self._encode_each(prompts)
        with self.family.working():
            return self.family.queries(encoded)

    def _encode_each(self, prompts: Sequence[Any]) -> list[list[int]]:
        if isinstance(prompts, (str, Mapping)) or is_chat(prompts):
            raise ValueError("prompts must be a list of prompts, got a single one")
        encoded = []
        for number, prompt in enumerate(prompts):
            try:
                encoded.append(self.family.encode(prompt))
            except ValueError as error:
                raise ValueError(f"prompts[{number}]: {error}") from error
        return encoded

    def answers(self, prompts: Sequence[Any]) -> Latched:
        """Return what answers B prompts, for the `answers` of a plan of one's own.

        Under `query="text"` alone, whose answers depend on nothing that the layer sees.

        Returns:
            `index [B]` (-1: no entry) and `values [B, V]`, on the device of the codebook.

        Raises:
            ValueError: another query.
        """
        if self.adaptor.text is None:
            raise ValueError(f"query must be 'text' for this, got {self.adaptor.query!r}")
        return self.adaptor.answer(self._encode_each(prompts))

    def status(self) -> dict[str, Any]:
        """Return what is attached where, how full it is and what serves it."""
        book = self.codebook
        return {
            "layer": self.layer,
            "layers": list(self.layers),
            "query": self.adaptor.query,
            "text": None if self.adaptor.text is None else self.adaptor.text.describe(),
            "replace": self.adaptor.replace,
            "entries": book.entries,
            "edits": book.edits,
            "capacity": book.capacity,
            "version": book.version,
            "drift": book.drift,
            "fragile": [edit.id for edit in self._live() if edit.result.fragile],
            "sketch": book.describe_sketch(),
            "hits": book.describe_hits(),
            "backend": grace_kernels.build_info(),
            "attached": self.family.attached,
            "shadowed": attaching.shadowed(self.model),
        }

    def verify(self, *, progress: bool = False) -> list[Misfire]:
        """Run every stored prompt again, alone, batched and padded, and list edits that miss.

        Paraphrases are prompts too.

        Args:
            progress: show a progress bar on stderr.

        Returns:
            One `Misfire` per edit and mode in which no entry with the edit's label answers.
        """
        edits = [edit for edit in self.codebook.live_keys if edit.prompt is not None]
        with self.family.working():
            return find_misfires(self.family, edits, progress)

    def _live(self) -> list[Edit]:
        return [edit for edit in self.codebook.history if edit.live]

    def disable(self, *, thread_only: bool = False) -> AbstractContextManager[None]:
        """Serve the unedited model inside a `with` block, in every thread.

        A generation that another thread has begun before ends as it began. Blocks may be nested,
        and those of several threads may overlap: the model is edited again when the last one ends.
        A thread that is started inside must have begun its generation before the block ends.

        Args:
            thread_only: only in the thread that enters the block; others are served as before.
        """
        return self.adaptor.disabled(thread_only=thread_only)

    def plan(self, plan: QueryPlan) -> AbstractContextManager[None]:
        """Name the rows that ask yourself, by a `QueryPlan`, inside a `with` block.

        For what no forward tells by itself: packed batches, past tokens.

        Another layer takes the same rows, unless a block round this one has named its own.
        """
        return self.adaptor.planned(plan)

    @property
    def frozen(self) -> bool:
        """Whether growth past the capacity is refused (captured graphs hold the buffers)."""
        return self.codebook.frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self.codebook.frozen = value

    def detach(self) -> None:
        """Leave the model as it was before the editor came; edits stay in `editor.codebook`.

        All layers are detached.
        """
        for editor in self.layers.values():
            editor.family.detach()

    if not TYPE_CHECKING:  # to a type checker any name at all would then be one of the editor's

        def __getattr__(self, name: str) -> Any:
            if name == "merge_and_unload":
                raise AttributeError(
                    "GraceEditor has no merge_and_unload: whether an edit answers is a distance "
                    "test at run time, so it cannot be merged into weights; detach() gives the "
                    "model back, save_pretrained and grace_edit.load serve the edits elsewhere"
                )
            return super().__getattribute__(name)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the edits to `directory`: `grace_config.json`, `codebook.safetensors`,
        `edits.jsonl`, and under `query="text"` the map, `text_map.safetensors` and
        `text_map.json`; its encoder by name and fingerprint. Those of all layers at once."""
        first, *others = [(editor.family, editor.config) for editor in self.layers.values()]
        serving.save(*first, directory, others=others)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        tokenizer: Any,
        directory: str | Path,
        *,
        encoder: Callable[[list[str]], Any] | str | None = None,
        allow_above: bool = False,
        progress: bool = False,
    ) -> GraceEditor:
        """Attach saved edits to `model` and go on editing.

        Args:
            directory: what `save_pretrained` wrote.
            encoder: of edits with `query="text"`, where it was a callable or lies elsewhere now.
            allow_above: accept a model that differs from the saved one only above the wrapped
                layer, after proving every edit on it anew.
            progress: show a progress bar while proving.

        Returns:
            The editor, of several layers that of the lowest; `editor.layers` has them all.

        Raises:
            StoreError: a file is missing, truncated, altered or of a newer format, or the edits
                belong to another model, layer, dtype, text map or encoder; the message names which.
            ValueError: edits with `query="text"` need a tokenizer, or an encoder that must be given
                again.
        """
        attached = serving.attach_saved(
            model,
            tokenizer,
            directory,
            encoder=encoder,
            allow_above=allow_above,
            progress=progress,
        )
        layers: Layers[GraceEditor] = Layers()
        editors = [cls._of(model, family, config, layers) for family, config in attached]
        return editors[0]
