"""Keys for a model: which dense part, and which learned map fits it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .dense import SentenceEncoder, TokenTable, load_encoder
from .text_keys import TextKeys
from .text_map import TextMap

TOKENS = "tokens"
"""The encoder that is none: the model's own input embeddings."""
MAPS = Path(__file__).parent / "maps"
"""The maps that come with the package, a directory each."""


def text_keys(
    model: Any,
    tokenizer: Any,
    encoder: str | Path | Callable[[list[str]], Any] = TOKENS,
    text_map: str | Path | TextMap | None = None,
) -> TextKeys:
    """Make the keys of prompts for a model.

    Args:
        model: a transformers model; only `get_input_embeddings()` is used, and only for `"tokens"`.
        tokenizer: of the model.
        encoder: `"tokens"`, the path or id of a sentence encoder, or a callable that takes B texts
            and returns `[B, E]`.
        text_map: a map or its directory; None: the one that comes with the package and fits.

    Raises:
        ValueError: no map that comes with the package fits, or the given one does not.
        FileNotFoundError: there is no map in that directory, or no encoder by that name.
    """
    maps = shipped_maps() if text_map is None else [_loaded(text_map)]
    if encoder == TOKENS:
        return _first_that_fits(maps, _of_tokens(model, tokenizer), text_map)
    if isinstance(encoder, str | Path):
        try:
            dense = load_encoder(str(encoder))
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileNotFoundError(
                f"encoder must be the directory or hub id of a sentence encoder, got {encoder!r}: "
                f"{said}"
            ) from error
    else:
        dense = SentenceEncoder(encoder)
    return _first_that_fits(maps, lambda _: dense, text_map)


def shipped_maps() -> list[TextMap]:
    """Return the maps that come with the package."""
    return [TextMap.load(directory) for directory in sorted(MAPS.glob("*")) if directory.is_dir()]


def _of_tokens(model: Any, tokenizer: Any) -> Callable[[TextMap], TokenTable]:
    weight = model.get_input_embeddings().weight
    return lambda text_map: TokenTable(weight, tokenizer, text_map.centre, text_map.dense.unit)


def _first_that_fits(
    maps: list[TextMap],
    dense_for: Callable[[TextMap], TokenTable | SentenceEncoder],
    given: str | Path | TextMap | None,
) -> TextKeys:
    for text_map in maps:
        try:
            dense = dense_for(text_map)
            made = TextKeys(text_map, dense)
        except ValueError:  # of another width or kind
            continue
        if text_map.fits(dense):
            return made
    known = ", ".join(sorted(f"{one.dense.name} ({one.dense.kind})" for one in maps))
    if given is None:
        raise ValueError(
            f"text_map must be given, since none that comes with the package fits this model or "
            f"encoder (they are for {known}); `grace tune` learns one in minutes"
        )
    raise ValueError(
        f"text_map must be learned for this model or encoder, got one for {known}; `grace tune` "
        f"learns one in minutes"
    )


def _loaded(text_map: str | Path | TextMap) -> TextMap:
    return text_map if isinstance(text_map, TextMap) else TextMap.load(text_map)
