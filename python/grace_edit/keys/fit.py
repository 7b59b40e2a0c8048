"""Learning a text map from facts: what asks the same, what asks another thing, what of whom.

Three small things are learned, in this order and in seconds:

1. `roles`: from the facts' subjects, which words of a sentence name the subject (cross entropy;
   every sentence is seen as it is and in lower case).
2. The matrix W, the weights of words by role and level, and the lengths of both parts, with Adam,
   by a logistic loss in d² about the border d = 1. For each rewording its own key has to be inside
   and the nearest other key outside; for each prompt about another subject and each other question
   about the same subject, the nearest keys of all have to be outside.
   Facts made of the package's own wordings stand beside the given ones; see `practice`.
3. The radius: facts are split by subject, a map is learned without one part, and the radius is the
   largest at which the negatives of that part, looked up among the keys of all facts, keep the
   bounds, less a margin. Keys are then scaled so that the radius is 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augment import Amounts, Fact, Wordings, augmented, probes
from .dense import SentenceEncoder, TokenTable
from .learning import Recipe, fit_map, fit_roles, foreign_neighbours
from .practice import practice_facts
from .radii import suggest_radius
from .roles import Roles
from .text_keys import TextKeys
from .text_map import TextMap
from .words import CommonWords

MARGIN = 0.97
"""Of the largest radius that keeps the bounds, what is taken: a map learned from all facts brings
prompts nearer to their keys than the maps learned from parts of them, by which it is found."""


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
    learn = _Learner(dense, common, name, roles, recipe, progress, recipe.folds + 1)
    measured = _held_out(facts, dense, learn)
    bounds = {kind: recipe.bounds[kind] for kind in recipe.bounds if measured.negatives.get(kind)}
    suggestion = suggest_radius(
        measured.positives["rewordings"],
        {kind: measured.negatives[kind] for kind in bounds},
        bounds,
    )
    radius = MARGIN * suggestion.radius
    shares = {kind: round(share, 4) for kind, share in measured.shares(radius).items()}
    return _scaled(learn(facts), radius, len(facts), shares)


def held_out(
    facts: Sequence[Fact],
    dense: TokenTable | SentenceEncoder,
    common: CommonWords,
    *,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Distances:
    """Measure maps on facts that they were not learned from; arguments as for `fit`.

    Each part of the facts is looked up among the keys of all, by a map learned from the others.
    """
    recipe = recipe or Recipe()
    learn = _Learner(dense, common, "", None, recipe, progress, recipe.folds)
    return _held_out(list(facts), dense, learn)


@dataclass
class _Learner:
    """Learns maps from some of the facts and counts the steps."""

    dense: TokenTable | SentenceEncoder
    common: CommonWords
    name: str
    roles: Roles | None
    recipe: Recipe
    progress: Callable[[int, int], object] | None
    maps: int
    done: int = 0

    def __call__(self, facts: Sequence[Fact]) -> TextMap:
        recipe = self.recipe
        subjects = {f.subject for f in facts if f.subject and f.subject in f.prompt}
        practice = practice_facts(sorted(subjects), recipe.practice, recipe.seed)
        known = self.roles or fit_roles(
            [*facts, *practice],
            self.common,
            hidden=recipe.hidden,
            steps=recipe.role_steps,
            seed=recipe.seed,
        )
        only_lower = Amounts(0, 0, 0, recipe.amounts.lower)
        more = [
            *augmented(facts, recipe.amounts, recipe.seed),
            *augmented(practice, only_lower, recipe.seed),
        ]
        return fit_map(more, self.dense, self.common, known, self.name, recipe, self._advance)

    def _advance(self, _: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.recipe.steps * self.maps)


def _held_out(
    facts: Sequence[Fact], dense: TokenTable | SentenceEncoder, learn: _Learner
) -> Distances:
    if not any(fact.rewordings for fact in facts):
        raise ValueError("facts must hold rewordings, got none")
    if not any(fact.neighbours or fact.others for fact in facts):
        raise ValueError("facts must hold neighbours or others, got neither")
    wordings = Wordings(facts)
    measured = Distances({}, {}, 0)
    for part in split(facts, learn.recipe):
        held = [facts[i] for i in sorted(part)]
        kept = [fact for i, fact in enumerate(facts) if i not in part]
        keys = TextKeys(learn(kept), dense)
        measured = measured.joined(measure(keys, held, facts, wordings))
    return measured


@dataclass(frozen=True)
class Distances:
    """Distances of prompts to the nearest of many keys.

    Args:
        positives: per kind, per prompt; +inf where another key than its own is nearest.
        negatives: per kind, per prompt.
        keys: how many keys there were.
    """

    positives: dict[str, list[float]]
    negatives: dict[str, list[float]]
    keys: int

    def joined(self, other: Distances) -> Distances:
        """Return both together."""

        def both(a: dict[str, list[float]], b: dict[str, list[float]]) -> dict[str, list[float]]:
            return {kind: [*a.get(kind, []), *b.get(kind, [])] for kind in {**a, **b}}

        return Distances(
            both(self.positives, other.positives),
            both(self.negatives, other.negatives),
            max(self.keys, other.keys),
        )

    def shares(self, radius: float) -> dict[str, float]:
        """Return the share within a radius, per kind that there are prompts of."""
        return {
            kind: sum(d <= radius for d in found) / len(found)
            for kind, found in {**self.positives, **self.negatives}.items()
            if found
        }


def measure(
    keys: TextKeys,
    facts: Sequence[Fact],
    known: Sequence[Fact] | None = None,
    wordings: Wordings | None = None,
) -> Distances:
    """Look the facts' prompts up among keys, as a codebook of edits would.

    Args:
        keys: the maker of keys.
        facts: what is asked. Neighbours that name the subject of an edit are left out.
        known: the edits in the codebook, the facts among them; None: those alone.
        wordings: ask what `probes` makes of the facts and these as well, and leave out others that
            one of the facts behind these answers.
    """
    known = facts if known is None else known
    prompts = list(dict.fromkeys(fact.prompt for fact in known))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    book = torch.stack([keys.keys(prompt)[0] for prompt in prompts])

    def hits(facts: Sequence[Fact]) -> list[float]:
        asked = [(place[fact.prompt], text) for fact in facts for text in fact.rewordings]
        distance, found = nearest(keys, [text for _, text in asked], book)
        return [
            d if number == own else math.inf
            for d, number, (own, _) in zip(distance, found, asked, strict=True)
        ]

    def fires(texts: Sequence[str]) -> list[float]:
        return nearest(keys, texts, book)[0]

    positives = {"rewordings": hits(facts)}
    negatives = {
        "neighbours": fires(foreign_neighbours(facts, known)),
        "others": fires([text for fact in facts for text in _others(fact, wordings)]),
    }
    for kind, asked in (probes(facts, wordings, 0) if wordings is not None else {}).items():
        if kind in ("questions", "lower case"):
            positives[kind] = hits(asked)
        else:
            negatives[kind] = fires([text for fact in asked for text in fact.others])
    return Distances(positives, negatives, len(prompts))


def _others(fact: Fact, wordings: Wordings | None) -> list[str]:
    """Return a fact's others without what another of the known facts answers."""
    if wordings is None:
        return list(fact.others)
    named = dict(wordings.named_others(fact))
    return [text for text in fact.others if not wordings.knows(fact.subject, named.get(text, ""))]


def nearest(keys: TextKeys, prompts: Sequence[str], book: Tensor) -> tuple[list[float], list[int]]:
    """Return the distance to the nearest key of `[N, D]` and its number, per prompt."""
    distances, numbers = [], []
    for prompt in prompts:
        square = (keys.keys(prompt)[:, None] - book).square().sum(dim=2).amin(dim=0)
        number = int(square.argmin())
        distances.append(math.sqrt(float(square[number])))
        numbers.append(number)
    return distances, numbers


def split(facts: Sequence[Fact], recipe: Recipe) -> list[set[int]]:
    """Return parts of the facts' numbers; the facts of one subject, or relation, stand together."""
    if recipe.by == "relation":
        wordings = Wordings(facts)
        names = [wordings.relation(fact) for fact in facts]
    else:
        names = [fact.subject.casefold() for fact in facts]
    order = sorted(set(names))
    if len(order) < recipe.folds:
        raise ValueError(f"facts must be of at least {recipe.folds} {recipe.by}s, got {len(order)}")
    random.Random(recipe.seed).shuffle(order)
    part = {name: i % recipe.folds for i, name in enumerate(order)}
    return [{n for n, name in enumerate(names) if part[name] == i} for i in range(recipe.folds)]


def _scaled(made: TextMap, radius: float, facts: int, held_out: dict[str, float]) -> TextMap:
    """Scale the keys so that the suggested radius is 1, and say what was measured."""
    return replace(
        made,
        meaning_length=made.meaning_length / radius,
        lexical_length=made.lexical_length / radius,
        radius=1.0,
        trained={"facts": facts, "held out": held_out},
    )
