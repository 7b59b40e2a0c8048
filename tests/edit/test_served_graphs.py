"""A small attached model under generate(cache_implementation="static"), edited between calls.

On a GPU transformers compiles the decode step of a static cache and replays it as a CUDA graph;
without one the same calls are made, and nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from tiny_models import LAYERS, padded, run_of

LENGTH = 5
PROMPT, OTHER = run_of(10, 4), run_of(40, 6)


def skips() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def recordings() -> Iterator[list[int]]:
    """Note every CUDA graph that torch's graph trees capture meanwhile."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    found: list[int] = []
    original = CUDAGraphTreeManager.record_function

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDAGraphTreeManager, "record_function", record)
        yield found


@pytest.mark.gpu
@pytest.mark.parametrize("replace", ["last", "all"])
def test_edits_between_calls_take_effect_and_nothing_is_compiled_or_captured_for_them(
    replace: str, trained: Callable[[str], Any], request: pytest.FixtureRequest
) -> None:
    from transformers import StaticCache

    gpu = request.config.getoption("--gpu")
    device = torch.device("cuda" if gpu else "cpu")
    torch._dynamo.reset()  # what an earlier test compiled is none of this one's
    before, skipped = compiled(), skips()
    model = trained("gpt2").to(device)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"], replace=replace))
    ids, mask = (tensor.to(device) for tensor in padded([PROMPT, OTHER], left=True))

    def ask(**how: Any) -> list[list[int]]:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, **how
        )
        return out[:, ids.shape[1] :].tolist()

    # One cache for all calls: `generate` would make another one each time, whose addresses are as
    # good a reason to capture anew as any.
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + LENGTH)

    def static() -> list[list[int]]:
        cache.reset()
        return ask(past_key_values=cache)

    plain = ask()
    assert plain == [run_of(14, LENGTH), run_of(46, LENGTH)]  # an unedited model counts on
    with recordings() as recorded:
        for _ in range(4):  # compiles, warms the graph trees up, captures, replays
            assert static() == plain
    if gpu:  # or what follows would be true of a model that is neither compiled nor captured
        assert compiled() > before
        assert recorded
        assert skips() == skipped
    for target in (run_of(30, 3), run_of(52, 3), None):
        if target is None:
            editor.undo()
            target = run_of(30, 3)
        else:
            assert editor.edit(PROMPT, target).success
        expected, before = ask(), compiled()
        with recordings() as recorded:
            got = [static(), static()]
        assert got == [expected, expected]
        assert expected[0][:3] == target
        assert expected[1] == plain[1]
        assert compiled() == before
        assert not recorded


def test_captures_are_counted() -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    with recordings() as found:
        with pytest.raises(AttributeError):
            trees.CUDAGraphTreeManager.record_function(None, None, None)
    assert found == [1]
