"""Continuous batching of transformers for the requests that it answers as `generate` would.

Its manager has one way of choosing tokens for all requests, so those that are to be chosen greedily
are batched, and the others are generated one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import CBGenerateManager

from ..adaptor.continuous import check_served
from ..families import Family
from .answering import current

_PAGE = 16
"""Tokens of a block of keys and values. Requests share whole blocks alone, and what chats have in
common, the system's message, is short."""

_TOKENS = 16384
"""Tokens whose keys and values are kept on a CPU, whose memory belongs to others too. Of a GPU's
transformers takes most."""


def why_not_batched(family: Family) -> str | None:
    """Say why a model cannot be served in batches; None: it can."""
    model: Any = family.model
    try:
        check_served(family.adaptor)
    except ValueError as error:
        return str(error)
    if not hasattr(model, "init_continuous_batching"):
        return f"transformers has none for {type(model).__name__}"
    attention = getattr(model.config, "_attn_implementation", None)
    if attention != "sdpa":
        # Another one is exchanged for the time of batching, under edits and explanations too.
        return f"the model's attention must be sdpa, got {attention}"
    config = model.generation_config
    for name, plain in (("num_beams", 1), ("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0)):
        if getattr(config, name, None) not in (None, plain):
            return f"{name} of the model's generation_config must be {plain}"
    return None


class Batches(CBGenerateManager):
    """Generates requests in common batches, each with its own witness.

    Args:
        family: of the attached model, for which `why_not_batched` says nothing.
    """

    def __init__(self, family: Family) -> None:
        model: Any = family.model
        device = next(model.parameters()).device.type
        given: dict[str, Any] = {}
        self._longest = family.longest
        if device == "cpu":
            kept = min(_TOKENS, 64 * family.longest)
            given = {"page_size": _PAGE, "num_blocks": -(-kept // _PAGE), "max_batch_tokens": 512}
            self._longest = min(family.longest, kept)
        if family.adaptor.text is None:
            given["use_cuda_graph"] = False  # a graph that is replayed tells nobody what answered
        super().__init__(ContinuousBatchingConfig(auto_switch_to_flash=False, **given))
        self._family = family
        self._greedy = GenerationConfig.from_dict(
            {**model.generation_config.to_dict(), "do_sample": False, "use_cache": False}
        )

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Start the manager, once; what a request wants goes with the request."""
        if self._cb is None:
            super().init_cb(model, self._greedy)
            self._cb: Any = _Told(self._cb, self._family)

    def generate_streaming(  # what is checked is the same as in `Generations`
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **given: Any
    ) -> Any:
        fit(self._longest, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, **given)
        current().at_leaving(streamer.cancel)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        fit(self._longest, inputs, gen_config)
        trace = current()
        work = asyncio.ensure_future(
            super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        )
        trace.at_leaving(lambda: self._cb.cancel_request(request_id))
        left = asyncio.ensure_future(trace.left())
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(499, "the client has left")
            return work.result()
        finally:
            left.cancel()
            work.cancel()  # a request that was cancelled is told of by nobody

    def stop(self) -> None:
        """End the generations, those in the midst too."""
        if self._cb is not None:
            self._cb.stop(block=True, timeout=10, hard_stop=True)


class _Told:
    """A manager whose requests have the witness of the HTTP request that they belong to.

    A request is added once there is somebody to take what it says: transformers adds a streamed one
    before, and what is said in between would be lost.
    """

    def __init__(self, manager: Any, family: Family) -> None:
        self._manager, self._family = manager, family
        self._taken: set[str] = set()
        self._held: dict[str, Callable[[], None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def add_request(self, input_ids: list[int], *, request_id: str, **given: Any) -> str:
        trace = current()

        def add() -> None:
            with self._family.adaptor.using(witness=trace.see):
                done = self._manager.add_request(input_ids, request_id=request_id, **given)
            if done is None:
                raise HTTPException(503, "the server takes no more requests: it stops")
            trace.submitted = True

        if request_id in self._taken:
            add()
        else:
            self._held[request_id] = add
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        trace = current()
        self._taken.add(request_id)

        def told(output: Any) -> None:
            if output.error is not None:
                trace.end(RuntimeError(output.error))
            elif output.is_finished():
                trace.end()
            callback(output)

        trace.at_leaving(lambda: self._forget(request_id))
        self._manager.register_result_handler(request_id, told)
        add = self._held.pop(request_id, None)
        if add is not None:
            add()

    def _forget(self, request_id: str) -> None:
        # transformers forgets the takers of what ends, not of what is cancelled.
        self._taken.discard(request_id)
        router = self._manager.output_router
        router.result_handlers.pop(request_id, None)
        while not router.output_queue.empty():  # what came after its taker had gone
            router.output_queue.get_nowait()


def fit(longest: int, inputs: Any, config: Any) -> None:
    """Refuse a prompt that leaves no room for an answer; cut the answer to the room there is.

    Args:
        longest: most tokens of both together.
        inputs: with the prompt's `input_ids`, `[1, T]` or a list.
        config: of the generation.

    Raises:
        HTTPException: 400.
    """
    ids = inputs["input_ids"]
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if not length:
        raise HTTPException(400, "the prompt must have at least one token, got none")
    if length >= longest:
        raise HTTPException(400, f"the prompt must have at most {longest - 1} tokens, got {length}")
    config.max_new_tokens = min(config.max_new_tokens or 1024, longest - length)


def is_greedy(body: dict[str, Any], config: Any) -> bool:
    """Say whether the tokens of a request are chosen as those of all others in the batches.

    Args:
        body: of the request, checked.
        config: the model's generation_config.
    """
    sampled = bool(config.do_sample) and body.get("temperature") != 0
    others = ("frequency_penalty", "stop")
    return not sampled and all(not body.get(name) for name in others)
