"""Which layer to wrap and which radius to give entries, by measurement.

Both return a recommendation with its reason and table; a picture is drawn where a path is given,
and needs matplotlib.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from .adaptor.adaptor import GraceAdaptor
from .adaptor.attach import find_layer
from .codebook.codebook import Codebook
from .config import GraceConfig
from .editing.making import EditMaker
from .families import Family, bare, family_of
from .keys import radii
from .progress import bar

_LAYERS = 6
"""Layers that are tried where none are named."""


@dataclass(frozen=True)
class LayerRate:
    """What was measured of one layer, its answers forced.

    Args:
        layer: its full name.
        accepted: share of the edits whose target was reached.
        generality: share of the other wordings that the value of an accepted edit makes produce the
            target; those of refused edits count as failed.
        probability: mean over the edits of the whole target's, behind the prompt.
        steps: mean Adam steps.
        seconds: mean time of training one value.
    """

    layer: str
    accepted: float
    generality: float
    probability: float
    steps: float
    seconds: float


@dataclass(frozen=True)
class LayerSuggestion:
    """A layer with its reason.

    Args:
        layer: its full name, for `GraceConfig.layer`.
        reason: why, in a sentence.
        table: all that was measured, from the first layer to the last.
    """

    layer: str
    reason: str
    table: list[LayerRate]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


def suggest_layer(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[tuple[Any, Any, Sequence[Any]]],
    *,
    layers: Sequence[str] | None = None,
    config: GraceConfig | None = None,
    picture: str | Path | None = None,
    progress: bool = False,
) -> LayerSuggestion:
    """Suggest the layer whose values produce the target in the most other wordings.

    Every edit is trained at every layer, and its other wordings are asked with the trained value as
    the answer: the key decides whether an edit is found, the layer whether what is found decodes.
    The model is left as it was.

    Args:
        model, tokenizer: as a `GraceEditor` takes them; no editor may be attached.
        edits: `(prompt, target, paraphrases)`, a handful; texts or token ids.
        layers: names of the layers to try. None: six from the middle of the model to its end, of
            every block the `mlp` where there is one, else the block.
        config: how values are trained; its layer and its query do not matter. None: as
            `query="text"` trains them.
        picture: where to draw the table (PNG or SVG by its ending).
        progress: show a progress bar on stderr.

    Raises:
        ValueError: no edits, an edit without paraphrases, unknown layers, a picture that cannot be
            written, or a model of no supported kind or with an editor attached.
    """
    _check_picture(picture)
    family = family_of(bare(model), tokenizer)
    encoded = [
        (*family.encode_edit(prompt, target), [family.encode(other) for other in others])
        for prompt, target, others in edits
    ]
    if not encoded or not all(others for _, _, others in encoded):
        raise ValueError("edits must be at least one, each with paraphrases")
    tried = list(layers) if layers is not None else _late_layers(family.model)
    for layer in tried:  # before minutes go into those before it
        find_layer(family.model, layer)
    how = GraceConfig(layer="any", contexts=4) if config is None else config
    work = [(layer, edit) for layer in tried for edit in encoded]
    found: dict[str, list[_Trial]] = {}
    for layer, edit in bar(work, "trying layers", progress):
        found.setdefault(layer, []).append(_try(family, layer, how, *edit))
    table = [_rate(layer, trials) for layer, trials in found.items()]
    best = max(table, key=lambda row: (row.generality, row.accepted, -row.steps))
    others = [row for row in table if row is not best]
    reason = (
        f"values at {best.layer} produce the target in {best.generality:.0%} of the other wordings "
        f"({best.accepted:.0%} of the edits accepted, {best.steps:.1f} steps)"
    )
    if others:
        second = max(others, key=lambda row: row.generality)
        reason += f"; the next best is {second.layer} with {second.generality:.0%}"
    if picture is not None:
        _draw_layers(table, best.layer, Path(picture))
    return LayerSuggestion(best.layer, reason, table)


@dataclass(frozen=True)
class _Trial:
    reached: bool
    produced: list[bool]
    probability: float
    steps: int
    seconds: float


def _try(
    family: Family,
    layer: str,
    config: GraceConfig,
    prompt: list[int],
    target: list[int],
    others: list[list[int]],
) -> _Trial:
    adaptor = GraceAdaptor(
        Codebook(1, 1),
        query=family.default_query,
        replace=config.replace or family.default_replace,
        special_ids=family.special_ids if family.default_query == "mean" else (),
    )
    family.attach(layer, adaptor)
    try:
        with family.working():
            start = family.capture([prompt]).outputs[0]
            begun = time.perf_counter()
            book = Codebook(1, len(start), value_dtype=start.dtype, device=start.device)
            fit = EditMaker(family, config, book).train([prompt], [target], start)
            seconds = time.perf_counter() - begun
            produced = [
                fit.reached and family.produces([other], [target], fit.value[None])[0]
                for other in others
            ]
    finally:
        family.detach()
    return _Trial(fit.reached, produced, fit.probability, fit.steps, seconds)


def _rate(layer: str, trials: list[_Trial]) -> LayerRate:
    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(numbers)

    return LayerRate(
        layer,
        mean([t.reached for t in trials]),
        mean([made for t in trials for made in t.produced]),
        mean([t.probability for t in trials]),
        mean([t.steps for t in trials]),
        mean([t.seconds for t in trials]),
    )


def _late_layers(model: nn.Module) -> list[str]:
    """Return the names of layers from the middle of the longest stack of blocks to its end."""
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not stacks:
        raise ValueError("layers must be named for a model without a list of blocks")
    name = max(stacks, key=lambda n: len(stacks[n]))
    count = len(stacks[name])
    first, last = count // 2, count - 1
    spread = {first + round(i * (last - first) / (_LAYERS - 1)) for i in range(_LAYERS)}
    return [
        f"{name}.{i}" + (".mlp" if hasattr(stacks[name][i], "mlp") else "") for i in sorted(spread)
    ]


@dataclass(frozen=True)
class RadiusSuggestion:
    """A radius with its reason.

    Args:
        radius: for `GraceConfig.radius`.
        reason: why, in a sentence.
        hit: share of the paraphrases that hit their own edit at this radius.
        fired: per kind of negative, the share that fires.
        table: the same for radii round this one, ascending.
    """

    radius: float
    reason: str
    hit: float
    fired: dict[str, float]
    table: list[radii.Rate]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


class _Explains(Protocol):
    @property
    def codebook(self) -> Codebook: ...

    def explain(self, prompt: Any) -> Any: ...


def suggest_radius(
    editor: _Explains,
    paraphrases: Sequence[tuple[int, Any]],
    negatives: Mapping[str, Sequence[Any]],
    bounds: Mapping[str, float],
    *,
    picture: str | Path | None = None,
    progress: bool = False,
) -> RadiusSuggestion:
    """Suggest the largest radius at which no kind of negative fires more often than its bound.

    The editor's own edits are the entries, at the places they have; only their radii are thought
    away. Nothing is changed.

    Args:
        editor: a `GraceEditor` with edits, of any kind of query.
        paraphrases: `(edit_id, prompt)`: other wordings and the edit each should hit.
        negatives: per kind (`"same relation"`, `"same subject"`, ...), prompts that no edit is to
            answer.
        bounds: per kind, the share that may fire, 0..1.
        picture: where to draw hits and fires against the radius (PNG or SVG by its ending).
        progress: show a progress bar on stderr.

    Raises:
        ValueError: kinds and bounds differ, an edit is not live, the codebook is empty, a picture
            cannot be written, or no radius keeps the bounds.
    """
    _check_picture(picture)
    if not editor.codebook.edits:
        raise ValueError("editor must have edits, got none")
    book, slots = editor.codebook, {}
    for edit_id, _ in paraphrases:
        edit = book.edit(edit_id)
        if not edit.live:
            raise ValueError(f"paraphrases must name live edits, got {edit_id}")
        slots[edit_id] = {edit.slot, *(part.slot for part in book.parts(edit_id))}
    work: list[tuple[str | None, int, Any]] = [(None, i, prompt) for i, prompt in paraphrases]
    work += [(kind, -1, prompt) for kind, prompts in negatives.items() for prompt in prompts]
    near: list[float] = []
    far: dict[str, list[float]] = {kind: [] for kind in negatives}
    for kind, edit_id, prompt in bar(work, "measuring distances", progress):
        seen = editor.explain(prompt)
        if kind is not None:
            far[kind].append(seen.distance)
        else:
            near.append(seen.distance if seen.slot in slots[edit_id] else math.inf)
    chosen = radii.suggest_radius(near, far, bounds)
    if picture is not None:
        _draw_radius(chosen, near, far, Path(picture))
    return RadiusSuggestion(chosen.radius, chosen.reason, chosen.hit, chosen.fired, chosen.table)


def _check_picture(picture: str | Path | None) -> None:
    """Refuse a picture that could not be written in the end, before anything is measured."""
    if picture is None:
        return
    path = Path(picture)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"picture must be a file that ends in .png or .svg, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"picture must lie in a directory that is there, got {path}")
    _axes()  # raises without matplotlib


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    return figure, figure.subplots()


def _draw_layers(table: list[LayerRate], best: str, path: Path) -> None:
    figure, axes = _axes()
    at = list(range(len(table)))
    for name, numbers, style in (
        ("target produced in other wordings", [r.generality for r in table], "o-"),
        ("accepted", [r.accepted for r in table], "s--"),
        ("p(target), own wording", [r.probability for r in table], "^:"),
    ):
        axes.plot(at, numbers, style, label=name)
    axes.axvline([r.layer for r in table].index(best), color="#777777", linewidth=0.8)
    axes.set_xticks(at, [r.layer for r in table], rotation=30, ha="right")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share")
    axes.legend()
    figure.savefig(path, dpi=120)


def _draw_radius(
    chosen: radii.Suggestion, near: list[float], far: dict[str, list[float]], path: Path
) -> None:
    figure, axes = _axes()
    for name, distances in (("paraphrases that hit", near), *far.items()):
        finite = sorted(d for d in distances if math.isfinite(d))
        shares = [(i + 1) / len(distances) for i in range(len(finite))]
        axes.step([0.0, *finite], [0.0, *shares], where="post", label=name)
    axes.axvline(chosen.radius, color="#777777", linewidth=0.8)
    axes.set_xlabel("radius")
    axes.set_ylabel("share within the radius")
    axes.set_xlim(0, 2 * chosen.radius)
    axes.set_ylim(-0.03, 1.03)
    axes.legend()
    figure.savefig(path, dpi=120)
