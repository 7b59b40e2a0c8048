"""Maps of text keys made by hand, of a few lines, for the embeddings of any small model.

Whatever begins with a capital inside a sentence names the subject.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from grace_edit.keys.dense import SentenceEncoder, TokenTable, centre_of
from grace_edit.keys.roles import FEATURES, OFFSETS, PROPERTIES, Roles
from grace_edit.keys.text_map import DenseReference, TextMap
from grace_edit.keys.words import RAREST, CommonWords

_COMMON = ("the", "of", "is", "in", "a", "what", "and", "or", "it", "he", "we")


def _arrays() -> dict[str, Any]:
    hidden = np.zeros((1, FEATURES + 1), dtype=np.int16)
    here = OFFSETS.index(0) * len(PROPERTIES)
    hidden[0, here + PROPERTIES.index("capital, not first")] = 8 * 256
    weights = np.full((2, 2, RAREST + 1), 5)
    weights[0, 0] = 500  # lexical, the subject
    weights[1, 1] = np.where(np.arange(RAREST + 1) < RAREST, 60, 500)  # meaning, the other words
    common = CommonWords.ranked(_COMMON)
    return {
        "roles": Roles(hidden, np.array([256, -4 * 256])),
        "common": common,
        "lexical_weights": weights[0].astype(np.int16),
        "meaning_weights": weights[1].astype(np.int16),
        "lexical_width": 32,
        "lexical_floor": 1,
        "meaning_length": 1.0,
        "lexical_length": 1.5,
    }


def _matrix(width: int) -> np.ndarray:
    source = torch.Generator().manual_seed(0)
    return (1500 * torch.randn(32, width, generator=source)).numpy().astype(np.int16)


def map_of(model: Any, words: Any) -> TextMap:
    """Return a map for the input embeddings of a model."""
    weight = model.get_input_embeddings().weight.detach()
    centre, unit = centre_of(weight)
    table = TokenTable(weight, words, centre, unit)
    reference = DenseReference("tokens", "tiny", table.width, table.fingerprint(), unit)
    return TextMap(
        matrix=_matrix(table.width),
        centre=centre.astype(np.int32),
        probe=table.probe(),
        dense=reference,
        **_arrays(),
    )


def encode(texts: list[str]) -> torch.Tensor:
    """Encode each text as a bag of its letters: `[B, 26]`."""
    rows = [[1.0 + text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
    return torch.tensor(rows)


def map_of_encoder() -> TextMap:
    """Return a map for `encode`."""
    dense = SentenceEncoder(encode)
    reference = DenseReference("encoder", "letters", 26, dense.fingerprint(), 0.0)
    return TextMap(
        matrix=_matrix(26),
        centre=np.zeros(0, dtype=np.int32),
        probe=dense.probe(),
        dense=reference,
        **_arrays(),
    )
