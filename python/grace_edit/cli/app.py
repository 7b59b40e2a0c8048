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
from .evaluate_commands import evaluate, tune
from .options import (
    Asked,
    Device,
    Encoder,
    Json,
    Layer,
    LoadedAs,
    Map,
    ModelOfEdits,
    Radius,
    Where,
    check_start,
    value_of,
)
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
from .suggest_commands import suggest


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
    model: ModelOfEdits = None,
    device: Where = Device.cpu,
    json: Json = False,
) -> None:
    """Say which edit answers a prompt, how near it is, and what the model says without it."""
    from . import show

    raise typer.Exit(show.explain(codebook, prompt, model=model, device=device.value, as_json=json))


@app.command()
def chat(
    model: ModelOfEdits = None,
    codebook: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory of saved edits, or a new one for /save."),
    ] = None,
    layer: Layer = None,
    radius: Radius = None,
    query: Asked = None,
    encoder: Encoder = None,
    text_map: Map = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each message; no chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    dtype: LoadedAs = None,
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
    model: ModelOfEdits = None,
    layer: Layer = None,
    radius: Radius = None,
    query: Asked = None,
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
    dtype: LoadedAs = None,
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


app.command("eval")(evaluate)
app.command()(tune)
app.add_typer(suggest, name="suggest")


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed and which operators answer, and test them."""
    from . import doctor as examination

    raise typer.Exit(examination.run(as_json=json))
