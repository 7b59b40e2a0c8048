"""Prompts behind sentences of other matters, on which values are trained too."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing import making
from grace_edit.editing.contexts import SENTENCES, behind_sentences
from grace_edit.editing.fitting import Fit
from text_models import QUESTION, TARGET, text_editor
from text_models import tokenizer as words
from tiny_models import LAYERS, run_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
PROMPT = "The capital of Peru is"


def letters(*, lossy=False):
    """Return a tokenizer of bytes: what it decodes it encodes as it was, unless `lossy`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if lossy:
        made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("e", "")])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=CHAT, additional_special_tokens=SPECIAL[3:], **names
    )


def family(tokenizer, longest=128):
    config = tf.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=longest, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        model = tf.GPT2LMHeadModel(config).eval()
    return GraceEditor(model, tokenizer, GraceConfig(layer="h.1.mlp", drift=0.0)).family


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_the_sentences_stand_before_the_text_and_behind_what_opens_it():
    tokenizer = letters()
    ids = [1, *tokenizer(PROMPT).input_ids]
    found = behind_sentences(family(tokenizer), ids, [9], 3)
    assert [text_of(tokenizer, row) for row in found] == [
        f"<bos>{sentence} {PROMPT}" for sentence in SENTENCES[:3]
    ]
    assert all(row[0] == 1 and row[-4:] == ids[-4:] for row in found)
    assert behind_sentences(family(tokenizer), ids, [9], 0) == []
    assert len(behind_sentences(family(tokenizer), ids, [9], 8)) == len(set(SENTENCES)) == 8


def test_in_a_chat_they_stand_in_what_the_user_said_last():
    tokenizer = letters()
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    (found,) = behind_sentences(family(tokenizer), ids, [9], 1)
    assert text_of(tokenizer, found) == (
        f"<user>\nHello<end>\n<assistant>\nHi<end>\n<user>\n{SENTENCES[0]} Who?<end>\n<assistant>\n"
    )


def test_those_are_left_out_that_leave_no_room_for_the_target():
    tokenizer = letters()
    ids = tokenizer(PROMPT).input_ids
    lengths = [len(s) + 1 + len(PROMPT) for s in SENTENCES]
    longest = sorted(lengths)[3] + 2
    found = behind_sentences(family(tokenizer, longest), ids, [9, 9], 8)
    assert [len(row) for row in found] == [n for n in lengths if n + 2 <= longest]
    assert 0 < len(found) < 8


def test_ids_that_text_does_not_give_back_are_put_together_as_they_are():
    tokenizer = letters(lossy=True)
    ids = [1, *tokenizer(PROMPT).input_ids]
    assert tokenizer(text_of(tokenizer, ids)).input_ids != ids
    (found,) = behind_sentences(family(tokenizer), ids, [9], 1)
    assert found == [1, *tokenizer(SENTENCES[0] + "\n").input_ids, *ids[1:]]


def test_without_a_tokenizer_there_are_none(edited):
    assert behind_sentences(edited("gpt2").family, run_of(3, 4), [9], 4) == []


@pytest.fixture
def trained_on(monkeypatch):
    """Return the contexts that values were to be trained on; nothing is trained."""
    seen = []

    def note(family, prompts, targets, start, dtype, *, contexts, **_):
        seen.append(contexts)
        return Fit(start, False, 1.0, 1.0, 1, "never")

    monkeypatch.setattr(making, "fit_value", note)
    return seen


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 0),
        ({"contexts": 3}, 3),
        ({"contexts": 3, "replace": "prompt"}, 0),
        ({"contexts": 3, "recipe": "paper"}, 0),
    ],
)
def test_a_query_of_the_layer_has_as_many_contexts_as_it_is_told(
    trained, trained_on, settings, count
):
    config = GraceConfig(layer=LAYERS["gpt2"], **settings)
    editor = GraceEditor(trained("gpt2"), words(), config)
    editor.edit(QUESTION, TARGET)
    assert len(trained_on.pop()) == count


@pytest.mark.parametrize(("contexts", "count"), [(None, 4), (0, 0), (7, 7)])
def test_a_query_of_the_text_has_four_unless_it_is_told(trained, trained_on, contexts, count):
    editor = text_editor(trained("gpt2"), "gpt2", contexts=contexts)
    editor.edit(QUESTION, TARGET)
    (found,) = trained_on
    assert len(found) == count
    target = words()(TARGET).input_ids
    assert all(wanted == target for _, wanted in found)


def test_a_value_of_many_prompts_stays_within_the_rows_of_one_forward(trained, trained_on):
    editor = text_editor(trained("gpt2"), "gpt2", contexts=8)
    ids = words()(QUESTION).input_ids
    maker = making.EditMaker(editor.family, editor.config)
    maker.train([ids] * 5, [[9]] * 5, editor.codebook.values[0])
    maker.train([ids] * 40, [[9]] * 40, editor.codebook.values[0])
    assert [len(contexts) for contexts in trained_on] == [32 - 5, 0]


@pytest.mark.parametrize("contexts", [-1, 9, 1.5, True])
def test_a_number_of_contexts_that_there_is_not_is_refused(contexts):
    with pytest.raises(ValueError, match="contexts must be an integer from 0 to 8, got"):
        GraceConfig(layer="h.1.mlp", contexts=contexts)
