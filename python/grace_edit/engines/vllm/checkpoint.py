"""The model as its checkpoint has it: whether it is the one of the edits, and its embeddings.

vLLM fuses, splits over devices and repacks what it loads, so what is checked is what it loads from:
every parameter of the checkpoint, by the name, shape and strided sample that the fingerprint of
`grace_edit` takes, in the dtype that vLLM serves. Not seen: what is done to the weights after
loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...adaptor.fingerprint import fingerprint_of, sample


class Unreadable(Exception):
    """What a checkpoint holds cannot be told."""


class Checkpoint:
    """Read the checkpoint of an engine's model.

    Args:
        config: a `VllmConfig`.

    Raises:
        Unreadable: its format or its names are unknown here.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        model_config = config.model_config
        if model_config.quantization is not None:
            raise Unreadable(f"its weights are quantised ({model_config.quantization})")
        dtype = model_config.dtype
        try:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(
                    model_config.hf_config, trust_remote_code=model_config.trust_remote_code
                )
        except Exception as error:  # whatever a model's own code raises
            raise Unreadable(f"transformers does not know its class ({error})") from error
        self.model_class = type(skeleton).__name__
        self._names = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
        self._same = _shared_names(skeleton)
        self._found: dict[str, tuple[tuple[int, ...], torch.dtype, bytes]] = {}
        self._embeddings: Tensor | None = None
        wanted = _name_of(skeleton, skeleton.get_input_embeddings())
        for name, weight in _weights(config):
            self._found[name] = (tuple(weight.shape), dtype, sample(weight, dtype))
            if name == wanted:
                self._embeddings = weight.to(device="cpu", dtype=dtype, copy=True)

    def fingerprint(self, layer: str) -> dict[str, str]:
        """Return the fingerprint of the model, see `adaptor.fingerprint`.

        Raises:
            Unreadable: parameters of the model are not in the checkpoint by their names.
        """
        missing = [name for name in self._names if self._known_as(name) is None]
        if missing:
            raise Unreadable(f"it has no {missing[0]} (and {len(missing) - 1} more)")
        parameters = ((name, *self._found[self._known_as(name) or ""]) for name in self._names)
        return fingerprint_of(parameters, layer)

    def get_input_embeddings(self) -> Any:
        """Return what holds the input embeddings as `.weight [V, E]`, as of a model.

        Raises:
            Unreadable: they are not in the checkpoint by their name.
        """
        if self._embeddings is None:
            raise Unreadable("it has no input embeddings by the name that transformers has")
        return SimpleNamespace(weight=self._embeddings)

    def _known_as(self, name: str) -> str | None:
        return next((one for one in (name, *self._same.get(name, ())) if one in self._found), None)


def _weights(config: Any) -> Iterator[tuple[str, Tensor]]:
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(config.load_config)
    if not hasattr(loader, "get_all_weights"):
        raise Unreadable(f"load_format {config.load_config.load_format!r} does not list its names")
    yield from loader.get_all_weights(config.model_config, nn.Module())


def _shared_names(skeleton: nn.Module) -> dict[str, list[str]]:
    """Return the other names of each parameter that has several."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in by_tensor.values()
        for name in names
        if len(names) > 1
    }


def _name_of(skeleton: nn.Module, module: nn.Module) -> str:
    return next(f"{name}.weight" for name, one in skeleton.named_modules() if one is module)
