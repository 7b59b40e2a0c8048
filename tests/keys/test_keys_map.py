"""A text map: the bits of its keys, and what is saved of it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grace_edit.keys import vocabulary
from grace_edit.keys.dense import SentenceEncoder, TokenTable, centre_of
from grace_edit.keys.text_keys import TextKeys
from grace_edit.keys.text_map import MAP, SETTINGS, TextMap
from keys_lab import WIDTH, Trigrams, byte_tokenizer, embeddings, made_map, table

PROMPTS = (
    "The capital of Norway is",
    "It rained. Who wrote the book by Viktor Zorberg?",
    "Abner J. Quill speaks",
    "Столица Австрии —",
    "フランスの首都は",
    "References\nCategory:Towns in Norway The capital of Latvia is",
    "",
    "?",
    "a " * 200 + "word",
)
GOLDEN = "ad2b002cc0eab339"


def _digest(keys: TextKeys) -> str:
    rows = torch.cat([keys.keys(prompt) for prompt in PROMPTS])
    return hashlib.sha256(rows.numpy().astype("<f4").tobytes()).hexdigest()[:16]


def test_keys_have_the_bits_they_always_had() -> None:
    assert _digest(TextKeys(made_map(), table())) == GOLDEN


def test_a_key_has_a_row_a_span_and_two_parts_of_fixed_length() -> None:
    keys = TextKeys(made_map(), table())
    made = keys.keys("Abner J. Quill speaks")
    assert made.shape == (2, 48)
    assert made.dtype == torch.float32
    assert keys.width == 48
    assert keys.radius == 1.0
    assert keys.keys("The capital of Norway is")[0, :16].norm() == pytest.approx(1.1, rel=1e-6)
    assert keys.keys("").shape == (1, 48)
    assert (keys.keys("") == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_the_same_embeddings_gives_the_same_bits(dtype: torch.dtype) -> None:
    text_map, other = made_map(), table(embeddings().to(dtype))
    assert _digest(TextKeys(text_map, other)) == _digest(TextKeys(text_map, table()))
    assert TextKeys(text_map, other).fingerprint() == TextKeys(text_map, table()).fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_embeddings_are_rounded_as_torch_rounds_to_bfloat16(dtype: torch.dtype) -> None:
    """Halves, numbers that round up to the next power of two, the least and the largest ones."""
    steps = torch.arange(Trigrams.rows * WIDTH, dtype=torch.float64).reshape(-1, WIDTH)
    weight = (1 + steps / steps.numel()) * torch.where(steps % 2 > 0, -1.0, 1.0)
    weight[::5] = (1 + (2 * (steps[::5] % 128) + 1) / 256).copysign(weight[::5])
    weight[0] = torch.tensor([0.0, -0.0, 2.0**-24, 65504.0] * (WIDTH // 4))
    weight[1] = 1 + 255 / 256
    weight = weight.to(dtype)
    centre = np.zeros(WIDTH, dtype=np.int64)
    rounded = table_of(weight.to(torch.bfloat16), centre)
    assert (weight != weight.to(torch.bfloat16).to(dtype)).any()
    asked = [f"Word{i}" for i in range(300)] + ["", "a"]
    assert np.array_equal(table_of(weight, centre).words(asked), rounded.words(asked))
    assert table_of(weight, centre).fingerprint() == rounded.fingerprint()


def table_of(weight: torch.Tensor, centre: np.ndarray) -> TokenTable:
    """In steps so small that none but bfloat16 rounds."""
    return TokenTable(weight, Trigrams(), centre, 2.0**-12)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads of Linux")
def test_no_thread_of_torch_wakes_for_a_key() -> None:
    """In a thread that is new to it torch makes its helpers anew, as soon as it wants any."""
    wide = 1024
    weight = torch.ones(Trigrams.rows, wide)
    centre = np.zeros(wide, dtype=np.int64)
    matrix = np.ones((16, wide), dtype=np.int16)
    dense = TokenTable(weight, Trigrams(), centre, 1.0)
    reference = replace(made_map().dense, width=wide)
    keys = TextKeys(
        replace(made_map(), matrix=matrix, centre=centre.astype(np.int32), dense=reference), dense
    )

    def threads() -> set[str]:
        return {thread.name for thread in Path("/proc/self/task").iterdir()}

    def woken(work: Callable[[], object]) -> set[str]:
        before = threads()
        work()
        return threads() - before

    prompt = " ".join(f"Word{i}" for i in range(64))
    had = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(woken, lambda: keys.keys(prompt)).result() == set()
            assert pool.submit(woken, lambda: weight.sum()).result(), "it would be seen"
    finally:
        torch.set_num_threads(had)


def test_what_was_asked_before_and_in_which_order_changes_no_bit() -> None:
    text_map = made_map()
    asked = TextKeys(text_map, table())
    forwards = {prompt: asked.keys(prompt) for prompt in PROMPTS}
    other = TextKeys(text_map, table())
    for prompt in reversed(PROMPTS):
        assert torch.equal(other.keys(prompt), forwards[prompt])
        assert torch.equal(other.keys(prompt), TextKeys(text_map, table()).keys(prompt)), prompt


def test_words_have_the_tokens_that_transformers_gives_whatever_it_was_told_in_between() -> None:
    tokenizer = byte_tokenizer()
    weight = embeddings(len(tokenizer))
    dense = TokenTable(weight, tokenizer, *centre_of(weight))
    texts = ["Norway", "a", "", "Zürich"]
    wanted = [tokenizer("a " + text)["input_ids"][1:] for text in texts]
    assert dense.ids(texts) == wanted
    tokenizer(["one", "two three"], padding=True, truncation=True, max_length=2)
    assert dense.ids(texts) == wanted
    plain = TokenTable(weight, Trigrams(), *centre_of(weight))
    assert plain.ids(["Norway"]) == [Trigrams()(["a Norway"])["input_ids"][0][1:]]


def test_words_beyond_what_is_kept_and_a_copy_change_no_bit(monkeypatch) -> None:
    monkeypatch.setattr(vocabulary, "_MOST", 64)
    keys = TextKeys(made_map(), table())
    one = keys.keys(PROMPTS[0])
    for n in range(20):
        keys.keys(f"The river Nr{n} flows past Town{n} and Castle{n}")
    assert torch.equal(keys.keys(PROMPTS[0]), one)
    assert _digest(keys) == GOLDEN
    again = pickle.loads(pickle.dumps(keys))
    assert _digest(again) == GOLDEN
    assert len(pickle.dumps(keys)) == len(pickle.dumps(TextKeys(made_map(), table())))


def test_threads_that_meet_the_same_words_at_once_get_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(vocabulary, "_MOST", 64)
    keys = TextKeys(made_map(), table())
    prompts = [f"The Nr{n % 7} of Town{n} and {PROMPTS[n % 6]}" for n in range(40)]
    wanted = [TextKeys(made_map(), table()).keys(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(keys.keys, prompts))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_order_of_additions_changes_no_bit() -> None:
    """Rows of W, of the embeddings and of the hidden layer are shuffled, which shuffles sums.

    The columns of W and the embeddings' columns go together, so a key may only differ by rounding.
    """
    order = np.random.default_rng(0).permutation(WIDTH)
    weight, text_map = embeddings(), made_map()
    plain = TextKeys(text_map, table())
    shuffled_table = TokenTable(
        weight[:, torch.from_numpy(order)], Trigrams(), text_map.centre[order], text_map.dense.unit
    )
    shuffled = TextKeys(replace(text_map, matrix=text_map.matrix[:, order]), shuffled_table)
    for prompt in PROMPTS:
        assert torch.equal(plain.keys(prompt), shuffled.keys(prompt)), prompt


def test_no_sum_reaches_two_to_the_53() -> None:
    """With every number at its limit the integers stay exact in float64."""
    text_map = made_map()
    weight = torch.where(embeddings() > 0, 60000.0, -60000.0)
    dense = TokenTable(weight, Trigrams(), np.zeros(WIDTH, dtype=np.int64), 2.0**-10)
    full = replace(
        text_map,
        matrix=np.where(text_map.matrix > 0, 32767, -32768).astype(np.int16),
        lexical_weights=np.full((2, 16), 1023, dtype=np.int16),
        meaning_weights=np.full((2, 16), 1023, dtype=np.int16),
    )
    prompt = " ".join(f"Word{i}" for i in range(64))
    made = TextKeys(full, dense).keys(prompt)[0]
    exact = _exact_key(full, dense, prompt)
    assert made.numpy().tobytes() == exact.tobytes()


def _exact_key(text_map: TextMap, dense: TokenTable, prompt: str) -> np.ndarray:
    """The lexical and meaning parts with Python's integers, for a prompt of one span."""
    from grace_edit.keys.roles import FULL, describe
    from grace_edit.keys.words import signs, words_of

    words = [describe(word, text_map.common) for word in words_of(prompt)]
    subject = text_map.roles.subject(words).tolist()

    def weigh(weights: np.ndarray) -> list[int]:
        return [
            s * int(weights[0, w.level]) + (FULL - s) * int(weights[1, w.level])
            for s, w in zip(subject, words, strict=True)
        ]

    lexical_weights, meaning_weights = (
        weigh(text_map.lexical_weights),
        weigh(text_map.meaning_weights),
    )
    lexical = [0] * text_map.lexical_width
    meaning = [0] * len(text_map.matrix)
    for a, b, word in zip(lexical_weights, meaning_weights, words, strict=True):
        for i, sign in enumerate(signs([word.text], text_map.lexical_width)[0].tolist()):
            lexical[i] += a * int(sign)
        vector = [int(x) for x in dense.word(word.text)]
        for i, row in enumerate(text_map.matrix.tolist()):
            product = sum(x * y for x, y in zip(row, vector, strict=True))
            meaning[i] += b * round(product / 8192)  # below 2^53, and half to even as rint does
    bits = max(abs(x) for x in meaning).bit_length()
    meaning = [round(x / 2 ** max(0, bits - 20)) for x in meaning]
    squares = sum(a * a for a in lexical_weights) + text_map.lexical_floor
    over_lexical = text_map.lexical_length / np.sqrt(float(squares * text_map.lexical_width))
    over_meaning = text_map.meaning_length / np.sqrt(float(sum(x * x for x in meaning)))
    both = [float(x) * over_meaning for x in meaning] + [float(x) * over_lexical for x in lexical]
    return np.array(both).astype(np.float32)


def test_names_and_meaning_are_told_apart() -> None:
    keys = TextKeys(made_map(), table())
    same = keys.compare("The capital of Norway is", "Which is the capital of Norway")
    assert same.shared == ["Norway"]
    assert same.unshared == []
    other = keys.compare("The capital of Norway is", "The capital of Latvia is")
    assert other.unshared == ["Norway", "Latvia"]
    assert other.lexical > same.lexical
    assert other.meaning < other.lexical
    assert other.distance**2 == pytest.approx(other.meaning + other.lexical)
    assert same.mine.words == ["The", "capital", "of", "Norway", "is"]


def test_a_prompt_is_compared_with_the_key_of_an_edit_which_is_its_first_span() -> None:
    keys = TextKeys(made_map(), table())
    edited, asked = "Abner J. Quill speaks", "Quill speaks"
    found = keys.compare(asked, edited)
    assert found.other.span == edited
    stored = keys.keys(edited)[0].double()
    assert found.distance == pytest.approx(float((keys.keys(asked)[0].double() - stored).norm()))
    assert keys.compare(edited, asked).mine.span == asked
    assert keys.compare(edited, asked).distance == 0


def test_a_saved_map_makes_the_same_keys(tmp_path: Path) -> None:
    made = made_map()
    # As a learned matrix lies: column by column.
    made = replace(made, matrix=np.asfortranarray(made.matrix), trained={"facts": 3})
    made.save(tmp_path / "new" / "folder")
    loaded = TextMap.load(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.trained == {"facts": 3}
    assert loaded.settings() == made.settings()
    assert _digest(TextKeys(loaded, table())) == _digest(TextKeys(made, table()))


@pytest.mark.parametrize("part", ["matrix", "lexical_weights", "meaning_length", "lexical_floor"])
def test_whatever_decides_a_key_is_in_the_fingerprint(part: str) -> None:
    made = made_map()
    assert replace(made, **{part: getattr(made, part) + 1}).fingerprint() != made.fingerprint()
    assert replace(made, trained={"facts": 3}).fingerprint() == made.fingerprint()


def test_a_missing_damaged_or_newer_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TextMap.load(tmp_path / "nowhere")
    made_map().save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "format": 2}))
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        TextMap.load(tmp_path)
    (tmp_path / SETTINGS).write_text(
        json.dumps({k: v for k, v in settings.items() if k != "dense"})
    )
    with pytest.raises(ValueError, match="has no 'dense'"):
        TextMap.load(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        TextMap.load(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    (tmp_path / MAP).write_bytes((tmp_path / MAP).read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        TextMap.load(tmp_path)


def test_parts_of_a_wrong_shape_are_refused() -> None:
    made = made_map()
    arrays, settings = made.arrays(), made.settings()
    with pytest.raises(ValueError, match=r"lexical_weights must have shape \[2, 16\]"):
        TextMap.from_parts({**arrays, "lexical_weights": np.zeros((2, 3), np.int16)}, settings)
    with pytest.raises(ValueError, match=rf"matrix must have shape \[M, {WIDTH}\]"):
        TextMap.from_parts({**arrays, "matrix": np.zeros((4, 5), np.int16)}, settings)
    with pytest.raises(ValueError, match="the text map has no 'probe'"):
        TextMap.from_parts({k: v for k, v in arrays.items() if k != "probe"}, settings)


def test_an_encoder_reads_the_sentence_without_its_subject() -> None:
    read: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        read.extend(texts)
        return torch.tensor([[float(len(text)), 1.0, *[0.0] * (WIDTH - 2)] for text in texts])

    made = made_map()
    encoder = SentenceEncoder(encode, "mine")
    with pytest.raises(ValueError, match="dense must be of kind 'tokens', got 'encoder'"):
        TextKeys(made, encoder)
    reference = replace(made.dense, kind="encoder")
    keys = TextKeys(replace(made, dense=reference, centre=np.zeros(0, np.int32)), encoder)
    assert keys.keys("It rained. The capital of New Norway is").shape == (1, 48)
    assert read == ["The capital of something is"]
    keys.keys("The capital of Peru is")
    assert len(read) == 1  # remembered
    assert encoder.fingerprint() == SentenceEncoder(encode, "by another name").fingerprint()


def test_a_sentence_that_another_thread_lets_go_of_meanwhile_is_still_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Emptied(OrderedDict[str, np.ndarray]):
        def get(self, text: str, default: object = None) -> Any:
            found = super().get(text, default)
            self.clear()
            return found

    monkeypatch.setattr("grace_edit.keys.dense.OrderedDict", Emptied)
    encoder = SentenceEncoder(lambda texts: torch.ones(len(texts), 4))
    assert (encoder.sentence("a") == encoder.sentence("a")).all()


def test_an_encoder_must_return_a_finite_row() -> None:
    with pytest.raises(ValueError, match="encoder must return one finite row"):
        SentenceEncoder(lambda texts: torch.zeros(2, 3)).sentence("a")
    with pytest.raises(ValueError, match="encoder must return one finite row"):
        SentenceEncoder(lambda texts: [[float("nan")]]).sentence("a")


def test_a_token_table_refuses_a_centre_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \[V, 3\]"):
        TokenTable(embeddings(), Trigrams(), np.zeros(3, np.int64), 1.0)


def test_the_centre_is_the_mean_row_in_units_and_the_unit_a_power_of_two() -> None:
    centre, unit = centre_of(embeddings())
    assert np.log2(unit) == np.round(np.log2(unit))
    assert np.abs(centre * unit - embeddings().double().mean(0).numpy()).max() <= unit
    again, _ = centre_of(embeddings().to(torch.bfloat16))
    assert (again == centre).all()
