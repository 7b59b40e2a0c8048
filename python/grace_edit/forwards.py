"""From the arguments of a forward, or of a step of `generate`, to the rows that ask in it.

A later turn of `generate` (a cache that holds tokens already) gives the answers of one without a
cache under `query="last"` and `replace="last"` alone: the rows of what the cache holds cannot be
pooled or replaced any more. It warns where that matters.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .adaptor import Generation, GraceAdaptor
from .positions import QueryPlan, plan_latched, plan_queries


def plan_forward(adaptor: GraceAdaptor, given: dict[str, Any], *, causal: bool) -> QueryPlan | None:
    """Plan a plain forward: without past its whole input is prompt, with past nobody asks.

    Args:
        given: the arguments of the forward by name.
        causal: the model generates, so that left padding without positions is worth a warning.

    Raises:
        ValueError: a packed batch, or a mask that is not `[B, T]`.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None or _cached(given.get("past_key_values")):
        return None
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if given.get("cu_seq_lens_q") is not None:
        raise _packed("cu_seq_lens_q must be None")
    if mask is None:
        # transformers takes sequences apart where the positions start anew.
        plain = positions is not None and positions.ndim == 2
        if plain and _may_look(adaptor, "packed", positions):
            _refuse_restarts(positions)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    elif mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, T] for an edited model, got shape {tuple(mask.shape)}; "
            "name the rows yourself with editor.plan(QueryPlan(...))"
        )
    elif causal and positions is None:
        _warn_left_padding(adaptor, mask)
    return plan_prompts(adaptor, mask.bool(), ids)


def _refuse_restarts(positions: Tensor) -> None:
    if bool((positions.diff(dim=1) < 0).any()):
        raise _packed("position_ids without a mask must ascend within a row")


def _packed(rule: str) -> ValueError:
    return ValueError(
        f"{rule} for an edited model, got a packed batch; name the rows yourself with "
        "editor.plan(QueryPlan(...))"
    )


def _may_look(adaptor: GraceAdaptor, what: str, tensor: Tensor) -> bool:
    """Say whether the host may read `tensor`: always on a CPU, once per adaptor on a GPU.

    Never while compiling or capturing, which it would break.
    """
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type == "cpu":
        return True
    if not tensor.is_cuda or what in adaptor.looked or torch.cuda.is_current_stream_capturing():
        return False
    adaptor.looked.add(what)
    return True


def plan_prompts(
    adaptor: GraceAdaptor,
    mask: Tensor,
    ids: Tensor | None,
    *,
    prompt_len: int | Tensor | None = None,
    computed: int = 0,
    scheduled: int | None = None,
) -> QueryPlan:
    """Plan the queries of `mask [B, L]` the way this adaptor asks (ids `[B, L]` if known)."""
    pool = column = None
    if adaptor.query == "mean":
        pool = torch.ones_like(mask)
        if ids is not None and ids.shape == mask.shape:
            for special in adaptor.special_ids:
                pool = pool & (ids != special)
    elif adaptor.mask_token_id is not None and ids is not None:
        masked = ids == adaptor.mask_token_id
        column = torch.where(masked.any(dim=1), masked.int().argmax(dim=1), -1)
    return plan_queries(
        mask,
        replace=adaptor.replace,
        prompt_len=prompt_len,
        computed=computed,
        scheduled=scheduled,
        query_column=column,
        pool_mask=pool,
    )


def plan_step(
    adaptor: GraceAdaptor, state: Generation, args: Any, kwargs: Any, inputs: dict[str, Any]
) -> QueryPlan | None:
    """Plan one forward of `generate` from what transformers prepared for it."""
    pieces = inputs.get("input_ids")
    pieces = inputs.get("inputs_embeds") if pieces is None else pieces
    assert pieces is not None
    batch, scheduled = pieces.shape[:2]
    cache = inputs.get("past_key_values")
    computed = int(cache.get_seq_length()) if cache is not None else 0
    total = computed + scheduled
    if computed >= state.prompt_len and adaptor.replace != "all":
        return None
    mask = kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < total:
        mask = torch.ones((batch, total), device=pieces.device)
    mask = mask[:, :total].bool()
    if computed >= state.prompt_len or state.index is not None:
        return plan_latched(
            mask, replace=adaptor.replace, prompt_len=state.prompt_len, computed=computed
        )
    # This piece ends before the prompt does (a chunk: the columns still to come hold tokens), with
    # it, or beyond it (assisted generation appends guesses to the prompt).
    coming = mask.new_ones((batch, max(0, state.prompt_len - total)))
    ids = inputs.get("input_ids")
    plan = plan_prompts(
        adaptor,
        torch.cat([mask, coming], dim=1),
        ids if computed == 0 else None,
        prompt_len=state.prompt_len,
        computed=computed,
        scheduled=scheduled,
    )
    plan.latch = cache is None or adaptor.replace == "all"
    return plan


def _cached(past: Any) -> bool:
    if past is None:
        return False
    length = past.get_seq_length() if hasattr(past, "get_seq_length") else len(past)
    return bool(length)


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the columns of the prompt of a `generate` call, what the cache holds included."""
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    length = 1 if ids is None else int(ids.shape[1])
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        length = max(length, int(mask.shape[1]))
    return length


def whole_prefill(adaptor: GraceAdaptor, kwargs: dict[str, Any], default: Any) -> None:
    # Pieces of the prompt that ran before the query is known could not be replaced or pooled.
    sizes = [getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)]
    sizes += [getattr(default, "prefill_chunk_size", None)]
    chunk = next((size for size in sizes if size is not None), None)
    chunk = kwargs.get("prefill_chunk_size", chunk)
    if chunk is not None and (adaptor.replace != "last" or adaptor.query == "mean"):
        warnings.warn(
            f"prefill_chunk_size is ignored: replace={adaptor.replace!r} and "
            f"query={adaptor.query!r} need the whole prompt in one forward",
            stacklevel=3,
        )
        kwargs["prefill_chunk_size"] = None


def warn_later_turn(adaptor: GraceAdaptor, kwargs: dict[str, Any]) -> None:
    if not _cached(kwargs.get("past_key_values")):
        return
    if adaptor.replace != "last" or adaptor.query == "mean":
        warnings.warn(
            f"past_key_values holds earlier tokens: replace={adaptor.replace!r} and "
            f"query={adaptor.query!r} reach the new ones only, so answers may differ from those "
            "without a cache",
            stacklevel=3,
        )


def _warn_left_padding(adaptor: GraceAdaptor, mask: Tensor) -> None:
    if "left padding" in adaptor.warned or not _may_look(adaptor, "left padding", mask):
        return
    if mask.shape[1] and not bool(mask[:, 0].all()):
        adaptor.warned.add("left padding")
        warnings.warn(
            "left padding without position_ids shifts the positions of most causal models, so "
            "edits will not fire; pass position_ids",
            stacklevel=5,
        )
