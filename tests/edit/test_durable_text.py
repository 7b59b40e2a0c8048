"""Published edits with `query="text"`: the map travels with them, the encoder is referred to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grace_edit
import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, StoreError
from text_maps import encode, map_of_encoder
from text_models import NEIGHBOUR, OTHER, QUESTION, REWORDED, TARGET, text_editor, tokenizer
from tiny_models import LAYERS, generated, run_of

WORDS = tokenizer()
SAID = WORDS(TARGET).input_ids


def ask(model: Any, prompt: str) -> list[int]:
    return list(generated(model, [WORDS(prompt).input_ids], 3)[0])


def test_rewordings_are_answered_where_published_edits_are_followed(
    trained: Callable[[str], Any], tmp_path: Path
) -> None:
    where, replica = tmp_path / "edits", trained("gpt2")
    before = [ask(replica, prompt) for prompt in (QUESTION, REWORDED, NEIGHBOUR)]
    editor = text_editor(trained("gpt2"), "gpt2", contexts=0)
    with grace_edit.publish(editor, where) as publisher:
        with grace_edit.follow(replica, WORDS, where, interval=None) as follower:
            first = editor.edit(QUESTION, TARGET)
            assert first.success
            assert follower.poll()
            assert follower.version == publisher.version
            assert [ask(replica, p) for p in (QUESTION, REWORDED)] == [SAID, SAID]
            assert ask(replica, NEIGHBOUR) == before[2]
            text = follower.family.adaptor.text
            assert text is not None
            mine = editor.adaptor.text
            assert mine is not None
            assert text.keys.map.fingerprint() == mine.keys.map.fingerprint()
            assert torch.equal(
                text.key(WORDS(REWORDED).input_ids), mine.key(WORDS(REWORDED).input_ids)
            )
            assert editor.edit(OTHER, TARGET).success
            editor.delete(first.id)
            publisher.fold()
            assert follower.poll()  # a snapshot as a whole, its map beside it
            assert [ask(replica, p) for p in (QUESTION, REWORDED)] == before[:2]
            assert ask(replica, OTHER) == SAID


def test_a_follower_refuses_another_map_and_goes_on(
    trained: Callable[[str], Any], tmp_path: Path
) -> None:
    replica = trained("gpt2")
    editor = text_editor(
        trained("gpt2"), "gpt2", contexts=0, encoder=encode, text_map=map_of_encoder()
    )
    assert editor.edit(QUESTION, TARGET).success
    editor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder must be given"):
        grace_edit.follow(replica, WORDS, tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        grace_edit.follow(replica, None, tmp_path, encoder=encode)
    with pytest.raises(StoreError, match="text_map must be learned for this model or encoder"):
        grace_edit.follow(replica, WORDS, tmp_path, encoder=lambda texts: encode(texts)[:, :4])
    with grace_edit.follow(replica, WORDS, tmp_path, interval=None, encoder=encode) as follower:
        assert ask(replica, REWORDED) == SAID
        version = follower.version
        other = text_editor(trained("gpt2"), "gpt2", contexts=0)  # of the model's own embeddings
        for prompt in (QUESTION, OTHER):
            assert other.edit(prompt, TARGET).success
        other.save_pretrained(tmp_path)
        with pytest.raises(StoreError, match="edits of another serving now; follow it with"):
            follower.poll()
        assert isinstance(follower.error, StoreError)
        assert (ask(replica, REWORDED), follower.version) == (SAID, version)


def test_who_follows_before_anything_is_published_is_told_or_waits(
    trained: Callable[[str], Any], tmp_path: Path
) -> None:
    where, replica = tmp_path / "edits", trained("gpt2")
    with pytest.raises(StoreError, match=r"got none yet; start the writer first .*patience="):
        grace_edit.follow(replica, None, where)
    editor = GraceEditor(trained("gpt2"), None, GraceConfig(layer=LAYERS["gpt2"]))
    made: list[Any] = []
    late = threading.Timer(0.2, lambda: made.append(grace_edit.publish(editor, where)))
    late.start()
    with grace_edit.follow(replica, None, where, interval=None, patience=60) as follower:
        late.join()
        assert editor.edit(run_of(10, 4), run_of(30, 3)).success
        assert follower.poll()
        assert generated(replica, [run_of(10, 4)], 3) == [run_of(30, 3)]
    made[0].close()
