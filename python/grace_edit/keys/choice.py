"""Choosing the parts of text keys: the dense part and the map that was trained for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .dense import SentenceEncoder, TokenTable, load_encoder
from .text_map import SETTINGS, TextKeys, TextMap

TOKENS = "tokens"
MAPS = Path(__file__).parent / "maps"
"""Where the maps lie that come with the package, a directory each."""


def text_keys(
    model: nn.Module,
    tokenizer: Any,
    encoder: str | Callable[[list[str]], Any] = TOKENS,
    text_map: str | Path | TextMap | None = None,
) -> TextKeys:
    """Return what makes the keys of a model's prompts.

    Args:
        model: the edited model, whose input embeddings `"tokens"` reads.
        tokenizer: of the model.
        encoder: `"tokens"`, the path or id of a sentence encoder, or a callable that takes a list
            of B texts and returns `[B, E]`.
        text_map: a map or its directory; None: the one that comes with the package for this
            dense part.

    Raises:
        ValueError: there is no map for it, the map is of another dense part, or the model has no
            input embeddings or no tokenizer.
    """
    if tokenizer is None:
        raise ValueError('tokenizer must be given for query="text", got None')
    sentences = None
    if encoder != TOKENS:
        sentences = load_encoder(encoder) if isinstance(encoder, str) else SentenceEncoder(encoder)
    if text_map is None:
        for shipped in _shipped():
            if shipped.dense.kind == (TOKENS if sentences is None else sentences.kind):
                keys = _fitting(shipped, model, tokenizer, sentences)
                if keys is not None and keys.dense.fingerprint() == shipped.dense.fingerprint:
                    return keys
        raise ValueError(
            "text_map must be given: no map that comes with this package is of "
            f"{'the embeddings of this model' if sentences is None else sentences.reference}; "
            "make one with grace tune"
        )
    if not isinstance(text_map, TextMap):
        text_map = TextMap.load(text_map)
    keys = _fitting(text_map, model, tokenizer, sentences)
    if keys is None:
        wanted = text_map.dense
        raise ValueError(
            f"text_map must be of this dense part, got one of {wanted.kind} {wanted.name!r}, "
            f"width {wanted.width}"
        )
    return keys


def _fitting(
    text_map: TextMap, model: nn.Module, tokenizer: Any, sentences: SentenceEncoder | None
) -> TextKeys | None:
    if sentences is not None:
        return TextKeys(text_map, sentences) if text_map.dense.kind == sentences.kind else None
    weight = _embeddings(model)
    if text_map.dense.kind != TOKENS or weight.shape[1] != text_map.dense.width:
        return None
    return TextKeys(text_map, TokenTable(weight, tokenizer, text_map.centre, text_map.dense.unit))


def _embeddings(model: nn.Module) -> Tensor:
    found: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            'model must have input embeddings for encoder="tokens", got none; name an encoder'
        )
    return weight


def _shipped() -> Iterator[TextMap]:
    for directory in sorted(MAPS.glob("*")):
        if (directory / SETTINGS).is_file():
            yield TextMap.load(directory)
