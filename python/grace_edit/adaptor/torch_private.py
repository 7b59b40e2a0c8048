"""What torch has no public way to ask and the adaptor has to know: all of it is asked here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors lie in the same storage, so that writing one may change the other."""
    # Comparing the storages' addresses instead would read memory that a fake tensor has not got.
    return bool(torch._C._is_alias_of(a, b))  # noqa: SLF001


def next_node_number() -> int:
    """Return the number that autograd will give to the next node that this thread records."""
    return int(torch.autograd._get_sequence_nr())  # noqa: SLF001


def running_node_number() -> int | None:
    """Return the number of the node that backward is at in this thread, None outside of backward.

    A node is numbered when its forward runs, by the thread that runs it.
    """
    node: Any = torch._C._current_autograd_node()  # noqa: SLF001
    return None if node is None else int(node._sequence_nr())  # noqa: SLF001


def has_paired_hooks(module: nn.Module) -> bool:
    """Say whether hooks run before a forward of `module`, and others when it has ended."""
    after = module._forward_hooks.keys() - module._forward_hooks_always_called.keys()  # noqa: SLF001
    return bool(module._forward_pre_hooks and after)  # noqa: SLF001


def is_compiled(model: nn.Module) -> bool:
    """Say whether `torch.compile` was told to compile a module of `model`, or `model` itself.

    Not to be seen from here: a wrapper that holds `model`, or a function that calls it.
    """
    return any(
        module._compiled_call_impl is not None  # noqa: SLF001
        or hasattr(module, "_orig_mod")
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def outside_graphs(reason: str) -> Callable[[F], F]:
    """Return a decorator for what `torch.compile` is to call and not to trace.

    As `torch.compiler.disable`, which imports the compiler as soon as it is used: that takes longer
    than everything else that this package imports. Here it is asked once there is a compiler.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            run = function if "torch._dynamo" not in sys.modules else disabled()
            return run(*args, **kwargs)

        @functools.cache
        def disabled() -> Any:
            return torch.compiler.disable(function, reason=reason)

        made: Any = called
        made._torchdynamo_disable = True  # noqa: SLF001
        made._torchdynamo_disable_msg = reason  # noqa: SLF001
        return cast(F, called)

    return decorate
