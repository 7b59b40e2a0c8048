"""`grace codebook ...`: the commands and their options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Directory, Json, Where, group_with


def _names_a_directory(args: list[str]) -> bool:
    return sum(not arg.startswith("-") for arg in args) == 1


codebook = typer.Typer(
    cls=group_with("info", _names_a_directory),
    help="Look into directories of saved edits, compare, merge and convert them.",
)


class Prefer(str, Enum):
    """Choices of --prefer."""

    first = "first"
    last = "last"
    error = "error"


First = Annotated[Path, typer.Argument(metavar="A", help="Directory of saved edits.")]
Second = Annotated[Path, typer.Argument(metavar="B", help="Directory of other edits.")]


@codebook.command()
def info(directory: Directory, json: Json = False) -> None:
    """Show what a directory of edits holds. Needs no model; `grace codebook DIR` is the same."""
    from . import show

    raise typer.Exit(show.codebook(directory, as_json=json))


@codebook.command()
def verify(
    directory: Directory,
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id: ask every prompt again.", show_default="no model is asked"
        ),
    ] = None,
    device: Where = Device.cpu,
    json: Json = False,
) -> None:
    """Check files and every promise of a codebook, with --model that each prompt hits its edit."""
    from . import books

    raise typer.Exit(books.verify(directory, model=model, device=device.value, as_json=json))


@codebook.command()
def diff(first: First, second: Second, json: Json = False) -> None:
    """Say which edits are in one codebook alone, and which differ. Needs no model."""
    from . import books

    raise typer.Exit(books.diff(first, second, as_json=json))


@codebook.command()
def merge(
    first: First,
    second: Second,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the edits of both.")],
    prefer: Annotated[
        Prefer,
        typer.Option(
            help="Whose edit wins where both ask the same for another target; error: none, and "
            "nothing is merged."
        ),
    ] = Prefer.error,
    json: Json = False,
) -> None:
    """Make the edits of B in a copy of A, by A's own decisions; conflicts are listed."""
    from . import books

    raise typer.Exit(books.merge(first, second, out, prefer.value, as_json=json))


@codebook.command()
def compact(
    directory: Directory,
    keep: Annotated[
        int,
        typer.Option(min=0, help="So many of these edits stay, the latest by id."),
    ] = 0,
    json: Json = False,
) -> None:
    """Forget deleted and superseded edits for good: smaller files. Needs no model.

    Live edits answer as before. What one of them had superseded does not come back with `rm`."""
    from . import changing

    raise typer.Exit(changing.compact(directory, keep, as_json=json))


@codebook.command("export")
def export_edits(
    directory: Directory,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="New file: edits as JSON lines, as grace edit add reads them; or, where its name "
            "ends in .safetensors, keys, values, radii and labels.",
        ),
    ],
    json: Json = False,
) -> None:
    """Write the live edits to a file. Needs no model."""
    from . import books

    raise typer.Exit(books.export_to(directory, out, as_json=json))


@codebook.command("import")
def import_entries(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="keys, values, radii and labels, as safetensors."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the edits.")],
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Saved edits of the same model, layer and query, whose settings are taken.",
            show_default="what the file says",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a codebook of a file of entries. JSON lines are edits yet to be made: grace edit add."""
    from . import books

    raise typer.Exit(books.import_from(file, out, like, as_json=json))
