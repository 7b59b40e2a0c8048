"""What a request pays under `query="text"` with token keys: reading, keys and lookup together.

    python -m benchmarks.text_requests MODEL [--beside CHECKOUT] [--entries 100000] [--out FILE]

MODEL is a directory as transformers loads it, of a family whose text map comes with the package.
A codebook of many entries is asked one request at a time, as a server does. Another checkout of the
project answers the same requests in a process of its own, in turn with this one, so that both meet
the same machine; keys and answers of both must be the same to the bit. Names are made up.

Kinds of requests; none was asked before:

    met        each of its words stood in another prompt
    subject    but its subject, of two words, is new
    new        20 words, of which none was met
    spans      two spans, as behind an abbreviation, words met
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("met", "subject", "new", "spans")
FORMS = (
    "The {} that {} was given is",
    "{1}'s {0} is called",
    "Who is the {} of {}?",
    "The {} of {} was in",
    "Where does {1} keep the {0}?",
    "{1} has a {0} by the name of",
    "In which year did {1} get a {0}?",
)
THINGS = ("teacher", "house", "song", "river", "bridge", "school", "garden", "prize", "king")


class Names:
    """Words that no language has, the same for the same seed."""

    def __init__(self, seed: str) -> None:
        self._source = random.Random(seed)

    def word(self) -> str:
        letters = self._source.choices("bdfgklmnprstvz", k=3) + self._source.choices("aeiou", k=3)
        return "".join(a + b for a, b in zip(letters[:3], letters[3:], strict=True)).capitalize()

    def prompt(self, subject: str) -> str:
        form, thing = self._source.choice(FORMS), self._source.choice(THINGS)
        return form.format(thing, subject)

    def pick(self, words: list[str]) -> str:
        return " ".join(self._source.choices(words, k=2))


def _prompts(count: int, words: list[str]) -> list[str]:
    """Return prompts of subjects of two words, no two of the same words: their keys differ."""
    names = Names("entries")
    found: dict[tuple[str, ...], str] = {}
    while len(found) < count:
        prompt = names.prompt(names.pick(words))
        found.setdefault(tuple(sorted(prompt.replace("?", " ?").split())), prompt)
    return list(found.values())


def _requests(kind: str, number: int, count: int, words: list[str]) -> list[str]:
    names = Names(f"{kind} {number}")
    made = []
    for _ in range(count):
        new = [names.word() + "n" for _ in range(20)]
        subject = " ".join(new[:2]) if kind == "subject" else names.pick(words)
        prompt = names.prompt(subject)
        if kind == "new":
            prompt = " ".join(new)
        elif kind == "spans":
            prompt = f"It was said of St. {prompt}"
        made.append(prompt)
    return made


def work(model: str, entries: int, threads: int, keys_at: str) -> None:
    """Answer requests that are told on the standard input; what a process of a checkout does."""
    import torch
    from grace_edit.adaptor.text_queries import TextQueries
    from grace_edit.codebook.codebook import Codebook
    from grace_edit.keys.choice import text_keys
    from grace_edit.keys.prompts import PromptReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weight = loaded.get_input_embeddings().weight
    weight.data = weight.data.clone()  # in memory, as a server's is, not in a file
    made = text_keys(loaded, tokenizer)
    names = Names("words")
    words = [names.word() for _ in range(5000)]
    prompts = _prompts(entries, words)
    if Path(keys_at).exists():
        keys = torch.load(keys_at)
        asked = range(0, entries, max(1, entries // 2000))
        same = torch.stack([made.keys(prompts[i])[0] for i in asked])
        assert torch.equal(same, keys[list(asked)]), "keys of two checkouts must be equal"
    else:
        keys = torch.stack([made.keys(prompt)[0] for prompt in prompts])
        torch.save(keys, keys_at)
    for word in words:
        made.keys(word)
    book = Codebook.from_tensors(
        keys,
        torch.zeros(entries, loaded.config.hidden_size),
        torch.ones(entries),
        [(i,) for i in range(entries)],
        policy="nearest",
    )
    asking = TextQueries(made, PromptReader(tokenizer))
    gc.freeze()
    gc.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number, count = json.loads(line)
        seconds, answers = [], hashlib.sha256()
        for prompt in _requests(kind, number, count, words):
            ids = tokenizer(prompt)["input_ids"]
            cores, start = time.process_time(), time.perf_counter()
            answer = asking.answer(book, [ids])
            stop = time.perf_counter()
            seconds.append((stop - start, time.process_time() - cores))
            answers.update(asking.rows(ids).numpy().tobytes())
            answers.update(answer.index.numpy().tobytes())
        print(json.dumps([seconds, answers.hexdigest()]), flush=True)


class Checkout:
    """A process of one checkout that answers requests."""

    def __init__(self, root: Path, threads: int, arguments: list[str]) -> None:
        path = os.pathsep.join([str(root), str(root / "python")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), *arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a checkout's process ended before its answer")
        return line

    def asked(self, *request: object) -> tuple[list[list[float]], str]:
        """Return seconds of the clock and of the cores per request, and a hash of the answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        seconds, answers = json.loads(self._line())
        return seconds, answers

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _rounds(checkouts: list[Checkout], rounds: int, count: int) -> Iterator[tuple[str, list[Any]]]:
    for number in range(rounds):
        for kind in KINDS:
            order = checkouts if number % 2 else checkouts[::-1]
            found = {id(one): one.asked(kind, number, count) for one in order}
            assert len({answers for _, answers in found.values()}) == 1, "answers must be equal"
            yield kind, [found[id(one)][0] for one in checkouts]


def _summary(times: list[list[list[list[float]]]]) -> dict[str, Any]:
    """Summarise `[rounds][checkouts][requests][2]`: medians, and the ratios of rounds in turn."""
    from benchmarks.timing import Times

    found: dict[str, Any] = {}
    for column, name in enumerate(("clock", "cores")):
        each = [
            [[request[column] for request in one[i]] for one in times] for i in range(len(times[0]))
        ]
        for who, rounds in zip(("this, ms", "beside, ms"), each, strict=False):
            flat = sorted(t for one in rounds for t in one)
            # What other work on the machine adds is least in the least of them.
            found[f"{name}, {who}"] = {
                "least twentieth": 1e3 * flat[len(flat) // 20],
                **Times.of(flat).columns(),
            }
        if len(each) > 1:
            ratios = [Times.of(a).median / Times.of(b).median for a, b in zip(*each, strict=True)]
            found[f"{name}, ratio of a round"] = Times.of(ratios).columns("s")
    return {
        name: {what: round(value, 4) for what, value in columns.items() if what != "unit"}
        for name, columns in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=40, help="requests of a kind in a round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        return work(args.model, args.entries, args.threads, args.work)
    roots = [Path(__file__).resolve().parents[1], *([args.beside] if args.beside else [])]
    with tempfile.TemporaryDirectory() as folder:
        told = [args.model, "--entries", str(args.entries), "--work", f"{folder}/keys.pt"]
        told += ["--threads", str(args.threads)]
        checkouts = [Checkout(root.resolve(), args.threads, told) for root in roots]
        try:
            times: dict[str, list[list[list[float]]]] = {kind: [] for kind in KINDS}
            load = os.getloadavg()
            for kind, found in _rounds(checkouts, args.rounds + 1, args.count):
                times[kind].append(found)
        finally:
            for one in checkouts:
                one.close()
    result = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "entries": args.entries,
        "requests of a kind": args.rounds * args.count,
        "load before": load,
        "kinds": {kind: _summary(found[1:]) for kind, found in times.items()},  # the first: warm-up
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
