"""Asking as served: free generation, and the target's own tokens put in the model's mouth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from counting import words
from grace_edit import GraceConfig
from grace_edit.evaluation import AskedModel, EditRecord, Grace
from tiny_models import LAYERS

Asked = Callable[[str], AskedModel]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_forcing_through_generate_gives_the_losses_of_one_pass(name: str, asked: Asked) -> None:
    model = asked(name)
    prompt, target = words(3, 5), words(40, 2)
    _, forced = model.ask(prompt, target)
    assert forced is not None
    with torch.no_grad():
        logits, wanted = model.training_logits(prompt, target)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert forced.wanted == wanted.tolist()
    assert forced.predicted == logits.argmax(dim=-1).tolist()
    assert forced.losses == pytest.approx(losses.tolist(), abs=1e-4)


def test_a_target_said_freely_is_not_asked_again(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = asked("gpt2")
    prompt, target = words(3, 5), words(8, 3)
    calls: list[int] = []
    generate = model.model.generate

    def counting(**given: object) -> object:
        calls.append(1)
        return generate(**given)

    monkeypatch.setattr(model.model, "generate", counting)
    answer, forced = model.ask(prompt, target)
    assert (answer.text, len(calls)) == (target, 1)
    assert forced is not None
    with torch.no_grad():
        logits, wanted = model.training_logits(prompt, target)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert forced.losses == pytest.approx(losses.tolist(), abs=1e-4)
    model.ask(prompt, words(40, 2))
    assert len(calls) == 3
    # More is said where more is asked for, and the target's losses are of its own tokens.
    longer, again = model.ask(prompt, target, 6)
    assert (longer.text, again) == (words(8, 6), forced)


def test_a_record_that_is_no_edit_for_this_model_is_refused_with_the_reason(asked: Asked) -> None:
    model = asked("gpt2")
    method = Grace(model, GraceConfig(layer=LAYERS["gpt2"], radius=0.5))
    for record, reason in (
        (EditRecord("0", words(3, 5), "zanzibar"), "target must be words that the tokenizer knows"),
        (EditRecord("1", words(3, 5) * 100, words(40, 2)), "prompt must have at most"),
    ):
        made = method.edit(record)
        assert (made.accepted, made.edit) == (False, None)
        assert made.reason.startswith(reason)
    assert method.editor.codebook.version == 0


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_an_edit_is_asked_for_freely_and_teacher_forced(name: str, asked: Asked) -> None:
    model = asked(name)
    record = EditRecord("0", words(3, 5), 2 if name == "bert" else words(40, 2))
    method = Grace(model, GraceConfig(layer=LAYERS[name], radius=0.5))
    before, forced_before = method.ask(record.prompt, record.target)
    assert method.edit(record).accepted
    after, forced = method.ask(record.prompt, record.target)
    assert forced_before is not None
    assert forced is not None
    assert before.text != after.text == model.label(record.target)
    assert forced_before.predicted != forced.predicted == forced.wanted
    assert sum(forced.losses or [9]) < sum(forced_before.losses or [0])
    look = method.look(record.prompt)
    assert look is not None
    assert (look.fires, look.label, look.distance) == (True, model.label(record.target), 0)
    with method.unedited():
        assert method.ask(record.prompt, record.target)[0] == before
    # Teacher forcing asks at the prompt's end, although the target lies behind it.
    method.close()
    assert method.ask(record.prompt, record.target)[0] == before


def test_a_causal_prompt_ends_before_the_space_of_its_answer(asked: Asked) -> None:
    model = asked("gpt2")
    assert model.prompt("So far. ") == "So far."
    assert model.target(" so on ") == " so on"
    assert model.wanted_ids(words(3, 5) + " ", words(8, 2)) == model.wanted_ids(
        words(3, 5), words(8, 2)
    )
    assert model.fits(words(3, 5), words(8, 2))
    assert not model.fits(words(3, 63), words(8, 2))


def test_a_classifiers_long_text_is_cut_and_its_names_are_classes(asked: Asked) -> None:
    model = asked("bert")
    model.model.config.label2id = {"law": 0, "tax": 1}
    model.model.config.id2label = {0: "law", 1: "tax"}
    assert model.wanted_ids("x", "tax") == [1]
    assert model.label(0) == "law"
    long = words(0, 100)
    cut = model.for_editor(long)
    assert isinstance(cut, list)
    assert len(cut) == model.longest == 64
    assert model.for_editor(words(0, 9)) == words(0, 9)
    method = Grace(model, GraceConfig(layer=LAYERS["bert"], radius=0.5))
    wrong = {"law": "tax", "tax": "law"}
    own = model.ask(long, None)[0].text
    assert method.edit(EditRecord("0", long, wrong.get(own, "tax"))).accepted
    assert method.ask(long, None)[0].text == wrong.get(own, "tax")
    with pytest.raises(ValueError, match=r"target must be one of \['law', 'tax'\], got 'war'"):
        model.label("war")


def test_a_model_of_another_kind_and_a_class_for_a_text_are_refused(asked: Asked) -> None:
    with pytest.raises(ValueError, match="got BertForMaskedLM"):
        asked("bert-mlm")
    with pytest.raises(ValueError, match="target must be a text for a language model, got 3"):
        asked("gpt2").target(3)
