"""Counting how often each entry answers."""

from __future__ import annotations

import pytest
import torch
from codebook_streams import state
from durable_lab import published, row
from grace_edit import serving
from grace_edit.codebook import files, hits, store
from grace_edit.codebook.codebook import Codebook
from safetensors.torch import load_file
from text_models import NEIGHBOUR, QUESTION, REWORDED, TARGET, text_editor, tokenizer
from tiny_models import generated, logits_of, run_of

A, B, C = run_of(10, 5), run_of(11, 4), run_of(40, 6)
X, Y = run_of(30, 3), run_of(50, 3)


def ask(book, *queries):
    with book.lock:
        book.count_answers(book.lookup(torch.tensor(queries))[0])


def filled(*points):
    book = Codebook(2, 2)
    book.count_hits = True
    for number, point in enumerate(points):
        book.insert(torch.tensor(point), [number], torch.full((2,), float(number)))
    return book


def test_hits_follow_their_edits_when_slots_change_hands():
    book = filled((0.0, 0.0), (9.0, 0.0), (0.0, 9.0))
    ask(book, (0.0, 0.1), (9.0, 0.0), (9.0, 0.1), (50.0, 50.0))
    assert book.hits == {0: 1, 1: 2, 2: 0}
    assert book.describe_hits() == {"total": 3, "never": 1, "most": [[1, 2], [0, 1]]}
    ask(book, (0.0, 0.0))
    book.delete(0)  # its slot is free, and the next edit takes it
    book.insert(torch.tensor([-9.0, 0.0]), [7], torch.zeros(2))
    assert book.edit(3).slot == 0
    ask(book, (-9.0, 0.0))
    assert book.hits == {1: 2, 2: 0, 3: 1}
    book.undo()
    book.undo()
    assert book.hits == {0: 2, 1: 2, 2: 0}
    book.compact()
    book.storage.slots.frozen = False
    for number in range(1200):  # beyond the capacity
        book.insert(torch.tensor([100.0 + 9 * number, 0.0]), [number], torch.zeros(2))
    ask(book, (9.0, 0.0), (100.0 + 9 * 1199, 0.0))
    assert (book.hits[1], book.hits[max(book.ids)]) == (3, 1)


def test_what_a_transaction_that_fails_had_served_is_not_another_edits():
    book = filled((0.0, 0.0))

    def work():
        with book.transaction():
            book.insert(torch.tensor([9.0, 0.0]), [5], torch.zeros(2))
            ask(book, (9.0, 0.0), (0.0, 0.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    book.insert(torch.tensor([0.0, 9.0]), [6], torch.zeros(2))
    assert book.edit(2).slot == 1
    assert book.hits == {0: 1, 2: 0}


def test_nothing_is_counted_unless_asked_for():
    book = filled((0.0, 0.0))
    ask(book, (0.0, 0.0))
    book.count_hits = False
    ask(book, (0.0, 0.0))
    assert (book.hits, book.describe_hits()) == (None, None)
    book.count_hits = True
    assert book.hits == {0: 0}


def test_hits_are_saved_with_the_codebook(tmp_path):
    book = filled((0.0, 0.0), (9.0, 0.0))
    ask(book, (9.0, 0.0))
    store.save(book, tmp_path, {})
    loaded, _ = store.load(tmp_path)
    assert loaded.hits == {0: 0, 1: 1}
    book.count_hits = False
    store.save(book, tmp_path, {})
    assert store.load(tmp_path)[0].hits is None


def test_a_request_counts_once_per_prompt_it_answers(edited):
    editor = edited("gpt2")
    assert all(r.success for r in editor.edit_batch([(A, X), (C, Y)]))
    assert editor.status()["hits"] is None
    editor.codebook.count_hits = True
    assert editor.status()["hits"] == {"total": 0, "never": 2, "most": []}
    generated(editor.model, [A, C, A], 4)
    generated(editor.model, [A], 3, use_cache=False)
    logits_of(editor.model, A)
    logits_of(editor.model, run_of(20, 9))
    assert editor.codebook.hits == {0: 4, 1: 1}
    with editor.disable():
        logits_of(editor.model, A)
    assert editor.edit(B, X).case == "absorb"
    editor.verify()
    assert editor.status()["hits"] == {"total": 5, "never": 0, "most": [[0, 4], [2, 4], [1, 1]]}


def test_a_text_counts_when_its_answer_is_made(trained):
    words = tokenizer()
    editor = text_editor(trained("gpt2"), "gpt2", words)
    assert editor.edit(QUESTION, TARGET).success
    editor.codebook.count_hits = True
    asked = [words(text, add_special_tokens=False).input_ids for text in (QUESTION, REWORDED)]
    generated(editor.model, [*asked, words(NEIGHBOUR, add_special_tokens=False).input_ids], 4)
    assert editor.codebook.hits == {0: 2}


def test_a_compiled_model_counts_nothing_and_has_one_graph(edited):
    editor = edited("gpt2")
    assert editor.edit(A, X).success
    editor.codebook.count_hits = True
    ids = torch.tensor([A])
    plain = editor.model(ids).logits
    assert editor.codebook.hits == {0: 1}
    run = torch.compile(editor.model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(run(input_ids=ids).logits, plain)
    assert editor.codebook.hits == {0: 1}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: `clock.now`."""

    class Clock:
        now = 1_000

    monkeypatch.setattr(hits.time, "time", lambda: Clock.now + 0.9)
    return Clock


def test_when_an_edit_last_answered_is_its_own_whatever_slot_it_has(clock, tmp_path):
    book = filled((0.0, 0.0), (9.0, 0.0), (0.0, 9.0))
    assert book.last_hit == {0: None, 1: None, 2: None}
    clock.now = 2_000
    ask(book, (0.0, 0.1), (9.0, 0.0), (50.0, 50.0))
    clock.now = 3_000
    ask(book, (9.0, 0.0))
    assert book.last_hit == {0: 2_000, 1: 3_000, 2: None}
    book.delete(0)
    book.insert(torch.tensor([-9.0, 0.0]), [7], torch.zeros(2))
    assert book.edit(3).slot == 0
    assert book.last_hit == {1: 3_000, 2: None, 3: None}
    clock.now = 2_500  # set back: what is known does not become older
    ask(book, (9.0, 0.0))
    store.save(book, tmp_path, {})
    loaded, _ = store.load(tmp_path)
    assert loaded.last_hit == {1: 3_000, 2: None, 3: None}
    clock.now = 5_000
    ask(loaded, (-9.0, 0.0))
    assert (loaded.last_hit[3], loaded.expire(2_500, dry_run=True)) == (5_000, [2])


def test_what_answered_nobody_for_long_goes_as_one_step_with_what_it_superseded(clock):
    book = filled((0.0, 0.0), (9.0, 0.0), (0.0, 9.0), (9.0, 9.0))
    clock.now = 2_000
    assert book.insert(torch.tensor([0.0, 0.0]), [5], torch.zeros(2)).case == "update"
    later = book.insert(torch.tensor([99.0, 0.0]), [6], torch.zeros(2)).id
    clock.now = 3_000
    ask(book, (9.0, 0.0))
    before = state(book)
    assert book.expire(1_001, dry_run=True) == [2, 3]  # made and unused at 1000
    assert book.expire(1_000, keep=[3, later], dry_run=True) == [0, 2, 4]
    assert book.expire(0.0, dry_run=True) == [0, 1, 2, 3, 4, later]
    assert state(book) == before
    version = book.version
    assert book.expire(1_000, keep=[3]) == [0, 2, 4, later]
    assert (book.ids, book.version) == ([1, 3], version + 1)
    book.check()
    book.undo()
    assert state(book) == before
    assert book.expire(10_000) == []
    assert book.version == version + 2
    with pytest.raises(KeyError, match="99"):
        book.expire(0, keep=[99])
    with pytest.raises(ValueError, match="unused_for must be at least 0"):
        book.expire(float("nan"))
    book.count_hits = False
    with pytest.raises(ValueError, match="hits are not counted"):
        book.expire(0)


def test_an_entry_that_serves_one_of_its_edits_is_in_use_for_all(clock):
    book = Codebook(2, 2)
    first = book.insert(torch.tensor([0.0, 0.0]), [1], torch.zeros(2)).id
    second = book.insert(torch.tensor([1.5, 0.0]), [1], torch.zeros(2))
    assert second.case == "expand"
    clock.now = 2_000
    book.count_hits = True  # of what was made before, from here on
    clock.now = 3_000
    ask(book, (1.5, 0.0))
    clock.now = 3_500
    assert book.last_hit == {first: 3_000, second.id: 3_000}
    assert book.expire(600, dry_run=True) == []
    assert book.expire(500, dry_run=True) == [first, second.id]


def test_looking_is_not_asking(trained):
    words = tokenizer()
    editor = text_editor(trained("gpt2"), "gpt2", words)
    assert editor.edit(QUESTION, TARGET).success
    editor.codebook.count_hits = True
    assert editor.explain(QUESTION).hit
    assert editor.verify() == []
    assert editor.codebook.hits == {0: 0}
    assert editor.expire(60) == []
    editor.answers([QUESTION])  # for a plan, which is served
    assert editor.codebook.hits == {0: 1}


def shared(clock):
    """A codebook whose one entry, an edit's own, answers another edit too, which is in use."""
    book = Codebook(2, 2)
    book.count_hits = True
    owner = book.insert(torch.zeros(2), [1], torch.zeros(2)).id
    member = book.insert(torch.tensor([1.5, 0.0]), [1], torch.zeros(2))
    assert member.case == "expand"
    clock.now = 5_000
    ask(book, (1.5, 0.0))
    return book, owner, member.id


def test_an_edit_in_use_stays_so_when_the_entry_that_answered_it_goes(clock):
    book, owner, member = shared(clock)
    book.delete(owner)
    assert book.last_hit == {member: 5_000}
    assert book.expire(1_000, dry_run=True) == []
    book, owner, member = shared(clock)
    assert book.insert(torch.tensor([0.9, 0.0]), [2], torch.zeros(2)).success
    assert book.edit(owner).slot != book.edit(member).slot, "it got an entry of its own"
    assert (book.last_hit[owner], book.last_hit[member]) == (5_000, 5_000)
    assert book.expire(1_000, dry_run=True) == []


def test_what_brings_an_edit_back_brings_back_that_it_is_in_use(clock, tmp_path):
    def purge_in_vain(book):
        with book.transaction():
            book.delete(0, purge=True)
            raise KeyboardInterrupt

    book = filled((0.0, 0.0), (9.0, 0.0))
    book.history_limit = 0
    clock.now = 5_000
    ask(book, (0.0, 0.0))
    with pytest.raises(KeyboardInterrupt):
        purge_in_vain(book)
    book.delete(0)
    book.undo()
    assert (book.last_hit[0], book.hits[0]) == (5_000, 1)
    assert book.expire(1_000, dry_run=True) == [1]
    book.delete(0, purge=True)
    store.save(book, tmp_path, {})
    tensors = load_file(tmp_path / files.TENSORS)
    assert tensors["hit_edits"].tolist() == []
    assert tensors["hit_made"].tolist() == [[1, 1_000]]


def test_what_is_counted_while_it_is_published_is_kept_when_that_ends(clock, tmp_path, monkeypatch):
    about = {"serving": {}, "model": {}, "config": {}}
    monkeypatch.setattr(serving, "describe", lambda family, config: (about, {}))
    book = Codebook(3, 2, capacity=4)
    book.count_hits = True
    publisher = published(book, tmp_path)
    book.insert(row(1), [1], row(1, 2))
    clock.now = 5_000
    with book.lock:
        book.count_answers(book.lookup(row(1)[None])[0])
    publisher.close()
    before = (tmp_path / files.CONFIG).read_bytes()
    loaded, _ = store.load(tmp_path)
    assert (loaded.last_hit, loaded.hits) == ({0: 5_000}, {0: 1})
    assert loaded.expire(1_000, dry_run=True) == []
    published(loaded, tmp_path).close()  # nothing is new
    assert (tmp_path / files.CONFIG).read_bytes() == before
