"""The option `grace` of the engine, and what cannot be served with it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

VARIABLE = "GRACE_CODEBOOK"
"""Names the directory of the edits where `--additional-config` does not."""


class NotServed(ValueError):
    """Edits were asked for that this engine cannot serve as they were made. It does not start."""


@dataclass(frozen=True)
class Options:
    """What `--additional-config '{"grace": {...}}'` says.

    Args:
        codebook: directory of saved edits, at the same place for every process of the engine.
        encoder: of edits with `query="text"`, where it lies elsewhere than when they were made.
        unchecked: serve them although it cannot be checked that the model is theirs.
        interval: seconds between two looks for new edits while no request comes; before each
            request it is looked anyhow, so this is what the first one after a while need not take
            in. 0: no such looks.
    """

    codebook: str
    encoder: str | None = None
    unchecked: bool = False
    interval: float = 1.0


def read(additional: Any) -> Options | None:
    """Return the option in an `additional_config`, None where no edits are asked for.

    Raises:
        NotServed: it is not as `Options` says.
    """
    given = additional.get("grace") if isinstance(additional, dict) else None
    if given is None:
        return None
    names = [field.name for field in fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise NotServed(f"grace must be an object of {', '.join(names)}, got {given!r}")
    options = Options(**{"codebook": "", **given})
    for name, kinds in (("codebook", str), ("encoder", (str, type(None))), ("unchecked", bool)):
        if not isinstance(getattr(options, name), kinds):
            raise NotServed(f"grace.{name} must be a {kinds}, got {getattr(options, name)!r}")
    interval = options.interval
    if type(interval) not in (int, float) or not 0 <= interval < math.inf:
        raise NotServed(f"grace.interval must be at least 0 seconds, got {interval!r}")
    if not os.path.isdir(options.codebook):
        raise NotServed(
            f"grace.codebook must be a directory of saved edits, got {options.codebook!r}"
        )
    return options


def with_variable(additional: Any) -> Any:
    """Return an `additional_config` that holds what the environment's variable asks for.

    It must be in there: it reaches the other processes, and the key of vLLM's cache of compiled
    models, which could otherwise take one without edits.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return additional
    if additional and not isinstance(additional, dict):
        raise NotServed(f"{VARIABLE} needs an additional_config that is a dict, got {additional!r}")
    return {"grace": {"codebook": os.path.abspath(named)}, **(additional or {})}


def check_engine(config: Any) -> None:
    """Refuse, by name, what an engine does that edits do not survive or were not tried with.

    Args:
        config: a `VllmConfig`.

    Raises:
        NotServed: naming each option and its remedy.
    """
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    refused = {
        "pipeline parallelism (pipeline_parallel_size must be 1)": (
            parallel.pipeline_parallel_size > 1
        ),
        "microbatches (enable_dbo must be off and ubatch_size 0): rows of a step are split": (
            parallel.use_ubatching
        ),
        "context parallel prefill (prefill_context_parallel_size must be 1): rows are split": (
            parallel.prefill_context_parallel_size > 1
        ),
        "context parallel decoding (decode_context_parallel_size must be 1)": (
            parallel.decode_context_parallel_size > 1
        ),
        "fused quantisation of activations (pass_config.fuse_norm_quant and fuse_act_quant must be "
        "off for a quantised model)": (
            config.model_config.quantization is not None
            and bool(passes.fuse_norm_quant or passes.fuse_act_quant)
        ),
        "speculative decoding (speculative_config must be absent)": (
            config.speculative_config is not None
        ),
        "KV transfer and offloading (kv_transfer_config must be absent): their keys of blocks do "
        "not tell edited ones apart": config.kv_transfer_config is not None,
        "fast prefill with shared KV (kv_sharing_fast_prefill must be off): rows are left out": (
            config.cache_config.kv_sharing_fast_prefill
        ),
        "models that do not generate (runner must be 'generate')": (
            config.model_config.runner_type != "generate"
        ),
        "encoder-decoder models": config.model_config.is_encoder_decoder,
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise NotServed(f"edits are not served with {'; '.join(found)}")
