"""Whatever is done to a codebook, in any order and for long, loses no edit that was acknowledged.

`OPERATIONS=5000 pytest tests/edit/test_codebook_operations.py` is the long run (`make operations`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from codebook_streams import ISLAND_DIM, VALUE_DIM, Islands, state
from grace_edit.codebook import retention, store
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import UndoError

OPERATIONS = int(os.environ.get("OPERATIONS", "120"))
MOST = 60  # live edits, about


class Watched:
    """A codebook under random operations, beside a dict of what was said to be done.

    `said` holds the label of every edit that was made and not deleted, undone or forgotten. Each of
    them is answered with its label, or superseded by a later one.
    """

    def __init__(self, seed: int, policy: str, directory: Path) -> None:
        self.stream = Islands(seed, apart=5.0)
        self.random, self.directory = self.stream.random, directory
        self.book = Codebook(ISLAND_DIM, VALUE_DIM, policy=policy, capacity=2, drift=0.01)
        self.said: dict[int, int] = {}
        self.before: list[tuple[dict[int, int], object]] = []
        self.done: Counter[str] = Counter()

    def run(self, operations: int) -> None:
        """Do as many operations."""
        for _ in range(operations):
            self.step()

    def step(self) -> None:
        """Do one operation, and check everything."""
        crowded = self.book.edits > MOST
        names = ["insert", "batch", "delete", "purge", "undo", "fail", "compact", "limit", "reload"]
        weights = [30, 4, 25 if crowded else 8, 12 if crowded else 3, 8, 4, 1, 1, 1]
        name = self.random.choices(names, weights)[0]
        self.done[name] += 1
        getattr(self, name)()
        self.check()

    def note(self) -> None:
        self.before.append((dict(self.said), state(self.book)))
        del self.before[: -self.book.undo_limit]

    def insert(self) -> None:
        self.note()
        self.make()

    def make(self) -> None:
        id = self.stream.insert(self.book)
        edit = self.book.edit(id)
        assert edit.live
        self.done[str(edit.result.case)] += 1
        self.said[id] = edit.label[0]

    def batch(self) -> None:
        self.note()
        with self.book.transaction():
            for _ in range(self.random.randrange(2, 5)):
                self.make()

    def delete(self, purge: bool = False) -> None:
        if not self.said:
            return
        self.note()
        id = self.random.choice(list(self.said))
        self.book.delete(id, purge=purge)
        del self.said[id]
        if purge:
            with pytest.raises(KeyError):
                self.book.edit(id)
            self.before.clear()

    def purge(self) -> None:
        self.delete(purge=True)

    def undo(self) -> None:
        if not self.before:
            with pytest.raises(UndoError):
                self.book.undo()
            return
        self.said, expected = self.before.pop()
        self.book.undo()
        assert state(self.book) == expected

    def fail(self) -> None:
        before, queries = state(self.book), [list(each) for each in self.stream.queries]

        def work() -> None:
            with self.book.transaction():
                self.stream.insert(self.book)
                self.book.delete(self.book.ids[0], purge=True)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        assert state(self.book) == before
        self.stream.queries = queries

    def compact(self) -> None:
        self.book.compact(keep=self.random.randrange(20))
        self.before.clear()
        self.forget()

    def limit(self) -> None:
        self.book.history_limit = self.random.choice([None, 40])
        self.book.undo_limit = self.random.choice([5, 50])
        del self.before[: -self.book.undo_limit]

    def forget(self) -> None:
        """Let go of what the codebook may forget: edits of the past alone."""
        kept = {edit.id for edit in self.book.history}
        for id in [id for id in self.said if id not in kept]:
            del self.said[id]

    def reload(self) -> None:
        store.save(self.book, self.directory, {})
        limits = (self.book.undo_limit, self.book.history_limit)
        again, _ = store.load(self.directory)
        mine, theirs = state(self.book), state(again)
        same = ("keys", "values", "radii", "count", "history", "ids", "labels", "members")
        plain = [name for name in same if name != "history"]
        assert [mine[name] for name in plain] == [theirs[name] for name in plain]
        self.book, (self.book.undo_limit, self.book.history_limit) = again, limits
        self.before.clear()

    def check(self) -> None:
        """Compare with what was said, and verify all that the codebook promises."""
        book = self.book
        if book.history_limit is not None:
            # Live edits are never forgotten: those that went were superseded before.
            self.forget()
        live = book.ids
        assert set(live) <= set(self.said)
        for id, label in self.said.items():
            edit = book.edit(id)
            assert edit.label == (label,)
            if not edit.live:
                by = edit.superseded_by
                assert by is not None
                assert edit.state == "superseded"
        keys = [part.id for part in book.live_keys]
        if keys:
            index, _ = book.lookup(torch.stack([book.query_of(id) for id in keys]))
            labels = book.labels
            for id, slot in zip(keys, index.tolist(), strict=True):
                assert slot >= 0
                assert labels[slot] == (self.said[book.edit(id).whole],)
        assert bool((book.radii[int(book.count) :] == -math.inf).all())
        book.check()


@pytest.mark.parametrize("policy", ["default", "nearest"])
def test_no_acknowledged_edit_is_lost_whatever_is_done(policy: str, tmp_path: Path) -> None:
    watched = Watched(5, policy, tmp_path)
    watched.run(OPERATIONS)
    cases = ["add", "update", "absorb"] + (["expand", "split"] if policy == "default" else [])
    if OPERATIONS >= 1000:
        print(watched.done)
        cases += ["compact", "limit", "reload"]
    assert all(watched.done[case] for case in (*cases, "delete", "purge", "undo", "fail"))


def test_an_edit_that_repair_forgets_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "repair", lambda *_: False)
    watched = Watched(5, "default", tmp_path)
    with pytest.raises(AssertionError):
        watched.run(120)
