"""Where the host would wait for a GPU: no served forward reads a value, and nothing moves.

No GPU is needed to see it: on a CPU every read is counted as it is dispatched, and tensors that
hold no values at all (fake ones on the "meta" device) cannot be read.
"""

from __future__ import annotations

import warnings
from collections import Counter

import grace_edit
import pytest
import torch
from grace_edit import Codebook, GraceConfig, GraceEditor, QueryPlan
from grace_edit.adaptor import forwards
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.adaptor.forwards import _may_look
from grace_edit.adaptor.positions import plan_queries
from grace_edit.adaptor.state import Generation
from grace_edit.codebook.records import CapacityError
from tiny_models import LAYERS, CountGrace, build, padded, run_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grace_kernels

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
ROWS = [run_of(40, 6), PROMPT, run_of(3, 2)]
TENSORS = ("keys", "values", "radii", "count")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")


class CountReads(TorchDispatchMode):
    """Count what would make the host wait for a GPU: values read, shapes that depend on them."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        masked = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in READS or masked:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_every_kind_of_read():
    x = torch.arange(4)
    with CountReads() as count:
        x.sum().item()
        bool((x > 1).any())
        x[x > 1]
        x.nonzero()
        torch.equal(x, x)
        x[x > 1] = 0
    assert count.reads == {
        "_local_scalar_dense": 2,
        "index": 1,
        "nonzero": 1,
        "equal": 1,
        "index_put_": 1,
    }


def reads_of(model, rows, *, left=False, plan=None, **kwargs):
    ids, mask = padded(rows, left=left)
    with CountReads() as count, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, **kwargs)
    return count.reads


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bert-mlm", "t5"])
def test_a_forward_reads_no_value_that_the_unedited_one_does_not(edited, trained, name):
    plain = trained(name)
    given = {"decoder_input_ids": torch.zeros(3, 1).long()} if name == "t5" else {}
    for replace in ("last", "all"):
        for query in ("last", "mean"):
            model = edited(name, replace=replace, query=query).model
            for left in (False, True):
                got, base = ({**given} for _ in range(2))
                if name in ("gpt2", "llama"):
                    _, mask = padded(ROWS, left=left)
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    got["position_ids"] = base["position_ids"] = positions
                assert reads_of(model, ROWS, left=left, **got) == reads_of(
                    plain, ROWS, left=left, **base
                )


def test_a_packed_forward_reads_no_value_that_the_unedited_one_does_not(edited, trained):
    editor, plain = edited("llama"), trained("llama")
    packed = torch.tensor([[*ROWS[2], *PROMPT, *ROWS[0]]])
    positions = torch.tensor([[*range(2), *range(4), *range(6)]])
    ends = torch.tensor([1, 5, 11])
    counts = []
    for model in (editor.model, plain):
        with CountReads() as count, CountGrace() as ours, torch.no_grad():
            with editor.plan(QueryPlan(ends, ends, ends + 1)):
                model(input_ids=packed, position_ids=positions, use_cache=False)
        counts.append(count.reads)
        assert ours.calls.total() == (model is editor.model)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_reads_no_value_that_the_unedited_model_does_not(
    edited, trained, name, replace, cache
):
    editor, plain = edited(name, replace=replace), trained(name)
    assert editor.edit(PROMPT, TARGET).success
    how = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
    }[cache]
    ids, mask = padded(ROWS, left=True)
    counts = []
    for model in (editor.model, plain):
        with CountReads() as count:
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **how
            )
        assert out.shape == (3, 11)
        counts.append(count.reads)
    assert counts[0] == counts[1]
    assert counts[0]["_local_scalar_dense"] > 0  # whether to stop


@pytest.mark.parametrize("replace", ["last", "all"])
def test_a_prompt_in_chunks_and_a_later_turn_with_a_static_cache_read_no_more_values(
    edited, trained, replace
):
    from transformers import StaticCache

    editor, plain = edited("llama", replace=replace), trained("llama")
    first, second = torch.tensor([ROWS[0]]), torch.tensor([[*ROWS[0], *run_of(46, 2), *PROMPT]])
    how = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    counts = []
    for model in (editor.model, plain):
        cache = StaticCache(config=model.config, max_cache_len=32)
        model.generate(first, past_key_values=cache, **how)
        with CountReads() as count, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(second, past_key_values=cache, **how)
        with CountReads() as chunks:
            if replace == "last":
                model.generate(second, prefill_chunk_size=4, cache_implementation="static", **how)
        counts.append((count.reads, chunks.reads))
    (turn, chunks), (base_turn, base_chunks) = counts
    # Once per call each, before its first forward: how much the given cache holds.
    extra = torch.tensor([turn.total() - base_turn.total(), chunks.total() - base_chunks.total()])
    assert extra.tolist() == [1 + (replace == "all"), int(replace == "last")]


def test_on_a_gpu_the_host_looks_once_per_adaptor_and_not_at_all_while_capturing(monkeypatch):
    adaptor = GraceAdaptor(Codebook(2, 2), query="last", replace="last")
    with FakeTensorMode():
        mask = torch.ones(2, 3, device="cuda")
    assert mask.is_cuda
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _may_look(adaptor, "packed", mask)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [_may_look(adaptor, "packed", mask) for _ in range(3)] == [True, False, False]
    assert [_may_look(adaptor, "left padding", mask) for _ in range(3)] == [True, False, False]


def fake(model, mode):
    """Turn a model on the meta device into one of fake tensors."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = mode.from_tensor(tensor)
    return model


@pytest.fixture
def unreadable():
    """Return a function that gives an attached model whose tensors have no values, and its mode."""

    def make(name, **config):
        editor = GraceEditor(build(name).eval(), None, GraceConfig(LAYERS[name], **config))
        editor.model.to("meta")
        slots = editor.codebook.storage.slots
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for tensor in TENSORS:
            setattr(slots, tensor, mode.from_tensor(getattr(slots, tensor)))
        return editor, fake(editor.model, mode), mode

    return make


@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_a_forward_works_on_tensors_that_hold_no_values(unreadable, name, replace, query):
    _, model, mode = unreadable(name, replace=replace, query=query)
    with mode, torch.no_grad(), CountGrace() as ours:
        ids = torch.ones(3, 7, dtype=torch.long, device="meta")
        given = {"decoder_input_ids": ids[:, :2]} if name == "t5" else {}
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    assert out.logits.device.type == "meta"
    assert ours.calls == {"adapt_": 1}


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_the_steps_of_generate_work_on_tensors_that_hold_no_values(unreadable, replace):
    from transformers import DynamicCache, StaticCache

    editor, model, mode = unreadable("llama", replace=replace)
    with mode, torch.no_grad(), CountGrace() as ours:
        for make in (DynamicCache, lambda **k: StaticCache(max_cache_len=16, **k)):
            cache = make(config=model.config)
            state = Generation(prompt_len=5)
            counts = []
            for length in (5, 6, 7):
                ids = torch.ones(2, length, dtype=torch.long, device="meta")
                mask = torch.ones_like(ids)
                new = ids[:, cache.get_seq_length() if length == 5 else -1 :]
                given = {"attention_mask": mask, "past_key_values": cache}
                with editor.adaptor.using(generation=state):
                    inputs = model.prepare_inputs_for_generation(
                        ids, next_sequence_length=new.shape[1], use_cache=True, **given
                    )
                    model(**inputs)
                counts.append(ours.calls.total())
                ours.calls.clear()
            assert counts == [1, 0, 0]


@pytest.mark.parametrize("on", ["cpu", "gpu", "graph"])
def test_a_forward_of_ones_own_asks_where_the_static_cache_is_empty(edited, monkeypatch, on):
    from transformers import StaticCache

    if on != "cpu":  # as if the cache counted on a GPU
        monkeypatch.setattr(forwards, "_waits_for_nothing", lambda tensor: False)
    if on == "graph":
        monkeypatch.setattr(forwards, "_recorded", lambda tensor: True)
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    model, ids = editor.model, torch.tensor([PROMPT])
    cache = StaticCache(config=model.config, max_cache_len=32)
    follows = run_of(14, 1)[0]

    def ask(ids):
        with torch.no_grad(), CountGrace() as ours:
            last = int(model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax())
        return last, ours.calls.total()

    assert ask(ids) == (TARGET[0], 1)
    step = torch.tensor([[follows]])
    decides = int(on == "gpu")  # the operator runs, and nobody asks
    assert ask(step)[1] == decides
    cache.reset()
    assert ask(ids) == (TARGET[0], 1)  # used before and empty again
    cache.reset()
    ask(ids[:, :1])
    assert ask(ids[:, 1:]) == (follows, int(on != "cpu"))  # in the middle nobody asks
    # A prompt of one token, and the same token as a step of decoding.
    assert editor.edit([follows], TARGET).success
    cache.reset()
    assert ask(step) == ((TARGET[0], 1) if on != "graph" else (run_of(15, 1)[0], 0))
    with editor.disable():
        cache.reset()
        ask(ids)
        plain = ask(step)[0]
    cache.reset()
    ask(ids)
    assert ask(step) == (plain, decides)


def test_a_plan_on_another_device_than_the_layer_follows_it():
    book = Codebook(4, 4, device="meta")
    adaptor = GraceAdaptor(book, query="last", replace="last")
    plan = plan_queries(torch.ones(2, 3).bool(), replace="last")
    rows = torch.empty(2, 3, 4, device="meta")
    with adaptor.using(plan=plan), FakeTensorMode(allow_non_fake_inputs=True):
        assert adaptor(rows, rows.clone()).device.type == "meta"
    assert plan.query_row.device.type == "cpu"


def test_a_codebook_on_another_device_is_refused_and_nothing_is_written(edited):
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    book, adaptor = editor.codebook, editor.adaptor
    before = {name: getattr(book, name).clone() for name in TENSORS}
    rows = torch.full((1, 4, 48), 7.0)
    plan = plan_queries(torch.ones(1, 4).bool(), replace="all")
    book.to("meta")
    hidden = rows.clone()
    with adaptor.using(plan=plan), torch.no_grad():
        with pytest.raises(ValueError, match=r"device of its codebook \(meta\), got cpu"):
            adaptor(rows, hidden)
    assert torch.equal(hidden, rows)
    with pytest.raises(ValueError, match=r"codebook \(meta\), got cpu; .*codebook\.to\("):
        editor.model(torch.tensor([PROMPT]))
    with pytest.raises(ValueError, match=r"codebook \(meta\), got cpu"):
        editor.explain(PROMPT)
    # And the other way round: the codebook stays as it is, to the bit.
    for name, tensor in before.items():
        setattr(book.storage.slots, name, tensor)
    meta = torch.empty(1, 4, 48, device="meta")
    with adaptor.using(plan=plan), torch.no_grad():
        with pytest.raises(ValueError, match=r"codebook \(cpu\), got meta"):
            adaptor(meta, meta.clone())
    assert all(torch.equal(getattr(book, name), tensor) for name, tensor in before.items())
    assert editor.model(torch.tensor([PROMPT])).logits[0, -1].argmax() == TARGET[0]


def test_the_codebook_follows_the_model_to_a_device_and_never_to_a_dtype(edited):
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    book = editor.codebook
    kept = {name: getattr(book, name).clone() for name in TENSORS}
    for move in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float32),
    ):
        move(editor.model)
        for name, tensor in kept.items():
            assert getattr(book, name).dtype == tensor.dtype
            assert torch.equal(getattr(book, name), tensor)
    assert editor.model(torch.tensor([PROMPT])).logits[0, -1].argmax() == TARGET[0]
    editor.model.to("meta", torch.bfloat16)
    for name, tensor in kept.items():
        assert getattr(book, name).device.type == "meta"
        assert getattr(book, name).dtype == tensor.dtype


def test_nothing_warms_a_device_up_unasked(edited, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("warmup was called")

    for place in (grace_kernels, grace_kernels.api):
        monkeypatch.setattr(place, "warmup", refuse)
    editor = edited("gpt2")
    assert editor.edit(PROMPT, TARGET).success
    editor.save_pretrained(tmp_path)
    model = editor.model
    editor.detach()
    grace_edit.load(model, tmp_path)
    assert model(torch.tensor([PROMPT])).logits[0, -1].argmax() == TARGET[0]


def changes(book):
    """Make 50 edits of every kind and take some back; yields the kind of each change."""
    torch.manual_seed(0)
    for i in range(50):
        direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
        yield book.insert(10.0 * i + 0.3 * direction, [i], torch.randn(8)).case
    yield book.insert(torch.full((8,), 10.0) + 0.5, [1], torch.randn(8)).case
    yield book.insert(torch.full((8,), 20.0) + 0.5, [99], torch.randn(8)).case
    yield book.insert(book.query_of(3), [77], torch.randn(8)).case
    for i in (0, 7, 49, 50):
        book.delete(i)
        yield "delete"
    for _ in range(5):
        book.undo()
        yield "undo"


def places(book):
    return [getattr(book, name).data_ptr() for name in TENSORS]


@pytest.mark.parametrize("frozen", [False, True])
def test_edits_deletes_and_undo_within_the_capacity_write_into_the_same_memory(frozen):
    book = Codebook(8, 8, capacity=64, radius=1.0)
    book.frozen = frozen
    before, kinds = places(book), Counter()
    for kind in changes(book):
        kinds[kind] += 1
        assert places(book) == before
        assert int(book.count) == book.storage.slots.in_use
    assert {"add", "update", "delete", "undo"} <= set(kinds)
    assert kinds["expand"] + kinds["absorb"] > 0
    assert kinds.total() == 62


def test_growth_and_its_undo_move_the_tensors_and_a_frozen_codebook_refuses_to():
    book = Codebook(2, 2, capacity=2)
    for i in range(2):
        book.insert(torch.full((2,), 9.0 * i), [i], torch.zeros(2))
    before = places(book)
    book.frozen = True
    with pytest.raises(CapacityError, match=r"cannot add an entry: .* frozen and all its 2 slots"):
        book.insert(torch.full((2,), 90.0), [2], torch.zeros(2))
    assert places(book) == before
    book.frozen = False
    book.insert(torch.full((2,), 90.0), [2], torch.zeros(2))
    grown = places(book)
    assert grown[3] == before[3]
    assert all(a != b for a, b in zip(grown[:3], before[:3], strict=True))
    book.frozen = True
    book.undo()
    assert places(book) == grown
    assert book.capacity == 4


def test_a_codebook_that_grew_or_moved_in_inference_mode_can_be_edited_outside_of_it():
    book = Codebook(2, 2, capacity=1)
    for _ in range(2):
        with torch.inference_mode():
            for i in range(3):
                book.insert(torch.full((2,), 9.0 * i), [i], torch.ones(2))
            book.undo()
        book.insert(torch.full((2,), 18.0), [7], torch.zeros(2))
        assert book.values[2].tolist() == [0.0, 0.0]
        for _ in range(3):
            book.undo()
    assert book.capacity == 1
    with torch.inference_mode():
        book.to("meta")
    assert not any(getattr(book, name).is_inference() for name in TENSORS)
