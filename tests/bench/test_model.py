"""What the end-to-end parts of the benchmark measure, on models and codebooks of a small size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.demo import topics

from benchmarks import edits, goals, model
from benchmarks.measurements import Run, read, select, write

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 97}
LAYER = "transformer.h.1.mlp"
SIZE = model.Size(SMALL, LAYER, (50, 4200), 4, 3, 0.05)
OURS = {"edited", "edited, a hit", "edited, no sketch"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found():
    told = []
    found = model.measure(SIZE, 1.0, lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    return found


def bench(count: int = 50) -> model.Bench:
    built = model.build(SMALL)
    seen, _ = model.watched(built, LAYER, model.random_tokens(built, 4, 1))
    with torch.no_grad():
        return model.Bench(built, SIZE, seen, count)


def test_a_decode_step_of_an_edited_model_runs_no_operator_of_this_package(found):
    counted = select(found, data="decode step", unit="grace operators")
    assert {one.name for one in counted} == OURS | {"unedited", "published"}
    assert [one.median for one in counted] == [0] * len(counted)
    assert all(one.note.endswith(f"prefill {int(one.name in OURS)}") for one in counted)


def test_a_decode_step_of_an_edited_model_runs_as_many_operators_as_an_unedited_one(found):
    for keys in SIZE.keys:
        every = select(found, data="decode step", unit="operators", keys=keys)
        least = {one.name: (one.p20, one.p80) for one in every}
        assert {least[name] for name in OURS & least.keys()} == {least["unedited"]}
        assert least["published"][0] > least["unedited"][1]


def test_operators_of_this_package_in_any_forward_are_counted():
    edited = bench().edited[0]
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with model.counted(edited.model) as counts, torch.no_grad():
        for _ in range(3):
            edited.model(tokens)
    assert [grace for grace, _ in counts] == [1, 1, 1]


def test_the_measurements_of_the_model_are_complete_and_survive_their_files(found, tmp_path):
    table, whole = write(Run({}, found), tmp_path, "run")
    assert read(table).measured == read(whole).measured == found
    for keys in SIZE.keys:
        names = {"unedited", "published", *OURS} - ({"edited, no sketch"} if keys < 4096 else set())
        of_size = select(found, part="model", keys=keys, width=32, batch=1, dtype="fp32")
        assert {one.name for one in select(of_size, data=model.PREFILL, unit="ms")} == names
        assert {one.name for one in select(of_size, data=model.LOOKUP)} == names - {"unedited"}
        generated = select(of_size, data="generation of 3 tokens", unit="tokens/s")
        assert {one.name for one in generated} == names - {"edited, a hit"}
        assert all(0 < one.p20 <= one.median <= one.p80 for one in generated)
    assert {one.answers for one in found if one.kind == "ours"} == {"exact"}
    assert {one.answers for one in found if one.kind == "peer"} == {"rounded"}
    assert {one.answers for one in found if one.kind == "bound"} == {""}


def test_a_lookup_is_timed_inside_the_prefills_that_it_is_a_share_of(found):
    given = {model.PREFILL: 20.0, model.LOOKUP: 0.4}
    timed = [replace(one, median=given.get(one.data, one.median)) for one in found]
    shares = goals.lookup_shares(timed)
    assert len(shares) == 7
    assert [share for _, share in shares] == pytest.approx([0.02] * 7)


def test_a_stopwatch_is_read_in_the_prefills_alone(monkeypatch):
    made = bench()
    watched, timed = [], model.interleaved

    def prefills(calls, seconds):
        watched.append([isinstance(getattr(*c.lookup), model.Stopwatch) for c in made.edited])
        return timed(calls, seconds, most=3)

    monkeypatch.setattr(model, "interleaved", prefills)
    with torch.no_grad():
        both = made._prefills(0.01)
    assert watched == [[True] * len(made.edited)]
    assert not any(isinstance(getattr(*c.lookup), model.Stopwatch) for c in made.edited)
    assert {one.data for one in both} == {model.PREFILL, model.LOOKUP}


def judged(found, start):
    (goal,) = [goal for goal in goals.goals(found) if goal.text.startswith(start)]
    return goal.met, goal.total, goal.worst


def test_the_goals_of_an_edited_model_are_judged(found):
    assert judged(found, "a decode step") == (5, 5, 0)
    asks = [replace(one, median=1.0) if one.name == "edited, a hit" else one for one in found]
    assert judged(asks, "a decode step") == (3, 5, 1)
    # Rows of a codebook as large as the goal's, with a prefill of 20 ms.
    large = [replace(one, keys=100_000) for one in select(found, keys=4200)]
    for lookup, met in ((0.39, 2), (0.41, 0)):
        given = {model.PREFILL: 20.0, model.LOOKUP: lookup}
        timed = [replace(one, median=given.get(one.data, one.median)) for one in large]
        expected = (met, 2, pytest.approx(5 * lookup))
        assert judged(timed, "a lookup in a prefill") == expected


def test_an_edited_model_that_answers_wrongly_is_not_measured():
    made = bench()
    made.values[25] += 1
    with pytest.raises(RuntimeError, match="edited, a hit: the layer's output"):
        made.check()
    made = bench()
    made.edited[0].lookup[0].codebook.radii[:] = 1e9
    with pytest.raises(RuntimeError, match="edited: the layer's output"):
        made.check()


def test_a_peer_that_decides_wrongly_is_marked():
    made = bench()
    made.adaptor.radii = torch.zeros(50) - 1
    made.check()
    assert made.published.answers == "wrong"


def test_inserts_and_growth_are_measured_in_every_way(tmp_path):
    inserted = edits.inserts(300, 16, 0.05)
    assert [(one.name, one.unit, one.answers) for one in inserted] == [
        ("Codebook.insert", "edits/s", "exact"),
        ("published append", "edits/s", "rounded"),
    ]
    # With a sketch, 66 bytes per one and more.
    grown = {one.name: one for one in edits.imports(4200, 16, 1)}
    assert grown["keys, values and radii"].median == pytest.approx(4200 * (2 * 64 + 4) / 1e6)
    assert 4200 * 66e-6 < grown["sketch"].median < 4200 * 70e-6
    assert {name for name, one in grown.items() if one.unit == "s"} == {
        "import",
        "save",
        "load",
        "insert beyond the capacity",
    }
    marks = edits.one_by_one((10, 100), 16)
    assert [(one.keys, one.kind) for one in marks] == [
        (10, "ours"),
        (10, "peer"),
        (100, "ours"),
        (100, "peer"),
    ]
    assert marks[0].median < marks[2].median
    assert marks[1].median < marks[3].median
    run = Run({}, [*inserted, *grown.values(), *marks])
    assert read(write(run, tmp_path, "run")[0]).measured == run.measured


def test_inserts_are_exact_only_where_the_reference_finds_all_with_their_values():
    book = edits.codebook(300, 16, 100)
    inserted = []
    for query, label, value in itertools.islice(edits._edits(40, 16, 3000), 40):
        book.insert(query, label, value)
        inserted.append((query, value))
    assert edits.found_again(book, inserted)
    query, value = inserted[3]
    assert not edits.found_again(book, [*inserted[:3], (query, value + 1), *inserted[4:]])
    assert not edits.found_again(book, [*inserted, (query + 5, book.values[-1])])


def test_edits_are_timed_but_the_first_and_refused_ones_are_wrong():
    built = model.build(SMALL)
    pairs = [([1, 2, 3 + i], [10 + i]) for i in range(3)]
    good = GraceEditor(built, None, GraceConfig(layer=LAYER))
    one = edits.edited({"part": "edits"}, {"GraceEditor.edit": good}, pairs)[0]
    assert (one.unit, one.kind, one.answers, one.width) == ("edits/s", "ours", "", 32)
    assert one.note.startswith("2 timed, ")
    assert len(good.codebook.ids) == 3
    good.detach()
    hasty = GraceEditor(built, None, GraceConfig(layer=LAYER, max_steps=1))
    long = [(prompt, [*target, 3, 27, 5]) for prompt, target in pairs]  # one step does not do it
    one = edits.edited({"part": "edits"}, {"published recipe": hasty}, long)[0]
    assert (one.kind, one.answers) == ("peer", "wrong")
    assert one.note == "2 timed, 1.0 training steps per edit; 3 of 3 refused"


def test_of_a_classifier_that_is_not_installed_that_is_said(monkeypatch):
    def missing():
        raise ModuleNotFoundError("the demo needs the packaged MiniLM")

    monkeypatch.setattr(topics, "pretrained_path", missing)
    (one,) = edits.classifier(1)
    assert (one.answers, one.note) == ("absent", "the demo needs the packaged MiniLM")
