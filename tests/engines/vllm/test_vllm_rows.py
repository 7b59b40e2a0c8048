"""Which rows of a step ask, for both of vLLM's runners, by stand-ins for their state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from grace_edit.engines.vllm.layer import EditedLayer
from grace_edit.engines.vllm.news import Changed, News
from grace_edit.engines.vllm.options import NotServed
from grace_edit.engines.vllm.rows import ends_of_v1, ends_of_v2
from grace_edit.engines.vllm.worker import Steps, watch

# id: computed, prompt, scheduled
STEPS = {
    "whole prompts, one after the other": (
        {"a": (0, 5, 5), "b": (0, 1, 1)},
        [("a", 4), ("b", 5)],
    ),
    "a first chunk does not ask": ({"a": (0, 9, 5)}, []),
    "the last chunk asks at its own last row": ({"a": (5, 9, 4)}, [("a", 3)]),
    "a last chunk of one token, the rest was cached": ({"a": (8, 9, 1)}, [("a", 0)]),
    "steps of decoding never ask": ({"a": (9, 9, 1), "b": (12, 9, 1)}, []),
    "decoding, a chunk and a prompt's end in one step": (
        {"a": (20, 7, 1), "b": (0, 99, 40), "c": (3, 10, 7), "d": (7, 7, 1)},
        [("c", 47)],
    ),
    "resumed after preemption: the row of the prompt, not the last one": (
        {"a": (0, 5, 9), "b": (4, 6, 4)},
        [("a", 4), ("b", 10)],
    ),
    "resumed in chunks behind its prompt": ({"a": (6, 5, 4)}, []),
}


def v1_of(step: dict[str, tuple[int, int, int]]) -> tuple[Any, dict[str, int]]:
    # The runner's arrays are longer than the batch and hold what was there before.
    column = [
        np.array([*values, 0, 3], dtype=np.int32) for values in zip(*step.values(), strict=True)
    ]
    batch = SimpleNamespace(
        num_reqs=len(step),
        req_ids=list(step),
        num_computed_tokens_cpu=column[0],
        num_prompt_tokens=column[1],
    )
    return batch, {id: scheduled for id, (_, _, scheduled) in step.items()}


def v2_of(step: dict[str, tuple[int, int, int]]) -> tuple[Any, Any]:
    computed, prompt, scheduled = map(np.array, zip(*step.values(), strict=True))
    n = len(step)
    states = SimpleNamespace(
        req_id_to_index={id: 2 * n - i for i, id in enumerate(step)},
        prompt_len=SimpleNamespace(np=np.full(3 * n, 77, dtype=np.int32)),
    )
    index = np.array([states.req_id_to_index[id] for id in step])
    states.prompt_len.np[index] = prompt
    start = np.full(n + 4, scheduled.sum(), dtype=np.int32)  # padded, as for a captured graph
    start[: n + 1] = [0, *np.cumsum(scheduled)]
    batch = SimpleNamespace(
        num_reqs=n,
        req_ids=list(step),
        idx_mapping_np=index,
        num_computed_tokens_np=computed.astype(np.int32),
        num_scheduled_tokens=scheduled.astype(np.int32),
        query_start_loc_np=start,
    )
    return batch, states


@pytest.mark.parametrize(("step", "ends"), STEPS.values(), ids=STEPS)
def test_a_prompt_asks_where_it_ends_in_both_runners(step, ends):
    assert ends_of_v1(*v1_of(step)) == ends
    assert ends_of_v2(*v2_of(step)) == ends


def test_a_dummy_batch_of_the_v2_runner_asks_nothing():
    batch, states = v2_of({"a": (0, 5, 5)})
    states.req_id_to_index.clear()
    assert ends_of_v2(batch, states) == []


# A worker: stand-ins for its runner, the operator's own code behind it.

WIDTH = 8


def layer_of(query: str, **more: Any) -> EditedLayer:
    given = {"capacity": 4, "requests": 6, "may_grow": False, **more}
    return EditedLayer(
        "model.layers.1.mlp", query=query, width=WIDTH, dtype=torch.float32, device="cpu", **given
    )


class V1:
    """As much of a V1 runner as `watch` touches; its forward adds 1."""

    def __init__(self, layer: EditedLayer) -> None:
        self.layer = layer
        self.input_batch: Any = None
        self.dummy_forward = False

    def _prepare_inputs(self, scheduled: Any, lengths: Any) -> str:
        return "prepared"

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        hidden = source + 1
        self.layer.answer(hidden, source)
        return hidden

    def execute_model(self, scheduled: Any, source: torch.Tensor) -> torch.Tensor:
        assert self._prepare_inputs(scheduled, None) == "prepared"
        if scheduled.fails:
            raise RuntimeError("out of memory")
        return self.forward(source)


class V2(V1):
    def __init__(self, layer: EditedLayer) -> None:
        super().__init__(layer)
        self.states: Any = None
        self.model_state = SimpleNamespace(prepare_inputs=lambda batch, states: {"positions": 1})

    def execute_model(self, scheduled: Any, source: torch.Tensor, dummy_run: bool = False) -> Any:
        assert self.model_state.prepare_inputs(self.input_batch, self.states) == {"positions": 1}
        return self.forward(source)


def scheduled(step: dict[str, tuple[int, int, int]], news: News | None, fails: bool = False) -> Any:
    made = SimpleNamespace(num_scheduled_tokens={id: n for id, (_, _, n) in step.items()})
    made.fails = fails
    if news is not None:
        made.grace = news
    return made


STEP = {"a": (3, 9, 1), "b": (0, 3, 3), "c": (4, 6, 2), "d": (9, 4, 1)}
ROWS = {"b": 3, "c": 5}
SOURCE = torch.arange(7 * WIDTH).float().view(7, WIDTH)


@pytest.fixture(params=["V1", "V2"])
def watched(request):
    """Return a function that runs steps on a watched runner of either kind."""

    def made(layer: EditedLayer):
        runner = {"V1": V1, "V2": V2}[request.param](layer)
        watch(runner, Steps(layer))

        def run(step, news, **more):
            if request.param == "V1":
                runner.input_batch, _ = v1_of(step)
            else:
                runner.input_batch, runner.states = v2_of(step)
            return runner.execute_model(scheduled(step, news), SOURCE.clone(), **more)

        run.runner = runner
        return run

    return made


def test_a_value_that_came_with_a_request_replaces_the_row_its_prompt_ends_in(watched):
    run = watched(layer_of("text"))
    value = torch.full((WIDTH,), -7.0)
    out = run(STEP, News(3, {"c": value, "a": torch.zeros(WIDTH)}))
    expected = SOURCE + 1
    expected[ROWS["c"]] = value
    assert torch.equal(out, expected)
    assert (run.runner.layer.asked, run.runner.layer.hits, run.runner.layer.version) == (2, 1, 3)


def test_a_value_stays_with_its_request_over_steps_and_goes_when_it_is_over(watched):
    run = watched(layer_of("text"))
    first, again = {"c": (0, 6, 4)}, {"c": (0, 6, 7)}
    assert torch.equal(run(first, News(0, {"c": torch.zeros(WIDTH)})), SOURCE + 1)
    assert run(again, News(1)).eq(0).all(dim=1).tolist() == [False] * 5 + [True, False]
    assert torch.equal(run(again, News(1, finished=frozenset({"c"}))), SOURCE + 1)


def test_a_forward_that_no_step_spoke_of_is_not_answered(watched):
    run = watched(layer_of("text"))
    run(STEP, News(0, {"c": torch.zeros(WIDTH)}))
    assert torch.equal(run.runner.forward(SOURCE), SOURCE + 1)


def test_a_step_that_nothing_is_said_of_is_refused_but_for_warming_up(watched):
    run = watched(layer_of("text"))
    assert torch.equal(run(STEP, None), SOURCE + 1)
    run(STEP, News(0))
    with pytest.raises(RuntimeError, match="did not say what answers this step"):
        run(STEP, None)


def test_a_dummy_run_of_the_v2_runner_answers_nothing_and_is_told_nothing():
    layer = layer_of("text")
    runner = V2(layer)
    watch(runner, Steps(layer))
    runner.input_batch, runner.states = v2_of(STEP)
    runner.execute_model(scheduled(STEP, News(0, {"c": torch.zeros(WIDTH)})), SOURCE)
    out = runner.execute_model(scheduled(STEP, None), SOURCE.clone(), dummy_run=True)
    assert torch.equal(out, SOURCE + 1)


def test_a_step_that_fails_leaves_nothing_for_the_next():
    layer = layer_of("text")
    runner = V1(layer)
    watch(runner, Steps(layer))
    runner.input_batch, _ = v1_of(STEP)
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.execute_model(scheduled(STEP, News(0, {"c": torch.zeros(WIDTH)}), True), SOURCE)
    assert torch.equal(runner.forward(SOURCE), SOURCE + 1)


def entries(*slots: tuple[int, int, float]) -> Changed:
    """Slots with the row of `SOURCE` that is their key, and the number their value holds."""
    return Changed(
        max(slot for slot, _, _ in slots) + 1,
        torch.tensor([slot for slot, _, _ in slots]),
        torch.stack([SOURCE[row] for _, row, _ in slots]),
        torch.stack([torch.full((WIDTH,), value) for _, _, value in slots]),
        torch.full((len(slots),), 0.5),
    )


def test_activations_ask_the_entries_that_the_engine_core_sent(watched):
    run = watched(layer_of("last"))
    out = run(STEP, News(1, changed=entries((0, 5, -1.0), (1, 2, -2.0))))
    assert out.eq(-1).all(dim=1).nonzero().tolist() == [[ROWS["c"]]]
    assert not out.eq(-2).any(), "row 2 is inside a prompt and does not ask"
    run({"a": (9, 9, 1)}, News(2, changed=entries((0, 5, -4.0), (1, 3, -3.0))))
    out = run(STEP, News(3, changed=entries((1, 3, -3.0), (0, 5, -5.0))))
    assert out[ROWS["b"]].eq(-3).all()
    assert out[ROWS["c"]].eq(-5).all()
    assert run.runner.layer.hits == 3


def test_entries_beyond_the_room_grow_it_or_are_refused_where_graphs_read_it():
    many = entries(*((slot, slot, -1.0) for slot in range(6)))
    layer = layer_of("last", may_grow=True)
    layer.write(entries((0, 5, -9.0)))
    layer.write(many)
    layer.ask([5], [])
    hidden = SOURCE + 1
    layer.answer(hidden, SOURCE)
    assert hidden[5].eq(-1).all()
    with pytest.raises(RuntimeError, match="at most 4 entries for captured graphs, got 6"):
        layer_of("last").write(many)


def test_a_slot_that_went_out_of_use_answers_nothing_when_the_count_goes_up_again():
    layer = layer_of("last")
    layer.write(entries((0, 0, -1.0), (1, 5, -2.0)))
    layer.write(entries((0, 0, -1.0)))  # what is beyond the count is not sent
    layer.write(entries((2, 3, -3.0)))
    layer.ask([5, 3], [])
    hidden = SOURCE + 1
    layer.answer(hidden, SOURCE)
    assert torch.equal(hidden[5], SOURCE[5] + 1)
    assert hidden[3].eq(-3).all()


@pytest.mark.parametrize("query", ["text", "last"])
def test_a_captured_graph_writes_what_is_asked_and_nothing_where_nobody_asks(query, monkeypatch):
    """It runs on every row there is room for, as it cannot know how many ask."""
    layer = layer_of(query)
    if query == "last":
        layer.write(entries((0, 5, -1.0), (1, 0, -2.0)))
    monkeypatch.setattr(EditedLayer, "_rows_now", lambda self, hidden: len(self._first))
    for rows in ([], [5], [5, 3], [], [0, 5]):
        layer.ask(rows, [torch.full((WIDTH,), -1.0 - row) for row in rows if query == "text"])
        hidden = SOURCE + 1
        layer.answer(hidden, SOURCE)
        wanted = SOURCE + 1
        for row in rows:
            if query == "text":
                wanted[row] = -1.0 - row
            elif row in (0, 5):
                wanted[row] = {5: -1.0, 0: -2.0}[row]
        assert torch.equal(hidden, wanted), rows


def test_a_layer_of_another_width_stops_the_engine_at_its_first_forward():
    with pytest.raises(RuntimeError, match="must take and give 8 numbers a token"):
        layer_of("text").answer(torch.zeros(3, 9), torch.zeros(3, 9))


def test_a_runner_that_shows_no_rows_is_refused():
    with pytest.raises(NotServed, match="neither the V1 nor the V2"):
        watch(SimpleNamespace(execute_model=None), Steps(layer_of("text")))
