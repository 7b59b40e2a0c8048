"""Published edits and those who follow, without faults: the same bits, in the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grace_edit
import pytest
import torch
from codebook_streams import Stream, bits, insert_several
from grace_edit import GraceEditor
from grace_edit.cli import changing, models
from grace_edit.codebook import adopting, files, redo, snapshot, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.durable.publishing import Publisher
from sketched_books import add, agree, make_small_ones_worth_a_sketch, since_fit
from tiny_models import generated, run_of

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER = run_of(40, 6)


def whole(book: Codebook) -> Any:
    """Return everything that is kept of a codebook, to the bit."""
    tensors, records = snapshot.content_of(book.storage)
    own = {n: bits(t) for n, t in tensors.items() if not n.startswith(("sketch.", "hit_"))}
    return own, records, snapshot.settings_of(book.storage), book.ids, book.labels


class Recorder:
    """Applies to another codebook what is done to the one that it watches."""

    def __init__(self, other: Codebook) -> None:
        self.other, self.records = other, 0

    def commit(self, storage: Any, changed: Any) -> None:
        redo.apply(self.other.storage, redo.render(storage, changed))
        self.records += 1

    def settled(self, storage: Any, *, anew: bool = False) -> None:
        pass

    def taken_back(self, storage: Any) -> None:
        pass


def change(book: Codebook, stream: Stream) -> None:
    """Make one change of any kind."""
    which = stream.random.random()
    if which < 0.15 and book.ids:
        book.delete(stream.random.choice(book.ids), purge=stream.random.random() < 0.3)
    elif which < 0.3 and book.storage.journal.steps:
        book.undo()
    else:
        insert_several(book, stream)


@pytest.mark.parametrize("policy", ["default", "nearest", "paper"])
def test_records_of_changes_of_every_kind_make_an_equal_codebook_equal(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    stream = Stream(5)
    books = [Codebook(3, 2, capacity=4, policy=policy) for _ in range(2)]
    recorder = Recorder(books[1])
    books[0].storage.watcher = recorder
    books[0].history_limit = 12
    for step in range(48):
        change(books[0], stream)
        if step % 6 == 5:
            assert whole(books[0]) == whole(books[1])
    assert recorder.records > 36
    if policy != "paper":
        books[1].check()
    agree(books[1])


def test_who_follows_fits_and_keeps_a_sketch_as_the_writer_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_small_ones_worth_a_sketch(monkeypatch)
    books = [Codebook(16, 2, capacity=256, radius=0.5) for _ in range(2)]
    books[0].storage.watcher = Recorder(books[1])
    add(books[0], 100)
    for id in books[0].ids[::9]:
        books[0].delete(id)
    slots = [since_fit(book).slots for book in books]
    assert slots[0] == slots[1] > 0
    assert books[1].sketch is not None
    assert books[1].sketch.active
    agree(books[1])


def test_imported_entries_are_followed_too() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(9, 3, generator=draw) * 9, torch.randn(9, 2, generator=draw)
    books = [
        Codebook.from_tensors(keys, values, torch.ones(9), [[i % 3] for i in range(9)])
        for _ in range(2)
    ]
    books[0].storage.watcher = Recorder(books[1])
    books[0].insert(keys[2] + 0.1, [7], values[0])
    books[0].delete(4)
    books[0].delete(5, purge=True)
    books[0].undo_limit = 3
    books[0].insert(keys[3], [8], values[1])
    books[0].undo()
    assert whole(books[0]) == whole(books[1])
    books[1].check()
    assert books[1].edits == books[0].edits


def test_a_snapshot_is_adopted_in_the_same_tensors(tmp_path: Path) -> None:
    stream = Stream(3)
    book = Codebook(3, 2, capacity=64)
    for _ in range(10):
        change(book, stream)
    store.save(book, tmp_path, {})
    other = store.load(tmp_path)[0]
    place = [t.data_ptr() for t in (other.keys, other.values, other.radii, other.count)]
    for _ in range(25):
        change(book, stream)
    store.save(book, tmp_path, {})
    adopting.adopt(other.storage, store.load(tmp_path)[0].storage)
    assert whole(other) == whole(book)
    other.check()
    assert place == [t.data_ptr() for t in (other.keys, other.values, other.radii, other.count)]
    other.insert(torch.full((3,), 77.0), [1], torch.zeros(2))  # it can be edited
    other.check()


def test_what_is_published_is_on_the_disk_and_followed(
    edited: Callable[..., GraceEditor], trained: Callable[[str], Any], tmp_path: Path
) -> None:
    editor = edited("gpt2")
    replica = trained("gpt2")
    with grace_edit.publish(editor, tmp_path / "edits") as publisher:
        follower = grace_edit.follow(replica, None, tmp_path / "edits", interval=None)
        tensors = follower.codebook.keys, follower.codebook.values
        first = editor.edit(PROMPT, TARGET)
        assert first.success
        assert whole(follower.codebook) != whole(editor.codebook)
        assert follower.poll()
        assert whole(follower.codebook) == whole(editor.codebook)
        assert generated(replica, [PROMPT], 3) == [TARGET]
        assert whole(store.load(tmp_path / "edits")[0]) == whole(editor.codebook)
        editor.edit_batch([(OTHER, run_of(5, 2)), (run_of(20, 5), run_of(50, 2))])
        editor.delete(first.id)
        editor.undo()
        publisher.fold()
        assert publisher.log_bytes == 0
        assert follower.poll()  # behind: it takes the snapshot
        assert whole(follower.codebook) == whole(editor.codebook)
        publisher.fold()
        assert not follower.poll()  # it has everything
        editor.delete(first.id, purge=True)
        assert publisher.log_bytes == 0  # what was purged is nowhere
        assert follower.poll()
        editor.codebook.compact()
        assert follower.poll()
        assert whole(follower.codebook) == whole(editor.codebook)
        assert (follower.codebook.keys, follower.codebook.values) == tensors
        with pytest.raises(ValueError, match="by its writer"):
            follower.codebook.delete(editor.codebook.ids[0])
    again = GraceEditor.from_pretrained(trained("gpt2"), None, tmp_path / "edits")
    with grace_edit.publish(again, tmp_path / "edits"):
        again.edit(PROMPT, TARGET)
        assert follower.poll()
        assert generated(replica, [PROMPT], 3) == [TARGET]


def test_a_thread_follows(
    edited: Callable[..., GraceEditor], trained: Callable[[str], Any], tmp_path: Path
) -> None:
    editor = edited("gpt2")
    with grace_edit.publish(editor, tmp_path) as publisher:
        with grace_edit.follow(trained("gpt2"), None, tmp_path, interval=0.01) as follower:
            editor.edit(PROMPT, TARGET)
            follower.wait(publisher.version, timeout=60)
            assert whole(follower.codebook) == whole(editor.codebook)
        with pytest.raises(TimeoutError, match="version must be reached"):
            follower.wait(publisher.version + 1, timeout=0.01)


def test_one_writer_and_its_own_edits(edited: Callable[..., GraceEditor], tmp_path: Path) -> None:
    editor = edited("gpt2")
    with grace_edit.publish(editor, tmp_path):
        editor.edit(PROMPT, TARGET)
        with pytest.raises(TimeoutError, match="one process at a time"):
            grace_edit.publish(edited("gpt2"), tmp_path, timeout=0.05)
        editor.save_pretrained(tmp_path)  # a snapshot by the writer
    with pytest.raises(ValueError, match="the editor's own edits"):
        grace_edit.publish(edited("gpt2"), tmp_path)
    assert isinstance(grace_edit.publish(editor, tmp_path), Publisher)


def test_who_changes_a_published_directory_without_its_writer_loses_nothing(
    edited: Callable[..., GraceEditor], trained: Callable[[str], Any], tmp_path: Path
) -> None:
    editor = edited("gpt2")
    publisher = grace_edit.publish(editor, tmp_path)
    first = editor.edit(PROMPT, TARGET)
    with pytest.raises(TimeoutError, match="one process at a time"):
        changing.remove(tmp_path, [0], purge=False, as_json=True)
    publisher.close()
    follower = grace_edit.follow(trained("gpt2"), None, tmp_path, interval=None)
    assert publisher.log_bytes > 0
    assert models.read_edits_of(tmp_path).changes == 1
    changing.remove(tmp_path, [first.id or 0], purge=False, as_json=True)
    assert models.read_edits_of(tmp_path).changes == 0
    book = store.load(tmp_path)[0]
    assert book.ids == []
    assert book.edit(first.id or 0).state == "deleted"
    assert follower.poll()
    assert follower.codebook.ids == []
    assert follower.version == book.version


def test_a_directory_that_older_releases_may_read_gets_no_log(
    edited: Callable[..., GraceEditor], tmp_path: Path
) -> None:
    editor = edited("gpt2")
    editor.edit(PROMPT, TARGET)
    editor.save_pretrained(tmp_path)
    assert store.load_saved(tmp_path).format < files.LOGGED
    with grace_edit.publish(editor, tmp_path) as publisher:
        editor.edit(OTHER, TARGET)
        assert store.load_saved(tmp_path).format == files.LOGGED
        assert whole(store.load(tmp_path)[0])[:2] == whole(editor.codebook)[:2]
        editor.rekey()
        assert publisher.log_bytes == 0
        assert whole(store.load(tmp_path)[0])[:2] == whole(editor.codebook)[:2]
        editor.edit(OTHER, run_of(9, 2))
        assert publisher.log_bytes > 0
        assert whole(store.load(tmp_path)[0])[:2] == whole(editor.codebook)[:2]
