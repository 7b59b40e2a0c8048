"""The five functions of vLLM that are wrapped, in memory; see the room's docstring."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .admission import Admission, check_marks, private_key
from .options import check_engine, read, with_variable
from .worker import attach

_MARK = "_grace_wrapped"


def install() -> None:
    """Wrap them, once in a process.

    Raises:
        RuntimeError: one is not there.
    """
    try:
        from vllm.config import SchedulerConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core import block_pool, kv_cache_utils
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        _wrap(EngineArgs, "create_engine_config", _create_engine_config)
        _wrap(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls)
        _wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
        _wrap(kv_cache_utils, "generate_block_hash_extra_keys", _extra_keys)
        _wrap(block_pool, "generate_block_hash_extra_keys", _extra_keys)
        _add_to_worker(WorkerWrapperBase)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"grace_edit does not know this vLLM ({error}) and could leave edits out unnoticed; "
            "install vllm 0.32, uninstall grace-kernels here, or name other plugins in VLLM_PLUGINS"
        ) from error


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **given: Any) -> Any:
        return wrapper(original, *args, **given)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def _create_engine_config(original: Any, args: Any, *others: Any, **given: Any) -> Any:
    args.additional_config = with_variable(args.additional_config)
    config = original(args, *others, **given)
    if read(config.additional_config) is not None:
        check_engine(config)
    return config


def _preprocess_add_request(original: Any, core: Any, request: Any) -> Any:
    admission: Admission | None = getattr(core.scheduler, "grace", None)
    if admission is not None:
        admission.admit(request)
    return original(core, request)


def _extra_keys(original: Any, request: Any, start: int, end: int, *others: Any) -> Any:
    keys, multimodal = original(request, start, end, *others)
    private = private_key(request.request_id, start, end)
    return ((keys or ()) + private, multimodal) if private else (keys, multimodal)


def _get_scheduler_cls(original: Any, config: Any) -> Any:
    return _telling(original(config))


@functools.cache
def _telling(scheduler: Any) -> Any:
    """Return a scheduler's class that tells the workers with each step what answers it."""

    def init(self: Any, vllm_config: Any, *args: Any, **given: Any) -> None:
        scheduler.__init__(self, vllm_config, *args, **given)
        options = read(vllm_config.additional_config)
        self.grace = None if options is None else Admission(vllm_config, options)
        if options is not None and vllm_config.cache_config.enable_prefix_caching:
            check_marks()

    def schedule(self: Any, *args: Any, **given: Any) -> Any:
        scheduled = scheduler.schedule(self, *args, **given)
        if self.grace is not None:
            scheduled.grace = self.grace.news(scheduled)
        return scheduled

    def shutdown(self: Any, *args: Any, **given: Any) -> Any:
        if getattr(self, "grace", None) is not None:
            self.grace.close()
        return scheduler.shutdown(self, *args, **given)

    own = {"__init__": init, "schedule": schedule, "shutdown": shutdown}
    return type(scheduler.__name__, (scheduler,), own)


def _add_to_worker(wrapper: Any) -> None:
    """Have a model wrapped when it is loaded, and the worker asked by `collective_rpc`."""
    if hasattr(wrapper.__dict__.get("load_model"), _MARK):
        return

    def load_model(self: Any, *args: Any, **given: Any) -> Any:
        loaded = self.worker.load_model(*args, **given)
        self.grace_layer = attach(self.worker)
        return loaded

    def grace_status(self: Any) -> dict[str, Any] | None:
        """Say what the edits of this worker did: layer, version, prompts asked and answered."""
        layer = self.grace_layer
        if layer is None:
            return None
        return {
            "layer": layer.name,
            "query": layer.query,
            "version": layer.version,
            "asked": layer.asked,
            "hits": layer.hits,
        }

    setattr(load_model, _MARK, True)
    wrapper.load_model, wrapper.grace_status = load_model, grace_status
