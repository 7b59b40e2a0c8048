"""`grace eval` and `grace tune`: measure edits on a data set, learn a text map from one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation import (
    SETTINGS,
    DataError,
    EvaluationError,
    NoDataError,
    Options,
    OtherRunError,
)
from ..evaluation import run as run_evaluation
from ..terminal import facts, number, plain, screen, table
from .models import Loaded, load_model
from .output import CONFLICT, NOT_FOUND, OK, USAGE, CommandError, print_json, quiet
from .studying import Work, study_folder


def evaluate(
    options: Options,
    *,
    parts: str,
    beside: Sequence[str],
    jobs: int,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> int:
    """Run an evaluation, from wherever an earlier one in the same directory was stopped.

    Args:
        options: `data` may be a folder, which is then studied.
        parts: of a study, separated by commas; empty: all.
        beside: encoders whose scope a study measures too.
        jobs: processes of a study.
    """
    options = replace(options, model=options.model or _model_of(options.setting))
    folder = Path(options.data).expanduser()
    if not folder.is_dir() and (parts or beside or jobs != 1):
        raise CommandError(
            USAGE, "--parts, --beside and --jobs must be left out: DATA is not a directory"
        )
    if folder.is_dir():
        work = Work(folder, options, tuple(beside), dtype, device)
        results = expected(lambda: study_folder(work, parts, jobs))
    else:
        assert options.model is not None
        loaded = load_model(options.model, task="auto", dtype=dtype, device=device)
        results = expected(lambda: run_evaluation(options, (loaded.model, loaded.tokenizer)))
    if as_json:
        print_json(results)
    elif folder.is_dir():
        cells = ("part", "name", "value", "count", "reach")
        rows = [[row[cell] for cell in cells] for row in results["rows"]]
        screen().print(table(cells, [[*r[:2], number(r[2]), *r[3:]] for r in rows]))
        screen().print(f"{plain(options.out)}: study.json, study.csv, study.png")
    else:
        _show(results, loaded, options.out)
    return OK


def _model_of(setting: str | None) -> str:
    if setting is None:
        raise CommandError(USAGE, "--model must be given, or a --setting that names one, got none")
    if setting not in SETTINGS:
        raise CommandError(
            USAGE, f"--setting must be one of {', '.join(SETTINGS)}, got {setting!r}"
        )
    return SETTINGS[setting].model


def expected(work: Any) -> Any:
    """Return what `work` gives, its errors as those of a command."""
    try:
        with quiet():
            return work()
    except NoDataError as error:
        raise CommandError(NOT_FOUND, str(error)) from error
    except (OtherRunError, TimeoutError) as error:
        raise CommandError(CONFLICT, str(error)) from error
    except (DataError, EvaluationError) as error:
        raise CommandError(USAGE, *str(error).splitlines()) from error
    except ImportError as error:
        raise CommandError(USAGE, str(error)) from error


def _show(results: dict[str, Any], loaded: Loaded, out: Path) -> None:
    console, about, data = screen(), loaded.facts(), results["data"]
    left = [f"{count} {why}" for why, count in data["left_out"].items() if count]
    console.print(
        facts(
            {
                "model": f"{about['source']} ({about['dtype']} on {about['device']})",
                "data": f"{data['source']}: {data['records']} edits of kind {data['kind']}"
                + (f"; left out: {', '.join(left)}" if left else ""),
                "layer": results["config"]["layer"],
                "upstream": f"{data['upstream']} questions",
            }
        )
    )
    found = results["headline"]
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    rows = [[name, *(number(figures.get(name)) for figures in found.values())] for name in names]
    console.print(table(("", *found), rows))
    console.print(f"{plain(out)}: results.json, figures.csv, EasyEdit's keys, pictures")


def tune(
    data: Path,
    out: Path,
    *,
    model: str | None,
    encoder: str,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> int:
    """Learn a text map from records and save it."""
    from ..evaluation.mapping import learn_map

    if encoder == "tokens" and model is None:
        raise CommandError(
            USAGE, "--model must be given where --encoder is tokens, a model's own, got none"
        )
    if not data.exists():
        raise CommandError(NOT_FOUND, f"{data}: no such file or directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(CONFLICT, f"--out {out}: must be a new or empty directory")
    loaded = None
    if model is not None:
        loaded = load_model(model, task="auto", dtype=dtype, device=device)
    found = expected(
        lambda: learn_map(
            data,
            out,
            model=loaded and loaded.model,
            tokenizer=loaded and loaded.tokenizer,
            encoder=encoder,
        )
    )
    if as_json:
        print_json({"out": str(out), **found})
        return OK
    console = screen()
    console.print(facts(dict(_flat(found))))
    console.print(f"{plain(out)}: for --map, or GraceConfig(query='text', text_map=...)")
    return OK


def _flat(found: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Give the figures of nested dicts, each by its whole name."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield before + str(name), number(value) if isinstance(value, float) else value


def progress_wanted() -> bool:
    """Say whether somebody watches stderr."""
    return sys.stderr.isatty()
