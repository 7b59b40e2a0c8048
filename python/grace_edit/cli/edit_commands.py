"""`grace edit ...`: the commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    TASKS,
    Device,
    Json,
    LoadedAs,
    Map,
    Query,
    Radius,
    Replace,
    Rules,
    Saved,
    Where,
    check_task,
    group_with,
    seconds_of,
    value_of,
)


def _are_options(args: list[str]) -> bool:
    return args[0].startswith("-")


edit = typer.Typer(
    cls=group_with("add", _are_options), help="Make edits, list them and take them back."
)


@edit.command()
def add(
    edits: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='Edits, one JSON object per line: {"prompt": "...", "target": "..."}. The target '
            "of a causal model usually begins with a space, but not after chat messages "
            '([{"role": "user", "content": "..."}]); a classifier\'s is a label or class id.',
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="New directory for the edits, or one where this file was begun."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of the model, or smollm2. May be left out with --resume."
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer to wrap, as in model.named_modules(); a unique suffix will do."),
    ] = None,
    radius: Radius = None,
    query: Annotated[
        Query | None,
        typer.Option(
            help="What asks.",
            show_default="text where a map fits the model, else last (decoders) or mean (encoders)",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="With --query text: directory or hub id of a sentence encoder, or tokens for the "
            "model's own embeddings.",
            show_default="tokens",
        ),
    ] = None,
    text_map: Map = None,
    replace: Annotated[
        Replace | None,
        typer.Option(help="What is replaced.", show_default="last for causal, all for encoders"),
    ] = None,
    policy: Annotated[
        Rules | None, typer.Option(help="How edits share entries.", show_default="default")
    ] = None,
    recipe: Annotated[
        Rules | None, typer.Option(help="How values are trained.", show_default="default")
    ] = None,
    dtype: LoadedAs = None,
    device: Where = Device.cpu,
    task: Annotated[
        str,
        typer.Option(help="Kind of model.", metavar=f"<{'|'.join(TASKS)}>", callback=check_task),
    ] = "auto",
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Add to the edits saved here.")
    ] = None,
    json: Json = False,
) -> None:
    """Make the edits of a file and save those that the model was proved to answer. Interrupted or
    killed, it goes on when called again; `grace edit --edits ...` is the same."""
    from .edit import Options, run

    settings = {
        "layer": layer,
        "radius": radius,
        "query": value_of(query),
        "encoder": encoder,
        "text_map": text_map,
        "replace": value_of(replace),
        "policy": value_of(policy),
        "recipe": value_of(recipe),
    }
    options = Options(
        model, edits, out, resume, task, value_of(dtype), device.value, json, settings
    )
    raise typer.Exit(run(options))


@edit.command("ls")
def list_edits(
    codebook: Saved,
    everything: Annotated[
        bool, typer.Option("--all", help="Superseded and deleted edits too.")
    ] = False,
    json: Json = False,
) -> None:
    """List saved edits. Needs no model."""
    from . import changing

    raise typer.Exit(changing.list_edits(codebook, everything=everything, as_json=json))


@edit.command("rm")
def remove(
    ids: Annotated[list[int], typer.Argument(metavar="ID...", help="As grace edit ls shows them.")],
    codebook: Saved,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge", help="Erase prompts, targets and keys too; also of edits deleted before."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Take saved edits back, as if they had never been made; those they superseded come back."""
    from . import changing

    raise typer.Exit(changing.remove(codebook, ids, purge=purge, as_json=json))


@edit.command()
def expire(
    codebook: Saved,
    unused_for: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Such as 30d, 12h, 45m or 90s: that an edit answered nobody."
        ),
    ],
    keep: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="An edit that stays; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which edits would go, and change nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Take back edits that answered nobody for long, and those they superseded. Hits must have been
    counted (count_hits) where they were served and saved."""
    from . import changing

    seconds = seconds_of(unused_for)
    raise typer.Exit(changing.expire(codebook, seconds, keep or [], dry_run=dry_run, as_json=json))


@edit.command()
def undo(codebook: Saved, json: Json = False) -> None:
    """Take the newest saved edit back, as `grace edit rm` of it would. Deletions stay."""
    from . import changing

    raise typer.Exit(changing.undo(codebook, as_json=json))
