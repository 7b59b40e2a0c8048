"""In a worker: the wrapped layer and the tensors from which a step's answers are written.

One operator stands behind the layer, `grace_vllm::answer`. It finds everything but its two tensors
here, by the layer's name, in memory that stays where it is: so a compiled or captured model needs
nothing new for another step or another edit. Where nobody asks it returns at once; in a captured
graph, which cannot know, it runs on rows that answer nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import grace_kernels

from .news import Changed
from .options import NotServed

_LAYERS: dict[str, EditedLayer] = {}
_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its library
MLPS = ("mlp", "feed_forward", "ffn")
"""How a block names the layer that can be wrapped: one tensor in, one out, full width."""


class EditedLayer:
    """What answers the rows of a step.

    Args:
        name: of the layer.
        query: `"text"`, whose values come with the requests, or `"last"`, which are looked up.
        width: D and V.
        dtype: of keys, values and the layer's output.
        capacity: entries there is room for; `query="last"` alone.
        requests: the most that a step can hold.
        device: where the layer is.
        may_grow: no captured graph reads the entries, so they may move.
    """

    def __init__(
        self,
        name: str,
        *,
        query: str,
        width: int,
        dtype: torch.dtype,
        capacity: int,
        requests: int,
        device: torch.device | str,
        may_grow: bool,
    ) -> None:
        self.name, self.query, self.width = name, query, width
        self.calls = 0
        self.asked = 0
        self.version = -1
        self.may_grow = may_grow
        self._asking = 0
        self._first = torch.full((requests,), -1, dtype=torch.int64, device=device)
        self._behind = torch.zeros(requests, dtype=torch.int64, device=device)
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        rows = requests if query == "text" else capacity
        self._values = torch.zeros(rows, width, dtype=dtype, device=device)
        self._keys = torch.zeros(rows if query == "last" else 0, width, dtype=dtype, device=device)
        self._radii = torch.full((rows,), -math.inf, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def hits(self) -> int:
        """How many prompts were answered. Waits for the device."""
        return int(self._hits)

    def ask(self, rows: list[int], values: list[Tensor]) -> None:
        """Say which rows of the next forward ask; none of a forward that nobody spoke of.

        Args:
            rows: of the layer's input, at most as many as a step can hold.
            values: under `query="text"` what answers each, `[V]` on the host; else nothing.
        """
        n = len(rows)
        if n == 0 and self._asking == 0:
            return
        self._asking = n
        room = len(self._first)
        # What is left over writes the first answer once more; without one, row 0 as it is.
        left = rows[:1] or [0] if self.query == "text" else [-1]
        first = torch.tensor(rows + left * (room - n), dtype=torch.int64)
        self._first.copy_(self._there(first), non_blocking=True)
        if self.query == "last":
            self._behind.copy_(self._first + 1)
            return
        self._count.fill_(n)
        if n:
            each = torch.stack(values)
            self._values[:n].copy_(self._there(each), non_blocking=True)
            self._values[n:] = self._values[0]

    def write(self, changed: Changed) -> None:
        """Let entries be as a message says.

        Raises:
            RuntimeError: there are more than captured graphs have memory for.
        """
        needed = max([changed.count, *(changed.slots + 1).tolist()])
        if needed > len(self._radii):
            if not self.may_grow:
                raise RuntimeError(
                    f"the codebook must have at most {len(self._radii)} entries for captured "
                    f"graphs, got {needed}"
                )
            self._grow(2 * needed)
        at = changed.slots.to(self._keys.device)
        self._keys[at] = changed.keys.to(self._keys.device)
        self._values[at] = changed.values.to(self._keys.device)
        self._radii[at] = changed.radii.to(self._keys.device)
        # What is in use no more is to answer nothing when the count goes up again.
        self._radii[changed.count :] = -math.inf
        self._count.fill_(changed.count)

    def answer(self, hidden: Tensor, source: Tensor) -> None:
        """Write the answers of a step into the layer's output.

        Args:
            hidden: `[..., V]`, written in place.
            source: the layer's input `[..., D]`.

        Raises:
            RuntimeError: the layer is of another width than was said.
        """
        self.calls += 1
        if hidden.shape[-1] != self.width or source.shape[-1] != self.width:
            raise RuntimeError(
                f"the layer {self.name} must take and give {self.width} numbers a token, got "
                f"{list(source.shape)} and {list(hidden.shape)}"
            )
        n = self._rows_now(hidden)
        if n == 0:
            return
        rows = hidden.view(-1, self.width)
        first = self._first[:n]
        if self.query == "text":
            written = torch.where(self._count > 0, self._values[:n], rows[first])
            rows.index_put_((first,), written)
            return
        index, _ = grace_kernels.adapt_(
            rows,
            source.reshape(-1, self.width),
            first,
            first,
            self._behind[:n],
            self._keys,
            self._radii,
            self._values,
            self._count,
        )
        self._hits += (index >= 0).sum()

    def count(self, asked: int, answered: int) -> None:
        """Count prompts; those that a lookup answers are counted by themselves."""
        self.asked += asked
        if answered:
            self._hits += answered

    def _rows_now(self, hidden: Tensor) -> int:
        captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        return len(self._first) if captured else self._asking

    def _there(self, tensor: Tensor) -> Tensor:
        # Memory of its own each time: the copy may still be read when the next step is prepared.
        return tensor.pin_memory() if self._first.is_cuda else tensor

    def _grow(self, capacity: int) -> None:
        for name, fill in (("_keys", 0.0), ("_values", 0.0), ("_radii", -math.inf)):
            old = getattr(self, name)
            new = old.new_full((capacity, *old.shape[1:]), fill)
            new[: len(old)] = old
            setattr(self, name, new)


class _Edited:
    """In front of the layer's own class."""

    _grace_name: str

    def forward(self, *args: Any, **given: Any) -> Any:
        hidden = super().forward(*args, **given)  # type: ignore[misc]
        source = args[0] if args else next(iter(given.values()))
        if not isinstance(hidden, Tensor) or not isinstance(source, Tensor):
            raise TypeError(
                "a layer that takes or gives more than one tensor (as quantised activations with "
                "their scale) cannot be edited in vLLM"
            )
        torch.ops.grace_vllm.answer(hidden, source, self._grace_name)
        return hidden


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module of vLLM's model that is the layer of the edits.

    Args:
        model: as vLLM has it.
        name: of the layer in transformers' model: the same name, or the end of one alone.

    Raises:
        NotServed: there is none, there are several, or it is not a block's MLP.
    """
    last = name.rpartition(".")[2]
    if last not in MLPS:
        raise NotServed(
            f"the layer {name} cannot be edited in vLLM, which fuses it with others or gives more "
            f"than one tensor there; make the edits at a block's {' or '.join(MLPS)}"
        )
    modules = dict(model.named_modules())
    found = [one for one in modules if one == name or one.endswith("." + name)]
    if not found:
        short = name.partition(".")[2]
        found = [one for one in modules if short and one.endswith("." + short)]
    if len(found) != 1:
        near = found or [one for one in modules if one.rpartition(".")[2] == last]
        raise NotServed(
            f"the layer {name} of the edits must be one module of {type(model).__name__}, got "
            f"{len(found)}; near: {', '.join(near[:4]) or 'none'}"
        )
    return modules[found[0]]


def wrap(module: nn.Module, layer: EditedLayer) -> None:
    """Let a module's forward be answered by `layer`, whatever compiles or captures it later.

    Raises:
        NotServed: its output is not whole on each device.
    """
    down = next((one for name, one in module.named_modules() if name.endswith("down_proj")), None)
    if getattr(down, "tp_size", 1) > 1 and not getattr(down, "reduce_results", True):
        raise NotServed(f"the output of {layer.name} is not whole on each device")
    _define()
    _LAYERS[layer.name] = layer
    base = type(module)
    module.__class__ = type(f"Grace{base.__name__}", (_Edited, base), {"__module__": __name__})
    module._grace_name = layer.name  # noqa: SLF001 (a class of ours)


def _define() -> None:
    if _LIBRARIES:
        return
    library = torch.library.Library("grace_vllm", "DEF")
    library.define("answer(Tensor(a!) hidden, Tensor source, str name) -> ()")
    library.impl("answer", _answer, "CompositeExplicitAutograd")
    torch.library.register_fake("grace_vllm::answer", _nothing, lib=library)
    _LIBRARIES.append(library)


def _answer(hidden: Tensor, source: Tensor, name: str) -> None:
    _LAYERS[name].answer(hidden, source)


def _nothing(hidden: Tensor, source: Tensor, name: str) -> None:
    return None
