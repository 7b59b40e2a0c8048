"""Facts to practise on, made of wordings that come with the package.

Published facts are of a few dozen relations. A map learned from them alone knows their words, and
says little of a relation that it never saw. `wordings.txt` holds the wordings of many more
relations, written for this package: none is asked by CounterFact's edits, and no text of any data
set is in it. Subjects are borrowed from the facts at hand.

A fact for practice has rewordings in the form of its prompt, sentences or questions: what a
question has to do with a sentence is learned from the facts alone, see `augment.Amounts`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .augment import Fact, is_question

_FILE = Path(__file__).parent / "wordings.txt"
_QUESTIONS = 0.4
"""Share of the facts that are asked as questions."""
_REWORDINGS = 3
"""At most."""
_NEXT = 6
"""Relations that stand as near in the file are like each other: hard to tell apart."""


@lru_cache(maxsize=1)
def relations() -> dict[str, tuple[str, ...]]:
    """Return the wordings of each relation, `{}` where the subject stands."""
    blocks = _FILE.read_text(encoding="utf-8").strip().split("\n\n")
    lines = [block.split("\n") for block in blocks]
    return {name: tuple(wordings) for name, *wordings in lines}


def practice_facts(subjects: Sequence[str], each: int, seed: int) -> list[Fact]:
    """Make facts, `each` of a relation at most; the same arguments make the same.

    Args:
        subjects: whom they are about.
        each: of a relation.
        seed: of everything random.
    """
    if not subjects or not each:
        return []
    source = random.Random(seed)
    found = relations()
    names = list(found)
    asked_by: dict[str, set[str]] = defaultdict(set)
    for name, wordings in found.items():
        for wording in wordings:
            asked_by[wording].add(name)
    facts = []
    for i, name in enumerate(names):
        alike = set().union(*(asked_by[wording] for wording in found[name]))
        beside = [one for one in names[max(0, i - _NEXT) : i + _NEXT + 1] if one not in alike]
        for _ in range(each):
            subject = source.choice(subjects)
            forms = _of_one_form(found[name], source)
            other = source.choice(found[source.choice(beside)])
            texts = [wording.replace("{}", subject) for wording in (*forms, other)]
            facts.append(
                Fact(
                    texts[0],
                    subject,
                    rewordings=texts[1:-1][:_REWORDINGS],
                    others=texts[-1:],
                    relation=f"practice: {name}",
                )
            )
    return facts


def _of_one_form(wordings: Sequence[str], source: random.Random) -> list[str]:
    """Return a relation's questions or its sentences, shuffled: of one form that has two."""
    forms = [[w for w in wordings if is_question(w) is asked] for asked in (True, False)]
    first, second = forms if source.random() < _QUESTIONS else reversed(forms)
    chosen = first if len(first) > 1 else second
    return source.sample(chosen, len(chosen))
