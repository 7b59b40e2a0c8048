"""Saved edits in a fresh process: the same lookups, the same tokens, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grace_edit
import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, StoreError
from tiny_models import LAYERS, MASK, book_of, generated, logits_of, padded, run_of, same, state_of

A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 3)

ROWS = [A, B, C, run_of(3, 2), run_of(22, 9)]

FRESH = """
import json, sys
import torch, transformers
import grace_edit
torch.set_num_threads(1)
name, model_dir, edits, out, how = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(model_dir)
rows = json.loads(sys.stdin.read())
if how == "load":
    adaptor = grace_edit.load(model, edits)
    book = adaptor.codebook
else:
    editor = grace_edit.GraceEditor.from_pretrained(model, None, edits)
    book = editor.codebook
new, logits = [], []
with torch.no_grad():
    for row in rows:
        ids = torch.tensor([row])
        produced = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5,
                                  do_sample=False)
        new.append(produced[0].tolist())
        extra = {"decoder_input_ids": torch.zeros(1, 1).long()} if name.startswith("T5") else {}
        logits.append(model(input_ids=ids, **extra).logits)
keys = torch.load(out + "/queries.pt")
index, distance = book.lookup(keys)
torch.save({"new": new, "logits": logits, "index": index, "distance": distance,
            "keys": book.keys[: int(book.count)], "values": book.values[: int(book.count)],
            "radii": book.radii[: int(book.count)], "ids": book.ids}, out + "/fresh.pt")
"""


def tokens_and_logits(model, rows, name):
    new, logits = [], []
    for row in rows:
        ids = torch.tensor([row])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        new.append(out[0].tolist())
        extra = {"decoder_input_ids": torch.zeros(1, 1).long()} if name == "t5" else {}
        logits.append(logits_of(model, row, **extra)[None])
    return new, logits


@pytest.mark.parametrize(("name", "how"), [("gpt2", "load"), ("gpt2", "editor"), ("t5", "load")])
def test_a_fresh_process_looks_up_and_generates_the_same_to_the_bit(
    edited, trained, tmp_path, name, how
):
    editor = edited(name, radius=0.3)
    end = [2] if name == "t5" else []
    results = editor.edit_batch([(A, X + end), (B, Y + end), (C, X + end), (A, Y + end)])
    assert all(r.success for r in results)
    queries = editor.queries(ROWS)
    queries = torch.cat([queries, queries + 0.01, editor.codebook.keys[:2]])
    torch.save(queries, tmp_path / "queries.pt")
    editor.save_pretrained(tmp_path / "edits")
    trained(name).save_pretrained(tmp_path / "model")
    root = Path(grace_edit.__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FRESH,
            type(editor.model).__name__,
            str(tmp_path / "model"),
            str(tmp_path / "edits"),
            str(tmp_path),
            how,
        ],
        input=json.dumps(ROWS),
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": f"{root}:{root / 'python'}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fresh = torch.load(tmp_path / "fresh.pt")
    # A model read from the same file, its weights placed alike, on which products' bits may depend.
    other = type(trained(name)).from_pretrained(tmp_path / "model")
    grace_edit.load(other, tmp_path / "edits")
    new, logits = tokens_and_logits(other, ROWS, name)
    assert tokens_and_logits(editor.model, ROWS, name)[0] == new
    index, distance = editor.codebook.lookup(queries)
    assert fresh["new"] == new
    assert same(fresh["logits"], logits)
    assert torch.equal(fresh["index"], index)
    assert torch.equal(fresh["distance"], distance)
    assert (index >= 0).any()
    assert (index < 0).any()
    count = int(editor.codebook.count)
    for part in ("keys", "values", "radii"):
        assert torch.equal(fresh[part], getattr(editor.codebook, part)[:count])
    assert fresh["ids"] == editor.codebook.ids
    start = 1 if name == "t5" else len(A)
    assert new[0][start : start + 3] == Y


@pytest.fixture
def saved(edited, tmp_path):
    """Return a directory with two edits of GPT-2."""
    editor = edited("gpt2")
    assert all(r.success for r in editor.edit_batch([(A, X), (C, Y)]))
    editor.save_pretrained(tmp_path / "edits")
    return tmp_path / "edits"


def test_an_editor_that_was_loaded_goes_on_editing_with_new_ids(trained, saved):
    editor = GraceEditor.from_pretrained(trained("gpt2"), None, saved)
    assert editor.layer == LAYERS["gpt2"]
    assert editor.codebook.ids == [0, 1]
    assert editor.edit(B, X).id == 2
    assert generated(editor.model, [A, B, C], 3) == [X, X, Y]
    assert editor.verify() == []
    editor.delete(1)
    assert generated(editor.model, [C], 3) == [run_of(46, 3)]
    editor.save_pretrained(saved)
    editor.detach()
    again = GraceEditor.from_pretrained(editor.model, None, saved)
    assert again.codebook.ids == [0, 2]


def test_loading_serves_without_an_editor_and_detach_takes_it_out(trained, saved):
    model = trained("gpt2")
    before = state_of(model)
    adaptor = grace_edit.load(model, saved)
    assert isinstance(adaptor, grace_edit.GraceAdaptor)
    assert generated(model, [C, A], 3) == [Y, X]
    grace_edit.detach(model)
    assert same(state_of(model), before)


def test_every_setting_of_the_editor_comes_back(edited, trained, tmp_path):
    editor = edited(
        "gpt2", radius=0.4, replace="prompt", query="mean", margin=0.7, capacity=9, drift=0.001
    )
    assert editor.edit(A, X).success
    editor.save_pretrained(tmp_path)
    again = GraceEditor.from_pretrained(trained("gpt2"), None, tmp_path)
    assert again.config == editor.config
    for part in ("query", "replace", "drift", "capacity"):
        assert again.status()[part] == editor.status()[part]
    assert generated(again.model, [A], 3) == [X]


def change(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1e-3


def refused(model, directory, match, **kwargs):
    before = state_of(model)
    with pytest.raises(StoreError, match=match) as caught:
        GraceEditor.from_pretrained(model, None, directory, **kwargs)
    if not kwargs:
        with pytest.raises(StoreError, match=match):
            grace_edit.load(model, directory)
    assert same(state_of(model), before)
    return str(caught.value)


def test_a_model_that_differs_below_the_layer_is_refused_also_when_above_is_allowed(trained, saved):
    model = trained("gpt2")
    change(model, "transformer.h.0.mlp.c_fc.weight")
    match = "another model: its parameters differ below"
    assert str(saved) in refused(model, saved, match)
    refused(model, saved, match, allow_above=True)


def test_a_model_that_differs_above_the_layer_is_accepted_only_where_every_edit_is_proved_anew(
    trained, saved
):
    model = trained("gpt2")
    change(model, "transformer.ln_f.bias")
    refused(model, saved, "its parameters differ above")
    editor = GraceEditor.from_pretrained(model, None, saved, allow_above=True)
    assert generated(model, [A, C], 3) == [X, Y]
    editor.detach()
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_(std=30.0)
    text = refused(model, saved, "the model must produce every edit's target", allow_above=True)
    assert "edits [0" in text


def test_a_tied_head_belongs_to_what_lies_below(trained, saved):
    model = trained("gpt2")
    change(model, "transformer.wte.weight")
    refused(model, saved, "differ below")


def test_another_family_or_a_model_without_the_layer_is_refused(trained, saved):
    refused(trained("llama"), saved, "edits of another model or layer.*transformer.h.1.mlp")


def test_another_size_is_refused(saved):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4))
    refused(other.eval(), saved, "another model: its parameters differ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_refused_by_name(trained, saved, dtype):
    refused(trained("gpt2").to(dtype), saved, rf"dtype must be.*{dtype}.*got edits made in.*32")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files_are_refused_by_name_and_the_codebook_in_memory_is_untouched(
    trained, saved, damage
):
    model = trained("gpt2")
    editor = GraceEditor.from_pretrained(model, None, saved)
    before, version = book_of(editor.codebook), editor.codebook.version
    broken = saved.parent / "broken"
    shutil.copytree(saved, broken)
    file = broken / "codebook.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-5] ^= 1
        file.write_bytes(content if damage == "altered" else content[:-7])
    refused(trained("gpt2"), broken, "codebook.safetensors")
    with pytest.raises(StoreError):
        GraceEditor.from_pretrained(model, None, broken)
    assert same(book_of(editor.codebook), before)
    assert editor.codebook.version == version
    assert generated(model, [A, C], 3) == [X, Y]


def test_edits_of_a_compiled_model_load_into_the_plain_one(trained, tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(trained("gpt2"), backend="eager")
    editor = GraceEditor(compiled, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert editor.edit(A, X).success
    editor.save_pretrained(tmp_path)
    model = trained("gpt2")
    grace_edit.load(model, tmp_path)
    assert generated(model, [A], 3) == [X]
    torch._dynamo.reset()


def test_a_low_precision_codebook_is_restored_to_the_bit(trained, tmp_path):
    model = trained("gpt2").to(torch.bfloat16)
    editor = GraceEditor(model, None, GraceConfig(layer=LAYERS["gpt2"]))
    assert all(r.success for r in editor.edit_batch([(A, X), (C, Y)]))
    editor.save_pretrained(tmp_path)
    again = GraceEditor.from_pretrained(trained("gpt2").to(torch.bfloat16), None, tmp_path)
    assert same(book_of(again.codebook), book_of(editor.codebook))
    ids, mask = padded([A, C], left=True)
    assert torch.equal(
        again.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False),
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False),
    )


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_of_the_wrapped_block_that_changed_makes_another_model_below(
    edited, trained, tmp_path, norm
):
    # Llama registers a block's norms after its mlp, yet they decide the query.
    editor = edited("llama")
    assert editor.edit(A, X).success
    editor.save_pretrained(tmp_path)
    other = trained("llama")
    block = other.get_submodule(editor.layer.rsplit(".", 1)[0])
    with torch.no_grad():
        block.get_submodule(norm).weight.mul_(1.05)
    with pytest.raises(StoreError, match="differ below"):
        GraceEditor.from_pretrained(other, None, tmp_path, allow_above=True)


@pytest.mark.parametrize("name", ["bert", "bert-mlm"])
def test_an_editor_on_saved_edits_asks_as_they_say_whatever_its_tokenizer_holds(
    edited, trained, tmp_path, name
):
    class Tokenizer:
        """Calls a word of the prompt special, and another token the mask."""

        all_special_ids = (0, 1, 2, 3, A[1])
        pad_token_id, mask_token_id = 0, A[1]

        def __call__(self, text, **_):
            raise AssertionError("nobody has a text here")

    editor = edited(name, query="last" if name == "bert-mlm" else "mean")
    prompt, target = (A, 2) if name == "bert" else ([*A[:2], MASK, *A[3:]], [40])
    assert editor.edit(prompt, target).success
    editor.save_pretrained(tmp_path)
    again = GraceEditor.from_pretrained(trained(name), Tokenizer(), tmp_path)
    assert torch.equal(again.queries([prompt])[0], editor.codebook.keys[0])
    assert again.verify() == []
