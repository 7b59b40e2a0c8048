"""What edits cost a model that serves: prefill, generation, and the lookup within.

The model is GPT-2's smallest configuration (12 layers, 768 wide, 124 million parameters) with
random weights. Its codebook stands at the MLP of a late block. Keys are that layer's inputs at
tokens of random sequences, with noise that is half as long as the nearest of them is far; the
radius is as much smaller than that as ε = 1 is at a middle layer of a pretrained MiniLM (0.2).

The column `data` says what ran: a prefill, a generation (prefill included), the lookup alone as it
is timed inside such prefills, so with the caches that the layers before leave, or a decode step,
whose operators are counted and not timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.adaptor.attach import attach, find_layer
from grace_edit.codebook.codebook import Codebook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import grace_kernels

from .measurements import Measurement, Progress, Settings
from .published import wrap
from .timing import Times, interleaved

LAYER = "transformer.h.8.mlp"
PROMPT, NEW = 128, 32  # tokens
RADIUS = 0.2  # times the distance of the nearest key of another sequence
PREFILL = f"prefill of {PROMPT} tokens"
LOOKUP = f"lookup in a {PREFILL}"
STEP = "decode step"


@dataclass(frozen=True)
class Size:
    """What is built and for how long it is measured."""

    config: dict[str, Any]  # what differs from GPT-2's own
    layer: str  # where the codebook stands
    keys: tuple[int, ...]  # numbers of entries
    sequences: int  # of `PROMPT` tokens that keys are drawn from
    new: int  # tokens generated
    seconds: float  # for the prefills, and for the generations, of one number of entries


FULL = Size({}, LAYER, (1_000, 100_000), 32, NEW, 12.0)
QUICK = Size({}, LAYER, (10_000,), 8, 2, 1.0)


def run(settings: Settings, progress: Progress) -> list[Measurement]:
    """Measure every number of entries; return what part `model` measures."""
    return measure(settings.pick(FULL, QUICK), settings.budget, progress)


def measure(size: Size, budget: float, progress: Progress) -> list[Measurement]:
    """Build a model and measure it with codebooks of every size."""
    model = build(size.config)
    seen, _ = watched(model, size.layer, random_tokens(model, size.sequences, 1))
    found = []
    for done, keys in enumerate(size.keys):
        progress(done, len(size.keys))
        with torch.no_grad():
            found += Bench(model, size, seen, keys).measured(size.seconds * budget)
    progress(len(size.keys), len(size.keys))
    return found


def build(config: dict[str, Any]) -> Any:
    """Return GPT-2's smallest configuration, with changes, and random weights; nothing is read."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        about = GPT2Config(**{"eos_token_id": None, "bos_token_id": None, **config})
        return GPT2LMHeadModel(about).eval()


def shared(model: nn.Module) -> Any:
    """Return a copy of a model that has the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def random_tokens(model: Any, sequences: int, seed: int) -> Tensor:
    """Return token ids `[sequences, PROMPT]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (sequences, PROMPT), generator=generator)


@torch.no_grad()
def watched(model: Any, layer: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run `[B, T]` tokens; return the inputs `[B, T, D]` of a layer and its outputs `[B, T, V]`."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        for some in ids.split(8):
            model(some, logits_to_keep=1)
    finally:
        handle.remove()
    return torch.cat([pair[0] for pair in seen]), torch.cat([pair[1] for pair in seen])


def entries(seen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys `[N, D]`, values `[N, D]` and radii `[N]` that are like a layer's inputs."""
    generator = torch.Generator().manual_seed(count)
    half = len(seen) // 2
    apart = torch.cdist(seen[:half, -1], seen[half:].flatten(0, 1)).amin(dim=1).median()
    every = seen.flatten(0, 1)
    drawn = every[torch.randint(len(every), (count,), generator=generator)]
    noise = torch.randn(drawn.shape, generator=generator)
    noise *= 0.5 * apart / drawn.shape[1] ** 0.5
    values = torch.randn(drawn.shape, generator=generator)
    return drawn + noise, values, torch.full((count,), float(RADIUS * apart))


class WithoutSketch(Codebook):
    """A codebook in which a served lookup reads every key."""

    sketch = None


class Stopwatch:
    """Calls a function and keeps the seconds of each call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        return result


class Counter(TorchDispatchMode):
    """Counts the operators that run, and those of this package among them."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.grace = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.grace += func.namespace.startswith("grace")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Note, for each forward of a model, how many operators of this package ran, and how many."""
    counts: list[tuple[int, int]] = []
    with Counter() as counter:

        def start(*_: Any) -> None:
            counts.append((counter.grace, counter.all))

        def end(*_: Any) -> None:
            grace, every = counts[-1]
            counts[-1] = counter.grace - grace, counter.all - every

        handles = [model.register_forward_pre_hook(start), model.register_forward_hook(end)]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Contestant:
    """A model with one way of looking edits up, or none.

    Attributes:
        lookup: whose method it is, and its name; None: nothing is looked up.
    """

    name: str
    kind: str
    model: Any
    prompt: Tensor
    lookup: tuple[Any, str] | None = None
    answers: str = ""

    def prefill(self) -> Any:
        """Run the prompt."""
        return self.model(self.prompt, logits_to_keep=1)

    def generate(self, new: int) -> list[int]:
        """Return the tokens that come after the prompt, greedily, with a dynamic cache."""
        out = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=new,
            do_sample=False,
        )
        return out[0, self.prompt.shape[1] :].tolist()


class Bench:
    """One model some times over the same weights: as it is, edited, and the published way.

    Two prompts are run: one that no entry answers, and one whose own query is a key.
    """

    def __init__(self, model: Any, size: Size, seen: Tensor, count: int) -> None:
        self.model, self.size = model, size
        self.miss, self.hit = random_tokens(model, 2, 2).split(1)
        self.keys, self.values, self.radii = entries(seen, count)
        # As the model computes them for these prompts alone.
        queries = [watched(model, size.layer, ids)[0][0, -1] for ids in (self.miss, self.hit)]
        self.queries = torch.stack(queries)
        self.keys[count // 2] = queries[1]
        labels = [(i,) for i in range(count)]
        book = Codebook.from_tensors(self.keys, self.values, self.radii, labels)
        self.unedited = Contestant("unedited", "bound", shared(model), self.miss)
        self.edited = [
            self._edited("edited", book, self.miss),
            self._edited("edited, a hit", book, self.hit),
        ]
        if book.sketch is not None:
            plain = copy.copy(book)  # the same tensors
            plain.__class__ = WithoutSketch
            self.edited.append(self._edited("edited, no sketch", plain, self.miss))
        other = shared(model)
        self.adaptor = wrap(other, size.layer, self.keys, self.values, self.radii)
        self.published = Contestant(
            "published", "peer", other, self.miss, (self.adaptor, "decide"), "rounded"
        )
        self.contestants = [self.unedited, *self.edited, self.published]

    def _edited(self, name: str, book: Codebook, prompt: Tensor) -> Contestant:
        edited = shared(self.model)
        adaptor = GraceAdaptor(book, query="last", replace="last")
        layer = find_layer(edited, self.size.layer)[1]
        attach(edited, layer, edited, adaptor, generates=True)
        return Contestant(name, "ours", edited, prompt, (adaptor, "_answer"), "exact")

    def check(self) -> None:
        """Compare every decision with the reference's, and the layer's output with what follows.

        Raises:
            RuntimeError: the data are not as said, or an edited model is not right.
        """
        right = self._right("reference")
        if right != [-1, len(self.keys) // 2]:
            raise RuntimeError(f"the queries must miss and hit, got entries {right}")
        if [self.adaptor.decide(query) for query in self.queries] != right:
            self.published.answers = "wrong"
        own = watched(self.unedited.model, self.size.layer, self.miss)[1][0, -1]
        for c in self.edited:
            out = watched(c.model, self.size.layer, c.prompt)[1][0, -1]
            if not torch.equal(out, own if c.prompt is self.miss else self.values[right[1]]):
                raise RuntimeError(f"{c.name}: the layer's output must be replaced by hits alone")

    def _right(self, backend: Any) -> list[int]:
        found, _ = grace_kernels.lookup(self.queries, self.keys, self.radii, backend=backend)
        return found.tolist()

    def measured(self, seconds: float) -> list[Measurement]:
        """Check everything, then measure it.

        Args:
            seconds: for the prefills, and again for the generations.
        """
        self.check()
        return [*self._prefills(seconds), *self._generations(seconds), *self._steps()]

    def _one(self, data: str, c: Contestant, **columns: Any) -> Measurement:
        about = {"part": "model", "data": data, "dtype": "fp32", "keys": len(self.keys), "batch": 1}
        about |= {"width": self.keys.shape[1], "radius": float(self.radii[0])}
        about |= {"name": c.name, "kind": c.kind, "answers": c.answers}
        return Measurement(**about, **columns)

    def _prefills(self, seconds: float) -> list[Measurement]:
        """Time prefills, and in these very prefills the lookups."""
        watches: dict[str, Stopwatch] = {}
        for c in self.contestants:
            if c.lookup is not None:
                watches[c.name] = Stopwatch(getattr(*c.lookup))
                setattr(*c.lookup, watches[c.name])
        try:
            times = interleaved({c.name: c.prefill for c in self.contestants}, seconds)
        finally:
            for c in self.contestants:
                if c.lookup is not None:
                    delattr(*c.lookup)
        found = [self._one(PREFILL, c, **times[c.name].columns()) for c in self.contestants]
        for c in self.contestants:
            if c.name in watches:
                inside = Times.of(watches[c.name].seconds[2:])  # two calls warm up
                found.append(self._one(LOOKUP, c, **inside.columns()))
        return found

    def _generations(self, seconds: float) -> list[Measurement]:
        new = self.size.new
        timed = [c for c in self.contestants if c.prompt is self.miss]
        told: dict[str, list[int]] = {}

        def call(c: Contestant) -> Callable[[], None]:
            return lambda: told.update({c.name: c.generate(new)})

        times = interleaved({c.name: call(c) for c in timed}, seconds)
        found = []
        for c in timed:
            note = ""
            if told[c.name] != told["unedited"]:
                if c.kind == "ours":
                    raise RuntimeError(f"{c.name}: tokens must be the unedited model's, got others")
                note = "other tokens than the unedited model's"
            columns = times[c.name].columns("tokens/s", new)
            found.append(self._one(f"generation of {new} tokens", c, **columns, note=note))
        return found

    def _steps(self) -> list[Measurement]:
        """Count the operators of each step of a short generation."""
        found = []
        for c in self.contestants:
            with counted(c.model) as counts:
                c.generate(4)
            for column, unit in enumerate(("grace operators", "operators")):
                prefill, *steps = [count[column] for count in counts]
                note = f"median: the most of {len(steps)} steps; in the prefill {prefill}"
                columns = {"median": max(steps), "p20": min(steps), "p80": max(steps)}
                found.append(self._one(STEP, c, unit=unit, note=note, **columns))
        return found
