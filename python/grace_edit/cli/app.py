"""The commands and their options. Each loads what it needs only when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..terminal import screen
from .codebook_commands import codebook
from .edit_commands import edit
from .options import Device, Dtype, Json, Query, Where, check_start, value_of
from .output import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    CommandError,
    complain,
    describe_error,
    print_json,
    quiet,
)


class Commands(TyperGroup):
    """Ends the process with the documented exit codes and errors of one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            described = describe_error(error)
            if described is None:
                raise
            code, messages = described
            for message in messages:
                complain(message)
        if code == INTERRUPTED:
            complain("interrupted")
        sys.exit(code if isinstance(code, int) else OK)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Edit transformers models with GRACE: make edits, look them up, save and explain them.",
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict (some edits refused, or "
    "edits of another model), 5 damaged files, 130 interrupted.",
)


def _version(asked: bool) -> None:
    if asked:
        from .doctor import version_of

        typer.echo(f"grace {version_of('grace-kernels') or '(not installed, run from source)'}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Edit transformers models with GRACE: make edits, look them up, save and explain them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for what the demo writes.")] = Path(
        "grace-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer edits, for a first look.")] = False,
    json: Json = False,
) -> None:
    """Edit two real models, save, reload in a fresh process and draw a picture."""
    console = screen(stderr=json)
    try:
        from ..demo.demo import run

        with quiet():
            result = run(out, quick, console)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("grace"):
            raise
        said = str(error)
        if "pip install" not in said:
            said = f'the demo needs {error.name}: pip install "grace-kernels[demo]"'
        raise CommandError(USAGE, said) from error
    if json:
        print_json(result)
    raise typer.Exit(OK if result.get("ok", True) else FAILED)


app.add_typer(edit, name="edit")


@app.command()
def explain(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
    ],
    codebook: Annotated[Path, typer.Option(metavar="DIR", help="Directory of saved edits.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id, or smollm2.", show_default="the one the edits were made on"
        ),
    ] = None,
    device: Where = Device.cpu,
    json: Json = False,
) -> None:
    """Say which edit answers a prompt, how near it is, and what the model says without it."""
    from . import show

    raise typer.Exit(show.explain(codebook, prompt, model=model, device=device.value, as_json=json))


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id, or smollm2.", show_default="the one the edits were made on"
        ),
    ] = None,
    codebook: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory of saved edits, or a new one for /save."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer to wrap, without saved edits.", show_default="none; smollm2's"),
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="Radius of a new entry.", show_default="1.0")
    ] = None,
    query: Annotated[
        Query | None,
        typer.Option(help="What asks.", show_default="text where a map fits the model, else last"),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="With --query text: directory or hub id of a sentence encoder, or tokens.",
            show_default="tokens",
        ),
    ] = None,
    text_map: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="With --query text: directory of a map.",
            show_default="the one that comes with the package",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each message; no chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    dtype: Annotated[
        Dtype | None, typer.Option(help="To load the model in.", show_default="the checkpoint's")
    ] = None,
    device: Where = Device.cpu,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per event on stdout.")
    ] = False,
) -> None:
    """Ask an edited model, see which edit answers and why, and correct it on the spot."""
    check_start(model, layer, codebook)
    from .chat import Options, run

    settings = {
        "layer": layer,
        "radius": radius,
        "query": value_of(query),
        "encoder": encoder,
        "text_map": text_map,
    }
    options = Options(
        model, codebook, plain, max_tokens, value_of(dtype), device.value, json, settings
    )
    raise typer.Exit(run(options))


@app.command()
def serve(
    codebook: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Directory of saved edits; one that is not there yet is made."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id, or smollm2.", show_default="the one the edits were made on"
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer to wrap, without saved edits.", show_default="none; smollm2's"),
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="Radius of a new entry.", show_default="1.0")
    ] = None,
    query: Annotated[
        Query | None,
        typer.Option(help="What asks.", show_default="text where a map fits the model, else last"),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Serve edits that another process makes in DIR; none here."),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="GRACE_TOKEN",
            show_envvar=True,
            help="Who sends it may change edits; better by the environment than here, where other "
            "users of the machine read it.",
            show_default="nobody may",
        ),
    ] = None,
    continuous_batching: Annotated[
        bool,
        typer.Option("--continuous-batching", help="Generate requests in common batches."),
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="With --query text: directory or hub id of a sentence encoder, or tokens.",
            show_default="tokens",
        ),
    ] = None,
    text_map: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="With --query text: directory of a map.",
            show_default="the one that comes with the package",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model.", show_default="the model's own"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="To load the model in.", show_default="the checkpoint's")
    ] = None,
    device: Where = Device.cpu,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout once it listens.")
    ] = False,
) -> None:
    """Serve an edited model over HTTP: OpenAI's protocol, /v1/edits, /metrics and a page."""
    if not follow:
        check_start(model, layer, codebook)
    from .serve import Options, run

    settings = {"layer": layer, "radius": radius, "query": value_of(query)}
    settings |= {"encoder": encoder, "text_map": text_map}
    options = Options(
        model=model,
        codebook=codebook,
        follow=follow,
        token=token,
        batched=continuous_batching,
        host=host,
        port=port,
        name=name,
        dtype=value_of(dtype),
        device=device.value,
        as_json=json,
    )
    raise typer.Exit(run(options, settings))


app.add_typer(codebook, name="codebook")


@app.command("eval")
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
    radius: Annotated[
        float | None, typer.Option(help="Radius of a new entry.", show_default="1.0")
    ] = None,
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
    kind: Annotated[
        str,
        typer.Option(
            help="Form of DATA: counterfact, zsre, hallucination, knowedit or scotus; auto: as its "
            "fields tell."
        ),
    ] = "auto",
    split: Annotated[str, typer.Option(help="Of a named data set.")] = "test",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="To load the model in.", show_default="the checkpoint's")
    ] = None,
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
        dtype=value_of(dtype),
        device=device.value,
        as_json=json,
    )
    raise typer.Exit(done)


@app.command()
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
    dtype: Annotated[
        Dtype | None, typer.Option(help="To load the model in.", show_default="the checkpoint's")
    ] = None,
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


suggest = typer.Typer(help="Which layer to wrap and which radius to give, by measurement.")
app.add_typer(suggest, name="suggest")
Records = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="Records, in a form that grace eval reads.", show_default=False
    ),
]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw what was measured, as PNG or SVG.")
]


@suggest.command("layer")
def suggest_layer(
    data: Records,
    model: Annotated[str, typer.Option(help="Directory or hub id of the model, or smollm2.")],
    count: Annotated[int, typer.Option(help="Records to try, the first with rewordings.")] = 8,
    layers: Annotated[
        str, typer.Option(help="Comma-separated.", show_default="six, the middle to the end")
    ] = "",
    picture: Picture = None,
    json: Json = False,
) -> None:
    """Train the edits of a few records at several layers and ask their other wordings."""
    from . import suggest as suggesting

    done = suggesting.layer(
        data, model=model, count=count, layers=layers, picture=picture, as_json=json
    )
    raise typer.Exit(done)


@suggest.command("radius")
def suggest_radius(
    data: Records,
    codebook: Annotated[Path, typer.Option(metavar="DIR", help="Saved edits of these records.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id, or smollm2.", show_default="the one the edits were made on"
        ),
    ] = None,
    neighbours: Annotated[
        float, typer.Option(help="Share of prompts about other subjects that may fire.")
    ] = 0.01,
    same_subject: Annotated[
        float, typer.Option(help="Share of other questions about the subject that may fire.")
    ] = 0.05,
    picture: Picture = None,
    json: Json = False,
) -> None:
    """Ask what records ask of saved edits: the largest radius that keeps false fires rare."""
    from . import suggest as suggesting

    bounds = {"neighbours": neighbours, "same subject": same_subject}
    done = suggesting.radius(
        data, codebook, model=model, bounds=bounds, picture=picture, as_json=json
    )
    raise typer.Exit(done)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed and which operators answer, and test them."""
    from . import doctor as examination

    raise typer.Exit(examination.run(as_json=json))


def _named(argument: str) -> str:
    """Return an argument without the folders of this machine: results are shown to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument
