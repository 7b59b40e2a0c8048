"""`grace eval` and `grace tune`: the commands and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Json, LoadedAs, Query, Radius, Where, value_of


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Edits and the questions that measure them: a JSON or JSONL file in the form of "
            "CounterFact, zsRE, KnowEdit, SCOTUS or the hallucination data, or the name of one in "
            "the package datasets. A directory of such files under their published names is "
            "studied as a whole.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="For what is written; a run begun there is gone on with."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id, or smollm2.", show_default="the setting's"),
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option(
            help="Values for what is not given here: zsre, scotus, hallucination (the paper's) or "
            "smollm2-counterfact."
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer to wrap.")] = None,
    query: Annotated[Query | None, typer.Option(help="What asks.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Dense part of text queries: tokens, or a sentence encoder's directory."),
    ] = None,
    text_map: Annotated[
        Path | None,
        typer.Option("--map", "--text-map", metavar="DIR", help="Text map, from grace tune."),
    ] = None,
    radius: Radius = None,
    edits: Annotated[
        int | None, typer.Option(help="The first so many records.", show_default="all")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Measure past edits every so many.", show_default="at the end"),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Comma-separated: paper, ft, ewc, replay, defer, memory, rag.")
    ] = "",
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Questions for TRR.", show_default="unrelated ones of DATA"
        ),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="Of a study, comma-separated: edits, scope, paper, baselines, hallucination.",
            show_default="all",
        ),
    ] = "",
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Of a study: a sentence encoder whose scope is measured too."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            help="Of a study: 2 processes do different parts side by side, a model in each."
        ),
    ] = 1,
    kind: Annotated[
        str,
        typer.Option(
            help="Form of DATA: counterfact, zsre, hallucination, knowedit or scotus; auto: as its "
            "fields tell."
        ),
    ] = "auto",
    split: Annotated[str, typer.Option(help="Of a named data set.")] = "test",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: LoadedAs = None,
    device: Where = Device.cpu,
    json: Json = False,
) -> None:
    """Make a stream of edits and measure it as the field does. Killed, it goes on when called
    again."""
    from . import evaluate as evaluation

    given = {"encoder": encoder, "text_map": None if text_map is None else str(text_map)}
    options = evaluation.Options(
        data=data,
        out=out,
        model=model,
        setting=setting,
        kind=kind,
        split=split,
        edits=edits,
        every=every,
        layer=layer,
        radius=radius,
        query=value_of(query),
        config={name: value for name, value in given.items() if value is not None},
        baselines=tuple(name.strip() for name in baselines.split(",") if name.strip()),
        upstream=upstream,
        seed=seed,
        progress=evaluation.progress_wanted(),
        command=" ".join(["grace", *map(_named, sys.argv[1:])]),
    )
    done = evaluation.evaluate(
        options,
        parts=parts,
        beside=beside or [],
        jobs=jobs,
        dtype=value_of(dtype),
        device=device.value,
        as_json=json,
    )
    raise typer.Exit(done)


def tune(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Records with rewordings and neighbours, in a form that grace eval reads: a file, "
            "or a directory of files.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the map.")],
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of the model, or smollm2, for its own tokens."),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Dense part: tokens, or a sentence encoder's directory or id.")
    ] = "tokens",
    dtype: LoadedAs = None,
    device: Where = Device.cpu,
    json: Json = False,
) -> None:
    """Learn from records which prompts ask the same: a text map, for query="text"."""
    from . import evaluate as evaluation

    done = evaluation.tune(
        data,
        out,
        model=model,
        encoder=encoder,
        dtype=value_of(dtype),
        device=device.value,
        as_json=json,
    )
    raise typer.Exit(done)


def _named(argument: str) -> str:
    """Return an argument without the folders of this machine: results are shown to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument
