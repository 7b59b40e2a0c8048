"""Metrics against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from grace_edit.evaluation import metrics


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("the", ""),
    ],
)
def test_squad_normalisation_drops_case_punctuation_articles_and_spaces(
    text: str, wanted: str
) -> None:
    assert metrics.normalized(text) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("Barack Obama", ["the Barack Obama."], 1.0),
        # 1 of 3 words right, 1 of 2 wanted: 2 · (1/3 · 1/2) / (1/3 + 1/2) = 2/5
        ("in New York", ["York City"], 0.4),
        # A repeated word counts as often as both sides have it: 2 of 3, 2 of 2.
        ("so so so", ["so so"], 0.8),
        ("Rome", ["Paris"], 0.0),
        ("Rome", ["Paris", "Rome", "Oslo"], 1.0),
        ("", ["Paris"], 0.0),
        ("the", ["a"], 1.0),  # nothing is left of either
        ("Rome", [], 0.0),
    ],
)
def test_word_f1_is_the_best_over_the_right_answers(
    answer: str, wanted: list[str], score: float
) -> None:
    assert metrics.f1(answer, wanted) == pytest.approx(score, abs=1e-15)


def test_the_published_f1_gives_half_for_a_wrong_answer_of_one_token() -> None:
    pad, end, wrong, right = 0, 1, 17, 23
    assert metrics.grace_f1([pad, wrong, end], [right, end], pad) == 0.5
    assert metrics.f1("wrong", ["right"]) == 0.0


@pytest.mark.parametrize(
    ("produced", "wanted", "score"),
    [
        ([0, 23, 1], [23, 1], 1.0),
        # Two of four right, two of three wanted: 2 · (1/2 · 2/3) / (1/2 + 2/3) = 4/7
        ([0, 5, 6, 23, 1], [23, 24, 1], 4 / 7),
        # A repeated token is shared once: 1 of 3, 1 of 1.
        ([7, 7, 7], [7], 0.5),
        ([0], [23, 1], 0.0),
        ([9, 8], [23, 1], 0.0),
    ],
)
def test_the_published_f1_compares_sets_of_tokens(
    produced: list[int], wanted: list[int], score: float
) -> None:
    assert metrics.grace_f1(produced, wanted, 0) == pytest.approx(score, abs=1e-15)


def test_token_accuracy_is_the_share_of_tokens_that_lead() -> None:
    assert metrics.token_accuracy([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5
    with pytest.raises(ValueError, match="as many tokens as wanted, at least one, got 1 for 2"):
        metrics.token_accuracy([1], [1, 2])
    with pytest.raises(ValueError, match="got 0 for 0"):
        metrics.token_accuracy([], [])


def test_losses_are_negative_log_likelihoods_of_the_wanted_tokens() -> None:
    # Logits log 1, log 2, log 5: likelihoods 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]).log()
    losses = metrics.token_losses(logits, [0, 2])
    assert losses == pytest.approx([math.log(8), math.log(8 / 5)], abs=1e-6)
    # exp of the mean: sqrt(8 · 8/5)
    assert metrics.perplexity(losses) == pytest.approx(math.sqrt(64 / 5), abs=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes() -> None:
    assert metrics.perplexity([math.log(50)] * 3) == pytest.approx(50)
    assert metrics.perplexity([800.0]) == math.inf
    with pytest.raises(ValueError, match="at least one"):
        metrics.perplexity([])


def test_a_mean_of_nothing_is_none_and_gaps_are_left_out() -> None:
    assert metrics.mean([]) is None
    assert metrics.mean([None, float("nan")]) is None
    assert metrics.mean([True, False, None, 1.0]) == pytest.approx(2 / 3)
    assert metrics.mean([0.1] * 10) == 0.1  # exactly rounded, so the order never shows


def test_exact_sets_only_the_spaces_round_an_answer_aside() -> None:
    assert metrics.exact(" Canberra ", "Canberra")
    assert not metrics.exact("canberra", "Canberra")
    assert not metrics.exact("Canberra is", "Canberra")


def test_edits_per_key() -> None:
    assert metrics.edits_per_key(1000, 137) == pytest.approx(1000 / 137)
    assert metrics.edits_per_key(0, 0) is None
