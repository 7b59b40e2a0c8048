"""The forms in which prompts and targets are given, and targets that end a generation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.editing.asked import read_wanted
from tiny_models import EOS, LAYERS, PAD, generated, run_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER = run_of(40, 6)


class Words:
    """A tokenizer of words `w4`..`w63`, with a chat template if wanted."""

    pad_token_id, eos_token_id, mask_token_id = PAD, EOS, None
    all_special_ids = (0, 1, 2, 3)

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        assert "[" not in text or not add_special_tokens  # the template has them already
        names = {"</s>": EOS, "[user]": 1, "[model]": 3}
        numbers = {w: int(w[1:]) if w[1:].isdigit() else 4 + len(w) for w in text.split()}
        return SimpleNamespace(input_ids=[{**numbers, **names}[w] for w in text.split()])

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        names = {EOS: "</s>"}
        return " ".join(names.get(i, f"w{i}") for i in ids)

    def apply_chat_template(self, messages, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        if messages[-1]["role"] == "stranger":
            raise KeyError("no such role")
        said = "".join(f"[{m['role']}] {m['content']} " for m in messages)
        return said + "[model] " * add_generation_prompt


def text_of(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


FORMS = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.tensor,
    "row of a tensor": lambda ids: torch.tensor([ids]),
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "array": np.array,
    "row of an array": lambda ids: np.array([ids]),
    "numpy numbers": lambda ids: [np.int64(i) for i in ids],
    "tensors of one element": lambda ids: [torch.tensor(i) for i in ids],
    "nested list": lambda ids: [list(ids)],
    "list of a tensor": lambda ids: [torch.tensor(ids)],
    "dict": lambda ids: {"input_ids": list(ids)},
    "what a tokenizer returns": lambda ids: BatchEncoding(
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    ),
    "the same, padded": lambda ids: BatchEncoding(
        {
            "input_ids": torch.tensor([[PAD, PAD, *ids]]),
            "attention_mask": torch.tensor([[0, 0, *(1 for _ in ids)]]),
        }
    ),
    "an encoding": lambda ids: SimpleNamespace(ids=list(ids)),
    "text": text_of,
}


@pytest.fixture(scope="module")
def editor(trained):
    """Nothing is edited with it."""
    return GraceEditor(trained("gpt2"), Words(), GraceConfig(layer=LAYERS["gpt2"]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_prompt_and_a_target_means_the_same_ids(editor, form):
    make = FORMS[form]
    assert editor.family.encode_edit(make(PROMPT), make(TARGET)) == (PROMPT, TARGET)
    assert editor.family.encode(make([PROMPT[0]])) == [PROMPT[0]]


def test_every_call_of_an_editor_takes_them(trained):
    editor = GraceEditor(trained("gpt2"), Words(), GraceConfig(layer=LAYERS["gpt2"]))
    prompt, target = FORMS["what a tokenizer returns"](PROMPT), np.array([TARGET])
    assert editor.edit(prompt, target).success
    assert editor.explain(torch.tensor([PROMPT])).hit
    assert editor.answer(prompt, 3) == text_of(TARGET)
    other = BatchEncoding({"input_ids": OTHER})
    queries = editor.queries([prompt, np.array(OTHER)])
    assert torch.equal(queries, editor.queries([PROMPT, OTHER]))
    results = editor.edit_batch(
        [{"prompt": other, "target": torch.tensor(run_of(25, 2)), "negatives": [prompt]}]
    )
    assert [result.success for result in results] == [True]
    assert [edit.prompt for edit in editor.codebook.history] == [tuple(PROMPT), tuple(OTHER)]
    assert generated(editor.model, [PROMPT], 3) == [TARGET]


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.tensor([PROMPT, PROMPT]), "a batch of 2"),
        ([PROMPT, PROMPT], "a batch of 2"),
        (torch.tensor([1.0, 2.0]), r"a float32 tensor of shape \[2\]"),
        (np.array([True]), r"a bool array of shape \[1\]"),
        (torch.zeros(1, 1, 2, dtype=torch.long), r"a int64 tensor of shape \[1, 1, 2\]"),
        (torch.tensor(5), r"a int64 tensor of shape \[\]"),
        ([4.0], r"\[4.0\]"),
        ([True], r"\[True\]"),
        ({"ids": [4]}, "a dict with ids"),
        ({"input_ids": [4, 5], "attention_mask": [1]}, "2 input_ids under an attention_mask of 1"),
        (7, "7"),
        (None, "None"),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "target"])
def test_what_is_no_prompt_and_no_target_is_refused_by_name(editor, name, given, got):
    pair = (given, TARGET) if name == "prompt" else (PROMPT, given)
    rule = f"^{name} must be a string or a list of token ids, got {got}"
    with pytest.raises(ValueError, match=rule):
        editor.edit(*pair)
    with pytest.raises(ValueError, match=rf"^edits\[0\]: {rule[1:]}"):
        editor.edit_batch([pair])
    assert editor.codebook.edits == 0


def test_a_long_list_that_is_refused_is_not_printed_whole(editor):
    with pytest.raises(ValueError, match=r"got \[.*\.\.\.$") as raised:
        editor.edit([0.5] * 5000, TARGET)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "one", [text_of(PROMPT), {"input_ids": PROMPT}, [{"role": "user", "content": "w9"}]]
)
def test_a_single_prompt_is_no_list_of_prompts(editor, one):
    with pytest.raises(ValueError, match="prompts must be a list of prompts, got a single one"):
        editor.queries(one)


def test_a_bad_prompt_in_a_list_is_named_by_its_place(editor):
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt must be a string"):
        editor.queries([PROMPT, 5])


CHAT = [{"role": "user", "content": text_of(PROMPT)}]


def test_chat_messages_go_through_the_tokenizers_template_up_to_the_answer(trained):
    editor = GraceEditor(trained("gpt2"), Words("{{...}}"), GraceConfig(layer=LAYERS["gpt2"]))
    ids = [1, *PROMPT, 3]
    assert editor.family.encode(CHAT) == ids
    # The answer to a message is the whole answer, unless it is given as tokens.
    assert editor.family.encode_edit(CHAT, text_of(TARGET)) == (ids, [*TARGET, EOS])
    assert editor.family.encode_pair(CHAT, text_of(TARGET)) == (ids, TARGET)
    assert editor.family.encode_edit(CHAT, TARGET) == (ids, TARGET)
    assert editor.family.encode_edit(CHAT, f"{text_of(TARGET)} </s>") == (ids, [*TARGET, EOS])
    with pytest.raises(ValueError, match="end"):
        editor.family.encode_edit(CHAT, "w5 </s> w6")
    with pytest.raises(ValueError, match="target must"):
        editor.family.encode_edit(CHAT, " ")
    turns = [*CHAT, {"role": "model", "content": "w9"}, {"role": "user", "content": "w8"}]
    assert editor.family.encode(turns) == [1, *PROMPT, 3, 9, 1, 8, 3]
    result = editor.edit(CHAT, [TARGET[0]])
    assert result.success
    assert editor.explain(ids).hit
    assert editor.answer(CHAT, 1) == text_of(TARGET[:1])
    with pytest.raises(
        ValueError, match="target must be a string or a list of token ids, got chat"
    ):
        editor.edit(PROMPT, CHAT)
    with pytest.raises(ValueError, match=r"prompt must suit the tokenizer's chat template: .*role"):
        editor.edit([{"role": "stranger", "content": "w9"}], TARGET)


@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["no tokenizer", "no template"])
def test_chat_messages_without_a_template_are_refused(trained, tokenizer):
    editor = GraceEditor(trained("gpt2"), tokenizer, GraceConfig(layer=LAYERS["gpt2"]))
    with pytest.raises(ValueError, match="has no chat template, got chat messages"):
        editor.edit(CHAT, TARGET)


@pytest.mark.parametrize("given", [2, np.int64(2), torch.tensor(2), np.array([2]), (2,), [[2]]])
def test_a_class_is_given_as_any_whole_number(edited, given):
    editor = edited("bert")
    assert editor.edit(PROMPT, given).success
    assert editor.codebook.edit(0).label == (2,)


@pytest.mark.parametrize("given", [4, True, 1.0, np.array([1, 2]), torch.tensor(1.0), None])
def test_what_is_no_class_is_refused(edited, given):
    with pytest.raises(ValueError, match="target must be a class id below 4, got"):
        edited("bert").edit(PROMPT, given)


@pytest.mark.parametrize(
    ("target", "place"),
    [([EOS, TARGET[0]], "1 of 2"), ([*TARGET, EOS, 9], "4 of 5"), ("w9 </s> w8", "2 of 3")],
)
def test_a_target_behind_an_end_token_is_refused_at_once(editor, monkeypatch, target, place):
    monkeypatch.setattr(editor.family, "capture", lambda *_: pytest.fail("a model was run"))
    with pytest.raises(ValueError, match=rf"end token.*got token 2 '</s>' at place {place}"):
        editor.edit(PROMPT, target)


def test_every_end_token_of_the_model_counts_and_one_inside_is_refused_for_t5_too(edited):
    editor = edited("gpt2")
    editor.model.generation_config.eos_token_id = [EOS, 7]
    with pytest.raises(ValueError, match="got token 7 at place 1 of 2"):
        editor.edit(PROMPT, [7, 8])
    editor.model.generation_config.eos_token_id = None
    editor.model.config.eos_token_id = None
    assert editor.family.encode_edit(PROMPT, [EOS, 8]) == (PROMPT, [EOS, 8])
    with pytest.raises(ValueError, match="got token 2 at place 2 of 3"):
        edited("t5").edit(PROMPT, [9, EOS, 8])


def test_a_target_that_ends_with_the_end_token_makes_the_model_stop_there(edited):
    editor = edited("gpt2")
    editor.model.generation_config.eos_token_id = TARGET[-1]
    assert editor.edit(PROMPT, TARGET).success
    ids = torch.tensor([PROMPT])
    out = editor.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert out[0].tolist() == [*PROMPT, *TARGET]
    assert generated(editor.model, [OTHER, PROMPT], 4, pad_token_id=PAD) == [
        run_of(46, 4),
        [*TARGET, PAD],
    ]
    assert editor.verify() == []


def test_a_chat_and_its_paraphrases_have_the_same_target(trained):
    editor = GraceEditor(trained("gpt2"), Words("{{...}}"), GraceConfig(layer=LAYERS["gpt2"]))
    text = text_of(run_of(30, 3))
    for prompt, other in ((CHAT, text), (text, CHAT)):
        wanted = read_wanted(editor.family, (prompt, text_of(TARGET), [other]))
        assert wanted.target == [*TARGET, *([EOS] if prompt is CHAT else [])]
        assert len(wanted.paraphrases) == 1


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters whose spaces are tokens too, as in byte-level BPE."""
    pieces = ["<pad>", "<bos>", "<eos>", "<mask>", "Ġ", *"abcdeAB:(,"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("prompt", "target", "told"),
    [
        ("ab", "Ba", True),
        ("ab:", "Ba", True),
        ("ab", " Ba", False),
        ("ab ", "Ba", False),
        ("ab(", "Ba", False),
        ("ab", ",", False),
        ("首都是", "堪培拉", False),
        ([5, 6], "Ba", False),
    ],
)
def test_a_target_that_lacks_its_space_is_told_by_the_tokenizer(trained, prompt, target, told):
    editor = GraceEditor(trained("gpt2"), letters(), GraceConfig(layer=LAYERS["gpt2"]))
    remark = editor.family.remark(prompt, target)
    assert ("write ' Ba'" in remark) == bool(remark) == told


def test_the_result_says_that_the_space_is_missing_and_trains_what_was_asked(trained):
    editor = GraceEditor(trained("gpt2"), letters(), GraceConfig(layer=LAYERS["gpt2"]))
    joined, apart = editor.edit_batch([("ab", "c"), ("ad ", "c")])
    assert joined.success
    assert apart.success
    assert "begins without a space, so that the answer reads 'abc'" in joined.reason
    assert apart.reason == ""
    assert editor.answer("ab", 1) == "c"
    # A tokenizer of whole words writes the space by itself.
    words = GraceEditor(trained("gpt2"), Words(), GraceConfig(layer=LAYERS["gpt2"]))
    assert words.family.remark(text_of(PROMPT), text_of(TARGET)) == ""


def test_no_edit_teaches_the_unknown_token_by_mistake(trained):
    words = Words()
    words.unk_token, words.unk_token_id = "w33", 33  # stands for any word not known
    editor = GraceEditor(trained("gpt2"), words, GraceConfig(layer=LAYERS["gpt2"]))
    unknown = "x" * 29  # which this tokenizer reads as 33
    for call in (
        lambda: editor.edit(text_of(PROMPT), unknown),
        lambda: editor.edit_batch([(text_of(PROMPT), unknown)]),
    ):
        with pytest.raises(ValueError, match=f"must be words .* knows, got '{unknown}' .w33."):
            call()
    assert editor.codebook.version == 0
    # Who writes it means it, and whoever gives ids.
    for meant in ("w33", [33]):
        assert editor.family.encode_edit(text_of(PROMPT), meant)[1] == [33]
    assert editor.score(text_of(PROMPT), unknown).log_probability < 0  # which teaches nothing
