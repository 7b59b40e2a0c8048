"""Saved edits inside vLLM (0.32), without a fork and without a patched file.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. That puts
a wrapper round five functions of vLLM, which do nothing where no edits are asked for:

    EngineArgs.create_engine_config   front end: the option, and what cannot be served with it
    SchedulerConfig.get_scheduler_cls engine core: a scheduler that tells the workers what answers
    EngineCore.preprocess_add_request engine core: each request is looked at before it is queued
    generate_block_hash_extra_keys    engine core: what the prefix cache may share
    WorkerWrapperBase.load_model      worker: the layer is wrapped as soon as it is loaded

The engine core reads the saved edits and looks at them again before each request, so a request that
is admitted after a save is answered with it. With `query="text"` it also finds the answer, from the
ids of the prompt, and the value travels to the workers with the request. With `query="last"` it
sends them what has changed, and the wrapped layer looks the prompt's last token up.
"""

from __future__ import annotations


def register() -> None:
    """Set the wrappers into vLLM. A second call does nothing.

    Raises:
        RuntimeError: this vLLM lacks one of the functions, so edits could be left out unnoticed.
    """
    from .seams import install

    install()
