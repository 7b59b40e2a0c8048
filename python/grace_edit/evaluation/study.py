"""The study of one model on a folder of published records: lifelong edits, scope, and what to blame.

out/study.json, study.csv   every row of the tables; they hold figures alone, no record
out/data/                   the records, split by subject
out/map/, unseen-1/, ...    text maps, learned from the subjects that are not edited
out/edits/, paper/, ...     the runs, each as `command.run` leaves it

A part that is finished is not done again, so a study that was killed goes on.
"""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..keys.augment import Amounts, Fact, Wordings, augmented
from ..keys.choice import text_keys
from ..keys.text_map import SETTINGS as MAP_FILE
from ..keys.text_map import TextMap
from . import metrics
from .command import EvaluationError, Options, environments, run
from .journal import read_units, write_whole
from .loading import load
from .model import AskedModel
from .records import EditRecord, one_per_prompt
from .run import Units
from .scope import Keyring
from .splitting import PASSAGES, ZSRE, Split, split
from .tuning import facts_of, tune

PARTS = ("edits", "scope", "paper", "baselines", "hallucination")
BASELINES = ("ft", "defer", "memory", "rag")


@dataclass(frozen=True)
class Sizes:
    """How much of each part: edits of the stream, of the paper's settings, of the baselines, zsRE
    facts, passages' sentences, and unrelated questions that are answered too."""

    edits: int = 500
    paper: int = 60
    baselines: int = 100
    zsre: int = 300
    hallucination: int = 100
    unrelated: int = 200


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Args:
        part: of the study, and which method or map.
        name: what was measured.
        value, count: the mean, and of how many; None: there was nothing to average.
        reach: what it should be, if anything was set.
    """

    part: str
    name: str
    value: float | None
    count: int
    reach: str = ""


def study(
    data: Path,
    out: Path,
    loaded: tuple[Any, Any],
    options: Options,
    *,
    parts: Sequence[str] = PARTS,
    encoders: Sequence[str] = (),
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Run a study, from wherever an earlier one in the same directory was stopped.

    Args:
        data: folder of records under their published names, see `splitting`.
        out: for everything that is written.
        loaded: the model and its tokenizer.
        options: of the runs; data, out, baselines and how many edits are set by the study.
        parts: of `PARTS`, in their order.
        encoders: sentence encoders whose scope is measured beside that of `options`.
        sizes: None: the defaults.

    Returns:
        What `out/study.json` holds.

    Raises:
        DataError, EvaluationError: as `command.run`.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise EvaluationError(f"parts must be of {', '.join(PARTS)}, got {sorted(unknown)}")
    return _Study(data, out, loaded, options, tuple(encoders), sizes or Sizes()).run(parts)


class _Study:
    def __init__(
        self,
        data: Path,
        out: Path,
        loaded: tuple[Any, Any],
        options: Options,
        encoders: tuple[str, ...],
        sizes: Sizes,
    ) -> None:
        self.data, self.out, self.loaded, self.sizes = data, out, loaded, sizes
        self.encoder = str(options.config.get("encoder", "tokens"))
        self.encoders = encoders
        self.parts: Split = split(data, out / "data", edits=sizes.edits, seed=options.seed)
        self.asked = AskedModel(*loaded)
        self.records = self._records()
        self.options = replace(options, out=out, baselines=(), draw=True)

    def run(self, parts: Sequence[str]) -> dict[str, Any]:
        makers: dict[str, Callable[[], Iterator[Row]]] = {
            "edits": self._edits,
            "scope": self._scope,
            "paper": self._paper,
            "baselines": self._baselines,
            "hallucination": self._hallucination,
        }
        for part in PARTS:
            path = self.out / f"rows-{part}.json"
            if part in parts and not path.exists():
                rows = [asdict(row) for row in makers[part]()]
                write_whole(path, json.dumps(rows, indent=1) + "\n")
        return self._results()

    def _results(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for part in PARTS:
            path = self.out / f"rows-{part}.json"
            if path.exists():
                rows += json.loads(path.read_text(encoding="utf-8"))
        results = {
            "command": self.options.command,
            "model": self.options.model,
            "config": {"encoder": Path(self.encoder).name},
            "counts": self.parts.counts,
            "sizes": asdict(self.sizes),
            "environments": environments(self.out),
            "rows": rows,
        }
        write_whole(self.out / "study.json", json.dumps(results, indent=1) + "\n")
        text = io.StringIO()
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.out / "study.csv", text.getvalue())
        return results

    # Parts

    def _edits(self) -> Iterator[Row]:
        found = self._run(
            "edits",
            self.parts.edits,
            config={"encoder": self.encoder, "text_map": str(self._map("map", self.parts.train))},
            upstream=None if self.parts.unrelated is None else str(self.parts.unrelated),
            upstream_questions=self.sizes.unrelated,
        )
        yield from _rows(found, "edits", "grace", _END)
        for name, count in found["rewordings"].get("grace", {}).items():
            yield Row("rewordings", name, float(count), 2 * len(self.records))

    def _scope(self) -> Iterator[Row]:
        """Ask keys alone; what an answer would be is known from the edits' part."""
        units = read_units(self.out / "edits" / "grace")
        for encoder in (self.encoder, *self.encoders):
            own = encoder == self.encoder
            name = Path(encoder).name
            ring, taken = self._ring("map" if own else f"map-{name}", self.parts.train, encoder, units)
            yield from self._asked(f"scope, {name}", ring, taken, units)
            yield from self._harder(f"harder prompts, {name}", ring, taken)
            yield from self._zsre(f"zsRE, {name}", ring)
            cost = 1000 * ring.seconds / ring.asked
            yield Row(f"scope, {name}", "milliseconds a prompt, key and lookup", cost, ring.asked)
            yield from self._unseen(name, encoder, units)

    def _unseen(self, name: str, encoder: str, units: Units) -> Iterator[Row]:
        parts: list[list[Row]] = []
        for number, (relations, folder) in enumerate(self.parts.unseen):
            where = f"unseen-{number + 1}" + ("" if encoder == self.encoder else f"-{name}")
            ring, taken = self._ring(where, folder, encoder, units)
            own = [i for i in taken if self.records[i].relation in relations]
            parts.append(list(self._asked(f"relations never seen, {name}", ring, taken, units, own)))
        for one, other in zip(*parts, strict=True):
            yield _together(one, other)

    def _paper(self) -> Iterator[Row]:
        config = {"policy": "paper", "recipe": "paper"}
        path = self._few("paper", self.sizes.paper)
        found = self._run("paper", path, config=config, query="last", upstream=None)
        yield from _rows(found, "the paper's settings", "grace", _BESIDE)

    def _baselines(self) -> Iterator[Row]:
        path = self._few("baselines", self.sizes.baselines)
        config = {"encoder": self.encoder, "text_map": str(self._map("map", self.parts.train))}
        upstream = None if self.parts.unrelated is None else str(self.parts.unrelated)
        found = self._run(
            "baselines",
            path,
            config=config,
            baselines=BASELINES,
            upstream=upstream,
            upstream_questions=50,
        )
        for method in ("grace", *BASELINES):
            yield from _rows(found, f"beside it: {method}", method, _BESIDE)

    def _hallucination(self) -> Iterator[Row]:
        path = self.data / PASSAGES
        if not path.is_file():
            return
        found = self._run(
            "hallucination",
            path,
            config={"encoder": self.encoder, "text_map": str(self._map("map", self.parts.train))},
            edits=self.sizes.hallucination,
            upstream_questions=50,
        )
        yield from _rows(found, "hallucination", "grace", _PASSAGES)

    # What they need

    def _run(self, where: str, data: Path, *, config: dict[str, Any], **changes: Any) -> Any:
        changes.setdefault("every", None if where != "edits" else 100)
        config = {**self.options.config, **config}
        options = replace(self.options, data=str(data), out=self.out / where, config=config, **changes)
        return run(options, self.loaded)

    def _map(self, where: str, train: Path, encoder: str | None = None) -> Path:
        """Return the directory of a map, learned if it is not there."""
        done = self.out / where
        if not (done / MAP_FILE).exists():
            fresh = self.out / (where + ".new")
            shutil.rmtree(fresh, ignore_errors=True)
            model, tokenizer = self.loaded
            tune(
                train,
                fresh,
                model=model,
                tokenizer=tokenizer,
                encoder=encoder or self.encoder,
                progress=self.options.progress,
            )
            fresh.rename(done)
        return done

    def _ring(
        self, where: str, train: Path, encoder: str, units: Units
    ) -> tuple[Keyring, list[int]]:
        """Return the keys of the edits that were accepted, and which those are."""
        keys = self._keys(where, train, encoder)
        taken = [i for i in range(len(self.records)) if units[f"edit/{i}"]["accepted"]]
        return Keyring(keys, [self.records[i].prompt for i in taken]), taken

    def _keys(self, where: str, train: Path, encoder: str) -> Any:
        model, tokenizer = self.loaded
        return text_keys(model, tokenizer, encoder, TextMap.load(self._map(where, train, encoder)))

    def _records(self) -> list[EditRecord]:
        records, _ = one_per_prompt(load(self.parts.edits, "counterfact").records)
        return [one for one in records if self.asked.fits(one.prompt, one.target)]

    def _few(self, name: str, count: int) -> Path:
        """Write the first edits with two neighbours each: a method that cannot tell its fires has
        every one of them answered twice."""
        path = self.out / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in self.parts.edits.read_text("utf-8").splitlines()]
        for row in rows:
            row["neighborhood_prompts"] = row["neighborhood_prompts"][:2]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows[:count]))
        return path

    # Asking keys alone

    def _asked(
        self,
        part: str,
        ring: Keyring,
        taken: list[int],
        units: Units,
        own: Sequence[int] | None = None,
    ) -> Iterator[Row]:
        """Ask what the records ask.

        Args:
            taken: the record of each key.
            own: the records whose prompts are asked; None: all of `taken`.
        """
        asked = taken if own is None else own
        number = {record: key for key, record in enumerate(taken)}
        hits, produced, neighbours, others = [], [], [], []
        for i in asked:
            record = self.records[i]
            told = units[f"rest/{i}"]["paraphrase"]
            for prompt, answer in zip(record.paraphrases, told, strict=True):
                hit = ring.ask(prompt).hits(number[i])
                hits.append(hit)
                produced.append(hit and answer["said"])
            neighbours += ring.fired(q.prompt for q in record.neighbours)
            others += ring.fired(q.prompt for q in record.same_subject)
        reach = {"produced": "≥ .80"} if own is not None else {}
        yield _row(part, "rewordings that hit their own edit", hits)
        yield _row(part, "rewordings whose target is produced", produced, reach.get("produced", ""))
        yield _row(part, "neighbours fired", neighbours)
        yield _row(part, "same subject, other relation, fired", others)
        if own is None and self.parts.unrelated is not None:
            questions = load_prompts(self.parts.unrelated)
            yield _row(part, "unrelated questions fired", ring.fired(questions), "≤ .001")

    def _harder(self, part: str, ring: Keyring, taken: list[int]) -> Iterator[Row]:
        """Ask the wordings of other facts about the edited subjects: forms that no record has."""
        everything = [*self.records, *load(self.parts.train / "counterfact.jsonl").records]
        wordings = Wordings(facts_of(everything))
        facts = facts_of([self.records[i] for i in taken])
        bare = [replace(fact, rewordings=(), others=(), other_relations=()) for fact in facts]
        keys = {self.records[i].prompt: key for key, i in enumerate(taken)}
        own, *_ = augmented(bare, Amounts(2, 0, 0, 0, 0.0), seed=1, wordings=wordings)
        known = {fact.prompt: set(fact.rewordings) for fact in facts}
        hits = [
            ring.ask(prompt).hits(keys[fact.prompt])
            for fact in own
            for prompt in fact.rewordings
            if prompt not in known[fact.prompt]
        ]
        yield _row(part, "questions of the own relation that hit", hits)
        lower = [
            ring.ask(prompt.lower()).hits(keys[fact.prompt])
            for fact in facts
            for prompt in fact.rewordings
        ]
        yield _row(part, "rewordings in lower case that hit", lower)
        for amounts, name in (
            (Amounts(0, 2, 0, 0, 0.0), "sentences of other relations fired"),
            (Amounts(0, 0, 2, 0, 0.0), "questions of other relations fired"),
        ):
            made, *_ = augmented(bare, amounts, seed=2, wordings=wordings)
            yield _row(part, name, ring.fired(p for fact in made for p in fact.others))

    def _zsre(self, part: str, edits: Keyring) -> Iterator[Row]:
        """Ask zsRE's rephrasings against zsRE's questions: another data set, never learned from."""
        path = self.data / ZSRE
        if not path.is_file():
            return
        by_subject: dict[str, EditRecord] = {}
        for record in load(path, "zsre").records:
            if record.paraphrases:
                by_subject.setdefault(record.subject.casefold(), record)
        facts = list(by_subject.values())
        random.Random(self.options.seed).shuffle(facts)
        facts = facts[: self.sizes.zsre]
        ring = edits.with_prompts([record.prompt for record in facts])
        hits = [
            ring.ask(prompt).hits(number)
            for number, record in enumerate(facts)
            for prompt in record.paraphrases
        ]
        yield _row(part, "rephrasings that hit their own edit", hits, "≥ .88")
        loc = [q.prompt for record in facts for q in record.unrelated]
        yield _row(part, "unrelated questions fired", ring.fired(loc), "≤ .001")
        others = [q.prompt for record in facts for q in record.portability]
        yield _row(part, "questions that follow from the edit fired", ring.fired(others))


def load_prompts(path: Path) -> list[str]:
    """Return the prompts of a file of questions."""
    return [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]


def _row(part: str, name: str, found: Sequence[bool], reach: str = "") -> Row:
    return Row(part, name, metrics.mean(found), len(found), reach)


def _together(one: Row, other: Row) -> Row:
    """Return the mean over what two rows averaged."""
    there = [(row.value, row.count) for row in (one, other) if row.value is not None]
    count = sum(count for _, count in there)
    value = sum(value * count for value, count in there) / count if count else None
    return replace(one, value=value, count=count)


# Metric, score, among, what the table calls it, and what was to be reached
_Wanted = tuple[str, str, str, str, str]
_END: tuple[_Wanted, ...] = (
    ("stream", "accepted", "attempted", "accepted", "≥ .97"),
    ("ES", "exact", "accepted", "ES of accepted", ""),
    ("ERR", "exact", "accepted", "ERR of accepted", "1.00"),
    ("ERR", "accuracy", "attempted", "ERR, teacher-forced", ""),
    ("generality", "exact", "attempted", "generality: the target is produced", "≥ .88"),
    ("generality", "accuracy", "attempted", "generality, teacher-forced", ""),
    ("generality", "right edit", "attempted", "rewordings that hit their own edit", ""),
    ("generality", "exact where right", "accepted", "target produced where it hits", ""),
    ("generality", "exact, right edit forced", "accepted", "target produced, hit forced", ""),
    ("neighbour", "fires", "attempted", "neighbours fired", "≤ .01"),
    ("neighbour", "unchanged", "attempted", "answers to neighbours unchanged", "≥ .98"),
    ("same_subject", "fires", "attempted", "same subject, other relation, fired", "≤ .05"),
    ("same_subject", "unchanged", "attempted", "answers to those unchanged", ""),
    ("portability", "exact", "attempted", "portability", ""),
    ("TRR", "fires", "all", "unrelated questions fired", "≤ .001"),
    ("TRR", "f1", "all", "F1 on unrelated questions", ""),
    ("stream", "keys", "accepted", "keys", ""),
    ("stream", "steps per edit", "attempted", "steps per edit", ""),
    ("stream", "seconds per edit", "attempted", "seconds per edit", ""),
)
_BESIDE = tuple(
    (metric, score, among, name, "")
    for metric, score, among, name, _ in _END
    if name not in ("keys", "ES of accepted")
)
_PASSAGES: tuple[_Wanted, ...] = (
    ("stream", "accepted", "attempted", "accepted", ""),
    ("ES", "perplexity", "attempted", "ES, perplexity", ""),
    ("ERR", "perplexity", "attempted", "ERR, perplexity", ""),
    ("TRR", "perplexity", "all", "TRR, perplexity", ""),
    ("ARR", "perplexity", "attempted", "ARR, perplexity", ""),
    ("ARR", "fires", "attempted", "sentences that no edit changes fired", ""),
    ("stream", "seconds per edit", "attempted", "seconds per edit", ""),
)


def _rows(results: dict[str, Any], part: str, method: str, wanted: Sequence[_Wanted]) -> Iterator[Row]:
    """Give the figures at the end of a run; TRR's also before it."""
    mine = [one for one in results["figures"] if one["method"] == method]
    last = max(one["edits"] for one in mine)
    for metric, score, among, name, reach in wanted:
        for edits in (0, last) if metric == "TRR" and score != "fires" else (last,):
            there = [
                one
                for one in mine
                if (one["edits"], one["metric"], one["score"], one["among"])
                == (edits, metric, score, among)
                and one["protocol"] != ("forced" if score == "unchanged" else "")
            ]
            for one in there[:1]:
                before = "" if edits else ", before any edit"
                yield Row(part, name + before, one["value"], one["count"], reach)
