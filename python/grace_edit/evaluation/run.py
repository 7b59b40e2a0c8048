"""A lifelong run: a stream of edits on one model, measured on the way and at the end.

The protocol is the paper's: edits one after the other, each measured right after it was made (ES);
every k edits and at the end all past edits (ERR) and upstream data (TRR); at the end everything
else a record holds. Every answer is asked for freely and teacher forced.

Work is done in units (an edit; a record or question measured at some point), each of which is on
disk when it is finished. A run that was killed goes on with the unit that is missing and ends with
the same figures, clock times aside: edits after the last saved state are made again.

Where a method can tell that no edit answers a prompt, the answer is the unedited model's by
construction: the adaptor writes nothing. Such prompts need no second generation. This is verified
on a sample, and the results say on how many and with what outcome.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..progress import bar
from . import metrics
from .journal import Journal
from .methods import Look, Made, Method, write_map
from .model import SEQ2SEQ, Answer, Forced
from .records import LOCALITY, EditRecord, Question, Target

Units = dict[str, dict[str, Any]]
Said = dict[tuple[str, Target | None], tuple[Answer, Forced | None]]
"""What the unedited model says to a prompt, freely and with a target put in its mouth."""
COMPARED = 8
"""Tokens that a causal model says at least where its answer is compared with the unedited one's."""


@dataclass(frozen=True)
class Protocol:
    """How a stream is run and measured.

    Args:
        every: measure past edits and upstream data every so many edits; None: at the end alone.
        only_errors: make an edit only where the model, as it is then, answers wrong (the paper).
        most_past: measure at most so many past edits before the end, evenly spread; None: all.
        save_every: keep the state every so many edits.
        verify_every: of the prompts that no edit answers, one in so many is generated anyway.
        rest: measure paraphrases, locality, portability and ARR at the end.

    Raises:
        ValueError: a number is below 1.
    """

    every: int | None = None
    only_errors: bool = False
    most_past: int | None = None
    save_every: int = 10
    verify_every: int = 20
    rest: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "most_past", "save_every", "verify_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    def checkpoints(self, edits: int) -> list[int]:
        """Return after how many edits there is a measurement; the last is `edits`."""
        return sorted({*range(self.every or edits, edits, self.every or edits), edits})


def run_stream(
    make: Callable[[], Method],
    records: Sequence[EditRecord],
    directory: Path,
    protocol: Protocol,
    *,
    upstream: Sequence[Question] = (),
    unedited: Said | None = None,
    progress: bool = False,
) -> Units:
    """Run a stream to its end, from wherever an earlier run of it was stopped.

    Args:
        make: gives the method on an unedited model.
        records: the edits, in order; the same as in the earlier run.
        directory: of this method's log and state.
        upstream: questions with answers that have nothing to do with the edits.
        unedited: what the unedited model is known to say, of the methods before on the same one;
            what this run finds out is added.
        progress: show progress bars on stderr.

    Returns:
        The finished units by name, for `results`.

    Raises:
        ValueError: there is no record, or an upstream question without an answer.
    """
    if not records:
        raise ValueError("records must hold at least one edit, got none")
    for question in upstream:
        if not question.answers:
            raise ValueError(f"upstream must have answers, got none for {question.prompt!r}")
    journal = Journal(directory)
    try:
        if "done" not in journal:
            method = make()
            try:
                known = {} if unedited is None else unedited
                run = _Run(method, records, upstream, known, protocol, journal, progress)
                run.go()
                if (found := method.map()) is not None:
                    write_map(directory, found)
            finally:
                method.close()
            journal.add("done", {})
        return journal.units
    finally:
        journal.close()


@dataclass
class _Run:
    method: Method
    records: Sequence[EditRecord]
    upstream: Sequence[Question]
    unedited: Said
    protocol: Protocol
    journal: Journal
    progress: bool

    def go(self) -> None:
        done, state = self.journal.saved()
        if state is not None:
            self.method.restore(state)
        else:
            self._measure_upstream(0)
        start = 0
        for stop in self.protocol.checkpoints(len(self.records)):
            # What was measured before the state was kept is complete.
            if stop >= done:
                self._edit(max(start, done), stop)
                self.journal.save(stop, self.method.save)
                self._measure(stop)
            start = stop

    def _units(self, names: Iterable[str], what: str) -> Any:
        missing = [name for name in names if name not in self.journal]
        return bar(missing, f"{self.method.name}: {what}", self.progress)

    # Editing

    def _edit(self, start: int, stop: int) -> None:
        numbers = range(start, stop)
        for i in bar(numbers, f"{self.method.name}: edits {start + 1} to {stop}", self.progress):
            self.journal.add(f"edit/{i}", self._one_edit(self.records[i]))
            if (i + 1) % self.protocol.save_every == 0:
                self.journal.save(i + 1, self.method.save)

    def _one_edit(self, record: EditRecord) -> dict[str, Any]:
        before = self._ask(record.prompt, (record.target,), None)
        if self.protocol.only_errors and before["exact"]:
            return {"before": before, "skipped": True, "keys": self.method.keys}
        began = time.perf_counter()
        made: Made = self.method.edit(record)
        seconds = time.perf_counter() - began
        return {
            "before": before,
            **asdict(made),
            "seconds": seconds,
            "after": self._ask(record.prompt, (record.target,), made.edit),
            "keys": self.method.keys,
        }

    # Measuring

    def _measure(self, edits: int) -> None:
        past = [i for i in range(edits) if not self.journal.units[f"edit/{i}"].get("skipped")]
        last = edits == len(self.records)
        if not last and self.protocol.most_past is not None:
            past = _spread(past, self.protocol.most_past)
        for unit in self._units((f"err/{edits}/{i}" for i in past), "past edits"):
            number = int(unit.split("/")[2])
            record = self.records[number]
            found = self._ask(record.prompt, (record.target,), self._made(number))
            self.journal.add(unit, found)
        self._measure_upstream(edits)
        if last and self.protocol.rest:
            for unit in self._units((f"rest/{i}" for i in past), "what a record asks"):
                self.journal.add(unit, self._rest(int(unit.split("/")[1]), unit))

    def _made(self, number: int) -> int | None:
        """Return the edit that a record became, None if it was refused or nobody tells."""
        found: int | None = self.journal.units[f"edit/{number}"]["edit"]
        return found

    def _measure_upstream(self, edits: int) -> None:
        names = (f"trr/{edits}/{j}" for j in range(len(self.upstream)))
        for unit in self._units(names, "upstream data"):
            question = self.upstream[int(unit.split("/")[2])]
            found = self._upstream_unasked(edits, unit, question)
            if found is None:
                found = self._ask(question.prompt, question.answers, None)
            self.journal.add(unit, found)

    def _upstream_unasked(self, edits: int, unit: str, question: Question) -> dict[str, Any] | None:
        """Return the answer before any edit, where no edit answers; None where one may."""
        before = self.journal.units.get(f"trr/0/{unit.split('/')[2]}")
        look = self.method.look(question.prompt) if edits and before is not None else None
        if before is None or look is None or look.fires:
            return None
        found = {**before, **_seen(look)}
        if self._verified(unit):
            again = self._ask(question.prompt, question.answers, None)
            found["verified"] = again["answer"] == before["answer"]
        return found

    def _rest(self, number: int, unit: str) -> dict[str, Any]:
        record, made = self.records[number], self._made(number)
        target = record.target
        found: dict[str, Any] = {
            "paraphrase": [self._reworded(prompt, target, made) for prompt in record.paraphrases],
            "portability": [self._ask(q.prompt, q.answers, None) for q in record.portability],
            "accurate": [self._ask(q.prompt, q.answers, None) for q in record.accurate],
        }
        for kind in LOCALITY:
            found[kind] = [
                self._compare(question, f"{unit}/{kind}/{number}")
                for number, question in enumerate(record.locality(kind))
            ]
        return found

    def _reworded(self, prompt: str, target: Target, made: int | None) -> dict[str, Any]:
        """Ask a rewording; where the right edit does not answer it, also what that one would say.

        So a miss is known to be one of scope (`right`), of decoding (`said`) or of both.
        """
        found = self._ask(prompt, (target,), made)
        if found.get("right"):
            return {**found, "said": found["exact"]}
        answering = None if made is None else self.method.answering(made)
        if answering is None:
            return found
        with answering:
            answer, _ = self.method.ask(prompt, target)
        return {**found, "said": metrics.exact(answer.text, self.method.asked.label(target))}

    def _ask(self, prompt: str, answers: Sequence[Target], made: int | None) -> dict[str, Any]:
        """Ask one prompt whose right answers are known, freely and teacher forced.

        Args:
            made: the edit that should answer, None where there is none.
        """
        method = self.method
        asked, target = method.asked, answers[0]
        look = method.look(prompt)
        answer, forced = method.ask(prompt, target)
        assert forced is not None
        labels = [asked.label(one) for one in answers]
        found = {
            **_seen(look, made),
            "answer": answer.text,
            "exact": any(metrics.exact(answer.text, label) for label in labels),
            "f1": metrics.f1(answer.text, labels),
            "accuracy": metrics.token_accuracy(forced.predicted, forced.wanted),
        }
        if asked.family == SEQ2SEQ:
            pad = asked.tokenizer.pad_token_id
            found["grace_f1"] = metrics.grace_f1(answer.ids, forced.wanted, pad)
        if forced.losses is not None:
            found["loss"] = _finite(sum(forced.losses) / len(forced.losses))
        return found

    def _compare(self, question: Question, name: str) -> dict[str, Any]:
        """Ask one prompt that no edit should change, beside the unedited model."""
        method = self.method
        target = question.answers[0] if question.answers else None
        look = method.look(question.prompt)
        found = _seen(look)
        if look is not None and not look.fires and not self._verified(name):
            return {**found, "same": True, **({} if target is None else {"agreement": 1.0})}
        if (question.prompt, target) not in self.unedited:
            with method.unedited():
                said = method.ask(question.prompt, target, COMPARED)
            self.unedited[question.prompt, target] = said
        before, expected = self.unedited[question.prompt, target]
        after, forced = method.ask(question.prompt, target, COMPARED)
        same = after.text == before.text
        found["same"] = same
        if expected is not None and forced is not None:
            found["agreement"] = metrics.token_accuracy(forced.predicted, expected.predicted)
        if look is not None and not look.fires:
            found["verified"] = same
        return found

    def _verified(self, name: str) -> bool:
        return zlib.crc32(name.encode()) % self.protocol.verify_every == 0


def _seen(look: Look | None, made: int | None = None) -> dict[str, Any]:
    if look is None:
        return {}
    found: dict[str, Any] = {"fires": look.fires}
    if look.edits is not None and made is not None:
        found["right"] = look.fires and made in look.edits
    if look.distance is not None and look.radius is not None:
        found.update(distance=_finite(look.distance), radius=_finite(look.radius))
    return found


def _spread(items: list[int], most: int) -> list[int]:
    """Return at most `most` of the items, evenly spread, the last among them."""
    if len(items) <= most:
        return items
    return [items[(n + 1) * len(items) // most - 1] for n in range(most)]


def _finite(number: float) -> float | None:
    return number if number == number and abs(number) != float("inf") else None
