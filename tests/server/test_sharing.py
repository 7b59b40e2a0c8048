"""Requests and an edit share the threads of a CPU, and whoever is alone has all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grace_edit.server.sharing import Cores
from torch import nn


class Threads:
    """What each thread of this process has set."""

    def __init__(self) -> None:
        self.main = threading.get_ident()
        self.of_requests = self.of_edits = self.sets = 0

    def set(self, number: int) -> None:
        self.sets += 1
        if threading.get_ident() == self.main:
            self.of_requests = number
        else:
            self.of_edits = number


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """A processor of four cores."""
    found = Threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", found.set)
    return found


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def cores(threads: Threads, clock: list[float]) -> Iterator[tuple[Cores, nn.Module]]:
    model = nn.Linear(2, 2)
    made = Cores(model, lambda: clock[0])
    yield made, model
    made.close()
    assert not model._forward_pre_hooks


def in_thread(work: Any) -> None:
    """Run in another thread; what fails there fails here."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def test_an_edit_has_half_beside_requests_and_all_when_none_comes(
    cores: tuple[Cores, nn.Module], threads: Threads, clock: list[float]
) -> None:
    shared, model = cores
    row = torch.zeros(1, 2)
    model(row)
    assert threads.of_requests == 4

    def edit(wanted: int) -> None:
        with shared.editing():
            assert threads.of_edits == wanted
            model(row)  # its own forwards are no requests
            assert threads.of_edits == wanted

    clock[0] = 1.0
    in_thread(lambda: edit(2))
    clock[0] = 60.0
    in_thread(lambda: edit(4))


def test_requests_have_half_while_an_edit_is_made_and_all_again_afterwards(
    cores: tuple[Cores, nn.Module], threads: Threads
) -> None:
    shared, model = cores
    row, begun, go_on = torch.zeros(1, 2), threading.Event(), threading.Event()

    def edit() -> None:
        with shared.editing():
            begun.set()
            go_on.wait(30)
        begun.clear()

    editing = threading.Thread(target=edit)
    editing.start()
    assert begun.wait(30)
    model(row)
    assert threads.of_requests == 2
    before = threads.sets
    model(row)
    assert threads.sets == before  # nothing is set that is so already
    go_on.set()
    editing.join(30)
    model(row)
    assert threads.of_requests == 4


def test_an_edit_that_fails_gives_the_threads_back(
    cores: tuple[Cores, nn.Module], threads: Threads
) -> None:
    shared, model = cores
    with pytest.raises(FloatingPointError), shared.editing():
        raise FloatingPointError
    model(torch.zeros(1, 2))
    assert threads.of_requests == 4
