"""Followers that are killed, late, left behind or ahead: they come to what the writer has."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from durable_lab import LONG, acts, changed, followed, opened, row
from grace_edit import serving
from grace_edit.codebook import files, locking, redo, store
from grace_edit.codebook.log import LogWriter
from grace_edit.durable.following import Follower
from test_durable import whole


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a codebook be published without a model."""
    about = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {"map": b"of texts"}))


def test_a_follower_that_is_killed_or_late_or_left_behind_finds_everything(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    followers = [followed(tmp_path)]
    for at, _ in enumerate(acts(book, publisher)):
        followers.append(followed(tmp_path))  # one that comes late
        for number, follower in enumerate(followers):
            if number % 3 == at % 3 or number == 0:  # others are left behind
                follower.poll()
                assert whole(follower.codebook)[:2] == whole(book)[:2]
                assert follower.version == book.version
                assert follower.codebook.version >= book.version
                follower.codebook.check()
    for follower in followers:
        follower.poll()
        assert whole(follower.codebook)[:2] == whole(book)[:2]
    publisher.close()


def test_a_record_that_is_not_on_the_disk_yet_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, publisher = opened(tmp_path)
    follower = followed(tmp_path)
    own, seen = os.fsync, []

    def fsync(handle: int) -> None:
        follower.poll()
        seen.append((follower.codebook.edits, store.load(tmp_path)[0].edits))
        own(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        book.insert(row(1), [1], row(1, 2))
    assert seen == [(0, 0)]
    follower.poll()
    assert follower.codebook.edits == 1
    publisher.close()


def test_a_follower_that_is_frozen_refuses_growth_and_goes_on_when_it_may(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    follower = followed(tmp_path)
    follower.codebook.frozen = True
    for i in range(3):
        book.insert(row(i), [i], row(i, 2))
    with pytest.raises(RuntimeError, match="frozen"):
        follower.poll()
    assert follower.error is not None
    served = follower.codebook.version
    follower.codebook.frozen = False
    assert follower.poll()
    assert follower.codebook.version > served
    assert whole(follower.codebook) == whole(book)
    publisher.close()
    assert redo.version_of(redo.render(book.storage, [])) == book.version


def test_a_follower_that_has_seen_what_was_taken_back_takes_it_back(tmp_path: Path) -> None:
    for refused in (False, True):  # so is the snapshot, at first
        directory = tmp_path / str(refused)
        book, publisher = opened(directory)
        book.insert(row(1), [1], row(1, 2))
        follower, own = followed(directory), publisher.commit

        def commit(*args: Any, own: Any = own, follower: Follower = follower) -> None:
            own(*args)
            assert follower.poll()
            raise KeyboardInterrupt

        def write(*args: Any, **kwargs: Any) -> str:
            raise OSError(errno.ENOSPC, "full")

        writing = changed(store, "write", write) if refused else contextlib.nullcontext()
        with writing, changed(publisher, "commit", commit), pytest.raises(KeyboardInterrupt):
            book.insert(row(2), [2], row(2, 2))
        assert follower.codebook.edits == 2
        if refused:
            publisher.fold()
        assert follower.poll()
        assert whole(follower.codebook)[:2] == whole(book)[:2]
        publisher.close()


def test_a_frame_of_a_writer_that_came_while_the_log_was_read_waits_for_its_seal(
    tmp_path: Path,
) -> None:
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    publisher.close()
    (path,) = tmp_path.glob("edits-*.log")
    saved = store.load_saved(tmp_path)
    own, came = files.is_held, []

    def is_held(directory: Path) -> bool:
        held = own(directory)
        if not came:  # between this answer and the reading
            came.append(locking.take(directory, LONG))
            writer = LogWriter(path, saved.end)
            with changed(os, "fsync", lambda handle: 1 / 0), pytest.raises(ZeroDivisionError):
                with changed(os, "ftruncate", lambda *args: None):
                    writer.append(redo.render(book.storage, [], 10**6))
            writer.close()
        return held

    with changed(files, "is_held", is_held):
        found = files.read_log(tmp_path, saved.checksum, saved.end)
    assert found == ([], saved.end)
    came[0]()  # it is gone
    found = files.read_log(tmp_path, saved.checksum, saved.end)
    assert found is not None
    assert len(found[0]) == 1


def test_records_before_one_that_cannot_be_followed_yet_are_followed_once(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    follower = followed(tmp_path)
    follower.codebook.frozen = True
    for i in range(3):
        book.insert(row(i), [i], row(i, 2))
    versions = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="frozen"):
            follower.poll()
        versions.append((follower.version, follower.codebook.version))
    assert versions[0] == versions[1]
    assert versions[0][0] == book.version - 1
    publisher.close()


def test_labels_that_nothing_holds_lose_their_numbers_where_they_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grace_edit.codebook.labels._MOST", 16)
    book, publisher = opened(tmp_path)
    follower = followed(tmp_path)
    for number in range(80):
        book.insert(row(1), [number], row(1, 2), [1])
    follower.poll()
    assert follower.codebook.labels == book.labels == [(79,)]
    assert len(follower.codebook.storage.labels._numbers) <= 32
    publisher.close()
