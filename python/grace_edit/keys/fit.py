"""Learning a text map from facts: what asks the same, what asks another thing, what of whom.

Three small things are learned, in this order and in seconds:

1. `roles`: from the facts' subjects, which words of a sentence name the subject (cross entropy;
   every sentence is seen as it is and in lower case).
2. The matrix W, the weights of words by role and level, and the lengths of both parts, with Adam,
   by a logistic loss in d² about the border d = 1. For each rewording its own key has to be inside
   and the nearest other key outside; for each prompt about another subject and each other question
   about the same subject, the nearest keys of all have to be outside.
3. The radius: facts are split by subject, a map is learned without one part, and the radius is the
   largest at which the negatives of that part, looked up among the keys of all facts, keep the
   bounds. Keys are then scaled so that the radius is 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import ONE, SentenceEncoder, TokenTable
from .radii import Suggestion, suggest_radius
from .roles import FEATURES, FULL, UNIT, Roles, describe, features
from .spans import last_sentence, spans
from .text_map import (
    MOST_WORDS,
    WEIGHT_LIMIT,
    DenseReference,
    TextKeys,
    TextMap,
    without_subject,
)
from .words import RAREST, CommonWords, folded, signs, word_spans, words_of


@dataclass(frozen=True)
class Fact:
    """What one edit would be about.

    Args:
        prompt: the wording that an edit would be made with.
        subject: whom or what it is about, as it stands in the prompt.
        rewordings: prompts that ask the same.
        neighbours: prompts that ask the same of other subjects.
        others: prompts that ask something else of the same subject.
    """

    prompt: str
    subject: str
    rewordings: Sequence[str] = ()
    neighbours: Sequence[str] = ()
    others: Sequence[str] = ()


BOUNDS = {"neighbours": 0.01, "others": 0.05}
"""Share of each kind of negative that may fire."""


@dataclass(frozen=True)
class Recipe:
    """How a map is learned.

    Args:
        meaning_width, lexical_width: M and L.
        steps: of Adam.
        lr: of W; the few other numbers take ten times as much.
        hidden: width of the roles' network.
        folds: into how many parts the facts are split to find the radius.
        bounds: per kind of negative, the share that may fire.
        seed: of everything random.
    """

    meaning_width: int = 64
    lexical_width: int = 64
    steps: int = 100
    lr: float = 3e-3
    hidden: int = 16
    folds: int = 2
    bounds: dict[str, float] = field(default_factory=lambda: dict(BOUNDS))
    seed: int = 0


def fit(
    facts: Sequence[Fact],
    dense: TokenTable | SentenceEncoder,
    common: CommonWords,
    *,
    name: str = "",
    roles: Roles | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TextMap:
    """Learn a map for a dense part.

    Args:
        facts: some hundreds, of many relations and with natural wordings. Facts made from a few
            templates teach little.
        dense: a `TokenTable` or a `SentenceEncoder`.
        common: how common words are.
        name: of the dense part, for people.
        roles: taken as they are instead of learned.
        recipe: None: the defaults.
        progress: called with the steps done and the steps in all.

    Returns:
        The map, scaled so that its recommended radius is 1; `trained` says what was measured on the
        parts held out for the radius.

    Raises:
        ValueError: there are no rewordings or no negatives among the facts.
    """
    recipe = recipe or Recipe()
    facts = list(facts)
    if not any(fact.rewordings for fact in facts):
        raise ValueError("facts must hold rewordings, got none")
    if not any(fact.neighbours or fact.others for fact in facts):
        raise ValueError("facts must hold neighbours or others, got neither")
    parts = _split(facts, recipe)
    done = 0

    def advance(_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, recipe.steps * (len(parts) + 1))

    def learn(some: Sequence[Fact]) -> TextMap:
        known = roles or fit_roles(some, common, hidden=recipe.hidden, seed=recipe.seed)
        return _fit_map(some, dense, common, known, name, recipe, advance)

    keys_of_all = [fact.prompt for fact in facts]
    measured = Distances([], {}, 0)
    for part in parts:
        held = [facts[i] for i in part]
        kept = [fact for i, fact in enumerate(facts) if i not in part]
        makers = TextKeys(learn(kept), dense)
        measured = measured.joined(measure(makers, held, keys_of_all, sorted(part)))
    suggestion = suggest_radius(
        measured.positives,
        {kind: far for kind, far in measured.negatives.items() if far},
        {kind: recipe.bounds[kind] for kind, far in measured.negatives.items() if far},
    )
    return _scaled(learn(facts), suggestion, len(facts))


@dataclass(frozen=True)
class Distances:
    """Distances of prompts to the nearest of many keys.

    Args:
        positives: per rewording; +inf where another key than its own is nearest.
        negatives: per kind, per prompt.
        keys: how many keys there were.
    """

    positives: list[float]
    negatives: dict[str, list[float]]
    keys: int

    def joined(self, other: Distances) -> Distances:
        """Return both together."""
        kinds = {**self.negatives, **other.negatives}
        return Distances(
            self.positives + other.positives,
            {k: self.negatives.get(k, []) + other.negatives.get(k, []) for k in kinds},
            max(self.keys, other.keys),
        )


def measure(
    keys: TextKeys,
    facts: Sequence[Fact],
    prompts: Sequence[str] | None = None,
    own: Sequence[int] | None = None,
) -> Distances:
    """Look the facts' prompts up among keys, as a codebook of edits would.

    Args:
        keys: the maker of keys.
        facts: what is asked. Neighbours that name the subject of one of the facts are left out:
            they are about an edit.
        prompts: of the edits in the codebook; None: those of the facts.
        own: per fact, which prompt is its own; None: the first to the first and so on.
    """
    prompts = [fact.prompt for fact in facts] if prompts is None else prompts
    own = range(len(facts)) if own is None else own
    book = torch.stack([keys.keys(prompt)[0] for prompt in prompts])
    subjects = {fact.subject for fact in facts}
    same = [(n, p) for n, fact in zip(own, facts, strict=True) for p in fact.rewordings]
    distance, index = _nearest(keys, [prompt for _, prompt in same], book)
    right = [number == found for (number, _), found in zip(same, index, strict=True)]
    neighbours = [
        prompt
        for fact in facts
        for prompt in fact.neighbours
        if not any(subject in prompt for subject in subjects)
    ]
    others = [prompt for fact in facts for prompt in fact.others]
    return Distances(
        [d if hit else math.inf for d, hit in zip(distance, right, strict=True)],
        {
            "neighbours": _nearest(keys, neighbours, book)[0],
            "others": _nearest(keys, others, book)[0],
        },
        len(prompts),
    )


def _nearest(keys: TextKeys, prompts: Sequence[str], book: Tensor) -> tuple[list[float], list[int]]:
    """Return the distance to the nearest key and its number, per prompt, over its spans."""
    distances, numbers = [], []
    for prompt in prompts:
        square = (keys.keys(prompt)[:, None] - book).square().sum(dim=2).amin(dim=0)
        number = int(square.argmin())
        distances.append(math.sqrt(float(square[number])))
        numbers.append(number)
    return distances, numbers


def fit_roles(
    facts: Sequence[Fact],
    common: CommonWords,
    *,
    hidden: int = 16,
    steps: int = 600,
    seed: int = 0,
) -> Roles:
    """Learn which words name the subject from sentences whose subject is known."""
    rows, labels = [], []
    for sentence, subject in _sentences(facts):
        for text, name in ((sentence, subject), (sentence.lower(), subject.lower())):
            start = text.rfind(name)
            places = word_spans(text)[-MOST_WORDS:]
            rows.append(features([describe(text[a:b], common) for a, b in places]))
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
        picked = torch.randint(len(x), (4096,), generator=source)
        inner = F.relu(x[picked] @ first[:, :-1].T + first[:, -1])
        loss = F.binary_cross_entropy_with_logits(inner @ second[:-1] + second[-1], y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Roles(_short(first * 256), _short(second * 256))


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
        subjects = {fact.subject for fact in facts}
        self.keys = self._take([last_sentence(fact.prompt) for fact in facts])
        same, near, other = [], [], []
        for i, fact in enumerate(facts):
            same += [(i, _with_subject(text, fact.subject)) for text in fact.rewordings]
            near += [
                last_sentence(text)
                for text in fact.neighbours
                if not any(subject in text for subject in subjects)
            ]
            other += [last_sentence(text) for text in fact.others]
        self.own = torch.tensor([i for i, _ in same], dtype=torch.long)
        self.same = self._take([text for _, text in same])
        self.near, self.other = self._take(near), self._take(other)
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
        vocabulary: dict[str, int] = {}
        rows, sentences = [], []
        for text in self._number:
            words = [describe(word, common) for word in words_of(text)[-MOST_WORDS:]]
            subject = roles.subject(words)
            if isinstance(dense, SentenceEncoder):
                sentences.append(dense.sentence(without_subject(words, subject)) / ONE)
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
        blank = np.zeros(width)
        self.signs = _floats([blank, *(signs(word, width) for word in vocabulary)])
        self.signs /= math.sqrt(width)
        if isinstance(dense, SentenceEncoder):
            self.dense = _floats(sentences)
        else:
            blank = np.zeros(dense.width)
            self.dense = _floats([blank, *(dense.word(word) / ONE for word in vocabulary)])
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


def _fit_map(
    facts: Sequence[Fact],
    dense: TokenTable | SentenceEncoder,
    common: CommonWords,
    roles: Roles,
    name: str,
    recipe: Recipe,
    advance: Callable[[int], object],
) -> TextMap:
    batch = _Batch(facts, dense, common, roles, recipe.lexical_width)
    learned = _Learned(batch, recipe)
    few = [p for n, p in learned.named_parameters() if n != "matrix"]
    optimizer = torch.optim.Adam(
        [{"params": [learned.matrix], "lr": recipe.lr}, {"params": few, "lr": 10 * recipe.lr}]
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
    def some(numbers: Tensor, share: float) -> Tensor:
        return torch.randperm(len(numbers), generator=source)[: math.ceil(share * len(numbers))]

    picked = some(batch.same, 0.7)
    near, other = some(batch.near, 0.35), some(batch.other, 1.0)
    texts = [batch.keys, batch.same[picked], batch.near[near], batch.other[other]]
    made = learned(batch, torch.cat(texts)).split([len(t) for t in texts])
    keys, same = made[0], made[1]
    k = learned.steepness
    inside = lambda square: F.softplus(k * (square - 1)).mean()  # noqa: E731
    outside = lambda square: F.softplus(k * (1 - square)).mean()  # noqa: E731
    square = _squares(same, keys)
    order = torch.arange(len(picked))
    own = batch.own[picked]
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
    tokens = isinstance(dense, TokenTable)
    return TextMap(
        roles=roles,
        common=common,
        lexical_weights=_weights(lexical * 128),
        meaning_weights=_weights(meaning * 1000),
        matrix=_short(matrix),
        centre=dense.centre.astype(np.int32)
        if isinstance(dense, TokenTable)
        else np.zeros(0, np.int32),
        lexical_width=recipe.lexical_width,
        lexical_floor=round(floor),
        meaning_length=lengths[0],
        lexical_length=lengths[1],
        dense=DenseReference(
            dense.kind,
            name,
            dense.width if tokens else learned.matrix.shape[1],
            dense.fingerprint(),
            dense.unit if isinstance(dense, TokenTable) else 0.0,
        ),
    )


def _scaled(made: TextMap, suggestion: Suggestion, facts: int) -> TextMap:
    """Scale the keys so that the suggested radius is 1, and say what was measured."""
    return replace(
        made,
        meaning_length=made.meaning_length / suggestion.radius,
        lexical_length=made.lexical_length / suggestion.radius,
        radius=1.0,
        trained={
            "facts": facts,
            "held out for the radius": {"hit": suggestion.hit, "fired": suggestion.fired},
        },
    )


def _split(facts: Sequence[Fact], recipe: Recipe) -> list[set[int]]:
    """Return parts of the facts' numbers; the facts of one subject stand together."""
    subjects = sorted({fact.subject.casefold() for fact in facts})
    random.Random(recipe.seed).shuffle(subjects)
    part = {subject: i % recipe.folds for i, subject in enumerate(subjects)}
    return [
        {n for n, fact in enumerate(facts) if part[fact.subject.casefold()] == i}
        for i in range(min(recipe.folds, len(subjects)))
    ]


def _sentences(facts: Sequence[Fact]) -> list[tuple[str, str]]:
    found = []
    for fact in facts:
        for prompt in (fact.prompt, *fact.rewordings, *fact.others):
            sentence = _with_subject(prompt, fact.subject)
            if fact.subject and fact.subject in sentence:
                found.append((sentence, fact.subject))
    if not found:
        raise ValueError("facts must name subjects that stand in their prompts, got none")
    return found


def _with_subject(prompt: str, subject: str) -> str:
    """Return the shorter span that names the subject, else the first."""
    named = [span for span in spans(prompt) if subject in span]
    return min(named, key=len) if named else spans(prompt)[0]


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _floats(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows)).float()


def _short(numbers: Any) -> np.ndarray:
    return np.rint(numbers.detach().double().numpy()).clip(-32768, 32767).astype(np.int16)


def _weights(numbers: Tensor) -> np.ndarray:
    return np.rint(numbers.double().numpy()).clip(0, WEIGHT_LIMIT).astype(np.int16)
