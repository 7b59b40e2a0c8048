"""Edits on disk and in a model that nobody edits: save, check, load.

What serving with `torch.compile` and CUDA graphs may count on, edits being made in between:

* A change within the capacity (edit, delete, undo) is written into the tensors that are there. The
  next call answers with it: nothing is compiled, no graph breaks, no CUDA graph is recorded again.
  That includes the sketch of a large codebook; an edit that makes a new fit of it due waits for
  that, seconds for a very large one.
  Growth past the capacity replaces the tensors: it compiles once more, and graphs that somebody
  captured must be captured again, which a warning says. So choose `GraceConfig(capacity=...)`, and
  set `editor.frozen = True` (or `adaptor.codebook.frozen`) to have growth refused instead.
* `generate` asks once per sequence, at the prompt's end. Later steps run no operator of this
  package: under `replace="last"` and `"prompt"` nothing at all, under `"all"` a `where` with the
  answers latched at the prompt's end. Those, and the plans of `generate`, lie in the same memory
  from call to call of a thread, for the batch sizes used last. transformers makes a new static
  cache in every call, which a CUDA graph notices if it lies elsewhere; one that is given and reset
  stays.
* The host reads no value of a tensor: nothing waits for a GPU. The exceptions: once per adaptor,
  whether a batch is padded on the left or packed (to warn or refuse; nobody asks in a later packed
  one); once per call of `generate`, how much a static cache given to it holds; and under
  `query="text"`, once per request, the ids of the prompts and what answers them.
* Under `query="text"` the answer is there before the layer runs, so no forward of `generate` runs
  an operator of this package. A plain forward that is compiled breaks its graph once, where the ids
  are read, and one that is captured cannot read them: give it a plan with answers,
  `editor.plan(QueryPlan(..., answers=editor.answers(prompts)))`, and write the next ones into the
  tensors of these.
* `editor.plan(QueryPlan(...))` may name other rows at every call; under CUDA graphs write them into
  one plan, or the graph is recorded again for each.
* A forward of one's own with a static cache that was used before asks if the cache is empty, which
  a GPU decides itself. Compiled or captured, a single token asks nobody: it is a step of decoding.
* Compiled and captured runs take no lock: edit between them, on their stream or after waiting for
  it.
* Nothing here warms a GPU up. A server does it before its first request, and before it captures a
  graph, with `grace_kernels.warmup`: the codebook's widths, dtypes and device, and the numbers of
  sequences that will ask at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adaptor import attach as attaching
from .adaptor.adaptor import GraceAdaptor
from .adaptor.fingerprint import fingerprint
from .adaptor.text_queries import TextQueries
from .codebook import store
from .codebook.codebook import Codebook
from .codebook.files import StoreError
from .config import CALLABLE, GraceConfig
from .editing.verification import find_unproven
from .families import Family, bare, family_of
from .keys.choice import TOKENS, text_keys
from .keys.prompts import PromptReader
from .keys.text_map import TextMap

_READ_AGAIN = 16
"""Prompts of saved edits that are read again when they are loaded."""


def save(
    family: Family,
    config: GraceConfig,
    directory: str | Path,
    further: dict[str, Any] | None = None,
    others: Sequence[tuple[Family, GraceConfig]] = (),
) -> None:
    """Write the edits of an attached model to `directory`.

    Args:
        further: what JSON can hold, kept in the description by these names until the next save.
        others: the model's other layers, whose edits are saved in the same step.
    """
    described, beside = describe(family, config)
    kept = [store.Kept(one.adaptor.codebook, *describe(one, its)) for one, its in others]
    described |= further or {}
    store.save(family.adaptor.codebook, directory, described, beside, kept)


def describe(family: Family, config: GraceConfig) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what is kept beside a codebook: the description, and further files by name."""
    adaptor, model = family.adaptor, family.model
    described = {
        "config": config.to_dict(),
        "serving": {
            "layer": family.layer,
            "task": family.name,
            "query": adaptor.query,
            "replace": adaptor.replace,
            "special_ids": list(adaptor.special_ids),
            "mask_token_id": adaptor.mask_token_id,
            "text": None if adaptor.text is None else adaptor.text.about(),
        },
        "model": {
            "class": type(model).__name__,
            "source": getattr(model, "name_or_path", ""),
            "fingerprint": fingerprint(model, family.layer),
        },
    }
    return described, {} if adaptor.text is None else adaptor.text.keys.map.files()


def attach_saved(
    model: nn.Module,
    tokenizer: Any,
    directory: str | Path,
    *,
    encoder: Callable[[list[str]], Any] | str | None = None,
    allow_above: bool = False,
    progress: bool = False,
    saved: store.Saved | None = None,
) -> list[tuple[Family, GraceConfig]]:
    """Attach saved edits to `model`, whether to serve them or to go on editing.

    Args:
        model: the one they were made on, in the same dtype; wrappers (PEFT, `torch.compile`) do not
            matter.
        tokenizer: as for an editor. Edits with `query="text"` need it.
        directory: what `save` wrote.
        encoder: that of edits with `query="text"`, where it was a callable or lies elsewhere now.
        allow_above: accept a model that differs only above the layer, after proving every edit.
        progress: show a progress bar while proving.
        saved: what was read of the directory already; None: it is read.

    Returns:
        For each layer the family of the attached model, and the settings of the edits.

    Raises:
        StoreError: bad files, or another model, layer, dtype, text map or encoder. The model is
            then as it was.
        ValueError: a tokenizer or an encoder is needed and was not given.
    """
    model = bare(model)
    read = store.load_saved(directory, several=True) if saved is None else saved
    attached: list[tuple[Family, GraceConfig]] = []
    other = False
    try:
        for kept in (store.Kept(read.codebook, read.config, read.beside), *read.further):
            beside = attached[0][0] if attached else None
            family, config, differs = _attach(
                model, tokenizer, directory, kept, encoder, allow_above, beside
            )
            attached.append((family, config))
            other = other or differs
        for family, _ in attached if other else ():
            _prove(family, directory, progress)
    except BaseException:
        for family, _ in attached:
            family.detach()
        raise
    return attached


def _attach(
    model: nn.Module,
    tokenizer: Any,
    directory: str | Path,
    kept: store.Kept,
    encoder: Callable[[list[str]], Any] | str | None,
    allow_above: bool,
    attached: Family | None,
) -> tuple[Family, GraceConfig, bool]:
    """Attach the saved edits of one layer, see `attach_saved`.

    Args:
        attached: the family of a layer that is attached already.

    Returns:
        The family, the settings, and whether the model is another one above the layer.
    """
    codebook, described, beside = kept.codebook, kept.config, kept.beside
    try:
        config = GraceConfig(**described["config"])
        config = config if encoder is None else dataclasses.replace(config, encoder=encoder)
        serving, made_on = described["serving"], described["model"]
        layer, prints = serving["layer"], made_on["fingerprint"]
        adaptor = GraceAdaptor(
            codebook,
            query=serving["query"],
            replace=serving["replace"],
            special_ids=tuple(serving["special_ids"]),
            mask_token_id=serving["mask_token_id"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{directory}/grace_config.json: not written by this package ({error!r})"
        ) from error
    try:
        found, module = attaching.find_layer(model, layer)
    except ValueError as error:
        raise StoreError(f"{directory}: edits of another model or layer: {error}") from error
    # Integers are of a quantised layer, and say nothing of what it takes and gives.
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    if dtype is not None and dtype != codebook.values.dtype:
        raise StoreError(
            f"{directory}: dtype must be that of the model's layer ({dtype}), got edits made in "
            f"{codebook.values.dtype}; load the model in that dtype"
        )
    now = fingerprint(model, found)
    different = [part for part in ("below", "above") if now[part] != prints.get(part)]
    if different and not (allow_above and different == ["above"]):
        raise StoreError(
            f"{directory}: edits of another model: its parameters differ {' and '.join(different)} "
            f"the layer {found} (saved from {made_on['class']}, got {type(model).__name__})"
        )
    if adaptor.query == "text":
        adaptor.text = text_of(model, tokenizer, config, serving["text"], beside, directory)
        check_reading(adaptor.text, codebook, directory)
    codebook.to(next(model.parameters()).device).storage.slots.maintain_sketch()
    family = family_of(model, tokenizer) if attached is None else attached.beside()
    family.attach(found, adaptor, further=attached is not None)
    return family, config, bool(different)


def text_of(
    model: Any,
    tokenizer: Any,
    config: GraceConfig,
    saved: dict[str, Any],
    beside: dict[str, bytes],
    directory: str | Path,
) -> TextQueries:
    """Return what makes the queries of saved edits with `query="text"`.

    Args:
        model: only `get_input_embeddings()` is used, and only with `encoder="tokens"`.
        tokenizer: of the model.
        config: of the saved edits, with the encoder to use.
        saved, beside: what their description says of the text, and the files beside it.
        directory: where they lie, for errors.

    Raises:
        StoreError: another text map or encoder.
        ValueError: a tokenizer or an encoder is needed and was not given.
    """
    if tokenizer is None:
        raise ValueError(
            f'tokenizer must be given for the edits of {directory}, whose query="text" reads the '
            "prompts, got None"
        )
    if config.encoder == CALLABLE:
        raise ValueError(
            f"encoder must be given for the edits of {directory}, which were made with a callable "
            f"({saved['encoder']}), got None"
        )
    try:
        text_map = TextMap.from_files(beside, directory)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{directory}: bad text map ({error!r})") from error
    try:
        keys = text_keys(model, tokenizer, config.encoder, text_map)
    except (OSError, ValueError) as error:
        raise StoreError(f"{directory}: {error}") from error
    # An encoder's numbers differ in their last bits between machines: that it fits its map was
    # checked, and `check_reading` follows.
    now = keys.fingerprint() if keys.dense.kind == TOKENS else text_map.fingerprint()
    wanted = saved["fingerprint" if keys.dense.kind == TOKENS else "map_fingerprint"]
    if now != wanted:
        raise StoreError(
            f"{directory}: edits of other text keys: the fingerprint of map and encoder "
            f"{saved['encoder']!r} must be {wanted}, got {now}"
        )
    return TextQueries(keys, PromptReader(tokenizer))


def check_reading(text: TextQueries, book: Codebook, directory: str | Path) -> None:
    """Refuse another tokenizer, under which the prompts of the edits are other texts."""
    live = [edit for edit in book.history if edit.live and edit.prompt is not None]
    for edit in live[:_READ_AGAIN]:
        key = text.key(list(edit.prompt or ()))
        # An encoder may round differently on another machine.
        if not torch.allclose(key, book.query_of(edit.id), rtol=0, atol=1e-2):
            raise StoreError(
                f"{directory}: edits of another tokenizer: the prompt of edit {edit.id} reads "
                f"{text.text(edit.prompt or ())!r}, which has another key"
            )


def _prove(family: Family, directory: str | Path, progress: bool) -> None:
    edits = [e for e in family.adaptor.codebook.live_keys if e.prompt is not None]
    with family.working():
        lost = find_unproven(family, edits, progress)
    if lost:
        raise StoreError(
            f"{directory}: the model must produce every edit's target, got {len(lost)} that it "
            f"does not (edits {lost[:8]})"
        )


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    encoder: Callable[[list[str]], Any] | str | None = None,
) -> GraceAdaptor:
    """Serve saved edits without an editor: attach them to `model`.

    Args:
        model: the model they were made on, in the same dtype.
        directory: what `GraceEditor.save_pretrained` wrote.
        tokenizer: of the model; needed for edits with `query="text"`, which read the prompts.
        encoder: of such edits, where it was a callable or lies elsewhere now.

    Returns:
        The adaptor, of several layers that of the lowest. `grace_edit.detach(model)` takes all out
        again.

    Raises:
        StoreError: bad files, or another model, layer, dtype, text map or encoder.
        ValueError: a tokenizer or an encoder is needed and was not given.
    """
    (family, _), *_ = attach_saved(model, tokenizer, directory, encoder=encoder)
    return family.adaptor
