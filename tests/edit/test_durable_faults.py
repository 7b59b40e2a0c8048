"""A writer that is killed at every step, a full disk, damage: what was acknowledged is there.

A child process makes changes and says after each what it was told; it is killed at the n-th call
that touches the directory, for every n. What it is killed between is what a process does to a
file: nothing else of it survives.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grace_edit import Codebook, StoreError, serving
from grace_edit.codebook import locking, redo, store
from grace_edit.codebook.log import End, LogError, LogWriter, read
from grace_edit.durable.following import Follower
from grace_edit.durable.publishing import Publisher, publish
from test_durable import whole

CALLS = ("write", "pwrite", "fsync", "ftruncate", "replace", "unlink")
LONG = 120  # seconds that nothing here takes
forking = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a codebook be published without a model."""
    about = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {"map": b"of texts"}))


def published(book: Codebook, directory: Path) -> Publisher:
    editor: Any = SimpleNamespace(codebook=book, family=None, config=None, layers=[None])
    return publish(editor, directory, timeout=LONG)


def followed(directory: Path) -> Follower:
    saved = store.load_saved(directory)
    family: Any = SimpleNamespace(adaptor=SimpleNamespace(codebook=saved.codebook))
    return Follower(family, directory, saved, None)


def opened(directory: Path) -> tuple[Codebook, Publisher]:
    """Go on as a writer that was started anew."""
    there = (directory / store.CONFIG).exists()
    book = store.load(directory)[0] if there else Codebook(3, 2, capacity=2)
    return book, published(book, directory)


def row(number: float, width: int = 3) -> torch.Tensor:
    return torch.full((width,), 10.0 * number)


def acts(book: Codebook, publisher: Publisher) -> Iterator[None]:
    """Make a change of each kind, growth among them."""
    for i in range(3):
        book.insert(row(i), [i], row(i + 0.5, 2), [i, 1])
        yield
    book.delete(book.ids[0])
    yield
    book.undo()
    yield
    publisher.compact()
    yield
    with book.transaction():
        book.insert(row(7), [7], row(7, 2))
        book.insert(row(0), [8], row(8, 2), [0, 1])
    yield
    book.delete(book.ids[0], purge=True)
    yield
    other = Codebook(3, 2, capacity=4)
    other.insert(row(9), [9], row(9, 2))
    book.take_over(other, "it was replaced")
    yield
    book.insert(row(4), [4], row(4, 2))
    yield


def tick(after: int, do: Callable[[str], None]) -> Callable[[], None]:
    """Call `do` at the n-th call that touches files; return what gives the functions back."""
    left, own = [after], {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if name == "pwrite":  # half of it
                    own[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
                do(name)
            return own[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    return lambda: [setattr(os, name, call) for name, call in own.items()] and None


def in_child(work: Callable[[Any], None]) -> list[Any]:
    """Run `work` in a forked process that may die; return what it sent."""
    ours, theirs = forking.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests' threads are idle
        child = forking.Process(target=work, args=[theirs], daemon=True)
        child.start()
    theirs.close()
    said = []
    while True:
        try:
            said.append(ours.recv())
        except EOFError:
            break
    child.join(LONG)
    assert child.exitcode in (0, 9)
    return [*said, child.exitcode]


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


def test_a_call_that_the_disk_refuses_raises_and_changes_nothing(tmp_path: Path) -> None:
    """At every step of an edit and a snapshot: no space, or an error of the disk."""
    for step in range(1, 60):
        directory = tmp_path / str(step)
        book, publisher = opened(directory)
        book.insert(row(1), [1], row(1, 2))
        follower = followed(directory)
        good, version, failed = whole(book), book.version, ""

        def refuse(name: str) -> None:
            raise OSError(errno.ENOSPC, f"no space left, in {name}")

        back = tick(step, refuse)
        try:
            book.insert(row(2), [2], row(2, 2))
            good, version = whole(book), book.version
            publisher.compact()
        except OSError as error:
            failed = str(error)
        finally:
            back()
        assert book.version >= version
        book.check()
        assert same_but_version(whole(book), good)
        assert same_but_version(whole(store.load(directory)[0]), good)
        # So it would be if the writer died now.
        left = store.load_saved(directory, writer=True).codebook
        assert same_but_version(whole(left), good)
        follower.poll()
        book.insert(row(3), [3], row(3, 2))  # when there is room again
        assert whole(store.load(directory)[0]) == whole(book)
        seen = follower.codebook.version
        follower.poll()
        assert follower.codebook.version > seen
        assert whole(follower.codebook) == whole(book)
        publisher.close()
        if not failed:
            break
    assert 12 < step < 59


def same_but_version(a: Any, b: Any) -> bool:
    """Compare, but for the numbers that never go down."""
    x, y = ({k: v for k, v in w[2].items() if k not in NEVER_DOWN} for w in (a, b))
    return bool((a[0], a[1], x, a[3:]) == (b[0], b[1], y, b[3:]))


NEVER_DOWN = ("version", "next_id", "next_stamp")


def test_a_refused_undo_can_be_undone_later(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    for i in range(3):  # the capacity grows
        book.insert(row(i), [i], row(i, 2))
    good = whole(book)

    def refuse(name: str) -> None:
        raise OSError(errno.EIO, name)

    back = tick(2, refuse)  # fsync
    with pytest.raises(OSError, match="fsync"):
        book.undo()
    back()
    assert same_but_version(whole(book), good)
    book.check()
    book.undo()
    assert book.edits == 2
    assert whole(store.load(tmp_path)[0]) == whole(book)
    publisher.close()


def test_readers_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, publisher = opened(tmp_path)
    reached, go_on = threading.Event(), threading.Event()
    own, waited = os.fsync, []

    def fsync(handle: int) -> None:
        reached.set()
        if not go_on.wait(LONG):  # an assertion would fail in this thread alone
            waited.append(handle)
        own(handle)

    for change in (
        lambda: book.insert(row(1), [1], row(1, 2)),
        lambda: book.insert(row(2), [2], row(2, 2)),
        lambda: book.delete(book.ids[0]),
        lambda: book.undo(),
        lambda: book.compact(),
    ):
        reached.clear()
        go_on.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            thread = threading.Thread(target=change)
            thread.start()
            assert reached.wait(LONG)
            assert book.lookup(row(1)[None])[0].shape == (1,)  # or this would hang
            assert book.lock.acquire(timeout=LONG / 4)
            book.lock.release()
            go_on.set()
            thread.join(LONG)
            assert not thread.is_alive()
            assert waited == []
    publisher.close()


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


def test_what_was_purged_is_in_no_file(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    book.insert(row(1), [31337], row(1, 2), [31338])
    kept = book.insert(row(2), [2], row(2, 2))
    assert b"31337" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    book.delete(0, purge=True)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"31337" not in content
    assert b"31338" not in content
    book.insert(row(3), [31339], row(3, 2))
    book.undo()
    book.history_limit = 0
    book.insert(row(2), [3], row(2, 2))  # forgets the edit that it supersedes
    with pytest.raises(KeyError):
        book.edit(kept.id or 0)
    publisher.close()


def test_damage_is_told_and_a_torn_end_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "log"
    start = End.of_empty("seed")
    records = [bytes([i]) * 100 for i in range(3)]
    writer = LogWriter(path, start)
    for record in records:
        writer.append(record)
    writer.close()
    content = path.read_bytes()
    assert read(content, start, unsealed=False) == (records, writer.end)
    size = len(content) // 3
    for at in range(0, size * 2, 7):  # the first two records, head and body
        damaged = bytearray(content)
        damaged[at] ^= 1
        if 8 <= at % size < 16:  # a seal, of a record that is whole and not the last
            assert read(bytes(damaged), start, unsealed=True)[0] == records
            continue
        with pytest.raises(LogError, match="damaged"):
            read(bytes(damaged), start, unsealed=True)
    with pytest.raises(LogError):  # one left out
        read(content[size:], start, unsealed=False)
    with pytest.raises(LogError):  # of another snapshot
        read(content, End.of_empty("other"), unsealed=False)
    unsealed = content[: 2 * size] + content[2 * size :].replace(b"sealed.\n", b"written\n")
    for cut in range(2 * size, 3 * size, 5):
        found = read(unsealed[:cut], start, unsealed=True)[0]
        assert found == records[:2]
    assert read(unsealed, start, unsealed=False)[0] == records[:2]
    assert read(unsealed, start, unsealed=True)[0] == records


def test_a_damaged_log_is_an_error_for_who_loads_follows_or_publishes(tmp_path: Path) -> None:
    book, publisher = opened(tmp_path)
    for i in range(3):
        book.insert(row(i), [i], row(i, 2))
    follower = followed(tmp_path)
    publisher.close()
    (path,) = tmp_path.glob("edits-*.log")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        store.load(tmp_path)
    with pytest.raises(StoreError, match="damaged"):
        published(book, tmp_path)
    assert not locking.is_held(tmp_path)
    assert not follower.poll()  # it has read that part
    assert follower.codebook.edits == 3


def goes_on(pipe: Any, directory: Path) -> None:
    book, publisher = opened(directory)
    number = book.storage.next_id
    while True:
        if number % 7 == 3:
            book.delete(book.ids[-1])
        if number % 11 == 5:
            publisher.compact()
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


@contextlib.contextmanager
def changed(place: Any, name: str, new: Any) -> Iterator[None]:
    own = getattr(place, name)
    setattr(place, name, new)
    try:
        yield
    finally:
        setattr(place, name, own)


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


def test_a_writer_that_comes_after_a_kill_between_renames_finishes_them(tmp_path: Path) -> None:
    """A follower that has read no log yet tells by the configuration that something is new."""

    def work(pipe: Any) -> None:
        book, _ = opened(tmp_path)
        own = os.replace

        def replace(new: Any, old: Any) -> None:
            if str(old).endswith(store.CONFIG):
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
            publisher.compact()
        assert follower.poll()
        assert whole(follower.codebook)[:2] == whole(book)[:2]
        publisher.close()


@pytest.mark.parametrize("failing", ["fsync", "pwrite"])
def test_a_refused_edit_does_not_come_back_where_the_log_keeps_it(
    tmp_path: Path, failing: str
) -> None:
    """The frame is whole, and neither its seal nor its removal is to be had."""
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    left, own = [2 if failing == "pwrite" else 1], getattr(os, failing)

    def fail(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, failing)
        return own(*args)

    def truncate(handle: int, size: int) -> None:
        raise OSError(errno.EIO, "ftruncate")

    with (
        changed(os, "ftruncate", truncate),
        changed(os, failing, fail),
        pytest.raises(OSError, match=failing),
    ):
        book.insert(row(2), [2], row(2, 2))
    assert left[0] <= 0
    assert book.edits == 1
    left_behind = store.load_saved(tmp_path, writer=True).codebook  # as if the writer died now
    assert whole(left_behind)[:2] == whole(book)[:2]
    book.insert(row(3), [3], row(3, 2))
    publisher.close()
    assert whole(store.load(tmp_path)[0]) == whole(book)


def test_a_frame_of_a_writer_that_came_while_the_log_was_read_waits_for_its_seal(
    tmp_path: Path,
) -> None:
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    publisher.close()
    (path,) = tmp_path.glob("edits-*.log")
    saved = store.load_saved(tmp_path)
    own, came = store.is_held, []

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

    with changed(store, "is_held", is_held):
        found = store.read_log(tmp_path, saved.checksum, saved.end)
    assert found == ([], saved.end)
    came[0]()  # it is gone
    found = store.read_log(tmp_path, saved.checksum, saved.end)
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


@pytest.mark.parametrize(
    ("other", "beside"),
    [
        ({"serving": {"layer": "h.1.mlp"}, "model": {}}, b"of texts"),
        ({"serving": {"query": "text"}, "model": {}}, b"of texts"),
        ({"serving": {}, "model": {"fingerprint": {"below": "f00"}}}, b"of texts"),
        ({"serving": {}, "model": {}}, b"of other texts"),
    ],
)
def test_edits_of_another_layer_model_or_map_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], beside: bytes
) -> None:
    opened(tmp_path)[1].close()  # without edits
    own, about = serving.describe, {"config": {}, **other}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {"map": beside}))
    book, publisher = opened(tmp_path)
    book.insert(row(1), [1], row(1, 2))
    publisher.close()
    saved = store.load_saved(tmp_path)
    assert (saved.config, saved.beside) == (about, {"map": beside})
    opened(tmp_path)[1].close()  # its own
    monkeypatch.setattr(serving, "describe", own)
    with pytest.raises(ValueError, match="differs"):
        opened(tmp_path)
    assert not locking.is_held(tmp_path)
