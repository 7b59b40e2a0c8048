"""Edits in the decoder of an encoder-decoder: its first token asks, however the rest is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, load
from tiny_models import EOS, PAD, padded, run_of

LAYER = "decoder.block.0.layer.2.DenseReluDense.wo"
PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER, SECOND = run_of(40, 6), [*run_of(20, 2), EOS]
ROWS = [run_of(22, 9), PROMPT, OTHER, run_of(7, 1)]


@pytest.fixture
def editor(edited) -> GraceEditor:
    """An editor with one edit in the decoder."""
    editor = edited("t5", layer="decoder.block.0.layer.2.DenseReluDense", radius=0.05)
    assert (editor.adaptor.query, editor.adaptor.replace) == ("last", "last")
    assert editor.edit(PROMPT, TARGET).success
    return editor


def says(model: Any, rows: Any, **how: Any) -> list[list[int]]:
    """Return what the decoder says to each of a padded batch, up to its end."""
    ids, mask = padded(rows, left=False)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **how)
    new = [row.tolist() for row in out[:, 1:]]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=["cache", "no cache", "static", "beams", "beams, no cache"],
)
def test_every_way_to_generate_gives_the_edited_tokens(editor, how):
    with editor.disable():
        unedited = says(editor.model, ROWS, **how)
    expected = [says(editor.model, [row], use_cache=False)[0] for row in ROWS]
    assert expected[1][:3] == TARGET
    assert unedited[1][:3] == run_of(14, 3)
    batch = says(editor.model, ROWS, **how)
    assert batch[1][:3] == TARGET
    assert [*batch[:1], *batch[2:]] == [*unedited[:1], *unedited[2:]]
    if "num_beams" not in how:
        assert batch == expected


def test_a_forward_replaces_the_row_of_the_first_token_and_no_other(editor):
    ids, mask = padded(ROWS, left=False)
    decoder_ids = torch.tensor([[PAD, *run_of(14, 4)]] * 4)
    seen: list[torch.Tensor] = []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        edited = editor.model(**given, decoder_input_ids=decoder_ids)
        taught = editor.model(**given, labels=torch.tensor([[*run_of(14, 4), EOS]] * 4))
        with editor.disable():
            editor.model(**given, decoder_input_ids=decoder_ids)
    handle.remove()
    assert torch.equal(edited.logits, taught.logits)
    assert torch.equal(seen[0][1, 0], editor.codebook.values[0])
    changed = (seen[0] != seen[2]).any(-1)
    assert changed.nonzero().tolist() == [[1, 0]]


def test_the_query_is_what_the_layer_takes_at_the_first_token(editor):
    seen: list[torch.Tensor] = []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    says(editor.model, [OTHER])
    handle.remove()
    assert torch.equal(editor.queries([OTHER])[0], seen[0][0, 0])
    assert editor.explain(PROMPT).hit
    assert not editor.explain(OTHER).hit


def test_edits_one_by_one_and_together_are_kept_saved_and_taken_back(editor, edited, tmp_path):
    result = editor.edit(OTHER, SECOND)
    assert result.success
    both = edited("t5", layer=LAYER[:-3], radius=0.05)
    assert all(r.success for r in both.edit_batch([(PROMPT, TARGET), (OTHER, SECOND)]))
    assert torch.equal(both.codebook.keys, editor.codebook.keys)
    assert torch.equal(both.codebook.radii, editor.codebook.radii)
    expected = says(editor.model, ROWS)
    assert (expected[1][:3], expected[2]) == (TARGET, SECOND)
    assert editor.verify() == []
    assert editor.score(OTHER, SECOND).greedy
    editor.save_pretrained(tmp_path)
    editor.detach()
    load(editor.model, tmp_path)
    assert says(editor.model, ROWS) == expected
    both.undo()
    assert says(both.model, [PROMPT])[0][:3] == run_of(14, 3)


def test_a_low_precision_decoder_is_edited_and_made_anew(editor):
    editor.model.to(torch.bfloat16)
    editor.rekey()
    assert editor.codebook.keys.dtype == torch.bfloat16
    assert says(editor.model, ROWS)[1][:3] == TARGET


@pytest.mark.parametrize(
    "layer", ["decoder.block.0.layer.0", "decoder.block.0.layer.1.EncDecAttention.q"]
)
def test_a_layer_that_does_not_know_the_prompt_yet_is_refused(trained, layer):
    model = trained("t5")
    with pytest.raises(ValueError, match=r"must see the prompt.*before the decoder's first"):
        GraceEditor(model, None, GraceConfig(layer=layer))
    GraceEditor(model, None, GraceConfig(layer=LAYER)).detach()


@pytest.mark.parametrize("more", [{"replace": "all"}, {"query": "mean"}, {"recipe": "paper"}])
def test_what_a_decoder_cannot_do_is_refused_with_the_remedy(trained, more):
    with pytest.raises(ValueError, match=r"must be edited with query='last'.*layer of the encoder"):
        GraceEditor(trained("t5"), None, GraceConfig(layer=LAYER, **more))


def test_layers_outside_of_both_stacks_are_refused(trained):
    with pytest.raises(ValueError, match="encoder or the decoder"):
        GraceEditor(trained("t5"), None, GraceConfig(layer="shared"))


@pytest.mark.parametrize("layer", ["encoder.layers.0.fc2", "decoder.layers.0.fc2"])
def test_another_encoder_decoder_is_edited_in_either_stack(layer, tmp_path):
    import transformers as tf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                decoder_ffn_dim=64, max_position_embeddings=32, pad_token_id=PAD, bos_token_id=1,
                eos_token_id=EOS, decoder_start_token_id=EOS, forced_eos_token_id=None,
                init_std=0.3,
            )
        ).eval()  # fmt: skip
    editor = GraceEditor(model, None, GraceConfig(layer=layer, radius=1e-3))
    result = editor.edit(PROMPT, [33])
    assert result.success
    assert says(model, ROWS)[1][0] == 33
    assert says(model, ROWS, use_cache=False) == says(model, ROWS)
    assert editor.verify() == []
    expected = says(model, ROWS)
    editor.save_pretrained(tmp_path)
    editor.detach()
    load(model, tmp_path)
    assert says(model, ROWS) == expected
