"""What is saved comes back to the bit, and what is damaged is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from codebook_streams import VALUE_DIM, Stream, bits, entries, state
from grace_edit.codebook import files, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.files import CONFIG, EDITS, TENSORS, StoreError
from grace_edit.codebook.records import UndoError
from safetensors.torch import load_file, save_file

NAMES = (CONFIG, TENSORS, EDITS)
OFFSETS = (0, 1, 7, 0.1, 0.25, 0.5, 0.75, 0.9, -2, -1)


def busy_book(
    seed: int = 0,
    *,
    imported: bool = False,
    dtype: torch.dtype = torch.float32,
    policy: str = "default",
) -> Codebook:
    """Return a codebook with superseded, deleted and purged edits, holes and shared entries."""
    return copy.deepcopy(_busy_book(seed, imported, dtype, policy))


@cache
def _busy_book(seed: int, imported: bool, dtype: torch.dtype, policy: str) -> Codebook:
    stream = Stream(seed)
    if imported:
        source = torch.Generator().manual_seed(seed)
        keys = torch.randn(30, 3, generator=source).to(dtype)
        values = torch.randn(30, VALUE_DIM, generator=source)
        labels = [[i % 3] * (1 + i % 2) for i in range(30)]
        book = Codebook.from_tensors(
            keys, values, torch.full((30,), 0.4), labels, drift=0.05, policy=policy
        )
    else:
        sizes: Any = {"capacity": 16, "dtype": dtype, "value_dtype": torch.float32}
        book = Codebook(3, VALUE_DIM, drift=0.05, policy=policy, **sizes)
    for number in range(80):
        query, label, value, prompt = stream.next()
        proposal = book.propose(query.to(dtype), label, prompt)
        given = None if proposal.case in ("expand", "absorb") else value
        checked = number % 3 == 0
        book.commit(
            proposal, given, answers=(lambda edit, slot: slot % 2 == 0) if checked else None
        )
    book.delete(book.ids[3])
    book.delete(book.ids[10], purge=True)
    book.delete(book.ids[20])
    book.check()
    return book


def comparable(book: Codebook) -> dict[str, Any]:
    """Return the state, with stored queries by edit: where they lie is nobody's business."""
    seen = state(book)
    storage, asked = book.storage, [edit for edit in book.history if edit.query_index >= 0]
    seen["queries"] = {edit.id: bits(book.query_of(edit.id)) for edit in book.history}
    seen["answers"] = {edit.id: storage.queries.answer(edit.query_index) for edit in asked}
    plain = [{**vars(edit), "query_index": edit in asked} for edit in book.history]
    seen["history"] = plain
    seen["records"] = (seen["records"][0], set(storage.edit_records))
    names = {storage.label_number(label): label for label in book.labels if label is not None}
    seen["label_ids"] = [names.get(number) for number in storage.slots.label_ids.tolist()]
    seen["settings"] = (book.radius, book.drift, book.max_radius, book.policy, book.version)
    seen["numbering"] = (storage.next_id, storage.next_value_id)
    return seen


@pytest.mark.parametrize(
    ("imported", "dtype", "policy"),
    [
        pytest.param(False, torch.float32, "default", id="fp32"),
        pytest.param(True, torch.float32, "default", id="imported"),
        pytest.param(False, torch.bfloat16, "default", id="bf16 keys"),
        pytest.param(False, torch.float32, "nearest", id="nearest"),
        pytest.param(True, torch.float32, "nearest", id="nearest, imported"),
    ],
)
def test_a_loaded_codebook_equals_the_saved_one_and_goes_on_like_it(
    tmp_path: Path, imported: bool, dtype: torch.dtype, policy: str
) -> None:
    book = busy_book(imported=imported, dtype=dtype, policy=policy)
    config = {"layer": "h.1", "nested": {"list": [1, 2.5, None, "é"]}}
    store.save(book, tmp_path / "deep" / "dir", config)
    loaded, described = store.load(tmp_path / "deep" / "dir")
    assert described == config
    assert comparable(loaded) == comparable(book)
    loaded.check()

    ours, theirs = Stream(99), Stream(99)
    for number in range(30):
        for each, stream in ((book, ours), (loaded, theirs)):
            query, label, value, prompt = stream.next()
            each.insert(query.to(dtype), label, value, prompt)
            if number % 10 == 9:
                each.delete(each.ids[number])
        assert entries(loaded) == entries(book)
        assert bits(loaded.values) == bits(book.values)
    loaded.check()


def test_an_empty_codebook_and_one_with_odd_settings_are_saved_too(tmp_path: Path) -> None:
    book = Codebook(5, 7, max_radius=math.inf, policy="paper", capacity=3)
    store.save(book, tmp_path, {})
    loaded, config = store.load(tmp_path)
    assert config == {}
    assert (loaded.max_radius, loaded.policy, loaded.capacity) == (math.inf, "paper", 3)
    assert (loaded.entries, loaded.ids) == (0, [])
    assert loaded.insert(torch.zeros(5), [1], torch.zeros(7)).id == 0


def test_a_format_that_an_older_release_would_misread_has_a_higher_number(tmp_path: Path) -> None:
    for policy, expected in (("default", 1), ("paper", 1), ("nearest", 2)):
        store.save(Codebook(2, 2, policy=policy), tmp_path / policy, {})
        assert json.loads((tmp_path / policy / CONFIG).read_text())["format"] == expected


def test_what_was_done_before_saving_cannot_be_undone_after_loading(tmp_path: Path) -> None:
    store.save(busy_book(), tmp_path, {})
    loaded, _ = store.load(tmp_path)
    with pytest.raises(
        UndoError, match="cannot undo: nothing has changed since the codebook was loaded"
    ):
        loaded.undo()
    before = state(loaded)
    loaded.insert(torch.ones(3), [1], torch.zeros(2))
    loaded.undo()
    assert state(loaded) == before


def test_a_purged_edit_is_in_no_file(tmp_path: Path) -> None:
    book = busy_book()
    secret = torch.tensor([12345.678, 1.0, 2.0])
    book.insert(secret, [424242], torch.full((2,), 98765.5), prompt=[31337])
    book.delete(book.ids[-1])
    store.save(book, tmp_path, {})
    assert b"31337" in (tmp_path / EDITS).read_bytes()  # deleted: still in the history
    book.delete(max(edit.id for edit in book.history), purge=True)
    store.save(book, tmp_path, {})
    everything = b"".join((tmp_path / name).read_bytes() for name in NAMES)
    for trace in (b"31337", b"424242", bits(secret[:1]), bits(torch.tensor(98765.5))):
        assert trace not in everything
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    store.save(busy_book(), directory, {"layer": "h.1"})
    return directory


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def place(content: bytes, offset: float) -> int:
    at = int(offset * len(content)) if isinstance(offset, float) else offset
    return at % len(content)


def refuses(directory: Path, name: str) -> None:
    with pytest.raises(StoreError) as caught:
        store.load(directory)
    assert name in str(caught.value)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_refused_by_name(damaged: Path, name: str, offset: float) -> None:
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: place(content, offset)])
    refuses(damaged, name)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", NAMES)
def test_an_altered_byte_is_refused_by_name(damaged: Path, name: str, offset: float) -> None:
    content = bytearray((damaged / name).read_bytes())
    for bit in (1, 16):
        changed = content.copy()
        changed[place(content, offset)] ^= bit
        (damaged / name).write_bytes(changed)
        refuses(damaged, name)
    (damaged / name).write_bytes(content)
    store.load(damaged)


def test_every_part_of_the_configuration_counts(damaged: Path) -> None:
    content = (damaged / CONFIG).read_bytes()
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] = ord(" ") if changed[at] != ord(" ") else ord("\t")
        (damaged / CONFIG).write_bytes(changed)
        refuses(damaged, CONFIG)
    (damaged / CONFIG).write_bytes(content + b"\n")
    refuses(damaged, CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    refuses(damaged, name)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", CONFIG)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b'{"format": "1"}', b"null", b"\xff\xfe", b'{"format": true'],
    ids=repr,
)
def test_a_configuration_of_something_else_is_refused(damaged: Path, content: bytes) -> None:
    (damaged / CONFIG).write_bytes(content)
    refuses(damaged, CONFIG)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration and vouch for everything anew, as a forger would."""
    described = json.loads((directory / CONFIG).read_bytes())
    change(described)
    for name in (TENSORS, EDITS):
        described["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    described["checksum"] = files.checksum_of(described)
    (directory / CONFIG).write_bytes(files.render(described))


def test_a_newer_format_is_refused_as_such(damaged: Path) -> None:
    rewrite(damaged, lambda described: described.update(format=5))
    with pytest.raises(StoreError, match="format must be at most 4, got 5"):
        store.load(damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "int8"), ("radius", -1.0), ("rows", 10**6), ("key_dim", "x"), ("policy", "mine")],
)
def test_settings_that_make_no_codebook_are_refused(damaged: Path, key: str, value: Any) -> None:
    rewrite(damaged, lambda described: described["codebook"].update({key: value}))
    refuses(damaged, CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t.update(keys=t["keys"][:-1]), id="a key too few"),
        pytest.param(lambda t: t.update(keys=t["keys"].half()), id="keys of another dtype"),
        pytest.param(
            lambda t: t.update(values=t["values"].flatten()), id="values of one dimension"
        ),
        pytest.param(lambda t: t.update(radii=t["radii"].double()), id="radii in fp64"),
        pytest.param(lambda t: t.update(queries=t["queries"][:, :1]), id="narrow queries"),
        pytest.param(lambda t: t.pop("pool"), id="no retired values"),
        pytest.param(
            lambda t: t.update(pool_stamps=t["pool_stamps"][:-1]), id="a value id too few"
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    damaged: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    tensors = load_file(damaged / TENSORS)
    change(tensors)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, damaged / TENSORS)
    rewrite(damaged, lambda described: None)
    refuses(damaged, TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda lines: lines[:-1], id="an entry too few"),
        pytest.param(lambda lines: lines[1:], id="an edit too few"),
        pytest.param(lambda lines: [*lines, "{"], id="not JSON"),
        pytest.param(lambda lines: [*lines, "{}"], id="no kind"),
        pytest.param(lambda lines: [*lines, "[]"], id="a list"),
        pytest.param(lambda lines: [s.replace('"label"', '"lapel"') for s in lines], id="no label"),
        pytest.param(
            lambda lines: [s.replace('"query":', '"query":9') for s in lines],
            id="query of another edit",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(
    damaged: Path, change: Callable[[list[str]], list[str]]
) -> None:
    lines = (damaged / EDITS).read_text(encoding="utf-8").splitlines()
    text = "".join(line + "\n" for line in change(lines))
    (damaged / EDITS).write_text(text, encoding="utf-8")
    rewrite(damaged, lambda described: None)
    refuses(damaged, EDITS)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("step", range(12))
def test_a_save_that_stops_anywhere_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    old, new = busy_book(0), busy_book(1)
    store.save(old, tmp_path, {"which": "old"})
    done = 0

    def dies(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            nonlocal done
            if done == step:
                raise Crash
            done += 1
            return call(*args, **more)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dies(os.fsync))
        patched.setattr(os, "replace", dies(os.replace))
        try:
            store.save(new, tmp_path, {"which": "new"})
            crashed = False
        except Crash:
            crashed = True
    assert crashed == (step < 8)  # 3 files, the directory, 3 renames, the directory
    loaded, config = store.load(tmp_path)
    assert config["which"] == ("old" if step <= 4 else "new")
    assert comparable(loaded) == comparable(old if step <= 4 else new)

    with monkeypatch.context() as patched:  # and a second one that stops at its first file
        done, step = 0, step if step == 0 else 1
        patched.setattr(os, "fsync", dies(os.fsync))
        patched.setattr(os, "replace", dies(os.replace))
        with pytest.raises(Crash):
            store.save(busy_book(2), tmp_path, {"which": "third"})
    assert store.load(tmp_path)[1]["which"] in ("old", "new")
    store.save(new, tmp_path, {"which": "last"})
    assert store.load(tmp_path)[1]["which"] == "last"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_mixed_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        store.save(busy_book(seed), tmp_path / str(seed), {})
    for name in (TENSORS, EDITS):
        kept = (tmp_path / "0" / name).read_bytes()
        (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
        refuses(tmp_path / "0", name)
        (tmp_path / "0" / name).write_bytes(kept)


def test_a_configuration_that_is_not_json_is_refused_before_anything_is_written(
    damaged: Path,
) -> None:
    before = {name: (damaged / name).read_bytes() for name in NAMES}
    for config in ({"a": object()}, {"a": math.nan}):
        with pytest.raises((TypeError, ValueError)):
            store.save(busy_book(1), damaged, config)
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before


def test_saving_inside_a_transaction_is_refused(tmp_path: Path) -> None:
    book = busy_book()
    with book.transaction():
        with pytest.raises(ValueError, match="cannot save inside a transaction"):
            store.save(book, tmp_path, {})


def test_loading_leaves_the_codebook_in_memory_alone(damaged: Path) -> None:
    book = busy_book()
    before = state(book)
    (damaged / TENSORS).write_bytes(b"")
    refuses(damaged, TENSORS)
    assert state(book) == before


def test_all_files_of_a_save_may_be_read_by_who_may_read_one(tmp_path: Path) -> None:
    store.save(Codebook(3, 2, capacity=2), tmp_path / "saved", {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()}
    assert modes[files.TENSORS] == modes[files.CONFIG] == modes[files.EDITS]
