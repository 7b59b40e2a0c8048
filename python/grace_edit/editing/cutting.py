"""The cut forward: what runs before a layer's answer is run once, and then only what comes after.

While a value trains, forward after forward differs in what one layer answers and in nothing else.
Every module that was done before that answer was written gives the same outputs each time: those of
the blocks below, and within the layer's own block those of its attention and norms. They are kept
from the first forward and handed out in the next ones. The model's own code runs all the same, so
nothing has to be known about how a model is built.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptor.torch_private import is_compiled
from ..families import Family


class CutForward:
    """Runs forwards of a model that differ in the answer of a layer alone.

    A context: inside it `run` runs such forwards. Other forwards of the model, those of other
    threads among them, are whole. The first time, a cut forward is compared with the whole one:
    where their bits differ, where the model is compiled, and while another thread cuts forwards of
    the same model, every forward is whole.

    Args:
        family: of the attached model, whose wrapped layer it is.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._layer = family.model.get_submodule(family.layer)
        self._modules: list[nn.Module] = []
        self._kept: list[tuple[nn.Module, Any]] = []
        self._recording = False
        self._next: int | None = None  # of what is kept, in the forward that runs now
        self._thread = threading.get_ident()

    def __enter__(self) -> CutForward:
        family = self._family
        if family.cuts is False or is_compiled(family.model):
            return self
        found = _beside(family.model, family.layer)
        if found and family.cutting.acquire(blocking=False):
            self._modules = found
            for module in found:
                module.__dict__["forward"] = _Kept(self, module)
        return self

    def __exit__(self, *_: Any) -> None:
        for module in self._modules:
            kept = module.__dict__["forward"]
            if kept.own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = kept.own
        if self._modules:
            self._family.cutting.release()
        self._modules = []
        self._kept.clear()

    def run(self, forward: Callable[[], Tensor]) -> Tensor:
        """Return what `forward` returns: it runs the model once, on the same inputs every time."""
        if not self._modules:
            return forward()
        if self._kept:
            return self._replay(forward)
        if self._family.cuts:
            return self._record(forward)
        whole = forward()
        same = torch.equal(self._record(forward), whole)
        self._family.cuts = same and torch.equal(self._replay(forward), whole)
        if not self._family.cuts:
            self.__exit__()
        return whole

    def _record(self, forward: Callable[[], Tensor]) -> Tensor:
        def stop(*_: Any) -> None:
            if threading.get_ident() == self._thread:
                self._recording = False

        handle = self._layer.register_forward_hook(stop)
        self._recording = True
        try:
            return forward()
        finally:
            self._recording = False
            handle.remove()

    def _replay(self, forward: Callable[[], Tensor]) -> Tensor:
        self._next = 0
        try:
            return forward()
        finally:
            self._next = None

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what `module` gives: what is kept of it, or what its own `forward` gives."""
        mine = threading.get_ident() == self._thread
        if mine and self._next is not None and self._next < len(self._kept):
            expected, output = self._kept[self._next]
            if expected is module:
                self._next += 1
                # The model may write into what it is given.
                return _mapped(output, Tensor.clone)
            self._next = len(self._kept)  # not the forward that was kept: all of it runs
        output = forward(*args, **kwargs)
        if mine and self._recording:
            kept = _mapped(output, _leaf)
            self._kept.append((module, kept))
            return _mapped(kept, Tensor.clone)
        return output


class _Kept:
    """The forward of a module while a `CutForward` is entered."""

    def __init__(self, cut: CutForward, module: nn.Module) -> None:
        self.cut, self.module = cut, module
        self.own: Any = module.__dict__.get("forward")  # accelerate and others set one
        self.forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cut.call(self.module, self.forward, args, kwargs)


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
