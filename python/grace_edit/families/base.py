"""What every family shares: padded batches, and forwards of the attached model.

A family is a kind of model that can be edited, and its file the only place that knows anything of
the kind. To add one: a subclass of `Family` in a file of its own, a line in `families/__init__`,
and its test.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adaptor import attach as attaching
from ..adaptor.adaptor import GraceAdaptor
from ..adaptor.forwards import plan_prompts
from ..adaptor.positions import QueryPlan
from ..adaptor.state import Captured, LayerReached
from ..adaptor.surroundings import can_stop, device_of
from .eval_mode import EvalMode
from .projection import output_projection
from .texts import Texts

MOST_ROWS = 32
"""Prompts run in one forward at most."""

MOST_TOKENS = 4096
"""Tokens run in one forward at most, padding included, but for a single prompt longer than that."""

MASKED = -100
"""Stands in a label for a token of the prompt, as in the published code."""


def in_pieces(lengths: Sequence[int]) -> list[slice]:
    """Cut a list of texts of these lengths into batches, which bounds the memory of a forward."""
    pieces, start, longest = [], 0, 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        rows = end - start + 1
        if rows > 1 and (rows > MOST_ROWS or rows * longest > MOST_TOKENS):
            pieces.append(slice(start, end))
            start, longest = end, length
    return [*pieces, slice(start, len(lengths))] if lengths else []


def target_of(label: Sequence[int]) -> list[int]:
    """Return the target that a codebook's label stands for: without the masked prompt."""
    return [token for token in label if token != MASKED]


def can_generate(model: nn.Module) -> bool:
    """Say whether a model has transformers' `generate`."""
    return callable(getattr(model, "generate", None))


def has_encoder_and_decoder(model: nn.Module) -> bool:
    """Say whether a model's configuration calls it an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def no_family(model: nn.Module) -> ValueError:
    """Return the error that says what a model would have to be."""
    *kinds, last = (family.kind for family in Family.__subclasses__())
    return ValueError(f"model must be a {', '.join(kinds)} or {last}, got {type(model).__name__}")


class Begun(ABC):
    """Prompts of which what comes before their answers was run, see `Family.begin`."""

    @property
    @abstractmethod
    def ran(self) -> list[tuple[int, int]]:
        """How many columns of each prompt hold tokens, and how many padding."""

    @abstractmethod
    def only(self, rows: Sequence[int]) -> Begun:
        """Return some of these prompts."""

    @abstractmethod
    def target_logits(
        self, family: Any, targets: Sequence[list[int]], values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `Family.target_logits` does of these prompts, but for the order of sums."""

    @abstractmethod
    def produces(self, family: Any, targets: Sequence[list[int]], values: Tensor) -> list[bool]:
        """Return what `Family.produces` does of these prompts, but for the order of sums."""


class Family(Texts, ABC):
    """A model of one kind, and how it is asked; `family_of(model, tokenizer)` chooses.

    Prompts and targets are token ids here (a target may be a class), see `Texts`. `capture`,
    `target_logits` and `produces` run the model with the adaptor that `attach` has set into it.

    Args:
        model: the model, without wrappers.
        tokenizer: turns text into ids; None: prompts and targets are token ids already.

    `cuts` says whether forwards that were cut at the wrapped layer gave the bits of whole ones
    (None: not tried), see `editing.cutting`.
    `goes_on`: up to how many tokens of a prompt, and beside how much padding, forwards that went on
    from `begin` gave about the same numbers; None: they do not, see `editing.lessons`.
    `among_others`: False: generations that went on from `begin` were seen to give a row other
    numbers than it has alone, see `editing.proofs`.
    `prefills`: the adaptor with which generations from kept prompts were tried, and whether they
    gave the bits of whole ones, see `editing.prefills`.
    `runs_once` says that a whole forward was seen to run the wrapped layer once.
    """

    name: ClassVar[str]
    """As saved edits and `--task` call it."""
    kind: ClassVar[str]
    """As an error calls it."""
    auto_class: ClassVar[str]
    """The class of transformers that loads such a model."""
    class_endings: ClassVar[tuple[str, ...]]
    """How the names of its classes end, by which a configuration tells its kind."""
    generates: ClassVar[bool] = False
    """The seam is a model whose `generate` is edited: it asks once and latches the answers."""
    pads_left: ClassVar[bool] = False
    """Several prompts are answered in batches that are padded on the left."""
    last_resort: ClassVar[bool] = False
    """It takes models of many kinds, and is asked after all others whether one is its own."""
    takes_contexts: ClassVar[bool] = False
    """A prompt behind other sentences is asked the same, so that a value can be trained on it."""
    default_query: ClassVar[str] = "mean"
    default_replace: ClassVar[str] = "all"

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.pad_id = self._special("pad_token_id") or 0
        accepted = inspect.signature(type(model).forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.attached = False
        self.cuts: bool | None = None
        self.goes_on: tuple[int, int] | None = (0, 0)
        self.among_others = True
        self.prefills: tuple[GraceAdaptor, bool] | None = None
        self.runs_once = False
        self._eval_mode = EvalMode(model)

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Say whether `model` is of this kind."""

    @classmethod
    def is_named_by(cls, class_name: str, config: Any) -> bool:
        """Say whether the class that a configuration names is of this kind."""
        return class_name.endswith(cls.class_endings)

    def seam(self, layer: str) -> nn.Module:
        """Return the module whose forward sees the mask of the prompts that reach `layer`.

        Raises:
            ValueError: a layer that cannot be edited.
        """
        return self.model

    def asks_by(self, layer: str) -> tuple[str, str]:
        """Return the query and the replacement that suit a layer.

        Raises:
            ValueError: an unknown or ambiguous layer.
        """
        return self.default_query, self.default_replace

    def check_queries(self, queries: Sequence[Tensor]) -> None:
        """Refuse a layer whose queries `[1, D]`, of several prompts, tell them not apart.

        Raises:
            ValueError: naming another layer.
        """
        return None

    @property
    def mask_token_id(self) -> int | None:
        """The token that asks under `query="last"`; None: the last one does."""
        return None

    def probe(self, ids: list[int]) -> list[int]:
        """Make a prompt out of the ids of any text."""
        return ids

    def room_for_answer(self, prompt: str) -> int:
        """Return how many tokens the model can answer to a prompt.

        Raises:
            ValueError: it can answer none.
        """
        self.encode(prompt)
        return self.longest

    def label(self, prompt: list[int], target: list[int]) -> list[int]:
        """Return the label of an edit as the published code compares it."""
        return target

    @abstractmethod
    def target_logits(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return `(logits [n, classes], wanted [n])` of all target tokens, teacher forced.

        `values [B, V]` answer the prompts; they may require grad. None: the codebook, as it serves.
        """

    def begin(self, prompts: Sequence[list[int]], room: int) -> Begun | None:
        """Run what comes before the answers to prompts; None: it cannot be run by itself.

        Args:
            room: tokens that will follow, at most.
        """
        return None

    @abstractmethod
    def produces(
        self, prompts: Sequence[list[int]], targets: Sequence[list[int]], values: Tensor | None
    ) -> list[bool]:
        """Return whether the model produces each target by itself, answered by `values [B, V]`.

        `values=None`: by the codebook, as it serves.
        """

    @abstractmethod
    def answer(self, prompt: list[int], length: int) -> list[int]:
        """Return what the model answers now: `length` new tokens, or the class."""

    def beside(self) -> Family:
        """Return the family of one more layer of the same model, not attached yet."""
        further = copy.copy(self)
        further.attached = False
        return further

    def attach(self, layer: str, adaptor: GraceAdaptor, *, further: bool = False) -> None:
        """Set an adaptor into a layer of the model, which this family then runs.

        Args:
            layer: its name or a unique part of it, see `find_layer`; `self.layer` is the full one.
            adaptor: becomes `self.adaptor`.
            further: the model carries adaptors in other layers, see `attach.attach`.

        Raises:
            ValueError: an unknown or ambiguous layer, one that cannot be edited, or a model that
                carries an adaptor already.
        """
        self.layer, module = attaching.find_layer(self.model, layer)
        seam = self.seam(self.layer)
        if module is output_projection(self.model):
            raise ValueError(
                f"layer must be inside the model, got its output projection {self.layer!r}, to "
                "which generate gives the last token only"
            )
        # A `generate` of somebody's own that prepares nothing runs plain forwards.
        latches = self.generates and hasattr(seam, "prepare_inputs_for_generation")
        how = {"generates": latches, "further": further}
        attaching.attach(self.model, module, seam, adaptor, **how)
        self.adaptor = adaptor
        self.attached = True
        self.cuts, self.goes_on, self.runs_once = None, (0, 0), False
        self.among_others = True

    def detach(self, *, alone: bool = False) -> None:
        """Take the adaptor out of the model; it stays here, with its codebook.

        Args:
            alone: leave those of other layers.
        """
        if self.attached:
            attaching.detach(self.model, self.adaptor if alone else None)
            self.attached = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run the model in eval mode inside a `with` block; all is put back, whatever happens."""
        if not self.attached:
            raise ValueError("the editor must be attached to its model for this; it was detached")
        with self._eval_mode, torch.inference_mode(False), self.adaptor.using_all(ends=None):
            yield

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def inputs(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` `[B, T]` (and positions) of padded rows."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for b, row in enumerate(rows):
            span = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[b, span] = torch.tensor(row)
            mask[b, span] = 1
        batch = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if left and self.takes_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    @torch.no_grad()
    def capture(self, prompts: Sequence[Sequence[int]], *, left: bool = False) -> Captured:
        """Run prompts as one batch and return what the wrapped layer saw, in its own dtype.

        The forward ends there, once a whole one has shown that the layer runs once, and where
        that leaves nothing behind, see `can_stop`. Under `query="text"` the queries are the keys
        of the prompts, float32.
        """
        captures: list[Captured] = []
        stops = self.runs_once and can_stop(self.model, self.layer)
        captured = {"captures": captures, "stops": stops}
        with self.adaptor.using(plan=None, generation=None, forced=None, **captured):
            with self.adaptor.among_others(), suppress(LayerReached):
                self.run_prompts(self.inputs(prompts, left=left))
        if len(captures) != 1:
            raise ValueError(
                f"layer must run once in a forward, got {len(captures)} calls of {self.layer!r}"
            )
        self.runs_once = True
        seen = captures[0]
        return seen if self.adaptor.text is None else replace(seen, queries=self._keys(prompts))

    def _keys(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        text = self.adaptor.text
        assert text is not None
        return torch.stack([text.key(ids) for ids in prompts]).to(self.adaptor.codebook.device)

    def queries(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the queries `[B, D]` of prompts, run in padded batches.

        Under `query="text"` nothing is run, and they are those of the first spans.
        """
        if self.adaptor.text is not None:
            return self._keys(prompts)
        pieces = in_pieces([len(ids) for ids in prompts])
        return torch.cat([self.capture(prompts[piece]).queries for piece in pieces])

    def run_prompts(self, batch: dict[str, Tensor]) -> Any:
        """Run a batch of prompts through the model (its encoder, where that is what is edited)."""
        return self.model(**batch)

    @contextmanager
    def answering(
        self,
        values: Tensor | None,
        plan: QueryPlan | None = None,
        others: Sequence[QueryPlan | None] = (),
    ) -> Iterator[None]:
        """Answer the prompts of a `with` block by `values [B, V]`; None: by the codebook.

        Other layers answer by their codebooks, under plans of theirs where these are given.
        """
        own = self.adaptor.using(forced=values, plan=plan, generation=None)
        if values is not None:
            with own, self.adaptor.among_others(others):
                yield
            return
        with own, ExitStack() as stack:
            for number, other in enumerate(self.adaptor.others):
                its = others[number] if others else None
                stack.enter_context(other.using(plan=its, generation=None))
            yield

    def teaching(
        self,
        values: Tensor | None,
        batch: dict[str, Tensor],
        prompts: Sequence[list[int]],
        prompt_len: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Answer one forward over `inputs` of prompts, or of what begins with them."""
        mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
        plans = []
        for adaptor in (self.adaptor, *self.adaptor.others):
            plan = plan_prompts(adaptor, mask, ids, prompt_len=prompt_len)
            forced = values is not None and adaptor is self.adaptor
            if adaptor.text is not None and not forced:
                with adaptor.using(counts=values is None and adaptor.counts):
                    plan.answers = adaptor.answer(prompts)
            plans.append(plan)
        return self.answering(values, plans[0], plans[1:])

    def generate(self, prompts: Sequence[Sequence[int]], length: int) -> Tensor:
        """Return what `generate` returns, greedy and with a cache, for at most `length` tokens."""
        batch = self.inputs(prompts, left=self.pads_left)
        return self.go_on(batch["input_ids"], batch["attention_mask"], length)

    @torch.no_grad()
    def go_on(self, ids: Tensor, mask: Tensor, length: int, **more: Any) -> Tensor:
        """Return what `generate` returns of `ids` and `mask` `[B, T]`, as `self.generate` does.

        Args:
            more: further arguments, such as a cache of all but the last tokens.
        """
        model: Any = self.model
        # generate makes the positions of a left-padded batch itself.
        produced: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.pad_id,
            **more,
        )
        return produced
