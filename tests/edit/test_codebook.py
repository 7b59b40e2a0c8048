"""The codebook's own behaviour: cases, supersession, slots, growth, imports, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from codebook_streams import Stream, bits, state
from grace_edit.codebook.codebook import Codebook
from grace_edit.codebook.records import CapacityError
from torch import Tensor


def vec(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def value(number: float) -> Tensor:
    return torch.full((2,), float(number))


def test_each_case_writes_what_the_table_says() -> None:
    book = Codebook(2, 2, radius=1.0)
    add = book.insert(vec(0, 0), [7], value(1))
    assert (add.id, add.case, add.slot, add.neighbour, add.distance) == (0, "add", 0, -1, math.inf)
    assert (add.radius_before, add.radius_after, add.success) == (None, None, True)
    expand = book.insert(vec(1.5, 0), [7], value(2))
    assert (expand.case, expand.slot, expand.radius_before, expand.radius_after) == (
        "expand",
        0,
        1.0,
        1.5,
    )
    absorb = book.insert(vec(0, 1.5), [7], value(3))
    assert (absorb.case, absorb.slot, absorb.distance) == ("absorb", 0, 1.5)
    assert book.members(0) == (0, 1, 2)
    assert torch.equal(book.values[0], value(1))  # the others' value is not touched
    split = book.insert(vec(0, -1.0), [8], value(4))
    assert (split.case, split.slot, split.neighbour) == ("split", 1, 0)
    assert (split.radius_before, split.radius_after) == (1.5, 0.5)
    assert book.radii[1].item() == 0.5
    # The shrunk ball has uncovered edits 1 and 2: they have entries of their own now.
    assert [book.edit(i).slot for i in range(4)] == [0, 2, 3, 1]
    assert torch.equal(book.values[2], value(1))
    assert book.radii[2].item() == fp32_half_distance(vec(1.5, 0), vec(0, -1.0))
    update = book.insert(vec(0, -1.0), [9], value(5))
    assert (update.case, update.slot, update.distance) == ("update", 1, 0.0)
    assert (update.radius_before, update.radius_after) == (0.5, 0.5)
    assert book.labels[1] == (9,)
    assert torch.equal(book.values[1], value(5))
    assert book.edit(3).state == "superseded"
    assert book.edit(3).superseded_by == 4
    assert book.ids == [0, 1, 2, 4]
    assert (book.entries, book.edits, int(book.count)) == (4, 4, 4)
    book.check()


def fp32_half_distance(a: Tensor, b: Tensor) -> float:
    distance = (a.double() - b.double()).square().sum().float().double().sqrt().float()
    return min(1.0, (distance / 2).item())


def test_an_update_supersedes_every_edit_the_entry_answered() -> None:
    book = Codebook(2, 2)
    for point in (vec(0, 0), vec(0.5, 0), vec(0, 0.5)):
        book.insert(point, [1], value(1))
    proposal = book.propose(vec(0, 0), [2])
    assert (proposal.case, proposal.supersedes, proposal.members) == ("update", (0, 1, 2), ())
    book.commit(proposal, value(2))
    assert book.ids == [3]
    assert book.members(0) == (3,)
    book.check()


def test_an_edit_with_the_same_prompt_supersedes_the_earlier_one_and_reuses_its_query() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1), prompt=[5, 6])
    book.insert(vec(0.4, 0), [1], value(1), prompt=[5, 7])
    again = book.insert(vec(0.6, 0), [2], value(2), prompt=[5, 7])  # the query has drifted
    assert (again.case, again.distance) == ("split", pytest.approx(0.4))
    assert torch.equal(book.query_of(2), vec(0.4, 0))
    assert book.ids == [0, 2]
    assert book.edit(1).superseded_by == 2
    book.check()


def test_an_edit_with_a_query_equal_to_the_bit_supersedes_the_earlier_one() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(0.5, 0), [1], value(1))
    same_label = book.insert(vec(0.5, 0), [1], value(1))  # was a member, not a key
    assert (same_label.case, book.ids) == ("absorb", [0, 2])
    book.insert(vec(0.5, -0.0), [1], value(1))
    assert book.ids == [0, 3]
    zero = book.insert(vec(-0.0, 0), [1], value(9))  # at distance 0 from the key
    assert (zero.case, book.ids) == ("absorb", [3, 4])
    assert bits(book.query_of(4)) == bits(vec(0, 0))
    assert book.members(0) == (3, 4)
    book.check()


def test_a_value_given_again_for_an_entry_nobody_shares_replaces_the_old_one() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    assert book.insert(vec(0, 0), [1], value(2)).case == "absorb"
    assert torch.equal(book.values[0], value(2))
    book.delete(1)
    assert torch.equal(book.values[0], value(1))
    book.check()


def test_a_proposal_changes_nothing_and_goes_stale_with_the_next_change() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    before, version = state(book), book.version
    proposal = book.propose(vec(0.5, 0), [2])
    assert (proposal.case, proposal.slot, proposal.new_radius) == ("split", -1, 0.25)
    assert (state(book), book.version) == (before, version)
    book.insert(vec(9, 9), [1], value(1))
    with pytest.raises(
        ValueError, match=rf"cannot commit: .*\(version {version}, now {version + 1}\)"
    ):
        book.commit(proposal, value(2))


def test_an_entry_of_its_own_ends_half_way_to_the_nearest_other_label() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(1.6, 0), [2], value(2))
    own = book.propose(vec(0.5, 0), [1], own_entry=True)
    assert (own.case, own.radius_after) == ("add", own.radius_before)
    assert own.new_radius == pytest.approx(0.55)
    book.commit(own, value(3))
    assert [book.labels[s] for s in range(3)] == [(1,), (2,), (1,)]
    book.check()


def test_at_distance_zero_an_entry_of_its_own_takes_the_entry_over() -> None:
    book = Codebook(2, 2)
    for point, prompt in ((vec(0, 0), [1]), (vec(0.5, 0), [2])):
        book.commit(book.propose(point, [1], prompt), value(1), answers=lambda edit, slot: True)
    proposal = book.propose(vec(0, 0), [1], [1], own_entry=True)
    assert (proposal.case, proposal.members) == ("update", (1,))
    book.commit(proposal, value(2), answers=lambda edit, slot: False)
    assert torch.equal(book.values[book.edit(2).slot], value(2))
    assert torch.equal(book.values[book.edit(1).slot], value(1))  # kept the value it had
    assert book.ids == [1, 2]
    book.check()


def test_a_dead_slot_is_zeroed_and_the_lowest_one_is_used_again() -> None:
    book = Codebook(2, 2, capacity=4)
    for i in range(4):
        book.insert(vec(10.0 * i, 1), [i], value(i + 1))
    book.delete(1)
    book.delete(2)
    assert int(book.count) == 4
    for slot in (1, 2):
        assert book.radii[slot].item() == -math.inf
        assert not book.keys[slot].any()
        assert not book.values[slot].any()
    assert book.labels == [(0,), None, None, (3,)]
    assert book.members(1) == ()
    with pytest.raises(KeyError):
        book.edit_of_slot(1)
    new = book.insert(vec(50, 50), [5], value(5))
    assert (new.id, new.slot) == (4, 1)  # the slot comes back, the id does not
    book.delete(3)
    assert int(book.count) == 2  # nothing is in use at the end
    book.check()


def test_capacity_doubles_and_keeps_every_bit() -> None:
    book, stream = Codebook(3, 2, capacity=2), Stream(0)
    reference = Codebook(3, 2, capacity=512)
    capacities = set()
    for _ in range(100):
        edit = stream.next()
        book.insert(*edit)
        reference.insert(*edit)
        capacities.add(book.capacity)
    assert capacities == {2, 4, 8, 16, 32, 64, 128}
    count = int(book.count)
    for name in ("keys", "values", "radii"):
        assert bits(getattr(book, name)[:count]) == bits(getattr(reference, name)[:count])
    book.check()


def test_a_frozen_codebook_refuses_to_grow_and_stays_as_it_was() -> None:
    book = Codebook(2, 2, capacity=2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(9, 0), [2], value(2))
    book.frozen = True
    before, version, keys = state(book), book.version, book.keys
    with pytest.raises(CapacityError, match=r"cannot add an entry: .* frozen and all its 2 slots"):
        book.insert(vec(0, 9), [3], value(3))
    assert (state(book), book.version) == (before, version)
    assert book.insert(vec(0.5, 0), [1], value(1)).id == 2  # needs no slot; no id was lost
    assert book.keys is keys
    book.frozen = False
    assert book.insert(vec(0, 9), [3], value(3)).slot == 2
    book.check()


def test_an_undo_does_not_take_the_memory_of_captured_graphs_away() -> None:
    book = Codebook(2, 2, capacity=1)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(9, 0), [2], value(2))
    book.frozen = True
    keys = book.keys
    book.undo()
    assert book.keys is keys
    assert book.ids == [0]
    book.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_keep_the_bits_of_their_queries(dtype: torch.dtype) -> None:
    book = Codebook(3, 2, dtype=dtype, value_dtype=torch.float32)
    stream, queries = Stream(1), []
    for _ in range(60):
        query, label, given, prompt = stream.next()
        queries.append(query.to(dtype))
        result = book.insert(queries[-1], label, given, prompt)
        assert result.slot is not None
        assert int(book.lookup(book.query_of(result.id or 0)[None])[0]) == result.slot
    assert (book.keys.dtype, book.values.dtype) == (dtype, torch.float32)
    book.check()


def test_lookup_answers_inside_the_radius_and_defers_outside() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(9, 0), [2], value(2))
    index, distance = book.lookup(torch.stack([vec(0, 1), vec(0, 1.01), vec(8.5, 0)]))
    assert index.tolist() == [0, -1, 1]
    assert distance.tolist() == [1.0, math.inf, 0.5]
    assert book.nearest_two(vec(8, 0)) == [(1, 1.0), (0, 8.0)]
    book.delete(0)
    assert book.nearest_two(vec(8, 0)) == [(1, 1.0)]
    assert Codebook(2, 2).nearest_two(vec(0, 0)) == []
    assert Codebook(2, 2).lookup(torch.zeros(3, 2))[0].tolist() == [-1, -1, -1]


def test_queries_closer_than_the_distance_can_tell_do_not_hang_the_repair() -> None:
    tiny = 1e-30  # its square is 0 in fp32
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    book.insert(vec(tiny, 1.5), [1], value(1))  # a member far out
    split = book.insert(vec(0, 1.5), [2], value(2))
    assert split.case == "split"
    assert book.edit(1).superseded_by == 2
    book.check()
    other = book.insert(vec(tiny, 1.5), [3], value(3))
    assert (other.case, book.ids) == ("update", [0, 3])
    book.check()


def test_imported_entries_are_edits_and_entries_as_given() -> None:
    source = torch.Generator().manual_seed(0)
    keys, values = torch.randn(50, 4, generator=source), torch.randn(50, 3, generator=source)
    radii = torch.rand(50, generator=source) / 8
    labels = [[i % 5, 1] for i in range(50)]
    book = Codebook.from_tensors(keys, values, radii, labels)
    assert (book.entries, book.edits, book.ids) == (50, 50, list(range(50)))
    assert bits(book.keys) == bits(keys)
    assert bits(book.values) == bits(values)
    assert bits(book.radii) == bits(radii)
    assert book.labels == [tuple(label) for label in labels]
    assert book.edit(7).result.case == "import"
    assert book.lookup(keys)[0].tolist() == list(range(50))
    assert not book.storage.edit_records  # what nothing happened to costs no record
    assert not book.storage.entry_records
    book.check()


def test_imported_entries_are_edited_deleted_and_restored_like_others() -> None:
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 3, generator=source)
    values, radii = torch.randn(40, 2, generator=source), torch.full((40,), 0.4)
    labels = [[i % 3] for i in range(40)]
    book = Codebook.from_tensors(keys, values, radii, labels, capacity=64)
    start = state(book)
    stream = Stream(5)
    for step in range(60):
        query, label, new, prompt = stream.next()
        if step % 5 == 0:
            query = keys[step % 40]
        book.insert(query, label, new, prompt)
        book.check()
    assert book.edit(0).state == "superseded"
    made = [edit.id for edit in book.history if edit.id >= 40]
    with book.transaction():
        for id in made:
            book.delete(id, purge=True)
            if id % 10 == 0:
                book.check()
    for name in ("count", "labels", "members", "ids"):
        assert state(book)[name] == start[name], name
    for tensor, given in ((book.keys, keys), (book.values, values), (book.radii, radii)):
        assert bits(tensor[:40]) == bits(given)
    book.delete(3)
    assert 3 not in book.ids
    assert torch.equal(book.query_of(3), keys[3])
    assert book.radii[3].item() == -math.inf
    assert book.insert(keys[3], [9], torch.zeros(2)).slot == 3
    book.check()
    book.delete(39, purge=True)
    assert int(book.count) == 39
    book.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"keys": torch.zeros(2, 3)}, "equal rows", id="equal keys"),
        pytest.param({"keys": torch.tensor([[0.0], [-0.0]])}, "equal rows", id="minus zero"),
        pytest.param({"keys": torch.eye(3)[:2] / 0}, "keys must be finite", id="NaN key"),
        pytest.param({"radii": vec(1, -1)}, "radii must not be negative", id="negative radius"),
        pytest.param({"radii": vec(math.nan, 1)}, "radii must not be negative", id="NaN radius"),
        pytest.param({"radii": torch.ones(3)}, "agree in length", id="too many radii"),
        pytest.param({"radii": torch.ones(2).double()}, "radii must be float32", id="fp64 radii"),
        pytest.param({"labels": [[1], []]}, "labels must hold", id="empty label"),
        pytest.param({"keys": torch.zeros(2)}, r"\[N, D\]", id="keys of one dimension"),
    ],
)
def test_an_import_that_breaks_a_rule_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "keys": torch.eye(2),
        "values": torch.zeros(2, 2),
        "radii": torch.ones(2),
        "labels": [[1], [2]],
        **change,
    }
    with pytest.raises(ValueError, match=message):
        Codebook.from_tensors(**arguments)  # type: ignore[arg-type]


def test_many_entries_are_imported_without_a_record_each() -> None:
    count = 200_000
    keys = torch.arange(count * 4, dtype=torch.float32).reshape(count, 4)
    labels = [[i % 7] for i in range(count)]
    book = Codebook.from_tensors(keys, torch.zeros(count, 1), torch.ones(count), labels)
    assert book.edits == count
    result = book.insert(keys[123] + 0.1, [99], torch.ones(1))
    assert (result.id, result.case, result.neighbour) == (count, "split", 123)
    book.delete(5)
    assert len(book.storage.edit_records) < 10
    assert (book.entries, int(book.lookup(keys[77:78])[0])) == (count, 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"radius": 0.0}, "radius must be positive", id="radius 0"),
        pytest.param({"radius": math.inf}, "radius must be positive", id="infinite radius"),
        pytest.param({"drift": -1.0}, "drift must be", id="negative drift"),
        pytest.param({"max_radius": 0.0}, "max_radius must be", id="no radius allowed"),
        pytest.param({"capacity": 0}, "capacity must be at least 1, got 0", id="no slots"),
        pytest.param({"policy": "mine"}, "policy must be one of", id="unknown policy"),
        pytest.param({"dtype": torch.float64}, "dtype must be", id="fp64 keys"),
        pytest.param({"value_dtype": torch.int64}, "value_dtype must be", id="int values"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(2, 2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "label", "given", "message"),
    [
        pytest.param(torch.zeros(3), [1], value(1), r"query must have shape \[2\]", id="shape"),
        pytest.param(torch.zeros(2).half(), [1], value(1), "query must have the keys", id="dtype"),
        pytest.param(vec(0, math.nan), [1], value(1), "query must be finite", id="NaN query"),
        pytest.param(vec(0, 0), [], value(1), "label must hold at least one", id="no label"),
        pytest.param(vec(0, 0), [1.5], value(1), "label must hold whole", id="half a label"),
        pytest.param(vec(0, 0), [1], torch.zeros(3), r"value must have shape \[2\]", id="value"),
        pytest.param(vec(0, 0), [1], vec(0, math.inf), "value must be finite", id="inf value"),
    ],
)
def test_a_bad_edit_is_refused_by_the_name_of_its_argument(
    query: Tensor, label: list[int], given: Tensor, message: str
) -> None:
    book = Codebook(2, 2)
    before = state(book)
    with pytest.raises(ValueError, match=message):
        book.insert(query, label, given)
    assert state(book) == before
    assert book.insert(vec(0, 0), [1], value(1)).id == 0


def test_a_new_entry_needs_a_value() -> None:
    book = Codebook(2, 2)
    with pytest.raises(ValueError, match="value must be a tensor for the case add, got None"):
        book.commit(book.propose(vec(0, 0), [1]), None)


def test_an_unknown_id_is_a_key_error() -> None:
    book = Codebook(2, 2)
    book.insert(vec(0, 0), [1], value(1))
    for call in (book.delete, book.edit, book.query_of):
        for id in (1, -1):
            with pytest.raises(KeyError, match=f"got {id}"):
                call(id)
    book.delete(0)
    with pytest.raises(KeyError):
        book.delete(0)
    book.delete(0, purge=True)
    with pytest.raises(KeyError):
        book.delete(0, purge=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_independent_and_can_undo(how: str) -> None:
    book, stream = Codebook(3, 2), Stream(2)
    for _ in range(30):
        book.insert(*stream.next())
    before = state(book)
    twin = copy.deepcopy(book) if how == "deepcopy" else pickle.loads(pickle.dumps(book))
    assert state(twin) == before
    while twin.storage.journal.steps:
        twin.undo()
    assert twin.ids == []
    twin.check()
    assert state(book) == before


def test_results_become_plain_json() -> None:
    book = Codebook(2, 2)
    result = book.insert(vec(0, 0), [1], value(1))
    fields = result.to_dict()
    names = "id case slot neighbour distance radius_before radius_after loss_start loss_end steps"
    assert " ".join(fields) == f"{names} fragile success reason keys probability proven"
    assert fields["distance"] is None  # there was no neighbour
    assert fields["case"] == "add"


def test_a_small_or_contested_entry_is_reported_fragile() -> None:
    book = Codebook(2, 2, drift=0.2)
    assert not book.insert(vec(0, 0), [1], value(1)).fragile
    assert not book.insert(vec(0.5, 0), [2], value(2)).fragile
    assert book.insert(vec(0, 0.3), [3], value(3)).fragile


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_codebook_on_a_gpu_decides_and_restores_as_on_a_cpu() -> None:
    here, there = Codebook(3, 2, capacity=4), Codebook(3, 2, capacity=4, device="cuda")
    stream = Stream(13)
    for number in range(120):
        query, label, new, prompt = stream.next()
        assert there.insert(query.cuda(), label, new.cuda(), prompt) == here.insert(
            query, label, new, prompt
        )
        if number % 20 == 19:
            there.delete(there.ids[number // 3])
            here.delete(here.ids[number // 3])
        assert state(there) == state(here)
    there.check()
    there.undo()
    here.undo()
    assert state(there.to("cpu")) == state(here)
    there.check()
