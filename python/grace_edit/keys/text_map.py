"""What is learned of keys from text: a map of integers, on disk and back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as render_arrays

from .dense import SentenceEncoder, TokenTable
from .roles import Roles
from .words import RAREST, CommonWords

FORMAT = 1
MAP = "text_map.safetensors"
SETTINGS = "text_map.json"
WEIGHT_LIMIT = 1023
W_BITS = 13
"""W is stored in multiples of 2^-13."""
_NEAR = 0.95
"""Cosine to the probes from which on a dense part is the one a map was learned for."""


@dataclass(frozen=True)
class DenseReference:
    """Which dense part a map was trained for.

    Args:
        kind: `"tokens"` or `"encoder"`.
        name: of the model or encoder, for people.
        width: E.
        fingerprint: of the dense part, `dense.fingerprint()`.
        unit: of a token table's numbers; 0 for an encoder.
    """

    kind: str
    name: str
    width: int
    fingerprint: str
    unit: float = 0.0


@dataclass(frozen=True)
class TextMap:
    """What is learned. Arrays are integers; see `fit` for how they come about.

    Args:
        roles: which words name the subject.
        common: how common words are.
        lexical_weights: `[2, 16]` int16, 0..1023: of a word that names the subject and of one that
            does not, by its level, in the lexical part.
        meaning_weights: `[2, 16]` int16, 0..1023, the same in the meaning part.
        matrix: `[M, E]` int16, W in multiples of 2^-13.
        centre: `[E]` int32, of a token table; empty for an encoder.
        probe: `[P, E]` int16, vectors of the dense part, `dense.probe()`.
        lexical_width: L.
        lexical_floor: added to the sum of the squares of a span's lexical weights (in their unit,
            1/128, times 1/256) before the lexical part is divided by its root: a span of few words
            that name anything gets a shorter lexical part.
        meaning_length, lexical_length: m and l.
        dense: the dense part it was trained for.
        radius: the recommended radius of every edit.
        trained: what it was trained and measured on, for people.
    """

    roles: Roles
    common: CommonWords
    lexical_weights: np.ndarray
    meaning_weights: np.ndarray
    matrix: np.ndarray
    centre: np.ndarray
    probe: np.ndarray
    lexical_width: int
    lexical_floor: int
    meaning_length: float
    lexical_length: float
    dense: DenseReference
    radius: float = 1.0
    trained: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D, the width of a key."""
        return len(self.matrix) + self.lexical_width

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is stored in `text_map.safetensors`."""
        arrays = {
            "roles.hidden": self.roles.hidden,
            "roles.output": self.roles.output,
            "common.hashes": self.common.hashes,
            "common.levels": self.common.levels,
            "lexical_weights": self.lexical_weights.astype(np.int16),
            "meaning_weights": self.meaning_weights.astype(np.int16),
            "matrix": self.matrix.astype(np.int16),
            "centre": self.centre.astype(np.int32),
            "probe": self.probe.astype(np.int16),
        }
        # safetensors writes memory as it lies, whatever the strides.
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def settings(self) -> dict[str, Any]:
        """Return what is stored in `text_map.json`."""
        return {
            "format": FORMAT,
            "lexical_width": self.lexical_width,
            "lexical_floor": self.lexical_floor,
            "meaning_length": self.meaning_length,
            "lexical_length": self.lexical_length,
            "radius": self.radius,
            "dense": asdict(self.dense),
            "trained": self.trained,
        }

    def fingerprint(self) -> str:
        """Return a hash of everything that decides a key."""
        numbers = hashlib.sha256(render_arrays(self.arrays()))
        numbers.update(
            json.dumps(
                [
                    FORMAT,
                    self.lexical_width,
                    self.lexical_floor,
                    self.meaning_length,
                    self.lexical_length,
                    asdict(self.dense),
                ]
            ).encode()
        )
        return numbers.hexdigest()[:16]

    def fits(self, dense: TokenTable | SentenceEncoder) -> bool:
        """Say whether a dense part is the one this map was learned for, or a close child of it.

        Another dtype, a finetuned child and added tokens fit; another model or tokenizer does not.
        """
        if dense.kind != self.dense.kind:
            return False
        mine, its = self.probe.astype(np.float64), dense.probe().astype(np.float64)
        if mine.shape != its.shape:
            return False
        lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(its, axis=1)
        return bool(((mine * its).sum(axis=1) >= _NEAR * lengths).all())

    def save(self, directory: str | Path) -> None:
        """Write the map to a directory, which is made if it is not there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """Return the files that a map is saved as, by their names."""
        text = json.dumps(self.settings(), indent=1, ensure_ascii=False)
        return {MAP: render_arrays(self.arrays()), SETTINGS: (text + "\n").encode()}

    @classmethod
    def load(cls, directory: str | Path) -> TextMap:
        """Read a map.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of a newer format.
        """
        directory = Path(directory)
        files = {name: (directory / name).read_bytes() for name in (SETTINGS, MAP)}
        return cls.from_files(files, directory)

    @classmethod
    def from_files(cls, files: dict[str, bytes], directory: str | Path = "") -> TextMap:
        """Make a map of what `files` returned; `directory` is where it was, for errors.

        Raises:
            ValueError: it is damaged or of a newer format.
        """
        try:
            settings = json.loads(files[SETTINGS])
            arrays = parse_arrays(files[MAP])
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{directory}: the text map is damaged: {error}") from None
        if settings.get("format") != FORMAT:
            raise ValueError(
                f"{Path(directory) / SETTINGS}: format must be {FORMAT}, got "
                f"{settings.get('format')}"
            )
        return cls.from_parts(arrays, settings)

    @classmethod
    def from_parts(cls, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> TextMap:
        """Make a map of `arrays()` and `settings()`.

        Raises:
            ValueError: parts are missing or do not fit.
        """
        try:
            made = cls(
                roles=Roles(arrays["roles.hidden"], arrays["roles.output"]),
                common=CommonWords(arrays["common.hashes"], arrays["common.levels"]),
                lexical_weights=arrays["lexical_weights"],
                meaning_weights=arrays["meaning_weights"],
                matrix=arrays["matrix"],
                centre=arrays["centre"],
                probe=arrays["probe"],
                lexical_width=int(settings["lexical_width"]),
                lexical_floor=int(settings["lexical_floor"]),
                meaning_length=float(settings["meaning_length"]),
                lexical_length=float(settings["lexical_length"]),
                dense=DenseReference(**settings["dense"]),
                radius=float(settings["radius"]),
                trained=settings.get("trained", {}),
            )
        except KeyError as error:
            raise ValueError(f"the text map has no {error}") from None
        except TypeError as error:
            raise ValueError(f"the text map is damaged: {error}") from None
        made._check()
        return made

    def _check(self) -> None:
        for name in ("lexical_weights", "meaning_weights"):
            table = getattr(self, name)
            if table.shape != (2, RAREST + 1) or table.min() < 0 or table.max() > WEIGHT_LIMIT:
                raise ValueError(
                    f"{name} must have shape [2, {RAREST + 1}] and lie in 0..{WEIGHT_LIMIT}, got "
                    f"shape {list(table.shape)}"
                )
        if self.matrix.ndim != 2 or self.matrix.shape[1] != self.dense.width:
            raise ValueError(
                f"matrix must have shape [M, {self.dense.width}], got {list(self.matrix.shape)}"
            )
