"""What a lifelong run needs of an editing method, and GRACE as one.

A method makes edits one after the other and answers as the edited model does. Its state can be
written and read back to the bit, which is what makes a run resumable.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..config import GraceConfig
from ..editor import GraceEditor
from .model import CLASSIFIER, Answer, AskedModel, Forced
from .records import EditRecord, Target

TENSORS, FACTS, KEYS = "tensors.safetensors", "facts.json", "keys.safetensors"
Fact = tuple[str, Target]


@dataclass(frozen=True)
class Made:
    """What became of an edit.

    Args:
        accepted: it is in force.
        steps: of training.
        case: what it did to the codebook, empty where there is none.
        reason: why it was refused, or what else is to be said.
        edit: what `Look.edits` calls it, None where it was refused or nobody tells.
    """

    accepted: bool
    steps: int = 0
    case: str = ""
    reason: str = ""
    edit: int | None = None


@dataclass(frozen=True)
class Look:
    """Whether an edit answers a prompt.

    Args:
        fires: one does.
        label: the target of the nearest edit, as text.
        edits: the edits that the nearest entry answers for; None where nobody tells.
        distance, radius: to the nearest key, and of it; None where the method has none.
    """

    fires: bool
    label: str = ""
    edits: tuple[int, ...] | None = None
    distance: float | None = None
    radius: float | None = None


class Method(ABC):
    """A way of editing, on a model of its own for as long as it lives.

    Args:
        asked: the model.
        name: what results call it.
    """

    def __init__(self, asked: AskedModel, name: str) -> None:
        self.asked, self.name = asked, name

    @abstractmethod
    def edit(self, record: EditRecord) -> Made:
        """Make one edit. The same edits in the same order give the same state, to the bit."""

    def look(self, prompt: str) -> Look | None:
        """Say whether an edit answers `prompt`; None: this method cannot tell, any answer may
        have changed. Where one does not fire, the answer is the unedited model's."""
        return None

    def ask(
        self, prompt: str, target: Target | None, least: int = 1
    ) -> tuple[Answer, Forced | None]:
        """Answer as the edited model does: freely, and teacher forced where there is a target.

        Args:
            least: tokens that a causal model says at least.
        """
        return self.asked.ask(prompt, target, least)

    def answering(self, edit: int) -> AbstractContextManager[None] | None:
        """Let one edit answer every prompt inside a `with` block, whatever its scope; None: this
        method cannot."""
        return None

    @abstractmethod
    def unedited(self) -> AbstractContextManager[None]:
        """Answer as the unedited model inside a `with` block."""

    @property
    def keys(self) -> int | None:
        """How many entries there are, None for a method without entries."""
        return None

    def map(self) -> KeyMap | None:
        """Return the entries for a picture, None for a method without any."""
        return None

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the state to an empty directory."""

    @abstractmethod
    def restore(self, directory: Path) -> None:
        """Read a state back; `edit` then goes on as if nothing had happened."""

    @abstractmethod
    def close(self) -> None:
        """Leave the model as it was found."""


@dataclass(frozen=True)
class KeyMap:
    """The entries of a codebook: `keys [N, D]`, `radii` and `labels` of each."""

    keys: torch.Tensor
    radii: list[float]
    labels: list[str]


def write_map(directory: Path, found: KeyMap) -> None:
    """Write the entries for a picture."""
    fresh = directory / (KEYS + ".new")
    text = json.dumps({"radii": found.radii, "labels": found.labels})
    save_file({"keys": found.keys.contiguous()}, fresh, metadata={"entries": text})
    fresh.replace(directory / KEYS)


def read_map(directory: Path) -> KeyMap | None:
    """Return what `write_map` wrote, None if there is nothing."""
    if not (directory / KEYS).exists():
        return None
    with safe_open(directory / KEYS, framework="pt") as file:
        told = json.loads(file.metadata()["entries"])
        return KeyMap(file.get_tensor("keys"), told["radii"], told["labels"])


# What baselines keep on disk, and when their training stops


def read_facts(directory: Path) -> list[Fact]:
    """Return the edits that `write_facts` wrote."""
    found = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return [(prompt, target) for prompt, target in found]


def write_facts(directory: Path, facts: list[Fact]) -> None:
    """Write edits, prompt and target, to a directory."""
    (directory / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def leads(logits: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether every wanted token leads: `logits [n, classes]`, `wanted [n]`."""
    return bool((logits.argmax(dim=-1) == wanted).all())


class Grace(Method):
    """GRACE by this package's editor.

    Args:
        config: the editor's.
    """

    def __init__(self, asked: AskedModel, config: GraceConfig, *, name: str = "grace") -> None:
        super().__init__(asked, name)
        self.editor = GraceEditor(asked.model, asked.tokenizer, config)

    def edit(self, record: EditRecord) -> Made:
        prompt, target = self.asked.for_editor(record.prompt), self.asked.target(record.target)
        try:
            result = self.editor.edit(prompt, target)
        except ValueError as error:  # no edit for this model: too long, or words it does not know
            return Made(False, 0, "", str(error), None)
        return Made(result.success, result.steps, result.case or "", result.reason, result.id)

    def look(self, prompt: str) -> Look | None:
        found = self.editor.explain(self.asked.for_editor(prompt))
        if found.edit_id is None:
            return Look(False, edits=())
        edits = self.editor.codebook.members(found.slot)
        return Look(found.hit, found.label.strip(), edits, found.distance, found.radius)

    def answering(self, edit: int) -> AbstractContextManager[None] | None:
        book = self.editor.codebook
        value = book.values[book.edit(edit).slot].detach().clone()
        return self.editor.adaptor.using(forced=value[None])

    def unedited(self) -> AbstractContextManager[None]:
        return self.editor.disable()

    @property
    def keys(self) -> int | None:
        return self.editor.codebook.entries

    def map(self) -> KeyMap | None:
        book = self.editor.codebook
        used = int(book.count)
        radii = book.radii[:used].tolist()
        live = [slot for slot, radius in enumerate(radii) if radius != float("-inf")]
        labels = [self._shown(book.labels[slot]) for slot in live]
        return KeyMap(book.keys[live].float().cpu(), [radii[slot] for slot in live], labels)

    def _shown(self, label: Any) -> str:
        ids = [token for token in label or () if token != -100]
        if self.asked.family == CLASSIFIER:
            return self.asked.label(ids[0])
        text = self.asked.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text).strip()

    def save(self, directory: Path) -> None:
        self.editor.save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        self.editor.detach()
        asked = self.asked
        self.editor = GraceEditor.from_pretrained(asked.model, asked.tokenizer, directory)

    def close(self) -> None:
        self.editor.detach()
