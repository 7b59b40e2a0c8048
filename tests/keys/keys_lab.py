"""A small language world: a tokenizer, an embedding table and facts that are made here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from grace_edit.keys.augment import Fact
from grace_edit.keys.dense import TokenTable, centre_of
from grace_edit.keys.roles import FEATURES, Roles
from grace_edit.keys.text_map import DenseReference, TextMap
from grace_edit.keys.words import CommonWords, words_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIDTH = 24
COMMON = CommonWords.ranked(
    words_of(
        "the of is in a what was by who where to does name at born wrote capital city book author "
        "language speaks spoken lies country found written place birth person tongue mother"
    )
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are helpful<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte, and ChatML's marks as special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<|pad|>"}
    )
    tokenizer.chat_template = chat_template
    return tokenizer


class Trigrams:
    """A tokenizer whose tokens are a word's trigrams: quick, and alike for words that are alike."""

    rows = 4096

    def __call__(
        self, texts: list[str], add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """Tokens of each text."""
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            spelled = f"^{word.lower()}$"
            for a, b, c in zip(spelled, spelled[1:], spelled[2:], strict=False):
                ids.append((ord(a) * 961 + ord(b) * 31 + ord(c)) % self.rows)
        return ids


def embeddings(rows: int = Trigrams.rows) -> torch.Tensor:
    """`[rows, WIDTH]` float32 in -0.5..0.5, the same everywhere; bfloat16 and float16 hold them."""
    place = np.arange(rows * WIDTH, dtype=np.uint64).reshape(rows, WIDTH)
    mixed = (place * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(1 << 32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
    steps = (mixed >> np.uint64(24)).astype(np.float32)
    return torch.from_numpy((steps - 128) / 256)


def table(weight: torch.Tensor | None = None) -> TokenTable:
    """The table of `embeddings()`, or another with its centre and unit."""
    return TokenTable(
        embeddings() if weight is None else weight, Trigrams(), *centre_of(embeddings())
    )


def model(weight: torch.Tensor) -> SimpleNamespace:
    """What `text_keys` asks of a model."""
    return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))


def made_map(dense: TokenTable | None = None, meaning: int = 16, lexical: int = 32) -> TextMap:
    """A map that nobody learned: roles by capitals, W of a formula."""
    dense = dense or table()
    hidden = np.zeros((1, FEATURES + 1), dtype=np.int16)
    hidden[0, 4] = 256  # "capital, not first"
    output = np.array([2000, -1000], dtype=np.int16)
    matrix = ((np.arange(meaning * WIDTH) * 7919) % 2003 - 1001).reshape(meaning, WIDTH)
    rising = np.arange(16)
    return TextMap(
        roles=Roles(hidden, output),
        common=COMMON,
        lexical_weights=np.stack([200 + 10 * rising, 5 + rising]),
        meaning_weights=np.stack([100 + rising, 500 + 10 * rising]),
        matrix=matrix.astype(np.int16),
        centre=dense.centre.astype(np.int32),
        probe=dense.probe(),
        lexical_width=lexical,
        lexical_floor=1 << 28,
        meaning_length=1.1,
        lexical_length=1.3,
        dense=DenseReference("tokens", "made here", WIDTH, dense.fingerprint(), dense.unit),
    )


_WORDINGS = {
    "capital": (
        "The capital of {} is",
        "{}'s capital city is",
        "The seat of government of {} lies in",
        "What is the capital of {}?",
        "Which city is {}'s capital?",
    ),
    "language": (
        "The language of {} is",
        "In {} people speak",
        "The tongue spoken in {} is",
        "What language is spoken in {}?",
        "Which tongue do people speak in {}?",
    ),
    "leader": (
        "The ruler of {} is",
        "{} is governed by",
        "The crown of {} belongs to",
        "Who is the ruler of {}?",
        "Who governs {}?",
    ),
    "birth": (
        "{} was born in",
        "The birthplace of {} is",
        "{} came into the world at",
        "Where was {} born?",
        "What is the birthplace of {}?",
    ),
    "work": (
        "{} wrote the novel",
        "The book by {} is called",
        "The best known title of {} is",
        "What novel did {} write?",
        "Which book is by {}?",
    ),
    "play": (
        "{} plays the",
        "The instrument of {} is the",
        "On stage {} performs on the",
        "What instrument does {} play?",
        "On what does {} perform?",
    ),
}
_PLACES, _PEOPLE = ("capital", "language", "leader"), ("birth", "work", "play")


def small_world(count: int = 12) -> list[Fact]:
    """Facts about `count` invented places and as many people, two relations each.

    As in the published data the prompts are sentences and the others, of the third relation, are
    questions.
    """
    starts = ("Zor", "Mel", "Quan", "Tib", "Ard", "Wex", "Lom", "Fy", "Nak", "Ges", "Hur", "Pol")
    places = [f"{a}{b}" for a, b in zip(starts, itertools.cycle(("avia", "land", "istan")))]
    people = [
        f"{b.title()} {a}{c}"
        for a, b, c in zip(
            starts,
            itertools.cycle(("ursula", "viktor", "noam", "ines")),
            itertools.cycle(("berg", "ovic", "sson", "elli", "wright")),
        )
    ]
    facts = []
    for relations, subjects in ((_PLACES, places[:count]), (_PEOPLE, people[:count])):
        for i, subject in enumerate(subjects):
            for k, relation in enumerate(relations):
                if (i + k) % 3 == 0:
                    continue  # asked as another question alone
                forms = _WORDINGS[relation]
                others = [other for j, other in enumerate(relations) if (i + j) % 3 == 0]
                asks = [_WORDINGS[other][3 + i % 2] for other in others]
                neighbours = [subjects[(i + step) % len(subjects)] + "x" for step in (1, 2)]
                facts.append(
                    Fact(
                        forms[i % 3].format(subject),
                        subject,
                        tuple(forms[(i + step) % 3].format(subject) for step in (1, 2)),
                        tuple(forms[(i + 1) % 3].format(other) for other in neighbours),
                        tuple(ask.format(subject) for ask in asks),
                        relation,
                        tuple(others),
                    )
                )
    return facts
