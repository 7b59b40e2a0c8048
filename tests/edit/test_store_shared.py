"""A directory of saved edits that several processes read and write at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_edit.codebook import exchange, files, locking, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.files import CONFIG, EDITS, TENSORS, StoreError
from grace_edit.codebook.locking import LOCK, writing

NAMES = sorted((CONFIG, EDITS, TENSORS))
LONG = 120  # seconds that nothing here takes

LOCKS = pytest.mark.parametrize("locks", ["flock", "made"], indirect=True)
forking = multiprocessing.get_context("fork")


@pytest.fixture
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "made":
        monkeypatch.setattr(locking, "fcntl", None)


def saves(directory: Path, number: int, rounds: int) -> None:
    book = Codebook(4, 4, capacity=4)
    for i in range(rounds):
        book.insert(torch.full((4,), 9.0 * i), [number, i], torch.zeros(4))
        store.save(book, directory, {"writer": number, "round": i})


def adds(directory: Path, number: int, rounds: int) -> None:
    for i in range(rounds):
        with writing(directory):
            book, _ = store.load(directory)
            key = torch.full((4,), 100.0 * number + 9.0 * i)
            book.insert(key, [number, i], torch.zeros(4))
            store.save(book, directory, {})


def holds(directory: Path, ready: Any) -> None:
    with writing(directory):
        ready.set()
        time.sleep(LONG)


def start(work: Any, *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests' threads are idle
        process = forking.Process(target=work, args=given, daemon=True)
        process.start()
    return process


def book_of(label: int, entries: int = 1) -> Codebook:
    book = Codebook(4, 4, capacity=4)
    for i in range(entries):
        book.insert(torch.full((4,), 9.0 * i), [label, i], torch.zeros(4))
    return book


@LOCKS
@pytest.mark.usefixtures("locks")
def test_two_processes_that_save_and_one_that_loads_never_meet(tmp_path: Path) -> None:
    store.save(book_of(9), tmp_path, {"writer": 9, "round": 0})
    writers = [start(saves, tmp_path, number, 25) for number in range(2)]
    loads = 0
    while any(writer.is_alive() for writer in writers):
        book, config = store.load(tmp_path)  # a StoreError fails the test
        if config["writer"] != 9:
            assert book.labels == [(config["writer"], i) for i in range(config["round"] + 1)]
        loads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    book, config = store.load(tmp_path)
    assert config["round"] == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    assert loads > 0


@LOCKS
@pytest.mark.usefixtures("locks")
def test_who_holds_the_lock_from_loading_to_saving_loses_no_edit_of_the_other(
    tmp_path: Path,
) -> None:
    store.save(book_of(9), tmp_path, {})
    writers = [start(adds, tmp_path, number, 12) for number in (1, 2)]
    for writer in writers:
        writer.join(LONG)
    assert [writer.exitcode for writer in writers] == [0, 0]
    book, _ = store.load(tmp_path)
    made = [(number, i) for number in (1, 2) for i in range(12)]
    assert sorted(label for label in book.labels if label is not None) == [*made, (9, 0)]


@LOCKS
@pytest.mark.usefixtures("locks")
def test_a_lock_names_its_owner_and_that_of_a_dead_process_is_taken_over(
    tmp_path: Path,
) -> None:
    ready = forking.Event()
    other = start(holds, tmp_path, ready)
    assert ready.wait(LONG)
    who = rf"process {other.pid} on {socket.gethostname()}, since .*; if it is gone, remove"
    with pytest.raises(TimeoutError, match=who), writing(tmp_path, timeout=0.1):
        pass
    other.kill()
    other.join(LONG)
    assert [path.name[: len(LOCK)] for path in tmp_path.iterdir()] == [LOCK]
    store.save(book_of(1), tmp_path, {})
    assert store.load(tmp_path)[0].edits == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_a_made_lock_of_another_machine_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "fcntl", None)
    owner = {"host": "elsewhere", "pid": 1, "since": "then"}
    (tmp_path / (LOCK + ".made")).write_text(json.dumps(owner))
    with pytest.raises(TimeoutError, match="process 1 on elsewhere"), writing(tmp_path, timeout=0):
        pass


@LOCKS
@pytest.mark.usefixtures("locks")
def test_a_full_disk_is_told_with_the_place_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = tmp_path / "edits"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=f"No space left on device: '{where}"), writing(where):
            pass
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"No space left on device: '{where}"):
            store.save(book_of(1), where, {})
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=f"No space left on device: '{where}"):
            exchange.replace_file(where, b"text")
    assert list(tmp_path.iterdir()) == []
    store.save(book_of(1), where, {})


def test_a_file_system_that_cannot_lock_files_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with writing(tmp_path):
        held = [path.name for path in tmp_path.iterdir()]
        entered: list[str] = []

        def other() -> None:
            try:
                with writing(tmp_path, timeout=0.05):
                    entered.append("in")
            except TimeoutError as error:
                entered.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert held == [LOCK + ".made"]
    assert f"process {os.getpid()} on" in entered[0]
    store.save(book_of(1), tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_threads_that_save_to_one_directory_leave_the_latest_state(tmp_path: Path) -> None:
    book = Codebook(4, 4)
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                key = torch.full((4,), 900.0 * number + 9.0 * i)
                book.insert(key, [number, i], torch.zeros(4))
                store.save(book, tmp_path, {})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[n]) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.load(tmp_path)[0].ids == book.ids


def test_a_directory_in_which_nothing_was_written_is_taken_away_again(tmp_path: Path) -> None:
    with writing(tmp_path / "a" / "b"), writing(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises((TypeError, ValueError)):
        store.save(book_of(1), tmp_path / "c", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_reader_reads_again_as_long_as_somebody_renames_files_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(book_of(0), tmp_path, {"which": 0})
    own, readings = files._read_files, []

    def read_files(directory: Path, described: Any) -> Any:
        readings.append(1)
        if len(readings) < 4:  # between the configuration and the others
            store.save(book_of(len(readings), 3), tmp_path, {"which": len(readings)})
        return own(directory, described)

    monkeypatch.setattr(files, "_read_files", read_files)
    _, config = store.load(tmp_path)
    assert config["which"] == 3
    monkeypatch.undo()
    content = (tmp_path / EDITS).read_bytes()
    (tmp_path / EDITS).write_bytes(content[:-5])
    with pytest.raises(StoreError, match="checksum differs"):
        store.load(tmp_path)
