"""Codebooks that are published without a model, what is done to them, and where it breaks off."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from grace_edit import Codebook
from grace_edit.codebook import files, store
from grace_edit.durable.following import Follower
from grace_edit.durable.publishing import Publisher, publish

CALLS = ("write", "pwrite", "fsync", "ftruncate", "replace", "unlink")
LONG = 120  # seconds that nothing here takes
forking = multiprocessing.get_context("fork")


def published(book: Codebook, directory: Path) -> Publisher:
    editor: Any = SimpleNamespace(codebook=book, family=None, config=None, layers=[None])
    return publish(editor, directory, timeout=LONG)


def followed(directory: Path) -> Follower:
    saved = store.load_saved(directory)
    family: Any = SimpleNamespace(adaptor=SimpleNamespace(codebook=saved.codebook))
    return Follower(family, directory, saved, None)


def opened(directory: Path) -> tuple[Codebook, Publisher]:
    """Go on as a writer that was started anew."""
    there = (directory / files.CONFIG).exists()
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
    publisher.fold()
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


@contextlib.contextmanager
def changed(place: Any, name: str, new: Any) -> Iterator[None]:
    own = getattr(place, name)
    setattr(place, name, new)
    try:
        yield
    finally:
        setattr(place, name, own)


NEVER_DOWN = ("version", "next_id", "next_stamp")


def same_but_version(a: Any, b: Any) -> bool:
    """Compare, but for the numbers that never go down."""
    x, y = ({k: v for k, v in w[2].items() if k not in NEVER_DOWN} for w in (a, b))
    return bool((a[0], a[1], x, a[3:]) == (b[0], b[1], y, b[3:]))
