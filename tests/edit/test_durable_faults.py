"""A writer that is killed at every step: what was acknowledged is there, and nothing half.

A child process makes changes and says after each what it was told; it is killed at the n-th call
that touches the directory, for every n. What it is killed between is what a process does to a
file: nothing else of it survives.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from durable_lab import (
    LONG,
    acts,
    changed,
    followed,
    forking,
    in_child,
    opened,
    row,
    same_but_version,
    tick,
)
from grace_edit import Codebook, serving
from grace_edit.codebook import files, store
from test_durable import whole


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a codebook be published without a model."""
    about = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {"map": b"of texts"}))


def test_killed_at_every_step_it_keeps_what_it_has_told_and_nothing_half(tmp_path: Path) -> None:
    step, killed = 0, 0
    while True:
        step += 1
        directory = tmp_path / str(step)

        def work(pipe: Any, directory: Path = directory, step: int = step) -> None:
            book, publisher = opened(directory)
            pipe.send((book.version, whole(book), None))
            tick(step, lambda name: os._exit(9))
            for _ in acts(book, publisher):
                pipe.send((book.version, whole(book), None))

        *told, code = in_child(work)
        if code == 0:
            break
        killed += 1
        book = store.load(directory)[0]  # as a reader finds it
        version, content, _ = told[-1]
        assert book.version >= version
        if book.version == version:
            assert whole(book) == content
        book.check()
        before = whole(book)
        book, publisher = opened(directory)  # and a writer
        assert whole(book) == before
        book.insert(row(50), [50], row(50, 2))
        publisher.close()
        assert whole(store.load(directory)[0]) == whole(book)
        # What was under way is there as a whole or not at all.
        assert before in (content, *whole_run(tmp_path)[len(told) : len(told) + 1])
        assert [p.name for p in directory.glob("*.lock*")] == []
    assert killed > 40


_runs: dict[Path, list[Any]] = {}


def whole_run(tmp_path: Path) -> list[Any]:
    """Return what the codebook is after each act."""
    if tmp_path not in _runs:
        book, publisher = opened(tmp_path / "whole")
        states = [whole(book)] + [whole(book) for _ in acts(book, publisher)]
        publisher.close()
        _runs[tmp_path] = states
    return _runs[tmp_path]


def goes_on(pipe: Any, directory: Path) -> None:
    book, publisher = opened(directory)
    number = book.storage.next_id
    while True:
        if number % 7 == 3:
            book.delete(book.ids[-1])
        if number % 11 == 5:
            publisher.fold()
        number += 1
        book.insert(row(number), [number], row(number, 2))
        pipe.send((book.version, book.ids))


def test_a_process_that_is_killed_at_any_time_loses_nothing(tmp_path: Path) -> None:
    directory, seed = tmp_path / "edits", random.Random(5)
    follower = None
    for _ in range(6):
        ours, theirs = forking.Pipe(duplex=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests' threads are idle
            process = forking.Process(target=goes_on, args=(theirs, directory), daemon=True)
            process.start()
        theirs.close()
        told = [ours.recv()]
        follower = followed(directory) if follower is None else follower
        for _ in range(seed.randrange(1, 25)):
            told.append(ours.recv())
            follower.poll()
        time.sleep(seed.random() / 100)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(EOFError, OSError):  # the last one may be cut
            while True:
                told.append(ours.recv())
        process.join(LONG)
        book = store.load(directory)[0]
        version, ids = told[-1]
        assert book.version >= version
        assert len(set(ids) - set(book.ids)) <= 1  # a deletion may have been under way
        versions = [version for version, _ in told]
        assert versions == sorted(set(versions))
        book.check()
        follower.poll()
        assert whole(follower.codebook)[:2] == whole(book)[:2]


def test_an_interruption_after_the_disk_has_it_leaves_both_alike(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    good, own = whole(book), publisher.commit

    def commit(*args: Any) -> None:
        own(*args)
        raise KeyboardInterrupt

    with changed(publisher, "commit", commit), pytest.raises(KeyboardInterrupt):
        book.insert(row(2), [2], row(2, 2))
    assert same_but_version(whole(book), good)
    assert whole(store.load(tmp_path)[0]) == whole(book)
    publisher.close()


def test_a_version_that_somebody_may_have_seen_is_not_used_again(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    seen = kept = book.version

    def die() -> None:  # nothing of what a writer does at its end
        book.storage.watcher = None
        publisher._release()

    for start in range(3):
        with contextlib.suppress(ZeroDivisionError), book.transaction():
            book.insert(row(2), [2], row(2, 2))
            seen = book.version
            1 / 0  # noqa: B018
        seen = max(seen, book.version)
        die()
        assert store.load(tmp_path)[0].version == kept  # it is what it was
        if start == 1:  # somebody saves it as it is in between
            saved, about, beside = store.load_all(tmp_path)
            store.save(saved, tmp_path, about, beside)
        book, publisher = opened(tmp_path)
        assert book.version == kept
    book.insert(row(3), [3], row(3, 2))
    assert book.version > seen
    version = book.version
    publisher.close()
    book, publisher = opened(tmp_path)
    book.insert(row(4), [4], row(4, 2))
    assert book.version == version + 1  # nobody died
    publisher.close()


def test_a_writer_that_comes_after_a_kill_between_renames_finishes_them(tmp_path: Path) -> None:
    """A follower that has read no log yet tells by the configuration that something is new."""

    def work(pipe: Any) -> None:
        book, _ = opened(tmp_path)
        own = os.replace

        def replace(new: Any, old: Any) -> None:
            if str(old).endswith(files.CONFIG):
                os._exit(9)
            own(new, old)

        os.replace = replace
        book.insert(row(1), [1], row(1, 2))  # the first one is in a snapshot

    store.save(Codebook(3, 2, capacity=8), tmp_path, {"serving": {}, "model": {}, "config": {}})
    follower = followed(tmp_path)
    assert in_child(work) == [9]
    assert list(tmp_path.glob("*.new")) != []
    book, publisher = opened(tmp_path)
    assert list(tmp_path.glob("*.new")) == []
    book.insert(row(2), [2], row(2, 2))
    assert follower.poll()
    assert whole(follower.codebook) == whole(book)
    publisher.close()
