"""The study of a model on a folder of published records: lifelong edits, scope, what to blame.

out/study.{json,csv,png}    every row of the tables, and distances; figures alone, no record
out/data/                   the records, split by subject
out/map/, unseen-1/, ...    text maps, learned from the subjects that are not edited
out/edits/, paper/, ...     the runs, each as `command.run` leaves it

A part that is finished is not done again, so a study that was killed goes on. Several processes may
do different parts in one directory at once; what they share is made by the first that needs it.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..codebook.locking import writing
from ..keys.choice import text_keys
from ..keys.text_map import SETTINGS as MAP_FILE
from ..keys.text_map import TextMap
from .command import Options, run
from .identity import EvaluationError, digest_of, environments, same_run
from .journal import read_units, write_whole
from .loading import load, load_questions
from .mapping import learn_map
from .model import AskedModel
from .probes import another_data_set, harder_prompts, own_prompts
from .records import EditRecord, one_per_prompt
from .rows import BESIDE, END, PASSAGES_WANTED, Row, row_of, rows_of, together
from .run import Units
from .scope import Keyring
from .splitting import NESTED, PASSAGES, ZSRE, Split, split

PARTS = ("edits", "scope", "paper", "baselines", "hallucination")
BASELINES = ("ft", "defer", "memory", "rag")
_LONG = 3600.0  # seconds that another process may take to learn a map


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
        DataError, EvaluationError: as `command.run`; the directory holds a study of something else.
        TimeoutError: another process is doing one of these parts.
    """
    if options.query not in (None, "text"):
        raise EvaluationError(f"query must be text for a study, got {options.query}")
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
        self.encoders = tuple(one for one in encoders if one != self.encoder)
        identity = {
            "model": options.model,
            "layer": options.layer,
            "config": {**options.config, "encoder": _short(self.encoder)},
            "setting": options.setting,
            "sizes": asdict(sizes),
            "seed": options.seed,
            "data": digest_of(data),
        }
        with writing(out, _LONG):
            same_run(out, identity)
            self.parts: Split = split(data, out / "data", edits=sizes.edits, seed=options.seed)
        self.asked = AskedModel(*loaded)
        self.records = self._records()
        self.options = replace(options, out=out, baselines=())

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
                self._results()
        return self._results()

    def _results(self) -> dict[str, Any]:
        with writing(self.out, _LONG):
            return self._write_results()

    def _write_results(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for part in PARTS:
            path = self.out / f"rows-{part}.json"
            if path.exists():
                rows += json.loads(path.read_text(encoding="utf-8"))
        results = {
            "command": self.options.command,
            "model": Path(str(self.options.model)).name,
            "encoder": _short(self.encoder),
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
        picture = self.out / "edits" / "pictures" / "scope-grace.png"
        if picture.exists():
            shutil.copyfile(picture, self.out / "study.png")
        return results

    # Parts

    def _edits(self) -> Iterator[Row]:
        found = self._run(
            "edits",
            self.parts.edits,
            config=self._text_config(),
            upstream=None if self.parts.unrelated is None else str(self.parts.unrelated),
            upstream_questions=self.sizes.unrelated,
        )
        yield from rows_of(found, "edits", "grace", END)
        for name, count in found["rewordings"].get("grace", {}).items():
            asked = sum(len(record.paraphrases) for record in self.records)
            yield Row("rewordings", name, float(count), asked)

    def _scope(self) -> Iterator[Row]:
        """Ask keys alone; what an answer would be is known from the edits' part."""
        units = read_units(self.out / "edits" / "grace")
        taken = {i: r for i, r in enumerate(self.records) if units[f"edit/{i}"]["accepted"]}
        others = load(self.parts.train / NESTED).records
        for encoder in (self.encoder, *self.encoders):
            name = _short(encoder)
            ring = self._ring("map", self.parts.train, encoder, taken)
            yield from own_prompts(f"scope, {name}", ring, taken, units)
            if self.parts.unrelated is not None:
                fired = ring.fired(q.prompt for q in load_questions(self.parts.unrelated))
                yield row_of(f"scope, {name}", "unrelated questions fired", fired, "≤ .001")
            cost = 1000 * ring.seconds / ring.asked
            yield Row(f"scope, {name}", "milliseconds a prompt, key and lookup", cost, ring.asked)
            yield from self._unseen(name, encoder, taken, units)
            path = self.data / ZSRE
            if path.is_file():
                sizes = (self.sizes.zsre, self.options.seed)
                yield from another_data_set(f"zsRE, {name}", ring, path, *sizes)
            yield from harder_prompts(f"harder prompts, {name}", ring, [*taken.values()], others)

    def _unseen(
        self, name: str, encoder: str, taken: dict[int, EditRecord], units: Units
    ) -> Iterator[Row]:
        part, halves = f"relations never seen, {name}", []
        for number, (relations, folder) in enumerate(self.parts.unseen):
            ring = self._ring(f"unseen-{number + 1}", folder, encoder, taken)
            own = [i for i, record in taken.items() if record.relation in relations]
            halves.append(list(own_prompts(part, ring, taken, units, own, "≥ .80")))
        for one, other in zip(*halves, strict=True):
            yield together(one, other)

    def _paper(self) -> Iterator[Row]:
        config = {"policy": "paper", "recipe": "paper"}
        path = self._few("paper", self.sizes.paper)
        found = self._run("paper", path, config=config, query="last", upstream=None)
        yield from rows_of(found, "the paper's settings", "grace", BESIDE)

    def _baselines(self) -> Iterator[Row]:
        path = self._few("baselines", self.sizes.baselines)
        config = self._text_config()
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
            yield from rows_of(found, f"beside it: {method}", method, BESIDE)

    def _hallucination(self) -> Iterator[Row]:
        path = self.data / PASSAGES
        if not path.is_file():
            return
        found = self._run(
            "hallucination",
            path,
            kind="hallucination",
            # Whole sentences: one vector seldom says one to its last word, so edits that have to be
            # proven are refused. The paper's policy takes each as it is, and perplexity tells.
            config={"policy": "paper", "recipe": "paper"},
            query="last",
            edits=self.sizes.hallucination,
            upstream_questions=50,
        )
        yield from rows_of(found, "hallucination", "grace", PASSAGES_WANTED)

    # What they need

    def _run(self, where: str, data: Path, *, config: dict[str, Any], **changes: Any) -> Any:
        changes.setdefault("every", None if where != "edits" else 100)
        config = {**self.options.config, **config}
        options = replace(
            self.options, data=str(data), out=self.out / where, config=config, **changes
        )
        return run(options, self.loaded)

    def _map(self, where: str, train: Path, encoder: str) -> Path:
        """Return the directory of a map, learned if it is not there and nobody else is at it."""
        if encoder != self.encoder:
            where += "-" + _short(encoder).replace("/", "-")
        done = self.out / where
        with writing(self.out / (where + ".learning"), _LONG):
            if not (done / MAP_FILE).exists():
                fresh = self.out / (where + ".new")
                shutil.rmtree(fresh, ignore_errors=True)
                model, tokenizer = self.loaded
                learn_map(train, fresh, model=model, tokenizer=tokenizer, encoder=encoder)
                fresh.rename(done)
        return done

    def _text_config(self) -> dict[str, str]:
        where = self._map("map", self.parts.train, self.encoder)
        return {"query": "text", "encoder": self.encoder, "text_map": str(where)}

    def _ring(
        self, where: str, train: Path, encoder: str, records: dict[int, EditRecord]
    ) -> Keyring:
        text_map = TextMap.load(self._map(where, train, encoder))
        keys = text_keys(*self.loaded, encoder, text_map)
        return Keyring(keys, [record.prompt for record in records.values()])

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


def _short(encoder: str) -> str:
    """Return the last names of a path: without those of this machine."""
    return "/".join(Path(encoder).parts[-2:])
