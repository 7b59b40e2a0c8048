"""What stands where the wrapped layer stood: PEFT and quantisers put modules of theirs there.

A LoRA on the layer itself wraps it, and its output is added to what the layer gives, so an answer
written inside it would not be what was trained. Merged, it puts a plain layer back, and the one
that was attached is no longer in the model. Either way the adaptor belongs round what now stands
there under the layer's name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_TRANSPARENT = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Where modules that add nothing to what they hold have it: compiled, parallel, checkpointed."""


def place_of(layer: nn.Module, seam: nn.Module) -> str:
    """Return the name by which `seam` has `layer`."""
    return next(name for name, module in seam.named_modules() if module is layer)


def newcomer(seam: nn.Module, place: str, adaptor: Any) -> nn.Module | None:
    """Return the module at `place` if it is to be given the adaptor; None: the adaptor is there.

    Costs microseconds: it is asked before every forward outside of `generate`.
    """
    module: Any = seam
    for part in place.split("."):
        module = getattr(module, part, None)
    if module is None or module.__dict__.get("grace") is adaptor:
        return None
    inside = (n for n, m in module.named_modules() if m.__dict__.get("grace") is adaptor)
    name = next(inside, None)
    if name is not None and set(name.split(".")) <= _TRANSPARENT:
        return None
    return module
