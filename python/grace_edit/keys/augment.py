"""More to learn from: the wordings of facts, asked of other facts' subjects.

Published facts have one form each: an edit's prompt, its rewordings and neighbours are sentences to
be continued ("The mother tongue of Marta Holm is"), what is asked about another relation of
the subject is a question ("Where was Marta Holm born?"). A map learned from these alone
learns to tell questions from sentences. So wordings are cut out of the facts where their subject
stands, and are put together anew, so that each form stands on either side:

    rewordings   questions of the fact's own relation
    others       sentences and questions of other relations that are asked of such subjects

Which relations may be asked of a subject is taken from the facts too: A and B if some fact of A
says that B is another question about its subject. Relations that share a wording ("is located in":
the country, the continent) are never told apart.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .spans import spans

_LONGEST = 60
"""Characters of a wording without its subject; a longer one says more than its relation."""


@dataclass(frozen=True)
class Fact:
    """What one edit would be about.

    Args:
        prompt: the wording that an edit would be made with.
        subject: whom or what it is about, as it stands in the prompt.
        rewordings: prompts that ask the same.
        neighbours: prompts that ask the same of other subjects.
        others: prompts that ask something else of the same subject.
        relation: what is asked of the subject, by any name; empty where it is not known. Facts
            whose prompts are the same but for the subject have one relation anyway.
        other_relations: of each of `others`, or empty; an empty name is one that is not known.
    """

    prompt: str
    subject: str
    rewordings: Sequence[str] = ()
    neighbours: Sequence[str] = ()
    others: Sequence[str] = ()
    relation: str = ""
    other_relations: Sequence[str] = ()


@dataclass(frozen=True)
class Amounts:
    """How much is made of each fact; all 0 makes nothing.

    Few questions make a better map than many. Some published questions about "another" relation ask
    what the edit says: the nearer questions are drawn to their edits, the smaller is the radius at
    which not too many of those fire, for every wording.

    Args:
        questions: rewordings that are questions, on average.
        sentences_of_others, questions_of_others: of other relations about its subject.
        lower: share of prompts that are given in lower case as well.
    """

    questions: float = 0.3
    sentences_of_others: int = 4
    questions_of_others: int = 1
    lower: float = 0.15


class Wordings:
    """The wordings of facts by relation, `{}` where the subject stands.

    Args:
        facts: of any relations; those without a relation take that of a fact with the same prompt
            but for the subject, else the prompt's wording is their relation.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._by_prompt: dict[str, str] = {}
        for fact in facts:
            if fact.relation and (wording := _cut(fact.prompt, fact.subject)):
                self._by_prompt.setdefault(wording, fact.relation)
        sentences: dict[str, set[str]] = defaultdict(set)
        questions: dict[str, set[str]] = defaultdict(set)
        relations_of: dict[str, set[str]] = defaultdict(set)
        self._beside: dict[str, set[str]] = defaultdict(set)
        self._facts: set[tuple[str, str]] = set()
        for fact in facts:
            relation = self.relation(fact)
            self._facts.add((fact.subject.casefold(), relation))
            own = [(prompt, relation) for prompt in (fact.prompt, *fact.rewordings)]
            for prompt, name in (*own, *self.named_others(fact)):
                wording = _cut(prompt, fact.subject)
                if wording:
                    (questions if is_question(wording) else sentences)[name].add(wording)
                    relations_of[wording].add(name)
                if name != relation:
                    self._beside[relation].add(name)
                    self._beside[name].add(relation)
        self.sentences = {name: sorted(found) for name, found in sentences.items()}
        self.questions = {name: sorted(found) for name, found in questions.items()}
        self._alike: dict[str, set[str]] = defaultdict(set)
        for names in relations_of.values():
            for name in names:
                self._alike[name] |= names

    def relation(self, fact: Fact) -> str:
        """Return the relation of a fact, by name or by its prompt."""
        if fact.relation:
            return fact.relation
        wording = _cut(fact.prompt, fact.subject)
        return self._by_prompt.get(wording, wording)

    def named_others(self, fact: Fact) -> list[tuple[str, str]]:
        """Return the others of a fact, each with its relation, by name or by its wording."""
        names = fact.other_relations or [""] * len(fact.others)
        named = []
        for prompt, name in zip(fact.others, names, strict=True):
            wording = _cut(prompt, fact.subject)
            if name or wording:
                named.append((prompt, name or self._by_prompt.get(wording, wording)))
        return named

    def others(self, relation: str, subject: str = "") -> list[str]:
        """Return the relations that are asked of the same subjects and are surely others.

        None that one of the facts says of `subject`.
        """
        surely = self._beside.get(relation, set()) - self.alike(relation)
        return sorted(name for name in surely if not self.knows(subject, name))

    def knows(self, subject: str, relation: str) -> bool:
        """Say whether one of the facts is of this subject and relation."""
        return (subject.casefold(), relation) in self._facts

    def alike(self, relation: str) -> set[str]:
        """Return the relations that share a wording with this one, and itself."""
        return self._alike.get(relation, set()) | {relation}


def is_question(text: str) -> bool:
    """Say whether a text ends as a question."""
    return text.rstrip("\"'”’)] ").endswith(("?", "？", "؟"))


def with_subject(prompt: str, subject: str) -> str:
    """Return the shorter span that names the subject, else the first."""
    named = [span for span in spans(prompt) if subject in span]
    return min(named, key=len) if named else spans(prompt)[0]


def augmented(
    facts: Sequence[Fact], amounts: Amounts, seed: int, wordings: Wordings | None = None
) -> list[Fact]:
    """Return the facts with more prompts, the first of each subject and relation.

    The same facts and seed give the same prompts.

    Args:
        facts: what is given.
        amounts: how much to make.
        seed: of what is drawn.
        wordings: None: those of `facts`.
    """
    found = wordings or Wordings(facts)
    maker = _Maker(found, amounts, random.Random(seed))
    once: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        once.setdefault((fact.subject.casefold(), found.relation(fact)), fact)
    return [maker.more(fact) for fact in once.values()]


def probes(facts: Sequence[Fact], wordings: Wordings, seed: int) -> dict[str, list[Fact]]:
    """Return what a map is measured by: the facts with one kind of made prompts each.

    Returns:
        `"questions"` and `"lower case"`: in `rewordings`, what asks the same; `"sentences of
        others"` and `"questions of others"`: in `others`, what asks something else.
    """

    def made(amounts: Amounts, number: int) -> list[Fact]:
        maker = _Maker(wordings, amounts, random.Random(f"{seed} {number}"))
        return [
            maker.more(replace(fact, rewordings=(), others=(), other_relations=()))
            for fact in facts
        ]

    none = Amounts(0, 0, 0, 0.0)
    return {
        "questions": made(replace(none, questions=2), 0),
        "lower case": [
            replace(fact, rewordings=[text.lower() for text in fact.rewordings]) for fact in facts
        ],
        "sentences of others": made(replace(none, sentences_of_others=2), 1),
        "questions of others": made(replace(none, questions_of_others=1), 2),
    }


class _Maker:
    def __init__(self, wordings: Wordings, amounts: Amounts, source: random.Random) -> None:
        self._wordings = wordings
        self._amounts = amounts
        self._source = source

    def more(self, fact: Fact) -> Fact:
        relation, amounts = self._wordings.relation(fact), self._amounts
        asked = self._some(self._wordings.questions.get(relation, ()), amounts.questions)
        rewordings = [*fact.rewordings, *self._filled(asked, fact.subject)]
        named = dict(self._wordings.named_others(fact))
        given = [
            prompt
            for prompt in fact.others
            if not self._wordings.knows(fact.subject, named.get(prompt, ""))
        ]
        others = [*given, *self._of_others(relation, fact.subject)]
        return replace(
            fact,
            rewordings=self._with_lower(rewordings, fact.prompt),
            others=self._with_lower(others),
            relation=relation,
            other_relations=(),
        )

    def _of_others(self, relation: str, subject: str) -> list[str]:
        made = []
        found, amounts = self._wordings, self._amounts
        for forms, count in (
            (found.sentences, amounts.sentences_of_others),
            (found.questions, amounts.questions_of_others),
        ):
            names = [name for name in found.others(relation, subject) if name in forms]
            for _ in range(count if names else 0):
                made.append(self._source.choice(forms[self._source.choice(names)]))
        return self._filled(made, subject)

    def _some(self, items: Sequence[str], count: float) -> list[str]:
        whole = int(count) + (self._source.random() < count % 1)
        return self._source.sample(list(items), min(whole, len(items)))

    def _filled(self, wordings: Iterable[str], subject: str) -> list[str]:
        return list(dict.fromkeys(wording.replace("{}", subject) for wording in wordings))

    def _with_lower(self, prompts: Sequence[str], first: str = "") -> list[str]:
        prompts = [first, *prompts] if first and self._amounts.lower else list(prompts)
        lower = [p.lower() for p in prompts if self._source.random() < self._amounts.lower]
        return [*(p for p in prompts if p != first), *lower]


def _cut(prompt: str, subject: str) -> str:
    """Return the wording of a prompt's span, empty where the subject does not stand in it once."""
    span = with_subject(prompt, subject)
    short = len(span) - len(subject) <= _LONGEST
    if not subject or span.count(subject) != 1 or "{}" in span or not short:
        return ""
    return span.replace(subject, "{}")
