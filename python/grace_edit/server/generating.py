"""transformers' handlers of OpenAI's protocol, on one edited model that is there already.

What differs from `transformers serve`: the model is never loaded or unloaded, each reply is stamped
with what answered it (a stream too: its headers wait until its prompt was answered), a request is
refused with a rule in place of an error of the server, and one whose client has left ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..families import Family
from .answering import Trace, current
from .batching import Batches, fit, is_greedy
from .checking import check_request


class OneModel(ModelManager):
    """Gives every request the one model.

    Args:
        family: of the attached model.
        name: what clients call it.
    """

    def __init__(self, family: Family, name: str) -> None:
        super().__init__(device="cpu")  # where a model would be loaded to; none is
        self.force_model = name
        self._family = family

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is: there are no revisions of it."""
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self._family.model, self._family.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """Return the one model, as `/v1/models` lists it."""
        return [{"id": self.force_model, "object": "model", "owned_by": "grace", "created": 0}]

    def shutdown(self) -> None:
        """Leave the model, which is the caller's."""


class _Gone(StoppingCriteria):
    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._trace.gone, device=input_ids.device)


class Generations(GenerateManager):
    """Generates one request after the other, each with its trace as the thread's witness."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **given: Any
    ) -> Any:
        fit(self._family.longest, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, **given)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        fit(self._family.longest, inputs, gen_config)
        return await super().generate_non_streaming(
            model, processor, inputs, gen_config, request_id
        )

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand over a generation that streams."""
        trace = current()
        trace.submitted = True
        return super().submit(self._traced, trace, fn, args, kwargs)

    def async_submit(
        self, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> asyncio.Future[Any]:
        """Hand over a generation that does not stream."""
        trace = current()
        trace.submitted = True
        kwargs["stopping_criteria"] = StoppingCriteriaList([_Gone(trace)])
        return super().async_submit(self._traced, trace, fn, args, kwargs)

    def _traced(self, trace: Trace, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        error: BaseException | None = None
        try:
            if trace.gone:
                raise ClientLeft
            with self._family.working(), self._family.adaptor.using(witness=trace.see):
                return fn(*args, **kwargs)
        except BaseException as raised:
            error = raised
            raise
        finally:
            trace.end(error)


class ClientLeft(Exception):
    """A request was not begun, as its client had left."""


class Generator(GenerationState):
    """Holds what generates for the one model, one by one and in batches.

    Args:
        family: of the attached model.
        batches: None: one request after the other.
    """

    def __init__(self, family: Family, batches: Batches | None) -> None:
        super().__init__()
        self._generations, self._cb_manager = Generations(family), batches
        if batches is not None:
            batches.init_cb(family.model, None)

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """Say whether the request that is being handled is generated in batches."""
        return self._cb_manager is not None and is_greedy(current().body, model.generation_config)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return what generates."""
        return self._cb_manager if use_cb else self._generations


async def stamped(kind: str, handle: Callable[..., Any], body: dict[str, Any], id: str) -> Any:
    """Check a request, have it handled, and return the reply once it is known what answers it.

    Args:
        kind: "chat", "completion" or "response".
        handle: the handler's method.

    Raises:
        HTTPException: 400, with the rule that the request breaks.
    """
    check_request(kind, body)
    trace = current()
    trace.body = body
    try:
        reply = await handle(body, id)
    except HTTPException:
        raise
    except Exception as error:
        if trace.submitted:
            raise
        # Nothing was generated yet: templates and transformers' own readers say what they miss.
        raise HTTPException(400, f"the request must be one that can be read: {error}") from error
    if isinstance(reply, JSONResponse):
        content = json.loads(bytes(reply.body))
        return JSONResponse({**content, "grace": trace.fields()}, reply.status_code)
    await trace.known()
    if trace.answered is None and trace.error is not None and not trace.gone:
        raise RuntimeError(f"generation failed: {trace.error}") from trace.error
    return reply


def handlers(family: Family, name: str, batches: Batches | None) -> dict[str, Any]:
    """Return what `transformers.cli.serving.server.build_server` takes, for one model."""
    manager, state = OneModel(family, name), Generator(family, batches)
    return {
        "model_manager": manager,
        "chat_handler": ChatCompletionHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
        "generation_state": state,
    }
