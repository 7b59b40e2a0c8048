"""The cut forward: what runs before a layer's answer is run once, and then only what comes after.

While a value trains, forward after forward differs in what one layer answers and in nothing else.
Every module that was done before that answer was written gives the same outputs each time: those of
the blocks below, and within the layer's own block those of its attention and norms. They are kept
from the first forward and handed out in the next ones. The model's own code runs all the same, so
nothing has to be known about how a model is built.

All this happens in a twin of the model: other module objects with the same parameters, buffers and
hooks. The model itself stays untouched, so other threads may run it, or compile it, meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adaptor.torch_private import is_compiled
from ..families import Family
from ..families.projection import output_projection

T = TypeVar("T")


@dataclass
class Kept:
    """What the modules before a layer's answer gave in one forward, in the order of their calls.

    Args:
        calls: each module with the shape of what it was given, its output and the places of a cache
            that it filled: `(layer, keys, values)`.
        caches: whether a cache was seen, and of a kind that can be filled from here.
        partly: it holds something else as well.
    """

    calls: list[tuple[nn.Module, Any, Any, list[tuple[int, Tensor, Tensor]]]] = field(
        default_factory=list
    )
    caches: bool = False
    partly: bool = False

    def row(self, number: int, rows: int) -> Kept:
        """Return what would be kept of one of the sequences that ran, of so many."""

        def own(tensor: Tensor) -> Tensor:
            return tensor[number : number + 1] if tensor.shape[:1] == (rows,) else tensor

        calls = []
        for module, shape, output, places in self.calls:
            shape = (1, *shape[1:]) if shape is not None and shape[0] == rows else shape
            filled = [(at, own(keys), own(values)) for at, keys, values in places]
            calls.append((module, shape, _mapped(output, own), filled))
        return Kept(calls, self.caches, self.partly)

    def equals(self, other: Kept) -> bool:
        """Say whether the same is kept there, to the bit."""
        if (self.caches, self.partly) != (other.caches, other.partly):
            return False
        return len(self.calls) == len(other.calls) and all(
            own[0] is its[0] and own[1] == its[1] and _alike(own[2:], its[2:])
            for own, its in zip(self.calls, other.calls, strict=True)
        )


class Twin:
    """A twin of a model, in which what runs before a layer's answer can be handed out again.

    Args:
        family: of the attached model, whose wrapped layer it is.

    `family` is the twin's. `cuts` says whether anything runs before the answer that can be kept.
    """

    def __init__(self, family: Family) -> None:
        self.family = copy.copy(family)
        self.family.model = _twin(family.model, {})
        found = _beside(self.family.model, family.layer)
        for module in found:
            module.__dict__["forward"] = _Kept(self, module)
        # Hooks of its own: another thread that compiles the model meanwhile must not meet them. Not
        # where accelerate has replaced forwards, which run the model's own modules.
        head = output_projection(self.family.model)
        own = not any("forward" in module.__dict__ for module in family.model.modules())
        for hooks in ("_forward_hooks", "_forward_pre_hooks") if own and head is not None else ():
            head.__dict__[hooks] = head.__dict__[hooks].copy()
        self.cuts = bool(found)
        self._kept = Kept()
        self._recording = False
        self._fills = False
        self._next: int | None = None  # of what is kept, in the forward that runs now

    def record(self, forward: Callable[[Family], T]) -> tuple[T, Kept]:
        """Return what `forward`, which runs the model once, returns, and what is kept of it."""

        def stop(*_: Any) -> None:
            self._recording = False

        layer = self.family.model.get_submodule(self.family.layer)
        own = layer.__dict__["_forward_hooks"]
        # The twin shares the model's hooks; this one is the twin's alone.
        layer.__dict__["_forward_hooks"] = own.copy()
        layer.register_forward_hook(stop)
        self._kept, self._recording = Kept(), True
        try:
            return forward(self.family), self._kept
        finally:
            self._recording = False
            layer.__dict__["_forward_hooks"] = own

    def replay(self, forward: Callable[[Family], T], kept: Kept, *, fills: bool = False) -> T:
        """Return what `forward` returns, whose first run of the model is handed what is kept.

        Args:
            fills: so is its cache, for runs that follow.
        """
        self._kept, self._next, self._fills = kept, 0, fills
        try:
            return forward(self.family)
        finally:
            self._next = None

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what `module` gives: what is kept of it, or what its own `forward` gives."""
        calls = self._kept.calls
        if self._next is not None and self._next < len(calls):
            expected, shape, output, places = calls[self._next]
            cache = _cache_of(args, kwargs) if self._fills and places else None
            same = expected is module and shape == _shape_of(args, kwargs)
            if same and (cache is not None or not self._fills or not places):
                self._next += 1
                if cache is not None:
                    for layer, keys, values in places:
                        cache.update(keys.clone(), values.clone(), layer)
                # The model may write into what it is given.
                return _mapped(output, Tensor.clone)
            self._next = len(calls)  # not the forward that was kept, or no such cache: all runs
        if not self._recording:
            return forward(*args, **kwargs)
        cache = _cache_of(args, kwargs)
        before = _filled(cache)
        output = forward(*args, **kwargs)
        if self._recording:
            output = _mapped(output, _leaf)
            after = _filled(cache)
            places = [(at, *both) for at, both in after.items() if at not in before]
            self._kept.caches = self._kept.caches or bool(places)
            self._kept.partly = self._kept.partly or _holds_more(cache)
            calls.append((module, _shape_of(args, kwargs), output, places))
            return _mapped(output, Tensor.clone)
        return output


class CutForward:
    """Runs forwards of a model that differ in the answer of a layer alone.

    A context: inside it `run` runs such forwards. The first time, a cut forward is compared with
    the whole one: where their bits differ, and where the model is compiled, every forward is whole.

    Args:
        family: of the attached model, whose wrapped layer it is.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._twin: Twin | None = None  # None: forwards are whole
        self._kept: Kept | None = None

    @property
    def family(self) -> Family:
        """The twin's family, with which whole forwards run too; without a twin the model's own."""
        return self._family if self._twin is None else self._twin.family

    def __enter__(self) -> CutForward:
        family = self._family
        if family.cuts is False or is_compiled(family.model):
            return self
        twin = Twin(family)
        if twin.cuts:
            self._twin = twin
        return self

    def __exit__(self, *_: Any) -> None:
        self._twin = self._kept = None

    def run(self, forward: Callable[[Family], Tensor]) -> Tensor:
        """Return what `forward` returns.

        Args:
            forward: runs the model of the family that it is given once, on the same inputs every
                time.
        """
        twin = self._twin
        if twin is None:
            return forward(self._family)
        if self._kept is not None:
            return twin.replay(forward, self._kept)
        whole = None if self._family.cuts else forward(twin.family)
        found, self._kept = twin.record(forward)
        if whole is None:
            return found
        same = torch.equal(found, whole)
        self._family.cuts = same and torch.equal(twin.replay(forward, self._kept), whole)
        if not self._family.cuts:
            self.__exit__()
        return whole


class _Kept:
    """The forward of a module of the twin."""

    def __init__(self, twin: Twin, module: nn.Module) -> None:
        self.twin, self.module = twin, module
        self.forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.twin.call(self.module, self.forward, args, kwargs)


def _cache_of(args: Any, kwargs: Any) -> Any:
    """Return the cache among a module's arguments, None: there is none that can be filled."""
    given = (*args, *kwargs.values())
    return next((x for x in given if type(x).__name__ == "DynamicCache"), None)


def _shape_of(args: Any, kwargs: Any) -> Any:
    """Return the shape of what a module is given first: a prompt in pieces has another one."""
    given = (*args, *kwargs.values())
    return next((x.shape for x in given if isinstance(x, Tensor)), None)


def _holds_more(cache: Any) -> bool:
    """Say whether a cache holds something in layers that `_filled` does not read."""
    return any(
        type(layer).__name__ != "DynamicLayer" and layer.get_seq_length() > 0
        for layer in getattr(cache, "layers", ())
    )


def _filled(cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Return keys and values by layer of what a plain cache holds."""
    return {
        at: (layer.keys, layer.values)
        for at, layer in enumerate(getattr(cache, "layers", ()))
        if type(layer).__name__ == "DynamicLayer" and layer.get_seq_length() > 0
    }


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return another module object with the same contents, and so on for the modules in it.

    Args:
        made: the twins so far, by the identity of what they are twins of: a module that stands in
            two places has one.
    """
    if id(module) not in made:
        twin = object.__new__(type(module))
        made[id(module)] = twin
        children = {
            name: None if child is None else _twin(child, made)
            for name, child in module.__dict__["_modules"].items()
        }
        twin.__dict__.update(module.__dict__, _modules=children)
    return made[id(module)]


def _beside(model: nn.Module, layer: str) -> list[nn.Module]:
    """Return what the modules on the way to a layer, and the layer itself, are made of."""
    way = [model]
    for part in layer.split("."):
        way.append(way[-1].get_submodule(part))
    on_the_way = {id(module) for module in way}
    found: dict[int, nn.Module] = {}
    for module in way:
        for child in module.children():
            if id(child) not in on_the_way:
                found[id(child)] = child
    return list(found.values())


def _leaf(tensor: Tensor) -> Tensor:
    # Whether it requires grad stays: kernels are chosen by it.
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _alike(one: Any, other: Any) -> bool:
    """Say whether two things that modules gave hold the same tensors, to the bit."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for thing, tensors in zip((one, other), found, strict=True):
        _mapped(thing, lambda tensor, own=tensors: own.append(tensor) or tensor)  # type: ignore[misc]
    return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what a module gave with every tensor in it changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, dict):
        made = copy.copy(output)
        for name, item in output.items():
            made[name] = _mapped(item, change)
        return made
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(x, change) for x in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(x, change) for x in output)
    return output
