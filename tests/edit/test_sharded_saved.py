"""Saved edits read by rank. More ranks than this one: `tests/ops/sharded_ranks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grace_edit import Codebook, StoreError, publish, serving
from grace_edit.codebook import files, store
from grace_edit.codebook.sharding import load_sharded

from grace_kernels.testing import same_bits

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "group"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Codebook, Path]:
    """A codebook of bfloat16 with a deleted and a changed entry, and where it is saved."""
    generator = torch.Generator().manual_seed(3)
    book = Codebook(16, 5, radius=2.0, dtype=torch.bfloat16, capacity=64)
    for n in range(40):
        query = torch.randn(16, generator=generator).bfloat16()
        book.insert(query, [n], torch.randn(5, generator=generator).bfloat16())
    book.delete(7)
    store.save(book, tmp_path / "edits", {})
    return book, tmp_path / "edits"


def test_what_is_read_by_rank_answers_as_the_codebook_does(
    group: None, saved: tuple[Codebook, Path]
) -> None:
    book, directory = saved
    sharded = load_sharded(directory, block=8, sketch=True)
    assert sharded.capacity == 64
    assert sharded.shard.sketch is not None
    query = torch.cat([book.keys[:40] + 0.01, torch.randn(4, 16).bfloat16()])
    got, wanted = sharded.lookup(query), book.lookup(query)
    assert all(map(same_bits, got, wanted))
    assert (got[0] >= 0).sum() > 20
    hit = got[0] >= 0
    assert same_bits(sharded.values_at(got[0])[hit], book.values[got[0][hit]])


def test_tensors_of_another_save_are_refused(group: None, saved: tuple[Codebook, Path]) -> None:
    book, directory = saved
    before = (directory / files.TENSORS).read_bytes()
    book.insert(torch.ones(16).bfloat16() * 40, [99], torch.ones(5).bfloat16())
    book.insert(torch.ones(16).bfloat16() * 50, [98], torch.ones(5).bfloat16())
    store.save(book, directory, {})
    (directory / files.TENSORS).write_bytes(before)
    with pytest.raises(StoreError, match=r"codebook.safetensors: keys must have shape \[41, 16\]"):
        load_sharded(directory)
    (directory / files.TENSORS).write_bytes(before[:50])
    with pytest.raises(StoreError, match=r"codebook.safetensors: not a safetensors file"):
        load_sharded(directory)
    with pytest.raises(StoreError, match=r"grace_config.json: cannot be read"):
        load_sharded(directory / "elsewhere")


def test_several_layers_are_refused_with_what_to_do(
    group: None, saved: tuple[Codebook, Path]
) -> None:
    book, directory = saved
    store.save(book, directory, {"layer": "a"}, further=[store.Kept(book, {"layer": "b"})])
    with pytest.raises(StoreError, match=r"GraceEditor\.from_pretrained"):
        load_sharded(directory)


def test_changes_in_a_log_are_refused_with_what_to_do(
    group: None, saved: tuple[Codebook, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    book, directory = saved
    about: dict[str, Any] = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {}))
    store.save(book, directory, about)
    editor: Any = SimpleNamespace(codebook=book, family=None, config=None, layers=[None])
    query = torch.ones(16).bfloat16() * 40
    with publish(editor, directory) as publisher:
        publisher.fold()  # beside a snapshot of `save` there is no log yet
        assert load_sharded(directory).lookup(query[None])[0].item() == -1
        book.insert(query, [99], torch.ones(5).bfloat16())
        with pytest.raises(StoreError, match=r"got 1 since the snapshot.*Publisher\.fold\(\)"):
            load_sharded(directory)
        publisher.fold()
        assert load_sharded(directory).lookup(query[None])[0].item() == book.lookup(query[None])[0]
    assert load_sharded(directory).lookup(query[None])[0].item() >= 0
    (directory / (files.CONFIG + ".new")).touch()
    with pytest.raises(StoreError, match="while it was read, or a save was interrupted"):
        load_sharded(directory)
