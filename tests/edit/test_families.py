"""Every model family: an edit answers, its neighbours do not notice, dtypes, rekeying."""

from __future__ import annotations

import copy
from dataclasses import replace

import grace_edit
import pytest
import torch
import transformers
from grace_edit import GraceConfig, GraceEditor, UndoError
from grace_edit.editing import making
from grace_edit.editing.drift import probes_of
from grace_edit.editing.fitting import Fit
from grace_edit.families import FAMILIES, family_of
from grace_edit.families.base import Family
from tiny_models import (
    CAUSAL,
    EOS,
    LAYERS,
    MASK,
    PAD,
    book_of,
    generated,
    logits_of,
    padded,
    run_of,
    same,
    state_of,
)

from grace_kernels.reference import squared_distances

A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 3)


def case(name):
    """Return two prompts and a target of each for a family."""
    if name == "bert":
        return (A, 2), (C, 0)
    if name == "bert-mlm":
        return ([*A[:2], MASK, *A[3:]], [40]), ([*C[:3], MASK, *C[4:]], [50])
    end = [EOS] if name == "t5" else []
    return (A, [*X, *end]), (C, [*Y, *end])


@pytest.mark.parametrize("name", list(LAYERS))
def test_two_edits_answer_alone_and_in_a_mixed_batch_and_nothing_else_changes(
    edited, trained, name
):
    editor, plain = edited(name, radius=0.05), trained(name)
    (p, x), (q, y) = case(name)
    results = editor.edit_batch([(p, x), (q, y)])
    assert [r.success for r in results] == [True, True]
    label = [[x], [y]] if name == "bert" else [x, y]
    family = editor.family
    assert family.answer(p, 4)[: len(label[0])] == label[0]
    assert family.answer(q, 4)[: len(label[1])] == label[1]
    assert family.produces([q, p], [label[1], label[0]], None) == [True, True]
    assert editor.verify() == []
    others = [run_of(s, 4 + s % 3) for s in range(0, 60, 9)]
    if name == "bert-mlm":
        for row in others:
            row[1] = MASK
    editor_model, extra = editor.model, {}
    if name == "t5":
        extra = {"decoder_input_ids": torch.tensor([[PAD, 20]])}
    for row in others:
        assert not editor.explain(row).hit
        assert torch.equal(logits_of(editor_model, row, **extra), logits_of(plain, row, **extra))
    editor.undo()
    assert torch.equal(logits_of(editor_model, p, **extra), logits_of(plain, p, **extra))


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_query_has_the_same_bits_as_the_layers_input_at_its_tokens(edited, name):
    (prompt, _), _ = case(name)
    editor = edited(name)
    seen = []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    query = editor.queries([prompt])[0]
    handle.remove()
    rows = seen[0][0]
    if name in CAUSAL:
        assert torch.equal(query, rows[-1])
    else:
        kept = [i for i, token in enumerate(prompt) if token != MASK]
        total = torch.zeros_like(query)
        for i in kept:
            total = total + rows[i]
        assert torch.equal(query, total / len(kept))


def test_a_masked_model_under_last_asks_at_the_mask(edited):
    editor = edited("bert-mlm", query="last")
    (prompt, target), _ = case("bert-mlm")
    seen = []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    query = editor.queries([prompt])[0]
    handle.remove()
    assert torch.equal(query, seen[0][0, 2])
    result = editor.edit(prompt, target)
    assert result.success
    assert editor.family.answer(prompt, 1) == target
    assert editor.verify() == []


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_encoder_can_be_edited_with_every_kind_of_replacement(edited, name, replace):
    editor = edited(name, replace=replace)
    prompt, target = (A, 2) if name == "bert" else (A, [EOS])
    result = editor.edit(prompt, target)
    assert result.success or "not produced" in result.reason
    if result.success:
        assert editor.family.answer(prompt, 1) == ([2] if name == "bert" else [EOS])
    assert result.success or replace != "all"


@pytest.mark.parametrize("query", ["last", "mean"])
def test_the_drift_of_a_masked_model_is_measured_on_prompts_with_a_mask(trained, query):
    model, seen = trained("bert-mlm"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    GraceEditor(model, None, GraceConfig(layer=LAYERS["bert-mlm"], query=query))
    assert len(seen) == 16  # eight probes, alone and together
    assert [row.count(MASK) for row in seen] == [1] * 16


def test_special_tokens_are_left_out_of_the_mean(edited):
    editor = edited("bert")
    seen = []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    query = editor.queries([[1, *A, EOS]])[0]
    handle.remove()
    total = torch.zeros_like(query)
    for row in seen[0][0, 1:-1]:
        total = total + row
    assert torch.equal(query, total / 5)


def test_a_class_may_be_named_and_a_wrong_one_is_refused(edited):
    editor = edited("bert")
    assert editor.edit(A, "LABEL_3").success
    assert editor.answer(A) == "LABEL_3"
    assert editor.edit(C, [1]).success
    for wrong in ("LABEL_9", 4, -1, [1, 2], True):
        with pytest.raises(ValueError, match="target must be"):
            editor.edit(A, wrong)


def test_a_masked_target_must_fill_every_mask(edited):
    editor = edited("bert-mlm")
    with pytest.raises(ValueError, match=r"one token per mask token of the prompt \(1\), got 2"):
        editor.edit([5, MASK, 7], [40, 41])
    with pytest.raises(ValueError, match=r"one token per mask token of the prompt \(0\), got 1"):
        editor.edit([5, 6, 7], [40])


def test_t5_compares_targets_with_their_end_and_a_near_query_hits(edited):
    editor = edited("t5", radius=50.0)
    assert editor.edit(A, [*X, EOS]).success
    ids, mask = padded([B, A, C], left=False)
    out = editor.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert out[0, 1:5].tolist() == out[1, 1:5].tolist() == [*X, EOS]
    assert editor.edit(B, [*Y, EOS]).case == "split"
    out = editor.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert [row[1:5].tolist() for row in out[:2]] == [[*Y, EOS], [*X, EOS]]


class FirstTokenFamily(Family):
    """Token classifiers, where the class of the first token is the answer."""

    name = "tokens"
    kind = "token classifier"
    auto_class = "AutoModelForTokenClassification"
    class_endings = ("ForTokenClassification",)
    default_query = "last"

    @classmethod
    def recognises(cls, model):
        return type(model).__name__.endswith(cls.class_endings)

    @classmethod
    def text_of(cls, target, tokenizer, config):
        return f"class {target[0]}"

    def target_logits(self, prompts, targets, values):
        batch = self.inputs(prompts)
        with self.teaching(values, batch, prompts):
            logits = self.model(**batch).logits[:, 0]
        return logits, torch.tensor([y[0] for y in targets])

    @torch.no_grad()
    def produces(self, prompts, targets, values):
        with self.answering(values):
            found = self.model(**self.inputs(prompts)).logits[:, 0].argmax(dim=-1)
        return [f == y[0] for f, y in zip(found.tolist(), targets, strict=True)]

    @torch.no_grad()
    def answer(self, prompt, length):
        return [int(self.model(**self.inputs([prompt])).logits[0, 0].argmax())]


def test_another_family_is_one_class_and_its_name_in_the_list(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "grace_edit.families.FAMILIES", {FirstTokenFamily.name: FirstTokenFamily, **FAMILIES}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForTokenClassification(trained("bert").config).eval()
    plain = copy.deepcopy(model)
    editor = GraceEditor(model, None, GraceConfig(layer="bert.encoder.layer.1.output.dense"))
    assert (editor.adaptor.query, editor.adaptor.replace) == ("last", "all")
    was = editor.family.answer(A, 1)[0]
    assert editor.edit(A, [(was + 1) % 4]).success
    assert editor.answer(A) == editor.explain(A).label == f"class {(was + 1) % 4}"
    assert editor.verify() == []
    editor.save_pretrained(tmp_path)
    grace_edit.load(plain, tmp_path)
    assert torch.equal(logits_of(plain, A), logits_of(model, A))
    assert '"task": "tokens"' in (tmp_path / "grace_config.json").read_text()


class Words:
    """A tokenizer of word numbers: "w10 w11"; enough of the interface to be used as one."""

    all_special_ids = (0, 1, 2, 3)
    pad_token_id, mask_token_id = PAD, MASK

    def __call__(self, text, add_special_tokens=True):
        ids = [4 + int(word[1:]) % 60 for word in text.split()]
        if not ids and text.strip():
            raise ValueError(text)
        return type("Encoded", (), {"input_ids": ids})()

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{i - 4}" for i in ids if i > 3 or not skip_special_tokens)


def test_with_a_tokenizer_prompts_targets_and_answers_are_text(trained, monkeypatch):
    monkeypatch.setattr(
        "grace_edit.editing.drift._SENTENCES", tuple("w1 w2 w3 w4"[: 3 * n + 2] for n in range(4))
    )
    editor = GraceEditor(trained("gpt2"), Words(), GraceConfig(layer=LAYERS["gpt2"]))
    assert editor.edit("w10 w11 w12", " w30 w31").success
    assert editor.answer("w10 w11 w12", max_new_tokens=2) == "w30 w31"
    assert editor.explain("w10 w11 w12").label == "w30 w31"
    assert editor.answer("w20 w21 w22", max_new_tokens=2) == "w23 w24"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_a_model_of_low_precision_is_edited_as_stored_and_served_padded(trained, name, dtype):
    model = trained(name).to(dtype)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS[name]))
    book = editor.codebook
    assert book.keys.dtype == book.values.dtype == dtype
    (p, x), (q, y) = case(name)
    assert [r.success for r in editor.edit_batch([(p, x), (q, y)])] == [True, True]
    label = [[x], [y]] if name == "bert" else [x, y]
    assert editor.family.answer(p, 4)[: len(label[0])] == label[0]
    assert editor.family.produces([q, p], label[::-1], None) == [True, True]
    assert editor.verify() == []


def test_the_drift_of_a_low_precision_model_is_measured_and_taken_into_an_expanded_radius(
    trained, monkeypatch
):
    model = trained("gpt2").to(torch.bfloat16)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    first, second = (editor.queries([prompt])[0].double() for prompt in (A, B))
    distance = float((first - second).norm())
    editor.detach()
    kind = type(editor.family)
    honest = kind.capture

    def drifts(family, prompts, *, left=False):
        # How far a query moves in a padded batch is up to the machine; here all move by about 1.
        seen = honest(family, prompts, left=left)
        if len(prompts) > 1:
            alone = [honest(family, [prompt]).queries for prompt in prompts]
            seen = replace(seen, queries=torch.cat(alone))
            seen.queries[:, 0] += 1.0
        return seen

    monkeypatch.setattr(kind, "capture", drifts)
    config = GraceConfig(layer=LAYERS["gpt2"], radius=distance * 0.7, max_radius=10.0)
    editor = GraceEditor(model, None, config)
    drift = editor.codebook.drift
    assert drift == pytest.approx(1.0, abs=0.1)  # what bfloat16 makes of it
    assert editor.edit(A, X).success
    result = editor.edit(B, X)
    assert result.case == "expand"
    assert result.radius_after >= result.distance + drift
    assert editor.verify() == []
    batch = generated(model, [run_of(22, 9), B, A], 3)
    assert batch[1:] == [X, X]


def test_a_drift_that_is_given_is_not_measured(edited):
    assert edited("gpt2", drift=0.125).codebook.drift == 0.125


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rekeying_makes_every_live_edit_anew_in_the_models_new_dtype(edited, name, dtype):
    editor = edited(name)
    (p, x), (q, y) = case(name)
    editor.edit(q, x)
    gone = editor.edit(run_of(3, 4) if name != "bert-mlm" else p, x)
    assert editor.edit_batch([(p, x), (q, y)])[1].success
    editor.delete(gone.id)
    ids, version = editor.codebook.ids, editor.codebook.version
    editor.model.to(dtype)
    results = editor.rekey()
    assert [r.success for r in results] == [True, True]
    assert editor.codebook.ids == ids == [2, 3]
    assert editor.codebook.keys.dtype == editor.codebook.values.dtype == dtype
    assert editor.codebook.version > version
    label = [[x], [y]] if name == "bert" else [x, y]
    for prompt, wanted in zip((p, q), label, strict=True):
        assert editor.family.answer(prompt, 4)[: len(wanted)] == wanted
    assert editor.verify() == []
    editor.codebook.check()
    with pytest.raises(UndoError, match="rekeyed"):
        editor.undo()
    assert editor.edit(run_of(22, 9) if name != "bert-mlm" else p, x).id == 4


def test_rekeying_on_the_same_model_keeps_keys_values_and_radii(edited):
    editor = edited("gpt2", radius=0.2)
    editor.edit_batch([(A, X), (B, Y), (C, X)])
    before = book_of(editor.codebook)
    results = editor.rekey()
    after = book_of(editor.codebook)
    for part in ("keys", "values", "radii", "ids", "members"):
        assert same(after[part], before[part]), part
    assert [r.steps for r in results] == [0, 0, 0]


@pytest.mark.parametrize("how", ["refused", "broken", "Ctrl-C"])
def test_a_rekeying_that_fails_leaves_the_edits_as_they_were(edited, monkeypatch, how):
    editor = edited("gpt2")
    editor.edit_batch([(A, X), (C, X)])
    book, before = editor.codebook, book_of(editor.codebook)
    editor.model.to(torch.bfloat16)
    model, calls = state_of(editor.model), []
    inner = editor.family.produces

    def second(*args):
        calls.append(1)
        if len(calls) == 2:
            if how == "refused":
                return [False]
            raise KeyboardInterrupt if how == "Ctrl-C" else RuntimeError("broken")
        return inner(*args)

    monkeypatch.setattr(editor.family, "produces", second)
    monkeypatch.setattr(making, "fit_value", lambda *a, **k: Fit(a[3], False, 1.0, 1.0, 5, "never"))
    wanted = KeyboardInterrupt if how == "Ctrl-C" else RuntimeError
    with pytest.raises(wanted, match=None if how != "refused" else "edit 1 cannot be made anew"):
        editor.rekey()
    assert editor.codebook is book
    assert same(book_of(book), before)
    assert same(state_of(editor.model), model)
    monkeypatch.undo()
    assert [r.success for r in editor.rekey()] == [True, True]


def test_a_frozen_editor_is_not_rekeyed(edited):
    editor = edited("gpt2")
    editor.frozen = True
    with pytest.raises(ValueError, match="frozen must be False"):
        editor.rekey()


def test_edits_without_a_stored_prompt_are_not_rekeyed(edited):
    editor = edited("gpt2")
    assert editor.edit(A, X).success
    book = editor.codebook
    book.insert(editor.queries([C])[0], X, book.values[0])
    with pytest.raises(ValueError, match=r"edits \[1\] have no stored prompt"):
        editor.rekey()
    assert editor.codebook is book


@pytest.mark.parametrize("query", ["last", "mean"])
def test_the_drift_between_alone_and_padded_is_what_the_queries_show(trained, query):
    model = trained("llama").to(torch.bfloat16)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["llama"], query=query))
    family = editor.family
    probes = probes_of(family, editor.config.seed)
    assert len({len(ids) for ids in probes}) == 8
    alone = torch.cat([family.capture([ids]).queries for ids in probes])
    apart = [
        squared_distances(alone, family.capture(probes, left=left).queries).diagonal()
        for left in (False, True)
    ]
    assert editor.codebook.drift == float(torch.cat(apart).max().double().sqrt().float())


class OwnGenerate(transformers.GPT2LMHeadModel):
    """A causal model that generates by itself, one plain forward per token."""

    prepare_inputs_for_generation = property()  # transformers' is not there

    def generate(self, input_ids, attention_mask, max_new_tokens, **ignored):
        for _ in range(max_new_tokens):
            logits = self(input_ids=input_ids, attention_mask=attention_mask).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
            attention_mask = torch.ones_like(input_ids)
        return input_ids


def test_a_model_with_a_generate_of_its_own_is_edited_through_its_forwards(trained):
    model = trained("gpt2")
    model.__class__ = OwnGenerate
    assert not hasattr(model, "prepare_inputs_for_generation")
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert editor.edit(A, X[:1]).success
    assert editor.family.answer(A, 1) == X[:1]


def test_a_masked_language_model_is_one_whatever_its_configuration_counts(trained):
    class OwnForMaskedLM(type(trained("bert-mlm"))):
        def get_output_embeddings(self):
            return None

    model = trained("bert-mlm")
    model.__class__ = OwnForMaskedLM
    assert model.config.num_labels
    assert family_of(model, None).name == "masked"
