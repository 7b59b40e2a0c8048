"""The dense parts of a key: what the words mean, whatever the words are.

`TokenTable` reads the edited model's own input embeddings, a word at a time; nothing is run.
`SentenceEncoder` runs an encoder over the sentence, one text at a time. Both return integers, so
that what is made of them has the same bits in every order of additions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ONE = 1 << 12
"""Length of a vector of integers that stands for a vector of length 1."""
_ROW_LIMIT = 1 << 14
_TOKENS_PER_WORD = 32
_AS_NUMPY = (torch.float32, torch.float16, torch.float64)


class TokenTable:
    """Vectors of words from a model's input embeddings.

    A number of an embedding is rounded to bfloat16 and then to a multiple of `unit`, so a model
    that was trained in bfloat16 or float16 gives the same integers in each dtype that holds it. The
    vector of a word is the sum over its tokens, less the centre, scaled to length 1.

    Args:
        weight: `[V, E]` input embeddings, any floating dtype, any device. Read when a word is met
            for the first time, never changed.
        tokenizer: of the model, as transformers makes it.
        centre: `[E]` int64, in `unit`s; see `centre_of`.
        unit: a power of two.
    """

    kind = "tokens"

    def __init__(self, weight: Tensor, tokenizer: Any, centre: np.ndarray, unit: float) -> None:
        if weight.ndim != 2 or weight.shape[1] != len(centre):
            raise ValueError(f"weight must have shape [V, {len(centre)}], got {list(weight.shape)}")
        self.width = weight.shape[1]
        self.unit = unit
        self.centre = np.asarray(centre, dtype=np.float64)
        self._weight = weight
        self._tokenizer = tokenizer
        self._direct = _direct_ids(tokenizer, _PROBE_WORDS) == _ids(tokenizer, _PROBE_WORDS)
        self._before = _ids(tokenizer, ["a"])[0]

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Return `[len(texts), E]` float64 integers, rows of length about `ONE`.

        A row of 0 for a word without tokens. A row does not depend on what stands beside it.
        """
        if not texts:
            return np.zeros((0, self.width))
        ids = [row[:_TOKENS_PER_WORD] for row in self.ids(texts)]
        counts = np.array([len(row) for row in ids])
        there = counts > 0
        sums = np.zeros((len(ids), self.width))
        if there.any():
            rows = _on_grid(self._weight, [one for row in ids for one in row], self.unit)
            starts = (counts.cumsum() - counts)[there]
            # Sums of integers below 2^20: exact as float32, in any order.
            sums[there] = np.add.reduceat(rows, starts, axis=0)
        return _unit_length(sums - counts[:, None] * self.centre)

    def word(self, text: str) -> np.ndarray:
        """Return `[E]`, the row of one word."""
        return self.words([text])[0]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of words that stand within a text."""
        n = len(self._before)
        found = self._ids(["a " + text for text in texts])
        return [
            both[n:] if both[:n] == self._before else self._ids([text])[0]
            for both, text in zip(found, texts, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        direct = _direct_ids(self._tokenizer, texts) if self._direct else None
        return _ids(self._tokenizer, texts) if direct is None else direct

    def probe(self) -> np.ndarray:
        """Return the vectors of a few words, `[16, E]` int16, by which a map knows its dense part.

        They say whether tokenizer and embeddings are those a map was learned for, or a finetuned
        child's, whatever tokens were added behind.
        """
        return self.words(_PROBE_WORDS).astype(np.int16)

    def fingerprint(self) -> str:
        """Return a hash of the shape and of up to 1024 rows, the same for every dtype."""
        rows = torch.linspace(0, len(self._weight) - 1, min(1024, len(self._weight))).long()
        numbers = _on_grid(self._weight, rows.tolist(), self.unit)
        return _digest(list(self._weight.shape), self.unit, numbers.astype("<i4").tobytes())


def centre_of(weight: Tensor) -> tuple[np.ndarray, float]:
    """Return the centre and the unit for a `TokenTable` of embeddings `[V, E]`.

    The unit is the power of two nearest below 1/256 of their root mean square.

    Returns:
        `[E]` int64, the mean row in units; the unit.
    """
    rms = float(weight.float().square().mean().sqrt())
    unit = 2.0 ** int(np.floor(np.log2(rms / 256)))
    total = np.zeros(weight.shape[1])
    for first in range(0, len(weight), 1 << 14):
        rows = range(first, min(first + (1 << 14), len(weight)))
        total += _on_grid(weight, rows, unit).sum(axis=0, dtype=np.float64)
    return np.rint(total / len(weight)).astype(np.int64), unit


def token_table(model: Any, tokenizer: Any) -> TokenTable:
    """Return the token table of a transformers model, for learning a map for it."""
    weight = model.get_input_embeddings().weight.detach()
    return TokenTable(weight, tokenizer, *centre_of(weight))


class SentenceEncoder:
    """Vectors of sentences from a callable.

    Args:
        encode: takes a list of B texts, returns `[B, E]` (a tensor or an array). It is called with
            one text at a time, so that nothing depends on what stands beside it.
        reference: what names it in a saved map, e.g. a path or an id.

    The last 4096 sentences are remembered. Without its subject a sentence is soon met again.
    Several threads may ask at once: at worst a sentence is encoded twice.
    """

    kind = "encoder"

    def __init__(self, encode: Callable[[list[str]], Any], reference: str = "callable") -> None:
        self.reference = reference
        self._encode = encode
        self._met: OrderedDict[str, np.ndarray] = OrderedDict()

    def sentence(self, text: str) -> np.ndarray:
        """Return `[E]` float64 integers of length about `ONE`.

        Raises:
            ValueError: the callable did not return one finite vector.
        """
        met = self._met.get(text)
        if met is None:
            with torch.inference_mode():
                made = torch.as_tensor(self._encode([text])).detach().cpu().double()
            if made.ndim != 2 or len(made) != 1 or not bool(made.isfinite().all()):
                raise ValueError(
                    f"encoder must return one finite row for one text, got shape {list(made.shape)}"
                )
            met = _unit_length(made[0].numpy())
            self._met[text] = met
            if len(self._met) > 4096:
                self._met.popitem(last=False)
        else:
            with contextlib.suppress(KeyError):  # another thread has just let go of it
                self._met.move_to_end(text)
        return met

    def probe(self) -> np.ndarray:
        """Return the vectors of a few sentences, `[P, E]` int16, by which a map knows it."""
        return np.stack([self.sentence(text) for text in _PROBES]).astype(np.int16)

    def fingerprint(self) -> str:
        """Return a hash of what it makes of a few sentences, rounded to 1/64 of their length."""
        numbers = np.rint(self.probe() / 64)
        return _digest(list(numbers.shape), 0.0, numbers.astype("<i4").tobytes())


_PROBES = ("The capital of something is", "Who wrote something?", "something was born in")
_PROBE_WORDS = (
    *("the", "capital", "wrote", "born", "language", "something", "located", "played"),
    *(
        "Amsterdam",
        "Elizabeth",
        "1984",
        "headquarters",
        "religion",
        "instrument",
        "Kyrgyzstan",
        "?",
    ),
)


def load_encoder(name: str) -> SentenceEncoder:
    """Load a sentence encoder by transformers path or id: mean of the last hidden states.

    It runs in float32 on the CPU. At most 256 tokens of a sentence are read.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModel.from_pretrained(name).float().eval()

    def encode(texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            one = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            rows.append(model(**one).last_hidden_state[0].mean(dim=0))
        return torch.stack(rows)

    return SentenceEncoder(encode, name)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _direct_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]] | None:
    """Return the same without what transformers does round it, which takes most of the time.

    None where there is nothing to ask directly, or where it was told to pad or to cut.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.padding is not None or backend.truncation is not None:
        return None
    # One at a time: for several the library wakes threads, which wait for a busy core.
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def _on_grid(weight: Tensor, ids: Sequence[int], unit: float) -> np.ndarray:
    """Return rows of the embeddings, `[len(ids), E]` float32 integers."""
    numbers = _rounded(weight.detach(), np.asarray(ids))
    # The unit is a power of two, so nothing but `rint` rounds.
    numbers *= 1 / unit
    np.rint(numbers, out=numbers)
    return numbers.clip(-_ROW_LIMIT, _ROW_LIMIT, out=numbers)


def _rounded(weight: Tensor, ids: np.ndarray) -> np.ndarray:
    """Return rows of `[V, E]` as bfloat16 holds them, float32.

    By numpy: for the tokens of a few words torch would wake threads, which cost more than the work,
    and then wait in a loop for more of it on a core that the lookup wants.
    """
    if weight.device.type == "cpu" and weight.dtype in _AS_NUMPY:
        bits = weight.numpy()[ids].astype(np.float32, copy=False).view(np.uint32)
        bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)  # to the nearest, of two to the even one
        bits &= np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        halves = weight.view(torch.int16).numpy()[ids]
    else:
        rows = weight[torch.from_numpy(ids).to(weight.device)].to(torch.bfloat16)
        halves = rows.view(torch.int16).cpu().numpy()
    return (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _unit_length(rows: np.ndarray) -> np.ndarray:
    # The norm of integers below 2^19 is exact before its root; root, division and rounding are
    # IEEE's, one number at a time. (An encoder's numbers are no integers: its bits are its own.)
    norm = np.sqrt(np.square(rows).sum(axis=-1, keepdims=True))
    made = rows * ONE
    made /= np.where(norm > 0, norm, 1.0)
    return np.rint(made, out=made)


def _digest(shape: list[int], unit: float, data: bytes) -> str:
    head = f"{shape} {unit} ".encode()
    return hashlib.sha256(head + data).hexdigest()[:16]
