"""The published forms of editing data, one function each: fields in, an `EditRecord` out.

Field names are the published ones. A field of a wrong type is an error; a record that a published
file holds without a prompt or target is `Unusable`, and left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from .records import EditRecord, Question, Target

# Not after an initial: "Murray G. Ross" is one sentence.
_SENTENCE = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?=\S)")


class FieldError(ValueError):
    """A field breaks a rule: "field must rule, got value"."""


class Unusable(ValueError):
    """A record holds no edit."""


class Fields:
    """Typed access to one record; `at` is the path that errors name.

    Args:
        raw: the record.
        at: prefix of its fields in error messages.
    """

    def __init__(self, raw: Any, at: str = "") -> None:
        if not isinstance(raw, dict):
            raise FieldError(f"{at or 'record'} must be a JSON object, got {_shown(raw)}")
        self.raw, self.at = raw, at

    def name(self, field: str) -> str:
        """Return how errors name a field."""
        return f"{self.at}.{field}" if self.at else field

    def _get(self, field: str) -> Any:
        if field not in self.raw:
            raise FieldError(f"{self.name(field)} must be there, got only {sorted(self.raw)}")
        return self.raw[field]

    def has(self, field: str) -> bool:
        """Say whether a field is there and not null."""
        return self.raw.get(field) is not None

    def text(self, field: str) -> str:
        """Return a string, as it is; anything else raises FieldError."""
        found = self._get(field)
        if not isinstance(found, str):
            raise FieldError(f"{self.name(field)} must be a string, got {_shown(found)}")
        return found

    def optional(self, field: str) -> str:
        """Return a string, empty where there is none."""
        return self.text(field) if self.has(field) else ""

    def needed(self, field: str) -> str:
        """Return a string without which there is no edit.

        Raises:
            Unusable: it is empty.
        """
        found = self.text(field)
        if not found.strip():
            raise Unusable(f"{self.name(field)} is empty")
        return found

    def texts(self, field: str) -> tuple[str, ...]:
        """Return a list of strings; none without a field; anything else raises FieldError."""
        found = self.raw.get(field, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise FieldError(f"{self.name(field)} must be a list of strings, got {_shown(found)}")
        return tuple(item for item in found if item.strip())

    def answers(self, field: str) -> tuple[str, ...]:
        """Return the answers of a field: a string, a list of them, or a list of alias lists."""
        found = self._get(field)
        flat: list[Any] = []
        for item in found if isinstance(found, list) else [found]:
            flat += item if isinstance(item, list) else [item]
        if not all(isinstance(item, str) for item in flat):
            raise FieldError(
                f"{self.name(field)} must be a string or lists of strings, got {_shown(found)}"
            )
        return tuple(item.strip() for item in flat if item.strip())

    def inside(self, field: str) -> Fields:
        """Return the fields of an object that is a field."""
        return Fields(self._get(field), self.name(field))

    def grouped(self, field: str) -> dict[str, tuple[Question, ...]]:
        """Return questions by group: `{"Reasoning": [{"prompt", "ground_truth"}]}`."""
        if not self.has(field):
            return {}
        groups = self.inside(field)
        found = {}
        for group, items in groups.raw.items():
            if not isinstance(items, list):
                raise FieldError(f"{groups.name(group)} must be a list, got {_shown(items)}")
            asked = [Fields(item, f"{groups.name(group)}[{i}]") for i, item in enumerate(items)]
            found[group] = tuple(
                Question(one.text("prompt"), one.answers("ground_truth"), group)
                for one in asked
                if one.text("prompt").strip()
            )
        return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _question(prompt: str, answer: str) -> tuple[Question, ...]:
    if not prompt.strip():
        return ()
    return (Question(prompt, (answer.strip(),) if answer.strip() else ()),)


def _case(fields: Fields) -> str:
    found = fields.raw.get("case_id", "")
    return str(found)


def _counterfact(fields: Fields, _: str) -> EditRecord:
    """CounterFact: nested as ROME published it, or flat as EasyEdit has it."""
    if "requested_rewrite" not in fields.raw:
        return _flat(fields, neighbour=True)
    edit = fields.inside("requested_rewrite")
    subject, template = edit.needed("subject"), edit.needed("prompt")
    if template.count("{}") != 1:
        raise FieldError(
            f"requested_rewrite.prompt must hold one {{}} for the subject, got {template!r}"
        )
    old = edit.inside("target_true").text("str").strip()
    # Neighbours share the relation and the true answer.
    neighbours = fields.texts("neighborhood_prompts")
    other: tuple[Question, ...] = ()
    follows: tuple[Question, ...] = ()
    if fields.has("unrelated_relation"):
        asked = fields.inside("unrelated_relation")
        other = tuple(
            replace(question, group=asked.optional("relation_id"))
            for question in _question(asked.text("question"), asked.optional("object"))
        )
    if fields.has("portability"):
        asked = fields.inside("portability")
        follows = _question(asked.text("New Question"), asked.text("New Answer"))
    return EditRecord(
        id=_case(fields),
        prompt=template.replace("{}", subject),
        target=edit.inside("target_new").needed("str").strip(),
        old=old,
        subject=subject,
        relation=edit.optional("relation_id"),
        paraphrases=fields.texts("paraphrase_prompts"),
        neighbours=tuple(Question(prompt, (old,)) for prompt in neighbours),
        same_subject=other,
        portability=follows,
        generation=fields.texts("generation_prompts"),
    )


def _flat(fields: Fields, *, neighbour: bool) -> EditRecord:
    """EasyEdit's flat form; its one locality prompt is a neighbour's or an unrelated one."""
    answers = fields.answers("ground_truth") if fields.has("ground_truth") else ()
    paraphrase = fields.optional("rephrase_prompt")
    locality = _question(
        fields.optional("locality_prompt"), fields.optional("locality_ground_truth")
    )
    return EditRecord(
        id=_case(fields),
        prompt=fields.needed("prompt"),
        target=fields.needed("target_new").strip(),
        old=answers[0] if answers else None,
        subject=fields.optional("subject"),
        paraphrases=(paraphrase,) if paraphrase.strip() else (),
        neighbours=locality if neighbour else (),
        unrelated=() if neighbour else locality,
    )


def _zsre(fields: Fields, towards: str) -> EditRecord:
    """zsRE: MEND's fields, EasyEdit's flat ones, or the annotated questions GRACE was run on."""
    if "src" not in fields.raw:
        if "input" in fields.raw:
            return _zsre_annotated(fields, towards)
        return _flat(fields, neighbour=False)
    answers = fields.answers("answers")
    if towards == "answers" and not answers:
        raise Unusable("answers is empty")
    follows: tuple[Question, ...] = ()
    if fields.has("portability"):
        asked = fields.inside("portability")
        follows = _question(asked.text("New Question"), asked.text("New Answer"))
    rephrase = fields.optional("rephrase")
    return EditRecord(
        id=_case(fields),
        prompt=fields.needed("src"),
        target=answers[0] if towards == "answers" else fields.needed("alt").strip(),
        old=fields.optional("pred").strip() or None,
        subject=fields.optional("subject"),
        paraphrases=(rephrase,) if rephrase.strip() else (),
        unrelated=_question(fields.optional("loc"), fields.optional("loc_ans")),
        portability=follows,
    )


def _zsre_annotated(fields: Fields, towards: str) -> EditRecord:
    outputs = fields.raw.get("output")
    if not isinstance(outputs, list) or not outputs:
        raise FieldError(f"output must be a list with an answer, got {_shown(outputs)}")
    answer = Fields(outputs[0], "output[0]").needed("answer").strip()
    others = fields.texts("alternatives")
    if towards == "alt" and not others:
        raise Unusable("alternatives is empty")
    return EditRecord(
        id=str(fields.raw.get("id", "")),
        prompt=fields.needed("input"),
        target=answer if towards == "answers" else others[0].strip(),
        old=fields.optional("prediction").strip() or None,
        paraphrases=fields.texts("filtered_rephrases"),
    )


def _hallucination(fields: Fields, _: str) -> EditRecord:
    """The WISE form of the hallucination data: a passage so far, and its next sentence."""
    return EditRecord(
        id=_case(fields),
        prompt=fields.needed("prompt"),
        target=fields.needed("target_new").strip(),
        subject=fields.optional("subject"),
        unrelated=_question(
            fields.optional("locality_prompt"), fields.optional("locality_ground_truth")
        ),
    )


def _knowedit(fields: Fields, _: str) -> EditRecord:
    """KnowEdit's four files; WikiBio's has its own names for prompt, target and subject."""
    biography = "text" in fields.raw
    names = ("text", "labels", "concept") if biography else ("prompt", "target_new", "subject")
    prompt, target, subject = names
    old = fields.answers("ground_truth") if fields.has("ground_truth") else ()
    paraphrase = fields.optional("rephrase_prompt")
    locality = fields.grouped("locality")
    same = [q for group, asked in locality.items() if group != "Forgetfulness" for q in asked]
    return EditRecord(
        id=_case(fields),
        prompt=fields.needed(prompt),
        target=fields.needed(target).strip(),
        old=old[0] if old else None,
        subject=fields.optional(subject),
        paraphrases=(paraphrase,) if paraphrase.strip() else (),
        same_subject=tuple(same),
        forgetfulness=locality.get("Forgetfulness", ()),
        portability=tuple(q for asked in fields.grouped("portability").values() for q in asked),
    )


def _scotus(fields: Fields, _: str) -> EditRecord:
    """SCOTUS: a text and its class, a number or a name."""
    return EditRecord(id=_case(fields), prompt=fields.needed("text"), target=_label(fields))


def _label(fields: Fields) -> Target:
    found = fields.raw.get("label")
    if type(found) is not int and not (isinstance(found, str) and found):
        raise FieldError(f"label must be a class number or name, got {_shown(found)}")
    return found


def parse_question(raw: Any) -> Question:
    """Return a question of upstream data."""
    fields = Fields(raw)
    if "label" in fields.raw:
        return Question(fields.needed("text"), (_label(fields),))
    answers = fields.answers("answers")
    if not answers:
        raise Unusable("answers is empty")
    return Question(fields.needed("prompt"), answers)


_PARSERS: dict[str, Callable[[Fields, str], EditRecord]] = {
    "counterfact": _counterfact,
    "zsre": _zsre,
    "hallucination": _hallucination,
    "knowedit": _knowedit,
    "scotus": _scotus,
}
KINDS = tuple(_PARSERS)


def detect(raw: dict[str, Any]) -> str | None:
    """Return the kind of a record by its fields, None where they do not tell."""
    if "requested_rewrite" in raw:
        return "counterfact"
    if {"src", "alt"} <= raw.keys() or {"input", "output", "filtered_rephrases"} <= raw.keys():
        return "zsre"
    nested = any(isinstance(raw.get(name), dict) for name in ("locality", "portability"))
    if nested and ({"prompt", "target_new"} <= raw.keys() or {"text", "labels"} <= raw.keys()):
        return "knowedit"
    if {"text", "label"} <= raw.keys():
        return "scotus"
    if {"prompt", "target_new"} <= raw.keys():
        if str(raw.get("locality_prompt", "")).startswith("nq question:"):
            return "zsre"
        if "rephrase_prompt" in raw:
            return "counterfact"
        if "locality_prompt" in raw:
            return "hallucination"
    return None


def parse_all(
    rows: Iterable[tuple[str, Any]], kind: str, zsre_target: str
) -> Iterator[tuple[str, EditRecord | FieldError | Unusable]]:
    """Give every record of a data set, or why it is none, with its place."""
    parser = _PARSERS[kind]
    parsed: list[tuple[str, EditRecord | FieldError | Unusable]] = []
    for number, (place, raw) in enumerate(rows):
        try:
            record = parser(Fields(raw), zsre_target)
        except (FieldError, Unusable) as error:
            parsed.append((place, error))
            continue
        parsed.append((place, replace(record, id=record.id or str(number))))
    if kind == "hallucination":
        parsed = _with_accurate(parsed)
    yield from parsed


def _with_accurate(
    parsed: list[tuple[str, EditRecord | FieldError | Unusable]],
) -> list[tuple[str, EditRecord | FieldError | Unusable]]:
    """Add the sentences that this file does not edit.

    The edits of a passage have the sentences before them as their prompt. Between two of them in
    turn stands the sentence that the first edit replaces, then those that no edit replaces: each of
    these is a continuation that editing should keep (the paper's ARR, which has an annotator's word
    that they are right; a file that holds some of the edits alone calls a few too many so).
    """
    passages: dict[str, list[EditRecord]] = defaultdict(list)
    for _, record in parsed:
        if isinstance(record, EditRecord) and record.subject:
            passages[record.subject].append(record)
    found: dict[str, tuple[Question, ...]] = {}
    for records in passages.values():
        ordered = sorted(records, key=lambda record: len(record.prompt))
        for record, later in pairwise(ordered):
            found[record.id] = _right_sentences(record.prompt, later.prompt)
    return [
        (place, replace(r, accurate=found.get(r.id, ())) if isinstance(r, EditRecord) else r)
        for place, r in parsed
    ]


def _right_sentences(prompt: str, later: str) -> tuple[Question, ...]:
    start = prompt.strip()
    if not later.startswith(start):
        return ()
    sentences = _SENTENCE.split(later[len(start) :].strip())
    return tuple(
        Question(" ".join([start, *sentences[:n]]), (sentences[n],))
        for n in range(1, len(sentences))
    )
