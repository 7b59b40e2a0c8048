"""From the arguments of a forward, or of a step of `generate`, to the rows that ask in it.

A later turn of `generate` (a cache that holds tokens already) gives the answers of one without a
cache under `replace="last"` with `query="last"` or `"text"` alone: the rows of what the cache holds
cannot be pooled or replaced any more. It warns where that matters.

Under `query="text"` a plan comes with its answers: they are looked up here, before the layer runs,
from the ids of the prompts, which a GPU is waited for once per request.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .adaptor import GraceAdaptor
from .positions import (
    Latched,
    LatchedPlan,
    QueryPlan,
    first_column,
    plan_latched,
    plan_queries,
)
from .state import Generation
from .told import PromptEnds
from .torch_private import outside_graphs


def plan_forward(
    adaptor: GraceAdaptor, given: dict[str, Any], *, takes_positions: bool
) -> QueryPlan | None:
    """Plan a plain forward: without past its whole input is prompt, with past nobody asks.

    Inside `editor.prompts(...)` the prompts end where that says, and with past too whose end is in
    this forward asks.

    How much a static cache that was used before holds is known to its device alone, and the host
    does not wait for a GPU: there the device decides whether anybody asks. Compiled or captured, a
    single token is taken for a step of decoding, which runs nothing: not so a prompt of one token,
    which therefore goes unedited there after a `reset` of the cache.

    Args:
        given: the arguments of the forward by name.
        takes_positions: the model generates and takes positions, so that left padding without
            them is worth a warning.

    Raises:
        ValueError: a mask that is not `[B, T]`; a packed batch; past inside `editor.prompts` where
            this adaptor needs the whole prompt in one forward. If its positions alone tell, a CPU
            always sees it and a GPU is asked once per adaptor: after that, and in a compiled
            forward, nobody asks in a row whose positions start anew.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        return None
    past = _length(given.get("past_key_values"))
    ends = adaptor.ends
    if isinstance(past, Tensor) and (ends is not None or _waits_for_nothing(past)):
        past = int(past)
    if isinstance(past, Tensor):
        if tokens.shape[1] == 1 and _recorded(past):
            return None
    elif past > 0:
        if ends is None:
            return None
        _check_pieces(adaptor, ends)
    restarts = None
    mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    if adaptor.at_start and mask is not None and mask.ndim != 2:
        mask = None  # as generate makes it for a static cache, without padding
    if given.get("cu_seq_lens_q") is not None:
        raise _packed("cu_seq_lens_q must be None")
    if mask is None:
        # transformers takes sequences apart where the positions start anew.
        if position_ids is not None and position_ids.ndim == 2:
            restarts = (position_ids.diff(dim=1) < 0).any(dim=1)
            if _may_look(adaptor, "packed", restarts):
                if bool(restarts.any()):
                    raise _packed("position_ids without a mask must ascend within a row")
                restarts = None
        total = tokens.shape[1] + (0 if ends is None else past)
        mask = torch.ones((len(tokens), total), dtype=torch.bool, device=tokens.device)
    elif mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, T] for an edited model, got shape {tuple(mask.shape)}; "
            "name the rows yourself with editor.plan(QueryPlan(...))"
        )
    elif takes_positions and position_ids is None:
        _warn_left_padding(adaptor, mask)
    mask = mask.bool()
    if ends is None:
        start = first_column(mask) + 1 if adaptor.at_start else None
        prompt, plan = mask, plan_prompts(adaptor, mask, ids, prompt_len=start)
    else:
        assert not isinstance(past, Tensor)
        columns = ends.columns(mask, ids)
        prompt = mask & (torch.arange(mask.shape[1], device=mask.device) < columns[:, None])
        plan = plan_prompts(adaptor, mask, ids, prompt_len=columns, computed=past)
        plan.query_row = torch.where(columns > 0, plan.query_row, -1)  # no prompt, no question
    if adaptor.reads_text:
        plan.answers = _answer_forward(adaptor, ids, prompt)
    if isinstance(past, Tensor):
        plan.query_row = torch.where(past.to(mask.device) == 0, plan.query_row, -1)
    if restarts is not None:
        # Or the last sequence would ask for all of them.
        plan.query_row = torch.where(restarts.to(mask.device), -1, plan.query_row)
    return plan


def _check_pieces(adaptor: GraceAdaptor, ends: PromptEnds) -> None:
    if ends.lengths is None or adaptor.query != "last" or adaptor.replace != "last":
        raise ValueError(
            "past_key_values must be empty inside editor.prompts(...), but for lengths under "
            f'query="last" and replace="last"; here query={adaptor.query!r} and '
            f"replace={adaptor.replace!r}, got a forward with past"
        )


@outside_graphs(
    reason='the ids of a prompt must be read before the layer runs under query="text"; to compile '
    "without a break, use generate or editor.plan(QueryPlan(..., answers=editor.answers(prompts)))"
)
def _answer_forward(adaptor: GraceAdaptor, ids: Tensor | None, mask: Tensor) -> Latched:
    if ids is not None and ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            'a captured forward cannot read input_ids, which query="text" needs: run it inside '
            "editor.plan(QueryPlan(..., answers=editor.answers(prompts)))"
        )
    return adaptor.answer(_prompts_of(ids, mask))


def _prompts_of(ids: Tensor | None, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row of `ids [B, T]` that the last T columns of `mask` mark."""
    if ids is None or ids.shape[1] == 0:
        raise ValueError(
            'input_ids must be given under query="text", which reads the prompt, got none'
        )
    there = mask[:, mask.shape[1] - ids.shape[1] :].bool().cpu()
    return [row[marked].tolist() for row, marked in zip(ids.cpu(), there, strict=True)]


def _packed(rule: str) -> ValueError:
    return ValueError(
        f"{rule} for an edited model, got a packed batch; name the rows yourself with "
        "editor.plan(QueryPlan(...))"
    )


def _may_look(adaptor: GraceAdaptor, what: str, tensor: Tensor) -> bool:
    """Say whether the host may read `tensor`: always on a CPU, once per adaptor on a GPU.

    Never while compiling or capturing, which it would break.
    """
    if _waits_for_nothing(tensor):
        return True
    if not tensor.is_cuda or what in adaptor.looked or _recorded(tensor):
        return False
    adaptor.looked.add(what)
    return True


def _waits_for_nothing(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _recorded(tensor: Tensor) -> bool:
    """Say whether what happens to `tensor` is compiled or captured, to be run again later."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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
) -> QueryPlan | LatchedPlan | None:
    """Plan one forward of `generate` from what transformers prepared for it; notes it in `state`.

    Nothing waits for a GPU here: the length of a static cache, which the device counts, is followed
    on the host.
    """
    pieces = inputs.get("input_ids")
    pieces = inputs.get("inputs_embeds") if pieces is None else pieces
    assert pieces is not None
    batch, scheduled = pieces.shape[:2]
    cache = inputs.get("past_key_values")
    computed = _length(cache)
    if isinstance(computed, Tensor):
        # Read once, where generate reads it too, to cut what an earlier turn left off the prompt.
        computed = int(computed) if state.computed is None else state.computed
    total = computed + scheduled
    if state.computed is None and computed == 0 and inputs.get("input_ids") is None:
        # Prompt tuning puts rows of its own before the prompt.
        state.prompt_len = max(state.prompt_len, total)
    state.computed = total
    reads = adaptor.reads_text and not state.answered
    if reads:
        _note_ids(state, args[0] if args else kwargs.get("input_ids"), total)
    if computed >= state.prompt_len and adaptor.replace != "all":
        return None
    if total < state.prompt_len and cache is not None:
        return None  # a chunk before the one that holds the prompt's end
    mask = torch.ones((batch, total), device=pieces.device)
    for known in (kwargs.get("attention_mask"), inputs.get("attention_mask")):
        if known is not None and known.ndim == 2 and known.shape[1] >= total:
            mask = known
            break
    mask = mask[:, :total].bool()
    if reads:
        _answer_generation(adaptor, state, mask)
    if computed >= state.prompt_len or state.answered:
        planned = plan_latched(
            mask, replace=adaptor.replace, prompt_len=state.prompt_len, computed=computed
        )
        return adaptor.thread.pin(planned) if reads and isinstance(planned, QueryPlan) else planned
    # This piece ends with the prompt or beyond it (assisted generation appends guesses to it).
    ids = inputs.get("input_ids")
    plan = plan_prompts(
        adaptor,
        mask,
        ids if computed == 0 else None,
        prompt_len=state.prompt_len,
        computed=computed,
        scheduled=scheduled,
    )
    plan.latch = cache is None or adaptor.replace == "all"
    if plan.latch and state.latched is None:
        state.latched = adaptor.take_room(batch)
    # A model whose whole forward is compiled finds the plan where it was recorded.
    return adaptor.thread.pin(plan)


def _note_ids(state: Generation, ids: Tensor | None, total: int) -> None:
    """Keep what is known of the last of the `total` columns: all, or the chunks that came so far.

    A chunk is handed over by itself, and a later turn may be without what its cache holds.
    """
    if ids is not None and state.ids is not None and ids.shape[1] < total:
        ids = torch.cat([state.ids, ids], dim=1)
    state.ids = ids


def _answer_generation(adaptor: GraceAdaptor, state: Generation, mask: Tensor) -> None:
    """Latch the answers to the prompts, of which `mask [B, L]` and guesses may be the rest."""
    ids = state.ids
    if ids is not None:
        ids = ids[:, : max(0, state.prompt_len - mask.shape[1] + ids.shape[1])]
    answers = adaptor.answer(_prompts_of(ids, mask[:, : state.prompt_len]))
    state.latched = adaptor.take_room(len(mask))
    state.latched.index.copy_(answers.index)
    state.latched.values.copy_(answers.values)
    state.answered, state.ids = True, None


def _length(past: Any) -> int | Tensor:
    """Return how many tokens a cache holds; a tensor if a static one counts on its device."""
    if past is None:
        return 0
    length: int | Tensor = past.get_seq_length() if hasattr(past, "get_seq_length") else len(past)
    return length


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
    """See to it that `generate` runs the prompt in one forward where answers need that; warn.

    Pieces of the prompt that ran before the query is known could not be replaced or pooled.

    Args:
        kwargs: of `generate`, changed in place.
        default: the model's own generation configuration.
    """
    sizes = [getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)]
    sizes += [getattr(default, "prefill_chunk_size", None)]
    chunk = next((size for size in sizes if size is not None), None)
    chunk = kwargs.get("prefill_chunk_size", chunk)
    if chunk is not None and (adaptor.replace != "last" or adaptor.query == "mean"):
        warnings.warn(
            f"prefill_chunk_size is ignored: replace={adaptor.replace!r} and "
            f"query={adaptor.query!r} need the whole prompt in one forward",
            stacklevel=5,
        )
        kwargs["prefill_chunk_size"] = None


def warn_later_turn(adaptor: GraceAdaptor, kwargs: dict[str, Any]) -> None:
    """Warn where `generate` is given past tokens that answers would have to reach."""
    if adaptor.replace == "last" and adaptor.query != "mean":
        return
    if int(_length(kwargs.get("past_key_values"))) > 0:
        warnings.warn(
            f"past_key_values holds earlier tokens: replace={adaptor.replace!r} and "
            f"query={adaptor.query!r} reach the new ones only, so answers may differ from those "
            "without a cache",
            stacklevel=5,
        )


def _warn_left_padding(adaptor: GraceAdaptor, mask: Tensor) -> None:
    if "left padding" in adaptor.warned or not _may_look(adaptor, "left padding", mask):
        return
    if mask.shape[1] and not bool(mask[:, 0].all()):
        adaptor.warned.add("left padding")
        warnings.warn(
            "left padding without position_ids shifts the positions of most causal models, whose "
            "edits then do not fire; pass position_ids",
            stacklevel=7,
        )
