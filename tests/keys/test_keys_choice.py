"""Which map fits which dense part, and the maps that come with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grace_edit.keys.choice import MAPS, shipped_maps, text_keys
from grace_edit.keys.text_keys import TextKeys
from keys_lab import Trigrams, embeddings, made_map, model, table


def test_a_given_map_serves_its_model_in_any_dtype_and_finetuned(tmp_path: Path) -> None:
    made = made_map()
    made.save(tmp_path)
    plain = text_keys(model(embeddings()), Trigrams(), text_map=tmp_path)
    assert torch.equal(plain.keys("Who is Ada?"), TextKeys(made, table()).keys("Who is Ada?"))
    half = text_keys(model(embeddings().half()), Trigrams(), text_map=made)
    assert half.fingerprint() == plain.fingerprint()
    generator = torch.Generator().manual_seed(0)
    moved = embeddings() + 0.02 * torch.randn(embeddings().shape, generator=generator)
    longer = torch.cat([moved, torch.zeros(3, moved.shape[1])])  # tokens were added as well
    child = text_keys(model(longer), Trigrams(), text_map=made)
    assert child.fingerprint() != plain.fingerprint()


def test_a_map_of_another_model_is_refused() -> None:
    other = torch.roll(embeddings(), 1, dims=0)
    with pytest.raises(ValueError, match=r"text_map must be learned for this model.*grace tune"):
        text_keys(model(other), Trigrams(), text_map=made_map())
    with pytest.raises(ValueError, match="text_map must be learned for this model"):
        text_keys(model(torch.zeros(5, 7)), Trigrams(), text_map=made_map())
    with pytest.raises(ValueError, match="text_map must be learned for this model"):
        text_keys(None, None, lambda texts: torch.ones(len(texts), 24), made_map())


def test_a_model_that_no_map_comes_with_is_told_how_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"none that comes with the package fits.*grace tune"):
        text_keys(model(embeddings()), Trigrams())
    with pytest.raises(FileNotFoundError):
        text_keys(model(embeddings()), Trigrams(), text_map=MAPS / "nowhere")


def test_an_encoder_finds_its_map_by_what_it_makes_of_sentences() -> None:
    probe = table().probe()[:3]
    made = made_map()
    reference = replace(made.dense, kind="encoder")
    mine = replace(made, dense=reference, centre=np.zeros(0, np.int32), probe=probe)
    rows = iter(probe.repeat(2, axis=0)[::2])
    keys = text_keys(None, None, lambda texts: next(rows)[None].astype(float), mine)
    assert keys.dense.kind == "encoder"


def test_the_maps_that_come_with_the_package_are_small_and_say_what_they_learned_from() -> None:
    maps = {path.name: path for path in MAPS.iterdir() if path.is_dir()}
    assert set(maps) == {"minilm", "smollm2-135m-tokens"}
    for path in maps.values():
        assert sum(file.stat().st_size for file in path.iterdir()) < 500_000
    for text_map in shipped_maps():
        assert text_map.radius == 1.0
        assert text_map.width == 128
        assert text_map.trained["sources"]
        assert text_map.trained["held out"]["rewordings"] > 0.8
    assert "MIT" in (MAPS / "README.md").read_text(encoding="utf-8")
