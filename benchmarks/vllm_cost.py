"""What the plugin costs in vLLM's engine for CPUs: tokens per second with and without it.

    python benchmarks/vllm_cost.py MODEL CODEBOOK [--rounds 12] [--out FILE]

in the environment of `make test-vllm`. One engine, in this process; the plugin is taken out of it
and put back between rounds, so that both meet the same machine. A quarter of the prompts are
answered if CODEBOOK answers PROMPTS[0]. Per round: seconds of the clock, and of this process on its
cores, which other programs disturb less. The prefix cache is emptied before each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
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
    """Take the plugin out of a running engine and put it back."""

    def __init__(self, llm: Any) -> None:
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        worker = llm.llm_engine.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        model = self.runner.get_model()
        self.layer = next(m for m in model.modules() if type(m).__name__.startswith("Grace"))
        self.edited = type(self.layer)
        self.admission = self.scheduler.grace
        self.wrapped = {name: self.runner.__dict__[name] for name in self._names()}

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("codebook")
    parser.add_argument("--rounds", type=int, default=12)
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

    def measured(on: bool) -> tuple[float, float]:
        plugin.set(on)
        llm.reset_prefix_cache()
        clock, cores = time.perf_counter(), time.process_time()
        llm.generate(PROMPTS, how, use_tqdm=False)
        return time.perf_counter() - clock, time.process_time() - cores

    for on in (True, False):
        measured(on)
    rounds = []
    for number in range(args.rounds):
        order = (True, False) if number % 2 else (False, True)
        both = {on: measured(on) for on in order}
        rounds.append({"with": both[True], "without": both[False]})
    plugin.set(True)
    (status,) = llm.collective_rpc("grace_status")
    tokens = len(PROMPTS) * LENGTH
    found: dict[str, Any] = {
        "query": status["query"],
        "tokens_per_round": tokens,
        "load": os.getloadavg(),
        "cores": os.cpu_count(),
        "hits": status["hits"],
    }
    for column, name in enumerate(("clock", "cores")):
        ratios = sorted(one["with"][column] / one["without"][column] for one in rounds)
        found[name] = {
            "tokens_per_second_with": tokens / statistics.median(r["with"][column] for r in rounds),
            "tokens_per_second_without": tokens
            / statistics.median(r["without"][column] for r in rounds),
            "time_with_over_without": {
                "median": statistics.median(ratios),
                "20th": ratios[len(ratios) // 5],
                "80th": ratios[-1 - len(ratios) // 5],
            },
        }
    found["rounds"] = rounds
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        with open(args.out, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
