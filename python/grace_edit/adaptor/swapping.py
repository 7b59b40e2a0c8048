"""Another class for a module, with methods that call those of its own; and its own class back.

Parameters, `state_dict` names, `isinstance` and hooks stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

Wrap = Callable[[Any, Callable[..., Any], Any, Any], Any]
"""Runs a forward and does more: `wrap(module, forward, args, kwargs)`."""


def swap(module: nn.Module, mixin: type, wrap: Wrap, adaptor: Any) -> None:
    """Give a module an adaptor, and the class `swapped(mixin, ...)`.

    Args:
        wrap: what `mixin` puts round the forward, for a forward of the instance.
    """
    own = module.__dict__.get("forward")
    module.__dict__["grace"] = adaptor
    if own is not None:
        # accelerate and others set forward on the instance, where it would shadow the class.
        module.__dict__["forward"] = InstanceForward(wrap, module, own)
    base: Any = getattr(type(module), "grace_base", type(module))
    module.__class__ = swapped(mixin, base)


def swap_back(module: Any) -> None:
    """Give a module its own class and forward back."""
    module.__class__ = type(module).grace_base
    del module.__dict__["grace"]
    own = module.__dict__.get("forward")
    if isinstance(own, InstanceForward):
        module.__dict__["forward"] = own.forward


class InstanceForward:
    """An instance-level forward with the adaptor round it."""

    def __init__(self, wrap: Wrap, module: nn.Module, forward: Any) -> None:
        self.wrap, self.module, self.forward = wrap, module, forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrap(self.module, self.forward, args, kwargs)


def wrapped(module: Any, wrap: Wrap, args: Any, kwargs: Any) -> Any:
    """Run the forward of a module with `wrap` round it: `wrap(module, forward, args, kwargs)`."""
    forward = beneath(module, "forward")
    # A forward of the instance may end here: a bound one that somebody has from an earlier attach.
    if isinstance(module.__dict__.get("forward"), InstanceForward):
        return forward(*args, **kwargs)
    return wrap(module, forward, args, kwargs)


def beneath(module: Any, name: str) -> Any:
    """Return a method as the module's own class has it, without ours.

    Not by `super()`: a bound forward that somebody holds may be called after `detach`.
    """
    own = type(module)
    return functools.partial(getattr(getattr(own, "grace_base", own), name), module)


@functools.cache
def swapped(mixin: type, base: type) -> type:
    """Return a class that is `base` with the methods of `mixin` over its own.

    Args:
        mixin: has `grace_prefix`, which its name begins with.
        base: as the module's own; the class that is returned has it as `grace_base`, and the names
            of the arguments of its `forward` as `grace_arguments`.
    """
    name = mixin.grace_prefix + base.__name__  # type: ignore[attr-defined]
    members: dict[str, Any] = {"grace_base": base, "__module__": base.__module__}
    members["grace_arguments"] = tuple(inspect.signature(base.forward).parameters)[1:]  # type: ignore[attr-defined]
    methods = ("forward", "generate", "prepare_inputs_for_generation", "init_continuous_batching")
    for method in methods:
        if hasattr(mixin, method) and hasattr(base, method):
            members[method] = _with_signature(getattr(mixin, method), getattr(base, method))
    members.update(
        (own, vars(mixin)[own]) for own in ("_apply", "__reduce_ex__") if own in vars(mixin)
    )
    # The module's own class first: Python gives an object another class only if both are laid out
    # by the same one, which for two bases is the first.
    made = type(name, (base, mixin), members)
    made.__doc__ = base.__doc__
    return made


def _with_signature(function: Any, like: Any) -> Any:
    # transformers reads the signature of forward to decide which inputs a model takes.
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, function.__closure__
    )
    copy.__doc__ = like.__doc__
    copy.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return copy


def rebuild(mixin: type, base: type) -> nn.Module:
    """Return an empty module of a swapped class, for unpickling and deepcopy.

    By what it is made of: the class itself exists only in the process that made it.
    """
    cls: Any = swapped(mixin, base)
    module: nn.Module = cls.__new__(cls)
    return module
