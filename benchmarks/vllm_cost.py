"""What the plugin costs in vLLM's engine for CPUs: tokens per second with and without it.

    python benchmarks/vllm_cost.py MODEL CODEBOOK [--rounds 40] [--out FILE]

in the environment of `make test-vllm`. One engine, in this process; the plugin is taken out of it
and put back between rounds, so that both meet the same machine. A quarter of the prompts are
answered if CODEBOOK answers PROMPTS[0]. The prefix cache is emptied before each round. Two figures:

* rounds: seconds of this process on its cores with the plugin over those of the round beside it
  without, the median of all pairs and an interval that holds the true one 19 times of 20;
* own code: what the plugin's functions take of the engine's thread while they are in, on its core.
  Other programs move that hardly at all. Not in it: how the operator is found (some microseconds a
  step), and what the caches of the processor lose.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import defaultdict
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

PROMPTS = [
    "The capital of Australia is",
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was",
] * 2
LENGTH = 24


class Plugin:
    """Take the plugin out of a running engine and put it back; time what it does."""

    def __init__(self, llm: Any) -> None:
        from grace_edit.engines.vllm import layer as layers

        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        worker = llm.llm_engine.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        model = self.runner.get_model()
        self.layer = next(m for m in model.modules() if type(m).__name__.startswith("Grace"))
        self.edited = type(self.layer)
        self.admission = self.scheduler.grace
        self.seconds: dict[str, float] = defaultdict(float)
        steps = self.runner.execute_model.__closure__
        (self.steps,) = (c.cell_contents for c in steps if hasattr(c.cell_contents, "begin"))
        self._time(self.admission, "admit", "news")
        self._time(self.steps, "begin", "ask", "end")
        self._time(layers._LAYERS[self.steps.layer.name], "answer")
        self.wrapped = {name: self.runner.__dict__[name] for name in self._names()}

    def _time(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **given: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **given)
            finally:
                self.seconds[name] += time.thread_time() - start

        return timed

    def _names(self) -> list[str]:
        return ["execute_model", "_prepare_inputs"]

    def set(self, on: bool) -> None:
        if on:
            self.layer.__class__ = self.edited
            self.runner.__dict__.update(self.wrapped)
            self.scheduler.grace = self.admission
            return
        self.layer.__class__ = self.edited.__mro__[2]
        for name in self._names():
            self.runner.__dict__.pop(name, None)
        self.scheduler.grace = None


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the order statistics between which the median lies with a probability of 95 %."""
    n, below, left = len(ratios), 0, 0.0
    while (left := left + math.comb(n, below) / 2**n) <= 0.025:
        below += 1
    ordered = sorted(ratios)
    return ordered[max(below - 1, 0)], ordered[min(n - below, n - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("codebook")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out")
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        additional_config={"grace": {"codebook": args.codebook}},
    )
    how = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    plugin = Plugin(llm)
    text = plugin.admission._edits.text

    def measured(on: bool) -> tuple[float, float]:
        plugin.set(on)
        llm.reset_prefix_cache()
        if text is not None:
            text._rows.clear()  # each request makes its key
        cores, thread = time.process_time(), time.thread_time()
        llm.generate(PROMPTS, how, use_tqdm=False)
        return time.process_time() - cores, time.thread_time() - thread

    for on in (True, False):
        measured(on)
    plugin.seconds.clear()
    rounds = []
    for number in range(args.rounds):
        order = (True, False) if number % 2 else (False, True)
        both = {on: measured(on) for on in order}
        rounds.append({"with": both[True], "without": both[False]})
    plugin.set(True)
    (status,) = llm.collective_rpc("grace_status")
    ratios = [one["with"][0] / one["without"][0] for one in rounds]
    thread = sum(one["with"][1] for one in rounds)
    found: dict[str, Any] = {
        "query": status["query"],
        "entries": plugin.admission._edits.book.entries,
        "tokens_per_round": len(PROMPTS) * LENGTH,
        "prompts_per_round": len(PROMPTS),
        "rounds": len(rounds),
        "load": os.getloadavg(),
        "cores": os.cpu_count(),
        "hits": status["hits"],
        "time_with_over_without": {
            "median": statistics.median(ratios),
            "95 %": interval(ratios),
        },
        "own_code_of_the_engines_thread": {
            "share": sum(plugin.seconds.values()) / thread,
            "us_per_round": {name: 1e6 * t / len(rounds) for name, t in plugin.seconds.items()},
            "ms_of_the_thread_per_round": 1e3 * thread / len(rounds),
        },
        "seconds_on_cores": {
            on: [round(one[on][0], 4) for one in rounds] for on in ("with", "without")
        },
    }
    written = json.dumps(found, indent=1)
    print(written)
    if args.out:
        with open(args.out, "w") as file:
            file.write(written + "\n")


if __name__ == "__main__":
    main()
