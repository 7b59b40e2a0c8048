"""Edits with `query="text"` on disk: their map lies beside them, their encoder is referred to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import grace_edit
import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, StoreError
from text_maps import encode, map_of, map_of_encoder
from text_models import (
    NEIGHBOUR,
    OTHER,
    QUESTION,
    REWORDED,
    TARGET,
    text_editor,
    tokenizer,
)
from tiny_models import LAYERS, generated, run_of

WORDS = tokenizer()
FILES = ["codebook.safetensors", "edits.jsonl", "grace_config.json"]
MAP = ["text_map.json", "text_map.safetensors"]

FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import grace_edit
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
words = AutoTokenizer.from_pretrained(sys.argv[2])
grace_edit.load(model, sys.argv[3], tokenizer=words)
for prompt in sys.argv[4:]:
    ids = torch.tensor([words(prompt).input_ids])
    print(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist())
"""


def ids_of(text):
    return WORDS(text).input_ids


def text_edited(trained, **config):
    made = text_editor(trained("gpt2"), "gpt2", **config)
    assert made.edit(QUESTION, TARGET).success
    return made


def by_encoder(trained, encoder=encode, text_map=None):
    text_map = text_map or map_of_encoder()
    made = text_editor(trained("gpt2"), "gpt2", encoder=encoder, text_map=text_map)
    assert made.edit(QUESTION, TARGET).success
    return made


def test_a_fresh_process_answers_alike_without_the_directory_of_the_map(trained, tmp_path):
    words, model = tokenizer(), trained("gpt2")
    maps = tmp_path / "map"
    map_of(model, words).save(maps)
    editor = text_editor(model, "gpt2", text_map=str(maps))
    assert editor.edit(QUESTION, TARGET).success
    editor.save_pretrained(tmp_path / "edits")
    assert sorted(p.name for p in (tmp_path / "edits").iterdir()) == sorted([*FILES, *MAP])
    prompts = [QUESTION, REWORDED, NEIGHBOUR]
    wanted = [generated(editor.model, [ids_of(p)], 3)[0] for p in prompts]
    assert wanted[0] == ids_of(TARGET)
    editor.detach()
    editor.model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    for file in maps.iterdir():
        file.unlink()
    place = Path(grace_edit.__file__).parents[1]
    command = [sys.executable, "-c", FRESH, place, tmp_path / "model", tmp_path / "edits"]
    done = subprocess.run([*map(str, command), *prompts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted


def test_editing_goes_on_after_loading_with_the_same_keys(trained, tmp_path):
    editor = text_edited(trained)
    editor.save_pretrained(tmp_path)
    again = GraceEditor.from_pretrained(trained("gpt2"), WORDS, tmp_path)
    assert again.config.query == "text"
    assert again.adaptor.text.about() == editor.adaptor.text.about()
    for one in (editor, again):
        assert one.edit(OTHER, "six seven").success
    assert torch.equal(again.codebook.keys, editor.codebook.keys)
    assert again.explain(REWORDED) == editor.explain(REWORDED)
    assert [r.success for r in again.rekey()] == [True, True]
    again.save_pretrained(tmp_path)
    assert grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS).codebook.edits == 2


def test_a_tokenizer_is_needed_and_it_must_be_the_same(trained, tmp_path):
    text_edited(trained).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        grace_edit.load(trained("gpt2"), tmp_path)
    other = json.loads(WORDS.backend_tokenizer.to_str())
    vocabulary = other["model"]["vocab"]
    a, b = (vocabulary[w] for w in ("Australia", "Austria"))
    vocabulary["Australia"], vocabulary["Austria"] = b, a
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(other)), pad_token="<pad>"
    )
    model = trained("gpt2")
    with pytest.raises(StoreError, match="another tokenizer: the prompt of edit 0"):
        grace_edit.load(model, tmp_path, tokenizer=swapped)
    assert not hasattr(model, "grace")


@pytest.mark.parametrize("name", MAP)
def test_a_map_that_was_altered_or_is_gone_is_refused_by_name(trained, tmp_path, name):
    text_edited(trained).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + b"x")
    with pytest.raises(StoreError, match=f"{name}: checksum differs"):
        grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS)
    (tmp_path / name).unlink()
    with pytest.raises(StoreError, match=f"{name}: cannot be read"):
        grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS)


def test_a_save_that_stopped_between_its_renames_is_loaded_whole(trained, tmp_path):
    text_edited(trained).save_pretrained(tmp_path)
    editor = text_editor(trained("gpt2"), "gpt2")
    assert editor.edit(OTHER, TARGET).success
    new = tmp_path / "new"
    editor.save_pretrained(new)
    for file in new.iterdir():
        (tmp_path / (file.name + ".new")).write_bytes(file.read_bytes())
    names = sorted(p.name for p in tmp_path.glob("*.new"))
    for renamed in range(len(names) + 1):
        for name in names[:renamed]:
            if (tmp_path / name).exists() and not name.startswith("grace_config"):
                (tmp_path / name).replace(tmp_path / name.removesuffix(".new"))
        found = grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS)
        whole = list(found.codebook.history[0].prompt or ())
        assert whole in (ids_of(QUESTION), ids_of(OTHER))


def test_a_callable_encoder_must_be_given_again_and_be_the_same(trained, tmp_path):
    editor = by_encoder(trained)
    editor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder must be given"):
        GraceEditor.from_pretrained(trained("gpt2"), WORDS, tmp_path)
    again = GraceEditor.from_pretrained(trained("gpt2"), WORDS, tmp_path, encoder=encode)
    assert again.explain(REWORDED) == editor.explain(REWORDED)
    served = grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS, encoder=encode)
    assert served.text.about() == editor.adaptor.text.about()

    def of_another_machine(texts):
        return encode(texts) * (1 + 1e-5 * torch.randn(26, generator=torch.Generator()))

    served = grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS, encoder=of_another_machine)
    assert served.codebook.edits == 1

    def another(texts):
        return encode(texts).flip(1)

    model = trained("gpt2")
    with pytest.raises(StoreError):
        grace_edit.load(model, tmp_path, tokenizer=WORDS, encoder=another)
    assert not hasattr(model, "grace")


def test_another_map_beside_the_edits_is_refused_by_its_fingerprint(trained, tmp_path):
    editor = text_edited(trained)
    keys = editor.adaptor.text.keys
    keys.map, kept = dataclasses.replace(keys.map, meaning_length=2.0), keys.map
    changed = keys.fingerprint()
    keys.map = kept
    assert changed != keys.fingerprint()
    files = type(kept).files
    try:
        type(kept).files = lambda own: files(dataclasses.replace(own, meaning_length=2.0))
        editor.save_pretrained(tmp_path)
    finally:
        type(kept).files = files
    with pytest.raises(StoreError, match=f"{keys.fingerprint()}, got {changed}"):
        grace_edit.load(trained("gpt2"), tmp_path, tokenizer=WORDS)


def test_the_settings_of_an_encoder_or_a_map_that_json_cannot_hold_are_named(trained):
    config = by_encoder(trained).config.to_dict()
    assert json.loads(json.dumps(config))["encoder"] == "callable"
    assert config["text_map"] is None
    assert GraceConfig(layer="h", text_map="maps/a").to_dict()["text_map"] == "maps/a"
    with pytest.raises(ValueError, match="encoder must be"):
        GraceConfig(layer="h", encoder=3)


def test_edits_with_other_queries_are_saved_without_a_map(edited, tmp_path):
    editor = edited("gpt2")
    assert editor.edit(run_of(10, 4), run_of(30, 3)).success
    editor.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    editor.detach()
    assert grace_edit.load(editor.model, tmp_path).text is None


def test_the_layer_of_saved_edits_is_named(trained, tmp_path):
    text_edited(trained).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "grace_config.json").read_text())["config"]["serving"]
    assert about["layer"] == LAYERS["gpt2"]
    assert about["text"]["encoder"] == "tokens"
    assert set(about["text"]) == {"encoder", "map", "width", "map_fingerprint", "fingerprint"}
