"""Loading what a command names: a model with its tokenizer, a directory of edits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..codebook import files, store
from ..codebook.codebook import Codebook
from ..codebook.files import StoreError
from ..demo import smollm2
from ..editor import GraceEditor
from ..families import FAMILIES, Family, target_of
from ..keys.prompts import chat_frame
from ..terminal import progress
from .output import CONFLICT, NOT_FOUND, USAGE, CommandError, quiet


@dataclass
class Loaded:
    """A model, its tokenizer and why it was loaded the way it was."""

    model: Any
    tokenizer: Any
    task: str
    why: str

    def facts(self) -> dict[str, str]:
        """Return what was loaded, as strings."""
        parameter = next(self.model.parameters())
        return {
            "source": str(self.model.name_or_path),
            "class": type(self.model).__name__,
            "task": self.task,
            "why": self.why,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
        }


@dataclass
class SavedEdits:
    """A directory of edits as it was read: `described` is what it says of model and settings.

    `changes` of the edits since the last snapshot are in `log_bytes` of a log.
    """

    codebook: Codebook
    described: dict[str, Any]
    beside: dict[str, bytes]
    changes: int = 0
    log_bytes: int = 0

    def about(self, part: str) -> dict[str, Any]:
        """Return a part of the description: `"config"`, `"serving"`, `"model"` or `"adding"`."""
        found = self.described.get(part)
        return found if isinstance(found, dict) else {}

    @property
    def source(self) -> str:
        """The model's path or id, empty if the edits do not say."""
        return str(self.about("model").get("source") or "")


def read_edits_of(directory: Path) -> SavedEdits:
    """Read a directory of edits, without a model.

    Raises:
        CommandError: there is no such directory, or no edits in it.
        StoreError: its files are incomplete, altered or of a newer format.
    """
    if not holds_edits(directory):
        what = "got a file" if directory.exists() else "no such directory"
        what = "no grace_config.json in it" if directory.is_dir() else what
        raise CommandError(NOT_FOUND, f"{directory}: must be a directory of saved edits, {what}")
    saved = store.load_saved(directory)
    book = saved.codebook.to("cpu")
    book.storage.slots.maintain_sketch()
    return SavedEdits(book, saved.config, saved.beside, saved.changes, saved.end.offset)


def holds_edits(directory: Path) -> bool:
    """Say whether there are saved edits in a directory."""
    return (directory / files.CONFIG).is_file()


def check_place(out: Path) -> None:
    """Refuse a directory that cannot be written, before any work is done."""
    if out.exists() and not out.is_dir():
        raise CommandError(USAGE, f"--out {out}: must be a directory, got a file")
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(USAGE, f"--out {out}: must be writable, got no permission in {parent}")


def attach_edits(loaded: Loaded, directory: Path) -> GraceEditor:
    """Attach saved edits, whose files have been read before, to a model.

    Raises:
        CommandError: they belong to another model, layer or dtype.
    """
    try:
        return GraceEditor.from_pretrained(loaded.model, loaded.tokenizer, directory)
    except StoreError as error:
        raise CommandError(CONFLICT, str(error)) from error


def choose_task(config: Any, task: str) -> tuple[str, str]:
    """Return the task and the reason, from the class that a model's configuration names.

    Raises:
        CommandError: `task` is `"auto"` and the configuration names no class that tells.
    """
    if task != "auto":
        return task, "asked for with --task"
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        for family in FAMILIES.values():
            if family.is_named_by(name, config):
                return family.name, f"its configuration names {name}"
    raise CommandError(
        USAGE,
        f"--task must be one of {', '.join(FAMILIES)} for this model, because its "
        f"configuration names {' '.join(names) or 'no class'}, which is none of them",
    )


def load_model(source: str, *, task: str, dtype: str | None, device: str) -> Loaded:
    """Load a model and its tokenizer from a directory, the hub or a package, for inference.

    Args:
        source: path or hub id; `"smollm2"`, where no directory is called so: the packaged one.
        task: name of a family, or `"auto"`.
        dtype: name of a torch dtype; None: the checkpoint's own.
        device: where to.

    Raises:
        CommandError: there is no such model, it has no tokenizer, lacks the head that `task` needs,
            or the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(USAGE, "--device must be cpu on this machine, got cuda: torch sees none")
    path = Path(source).expanduser()
    if source == smollm2.NAME and not path.exists():
        return _load_smollm2(task, dtype, device)
    if path.is_dir():
        source = str(path.resolve())
    elif path.exists() or path.is_absolute() or source.startswith((".", "~")):
        raise CommandError(NOT_FOUND, f"--model {source}: no such directory of a model")
    from transformers import AutoConfig, AutoTokenizer

    with quiet(), progress(f"loading {source}"):
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            where = "" if path.is_dir() else "no such directory, and from the hub: "
            raise CommandError(
                NOT_FOUND, f"--model {source}: {where}{_first_line(error)}"
            ) from error
        chosen, why = choose_task(config, task)
        model = _load_weights(source, chosen, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CommandError(
                NOT_FOUND, f"--model {source}: no tokenizer: {_first_line(error)}"
            ) from error
        model.to(device).eval()
    return Loaded(model, tokenizer, chosen, why)


def _load_smollm2(task: str, dtype: str | None, device: str) -> Loaded:
    if task not in ("auto", "causal"):
        raise CommandError(USAGE, f"--task must be causal for {smollm2.NAME}, got {task}")
    with quiet(), progress(f"loading {smollm2.NAME}"):
        try:
            model, tokenizer = smollm2.load_smollm2(getattr(torch, dtype or "float32"))
        except ModuleNotFoundError as error:
            raise CommandError(USAGE, str(error)) from error
        model.to(device)
    return Loaded(model, tokenizer, "causal", "the packaged SmolLM2")


def _load_weights(source: str, task: str, dtype: str | None) -> Any:
    import transformers

    auto = getattr(transformers, FAMILIES[task].auto_class)
    wanted = "auto" if dtype is None else getattr(torch, dtype)
    try:
        model, info = auto.from_pretrained(source, dtype=wanted, output_loading_info=True)
    except OSError as error:
        raise CommandError(NOT_FOUND, f"--model {source}: {_first_line(error)}") from error
    except ValueError as error:
        raise CommandError(USAGE, f"--task {task}: {_first_line(error)}") from error
    # A head that starts at random differs at every load: no edit of it could be used again.
    absent = sorted(info["missing_keys"])
    if absent:
        raise CommandError(
            USAGE,
            f"--model {source}: must hold every weight of {type(model).__name__}, got none for "
            f"{', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}",
        )
    return model


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Unloaded(torch.nn.Module):
    """Stands for a model of which only the configuration is here."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Words:
    """Turns the token ids of saved edits into text; without a tokenizer they stay ids."""

    def __init__(self, saved: SavedEdits, tokenizer: Any, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.chat = None if tokenizer is None else chat_frame(tokenizer)
        family = FAMILIES.get(str(saved.about("serving").get("task")))
        self.text_of = Family.text_of if family is None else family.text_of

    @classmethod
    def of_saved(cls, saved: SavedEdits) -> Words:
        """Return the words of a model that may not be here: never asks the network."""
        tokenizer = config = None
        if saved.source == smollm2.NAME and not Path(saved.source).exists():
            with quiet(), contextlib.suppress(ModuleNotFoundError):
                tokenizer = smollm2.load_tokenizer()
        elif saved.source:
            from transformers import AutoConfig, AutoTokenizer

            with quiet(), contextlib.suppress(OSError, ValueError):
                config = AutoConfig.from_pretrained(saved.source, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(saved.source, local_files_only=True)
        return cls(saved, tokenizer, config)

    def family(self, saved: SavedEdits) -> Family | None:
        """Return what reads texts as the model of the edits does; None without its tokenizer.

        It has no weights: it encodes, and nothing else.
        """
        family = FAMILIES.get(str(saved.about("serving").get("task")))
        if family is None or self.tokenizer is None or self.config is None:
            return None
        return family(_Unloaded(self.config), self.tokenizer)

    def prompt(self, ids: Sequence[int] | None) -> str:
        """Return a prompt as a person reads it; of a chat, what its user said last."""
        if ids is None:
            return "–"
        if self.tokenizer is None:
            return str(list(ids))
        if self.chat is not None:
            said = self.chat.last_turn(self.tokenizer.decode(list(ids)))
            if said is not None:
                return f"chat: {said.strip()}"
        # What the tokenizer puts round a text goes; a mask or an unknown word is part of it.
        kept = {self.tokenizer.mask_token_id, self.tokenizer.unk_token_id}
        dropped = set(self.tokenizer.all_special_ids) - kept
        return str(self.tokenizer.decode([token for token in ids if token not in dropped]))

    def target(self, label: Sequence[int]) -> str:
        """Return the target of a label as text."""
        return self.text_of(target_of(label), self.tokenizer, self.config)
