"""What others, accelerate above all, set round the modules of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .swapping import InstanceForward
from .torch_private import has_paired_hooks, is_compiled


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model computes on, which weights that are lent to it are not on."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    lenders = (hook for module in model.modules() for hook in _hooks_of_accelerate(module))
    named = (getattr(hook, "execution_device", None) for hook in lenders)
    return torch.device(next((found for found in named if found is not None), device))


def can_stop(model: nn.Module, layer: str) -> bool:
    """Say whether a forward of `model` may end at `layer` and leave nothing behind.

    Not in compiled code, and not where somebody round the layer waits for the end of a forward:
    weights that accelerate lends to a module while it runs, hooks before and after one (as of
    FSDP and DeepSpeed), a forward that somebody has set on a module.
    """
    if is_compiled(model):
        return False
    on_the_way = [model]
    for part in layer.split("."):
        on_the_way.append(on_the_way[-1].get_submodule(part))
    return not any(map(_waits_for_the_end, on_the_way))


def _waits_for_the_end(module: nn.Module) -> bool:
    if has_paired_hooks(module):
        return True
    hooks = _hooks_of_accelerate(module)
    if hooks:
        return any(getattr(hook, "offload", True) for hook in hooks)
    forward: Any = module.__dict__.get("forward")
    if isinstance(forward, InstanceForward):
        forward = forward.forward
    return forward is not None and not _is_of_the_class(forward, type(module))


def _hooks_of_accelerate(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _is_of_the_class(forward: Any, cls: type) -> bool:
    # accelerate leaves the bound method on the instance when it takes its hooks away.
    function = getattr(forward, "__func__", None)
    return any(vars(base).get("forward") is function for base in cls.__mro__)
