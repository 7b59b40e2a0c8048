"""One neutral record for every data set of the field: what is edited, and what is asked about it.

Whatever the published fields are called, a run sees `EditRecord`s. The kinds of questions differ in
what an edit should do to them: paraphrases and portability should follow it, everything else should
stay as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Target = str | int
"""What an edit makes the model say: text, or the class of a classifier."""

NEIGHBOUR, SAME_SUBJECT, FORGETFULNESS, UNRELATED = LOCALITY = (
    "neighbour",
    "same_subject",
    "forgetfulness",
    "unrelated",
)
"""The kinds of questions whose answer an edit should leave alone.

`neighbour`: the relation of the edit, another subject. `same_subject`: its subject, another
relation. `forgetfulness` (KnowEdit): subject and relation of the edit, the other objects of it.
`unrelated`: nothing of it.
"""


@dataclass(frozen=True)
class Question:
    """A prompt beside an edit.

    Args:
        prompt: as published.
        answers: any of them is right; empty where the data set names none.
        group: the data set's own name for this kind ("Reasoning"), if it has one.
    """

    prompt: str
    answers: tuple[Target, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class EditRecord:
    """One edit of a stream, and the questions that measure it.

    Args:
        id: the data set's own number, or the line.
        prompt, target: the edit.
        old: what the data set says the model answered, or what is true; None where it does not say.
        subject, relation: of the fact; empty where the data set does not name them.
        paraphrases: the prompt in other words.
        neighbours, same_subject, forgetfulness, unrelated: see `LOCALITY`.
        portability: questions whose answer follows from the edit.
        accurate: prompts whose continuation was right before (hallucination data).
        generation: prompts for free text about the subject.
        source: file and line, for error messages.
    """

    id: str
    prompt: str
    target: Target
    old: Target | None = None
    subject: str = ""
    relation: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Question, ...] = ()
    same_subject: tuple[Question, ...] = ()
    forgetfulness: tuple[Question, ...] = ()
    unrelated: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    accurate: tuple[Question, ...] = ()
    generation: tuple[str, ...] = ()
    source: str = ""

    def locality(self, kind: str) -> tuple[Question, ...]:
        """Return the questions of a kind of `LOCALITY`."""
        by_kind = {
            NEIGHBOUR: self.neighbours,
            SAME_SUBJECT: self.same_subject,
            FORGETFULNESS: self.forgetfulness,
            UNRELATED: self.unrelated,
        }
        return by_kind[kind]


def one_per_prompt(records: Iterable[EditRecord]) -> tuple[list[EditRecord], int]:
    """Keep the first record of each prompt; also return how many were left out.

    A later edit of the same prompt overwrites the earlier one, which a retention rate would count
    as lost.
    """
    kept: dict[str, EditRecord] = {}
    count = 0
    for record in records:
        count += 1
        kept.setdefault(record.prompt.strip(), record)
    return list(kept.values()), count - len(kept)
