"""Opening a model that generates text with its edits, for the commands that talk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adaptor import attach as attaching
from ..codebook.files import StoreError
from ..config import GraceConfig
from ..demo import smollm2
from ..durable.following import Follower, follow
from ..editor import GraceEditor
from ..keys.choice import text_keys
from .models import Loaded, attach_edits, load_model, read_edits_of
from .options import check_start
from .output import CONFLICT, NOT_FOUND, USAGE, CommandError, quiet


def open_editor(
    model: str | None,
    where: Path | None,
    dtype: str | None,
    device: str,
    settings: dict[str, Any],
) -> GraceEditor:
    """Load a model that generates text, with the edits of a directory or none.

    Args:
        model: path, id or name; None: the one that the edits were made on.
        where: directory of saved edits; one that is not there yet holds none.
        dtype: to load the model in; None: that of the edits, or of the checkpoint.
        device: where to.
        settings: of a `GraceConfig` without saved edits; None is one that was not given.

    Raises:
        CommandError: an option is missing or does not go with the others, or nothing is there.
    """
    saved = read_edits_of(where) if where is not None and where.exists() else None
    if saved is None:
        check_start(model, settings.get("layer"), None)
    source = model or (saved.source if saved is not None else "")
    if not source:
        raise CommandError(USAGE, "--model must be given, got none")
    given = {name: value for name, value in settings.items() if value is not None}
    if saved is not None:
        _refuse(given, where)
        dtype = dtype or str(saved.codebook.values.dtype).removeprefix("torch.")
    else:
        given.setdefault("layer", smollm2.LAYER)
    loaded = _load_talker(source, dtype, device)
    with quiet():
        if saved is not None and where is not None:
            return attach_edits(loaded, where)
        try:
            attaching.find_layer(loaded.model, given["layer"])
        except ValueError as error:
            raise CommandError(NOT_FOUND, f"--layer: {error}") from error
        if "query" not in given and takes_text(loaded, given):
            given["query"] = "text"
        return GraceEditor(loaded.model, loaded.tokenizer, GraceConfig(**given))


def _refuse(given: dict[str, Any], where: Path | None) -> None:
    if given:
        option = min(given).replace("_", "-")
        raise CommandError(
            USAGE, f"--{option} must be left out with the saved edits of --codebook {where}"
        )


def open_follower(
    model: str | None, where: Path, dtype: str | None, device: str, settings: dict[str, Any]
) -> Follower:
    """Load a model that generates text and follow the edits of a directory, in a thread.

    Args:
        model, dtype, device, settings: as `open_editor`.
        where: directory of saved edits.

    Raises:
        CommandError: nothing is there, or the edits belong to another model, layer or dtype.
    """
    saved = read_edits_of(where)
    _refuse({name: value for name, value in settings.items() if value is not None}, where)
    source = model or saved.source
    if not source:
        raise CommandError(USAGE, "--model must be given, got none")
    dtype = dtype or str(saved.codebook.values.dtype).removeprefix("torch.")
    loaded = _load_talker(source, dtype, device)
    try:
        with quiet():
            return follow(loaded.model, loaded.tokenizer, where)
    except StoreError as error:
        raise CommandError(CONFLICT, str(error)) from error


def _load_talker(source: str, dtype: str | None, device: str) -> Loaded:
    loaded = load_model(source, task="auto", dtype=dtype, device=device)
    if not hasattr(loaded.model, "generate") or loaded.task not in ("causal", "seq2seq"):
        raise CommandError(USAGE, f"--model must be one that generates text, got {loaded.task}")
    return loaded


def takes_text(loaded: Loaded, given: Mapping[str, Any]) -> bool:
    """Say whether new edits ask by text: that was asked for, or a map of ours fits the model."""
    if "encoder" in given or "text_map" in given:
        return True
    try:
        text_keys(loaded.model, loaded.tokenizer)
    except ValueError:
        return False
    return True
