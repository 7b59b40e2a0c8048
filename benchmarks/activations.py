"""Activations of a pretrained model for text on this machine, and data of any size like them.

The model is the packaged MiniLM (6 layers, width 384), the text the docstrings of the standard
library, the activations the input of encoder layer 4: what an editor would look up there.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measurements import Progress, Settings

LAYER = 4  # of the encoder; its input is taken, later layers do not run
KEYS, QUERIES = 10_000, 4_000
NOISE = 0.05  # share of the variance of resampled activations
_TOKENS = 1024  # in a batch
_PIECE = 1 << 25  # elements resampled at a time


def sentences() -> list[str]:
    """Return the sentences of the standard library's docstrings, all different, in seeded order.

    Those of 20 to 200 characters; about 20,000 in Python 3.11.
    """
    found: dict[str, None] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # tests of the parser are not all meant to be parsed
            continue
        for node in ast.walk(tree):
            if not isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
            ):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                plain = " ".join(sentence.split())
                if 20 <= len(plain) <= 200:
                    found[plain] = None
    every = list(found)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return [every[i] for i in order.tolist()]


@dataclass(frozen=True)
class Activations:
    """Queries of some sentences, `[N, 384]` float32 each.

    Attributes:
        mean: over the tokens without [CLS] and [SEP], an encoder's default query.
        last: of the last token before [SEP].
    """

    mean: Tensor
    last: Tensor


def activations(text: list[str], progress: Progress | None = None) -> Activations:
    """Run the packaged model on sentences; a batch holds sentences of one length, so no padding.

    Raises:
        ModuleNotFoundError: the model is not installed.
    """
    from grace_edit.demo.topics import pretrained_path
    from transformers import AutoTokenizer, BertModel

    path = pretrained_path()
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"]
    model = BertModel.from_pretrained(path).eval()
    model.encoder.layer = model.encoder.layer[:LAYER]
    width = model.config.hidden_size
    mean, last = torch.empty(len(ids), width), torch.empty(len(ids), width)
    done, total = 0, sum(map(len, ids))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with torch.inference_mode():
        for length, group in groupby(order, key=lambda i: len(ids[i])):
            for rows in torch.tensor(list(group)).split(max(1, _TOKENS // length)):
                batch = torch.tensor([ids[i] for i in rows])
                hidden = model(batch).last_hidden_state[:, 1:-1]
                mean[rows], last[rows] = hidden.mean(dim=1), hidden[:, -1]
                done += batch.numel()
                if progress is not None:
                    progress(done, total)
    return Activations(mean, last)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations of some sentences as keys, and of the others as queries."""
    at = len(rows) * KEYS // (KEYS + QUERIES)
    return rows[:at], rows[at:]


class Resampler:
    """Draws rows of any width that are spread as real activations are.

    A row is a real one, drawn at random, in the principal coordinates of the real keys, with
    `NOISE` of each coordinate's variance replaced by normal noise. Coordinates beyond those that
    there are, are noise alone, with the variances that a power law has, fitted to the eigenvalues
    from the 32nd on (the last tenth left out: they fall off for want of width). Then all is scaled
    by one number, so that the median distance of a query from the nearest of as many resampled
    keys as there are real ones is what it is for the real ones, and turned by an orthogonal matrix
    (signs, a permutation and a Kronecker product of two random rotations). The real mean, turned
    likewise, is added unscaled. By their bounds, somewhat more keys stay within reach than among as
    many real ones: the data are no easier than real ones.
    """

    def __init__(self, keys: Tensor, query: Tensor, dim: int, generator: torch.Generator) -> None:
        """Measure real keys `[N, W]` and queries `[M, W]`, rows of other sentences; dim >= W."""
        self.dim, self.generator = dim, generator
        width = keys.shape[1]
        if dim < width:
            raise ValueError(f"dim must be at least {width}, got {dim}")
        self.centre = keys.double().mean(dim=0)
        z = keys.double() - self.centre
        values, vectors = torch.linalg.eigh(z.T @ z / len(z))
        values = values.flip(0).clamp(min=0)
        self.vectors = vectors.flip(1)
        rank = torch.arange(1, dim + 1).double()
        fitted = slice(32, width * 9 // 10)
        logs = torch.stack([rank[fitted].log(), torch.ones_like(rank[fitted])], dim=1)
        slope, level = torch.linalg.lstsq(logs, values[fitted].log()[:, None]).solution[:, 0]
        self.exponent = float(slope)
        beyond = (slope * rank[width:].log() + level).exp()
        self.deviation = torch.cat([(NOISE * values), beyond]).sqrt().float()
        side = max(d for d in range(1, int(dim**0.5) + 1) if dim % d == 0)
        self.turns = [self._rotation(side), self._rotation(dim // side)]
        self.order = torch.randperm(dim, generator=generator)
        self.sign = torch.randint(2, (dim,), generator=generator) * 2.0 - 1
        self.scale, self.wanted = 1.0, nearest_median(query, keys)
        self.middle = torch.zeros(dim)
        few = query[:500]
        got = nearest_median(self.draw(few, 500), self.draw(keys, len(keys)))
        self.scale = self.wanted / got
        self.middle = self._turned(self._wide(self.centre.float()[None] @ self.vectors.float()))[0]

    def draw(self, real: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `[n, dim]` rows like the real `[N, W]` ones."""
        out = torch.empty(n, self.dim, dtype=dtype)
        for _ in self.drawn(real, out):
            pass
        return out

    def drawn(self, real: Tensor, out: Tensor) -> Any:
        """Fill `out` `[n, dim]` piece by piece; yield the rows done after each."""
        known = ((real.double() - self.centre) @ self.vectors).float() * (1 - NOISE) ** 0.5
        step = max(1, _PIECE // self.dim)
        for first in range(0, len(out), step):
            rows = out[first : first + step]
            noise = torch.randn(len(rows), self.dim, generator=self.generator)
            which = torch.randint(len(known), (len(rows),), generator=self.generator)
            noise *= self.deviation
            noise[:, : known.shape[1]] += known[which]
            rows.copy_(self._turned(noise.mul_(self.scale)) + self.middle)
            yield first + len(rows)

    def _rotation(self, size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=self.generator)).Q

    def _wide(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self.dim - rows.shape[1]))

    def _turned(self, rows: Tensor) -> Tensor:
        a, b = self.turns
        grid = (rows[:, self.order] * self.sign).view(-1, len(a), len(b))
        return (a @ (grid @ b)).flatten(1)


def nearest_median(query: Tensor, keys: Tensor) -> float:
    """Return the median distance of queries from their nearest keys; for looking, not exact."""
    least = [torch.cdist(some, keys).amin(dim=1) for some in query.float().split(500)]
    return float(torch.cat(least).median())


def real_activations(settings: Settings) -> tuple[Tensor, Tensor] | None:
    """Return keys and queries to draw from, None where the packaged model is not installed.

    A quick run takes a fifth of the sentences. They are kept in `settings.activations`, if that
    names a file.
    """
    wanted = settings.pick(KEYS + QUERIES, (KEYS + QUERIES) // 5)
    return _real(settings.activations, wanted)


@functools.cache  # two parts ask for them
def _real(file: Path | None, wanted: int) -> tuple[Tensor, Tensor] | None:
    if file is not None and file.exists():
        mean = torch.load(file)["mean"]
        if len(mean) == wanted:
            return split(mean)
    try:
        made = activations(sentences()[:wanted])
    except ModuleNotFoundError:
        return None
    if file is not None:
        torch.save({"mean": made.mean, "last": made.last}, file)
    return split(made.mean)
