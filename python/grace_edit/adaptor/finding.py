"""Finding a layer by its name, and a model inside what is put round models."""

from __future__ import annotations

import difflib
import re

from torch import nn

_WRAPPERS = re.compile(r"(^|\.)(base_model\.model|_orig_mod|module)(?=\.)")


def find_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the full name and the module that `name` means.

    Args:
        model: the model.
        name: dots or brackets (`h[3].mlp`), `.weight` and `.bias` ignored, a unique suffix is
            enough; wrappers' prefixes (PEFT, `torch.compile`) do not matter.

    Raises:
        ValueError: no module or more than one has this name; the near matches are listed.
    """
    wanted = re.sub(r"\[(\w+)\]", r".\1", name.strip())
    wanted = re.sub(r"\.(weight|bias)$", "", wanted).strip(".")
    modules = {n: m for n, m in model.named_modules() if n}
    plain = {n: _WRAPPERS.sub("", "." + n).strip(".") for n in modules}
    wanted = _WRAPPERS.sub("", "." + wanted).strip(".")
    exact = [n for n, p in plain.items() if p == wanted]
    found = exact or [n for n, p in plain.items() if p.endswith("." + wanted)]
    if len(found) == 1:
        return found[0], modules[found[0]]
    near = found or difflib.get_close_matches(wanted, list(modules), n=5, cutoff=0.3)
    problem = "is ambiguous" if found else "is not in the model"
    raise ValueError(f"layer must name one module, got {name!r}, which {problem}; near: {near[:5]}")


def core_of(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: those of `torch.compile`, PEFT and parallel training."""
    while True:
        compiled = dict(model.named_children()).get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model
