"""Continuous batching of transformers: `generate_batch`, and what `transformers serve` runs.

Each object of a manager that has to know of edits changes its class, as a model's do in `attach`:

* the queue of requests, where each is answered by its text, or told to ask, as it is added;
* the state of a request, which carries that through whatever happens to it;
* the sets of inputs, which hand the rows of a batch to the model's forward;
* the cache of keys and values, which shares between requests what no edit has changed.

The logits processors, which could carry the rows too, are not touched: they skip requests that get
no token from a batch, which is where the prompt of a request may end that is computed again.

None of this is a public interface of transformers. What is relied on is looked for first, and a
manager that lacks something is refused with its name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .adaptor import GraceAdaptor
from .packed import Asked, PackedRows

PLAN = "grace_plan"
"""The argument of a forward that carries its `PackedPlan`."""

_WARMUP = "__warmup_"  # how transformers names the requests that it makes up


class GraceManager:
    """Mixin of a `ContinuousBatchingManager`."""

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()  # type: ignore[misc]
        _follow_processor(processor, self.model)  # type: ignore[attr-defined]
        return processor


class GraceRequests:
    """Mixin of its queue of requests, in whose `put` they are admitted."""

    grace_model: Any

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        if item is not None:
            _need(item, "a request", "initial_tokens", "position_offset", "request_id")
            _need_method(item, "a request", "create_equivalent_initial_request")
            item.grace = _admit(self.grace_model.__dict__.get("grace"), item.initial_tokens)
            _swap(item, GraceRequest)
        super().put(item, *args, **kwargs)  # type: ignore[misc]


class GraceRequest:
    """Mixin of the state of a request."""

    grace: Asked

    def create_equivalent_initial_request(self) -> Any:
        # What was generated counts as prompt of the request that takes this one's place.
        request = super().create_equivalent_initial_request()  # type: ignore[misc]
        request.grace = self.grace
        return _swap(request, GraceRequest)


class GraceInputs:
    """Mixin of a set of inputs, on the host or on the device."""

    grace_model: Any
    grace_batch: list[tuple[Asked, int, int]]
    grace_rows: PackedRows | None
    grace_plan: Any
    grace_recorded: tuple[int, ...]
    grace_replayed: bool

    def prepare_batch_tensors(self: Any, requests_in_batch: Any, *args: Any, **kwargs: Any) -> None:
        # Before it runs: it advances the positions.
        self.grace_batch = [_piece(future) for future in requests_in_batch]
        super().prepare_batch_tensors(requests_in_batch, *args, **kwargs)  # type: ignore[misc]
        self.grace_fill(self.grace_batch, self.compute_stream)

    def _transfer_inputs(self: Any, other: Any, stream: Any, *args: Any, **kwargs: Any) -> None:
        super()._transfer_inputs(other, stream, *args, **kwargs)  # type: ignore[misc]
        other.grace_fill(self.grace_batch, stream)

    def get_model_kwargs(self: Any, use_padding: bool = False) -> Any:
        kwargs = super().get_model_kwargs(use_padding=use_padding)  # type: ignore[misc]
        adaptor: GraceAdaptor | None = self.grace_model.__dict__.get("grace")
        if adaptor is None:
            return kwargs
        if kwargs.get("attention_mask") is not None:
            # transformers writes it into the model's configuration for the time of the forward,
            # where a forward of another thread (a proof of an edit, say) would attend to what comes
            # after, and might leave it there. A mask says all of it.
            kwargs.pop("is_causal", None)
        assert self.grace_rows is not None
        self.grace_plan = kwargs[PLAN] = self.grace_rows.plan(
            kwargs["input_ids"].shape[1],
            reads=adaptor.query == "last",
            sequences=kwargs["logits_indices"].shape[0] if use_padding else None,
        )
        return kwargs

    def get_graph(self: Any, *args: Any, **kwargs: Any) -> Any:
        adaptor: GraceAdaptor | None = self.grace_model.__dict__.get("grace")
        recorded = (id(self.grace_rows), *_tensors_of(adaptor))
        if recorded != self.grace_recorded:
            # The codebook has grown, say: a graph would go on reading what it was.
            self.graphs, self.grace_recorded = type(self.graphs)(), recorded
        graph = super().get_graph(*args, **kwargs)  # type: ignore[misc]
        self.grace_replayed = graph is not None
        return graph

    def retrieve_device_outputs(self: Any) -> None:
        self.grace_latch(self.compute_stream)
        super().retrieve_device_outputs()  # type: ignore[misc]

    def grace_fill(self: Any, batch: list[tuple[Asked, int, int]], stream: Any) -> None:
        """Take the rows of a batch, if this set is what the device reads."""
        adaptor: GraceAdaptor | None = self.grace_model.__dict__.get("grace")
        if adaptor is None or self.grace_rows is None:
            return
        values = adaptor.codebook.values
        if not self.grace_rows.fits(values):
            self.grace_rows = _rows_for(self, adaptor)
        with _on(stream):
            self.grace_rows.fill(batch)

    def grace_latch(self: Any, stream: Any) -> None:
        """Latch what the batch that runs on `stream` has answered.

        Raises:
            RuntimeError: its forward did not come by the wrapped layer.
        """
        plan, self.grace_plan = self.grace_plan, None
        replayed, self.grace_replayed = self.grace_replayed, False
        if plan is None:
            return
        if not (plan.empty or plan.reached or replayed):
            raise RuntimeError(
                "the model's forward, or that of its wrapped layer, was replaced after attaching "
                "by one that does not call it, so requests would go unedited; replace it before "
                "attaching"
            )
        with _on(stream):
            self.grace_rows.latch(lambda: None if stream is None else stream.record_event())


class GraceInputPairs:
    """Mixin of the two pairs of sets of inputs of asynchronous batching."""

    def retrieve_device_outputs(self: Any) -> None:
        # Before it runs: it turns to the other pair.
        self.io_pairs[self.current_pair].device_io.grace_latch(self.compute_stream)
        super().retrieve_device_outputs()  # type: ignore[misc]


class GraceCache:
    """Mixin of the cache of keys and values, whose full blocks requests share by their tokens.

    A row that was replaced changes the keys and values of its position and of all behind it, in the
    layers above. Such blocks are no other request's, so nothing that is shared depends on an edit,
    and none has to be thrown away when edits change. A request takes shared blocks up to where its
    own answer may change them.
    """

    grace_scheduler: Any

    def search_prefix_match(self: Any, request_id: str, prompt_ids: list[int]) -> int:
        state = self.grace_scheduler.waiting_requests.get(request_id)
        asked: Asked | None = getattr(state, "grace", None)
        if asked is None:
            return 0
        if asked.unedited is not None:
            # It matches whole blocks of all tokens but the last.
            prompt_ids = prompt_ids[: asked.unedited + 1]
        found: int = super().search_prefix_match(request_id, prompt_ids)  # type: ignore[misc]
        return found

    def mark_complete_blocks(self: Any, state: Any, complete_blocks: dict[str, int]) -> None:
        asked: Asked | None = getattr(state, "grace", None)
        if complete_blocks and (asked is None or asked.unedited is not None):
            unedited = 0 if asked is None else asked.unedited
            complete_blocks = {
                name: number
                for name, complete in complete_blocks.items()
                if (number := min(complete, self._grace_room(name, state, unedited))) > 0
            }
        super().mark_complete_blocks(state, complete_blocks)  # type: ignore[misc]

    def _grace_room(self: Any, name: str, state: Any, unedited: int) -> int:
        """Return how many more blocks of a request may be shared."""
        allocator = self.cache_allocators[name]
        blocks = allocator.block_table.get(state.request_id, [])
        shared = sum(block in allocator.ledger.block_to_hash for block in blocks)
        return int(unedited // allocator.tokens_per_page) - shared


def check_served(adaptor: GraceAdaptor) -> None:
    """Refuse an adaptor that requests in pieces cannot be answered by.

    Raises:
        ValueError: naming what can be.
    """
    if adaptor.others:
        raise ValueError(
            "continuous batching serves the edits of one layer, got a model with adaptors in "
            f"{1 + len(adaptor.others)}; use generate"
        )
    if adaptor.query == "text" or (adaptor.query == "last" and adaptor.replace == "last"):
        return
    raise ValueError(
        'continuous batching computes prompts in pieces: it needs query="text", or query="last" '
        f'with replace="last", got query={adaptor.query!r} and replace={adaptor.replace!r}; '
        "use generate"
    )


def follow(manager: Any, model: Any) -> None:
    """Have `manager` serve `model` with its edits, whatever adaptor it carries from now on.

    Args:
        manager: a `ContinuousBatchingManager` of the model.
        model: as `attach` left it.

    Raises:
        RuntimeError: transformers has another continuous batching than the one known here.
        ValueError: tensor parallelism.
    """
    if isinstance(manager, GraceManager):
        return
    _need(manager, "the manager", "model", "input_queue", "distributed_helper")
    _need_method(manager, "the manager", "_create_batch_processor")
    _need_method(manager.input_queue, "the manager's queue", "put", "item")
    if manager.model is not model:
        raise ValueError("manager must be one of this model, got that of another one")
    size = getattr(manager.distributed_helper, "tp_size", 1)
    if size != 1:
        raise ValueError(f"an edited model must not be split over devices, got tp_size={size}")
    manager.input_queue.grace_model = model
    _swap(manager.input_queue, GraceRequests)
    _swap(manager, GraceManager)
    processor = getattr(manager, "batch_processor", None)
    if processor is not None:
        _follow_processor(processor, model)


def _follow_processor(processor: Any, model: Any) -> None:
    if isinstance(processor.cache, GraceCache):
        return
    cache, inputs = processor.cache, processor.inputs_and_outputs
    _need(processor.scheduler, "the scheduler", "waiting_requests")
    _need(cache, "the cache", "cache_allocators", "max_batch_tokens")
    for allocator in cache.cache_allocators.values():
        _need(allocator, "the cache's allocator", "block_table", "ledger", "tokens_per_page")
        _need(allocator.ledger, "its ledger", "block_to_hash")
    _need_method(cache, "the cache", "search_prefix_match", "request_id", "prompt_ids")
    _need_method(cache, "the cache", "mark_complete_blocks", "state", "complete_blocks")
    pairs = getattr(inputs, "io_pairs", None)
    if pairs is None:
        _follow_inputs(inputs, model, cache, reads=True)
    else:
        _need(inputs, "the inputs", "current_pair", "compute_stream")
        _need_method(inputs, "the inputs", "retrieve_device_outputs")
        for pair in pairs:
            _need(pair, "a pair of inputs", "host_io", "device_io")
            _follow_inputs(pair.host_io, model, cache, reads=False)
            _follow_inputs(pair.device_io, model, cache, reads=True)
        _swap(inputs, GraceInputPairs)
    cache.grace_scheduler = processor.scheduler
    _swap(cache, GraceCache)


def _follow_inputs(inputs: Any, model: Any, cache: Any, *, reads: bool) -> None:
    _need(inputs, "the inputs", "cache", "compute_stream", "graphs", "max_requests_per_batch")
    _need_method(inputs, "the inputs", "prepare_batch_tensors", "requests_in_batch")
    _need_method(inputs, "the inputs", "get_model_kwargs", "use_padding")
    _need_method(inputs, "the inputs", "_transfer_inputs", "other", "stream")
    _need_method(inputs, "the inputs", "retrieve_device_outputs")
    _need_method(inputs, "the inputs", "get_graph")
    inputs.grace_model, inputs.grace_batch, inputs.grace_plan = model, [], None
    inputs.grace_recorded, inputs.grace_replayed = (), False
    inputs.grace_rows = _rows_for(inputs, model.__dict__["grace"]) if reads else None
    _swap(inputs, GraceInputs)


def _rows_for(inputs: Any, adaptor: GraceAdaptor) -> PackedRows:
    sequences = inputs.max_requests_per_batch
    tokens = sequences if adaptor.replace == "last" else inputs.cache.max_batch_tokens
    return PackedRows(sequences, max(tokens, sequences), adaptor.codebook.values)


def _admit(adaptor: GraceAdaptor | None, prompt: list[int]) -> Asked:
    """Say what a request asks that is added now, by this thread."""
    if adaptor is None or not adaptor.active:
        return Asked(len(prompt), "last", edited=False)
    check_served(adaptor)
    if adaptor.plan is not None:
        raise ValueError(
            "requests must be added outside editor.plan(...): a plan names the rows of a single "
            "forward, and each batch is planned by itself"
        )
    answer = adaptor.answer([prompt]) if adaptor.reads_text else None
    # The witness of the thread that adds a request is the request's.
    told = {"answer": answer, "witness": adaptor.witness}
    return Asked(len(prompt), adaptor.replace, edited=True, **told)


def _piece(future: Any) -> tuple[Asked, int, int]:
    """Return what a request of a batch asks, how much of it was computed and how much is now."""
    _need(future, "a request of a batch", "state", "query_length")
    state, scheduled = future.state, future.query_length
    asked: Asked | None = getattr(state, "grace", None)
    if asked is None:
        if not str(state.request_id).startswith(_WARMUP):
            raise RuntimeError(
                f"request {state.request_id} was added before the model was edited, or past the "
                "manager's queue; make the manager after attaching"
            )
        asked = Asked(0, "last", edited=False)
    return asked, state.position_offset, scheduled


def _tensors_of(adaptor: GraceAdaptor | None) -> tuple[int, ...]:
    if adaptor is None:
        return ()
    book = adaptor.codebook
    sketch = () if book.sketch is None else book.sketch.tensors()
    return tuple(t.data_ptr() for t in (book.keys, book.radii, book.values, book.count, *sketch))


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Run on a stream of the accelerator, None: where things run."""
    if stream is None:
        yield
        return
    with torch.get_device_module(stream.device).stream(stream):
        yield


def _swap(thing: Any, mixin: Any) -> Any:
    """Return `thing` with a class of its own class and `mixin`."""
    if not isinstance(thing, mixin):
        thing.__class__ = _swapped(mixin, thing.__class__)
    return thing


@functools.cache
def _swapped(mixin: Any, base: Any) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})


def _need(thing: Any, what: str, *names: str) -> None:
    for name in names:
        if not hasattr(thing, name):
            raise _unknown(f"{what} ({type(thing).__name__}) has no {name}")


def _need_method(thing: Any, what: str, name: str, *arguments: str) -> None:
    _need(thing, what, name)
    taken = inspect.signature(getattr(thing, name)).parameters
    for argument in arguments:
        if argument not in taken:
            raise _unknown(f"{name} of {what} ({type(thing).__name__}) takes no {argument}")


def _unknown(what: str) -> RuntimeError:
    import transformers

    return RuntimeError(
        f"continuous batching of transformers {transformers.__version__} is none that edits are "
        f"known to work in (5.23 is): {what}; use generate"
    )
