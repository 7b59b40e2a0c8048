"""Splitting a folder of published records by subject: edits here, what a map is learned from there.

The files written hold records and stay where the run is; they are never part of the results.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .journal import write_whole
from .loading import DataError, NoDataError
from .records import EditRecord
from .schemas import parse_all
from .tuning import facts_of

Raw = dict[str, Any]

NESTED, FLAT, ZSRE, ZSRE_TRAIN, PASSAGES = (
    "counterfact.jsonl",
    "counterfact_flat.jsonl",
    "zsre.jsonl",
    "zsre_train.jsonl",
    "hallucination.jsonl",
)
"""The files a folder may hold, under their published names; only the first has to be there."""


@dataclass(frozen=True)
class Split:
    """Where the parts are, each a file or folder of records.

    Args:
        edits: CounterFact's nested records, one a prompt.
        train: records of other subjects.
        unseen: pairs of relations and a folder: of `train`, what does not ask for these relations,
            neither as an edit nor beside one. Each relation of the edits is in one of them.
        unrelated: questions that have nothing to do with the edits, with answers; None: none.
        counts: how many of what there are.
    """

    edits: Path
    train: Path
    unseen: tuple[tuple[tuple[str, ...], Path], ...]
    unrelated: Path | None
    counts: dict[str, int]


def split(data: Path, out: Path, *, edits: int, seed: int = 0) -> Split:
    """Split the records of a folder by subject and write the parts to `out`.

    Of the records with a question about the subject's other relations one half is edited and the
    other is learned from: such questions are rare, and both need them. The other edits are records
    without one. A subject is on one side only, in every file. Prompts about other subjects that
    name an edited one are about an edit: they are left out on both sides.

    Args:
        data: folder with files of the published names.
        out: new folder, or one of an earlier call, which is written again, the same.
        edits: how many.
        seed: of the choice.

    Raises:
        DataError: there is no CounterFact file, or it holds too few subjects.
    """
    nested = _read(data / NESTED)
    if nested is None:
        raise NoDataError(f"{data / NESTED}: no such file")
    chosen, rest = _chosen(nested, edits, seed)
    if len(chosen) < edits or not rest:
        raise DataError(
            f"{data / NESTED}: must hold subjects for {edits} edits and others to learn from, got "
            f"{len(chosen)} and {len(rest)} records (all of a subject are on one side)"
        )
    names = {_subject(raw) for raw in chosen}
    edited, dropped = _without(chosen, names)
    flat = [raw for raw in _read(data / FLAT) or () if _subject(raw) not in names]
    rest, _ = _without(rest, names)
    flat, _ = _without(flat, names)
    halves = _halves(edited, seed)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "edits.jsonl", edited)
    _write_folder(out / "train", rest, flat)
    relation = _relations(nested)
    unseen = []
    for number, half in enumerate(halves):
        own, other = (
            [raw for raw in part if relation(raw) not in (*half, "")] for part in (rest, flat)
        )
        _write_folder(out / f"unseen-{number + 1}", [_not_asking(raw, half) for raw in own], other)
        unseen.append((tuple(half), out / f"unseen-{number + 1}"))
    questions = _unrelated(data)
    if questions:
        _write(out / "unrelated.jsonl", questions)
    return Split(
        edits=out / "edits.jsonl",
        train=out / "train",
        unseen=tuple(unseen),
        unrelated=out / "unrelated.jsonl" if questions else None,
        counts={
            "edits": len(edited),
            "edits with a question about another relation": sum(map(_asks_other, edited)),
            "neighbours of edits that name an edited subject, left out": dropped,
            "records learned from": len(rest) + len(flat),
            "unrelated questions": len(questions),
        },
    )


def _read(path: Path) -> list[Raw] | None:
    if not path.is_file():
        return None
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: must be JSON: {error.msg}") from None
        if not isinstance(raw, dict) or not _subject(raw):
            raise DataError(f"{path}:{number}: must be a record that names its subject")
        found.append(raw)
    return found


def _write(path: Path, rows: Iterable[Raw]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_folder(folder: Path, nested: list[Raw], flat: list[Raw]) -> None:
    folder.mkdir(exist_ok=True)
    _write(folder / NESTED, nested)
    if flat:
        _write(folder / FLAT, flat)


def _subject(raw: Raw) -> str:
    found = raw.get("requested_rewrite", raw).get("subject", "")
    return found.strip().casefold() if isinstance(found, str) else ""


def _asks_other(raw: Raw) -> bool:
    return bool(raw.get("unrelated_relation"))


def _chosen(nested: list[Raw], edits: int, seed: int) -> tuple[list[Raw], list[Raw]]:
    """Return the records to edit and the others, subject by subject."""
    by_subject: dict[str, list[Raw]] = defaultdict(list)
    for raw in nested:
        by_subject[_subject(raw)].append(raw)
    names = sorted(by_subject)
    random.Random(seed).shuffle(names)
    asking = [name for name in names if any(map(_asks_other, by_subject[name]))]
    first = asking[: (len(asking) + 1) // 2]
    silent = [name for name in names if name not in set(asking)]
    chosen: list[Raw] = []
    taken = set()
    for name in (*first, *silent):
        if len(chosen) + len(by_subject[name]) <= edits:
            chosen += by_subject[name]
            taken.add(name)
    random.Random(seed).shuffle(chosen)
    return chosen, [raw for raw in nested if _subject(raw) not in taken]


def _without(records: list[Raw], names: set[str]) -> tuple[list[Raw], int]:
    """Return the records without neighbours that name one of `names`; also how many those are."""
    dropped = 0

    def free(prompt: str) -> bool:
        nonlocal dropped
        text = prompt.casefold()
        named = any(name in text for name in names)
        dropped += named
        return not named

    kept = []
    for raw in records:
        changed = dict(raw)
        if "neighborhood_prompts" in raw:
            changed["neighborhood_prompts"] = list(filter(free, raw["neighborhood_prompts"]))
        if raw.get("locality_prompt") and not free(raw["locality_prompt"]):
            changed["locality_prompt"] = ""
        kept.append(changed)
    return kept, dropped


def _not_asking(raw: Raw, relations: list[str]) -> Raw:
    """Return a record without its question about another relation, if that is one of these."""
    if not _asks_other(raw):
        return raw
    ((_, record),) = parse_all([("", raw)], "counterfact", "alt")
    facts = facts_of([record]) if isinstance(record, EditRecord) else []
    if not any(name in relations for fact in facts for name in fact.other_relations):
        return raw
    return {name: value for name, value in raw.items() if name != "unrelated_relation"}


def _relations(nested: list[Raw]) -> Callable[[Raw], str]:
    """Return a function that names the relation of a record, empty where nobody knows.

    Flat records name none: theirs is that of a nested record with the same prompt or rewording but
    for the subject.
    """
    known: dict[str, str] = {}
    for raw in nested:
        edit = raw["requested_rewrite"]
        number = edit.get("relation_id", "")
        subject = edit["subject"]
        forms = [p.replace(subject, "{}") for p in raw.get("paraphrase_prompts", ())]
        known.update((form[form.rfind(". ") + 1 :].strip(), number) for form in forms)
        known[edit["prompt"]] = number

    def relation(raw: Raw) -> str:
        if "requested_rewrite" in raw:
            return str(raw["requested_rewrite"].get("relation_id", ""))
        return known.get(raw.get("prompt", "").replace(raw.get("subject", ""), "{}"), "")

    return relation


def _halves(records: list[Raw], seed: int) -> list[list[str]]:
    """Return the relations in two halves, of about as many records each."""
    counts: dict[str, int] = defaultdict(int)
    for raw in records:
        counts[str(raw["requested_rewrite"].get("relation_id", ""))] += 1
    names = sorted(counts)
    random.Random(seed).shuffle(names)
    halves: list[list[str]] = [[], []]
    sizes = [0, 0]
    for name in sorted(names, key=lambda name: -counts[name]):
        smaller = sizes.index(min(sizes))
        halves[smaller].append(name)
        sizes[smaller] += counts[name]
    return halves


def _unrelated(data: Path) -> list[Raw]:
    """Return the unrelated questions of zsRE's files, each once."""
    found: dict[str, str] = {}
    for name in (ZSRE, ZSRE_TRAIN):
        for raw in _read(data / name) or ():
            prompt, answer = str(raw.get("loc", "")), str(raw.get("loc_ans", ""))
            if prompt.strip() and answer.strip():
                found.setdefault(prompt, answer)
    return [{"prompt": prompt, "answers": answer} for prompt, answer in found.items()]
