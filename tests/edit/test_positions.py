"""Which rows ask and which are replaced: masks, padding, pieces, pooling."""

from __future__ import annotations

import itertools

import pytest
import torch
from grace_edit.adaptor import positions
from grace_edit.adaptor.positions import plan_latched, plan_queries, pooled_mean

# Three sequences of 5, 3 and 1 tokens, padded to 5 columns on each side.
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
LEFT = RIGHT.flip(1)


def ranges(plan: positions.QueryPlan) -> list[tuple[int, int, int]]:
    return list(
        zip(plan.query_row.tolist(), plan.first_row.tolist(), plan.last_row.tolist(), strict=True)
    )


def test_the_last_true_column_is_found_on_either_side_and_is_minus_one_where_there_is_none():
    assert positions.last_column(RIGHT).tolist() == [4, 2, 0]
    assert positions.last_column(LEFT).tolist() == [4, 4, 4]
    assert positions.last_column(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [-1, -1]
    assert positions.last_column(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("replace", "right", "left"),
    [
        ("last", [(4, 4, 5), (7, 7, 8), (10, 10, 11)], [(4, 4, 5), (9, 9, 10), (14, 14, 15)]),
        ("prompt", [(4, 0, 5), (7, 5, 8), (10, 10, 11)], [(4, 0, 5), (9, 7, 10), (14, 14, 15)]),
        ("before", [(4, 0, 4), (7, 5, 7), (10, 10, 10)], [(4, 0, 4), (9, 7, 9), (14, 14, 14)]),
        ("all", [(4, 0, 5), (7, 5, 8), (10, 10, 11)], [(4, 0, 5), (9, 7, 10), (14, 14, 15)]),
    ],
)
def test_each_kind_of_replacement_covers_its_own_rows_under_either_padding(replace, right, left):
    assert ranges(plan_queries(RIGHT, replace=replace)) == right
    assert ranges(plan_queries(LEFT, replace=replace)) == left


def test_a_prompt_shorter_than_the_sequence_asks_at_its_end_and_all_goes_on_beyond_it():
    lengths = torch.tensor([2, 3, 1])
    assert ranges(plan_queries(RIGHT, replace="last", prompt_len=lengths)) == [
        (1, 1, 2),
        (7, 7, 8),
        (10, 10, 11),
    ]
    assert ranges(plan_queries(RIGHT, replace="all", prompt_len=lengths)) == [
        (1, 0, 5),
        (7, 5, 8),
        (10, 10, 11),
    ]


def test_a_sequence_of_nothing_but_padding_does_not_ask_and_replaces_nothing():
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    for replace in ("last", "prompt", "before", "all"):
        plan = plan_queries(mask, replace=replace)
        assert ranges(plan)[0] == (-1, 0, 0)
        assert plan.query_row[1] == 4


def test_a_named_column_asks_instead_of_the_last_and_a_negative_one_does_not():
    plan = plan_queries(RIGHT, replace="last", query_column=torch.tensor([2, 1, -1]))
    assert ranges(plan) == [(2, 2, 3), (6, 6, 7), (-1, 0, 0)]


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("cuts", [(0, 2, 5), (0, 4, 5), (0, 1, 2, 3, 4, 5), (0, 5)])
def test_a_prompt_that_arrives_in_pieces_asks_once_with_the_piece_that_holds_its_end(mask, cuts):
    whole = plan_queries(mask, replace="last").query_row
    asked = torch.full((3,), -1)
    for start, end in itertools.pairwise(cuts):
        plan = plan_queries(mask, replace="last", computed=start, scheduled=end - start)
        for b, row in enumerate(plan.query_row.tolist()):
            if row >= 0:
                assert asked[b] == -1
                # From a row of this piece back to a row of the whole.
                asked[b] = b * 5 + start + row - b * (end - start)
                assert (plan.first_row[b], plan.last_row[b]) == (row, row + 1)
    assert torch.equal(asked, whole)


def test_rows_that_were_computed_before_this_piece_are_never_replaced():
    plan = plan_queries(LEFT, replace="prompt", computed=3)
    assert ranges(plan) == [(1, 0, 2), (3, 2, 4), (5, 5, 6)]


def test_an_unknown_kind_of_replacement_is_named():
    with pytest.raises(ValueError, match=r"replace must be 'last'.*got 'first'"):
        plan_queries(RIGHT, replace="first")


def test_after_the_prompt_only_all_reaches_new_tokens_when_the_cache_holds_the_rest():
    mask = torch.ones(2, 6, dtype=torch.bool)
    for replace in ("last", "prompt", "before"):
        assert plan_latched(mask, replace=replace, prompt_len=5, computed=5) is None
    plan = plan_latched(mask, replace="all", prompt_len=5, computed=5)
    assert plan == positions.LatchedPlan(sequences=2)


def test_after_the_prompt_without_a_cache_the_prompts_rows_are_replaced_again():
    mask = torch.ones(2, 7, dtype=torch.bool)
    plan = plan_latched(mask, replace="last", prompt_len=5, computed=0)
    assert plan is not None
    assert plan.latched
    assert ranges(plan) == [(4, 4, 5), (11, 11, 12)]
    everything = plan_latched(mask, replace="all", prompt_len=5, computed=0)
    assert everything is not None
    assert ranges(everything) == [(4, 0, 7), (11, 7, 14)]


def test_pooling_leaves_padding_and_unmarked_tokens_out():
    pool = torch.ones(3, 5, dtype=torch.bool)
    pool[:, 1] = False
    plan = plan_queries(RIGHT, replace="all", pool_mask=pool)
    assert plan.pool is not None
    assert plan.pool.tolist() == [
        [True, False, True, True, True],
        [True, False, True, False, False],
        [True, False, False, False, False],
    ]


def test_a_prompt_of_nothing_but_unmarked_tokens_is_pooled_as_a_whole():
    plan = plan_queries(RIGHT, replace="all", pool_mask=torch.zeros(3, 5, dtype=torch.bool))
    assert plan.pool is not None
    assert torch.equal(plan.pool, RIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pooled_mean_has_the_same_bits_alone_padded_and_in_any_batch(dtype):
    torch.manual_seed(3)
    rows = [torch.randn(n, 33).mul(20).to(dtype) for n in (1, 2, 7, 19)]
    alone = [pooled_mean(r[None], torch.ones(1, len(r), dtype=torch.bool))[0] for r in rows]
    for left in (False, True):
        for width in (19, 32):
            # Padding may hold anything.
            hidden = torch.full((4, width, 33), float("nan"), dtype=dtype)
            marked = torch.zeros(4, width, dtype=torch.bool)
            for b, r in enumerate(rows):
                span = slice(width - len(r), None) if left else slice(0, len(r))
                hidden[b, span], marked[b, span] = r, True
            pooled = pooled_mean(hidden, marked)
            assert pooled.dtype == dtype
            assert torch.equal(pooled, torch.stack(alone))
            order = torch.tensor([2, 0, 3, 1])
            assert torch.equal(pooled_mean(hidden[order], marked[order]), pooled[order])


def test_a_pooled_mean_is_the_mean():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    marked = torch.tensor([[True, True, False]])
    assert pooled_mean(hidden, marked).tolist() == [[2.0, 4.0]]
    assert pooled_mean(hidden, torch.zeros(1, 3, dtype=torch.bool)).isnan().all()
