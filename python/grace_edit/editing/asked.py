"""What an edit asks for: its prompts with their queries, and radii that keep its negatives out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_kernels import nearest

from ..adaptor.precision import check_fits
from ..codebook.codebook import Codebook
from ..codebook.policy import fp32
from ..codebook.records import Edit
from ..families import Family, target_of
from ..families.ids import is_chat
from .prefills import Prefills

_FIELDS = ("prompt", "target", "paraphrases", "negatives")


@dataclass(frozen=True)
class Wanted:
    """One edit in token ids.

    Args:
        prompt, target: what is asked, and what is to be answered.
        paraphrases: other wordings of the prompt, with the same target.
        negatives: prompts that the edit must not answer.
        remark: what looks like a mistake in it.
    """

    prompt: list[int]
    target: list[int]
    paraphrases: tuple[list[int], ...] = ()
    negatives: tuple[list[int], ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Key:
    """A prompt of an edit with its query `[D]`, and the radius of its entry (None: as usual)."""

    prompt: list[int]
    query: Tensor
    radius: float | None = None


def wanted_of(book: Codebook, edit: Edit) -> Wanted:
    """Return what a whole edit of the history asked for."""
    return Wanted(
        list(edit.prompt or ()),
        target_of(edit.label),
        tuple(list(part.prompt or ()) for part in book.parts(edit.id)),
        tuple(list(negative) for negative in edit.negatives),
    )


def read_wanted(family: Family, edit: Any) -> Wanted:
    """Turn an edit as a user writes it into token ids.

    Args:
        edit: `(prompt, target)`, `(prompt, target, paraphrases)` or `(prompt, target, paraphrases,
            negatives)`, or a mapping with these names.

    Raises:
        ValueError: it is something else, or a prompt or the target is bad.
    """
    if isinstance(edit, Mapping):
        unknown = sorted(set(edit) - set(_FIELDS))
        if unknown or not {"prompt", "target"} <= set(edit):
            raise ValueError(f"edit must have prompt, target and at most {_FIELDS}, got {[*edit]}")
        fields = dict(edit)
    elif isinstance(edit, (tuple, list)) and 2 <= len(edit) <= len(_FIELDS):
        fields = dict(zip(_FIELDS, edit, strict=False))
    else:
        raise ValueError(f"edit must be (prompt, target) or a mapping, got {edit!r}")
    prompt, target = family.encode_edit(fields["prompt"], fields["target"])
    paraphrases: list[list[int]] = []
    for number, text in enumerate(_prompts(fields, "paraphrases")):
        try:
            # The answer to a message ends its turn, also in other wordings.
            as_is = is_chat(text) or is_chat(fields["prompt"])
            ids, same = family.encode_edit(text, target if as_is else fields["target"])
        except ValueError as error:
            raise ValueError(f"paraphrases[{number}]: {error}") from error
        if same != target:
            raise ValueError(f"paraphrases[{number}] must take the target of the prompt")
        if ids != prompt and ids not in paraphrases:
            paraphrases.append(ids)
    negatives = []
    for number, text in enumerate(_prompts(fields, "negatives")):
        try:
            negatives.append(family.encode(text))
        except ValueError as error:
            raise ValueError(f"negatives[{number}]: {error}") from error
    remark = family.remark(fields["prompt"], fields["target"])
    return Wanted(prompt, target, tuple(paraphrases), tuple(negatives), remark)


def _prompts(fields: Mapping[str, Any], name: str) -> list[Any]:
    given = fields.get(name)
    given = () if given is None else given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name} must be a list of prompts, got {given!r}")
    return list(given)


def find_keys(
    family: Family, book: Codebook, wanted: Wanted, prefills: Prefills
) -> tuple[list[Key], Tensor]:
    """Return the keys of an edit, and the layer's own output `[V]` at its prompt.

    Its own prompt comes first. A paraphrase whose query is at distance 0 from one before it adds no
    key: that one answers it. What runs below the layer is kept in `prefills`.

    Raises:
        ValueError: a query is not finite, or that of a negative is one of the edit's own.
    """
    keys: list[Key] = []
    output: Tensor | None = None
    for prompt in (wanted.prompt, *wanted.paraphrases):
        seen = prefills.capture(prompt)
        of_layer = family.adaptor.text is None
        check_fits(book, seen.queries if of_layer else None, seen.outputs, editing=True)
        query = _checked(family, seen.queries)[0].to(book.keys.dtype)  # another under autocast
        output = seen.outputs[0] if output is None else output
        if all(distance(query, key.query) > 0.0 for key in keys):
            keys.append(Key(prompt, query))
    assert output is not None
    if not wanted.negatives:
        return keys, output
    rows = [_rows(family, book, negative) for negative in wanted.negatives]
    queries = [key.query for key in keys]
    return [
        Key(key.prompt, key.query, radius_outside(key.query, queries, rows, book.radius))
        for key in keys
    ], output


def _checked(family: Family, queries: Tensor) -> Tensor:
    if not bool(torch.isfinite(queries).all()):
        raise ValueError(f"layer {family.layer} must have finite inputs, got NaN or infinity")
    if family.adaptor.text is not None and not bool(queries.any()):
        raise ValueError('prompt must hold a word under query="text", got none')
    return queries


def _rows(family: Family, book: Codebook, prompt: list[int]) -> Tensor:
    """Return all the queries `[S, D]` that a prompt asks with."""
    text = family.adaptor.text
    rows = family.capture([prompt]).queries if text is None else text.rows(prompt)
    return _checked(family, rows).to(book.keys.dtype)


def distance(query: Tensor, keys: Tensor) -> float:
    """Return the canonical distance of `[D]` from the nearest of `[N, D]` or `[D]`."""
    keys = keys.reshape(-1, keys.shape[-1]).to(query.device)
    radii = torch.zeros(len(keys), device=query.device)
    return float(nearest(query[None], keys, radii)[1])


def radius_outside(
    query: Tensor, own: list[Tensor], negatives: list[Tensor], radius: float
) -> float:
    """Return the radius of a key: `radius`, or less so that every negative is outside.

    It then ends half way between the nearest negative and the farthest of the edit's own prompts
    that is nearer than that: how far its wordings lie from each other is all that is known of those
    nobody has given.

    Args:
        query: `[D]`, the key.
        own: `[D]` or `[N, D]` each, the queries of the edit's own prompts, this one among them.
        negatives: `[D]` or `[N, D]` each, the queries that the edit must not answer.

    Raises:
        ValueError: a negative is at distance 0.
    """
    away = [distance(query, rows) for rows in negatives]
    least = min(away)
    if least == 0.0:
        raise ValueError(
            f"negatives[{away.index(least)}] must differ from the prompts of the edit, got the "
            "query of one"
        )
    if least > radius:
        return radius
    reached = max(d for other in own if (d := distance(query, other)) < least)
    inside = torch.nextafter(torch.tensor(least), torch.tensor(0.0)).item()
    return min(fp32((reached + least) / 2.0), inside)
