"""What making edits costs: through an editor, into a codebook alone, and all at once.

Part `edits`: edits per second. `GraceEditor.edit` corrects wrong topics of the demo's sentence
classifier (the packaged MiniLM) and gives GPT-2's smallest configuration with random weights one
token after eight: it trains a value, proves it by a run of the model and commits it. The published
recipe is the same editor with `policy="paper", recipe="paper"`. `Codebook.insert` takes the
decision and keeps every earlier edit answered, without a model; beside it stands appending the
published way, which looks once and promises nothing.

Part `growth`: seconds to import a codebook, to save and to load it, to outgrow its memory by one
entry, to insert every entry one by one, and the megabytes of its tensors and of its sketch.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.codebook import store
from grace_edit.codebook.codebook import Codebook
from torch import Tensor, nn

from .gate import right_answers
from .measurements import Measurement, Progress, Settings
from .model import LAYER, build, random_tokens
from .published import PublishedAdaptor
from .timing import Times, interleaved

WIDTH = 768
RADIUS = 1.0  # random keys are 39 apart: every edit is an entry of its own
_MORE = 2_000  # inserts that are timed at most; for these the capacity holds
_CHECKED = 16  # of the first and of the last inserts: whether they are found
_APPENDED = 2_000  # the published way, one by one


def run(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure edits per second; return what part `edits` measures."""
    seconds = settings.pick(5.0, 1.0) * settings.budget
    steps = [lambda: classifier(settings.pick(10, 1)), lambda: causal(settings.pick(8, 1))]
    for keys in settings.pick((1_000, 10_000, 100_000), (10_000,)):
        steps.append(lambda keys=keys: inserts(keys, WIDTH, seconds))
    return _each(steps, progress)


def growth(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure growth; return what part `growth` measures."""
    steps: list[Callable[[], list[Measurement]]] = [
        lambda keys=keys: imports(keys, WIDTH, settings.pick(3, 1))
        for keys in settings.pick((1_000, 10_000, 100_000), (10_000,))
    ]
    marks = settings.pick((1_000, 4_500), (500,))
    return _each([*steps, lambda: one_by_one(marks, WIDTH)], progress)


def _each(
    steps: Sequence[Callable[[], list[Measurement]]], progress: Progress
) -> list[Measurement]:
    found = []
    for done, step in enumerate(steps):
        progress(done, len(steps))
        found += step()
    progress(len(steps), len(steps))
    return found


def classifier(edits: int) -> list[Measurement]:
    """Edit the demo's classifier, and a copy of it by the published recipe."""
    from grace_edit.demo import topics
    from grace_edit.demo.data import load_topics

    case = {"part": "edits", "data": "MiniLM classifier"}
    data = load_topics()
    try:
        model, tokenizer = topics.build_model(data)
    except ModuleNotFoundError as error:
        return [Measurement(**case, name="GraceEditor.edit", answers="absent", note=str(error))]
    stream = topics.stream_of(model, tokenizer, data.stream[: 20 * (edits + 1)])
    wrong = [(request.text, request.topic) for request, fails in stream if fails]
    paper = {"policy": "paper", "recipe": "paper", "replace": "all"}
    default = GraceConfig(layer=topics.LAYER, radius=topics.RADIUS)
    published = GraceConfig(layer=topics.LAYER, radius=topics.RADIUS, **paper)
    other = copy.deepcopy(model)
    editors = {
        "GraceEditor.edit": GraceEditor(model, tokenizer, default),
        "published recipe": GraceEditor(other, tokenizer, published),
    }
    return edited(case, editors, wrong[: edits + 1])


def causal(edits: int) -> list[Measurement]:
    """Edit GPT-2's smallest configuration."""
    model = build({})
    prompts = random_tokens(model, edits + 1, 3)[:, :8].tolist()
    editor = GraceEditor(model, None, GraceConfig(layer=LAYER))
    case = {"part": "edits", "data": "GPT-2 124M, random"}
    pairs = [(ids, [i]) for i, ids in enumerate(prompts)]
    return edited(case, {"GraceEditor.edit": editor}, pairs)


def edited(
    case: dict[str, Any], editors: dict[str, GraceEditor], edits: Sequence[tuple[Any, Any]]
) -> list[Measurement]:
    """Make the same edits with some editors in turn, the first one untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in editors}
    refused = dict.fromkeys(editors, 0)
    steps = dict.fromkeys(editors, 0)
    for prompt, target in edits:
        for name, editor in editors.items():
            start = time.perf_counter()
            result = editor.edit(prompt, target)
            seconds[name].append(time.perf_counter() - start)
            refused[name] += not result.success
            steps[name] += result.steps
    found = []
    for name, editor in editors.items():
        timed = seconds[name][1:]
        note = f"{len(timed)} timed, {steps[name] / len(edits):.1f} training steps per edit"
        if refused[name]:
            note += f"; {refused[name]} of {len(edits)} refused"
        about = {**case, "dtype": "fp32", "width": editor.codebook.keys.shape[1], "name": name}
        about["kind"] = "peer" if name.startswith("published") else "ours"
        answers = "wrong" if refused[name] else ""
        times = Times.of(timed).columns("edits/s", 1)
        found.append(Measurement(**about, answers=answers, note=note, **times))
    return found


def random_entries(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys `[N, D]` and values `[N, D]` float32, and radii `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, width, generator=generator)
    values = torch.randn(count, width, generator=generator)
    return keys, values, torch.full((count,), RADIUS)


def codebook(count: int, width: int, more: int = 0) -> Codebook:
    """Import random entries, with memory for some more."""
    labels = [(i,) for i in range(count)]
    entries = random_entries(count, width)
    return Codebook.from_tensors(*entries, labels, radius=RADIUS, capacity=count + more)


def _edits(count: int, width: int, first: int) -> Iterator[tuple[Tensor, list[int], Tensor]]:
    """Give queries far from all others, labels and values without end, the same ones anew."""
    keys, values, _ = random_entries(count, width, seed=first + 1)
    for i in itertools.count():
        # Once round: other queries, as the same ones would be updates.
        yield keys[i % count] * (1 + i // count), [first + i], values[i % count]


def inserts(count: int, width: int, seconds: float) -> list[Measurement]:
    """Insert into a codebook of `count` entries and append to another one the published way.

    Raises:
        RuntimeError: one of them does not find the nearest entry, or an insert is no new entry.
    """
    book = codebook(count, width, _MORE)
    other = PublishedAdaptor(nn.Identity(), *random_entries(count, width))
    query, _, _ = next(_edits(1, width, count))
    nearest = book.nearest_two(query)[0][0]
    ours, theirs = (_edits(_MORE, width, 10 * count) for _ in range(2))
    inserted: list[tuple[Tensor, Tensor]] = []

    def insert() -> None:
        query, label, value = next(ours)
        inserted.append((query, value))
        if book.insert(query, label, value).case != "add":
            raise RuntimeError("every insert must be a new entry, got another case")

    def append() -> None:
        query, _, value = next(theirs)
        other.add(query, value, RADIUS)

    found = other.nearest(query)[0]
    times = interleaved({"Codebook.insert": insert, "published append": append}, seconds)
    answers = {"Codebook.insert": "exact" if found_again(book, inserted) else "wrong"}
    answers["published append"] = "rounded" if found == nearest else "wrong"
    about = {"part": "edits", "data": "isotropic", "dtype": "fp32", "radius": RADIUS}
    about |= {"keys": count, "width": width, "batch": 1}
    kinds = {"Codebook.insert": "ours", "published append": "peer"}
    return [
        Measurement(**about, name=n, kind=kinds[n], answers=answers[n], **t.columns("edits/s", 1))
        for n, t in times.items()
    ]


def found_again(book: Codebook, inserted: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Return whether the reference finds the first and the last inserts, each with its value."""
    some = [*inserted[:_CHECKED], *inserted[-_CHECKED:]]
    query, value = (torch.stack(parts) for parts in zip(*some, strict=True))
    slot = right_answers(query, book.keys, book.radii)["lookup"][0]
    return bool((slot >= 0).all()) and torch.equal(book.values[slot], value)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _grown(keys: int, width: int, name: str, columns: dict[str, Any], **other: Any) -> Measurement:
    about = {"part": "growth", "data": "isotropic", "dtype": "fp32", "radius": RADIUS}
    return Measurement(**about, keys=keys, width=width, name=name, **columns, **other)


def imports(count: int, width: int, rounds: int) -> list[Measurement]:
    """Import, save, load and outgrow a codebook of `count` entries, some times.

    Raises:
        RuntimeError: what was loaded is not what was saved.
    """
    entries = random_entries(count, width)
    labels = [(i,) for i in range(count)]
    new = next(_edits(1, width, 10 * count))
    every = [_lived(entries, labels, new) for _ in range(rounds)]
    found = []
    for name in every[0][0]:
        columns = Times.of([taken[name] for taken, _ in every]).columns("s")
        found.append(
            _grown(count, width, name, columns, note=f"{rounds} runs" if rounds > 1 else "one run")
        )
    for name, size in every[0][1].items():
        found.append(_grown(count, width, name, {"unit": "MB", "median": size}))
    return found


def _lived(
    entries: tuple[Tensor, Tensor, Tensor],
    labels: list[tuple[int]],
    new: tuple[Tensor, list[int], Tensor],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds that each thing took that was done to a codebook, and its megabytes."""
    taken: dict[str, float] = {}
    taken["import"], book = _seconds(lambda: Codebook.from_tensors(*entries, labels, radius=RADIUS))
    sizes = {"keys, values and radii": _megabytes(book.keys, book.values, book.radii)}
    if book.sketch is not None:
        sizes["sketch"] = _megabytes(*book.sketch.tensors())
    with tempfile.TemporaryDirectory() as folder:
        taken["save"], _ = _seconds(lambda: store.save(book, folder, {}))
        taken["load"], (again, _) = _seconds(lambda: store.load(folder))
    if not (torch.equal(again.keys, book.keys) and torch.equal(again.values, book.values)):
        raise RuntimeError("a loaded codebook must be the one that was saved, got another")
    taken["insert beyond the capacity"], _ = _seconds(lambda: book.insert(*new))
    return taken, sizes


def _megabytes(*tensors: Tensor) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def one_by_one(marks: Sequence[int], width: int) -> list[Measurement]:
    """Insert into a codebook that begins empty; seconds up to each number of entries.

    Growth of its memory and the first fits of its sketch are among them. Beside it the published
    way, up to 2000 entries.
    """
    found = []
    book = Codebook(width, width, radius=RADIUS, capacity=64)
    keys, values, radii = random_entries(max(marks), width)
    other = PublishedAdaptor(nn.Identity(), keys[:1], values[:1], radii[:1])
    mine = theirs = 0.0
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        mine += _seconds(lambda: book.insert(key, [i], value))[0]  # noqa: B023
        if 0 < i < _APPENDED:
            theirs += _seconds(lambda: other.add(key, value, RADIUS))[0]  # noqa: B023
        if i + 1 in marks:
            name = "inserts from none on"
            columns = {"unit": "s", "median": mine, "note": "one run"}
            found.append(_grown(i + 1, width, name, columns))
            if i < _APPENDED:
                columns["median"] = theirs
                found.append(_grown(i + 1, width, f"published {name}", columns, kind="peer"))
    return found
