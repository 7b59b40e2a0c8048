"""Compiled models: an edit between calls is answered at the next one, by the graphs there are.

What CUDA graphs need is checked on a CPU by what they are made of: which inputs of a compiled graph
torch takes to stay at one address, and whether ours do.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager

import grace_edit
import pytest
import torch
from grace_edit import Codebook, QueryPlan
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.adaptor.positions import plan_queries
from grace_edit.codebook import sketch_upkeep as sketching
from grace_edit.families.projection import logits_seen, rows_alone
from tiny_models import generated, padded, run_of, watching
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHER = run_of(40, 6)
VARIANT = [*run_of(40, 1), *PROMPT[1:]]  # the same answer, from close by
ROWS = [VARIANT, PROMPT]
PAIR = [OTHER, PROMPT]


class Graphs:
    """A compiler that runs graphs as they are and remembers them, with what each run was given.

    Args:
        inputs: per graph, for each input: its name, whether it is static, its addresses so far.
    """

    def __init__(self):
        self.graphs, self.inputs = [], []

    def compile(self, graph, inputs):
        sources = [node._dynamo_source for node in graph.graph.find_nodes(op="placeholder")]
        names = ["" if source is None else source.name for source in sources]
        self.graphs.append(graph)

        def forward(lowered, _):
            static = torch._guards.TracingContext.get().fw_metadata.static_input_indices
            seen = [(name, i in static, set()) for i, name in enumerate(names)]
            self.inputs.append(seen)

            def run(*args):
                for (_, _, addresses), arg in zip(seen, args, strict=True):
                    addresses.add(arg.data_ptr() if isinstance(arg, torch.Tensor) else 0)
                return lowered(*args)

            return run

        return aot_autograd(fw_compiler=forward)(graph, inputs)

    def operators(self):
        """Return the names of our operators in each graph."""
        targets = [[node.target for node in graph.graph.nodes] for graph in self.graphs]
        return [
            [t._opname for t in of_graph if "grace" in getattr(t, "namespace", "")]
            for of_graph in targets
        ]

    def static(self, name=""):
        """Return the inputs with `name` in theirs that are taken to stay where they are."""
        every = [one for of_graph in self.inputs for one in of_graph]
        return [(where, at) for where, static, at in every if static and name in where]

    def moved(self, name="['grace']"):
        """Return those for which a CUDA graph would have been recorded again: ours by default."""
        return [where for where, at in self.static(name) if len(at) > 1]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@contextmanager
def compiling_nothing():
    """Fail where anything is compiled or a graph breaks."""
    before = dict(counters["stats"]), dict(counters["frames"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert (dict(counters["stats"]), dict(counters["frames"])) == before
    assert not counters["graph_break"]


def compile_config(graphs):
    from transformers import CompileConfig

    # A function: transformers copies its configuration, a method with its object.
    def backend(graph, inputs):
        return graphs.compile(graph, inputs)

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators alone
    return config


def served(editor, config, rows=ROWS, length=4):
    how = {"cache_implementation": "static", "compile_config": config}
    return generated(editor.model, rows, length, **how)


def changes(editor):
    """Make a change of every kind; yields its name and the rows whose answers it changes."""
    book, target = editor.codebook, run_of(50, 3)
    first = editor.edit(PROMPT, TARGET)
    assert first.success
    yield "add", {1: TARGET}
    assert editor.edit(PROMPT, target).case == "update"
    yield "update", {1: target}
    editor.undo()
    yield "undo of an update", {1: TARGET}
    (query,) = editor.queries([VARIANT])
    assert book.insert(query, book.labels[0], book.values[0]).case == "expand"
    yield "expand", {0: TARGET, 1: TARGET}
    editor.undo()
    yield "undo of an expansion", {1: TARGET}
    for i in range(20):
        book.insert(torch.full_like(query, 50.0 + i), [i], torch.zeros_like(book.values[0]))
    second = editor.edit(VARIANT, target)
    assert (second.case, second.slot) == ("split", 21)
    yield "split, after other additions", {0: target, 1: TARGET}
    editor.delete(first.id)
    yield "delete", {0: target}
    editor.delete(second.id)
    yield "delete of the last", {}


CASES = [
    *(("gpt2", replace, "last") for replace in ("last", "prompt", "all")),
    *(("llama", replace, query) for replace in ("last", "all") for query in ("last", "mean")),
]


@pytest.mark.parametrize(("name", "replace", "query"), CASES, ids=["-".join(c) for c in CASES])
def test_an_edit_between_calls_of_a_compiled_generate_is_answered_and_compiles_nothing(
    edited, name, replace, query
):
    probe = edited(name, replace=replace, query=query)
    one, other = probe.queries([PROMPT, VARIANT])
    apart = float((one - other).norm())
    probe.detach()
    # An entry reaches its neighbour's key by expansion only, and is split where labels differ.
    # The drift covers what a batch of another shape does to a query, whatever the machine.
    how = {"radius": 0.7 * apart, "max_radius": 9 * apart, "drift": 0.01 * apart, "capacity": 64}
    editor = edited(name, replace=replace, query=query, **how)
    graphs = Graphs()
    config = compile_config(graphs)
    plain = served(editor, config)
    assert plain == [run_of(14, 4), run_of(14, 4)]
    assert counters["stats"]["unique_graphs"] == len(graphs.graphs) == 1
    tokens = plain
    with compiling_nothing():
        for what, expected in changes(editor):
            got = served(editor, config)
            assert got != tokens, what
            for row in range(2):
                wanted = expected.get(row, plain[row])
                assert got[row][: len(wanted)] == wanted, what
            assert got == generated(editor.model, ROWS, 4), what
            tokens = got
    assert tokens == plain
    assert graphs.operators() == [[]]
    assert graphs.moved() == []
    assert bool(graphs.static("['grace']")) == (replace == "all")


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_a_decode_step_runs_no_operator_of_ours_with_a_static_cache_either(edited, replace):
    editor = edited("llama", replace=replace)
    assert editor.edit(PROMPT, TARGET).success
    with watching(editor.model) as calls:
        how = {"cache_implementation": "static", "disable_compile": True}
        assert generated(editor.model, PAIR, 4, **how)[1][:3] == TARGET
    assert calls == [1, 0, 0, 0]


def test_each_step_under_all_writes_the_latched_value_and_leaves_the_other_sequences_alone(edited):
    editor = edited("llama", replace="all")
    assert editor.edit(PROMPT, TARGET).success
    value, seen = editor.codebook.values[0], []
    layer = editor.model.get_submodule(editor.layer)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    how = {"cache_implementation": "static", "disable_compile": True}
    generated(editor.model, PAIR, 4, **how)
    handle.remove()
    assert [out.shape[1] for out in seen] == [6, 1, 1, 1]
    for out in seen:
        equal = (out == value).all(dim=-1)
        assert not equal[0].any()
        assert equal[1, -len(PROMPT) :].all()


def test_latched_answers_stay_in_place_and_belong_to_one_generation_at_a_time(edited):
    editor = edited("llama", replace="all")
    assert editor.edit(PROMPT, TARGET).success
    seen = []

    class Nested:
        """Generates something else with the same model after every token."""

        def put(self, value):
            latched = editor.adaptor.generation.latched
            if latched is None:  # the prompt, before its forward
                return
            seen.append((latched.index.data_ptr(), latched.values.data_ptr()))
            assert generated(editor.model, [OTHER], 3) == [run_of(46, 3)]

        def end(self):
            pass

    alone = generated(editor.model, [PROMPT], 5)
    for _ in range(2):
        assert generated(editor.model, [PROMPT], 5, streamer=Nested()) == alone
    assert len(seen) == 10
    assert len(set(seen)) == 1
    for rows in range(1, 20):
        generated(editor.model, [PROMPT] * rows, 1)
    assert len(editor.adaptor.thread.rooms) == 8


def test_latched_answers_may_be_written_in_and_outside_of_inference_mode(edited):
    editor = edited("gpt2", replace="all")
    assert editor.edit(PROMPT, TARGET).success
    alone = generated(editor.model, [PROMPT], 5)
    editor.adaptor.thread.rooms.clear()
    with torch.inference_mode():
        assert generated(editor.model, [PROMPT], 5) == alone
    assert generated(editor.model, [PROMPT], 5) == alone
    with torch.inference_mode():
        assert generated(editor.model, [PROMPT], 5) == alone


def test_a_model_compiled_as_a_whole_generates_edited_text_with_a_static_cache(edited):
    editor = edited("llama", replace="all")
    graphs = Graphs()
    editor.model.compile(backend=graphs.compile, fullgraph=True)
    how = {"cache_implementation": "static", "disable_compile": True}
    plain = generated(editor.model, PAIR, 4, **how)
    assert plain == [run_of(46, 4), run_of(14, 4)]
    with compiling_nothing():
        for prompt, row in ((PROMPT, 1), (OTHER, 0)):
            assert editor.codebook.insert(*stored(edited, "all", prompt)).case == "add"
            assert generated(editor.model, PAIR, 4, **how)[row][:3] == TARGET
    assert sorted(map(len, graphs.operators())) == [0, 1]
    assert graphs.moved() == []


def test_with_one_static_cache_nothing_at_all_moves_that_a_cuda_graph_would_hold(edited):
    from transformers import StaticCache

    editor = edited("llama", replace="all")
    graphs = Graphs()
    config = compile_config(graphs)
    cache = StaticCache(config=editor.model.config, max_cache_len=32)

    def ask():
        cache.reset()
        how = {"past_key_values": cache, "compile_config": config}
        return generated(editor.model, PAIR, 4, **how)

    plain = ask()
    with compiling_nothing():
        assert ask() == plain
        editor.codebook.insert(*stored(edited, "all", PROMPT))
        assert ask()[1][:3] == TARGET
        editor.undo()
        assert ask() == plain
    assert len(graphs.static()) > 10
    assert graphs.moved("") == []


def test_a_prompt_in_compiled_chunks_is_answered_and_an_edit_compiles_nothing(edited):
    editor = edited("llama")
    graphs = Graphs()
    how = {"cache_implementation": "static", "compile_config": compile_config(graphs)}
    row = [run_of(20, 4) + PROMPT]
    how["prefill_chunk_size"] = 4
    plain = generated(editor.model, row, 3, **how)
    assert generated(editor.model, row, 3, **how) == plain
    with compiling_nothing():
        editor.codebook.insert(*stored(edited, "last", row[0]))
        assert generated(editor.model, row, 3, **how) == [TARGET] != plain
    # Only the last chunk, which holds the prompt's end, asks.
    assert sum(map(len, graphs.operators())) == 1
    assert graphs.moved() == []


def stored(edited, replace, prompt):
    """Return the query, label and value of an edit, made on another copy of the model."""
    other = edited("llama", replace=replace)
    result = other.edit(prompt, TARGET)
    book = other.codebook
    return book.query_of(result.id), book.labels[result.slot], book.values[result.slot].clone()


def whole(model, graphs):
    return torch.compile(model.forward, backend=graphs.compile, fullgraph=True)


def by_block(model, graphs):
    for block in model.model.layers:
        block.compile(backend=graphs.compile, fullgraph=True)
    return model.forward


@pytest.mark.parametrize(
    ("how", "replace"),
    [(whole, "last"), (whole, "all"), (by_block, "prompt")],
    ids=["whole-last", "whole-all", "regional-prompt"],
)
def test_a_compiled_prefill_with_a_plan_asks_in_one_operator_and_an_edit_compiles_nothing(
    edited, how, replace
):
    editor = edited("llama", replace=replace)
    graphs = Graphs()
    forward = how(editor.model, graphs)
    ids, mask = padded(PAIR, left=False)
    plan = plan_queries(mask.bool(), replace=replace)

    def ask():
        with torch.no_grad(), editor.plan(plan):
            logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [int(logits[0, 5].argmax()), int(logits[1, 3].argmax())]

    plain = [run_of(46, 1)[0], run_of(14, 1)[0]]
    assert ask() == plain
    first = stored(edited, replace, PROMPT)
    second = stored(edited, replace, OTHER)
    with compiling_nothing():
        one = editor.codebook.insert(*first)
        assert ask() == [plain[0], TARGET[0]]
        editor.codebook.insert(*second)
        assert ask() == [TARGET[0], TARGET[0]]
        editor.delete(one.id)
        assert ask() == [TARGET[0], plain[1]]
        editor.undo()
        editor.undo()
        assert ask() == [plain[0], TARGET[0]]
        # The rows of the next batch, written where the graph reads them.
        plan.query_row.copy_(torch.tensor([-1, -1]))
        assert ask() == plain
    operators = graphs.operators()
    assert sorted(map(len, operators)) == [0] * (len(operators) - 1) + [1]
    assert graphs.moved() == []


@pytest.mark.parametrize("replace", ["last", "all"])
def test_edits_that_fit_a_sketch_refit_it_and_put_it_out_of_use_compile_nothing(
    edited, monkeypatch, replace
):
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: slots >= 8)
    first, second = stored(edited, replace, PROMPT), stored(edited, replace, OTHER)
    editor = edited("llama", replace=replace, capacity=64)
    book, graphs = editor.codebook, Graphs()
    sketch, forward = book.sketch, whole(editor.model, graphs)
    ids, mask = padded(PAIR, left=False)
    plan = plan_queries(mask.bool(), replace=replace)
    plain = [run_of(46, 1)[0], run_of(14, 1)[0]]

    def ask():
        with torch.no_grad(), editor.plan(plan):
            logits = forward(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [int(logits[0, 5].argmax()), int(logits[1, 3].argmax())]

    def far_away(count):
        for _ in range(count):
            key = torch.full_like(first[0], 50.0 + len(book.history))
            book.insert(key, [len(book.history)], torch.zeros_like(first[2]))

    assert ask() == plain
    covered = [int(sketch.covered)]
    with compiling_nothing():
        one = book.insert(*first)
        assert ask() == [plain[0], TARGET[0]]
        for count in (6, 1, 4):  # not yet enough; fitted; told of
            far_away(count)
            assert ask() == [plain[0], TARGET[0]]
            covered.append(int(sketch.covered))
        book.insert(*second)
        far_away(4)  # fitted anew
        assert ask() == [TARGET[0], TARGET[0]]
        covered.append(int(sketch.covered))
        editor.delete(one.id)
        assert ask() == [TARGET[0], plain[1]]
        sketch.counters.copy_(torch.tensor([1000, 1000, 0, 1000]))
        editor.undo()
        assert ask() == [TARGET[0], TARGET[0]]
        covered.append(int(sketch.covered))
    assert covered == [0, 0, 8, 12, 17, 0]
    assert book.storage.slots.sketch_upkeep.since_fit.slots == 16
    assert book.sketch is sketch
    assert graphs.operators() == [["pruned_adapt_"]]
    assert graphs.moved() == []
    assert len(graphs.static("sketch")) == len(sketch.tensors())


def test_a_plan_in_new_memory_is_answered_too_and_compiles_nothing(edited):
    editor = edited("llama")
    graphs = Graphs()
    forward = whole(editor.model, graphs)
    ids = torch.tensor([[*run_of(3, 2), *PROMPT]])
    positions = torch.tensor([[*range(2), *range(4)]])

    def ask(*rows):
        with torch.no_grad(), editor.plan(plan_of(*rows)):
            logits = forward(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits[0, [1, 5]].argmax(dim=-1).tolist()

    def plan_of(*rows):
        row = torch.tensor(rows)
        return QueryPlan(row, row, row + 1)

    ask(1, 5)
    with compiling_nothing():
        editor.codebook.insert(*stored(edited, "last", PROMPT))
        assert ask(1, 5) == [run_of(5, 1)[0], TARGET[0]]
        assert ask(-1, 1) == [run_of(5, 1)[0], run_of(14, 1)[0]]
    assert graphs.operators() == [["adapt_"]]


def loaded(edited, trained, directory):
    """Return a model that serves an edit, whose adaptor has done nothing yet."""
    editor = edited("llama")
    assert editor.edit(PROMPT, TARGET).success
    editor.save_pretrained(directory)
    model = trained("llama")
    return model, grace_edit.load(model, directory)


def test_a_model_compiled_before_its_adaptor_did_anything_heeds_disable_plans_and_generate(
    edited, trained, tmp_path
):
    model, adaptor = loaded(edited, trained, tmp_path)
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([PROMPT])

    @torch.no_grad()
    def ask():
        return int(compiled(input_ids=ids, use_cache=False).logits[0, -1].argmax())

    plain = run_of(14, 1)[0]
    assert ask() == TARGET[0]
    with adaptor.using(enabled=False):
        assert ask() == plain
    assert ask() == TARGET[0]
    adaptor.switch.turn_off()
    assert ask() == plain
    adaptor.switch.turn_on()
    assert ask() == TARGET[0]
    nobody = torch.tensor([-1])
    with adaptor.using(plan=QueryPlan(nobody, nobody, nobody)):
        assert ask() == plain
    assert ask() == TARGET[0]
    how = {"max_new_tokens": 3, "do_sample": False}
    assert compiled.generate(ids, **how)[0, 4:].tolist() == TARGET


def test_a_model_compiled_in_one_thread_serves_in_others_with_the_same_graphs(
    edited, trained, tmp_path
):
    model, adaptor = loaded(edited, trained, tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, got = torch.tensor([PROMPT]), []

    @torch.no_grad()
    def ask():
        on = compiled(input_ids=ids, use_cache=False).logits
        with adaptor.using(enabled=False):
            off = compiled(input_ids=ids, use_cache=False).logits
        return int(on[0, -1].argmax()), int(off[0, -1].argmax())

    def work():
        with compiling_nothing():
            got.append(ask())

    expected = (TARGET[0], run_of(14, 1)[0])
    assert ask() == expected
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert got == [expected] * 2
    assert counters["stats"]["unique_graphs"] == 2


def test_a_loop_of_ones_own_over_a_static_cache_compiles_once_and_its_steps_run_no_operator(edited):
    from transformers import StaticCache

    editor = edited("llama")
    graphs = Graphs()
    model = editor.model
    step = torch.compile(model.forward, backend=graphs.compile, fullgraph=True)

    @torch.no_grad()
    def answer():
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = model(input_ids=torch.tensor([PROMPT]), past_key_values=cache).logits
        tokens = []
        for _ in range(3):
            tokens.append(int(logits[0, -1].argmax()))
            logits = step(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        return tokens

    assert answer() == run_of(14, 3)
    with compiling_nothing():
        editor.codebook.insert(*stored(edited, "last", PROMPT))
        assert answer() == TARGET
    assert graphs.operators() == [[]]


@pytest.mark.parametrize("sketch", [False, True])
def test_growth_past_the_capacity_and_its_undo_are_answered_by_a_compiled_model(
    monkeypatch, sketch
):
    monkeypatch.setattr(sketching, "worthwhile", lambda slots: sketch and slots >= 2)
    book = Codebook(2, 2, capacity=1)
    adaptor = GraceAdaptor(book, query="last", replace="last")
    compiled = torch.compile(adaptor.__call__, backend="eager", fullgraph=True)
    rows = torch.arange(3)
    keys = torch.tensor([[0.0, 0.0], [9.0, 9.0], [18.0, 18.0]])

    def ask():
        with adaptor.using(plan=QueryPlan(rows, rows, rows + 1)), torch.no_grad():
            return compiled(keys, torch.zeros(3, 2))[:, 0].tolist()

    assert ask() == [0.0, 0.0, 0.0]
    for i in range(3):
        book.insert(keys[i], [i], torch.full((2,), 1.0 + i))
        assert ask() == [1.0 + j if j <= i else 0.0 for j in range(3)]
    assert book.capacity == 4
    assert (book.sketch is not None and book.sketch.active) == sketch
    book.undo()
    assert book.capacity == 2
    assert ask() == [1.0, 2.0, 0.0]


def test_importing_the_package_imports_no_compiler_and_no_models():
    heavy = "{'torch._dynamo', 'transformers'} & set(sys.modules)"
    run = [sys.executable, "-c", f"import sys, grace_edit; sys.exit(str({heavy} or '') or 0)"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("hook", ["rows alone", "logits seen"])
def test_a_thread_may_compile_a_model_while_another_one_trains_or_proves(trained, hook):
    model = trained("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    found = []

    def serve():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            found.append(compiled(input_ids=ids, use_cache=False).logits)
        found.append(compiled)

    one = torch.tensor([0])
    inside = rows_alone(model, one, one) if hook == "rows alone" else logits_seen(model)
    thread = threading.Thread(target=serve)
    with inside as seen:
        thread.start()
        thread.join()
    logits, compiled = found
    assert torch.equal(logits, expected)
    assert not seen
    with logits_seen(model) as own, torch.no_grad():  # what was compiled meanwhile has no hook
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
        assert own == []
