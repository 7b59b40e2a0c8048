"""A small attached model under generate(cache_implementation="static"), edited between calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .journal import ROOT, Skipped, Wrong
from .place import Place

LENGTH = 5


def row(place: Place, replace: str) -> dict[str, Any]:
    """Edits made between two calls take effect; nothing is compiled or captured for them.

    On a GPU transformers compiles the decode step of a static cache and replays it as a CUDA graph.
    The model is the tests' GPT-2, trained to count; the tokens expected are those of a plain
    generate with a growing cache, which nothing compiles.

    Args:
        replace: which rows an edit replaces, as in `GraceConfig`.
    """
    for folder in (ROOT / "python", ROOT / "tests" / "edit"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        import tiny_models
        from grace_edit import GraceConfig, GraceEditor
        from transformers import StaticCache
    except ImportError as error:
        raise Skipped(str(error)) from error
    torch._dynamo.reset()  # what an earlier row compiled is none of this one's
    compiled, skips = _compiled(), _skips()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model: Any = tiny_models.train("gpt2")
    finally:
        torch.set_num_threads(threads)
    model = model.to(place.device)
    editor = GraceEditor(
        model, None, GraceConfig(layer=tiny_models.LAYERS["gpt2"], replace=replace)
    )
    run_of = tiny_models.run_of
    prompt, other = run_of(10, 4), run_of(40, 6)
    ids, mask = (t.to(place.device) for t in tiny_models.padded([prompt, other], left=True))

    def ask(**kwargs: Any) -> list[list[int]]:
        out: Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, **kwargs
        )
        return out[:, ids.shape[1] :].tolist()

    # One cache for all calls: `generate` would make another one each time, whose addresses are as
    # good a reason to capture anew as any.
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + LENGTH)

    def static() -> list[list[int]]:
        cache.reset()
        return ask(past_key_values=cache)

    follows = [run_of(14, LENGTH), run_of(46, LENGTH)]
    plain = ask()
    if plain != follows:
        raise Wrong(f"the unedited model must count on, {follows}, got {plain}")
    with _recordings() as recorded:
        for _ in range(4):  # compiles, warms the graph trees up, captures, replays
            if (got := static()) != plain:
                raise Wrong(f"unedited, static cache: {got} for {plain}")
    result: dict[str, Any] = {
        "compiled graphs": _compiled() - compiled,
        "captured graphs": len(recorded),
        "capture skips": _skips() - skips,
    }
    if place.gpu:  # or what follows would be true of a model that is neither compiled nor captured
        if not result["compiled graphs"]:
            raise Wrong(
                "generate compiled nothing: the static cache was not served compiled", result
            )
        if not recorded or result["capture skips"]:
            raise Wrong("the compiled decode step must be captured as a CUDA graph", result)
    checked = 0
    for name, target in (
        ("an edit", run_of(30, 3)),
        ("a second edit", run_of(52, 3)),
        ("undo", None),
    ):
        if target is None:
            editor.undo()
            target = run_of(30, 3)
        else:
            made = editor.edit(prompt, target)
            if not made.success:
                raise Wrong(f"{name} was refused: {made.reason}")
        expected = ask()
        before = _compiled()
        with _recordings() as recorded:
            got = static()
            again = static()
        if got != expected or again != expected or got[0][:3] != target or got[1] != plain[1]:
            raise Wrong(f"after {name}: {got}, {again} for {expected}", result)
        if _compiled() != before:
            raise Wrong(f"after {name} {_compiled() - before} graphs were compiled anew", result)
        if recorded:
            raise Wrong(f"after {name} {len(recorded)} CUDA graphs were captured anew", result)
        checked += 1
    result["changes that took effect"] = checked
    return result


def _skips() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _compiled() -> int:
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def _recordings() -> Iterator[list[int]]:
    """Note every CUDA graph that torch's graph trees capture meanwhile."""
    found: list[int] = []
    try:
        from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

        original = CUDAGraphTreeManager.record_function
    except (ImportError, AttributeError) as error:
        raise Skipped(f"this torch does not let captures be counted: {error}") from error

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return original(self, *args, **kwargs)

    CUDAGraphTreeManager.record_function = record
    try:
        yield found
    finally:
        CUDAGraphTreeManager.record_function = original
