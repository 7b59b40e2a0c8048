"""What a reader compares GRACE with, on the same stream: small, plain implementations.

In `finetuning`, on the weights of one layer: `ft` trains each edit until its target leads, `ewc`
does so held near the weights that earlier edits need, `replay` rehearses the last edits now and
then.
Here: `defer` trains a gate and a linear map beside the layer, `memory` stores targets under GRACE's
keys and says the nearest within the radius, `rag` pastes the fact it finds before the prompt.

The layer is that of GRACE in the same run. Settings are those published with GRACE where it has
them; they were chosen there for other models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import grace_kernels

from ..config import GraceConfig
from ..editor import GraceEditor
from .methods import TENSORS, Fact, Look, Made, Method, leads, read_facts, write_facts
from .model import CAUSAL, CLASSIFIER, Answer, AskedModel, Forced
from .records import EditRecord, Target


class _Switched(Method):
    """A method that leaves the model alone while it is not `enabled`."""

    enabled = True

    @contextmanager
    def unedited(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


class Defer(_Switched):
    """A gate and a linear map beside one layer, trained on each edit in turn.

    Both read the layer's input at the prompt's last token. Where the gate is at least .5 the map's
    output takes the place of the layer's, at that token (causal) or at every token (encoders).

    Args:
        layer, lr, steps: as in `FineTuning`.
        seed: of the gate's and the map's first weights.
    """

    def __init__(
        self, asked: AskedModel, layer: str, *, lr: float = 1e-1, steps: int = 100, seed: int = 0
    ) -> None:
        super().__init__(asked, "defer")
        self.lr, self.steps, self.seed = lr, steps, seed
        self.parts: nn.ModuleDict | None = None  # made with the first edit, which shows the widths
        self.training = False
        self.length: int | None = None  # tokens of the prompt that is asked; None: none is
        self.opened = 0.0  # how far the gate was open when it was asked last
        self._handle = asked.module(layer).register_forward_hook(self._hook)

    def _build(self, source: int, hidden: int) -> nn.ModuleDict:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            parts = {"gate": nn.Linear(source, 1), "out": nn.Linear(source, hidden)}
        return nn.ModuleDict(parts).to(self.asked.model.device)

    def _hook(self, module: nn.Module, given: Any, output: Any) -> Any:
        source, hidden = given[0], _first(output)
        # A forward of fewer tokens is a step of decoding, behind the prompt.
        if not self.enabled or self.length is None or source.shape[1] < self.length:
            return output
        if self.parts is None:
            if not self.training:
                return output
            self.parts = self._build(source.shape[-1], hidden.shape[-1])
        last = self.length - 1
        query = source[:, last].float()
        gate = torch.sigmoid(self.parts["gate"](query))
        self.opened = float(gate.detach())
        values = self.parts["out"](query)
        causal = self.asked.family == CAUSAL
        rows = slice(last, last + 1) if causal else slice(None)
        own = hidden[:, rows].float()
        if self.training:
            mixed = gate[:, None] * values[:, None] + (1 - gate[:, None]) * own
        else:
            mixed = torch.where(gate[:, None] >= 0.5, values[:, None].expand_as(own), own)
        changed = hidden.clone()
        changed[:, rows] = mixed.to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @contextmanager
    def _asking(self, prompt: str) -> Iterator[None]:
        self.length, self.opened = self.asked.prompt_length(prompt), 0.0
        try:
            yield
        finally:
            self.length = None

    def edit(self, record: EditRecord) -> Made:
        self.training = True
        try:
            with self._asking(record.prompt):
                return Made(True, self._train(record))
        finally:
            self.training = False

    def _train(self, record: EditRecord) -> int:
        optimizer: torch.optim.Optimizer | None = None
        for step in range(self.steps + 1):
            with torch.enable_grad():
                logits, wanted = self.asked.training_logits(record.prompt, record.target)
                loss = torch.nn.functional.cross_entropy(logits, wanted)
            if step == self.steps or (leads(logits, wanted) and self.opened >= 0.5):
                return step
            assert self.parts is not None
            parameters = list(self.parts.parameters())
            optimizer = optimizer or torch.optim.Adam(parameters, lr=self.lr)
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        return self.steps

    def look(self, prompt: str) -> Look | None:
        with self._asking(prompt):
            self.asked.read(prompt)
        return Look(self.opened >= 0.5)

    def ask(
        self, prompt: str, target: Target | None, least: int = 1
    ) -> tuple[Answer, Forced | None]:
        with self._asking(prompt):
            return super().ask(prompt, target, least)

    def save(self, directory: Path) -> None:
        tensors = {} if self.parts is None else self.parts.state_dict()
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, directory / TENSORS)

    def restore(self, directory: Path) -> None:
        tensors = load_file(directory / TENSORS)
        if tensors:
            hidden, source = tensors["out.weight"].shape
            self.parts = self._build(source, hidden)
            self.parts.load_state_dict(tensors)

    def close(self) -> None:
        self._handle.remove()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Memory(_Switched):
    """Stored answers: the target of the nearest stored prompt, if it is within the radius.

    Keys are what GRACE would ask with, and the distance is its own; the model says nothing.

    Args:
        config: GRACE's; layer, query and radius count.
    """

    def __init__(self, asked: AskedModel, config: GraceConfig) -> None:
        super().__init__(asked, "memory")
        self.radius = config.radius
        self.facts: list[Fact] = []
        # Never edited: it makes queries, and the model's answers are its own.
        self.editor = GraceEditor(asked.model, asked.tokenizer, config)
        self.stored = self.editor.codebook.keys[:0].clone()

    def _queries(self, prompt: str) -> Tensor:
        """Return `[S, D]`: one row, or one per span of the text; a key is the first."""
        asked = self.asked.for_editor(prompt)
        text = self.editor.adaptor.text
        if text is None:
            return self.editor.queries([asked]).detach()
        return text.rows(self.editor.family.encode(asked)).to(self.stored.device)

    def edit(self, record: EditRecord) -> Made:
        key = self._queries(record.prompt)[:1]
        self.stored = torch.cat([self.stored, key.to(self.stored.dtype)])
        self.facts.append((record.prompt, record.target))
        return Made(True, edit=len(self.facts) - 1)

    def nearest(self, prompt: str) -> tuple[int, float]:
        """Return the number of the fact whose prompt is nearest, and how far it is."""
        radii = torch.zeros(len(self.facts), device=self.stored.device)
        indices, distances = grace_kernels.nearest(self._queries(prompt), self.stored, radii)
        row = int(distances.argmin())
        return int(indices[row]), float(distances[row])

    def _found(self, prompt: str) -> Target | None:
        if not self.enabled or not self.facts:
            return None
        index, distance = self.nearest(prompt)
        return self.facts[index][1] if distance <= self.radius else None

    def look(self, prompt: str) -> Look | None:
        if not self.facts:
            return Look(False, edits=())
        index, distance = self.nearest(prompt)
        label = self.asked.label(self.facts[index][1])
        return Look(distance <= self.radius, label, (index,), distance, self.radius)

    def ask(
        self, prompt: str, target: Target | None, least: int = 1
    ) -> tuple[Answer, Forced | None]:
        found = self._found(prompt)
        if found is None:
            return super().ask(prompt, target, least)
        said = self.asked.wanted_ids(prompt, found)
        answer = Answer(self.asked.label(found), said)
        if target is None:
            return answer, None
        wanted = self.asked.wanted_ids(prompt, target)
        # What is stored is said whatever stands before it; it has no likelihood.
        return answer, Forced([*said, *[-1] * len(wanted)][: len(wanted)], wanted, None)

    @property
    def keys(self) -> int | None:
        return len(self.facts)

    def save(self, directory: Path) -> None:
        save_file({"keys": self.stored.cpu().contiguous()}, directory / TENSORS)
        write_facts(directory, self.facts)

    def restore(self, directory: Path) -> None:
        self.stored = load_file(directory / TENSORS)["keys"].to(self.stored.device)
        self.facts = read_facts(directory)

    def close(self) -> None:
        self.editor.detach()


_WORD = re.compile(r"\w+")
_LAST = re.compile(r"(?<=[.!?\n])\s+")


class Retrieval(_Switched):
    """RAG: the fact that the question is about is pasted before it.

    It is found by `memory`, by the keys that GRACE has. Without one it is the fact whose prompt is
    most like the question's last sentence, by the cosine of their words, weighted by rarity among
    the facts (words of no fact do not count): a weak retriever.

    Args:
        threshold: least cosine, 0 to 1, of a fact that is pasted.
        memory: of this method alone.

    Raises:
        ValueError: the model is a classifier, which reads no facts.
    """

    def __init__(
        self, asked: AskedModel, *, threshold: float = 0.5, memory: Memory | None = None
    ) -> None:
        super().__init__(asked, "rag")
        if asked.family == CLASSIFIER:
            raise ValueError("rag must be run on a language model, got a classifier")
        self.threshold, self.memory = threshold, memory
        self.facts: list[Fact] = []
        self.words: list[Counter[str]] = []
        self.documents: Counter[str] = Counter()

    def _add(self, fact: Fact) -> None:
        self.facts.append(fact)
        found = _words(fact[0])
        self.words.append(found)
        self.documents.update(found.keys())

    def edit(self, record: EditRecord) -> Made:
        if self.memory is not None:
            self.memory.edit(record)
        self._add((record.prompt, record.target))
        return Made(True, edit=len(self.facts) - 1)

    def _weigh(self, words: Counter[str]) -> dict[str, float]:
        total = len(self.facts) + 1
        return {
            word: count * math.log(1 + total / (1 + self.documents[word]))
            for word, count in words.items()
            if word in self.documents
        }

    def _found(self, prompt: str) -> int | None:
        if not self.facts:
            return None
        if self.memory is not None:
            index, distance = self.memory.nearest(prompt)
            return index if distance <= self.memory.radius else None
        asked = self._weigh(_words(_LAST.split(prompt.strip())[-1]))
        likenesses = [_cosine(asked, self._weigh(words)) for words in self.words]
        best = max(range(len(likenesses)), key=likenesses.__getitem__)
        return best if likenesses[best] >= self.threshold else None

    def _behind(self, prompt: str) -> str:
        found = self._found(prompt) if self.enabled else None
        if found is None:
            return prompt
        fact = self.facts[found]
        return f"{fact[0].strip()} {self.asked.label(fact[1])}. {prompt}"

    def look(self, prompt: str) -> Look | None:
        found = self._found(prompt)
        if found is None:
            return Look(False, edits=())
        return Look(True, self.asked.label(self.facts[found][1]), (found,))

    def ask(
        self, prompt: str, target: Target | None, least: int = 1
    ) -> tuple[Answer, Forced | None]:
        return super().ask(self._behind(prompt), target, least)

    @property
    def keys(self) -> int | None:
        return len(self.facts)

    def save(self, directory: Path) -> None:
        if self.memory is not None:
            self.memory.save(directory)
        write_facts(directory, self.facts)

    def restore(self, directory: Path) -> None:
        if self.memory is not None:
            self.memory.restore(directory)
        self.facts, self.words, self.documents = [], [], Counter()
        for fact in read_facts(directory):
            self._add(fact)

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    shared = math.fsum(weight * b.get(word, 0.0) for word, weight in a.items())
    lengths = math.sqrt(math.fsum(w * w for w in a.values()) * math.fsum(w * w for w in b.values()))
    return shared / lengths if lengths else 0.0
