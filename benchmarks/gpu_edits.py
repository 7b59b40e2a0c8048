"""Edits per second on a GPU: one by one, and all in one batch.

The model has the shape of SmolLM2-135M (Llama, 30 layers, 576 wide) and random weights: nothing is
fetched. A prompt has four to seven tokens and a target one, and the edited layer is the 24th, as in
the study of SmolLM2. Both ways make the same edits on a copy of their own.

At this size a GPU waits for the host that starts its kernels. The note says how many operators of
torch an edit took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from grace_edit import GraceConfig, GraceEditor
from torch.utils._python_dispatch import TorchDispatchMode

from .gpu import LATE, device_of
from .measurements import Measurement, Progress, Settings
from .model import shared

TOGETHER = 64
ONE_BY_ONE, BATCH = "GraceEditor.edit", "GraceEditor.edit_batch"
_SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 512}
_SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
_LOGITS = 32.0  # up to about this; with weights of the usual size none could lead by the margin

Pair = tuple[list[int], list[int]]


class Counted(TorchDispatchMode):
    """Counts the operators that run inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def model_of(small: bool) -> Any:
    """Return the model, on the CPU; its weights are the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    if small:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    sizes = _SMALL if small else _SMOLLM2
    spread = _LOGITS / sizes["hidden_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, **heads, **ends, initializer_range=spread)
        return LlamaForCausalLM(config).eval()


def pairs_of(count: int, vocabulary: int) -> list[Pair]:
    """Return prompts and targets, token ids."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(10, vocabulary, (count, 8), generator=source).tolist()
    return [(row[: 4 + n % 4], [row[7]]) for n, row in enumerate(ids)]


def run(settings: Settings, progress: Progress) -> Iterator[Measurement]:
    """Measure both ways; a rehearsal makes few edits of a small model."""
    device, small = device_of(settings), settings.device != "cuda"
    about = {"part": "edits", "device": settings.device, "data": "SmolLM2's shape, random"}
    about |= {"dtype": "fp32", "batch": 8 if small else TOGETHER, "unit": "edits/s"}
    if time.monotonic() > settings.until:
        yield Measurement(**about, name="all", answers="absent", note=LATE)
        return
    try:
        model = model_of(small).to(device)
    except ModuleNotFoundError as error:  # transformers is nothing that the operators need
        yield Measurement(**about, name="all", answers="absent", note=str(error))
    else:
        yield from _ways(about, model, progress)


def _ways(about: dict[str, Any], model: Any, progress: Progress) -> Iterator[Measurement]:
    layer = f"model.layers.{model.config.num_hidden_layers * 4 // 5}.mlp"
    count = about["batch"]
    pairs = pairs_of(3 * count, model.config.vocab_size)
    warm, counted, timed = pairs[:count], pairs[count : 2 * count], pairs[2 * count :]
    ways: dict[str, Callable[[GraceEditor, Sequence[Pair]], list[Any]]] = {
        ONE_BY_ONE: lambda editor, some: [editor.edit(*pair) for pair in some],
        BATCH: lambda editor, some: editor.edit_batch(some),
    }
    for done, (name, make) in enumerate(ways.items()):
        progress(done, len(ways))
        editor = GraceEditor(shared(model), None, GraceConfig(layer=layer))
        # What is tried once, and what kernels are loaded for, is neither counted nor timed.
        make(editor, warm if name == BATCH else warm[:2])
        some = counted if name == BATCH else counted[:4]
        with Counted() as operators_of:
            make(editor, some)
        operators = operators_of.count / len(some)
        yield Measurement(**about, name=name, **_timed(editor, make, timed, operators))
    progress(len(ways), len(ways))


def _timed(
    editor: GraceEditor,
    make: Callable[[GraceEditor, Sequence[Pair]], list[Any]],
    pairs: Sequence[Pair],
    operators: float,
) -> dict[str, Any]:
    """Return the columns of edits that are made once."""
    start = time.perf_counter()
    results = make(editor, pairs)
    if editor.codebook.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    refused = sum(not result.success for result in results)
    steps = sum(result.steps for result in results) / len(results)
    note = f"{steps:.1f} training steps and {operators:.0f} operators an edit"
    if refused:
        note += f"; {refused} of {len(results)} refused"
    return {
        "width": editor.codebook.keys.shape[1],
        "median": len(pairs) / seconds,
        "answers": "wrong" if refused else "",
        "note": note,
    }
