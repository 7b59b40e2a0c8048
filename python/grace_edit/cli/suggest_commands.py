"""`grace suggest ...`: the commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, ModelOfEdits

suggest = typer.Typer(help="Which layer to wrap and which radius to give, by measurement.")
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
    model: ModelOfEdits = None,
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
