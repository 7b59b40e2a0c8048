"""How a prompt is cut into spans and words, and which words name its subject."""

from __future__ import annotations

import numpy as np
import pytest
from grace_edit.keys.roles import FEATURES, FULL, UNIT, Roles, describe, features
from grace_edit.keys.spans import last_sentence, spans
from grace_edit.keys.words import CommonWords, folded, signs, word_spans, words_of
from keys_lab import COMMON, made_map


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("", ""),
        ("   \n ", ""),
        ("The capital of Australia is", "The capital of Australia is"),
        ("It rained. The capital of Australia is", "The capital of Australia is"),
        ("It rained!\nThe capital of Australia is\n", "The capital of Australia is"),
        ("Category of rain\nThe capital of Australia is", "The capital of Australia is"),
        ("What? Really?! Where was she born", "Where was she born"),
        ('"It rained." The capital of Australia is', "The capital of Australia is"),
        ("It rained. See St. Moritz is in", "See St. Moritz is in"),
        ("The name of Dr. Livingstone is", "The name of Dr. Livingstone is"),
        ("It rained. Abner J. Quill speaks", "Abner J. Quill speaks"),
        ("He lives in the U.S. and speaks", "He lives in the U.S. and speaks"),
        ("雨が降った。フランスの首都は", "フランスの首都は"),
        ("Дождь прошёл. Столица Австрии —", "Столица Австрии —"),
        ("What is the twin city of Houston? It is", "What is the twin city of Houston? It is"),
        ("They play as", "They play as"),
        ("...", "..."),
    ],
)
def test_the_last_sentence_asks(text: str, asked: str) -> None:
    assert last_sentence(text) == asked
    assert spans(text)[0] == asked


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("It rained. The capital of Australia is", ["The capital of Australia is"]),
        ("Abner J. Quill speaks", ["Abner J. Quill speaks", "Quill speaks"]),
        (
            "References\nCategory:Towns in Norway The capital of Latvia is",
            [
                "Category:Towns in Norway The capital of Latvia is",
                "Norway The capital of Latvia is",
                "The capital of Latvia is",
                "Latvia is",
            ],
        ),
        ("At 10:30 she was: Hungry", ["At 10:30 she was: Hungry"]),
    ],
)
def test_what_may_be_cut_in_two_ways_asks_in_each(text: str, asked: list[str]) -> None:
    assert spans(text) == asked


def test_a_prompt_has_eight_spans_at_most() -> None:
    names = " ".join(f"Name{chr(97 + i)}" for i in range(20))
    assert len(spans(f"Label:Thing Mr. J. Doe {names} is")) <= 8


def test_words_are_cut_at_spaces_punctuation_and_between_characters_without_spaces() -> None:
    assert words_of("Who's 1st, O’Brien?") == ["Who", "'", "s", "1st", ",", "O", "'", "Brien", "?"]
    assert words_of("東京は日本") == ["東", "京", "は", "日", "本"]
    assert words_of("") == []
    text = "  the Élan,vital "
    assert [text[a:b] for a, b in word_spans(text)] == words_of(text)


def test_words_are_compared_without_case_and_accents() -> None:
    assert folded("Élan") == folded("ELAN") == "elan"
    assert folded("STRASSE") == folded("straße")
    assert (signs(["Élan"], 64) == signs(["elan"], 64)).all()


def test_signs_of_two_words_agree_in_about_half_of_the_places() -> None:
    words = [f"word{i}" for i in range(64)]
    rows = signs(words, 256)
    assert set(np.unique(rows)) == {-1.0, 1.0}
    products = (rows @ rows.T)[~np.eye(64, dtype=bool)] / 256
    # 4032 products of 256 signs: the mean within 8 standard errors, each within 6 deviations.
    assert abs(products.mean()) < 8 / 16 / 4032**0.5 * 2
    assert np.abs(products).max() < 6 / 16
    assert (signs(["word1"], 64) == rows[1:2, :64]).all()


def test_how_common_a_word_is_depends_on_its_rank() -> None:
    common = CommonWords.ranked([f"w{i}" for i in range(1000)])
    assert common.level("w0") == 0
    assert common.level("W999") == 14
    assert common.level("w9") < common.level("w99")
    assert common.level("unheard") == 15
    assert common.level("?!") == 0


def test_features_have_a_row_a_word_and_hold_integers() -> None:
    words = [describe(word, COMMON) for word in words_of("The capital of Norway is")]
    found = features(words)
    assert found.shape == (5, FEATURES)
    assert (found == np.rint(found)).all()
    assert np.abs(found).max() <= UNIT * 1


def test_roles_say_which_words_name_the_subject() -> None:
    roles = made_map().roles
    words = [describe(word, COMMON) for word in words_of("The capital of Norway is")]
    found = roles.subject(words)
    assert found.tolist()[3] > 0.9 * FULL
    assert found[[0, 1, 2, 4]].max() < 0.1 * FULL
    assert roles.subject([]).shape == (0,)


def test_roles_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=rf"hidden must have shape \[H, {FEATURES + 1}\]"):
        Roles(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match=r"output must have shape \[3\], got \[2\]"):
        Roles(np.zeros((2, FEATURES + 1)), np.zeros(2))
