"""Under torch.autocast: edits made for it answer inside and outside, others are refused inside."""

from __future__ import annotations

import copy

import pytest
import torch
from grace_edit import Codebook, GraceConfig, GraceEditor, load
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.adaptor.positions import QueryPlan
from grace_edit.codebook import files
from grace_edit.editing.drift import measure_drift
from tiny_models import LAYERS, generated, logits_of, run_of

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHERS = [run_of(40, 6), run_of(3, 2), run_of(22, 9)]
REFUSED = (
    r"outside of torch.autocast, got torch.autocast\('cpu', torch.bfloat16\).*editor.rekey\(\)"
)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def in_and_outside(ask):
    """Return what is answered outside autocast and inside."""
    outside = ask()
    with autocast():
        return outside, ask()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_without_edits_answers_under_autocast_as_the_unattached_one(edited, trained, name):
    editor, plain = edited(name), trained(name)
    with autocast():
        for row in OTHERS:
            assert torch.equal(logits_of(editor.model, row), logits_of(plain, row))
            assert generated(editor.model, [row], 3) == generated(plain, [row], 3)
        assert not editor.explain(PROMPT).hit


@pytest.mark.parametrize(
    ("name", "layer", "replace"),
    [
        pytest.param("llama", "model.layers.1.mlp", "last", id="takes fp32, gives bf16"),
        pytest.param("llama", "model.layers.1.mlp", "all", id="the same, replace all"),
        pytest.param("llama", "model.layers.1.mlp.down_proj", "prompt", id="takes and gives bf16"),
        pytest.param("llama", "model.layers.1", "last", id="takes and gives fp32"),
        pytest.param("gpt2", "transformer.h.1.mlp", "all", id="gpt2"),
    ],
)
def test_edits_made_under_autocast_answer_inside_and_outside(trained, name, layer, replace):
    model = trained(name)
    with autocast():
        editor = GraceEditor(model, None, GraceConfig(layer=layer, replace=replace, radius=0.5))
        assert editor.edit(PROMPT, TARGET).success
    book = editor.codebook
    assert (book.keys.dtype, book.values.dtype) == (torch.float32, torch.float32)
    assert book.autocast == torch.bfloat16
    rows = [OTHERS[0], PROMPT, OTHERS[2]]
    expected = [run_of(46, 3), TARGET, run_of(31, 3)]
    for use_cache in (True, False):
        both = in_and_outside(lambda c=use_cache: generated(model, rows, 3, use_cache=c))
        assert both == (expected, expected)
    plain = in_and_outside(lambda: int(logits_of(model, PROMPT)[-1].argmax()))
    assert plain == (TARGET[0], TARGET[0])
    assert in_and_outside(lambda: editor.explain(PROMPT).hit) == (True, True)
    assert in_and_outside(editor.verify) == ([], [])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_mean_of_a_prompt_asks_under_autocast_too(trained, name):
    model = trained(name)
    target, shown = (2, "LABEL_2") if name == "bert" else (TARGET, str(TARGET))
    with autocast():
        editor = GraceEditor(model, None, GraceConfig(layer=LAYERS[name], radius=0.5))
        assert editor.edit(PROMPT, target).success
    assert in_and_outside(lambda: editor.explain(PROMPT).hit) == (True, True)
    assert in_and_outside(lambda: editor.answer(PROMPT, 3)) == (shown, shown)


def test_the_drift_measured_under_autocast_knows_of_the_way_outside(edited, monkeypatch):
    editor = edited("llama")
    own = editor.family.capture

    def capture(prompts, **how):
        seen = own(prompts, **how)
        if not torch.is_autocast_enabled("cpu"):
            seen.queries += 3.0  # farther than any rounding moves it
        return seen

    monkeypatch.setattr(editor.family, "capture", capture)
    outside, inside = in_and_outside(lambda: measure_drift(editor.family, 0)[0])
    assert outside < 0.1
    assert inside == pytest.approx(3.0 * 48**0.5, abs=1.0)


def test_edits_made_outside_are_refused_inside_with_the_remedy_which_works(edited):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    with autocast():
        for ask in (
            lambda: logits_of(editor.model, PROMPT),
            lambda: generated(editor.model, [PROMPT], 3),
            lambda: editor.edit(OTHERS[0], TARGET),
            lambda: editor.explain(PROMPT),
            lambda: editor.verify(),
        ):
            with pytest.raises(ValueError, match=REFUSED):
                ask()
        with editor.disable():
            assert generated(editor.model, [PROMPT], 3) == [run_of(14, 3)]
    assert generated(editor.model, [PROMPT], 3) == [TARGET]
    with autocast():
        assert [result.success for result in editor.rekey()] == [True]
    both = in_and_outside(lambda: generated(editor.model, [PROMPT], 3))
    assert both == ([TARGET], [TARGET])


def test_the_first_edit_of_an_editor_made_outside_is_refused_inside(edited):
    editor = edited("llama")
    with autocast():
        with pytest.raises(ValueError, match=REFUSED):
            editor.edit(PROMPT, TARGET)
        editor.rekey()
        assert editor.edit(PROMPT, TARGET).success


def test_a_bf16_model_has_the_drift_of_bf16_already_and_answers_under_its_autocast(trained):
    model = trained("llama").to(torch.bfloat16)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["llama"]))
    assert editor.edit(PROMPT, TARGET).success
    both = in_and_outside(lambda: generated(model, [PROMPT], 3))
    assert both == ([TARGET], [TARGET])


def test_saved_edits_know_which_autocast_they_were_made_for(trained, tmp_path):
    model = trained("llama")
    with autocast():
        editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["llama"]))
        assert editor.edit(PROMPT, TARGET).success
    editor.save_pretrained(tmp_path / "inside")
    other = trained("llama")
    assert load(other, tmp_path / "inside").codebook.autocast == torch.bfloat16
    assert in_and_outside(lambda: generated(other, [PROMPT], 3)) == ([TARGET], [TARGET])

    editor = GraceEditor(trained("llama"), None, GraceConfig(layer=LAYERS["llama"]))
    assert editor.edit(PROMPT, TARGET).success
    editor.save_pretrained(tmp_path / "outside")
    assert "autocast" not in (tmp_path / "outside" / files.CONFIG).read_text()
    other = trained("llama")
    load(other, tmp_path / "outside")
    with autocast(), pytest.raises(ValueError, match=REFUSED):
        generated(other, [PROMPT], 3)


def test_only_the_rows_that_an_entry_answers_are_written_and_in_the_outputs_dtype():
    book = Codebook(2, 3, radius=0.5, autocast=torch.bfloat16)
    book.insert(torch.tensor([1.0, 1.0]), [1], torch.full((3,), 1.2345678))
    adaptor = GraceAdaptor(book, query="last", replace="last")
    at = torch.tensor([1, 3, -1])
    plan = QueryPlan(at, at.clamp(min=0), at + 1)
    source = torch.tensor([[0.0, 0], [1, 1.125], [1, 1], [9, 9]], dtype=torch.bfloat16)
    hidden = torch.zeros(4, 3, dtype=torch.bfloat16)
    with autocast(), adaptor.using(plan=plan):
        got = adaptor(source, copy.deepcopy(hidden))
    assert got.dtype == torch.bfloat16
    assert got[1].tolist() == torch.full((3,), 1.2345678).bfloat16().tolist()
    assert torch.equal(got[[0, 2, 3]], hidden[[0, 2, 3]])


def test_a_compiled_model_answers_under_autocast(trained):
    torch._dynamo.reset()
    model = trained("llama")
    with autocast():
        editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["llama"]))
        assert editor.edit(PROMPT, TARGET).success
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    @torch.no_grad()
    def ask():
        logits = compiled(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
        return int(logits[0, -1].argmax())

    assert in_and_outside(ask) == (TARGET[0], TARGET[0])
    torch._dynamo.reset()


def test_keys_made_from_text_have_the_same_bits_under_autocast():
    from grace_edit.adaptor.text_queries import TextQueries

    source = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=source)

    class Keys:
        def keys(self, text: str) -> torch.Tensor:
            return torch.ones(1, 64) @ weight + len(text)

    class Reader:
        def text(self, ids) -> str:
            return "text"

    rows = in_and_outside(lambda: TextQueries(Keys(), Reader()).rows([1, 2]))
    assert rows[1].dtype == torch.float32
    assert torch.equal(*rows)


def test_edits_with_negatives_are_rekeyed_in_another_dtype(edited):
    editor = edited("llama")
    result = editor.edit(PROMPT, TARGET, paraphrases=[run_of(9, 5)], negatives=[OTHERS[0]])
    assert result.success
    editor.model.to(torch.bfloat16)
    assert [again.success for again in editor.rekey()] == [True]
    assert editor.codebook.keys.dtype == torch.bfloat16
    assert generated(editor.model, [PROMPT], 3) == [TARGET]
