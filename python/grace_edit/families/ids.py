"""The forms in which people hold token ids and chats, read as plain lists."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def is_chat(given: Any) -> bool:
    """Say whether `given` is a list of chat messages, each with a role and a content."""
    return (
        isinstance(given, (list, tuple))
        and len(given) > 0
        and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in given)
    )


def whole_number(given: Any) -> int | None:
    """Return an integer of Python, numpy or a tensor of one element; None: it is none of these."""
    if isinstance(given, (bool, np.bool_)) or "bool" in str(getattr(given, "dtype", "")):
        return None
    try:
        return operator.index(given)
    except (TypeError, RuntimeError):  # a tensor of several elements raises the latter
        return None


def token_ids(given: Any) -> list[int]:
    """Return the token ids of one text.

    Args:
        given: integers in a list, tuple, tensor or array `[T]` or `[1, T]`, or a mapping or an
            encoding that holds them as `input_ids`, of which an `attention_mask` may leave out
            padding.

    Raises:
        ValueError: it is something else; says what it is, without the name of the argument.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"a dict with {', '.join(map(str, given)) or 'nothing'}")
        ids = token_ids(given["input_ids"])
        mask = given.get("attention_mask")
        there = ids if mask is None else token_ids(mask)
        if len(there) != len(ids):
            raise ValueError(f"{len(ids)} input_ids under an attention_mask of {len(there)}")
        return ids if mask is None else [i for i, kept in zip(ids, there, strict=True) if kept]
    if isinstance(given, (Tensor, np.ndarray)):
        if given.ndim not in (1, 2):
            raise ValueError(described(given))
        rows: Any = given.tolist()
    else:
        rows = getattr(given, "ids", given)  # an encoding of the tokenizers package
    if not isinstance(rows, (list, tuple)):
        raise ValueError(described(given))
    if any(isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) for row in rows):
        if len(rows) != 1:
            raise ValueError(f"a batch of {len(rows)}")
        return token_ids(rows[0])
    numbers = [whole_number(item) for item in rows]
    plain = [number for number in numbers if number is not None]
    if len(plain) != len(numbers):
        raise ValueError(described(given))
    return plain


def described(given: Any) -> str:
    """Say in a few words what something is."""
    if isinstance(given, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(given, Tensor) else "array"
        dtype = str(given.dtype).removeprefix("torch.")
        return f"a {dtype} {kind} of shape {list(given.shape)}"
    text = repr(given)
    return text if len(text) <= 100 else f"{text[:97]}..."
