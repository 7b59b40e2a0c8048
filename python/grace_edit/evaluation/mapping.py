"""A text map from a file or folder of records, for a model's own tokens or for an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..keys.choice import TOKENS
from ..keys.dense import SentenceEncoder, TokenTable, load_encoder, token_table
from ..progress import counter
from .loading import DataError, NoDataError, load
from .tuning import tune

_KINDS = ("counterfact", "knowedit", "zsre")
"""Data whose records name subjects, and say the same in other words or ask something else."""


def learn_map(
    data: str | Path, out: Path, *, model: Any = None, tokenizer: Any = None, encoder: str = TOKENS
) -> dict[str, Any]:
    """Learn a text map from records and save it; `GraceConfig(text_map=out)` takes it.

    Args:
        data: a file, or a folder: its files of CounterFact, KnowEdit and zsRE, whatever else lies
            there.
        out: directory of the map.
        model, tokenizer: needed where `encoder` is `"tokens"`.
        encoder: `"tokens"`, or the path or id of a sentence encoder.

    Returns:
        What was learned from and measured, as `tuning.tune`.

    Raises:
        DataError: the data cannot be read, or there is none.
        ValueError: no model for `"tokens"`, or the data teach nothing.
    """
    sources = _sources(Path(data).expanduser())
    dense: TokenTable | SentenceEncoder
    if encoder == TOKENS:
        if model is None or tokenizer is None:
            raise ValueError("model must be given for the encoder 'tokens', got None")
        dense = token_table(model, tokenizer)
        name = Path(str(model.name_or_path)).name
    else:
        dense = load_encoder(encoder)
        name = Path(encoder).name
    with counter("learning a text map") as advance:
        return tune(sources, out, dense, name=name, progress=advance)


def _sources(data: Path) -> list[Path]:
    if not data.is_dir():
        return [data]
    files = sorted(path for path in data.iterdir() if path.suffix in (".json", ".jsonl"))
    found = []
    for path in files:
        try:
            kind = load(path).kind
        except DataError:
            continue
        if kind in _KINDS:
            found.append(path)
    if not found:
        raise NoDataError(f"{data}: holds no file of {', '.join(_KINDS)} records")
    return found
