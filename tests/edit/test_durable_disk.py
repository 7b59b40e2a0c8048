"""A full disk, a broken one, damaged files: what cannot be kept is not made, and is told."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from durable_lab import LONG, changed, followed, opened, published, row, same_but_version, tick
from grace_edit import StoreError, serving
from grace_edit.codebook import locking, store
from grace_edit.codebook.log import End, LogError, LogWriter, read
from test_durable import whole


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a codebook be published without a model."""
    about = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {"map": b"of texts"}))


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
            publisher.fold()
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
