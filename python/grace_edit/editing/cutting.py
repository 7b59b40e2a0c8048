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
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.torch_private import is_compiled
from ..families import Family


class CutForward:
    """Runs forwards of a model that differ in the answer of a layer alone.

    A context: inside it `run` runs such forwards. The first time, a cut forward is compared with
    the whole one: where their bits differ, and where the model is compiled, every forward is whole.

    Args:
        family: of the attached model, whose wrapped layer it is.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._twin: Family | None = None  # None: forwards are whole
        self._kept: list[tuple[nn.Module, Any]] = []
        self._recording = False
        self._next: int | None = None  # of what is kept, in the forward that runs now

    def __enter__(self) -> CutForward:
        family = self._family
        if family.cuts is False or is_compiled(family.model):
            return self
        model = _twin(family.model, {})
        found = _beside(model, family.layer)
        for module in found:
            module.__dict__["forward"] = _Kept(self, module)
        if found:
            self._twin = copy.copy(family)
            self._twin.model = model
        return self

    def __exit__(self, *_: Any) -> None:
        self._twin = None
        self._kept.clear()

    def run(self, forward: Callable[[Family], Tensor]) -> Tensor:
        """Return what `forward` returns.

        Args:
            forward: runs the model of the family that it is given once, on the same inputs every
                time.
        """
        if self._twin is None:
            return forward(self._family)
        if self._kept:
            return self._replay(forward, self._twin)
        if self._family.cuts:
            return self._record(forward, self._twin)
        whole = forward(self._family)
        same = torch.equal(self._record(forward, self._twin), whole)
        self._family.cuts = same and torch.equal(self._replay(forward, self._twin), whole)
        if not self._family.cuts:
            self.__exit__()
        return whole

    def _record(self, forward: Callable[[Family], Tensor], twin: Family) -> Tensor:
        def stop(*_: Any) -> None:
            self._recording = False

        layer = twin.model.get_submodule(twin.layer)
        own = layer.__dict__["_forward_hooks"]
        # The twin shares the model's hooks; this one is the twin's alone.
        layer.__dict__["_forward_hooks"] = own.copy()
        layer.register_forward_hook(stop)
        self._recording = True
        try:
            return forward(twin)
        finally:
            self._recording = False
            layer.__dict__["_forward_hooks"] = own

    def _replay(self, forward: Callable[[Family], Tensor], twin: Family) -> Tensor:
        self._next = 0
        try:
            return forward(twin)
        finally:
            self._next = None

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what `module` gives: what is kept of it, or what its own `forward` gives."""
        if self._next is not None and self._next < len(self._kept):
            expected, output = self._kept[self._next]
            if expected is module:
                self._next += 1
                # The model may write into what it is given.
                return _mapped(output, Tensor.clone)
            self._next = len(self._kept)  # not the forward that was kept: all of it runs
        output = forward(*args, **kwargs)
        if self._recording:
            kept = _mapped(output, _leaf)
            self._kept.append((module, kept))
            return _mapped(kept, Tensor.clone)
        return output


class _Kept:
    """The forward of a module of the twin."""

    def __init__(self, cut: CutForward, module: nn.Module) -> None:
        self.cut, self.module = cut, module
        self.forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cut.call(self.module, self.forward, args, kwargs)


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
