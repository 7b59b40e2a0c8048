"""In a worker: wrap the layer of the loaded model and tell it what each step asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer import EditedLayer, find_layer, wrap
from .news import News
from .options import NotServed, read
from .rows import Ends, ends_of_v1, ends_of_v2
from .saved import Described


class Steps:
    """Follow the steps of one worker's runner.

    Args:
        layer: what answers them.
    """

    def __init__(self, layer: EditedLayer) -> None:
        self.layer = layer
        self._values: dict[str, Tensor] = {}
        self._told = False
        self._real = False

    def begin(self, scheduled: Any, dummy: bool) -> None:
        """Take what the engine core says of a step, before the runner prepares it.

        Args:
            scheduled: the step's `SchedulerOutput`.
            dummy: nothing of it will be used. Neither is told, nor are the engine's own batches
                that warm it up before the first request.
        """
        news: News | None = getattr(scheduled, "grace", None)
        self._real = news is not None and not dummy
        if news is None:
            if self._told and not dummy:
                raise RuntimeError(
                    "the engine core did not say what answers this step, so it is not run"
                )
            return
        self._told = True
        self.layer.version = news.version
        if news.changed is not None:
            self.layer.write(news.changed)
        for id in news.finished:
            self._values.pop(id, None)
        self._values.update(news.values)

    def ask(self, ends: Ends) -> None:
        """Let the prompts that end in this step ask."""
        if not self._real:
            return
        values: list[Tensor] = []
        rows = [row for _, row in ends]
        if self.layer.query == "text":
            answered = [(row, self._values[id]) for id, row in ends if id in self._values]
            rows, values = [row for row, _ in answered], [value for _, value in answered]
        self.layer.count(len(ends), len(values))
        self.layer.ask(rows, values)

    def end(self) -> None:
        """Let nobody ask any more."""
        self.layer.ask([], [])


def attach(worker: Any) -> EditedLayer | None:
    """Wrap the layer of a worker's model, which was loaded, if edits are asked for.

    Args:
        worker: vLLM's `Worker` of this process.

    Returns:
        The layer, None where none is asked for.

    Raises:
        NotServed: there is no place for the edits in this model or runner.
    """
    config = worker.vllm_config
    options = read(config.additional_config)
    if options is None:
        return None
    saved = Described(options.codebook)
    width = config.model_config.get_hidden_size()
    saved.check_dtype(config.model_config.dtype, width)
    runner = worker.model_runner
    module = find_layer(runner.get_model(), saved.layer)
    layer = EditedLayer(
        saved.layer,
        query=saved.query,
        width=width,
        dtype=config.model_config.dtype,
        capacity=saved.book.capacity,
        requests=config.scheduler_config.max_num_seqs,
        device=worker.device,
        may_grow=config.model_config.enforce_eager,
    )
    watch(runner, Steps(layer))
    wrap(module, layer)
    return layer


def watch(runner: Any, steps: Steps) -> None:
    """Follow a runner of either kind, by wrappers on this object alone.

    Raises:
        NotServed: it is neither the V1 runner nor the V2 runner.
    """
    state = getattr(runner, "model_state", None)
    if state is not None and hasattr(state, "prepare_inputs"):
        prepare_v2 = state.prepare_inputs

        def prepare_state(input_batch: Any, states: Any) -> Any:
            steps.ask(ends_of_v2(input_batch, states))
            return prepare_v2(input_batch, states)

        state.prepare_inputs = prepare_state
    elif hasattr(runner, "_prepare_inputs") and hasattr(runner, "input_batch"):
        prepare_v1 = runner._prepare_inputs  # noqa: SLF001 (the one place that V1 offers)

        def prepare_inputs(scheduled: Any, *args: Any, **given: Any) -> Any:
            made = prepare_v1(scheduled, *args, **given)
            steps.ask(ends_of_v1(runner.input_batch, scheduled.num_scheduled_tokens))
            return made

        runner._prepare_inputs = prepare_inputs  # noqa: SLF001
    else:
        raise NotServed(
            f"{type(runner).__name__} shows neither the V1 nor the V2 runner's rows of a step"
        )
    execute = runner.execute_model

    def execute_model(scheduled: Any, *args: Any, **given: Any) -> Any:
        steps.begin(scheduled, bool(given.get("dummy_run")))
        try:
            return execute(scheduled, *args, **given)
        finally:
            steps.end()

    runner.execute_model = execute_model
