"""`grace eval` as a function: options in, results out, files on the way.

out/results.json              every figure, with command, environment, data and protocol
out/figures.csv               the same figures, a row each
out/easyedit-<method>.json    EasyEdit's result keys; holds the records' texts
out/pictures/                 PNG, SVG and CSV
out/<method>/                 log and state, from which a killed run goes on
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..codebook.locking import take
from ..config import GraceConfig
from . import metrics, pictures
from .baselines import Defer, Memory, Retrieval
from .finetuning import ElasticFineTuning, FineTuning, ReplayFineTuning
from .identity import EvaluationError, digest, digest_of, environments, same_run
from .journal import write_whole
from .loading import Loaded, load, load_questions
from .methods import Grace, KeyMap, Method, read_map
from .model import AskedModel, load_model
from .records import EditRecord, Question, one_per_prompt
from .results import (
    PROTOCOLS,
    Figure,
    Growth,
    easyedit,
    figures_of,
    growth_of,
    headline,
    misses_of,
    ratios_of,
    to_csv,
)
from .run import Protocol, Said, Units, run_stream
from .settings import SETTINGS, Setting

GRACE = "grace"
BASELINES = ("paper", "ft", "ewc", "replay", "defer", "memory", "rag")
_SHORT = 2.0  # seconds: another run takes far longer


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        data: path or name of the edits.
        out: directory of everything that is written; an earlier run there is gone on with.
        model: path or hub id; None: that of the setting.
        setting: name of one of the paper's settings, whose values hold where no other is given.
        kind, split: as in `loading.load`.
        edits: how many of the records, from the first; None: all.
        every: measure past edits every so many.
        layer, radius, query: of the editor.
        config: further fields of `GraceConfig` (`encoder` and `text_map` of text queries).
        baselines: of `BASELINES`, run on the same stream.
        baseline_settings: arguments of a baseline by its name (`{"ft": {"lr": 1e-3}}`); of "paper"
            fields of `GraceConfig`.
        layers: of a sweep: `grace` once more for each, on the first `sweep_edits` records.
        upstream: path of questions for TRR, as in `loading.load_questions`; None: the unrelated
            questions of all records of the data.
        upstream_questions: how many of them, chosen by `seed`.
        only_errors, most_past: as in `Protocol`.
        shuffle: run the records in an order drawn from `seed`, not in that of the file.
        seed: of the order, of the upstream questions and of the methods.
        draw: draw the pictures.
        progress: show progress bars on stderr.
        command: how this was called, for the results.
    """

    data: str
    out: Path
    model: str | None = None
    setting: str | None = None
    kind: str = "auto"
    split: str = "test"
    edits: int | None = None
    every: int | None = None
    layer: str | None = None
    radius: float | None = None
    query: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    baseline_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    sweep_edits: int = 20
    upstream: str | None = None
    upstream_questions: int = 100
    only_errors: bool | None = None
    most_past: int | None = None
    shuffle: bool = False
    seed: int = 0
    draw: bool = True
    progress: bool = False
    command: str = ""


def run(options: Options, loaded: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Run a stream with GRACE and the baselines, write the results and return them.

    Args:
        options: what to run.
        loaded: model and tokenizer, if somebody has loaded them; `options.model` then names them.

    Raises:
        EvaluationError: options that do not fit together, or a directory of another run.
        DataError: the data cannot be read.
        TimeoutError: another process is running in the directory.
        ValueError: a layer or setting that the model or the editor refuses.
    """
    evaluation = _Evaluation(options, loaded)
    let_go = take(options.out, timeout=_SHORT)
    try:
        return evaluation.run()
    finally:
        let_go()


class _Evaluation:
    def __init__(self, options: Options, loaded: tuple[Any, Any] | None) -> None:
        self.options = options
        self.setting = _setting(options)
        self.config = _config(options, self.setting)
        self.name = options.model or (self.setting.model if self.setting else None)
        if self.name is None:
            raise EvaluationError("model must be given, or a setting that names one")
        for name in options.baselines:
            if name not in BASELINES:
                raise EvaluationError(f"baselines must be of {', '.join(BASELINES)}, got {name!r}")
        self.data = load(
            options.data,
            options.kind if options.kind != "auto" or not self.setting else self.setting.kind,
            split=options.split,
            zsre_target=self.setting.zsre_target if self.setting else "alt",
        )
        model, tokenizer = loaded or load_model(self.name)
        self.asked = AskedModel(model, tokenizer)
        self.unedited: Said = {}  # the same model, whatever the method
        self.records, self.left_out = _records(self.data, self.asked, options)
        self.upstream = _upstream(self.data, options)
        self.protocol = Protocol(
            every=options.every or (self.setting.every if self.setting else None),
            only_errors=_first(options.only_errors, self.setting and self.setting.only_errors),
            most_past=options.most_past,
        )

    def run(self) -> dict[str, Any]:
        options = self.options
        environments(options.out)  # noted before anything is done in it
        figures: list[Figure] = []
        lines: dict[str, list[Growth]] = {}
        ratios: dict[str, dict[str, list[float]]] = {}
        maps: dict[str, KeyMap] = {}
        misses: dict[str, dict[str, int]] = {}
        for name in (GRACE, *options.baselines):
            directory = options.out / name
            units = self._stream(name, self.config, self.records, directory)
            figures += figures_of(name, units, len(self.records))
            lines[name] = growth_of(units, len(self.records))
            ratios[name] = ratios_of(units, len(self.records))
            misses[name] = misses_of(units, len(self.records))
            if (found := read_map(directory)) is not None:
                maps[name] = found
            text = json.dumps(easyedit(units, self.records), indent=1, ensure_ascii=False)
            write_whole(options.out / f"easyedit-{name}.json", text + "\n")
        swept, rows = self._sweep()
        results = self._results([*figures, *swept], misses)
        write_whole(options.out / "figures.csv", to_csv([*figures, *swept]))
        write_whole(options.out / "results.json", json.dumps(results, indent=1) + "\n")
        if options.draw:
            scores = dict.fromkeys(("exact", "accuracy", *self._scores()))
            pictures.draw_all(
                options.out / "pictures", figures, lines, ratios, maps, rows, list(scores)
            )
        return results

    def _scores(self) -> tuple[str, ...]:
        return (self.setting.score,) if self.setting else ()

    def _stream(
        self, name: str, config: GraceConfig, records: Sequence[EditRecord], directory: Path
    ) -> Units:
        settings = self.options.baseline_settings.get(name, {})
        identity = {
            "model": self.name,
            "config": _told(config),
            "settings": settings,
            "text map": digest_of(config.text_map),
            "seed": self.options.seed,
            "protocol": self.protocol.to_dict(),
            "records": digest([asdict(replace(record, source="")) for record in records]),
            "upstream": digest([asdict(question) for question in self.upstream]),
        }
        same_run(directory, identity)
        make: Callable[[], Method] = lambda: self._method(name, config, settings)  # noqa: E731
        return run_stream(
            make,
            records,
            directory,
            self.protocol,
            upstream=self.upstream,
            unedited=self.unedited,
            progress=self.options.progress,
        )

    def _method(self, name: str, config: GraceConfig, settings: dict[str, Any]) -> Method:
        asked, layer, seed = self.asked, config.layer, self.options.seed
        if name == "paper":
            paper = {"policy": "paper", "recipe": "paper", "query": "last", "radius": 1.0}
            own = {"layer": layer, "seed": seed, **paper, **settings}
            return Grace(asked, GraceConfig(**own), name="paper")
        if name == "ft":
            return FineTuning(asked, layer, **settings)
        if name == "ewc":
            return ElasticFineTuning(asked, layer, **settings)
        if name == "replay":
            return ReplayFineTuning(asked, layer, **settings)
        if name == "defer":
            return Defer(asked, layer, seed=seed, **settings)
        if name == "memory":
            return Memory(asked, config)
        if name == "rag":
            by_text = Memory(asked, config) if config.query == "text" else None
            return Retrieval(asked, memory=by_text, **settings)
        return Grace(asked, config, name=name)

    def _sweep(self) -> tuple[list[Figure], list[dict[str, Any]]]:
        figures: list[Figure] = []
        rows: list[dict[str, Any]] = []
        records = self.records[: self.options.sweep_edits]
        for layer in self.options.layers:
            name = f"grace at {layer}"
            config = replace(self.config, layer=layer)
            units = self._stream(name, config, records, self.options.out / "layers" / layer)
            found = figures_of(name, units, len(records))
            rows.append({"layer": layer, **headline(found, name)})
            figures += found
        return figures, rows

    def _results(
        self, figures: Sequence[Figure], misses: dict[str, dict[str, int]]
    ) -> dict[str, Any]:
        names = dict.fromkeys(figure.method for figure in figures)
        return {
            "format": 1,
            "command": self.options.command,
            "environments": environments(self.options.out),
            "model": Path(self.name or "").name if os.path.isdir(self.name or "") else self.name,
            "setting": asdict(self.setting) if self.setting else None,
            "config": _told(self.config),
            "baseline_settings": self.options.baseline_settings,
            "seed": self.options.seed,
            "data": {
                "source": Path(self.data.source).name if self.data.sha256 else self.data.source,
                "sha256": self.data.sha256,
                "kind": self.data.kind,
                "records": len(self.records),
                "left_out": self.left_out,
                "upstream": len(self.upstream),
            },
            "protocol": {
                **self.protocol.to_dict(),
                "how": PROTOCOLS,
                "definitions": metrics.DEFINITIONS,
            },
            "headline": {name: headline(figures, name) for name in names},
            "rewordings": {name: found for name, found in misses.items() if found},
            "figures": [asdict(figure) for figure in figures],
        }


def _first(*options: Any) -> bool:
    return bool(next((one for one in options if one is not None), False))


def _setting(options: Options) -> Setting | None:
    if options.setting is None:
        return None
    if options.setting not in SETTINGS:
        raise EvaluationError(
            f"setting must be one of {', '.join(SETTINGS)}, got {options.setting!r}"
        )
    return SETTINGS[options.setting]


def _config(options: Options, setting: Setting | None) -> GraceConfig:
    named = {"layer": options.layer, "radius": options.radius, "query": options.query}
    given = {name: value for name, value in named.items() if value is not None}
    fields = {**(setting.config if setting else {}), **options.config, **given}
    fields.setdefault("seed", options.seed)
    if "layer" not in fields:
        raise EvaluationError("layer must be given, or a setting that names one")
    return GraceConfig(**fields)


def _records(
    data: Loaded, asked: AskedModel, options: Options
) -> tuple[list[EditRecord], dict[str, int]]:
    records, twice = one_per_prompt(data.records)
    if options.shuffle:
        random.Random(options.seed).shuffle(records)
    fitting = [record for record in records if asked.fits(record.prompt, record.target)]
    if options.edits is not None and options.edits < 1:
        raise EvaluationError(f"edits must be at least 1, got {options.edits}")
    chosen = fitting[: options.edits]
    if not chosen:
        raise EvaluationError(f"{data.source}: no record fits into the model's positions")
    return chosen, {
        "without an edit": len(data.skipped),
        "of a prompt edited before": twice,
        "too long for the model": len(records) - len(fitting),
    }


def _upstream(data: Loaded, options: Options) -> list[Question]:
    if options.upstream is not None:
        found = load_questions(options.upstream)
    else:
        asked = (q for record in data.records for q in record.unrelated if q.answers)
        found = list(dict.fromkeys(asked))
    random.Random(options.seed).shuffle(found)
    return found[: options.upstream_questions]


def _told(config: GraceConfig) -> dict[str, Any]:
    """Return the configuration as results hold it: without paths of this machine."""
    fields = config.to_dict()
    for name in ("encoder", "text_map"):
        if fields[name] is not None and os.path.isdir(fields[name]):
            fields[name] = Path(fields[name]).name
    return fields
