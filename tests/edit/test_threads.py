"""Threads that change one codebook: what one was told is done stays done, and readers never wait.

Nothing here depends on how fast a machine is. Where a thread must *not* get ahead, it is given a
moment to do so: too short a moment could hide a fault, never make one up.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from grace_edit import Codebook, GraceEditor
from grace_edit.codebook import store
from grace_edit.codebook.records import UndoError
from tiny_models import generated, logits_of, run_of

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER = run_of(40, 6)
LONG = 120  # seconds that nothing here takes
MOMENT = 0.5


class Work(threading.Thread):
    """A thread whose exception is raised by `result`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.value: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(LONG)
        assert not self.is_alive(), "a thread waits for what does not come"
        if self.error is not None:
            raise self.error
        return self.value


class Gate:
    """Stops the first thread that comes by until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def stop(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(LONG)


def stop_training(editor: GraceEditor, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Return a gate at which the next training stops, in its first step."""
    gate, own = Gate(), editor.family.target_logits

    def target_logits(*args: Any) -> Any:
        gate.stop()
        return own(*args)

    monkeypatch.setattr(editor.family, "target_logits", target_logits)
    return gate


@contextmanager
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("how", ["the editor", "its codebook"])
@pytest.mark.parametrize("change", ["edit", "delete", "undo", "transaction"])
def test_a_change_beside_an_edit_that_fails_is_not_taken_back(edited, monkeypatch, change, how):
    editor = edited("gpt2")
    first = editor.edit(PROMPT, TARGET)
    one = editor if how == "the editor" else editor.codebook
    gate = stop_training(editor, monkeypatch)

    def fail() -> None:
        with monkeypatch.context() as patched:
            broken = lambda _, wanted, **__: torch.full(wanted.shape, torch.nan)  # noqa: E731
            patched.setattr(torch.nn.functional, "cross_entropy", broken)
            with pytest.raises(FloatingPointError):
                editor.edit(run_of(50, 5), run_of(20, 2))

    def do() -> None:
        book, key = editor.codebook, torch.full((48,), 9.0)
        if change == "edit" and how == "the editor":
            # Its value needs no training, which the other thread's patch would spoil.
            assert editor.edit(PROMPT, TARGET).success
        elif change == "edit":
            book.insert(key, [7], key)
        elif change == "transaction":
            with book.transaction():
                book.insert(key, [7], key)
                book.insert(key + 9, [8], key)
        elif change == "undo":
            one.undo()
        else:
            one.delete(first.id, purge=True)

    failing = Work(fail)
    assert gate.reached.wait(LONG)
    other = Work(do)
    other.join(MOMENT)
    gate.opened.set()
    failing.result()
    other.result()
    expected = {"edit": 1 if how == "the editor" else 2, "delete": 0, "undo": 0, "transaction": 3}
    assert editor.codebook.edits == expected[change]
    if change in ("delete", "undo"):
        assert editor.codebook.history == []
        assert generated(editor.model, [PROMPT], 3) != [TARGET]
    else:
        assert generated(editor.model, [PROMPT], 3) == [TARGET]
    editor.codebook.check()


def test_every_edit_that_two_threads_were_told_is_made_is_there(edited):
    editor = edited("gpt2")
    starts = [[3, 12, 21, 33], [41, 48, 55, 27]]
    barrier = threading.Barrier(2)

    def work(own: list[int]) -> list[Any]:
        barrier.wait(LONG)
        return [(run_of(s, 5), editor.edit(run_of(s, 5), run_of(s + 17, 2))) for s in own]

    with frequent_switches():
        threads = [Work(lambda own=own: work(own)) for own in starts]
        made = [pair for thread in threads for pair in thread.result()]
    accepted = [(prompt, result.id) for prompt, result in made if result.success]
    assert len(accepted) >= 6
    assert editor.codebook.ids == sorted(id for _, id in accepted)
    for prompt, id in accepted:
        explained = editor.explain(prompt)
        assert explained.hit
        wanted = list(editor.codebook.edit(id).label)
        assert generated(editor.model, [prompt], 2) == [wanted]
    editor.codebook.check()


class _Taken(Exception):
    pass


def test_a_codebook_that_four_threads_change_holds_what_each_of_them_was_told() -> None:
    book = Codebook(4, 2, capacity=4, radius=0.25)
    barrier = threading.Barrier(4)

    def give_up(change: Callable[[], Any]) -> None:
        with contextlib.suppress(_Taken), book.transaction():
            change()
            raise _Taken

    def work(number: int) -> tuple[set[int], int]:
        source = random.Random(number)
        mine: set[int] = set()
        steps = 0
        barrier.wait(LONG)
        for i in range(60):
            key = torch.tensor([100.0 * number, 3.0 * i, 0.0, 0.0])
            what = source.random()
            if what < 0.5 or not mine:
                mine.add(int(str(book.insert(key, [i], torch.zeros(2), [number, i]).id)))
            elif what < 0.7:
                gone = source.choice(sorted(mine))
                book.delete(gone, purge=what < 0.6)
                mine.remove(gone)
            elif what < 0.85:
                with book.transaction():
                    one = book.insert(key, [i], torch.zeros(2), [number, i])
                    two = book.insert(key + 1.0, [i, 1], torch.zeros(2), [number, i, 1])
                mine |= {int(str(one.id)), int(str(two.id))}
            else:
                give_up(lambda key=key, i=i: book.insert(key, [i], torch.zeros(2), [number, i]))
            steps += 1
        return mine, steps

    with frequent_switches():
        done = [thread.result() for thread in [Work(lambda n=n: work(n)) for n in range(4)]]
    assert [steps for _, steps in done] == [60] * 4
    assert book.ids == sorted(id for mine, _ in done for id in mine)
    book.check()


def test_undo_from_several_threads_takes_whole_changes_back_one_each() -> None:
    book = Codebook(4, 2, capacity=4, radius=0.25)
    book.undo_limit = 1000  # more than will be done: every change is taken back in the end
    barrier = threading.Barrier(4)
    refused: list[str] = []

    def work(number: int) -> int:
        made = 0
        barrier.wait(LONG)
        for i in range(60):
            key = torch.tensor([100.0 * number, 3.0 * i, 0.0, 0.0])
            if number % 2 == 0:
                with book.transaction():
                    book.insert(key, [i], torch.zeros(2))
                    book.insert(key + 1.0, [i, 1], torch.zeros(2))
                made += 1
            else:
                try:
                    book.undo()
                    made -= 1
                except UndoError as error:
                    refused.append(str(error))
        return made

    with frequent_switches():
        steps = sum(t.result() for t in [Work(lambda n=n: work(n)) for n in range(4)])
    assert all("nothing has changed" in text for text in refused)
    assert book.edits == 2 * steps
    book.check()
    for _ in range(steps):
        book.undo()
    assert book.edits == 0


def test_a_proposal_may_go_stale_but_not_inside_a_transaction() -> None:
    book = Codebook(2, 2)
    ready, go = threading.Event(), threading.Event()

    def other() -> None:
        ready.wait(LONG)
        book.insert(torch.zeros(2), [1], torch.zeros(2))
        go.set()

    thread = Work(other)
    with book.transaction():
        proposal = book.propose(torch.ones(2), [2])
        ready.set()
        go.wait(MOMENT)
        book.commit(proposal, torch.ones(2))
    thread.result()
    assert book.edits == 2


def test_readers_do_not_wait_for_a_value_to_be_trained(edited, monkeypatch, tmp_path):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    plain = generated(editor.model, [OTHER], 3)
    gate = stop_training(editor, monkeypatch)
    training = Work(lambda: editor.edit(OTHER, run_of(25, 2)))
    assert gate.reached.wait(LONG)

    def read() -> None:
        assert generated(editor.model, [PROMPT, OTHER], 3) == [TARGET, *plain]
        assert int(logits_of(editor.model, PROMPT)[-1].argmax()) == TARGET[0]
        assert editor.answer(PROMPT, 3) == str(TARGET)
        assert editor.explain(PROMPT).hit
        assert editor.status()["edits"] == 1
        assert editor.verify() == []
        book = editor.codebook
        assert book.lookup(editor.queries([PROMPT]))[0].tolist() == [0]
        assert (book.ids, len(book.history), len(book.labels)) == ([0], 1, 1)

    Work(read).result()
    assert training.is_alive()
    gate.opened.set()
    assert training.result().success
    assert generated(editor.model, [OTHER], 2) == [run_of(25, 2)]


def test_the_model_stays_in_eval_mode_until_the_last_thread_has_finished(edited, monkeypatch):
    editor = edited("gpt2")
    editor.model.train()
    gate = stop_training(editor, monkeypatch)
    training = Work(lambda: editor.edit(PROMPT, TARGET))
    assert gate.reached.wait(LONG)
    editor.explain(PROMPT)
    assert not any(module.training for module in editor.model.modules())
    gate.opened.set()
    assert training.result().success
    assert all(module.training for module in editor.model.modules())
    editor.model.eval()


def test_while_edits_are_rekeyed_the_old_ones_answer_and_a_change_that_waits_finds_the_new(
    edited, monkeypatch
):
    editor = edited("gpt2")
    kept, gone = editor.edit(PROMPT, TARGET), editor.edit(OTHER, run_of(25, 2))
    assert kept.success
    assert gone.success
    gate, own = Gate(), editor.family.produces

    def produces(*args: Any) -> Any:
        gate.stop()
        return own(*args)

    monkeypatch.setattr(editor.family, "produces", produces)
    rekeying = Work(editor.rekey)
    assert gate.reached.wait(LONG)
    assert Work(lambda: generated(editor.model, [PROMPT], 3)).result() == [TARGET]
    deleting = Work(lambda book=editor.codebook: book.delete(gone.id))
    deleting.join(MOMENT)
    gate.opened.set()
    assert [result.success for result in rekeying.result()] == [True, True]
    deleting.result()
    assert editor.codebook.ids == [kept.id]
    assert generated(editor.model, [PROMPT], 3) == [TARGET]
    assert generated(editor.model, [OTHER], 2) != [run_of(25, 2)]
    editor.codebook.check()


def test_edits_are_not_rekeyed_inside_a_transaction(edited):
    editor = edited("gpt2")
    with editor.codebook.transaction(), pytest.raises(ValueError, match="inside a transaction"):
        editor.rekey()


def test_saving_waits_for_the_change_of_another_thread_and_refuses_ones_own(tmp_path) -> None:
    book = Codebook(2, 2)
    opened, go = threading.Event(), threading.Event()

    def change() -> None:
        with book.transaction():
            book.insert(torch.zeros(2), [1], torch.zeros(2))
            opened.set()
            go.wait(LONG)
            book.insert(torch.full((2,), 9.0), [2], torch.zeros(2))

    changing = Work(change)
    assert opened.wait(LONG)
    saving = Work(lambda: store.save(book, tmp_path, {}))
    saving.join(MOMENT)
    go.set()
    changing.result()
    saving.result()
    assert store.load(tmp_path)[0].ids == [0, 1]
    with book.transaction(), pytest.raises(ValueError, match="inside a transaction"):
        store.save(book, tmp_path, {})
