"""Which rows of a step of the engine end a prompt. numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Ends = list[tuple[str, int]]
"""The id of a request and the row of the step that is its prompt's last token."""


def prompt_ends(
    ids: Sequence[str],
    computed: np.ndarray,
    prompt_lengths: np.ndarray,
    scheduled: np.ndarray,
    starts: np.ndarray,
) -> Ends:
    """Return whose prompt ends in this step, and in which row.

    A prompt ends here where `computed < prompt length <= computed + scheduled`: in a whole prompt,
    in the last chunk of one (of one token, where the rest was cached), and again where a request
    was preempted and computes its prompt anew. A step of decoding ends none.

    Args:
        ids: of B requests, in the order of their rows.
        computed: `[B]`, tokens computed before this step.
        prompt_lengths: `[B]`, of the prompts as they were sent, whatever was generated since.
        scheduled: `[B]`, tokens computed in this step.
        starts: `[B]`, the row of each request's first token.
    """
    here = (computed < prompt_lengths) & (prompt_lengths <= computed + scheduled)
    rows = starts + prompt_lengths - 1 - computed
    return [(ids[i], int(rows[i])) for i in np.flatnonzero(here)]


def ends_of_v1(input_batch: Any, scheduled: Mapping[str, int]) -> Ends:
    """Return the prompt ends of a step of vLLM's V1 runner.

    Args:
        input_batch: the runner's `InputBatch`, updated for this step.
        scheduled: the scheduler's `num_scheduled_tokens`.
    """
    n = input_batch.num_reqs
    ids = list(input_batch.req_ids[:n])
    lengths = np.array([scheduled[id] for id in ids], dtype=np.int64)
    return prompt_ends(
        ids,
        np.asarray(input_batch.num_computed_tokens_cpu[:n], dtype=np.int64),
        np.asarray(input_batch.num_prompt_tokens[:n], dtype=np.int64),
        lengths,
        np.cumsum(lengths) - lengths,
    )


def ends_of_v2(input_batch: Any, states: Any) -> Ends:
    """Return the prompt ends of a step of vLLM's V2 runner; none for a dummy batch.

    Args:
        input_batch: what the runner's `prepare_inputs` made.
        states: the runner's `RequestState`.
    """
    n = input_batch.num_reqs
    ids = list(input_batch.req_ids[:n])
    if any(id not in states.req_id_to_index for id in ids):
        return []
    index = input_batch.idx_mapping_np[:n]
    return prompt_ends(
        ids,
        np.asarray(input_batch.num_computed_tokens_np[:n], dtype=np.int64),
        np.asarray(states.prompt_len.np[index], dtype=np.int64),
        np.asarray(input_batch.num_scheduled_tokens[:n], dtype=np.int64),
        np.asarray(input_batch.query_start_loc_np[:n], dtype=np.int64),
    )
