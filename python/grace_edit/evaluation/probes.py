"""What a study asks of keys alone: the records' own prompts, harder ones, another data set."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..keys.augment import Amounts, Wordings, augmented
from .loading import load
from .records import EditRecord
from .rows import Row, row_of
from .run import Units
from .scope import Keyring
from .tuning import facts_of


def own_prompts(
    part: str,
    ring: Keyring,
    records: dict[int, EditRecord],
    units: Units,
    chosen: Sequence[int] | None = None,
    reach: str = "",
) -> Iterator[Row]:
    """Ask what the records ask. What an edit would say was measured with its answer forced.

    Args:
        part: of the study.
        ring: the keys of the edits, one for each of `records`, in this order.
        records: by their number in the stream.
        units: what the run of the stream found.
        chosen: the numbers of those whose prompts are asked; None: all.
        reach: what share of rewordings should be produced.
    """
    key = {number: place for place, number in enumerate(records)}
    hits, produced, neighbours, others = [], [], [], []
    for number in records if chosen is None else chosen:
        record, told = records[number], units[f"rest/{number}"]["paraphrase"]
        for prompt, answer in zip(record.paraphrases, told, strict=True):
            hit = ring.ask(prompt).hits(key[number])
            hits.append(hit)
            produced.append(hit and answer["said"])
        neighbours += ring.fired(q.prompt for q in record.neighbours)
        others += ring.fired(q.prompt for q in record.same_subject)
    yield row_of(part, "rewordings that hit their own edit", hits)
    yield row_of(part, "rewordings whose target is produced", produced, reach)
    yield row_of(part, "neighbours fired", neighbours)
    yield row_of(part, "same subject, other relation, fired", others)


def harder_prompts(
    part: str, ring: Keyring, records: Sequence[EditRecord], more: Sequence[EditRecord]
) -> Iterator[Row]:
    """Ask the wordings of other records about the edited subjects: forms that no record has.

    Args:
        part: of the study.
        ring: the keys of `records`, in this order.
        records: the edits.
        more: whose wordings are used too.
    """
    wordings = Wordings(facts_of([*records, *more]))
    facts = facts_of(records)
    key = {record.prompt: place for place, record in enumerate(records)}
    bare = [replace(fact, rewordings=(), others=(), other_relations=()) for fact in facts]
    questions, *_ = augmented(bare, Amounts(2, 0, 0, 0, 0.0), seed=1, wordings=wordings)
    hits = [
        ring.ask(prompt).hits(key[fact.prompt]) for fact in questions for prompt in fact.rewordings
    ]
    yield row_of(part, "questions of the own relation that hit", hits)
    lower = [
        ring.ask(prompt.lower()).hits(key[fact.prompt])
        for fact in facts
        for prompt in fact.rewordings
    ]
    yield row_of(part, "rewordings in lower case that hit", lower)
    for amounts, name in (
        (Amounts(0, 2, 0, 0, 0.0), "sentences of other relations fired"),
        (Amounts(0, 0, 2, 0, 0.0), "questions of other relations fired"),
    ):
        made, *_ = augmented(bare, amounts, seed=2, wordings=wordings)
        yield row_of(part, name, ring.fired(p for fact in made for p in fact.others))


def another_data_set(part: str, ring: Keyring, path: Path, count: int, seed: int) -> Iterator[Row]:
    """Ask zsRE's rephrasings against zsRE's questions, one for each subject.

    Args:
        part: of the study.
        ring: whose map makes the keys.
        path: zsRE's file.
        count: of questions.
        seed: of their choice.
    """
    by_subject: dict[str, EditRecord] = {}
    for record in load(path, "zsre").records:
        if record.paraphrases:
            by_subject.setdefault(record.subject.casefold(), record)
    facts = list(by_subject.values())
    random.Random(seed).shuffle(facts)
    facts = facts[:count]
    own = ring.with_prompts([record.prompt for record in facts])
    hits = [
        own.ask(prompt).hits(number)
        for number, record in enumerate(facts)
        for prompt in record.paraphrases
    ]
    yield row_of(part, "rephrasings that hit their own edit", hits, "≥ .88")
    unrelated = own.fired(q.prompt for record in facts for q in record.unrelated)
    yield row_of(part, "unrelated questions fired", unrelated, "≤ .001")
    follows = own.fired(q.prompt for record in facts for q in record.portability)
    yield row_of(part, "questions that follow from the edit fired", follows)
