"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..demo import smollm2
from ..families import FAMILIES
from .output import USAGE, CommandError


class Query(str, Enum):
    """Choices of --query."""

    last = "last"
    mean = "mean"
    text = "text"


class Replace(str, Enum):
    """Choices of --replace."""

    last = "last"
    prompt = "prompt"
    all = "all"


class Rules(str, Enum):
    """Choices of --policy and --recipe."""

    default = "default"
    paper = "paper"


class Dtype(str, Enum):
    """Choices of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, Enum):
    """Choices of --device."""

    cpu = "cpu"
    cuda = "cuda"


TASKS = ("auto", *FAMILIES)
"""Choices of --task."""

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def check_task(value: str) -> str:
    """Return a choice of --task, or raise as typer's own choices do."""
    if value not in TASKS:
        known = ", ".join(map(repr, TASKS))
        raise typer.BadParameter(f"{value!r} is not one of {known}.")
    return value


def seconds_of(time: str) -> float:
    """Return the seconds of a time such as `30d`, or raise as typer's own options do."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([dhms])", time)
    if found is None:
        raise typer.BadParameter(f"{time!r} is not a time such as 30d, 12h, 45m or 90s.")
    return float(found[1]) * _SECONDS[found[2]]


def check_start(model: str | None, layer: str | None, codebook: Path | None) -> None:
    """Refuse to begin without saved edits, a model and a layer, before much is imported or loaded.

    Args:
        model, layer: as given; None: they were not.
        codebook: directory of saved edits; one that is not there yet holds none.
    """
    if codebook is not None and codebook.exists():
        return
    if model is None:
        raise CommandError(USAGE, "--model must be given without saved edits, got none")
    if layer is None and model != smollm2.NAME:
        raise CommandError(USAGE, "--layer must be given without saved edits, got none")


def value_of(choice: Enum | None) -> str | None:
    """Return what a choice says; None where none was made."""
    return None if choice is None else str(choice.value)


ModelOfEdits = Annotated[
    str | None,
    typer.Option(
        help="Directory or hub id, or smollm2.", show_default="the one the edits were made on"
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Layer to wrap, without saved edits.", show_default="none; smollm2's"),
]
Radius = Annotated[float | None, typer.Option(help="Radius of a new entry.", show_default="1.0")]
Asked = Annotated[
    Query | None,
    typer.Option(help="What asks.", show_default="text where a map fits the model, else last"),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        help="With --query text: directory or hub id of a sentence encoder, or tokens.",
        show_default="tokens",
    ),
]
Map = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="With --query text: directory of a map.",
        show_default="the one that comes with the package",
    ),
]
LoadedAs = Annotated[
    Dtype | None, typer.Option(help="To load the model in.", show_default="the checkpoint's")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Where = Annotated[Device, typer.Option(help="Where the model runs.")]
Saved = Annotated[Path, typer.Option("--codebook", metavar="DIR", help="Directory of saved edits.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of saved edits.")]


def group_with(default: str, fits: Callable[[list[str]], bool]) -> type[TyperGroup]:
    """Return a group of commands of which one may be left out.

    Args:
        default: its name.
        fits: says of arguments that begin with no command's name whether they are meant for it.
    """

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if args and args[0] not in self.commands and "--help" not in args[:1] and fits(args):
                args = [default, *args]
            return super().parse_args(ctx, args)

    return Group
