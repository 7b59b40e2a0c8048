"""How the numbers of a text map are learned: roles of words, then W, weights and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import Amounts, Fact, with_subject
from .dense import ONE, SentenceEncoder, TokenTable
from .roles import FEATURES, FULL, UNIT, Roles, describe, features
from .spans import last_sentence
from .text_keys import MOST_WORDS, without_subject
from .text_map import WEIGHT_LIMIT, DenseReference, TextMap
from .words import RAREST, CommonWords, folded, signs, word_spans, words_of

_FACTS = 512
"""Keys in one step at most."""
_READ = 40
"""Words of a sentence: fewer than a key is made of, for what few long ones would cost."""
_PROMPTS = 1024
"""Prompts of a kind in one step at most."""


BOUNDS = {"neighbours": 0.0075, "others": 0.045}
"""Share of each kind of negative that may fire where the radius is found. On other facts it should
be 1 % and 5 % at most, and samples differ."""


@dataclass(frozen=True)
class Recipe:
    """How a map is learned.

    Args:
        meaning_width, lexical_width: M and L.
        steps: of Adam.
        lr: of W; the few other numbers take ten times as much.
        hidden: width of the roles' network.
        role_steps: of Adam for it.
        amounts: how much is made of each fact; see `augment`.
        practice: facts to practise on, of each relation that comes with the package; see
            `practice`.
        folds: into how many parts the facts are split to find the radius.
        by: what stands together when they are split, `"subject"` or `"relation"`.
        bounds: per kind of negative, the share that may fire.
        seed: of everything random.
    """

    meaning_width: int = 64
    lexical_width: int = 64
    steps: int = 150
    lr: float = 3e-3
    hidden: int = 16
    role_steps: int = 600
    amounts: Amounts = field(default_factory=Amounts)
    practice: int = 2
    folds: int = 2
    by: str = "subject"
    bounds: dict[str, float] = field(default_factory=lambda: dict(BOUNDS))
    seed: int = 0


def fit_roles(
    facts: Sequence[Fact],
    common: CommonWords,
    *,
    hidden: int = 16,
    steps: int = 600,
    seed: int = 0,
) -> Roles:
    """Learn which words name the subject from sentences whose subject is known."""
    look = lru_cache(maxsize=None)(partial(describe, common=common))
    rows, labels = [], []
    for sentence, subject in _sentences(facts):
        for text, name in ((sentence, subject), (sentence.lower(), subject.lower())):
            start = text.rfind(name)
            places = word_spans(text)[-MOST_WORDS:]
            rows.append(features([look(text[a:b]) for a, b in places]))
            labels += [start <= a and b <= start + len(name) for a, b in places]
    x = torch.from_numpy(np.concatenate(rows)).float() / UNIT
    y = torch.tensor(labels, dtype=torch.float32)
    source = torch.Generator().manual_seed(seed)
    first = nn.Parameter(torch.empty(hidden, FEATURES + 1))
    second = nn.Parameter(torch.empty(hidden + 1))
    with torch.no_grad():
        first.uniform_(-1, 1, generator=source).div_(math.sqrt(FEATURES))
        second.uniform_(-1, 1, generator=source).div_(math.sqrt(hidden))
    optimizer = torch.optim.Adam([first, second], lr=1e-2, weight_decay=1e-5)
    for _ in range(steps):
        picked = torch.randint(len(x), (min(4096, len(x)),), generator=source)
        inner = F.relu(x[picked] @ first[:, :-1].T + first[:, -1])
        loss = F.binary_cross_entropy_with_logits(inner @ second[:-1] + second[-1], y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Roles(_short(first * 256), _short(second * 256))


def _sentences(facts: Sequence[Fact]) -> list[tuple[str, str]]:
    found = []
    for fact in facts:
        for prompt in (fact.prompt, *fact.rewordings, *fact.others):
            sentence = with_subject(prompt, fact.subject)
            if fact.subject and fact.subject in sentence:
                found.append((sentence, fact.subject))
    if not found:
        raise ValueError("facts must name subjects that stand in their prompts, got none")
    return found


def foreign_neighbours(facts: Sequence[Fact], known: Sequence[Fact] | None = None) -> list[str]:
    """Return the facts' neighbours, without those that name the subject of a known fact.

    Args:
        facts: whose neighbours.
        known: None: the facts themselves.
    """
    subjects = {fact.subject for fact in (facts if known is None else known) if fact.subject}
    return [
        prompt
        for fact in facts
        for prompt in fact.neighbours
        if not any(subject in prompt for subject in subjects)
    ]


class _Batch:
    """Every sentence of the facts, as numbers: words, roles, levels, dense vectors, signs."""

    def __init__(
        self,
        facts: Sequence[Fact],
        dense: TokenTable | SentenceEncoder,
        common: CommonWords,
        roles: Roles,
        width: int,
    ) -> None:
        self._number: dict[str, int] = {}
        same = [
            (i, with_subject(text, fact.subject))
            for i, fact in enumerate(facts)
            for text in fact.rewordings
        ]
        near = [last_sentence(text) for text in foreign_neighbours(facts)]
        self.keys = self._take([last_sentence(fact.prompt) for fact in facts])
        self.own = torch.tensor([i for i, _ in same], dtype=torch.long)
        self.same = self._take([text for _, text in same])
        self.near = self._take(near)
        self.other = self._take([last_sentence(text) for fact in facts for text in fact.others])
        self._read(dense, common, roles, width)

    def _take(self, texts: Sequence[str]) -> Tensor:
        numbers = [self._number.setdefault(text, len(self._number)) for text in texts]
        return torch.tensor(numbers, dtype=torch.long)

    def _read(
        self,
        dense: TokenTable | SentenceEncoder,
        common: CommonWords,
        roles: Roles,
        width: int,
    ) -> None:
        look = lru_cache(maxsize=None)(partial(describe, common=common))
        vocabulary: dict[str, int] = {}
        rows, sentences = [], []
        for text in self._number:
            words = [look(word) for word in words_of(text)[-_READ:]]
            subject = roles.subject(words)
            if isinstance(dense, SentenceEncoder):
                sentences.append(
                    dense.sentence(without_subject([w.text for w in words], subject)) / ONE
                )
            first: dict[str, tuple[int, int, int]] = {}
            for word, weight in zip(words, subject.tolist(), strict=True):
                place = vocabulary.setdefault(word.text, len(vocabulary) + 1)
                first.setdefault(folded(word.text), (place, weight, word.level))
            rows.append(list(first.values()))
        padded = torch.zeros(len(rows), max(map(len, rows)), 3, dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row).reshape(-1, 3)
        self.words = padded[..., 0]
        self.there = (self.words > 0).float()
        self.subject = padded[..., 1].float() / FULL
        self.level = padded[..., 2].float() / RAREST
        self.signs = _floats([np.zeros((1, width)), signs(list(vocabulary), width)])
        self.signs /= math.sqrt(width)
        if isinstance(dense, SentenceEncoder):
            self.dense = _floats([np.stack(sentences)])
        else:
            self.dense = _floats([np.zeros((1, dense.width)), dense.words(list(vocabulary)) / ONE])
        self.of_words = isinstance(dense, TokenTable)


class _Learned(nn.Module):
    """The numbers of a map while they are learned; what `TextKeys` does, in float32."""

    def __init__(self, batch: _Batch, recipe: Recipe) -> None:
        super().__init__()
        width, rows = batch.dense.shape[1], recipe.meaning_width
        source = torch.Generator().manual_seed(recipe.seed)
        start = torch.empty(max(rows, width), min(rows, width))
        nn.init.orthogonal_(start, generator=source)
        start = start.T if rows < width else start
        self.matrix = nn.Parameter(start * math.sqrt(max(1.0, width / rows)))
        # Per role (names the subject, does not): a constant and a slope over the level.
        self.lexical = nn.Parameter(torch.tensor([[1.0, 1.0], [-3.0, 0.0]]))
        self.meaning = nn.Parameter(torch.tensor([[-2.0, 0.0], [0.0, 0.0]]))
        self.floor = nn.Parameter(torch.tensor(math.log(8.0)))
        self.lengths = nn.Parameter(torch.zeros(2))
        self.steepness = nn.Parameter(torch.tensor(3.0))

    def tables(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights in the lexical and in the meaning part, `[2, *level]` each."""
        shape = (2, *[1] * level.ndim)
        lexical = self.lexical[:, 0].view(shape) + self.lexical[:, 1].view(shape) * level
        meaning = self.meaning[:, 0].view(shape) + self.meaning[:, 1].view(shape) * level
        return F.softplus(lexical), meaning.sigmoid()

    def forward(self, batch: _Batch, numbers: Tensor) -> Tensor:
        subject, there = batch.subject[numbers], batch.there[numbers]
        tables = self.tables(batch.level[numbers])
        lexical, meaning = (
            (subject * table[0] + (1 - subject) * table[1]) * there for table in tables
        )
        used, words = torch.unique(batch.words[numbers], return_inverse=True)
        bag = lambda rows, weights: F.embedding_bag(  # noqa: E731
            words, rows, per_sample_weights=weights, mode="sum"
        )
        of_whom = bag(batch.signs[used], lexical)
        squares = lexical.square().sum(dim=1, keepdim=True) + self.floor.exp()
        if batch.of_words:
            asked = bag(batch.dense[used] @ self.matrix.T, meaning)
        else:
            asked = batch.dense[numbers] @ self.matrix.T
        length = self.lengths.exp()
        return torch.cat(
            [length[0] * F.normalize(asked, dim=1), length[1] * of_whom / squares.sqrt()], dim=1
        )


def fit_map(
    facts: Sequence[Fact],
    dense: TokenTable | SentenceEncoder,
    common: CommonWords,
    roles: Roles,
    name: str,
    recipe: Recipe,
    advance: Callable[[int], object],
) -> TextMap:
    """Learn W, weights and lengths from facts. The scale is that of the loss: d = 1."""
    batch = _Batch(facts, dense, common, roles, recipe.lexical_width)
    learned = _Learned(batch, recipe)
    few = [p for n, p in learned.named_parameters() if n != "matrix"]
    optimizer = torch.optim.Adam(
        [
            {"params": [learned.matrix], "lr": recipe.lr},
            {"params": few, "lr": 10 * recipe.lr},
        ]
    )
    late = 0.6 * recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n < late else 0.3)
    source = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        loss = _loss(learned, batch, source)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(step)
    return _fixed(learned, dense, common, roles, name, recipe)


def _loss(learned: _Learned, batch: _Batch, source: torch.Generator) -> Tensor:
    def some(numbers: Tensor, count: int) -> Tensor:
        return numbers[torch.randperm(len(numbers), generator=source)[:count]]

    facts = some(torch.arange(len(batch.keys)), _FACTS)
    number = torch.full((len(batch.keys),), -1)
    number[facts] = torch.arange(len(facts))
    picked = some(torch.nonzero(number[batch.own] >= 0)[:, 0], _PROMPTS)
    near, other = some(batch.near, _PROMPTS), some(batch.other, _PROMPTS)
    texts = [batch.keys[facts], batch.same[picked], near, other]
    made = learned(batch, torch.cat(texts)).split([len(t) for t in texts])
    keys, same = made[0], made[1]
    k = learned.steepness
    inside = lambda square: F.softplus(k * (square - 1)).mean()  # noqa: E731
    outside = lambda square: F.softplus(k * (1 - square)).mean()  # noqa: E731
    loss = torch.zeros(())
    if len(picked):
        square = _squares(same, keys)
        order = torch.arange(len(picked))
        own = number[batch.own[picked]]
        barred = torch.zeros_like(square)
        barred[order, own] = math.inf
        loss = inside(square[order, own])
        if len(keys) > 1:
            loss = loss + outside((square + barred).amin(dim=1))
    if len(near):
        nearest = _squares(made[2], keys).topk(min(2, len(keys)), largest=False)
        loss = loss + outside(nearest.values)
    if len(other):
        loss = loss + outside(_squares(made[3], keys).amin(dim=1))
    return loss


def _fixed(
    learned: _Learned,
    dense: TokenTable | SentenceEncoder,
    common: CommonWords,
    roles: Roles,
    name: str,
    recipe: Recipe,
) -> TextMap:
    """Turn what was learned into integers."""
    levels = torch.arange(RAREST + 1) / RAREST
    with torch.no_grad():
        lexical, meaning = learned.tables(levels)
        # W may be scaled freely: only the direction of the meaning counts.
        matrix = learned.matrix * (0.98 * 32767 / learned.matrix.abs().max())
        floor = float(learned.floor.exp()) * (128 * FULL) ** 2
        lengths = learned.lengths.exp().double().tolist()
    return TextMap(
        roles=roles,
        common=common,
        lexical_weights=_weights(lexical * 128),
        meaning_weights=_weights(meaning * 1000),
        matrix=_short(matrix),
        centre=dense.centre.astype(np.int32)
        if isinstance(dense, TokenTable)
        else np.zeros(0, np.int32),
        probe=dense.probe(),
        lexical_width=recipe.lexical_width,
        lexical_floor=round(floor),
        meaning_length=lengths[0],
        lexical_length=lengths[1],
        dense=DenseReference(
            dense.kind,
            name,
            learned.matrix.shape[1],
            dense.fingerprint(),
            dense.unit if isinstance(dense, TokenTable) else 0.0,
        ),
    )


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _floats(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(rows)).float()


def _short(numbers: Any) -> np.ndarray:
    return np.rint(numbers.detach().double().numpy()).clip(-32768, 32767).astype(np.int16)


def _weights(numbers: Tensor) -> np.ndarray:
    return np.rint(numbers.double().numpy()).clip(0, WEIGHT_LIMIT).astype(np.int16)
