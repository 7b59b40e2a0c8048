"""Where vLLM finds the plugin of `grace_edit`.

A module of its own that imports nothing: vLLM logs a plugin whose module cannot be imported, and
goes on without it. What `register` raises stops the engine, so edits are never left out that way.
"""


def register() -> None:
    """Set the plugin into vLLM; called by vLLM in each of its processes."""
    from grace_edit.engines.vllm import register as into_vllm

    into_vllm()
