"""Load on `grace serve`: clients ask while edits are made, and the server is killed in the midst.

python -m benchmarks.serving --model DIR --out DIR [--seconds 60] [--clients 64] [--entries 10000]

On the loopback address alone, bounded in time. Three servers one after the other, on the same
model: transformers' own (unedited), `grace serve` that nobody edits, and `grace serve` that one
more client edits once a second and that is killed (SIGKILL) half way and started again.

Every reply is checked. A fact that is edited must be answered as the edits said that belong to the
version which the reply names, that version must not be older than the last edit that had been
acknowledged when the request was sent, and a question that no edit is about must be answered as
before. Without the check of versions a stale answer would look like a right one.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "bench"
FACTS = [f"What is the code word of project {n}?" for n in ("Heron", "Kestrel", "Lark", "Osprey")]
WORDS = ("Amber", "Basalt", "Cobalt", "Dahlia", "Ember", "Fjord", "Granite", "Hazel")
OTHERS = (
    "What is the capital of France?",
    "Name a fruit that is yellow.",
    "What is two plus three?",
    "Which animal says meow?",
    "Who wrote Hamlet?",
    "What colour is the sky?",
)
MAX_TOKENS = 8


@dataclass
class Sent:
    """One request: when it was sent and answered, what about, and what came back."""

    began: float
    seconds: float
    question: str
    status: int
    said: str
    version: int
    least: int
    tokens: int


@dataclass
class History:
    """The edits that were acknowledged, in order, each with the version that it made."""

    versions: list[int] = field(default_factory=list)
    edits: list[tuple[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, version: int, question: str, answer: str, seconds: float) -> None:
        with self.lock:
            self.versions.append(version)
            self.edits.append((question, answer))
            self.seconds.append(seconds)

    @property
    def last(self) -> int:
        with self.lock:
            return self.versions[-1] if self.versions else 0

    def answer(self, question: str, version: int) -> str | None:
        """Return what a question is answered with at a version; None: as without edits."""
        with self.lock:
            at = bisect.bisect_right(self.versions, version)
            for asked, answer in reversed(self.edits[:at]):
                if asked == question:
                    return answer
        return None


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], name: str) -> None:
        self.command, self.name = command, name
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> float:
        """Start it; returns the seconds until it answers."""
        start = time.perf_counter()
        environment = {**os.environ, "GRACE_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self.port == 0:
            assert self.process.stdout is not None
            self.port = int(json.loads(self.process.stdout.readline())["url"].rsplit(":", 1)[1])
        while time.perf_counter() - start < 300:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return time.perf_counter() - start
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        raise RuntimeError(f"{self.name} does not start")

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End the process."""
        assert self.process is not None
        self.process.send_signal(how)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def memory(self) -> float:
        """Megabytes of memory that are in use."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        """Send a request; returns status, headers and what the JSON says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
            connection.request(method, path, body and json.dumps(body), headers)
            reply = connection.getresponse()
            text = reply.read()
            named = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, named, json.loads(text) if text[:1] in b"{[" else text.decode()
        finally:
            connection.close()

    def chat(self, question: str) -> tuple[int, str, int, int]:
        """Return status, answer, version and tokens."""
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        if self.name == "transformers":
            body["model"] = self.command[self.command.index("serve") + 1]
        status, headers, told = self.ask("POST", "/v1/chat/completions", body)
        if status != 200:
            return status, str(told), -1, 0
        said = told["choices"][0]["message"].get("content", "")
        tokens = told["usage"]["completion_tokens"]
        return status, said, int(headers.get("x-grace-version", -1)), tokens


class Load:
    """Clients that ask a server until the time is over."""

    def __init__(self, server: Server, clients: int, seconds: float, history: History) -> None:
        self.server, self.history = server, history
        self.sent: list[Sent] = []
        self.failed_edits: list[str] = []
        self.down = threading.Event()
        self.refused = 0
        self._end = time.perf_counter() + seconds
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)
        ]

    @property
    def running(self) -> bool:
        return time.perf_counter() < self._end

    def run(self, *others: Any) -> float:
        """Run all clients and `others`; returns the seconds it took."""
        start = time.perf_counter()
        threads = [*self._threads, *(threading.Thread(target=other) for other in others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _client(self, number: int) -> None:
        chooses = random.Random(number)
        while self.running:
            question = chooses.choice(FACTS if chooses.random() < 0.5 else OTHERS)
            least, began = self.history.last, time.perf_counter()
            try:
                status, said, version, tokens = self.server.chat(question)
            except (OSError, http.client.HTTPException):
                # Only while it is killed may it not answer.
                with self._lock:
                    self.refused += 1
                if not self.down.is_set():
                    time.sleep(0.05)
                    if not self.down.is_set():
                        raise
                time.sleep(0.2)
                continue
            seconds = time.perf_counter() - began
            with self._lock:
                self.sent.append(
                    Sent(began, seconds, question, status, said, version, least, tokens)
                )

    def edit(self) -> None:
        """Make an edit each second, if the one before is done by then."""
        chooses = random.Random(7)
        while self.running:
            start = time.perf_counter()
            question, answer = chooses.choice(FACTS), chooses.choice(WORDS)
            body = {"prompt": [{"role": "user", "content": question}], "target": answer}
            try:
                status, _, told = self.server.ask("POST", "/v1/edits", body)
            except (OSError, http.client.HTTPException):
                # Whether the edit that the kill met counts is not known; nothing is asked of it.
                self.unknown = (question, answer)
                time.sleep(0.2)
                continue
            seconds = time.perf_counter() - start
            if status == 200:
                self.history.add(told["version"], question, answer, seconds)
            else:
                self.failed_edits.append(f"{status}: {told}")
            time.sleep(max(0.0, 1.0 - seconds))

    unknown: tuple[str, str] | None = None


def figures(sent: list[Sent], seconds: float) -> dict[str, float | int]:
    """Return counts, latencies in seconds and tokens per second of requests."""
    took = sorted(one.seconds for one in sent if one.status == 200)

    def share(part: float) -> float:
        return round(took[min(len(took) - 1, int(part * len(took)))], 3) if took else -1.0

    return {
        "requests": len(sent),
        "errors_5xx": sum(one.status >= 500 for one in sent),
        "p50": share(0.5),
        "p99": share(0.99),
        "tokens_per_second": round(sum(one.tokens for one in sent) / seconds, 1),
    }


def check(sent: list[Sent], history: History, plain: dict[str, str]) -> dict[str, int]:
    """Count replies that are wrong for their version, and those of too old a version."""
    wrong = stale = hits = 0
    for one in sent:
        if one.status != 200:
            continue
        answer = history.answer(one.question, one.version)
        hits += answer is not None
        wrong += one.said.strip() != (plain[one.question] if answer is None else answer)
        stale += one.version < one.least
    return {"wrong": wrong, "stale": stale, "answered_by_an_edit": hits}


def prepare(model_source: str, entries: int, out: Path) -> None:
    """Write a directory of edits of a model: `entries` of made-up sentences, to be searched."""
    import torch
    from grace_edit import GraceConfig, GraceEditor
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_source).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_source)
    # Trained behind no other sentences: an edit a second is to be made on few cores.
    config = GraceConfig(
        layer="model.layers.24.mlp", query="text", contexts=0, capacity=2 * entries
    )
    editor = GraceEditor(model, tokenizer, config)
    text = editor.adaptor.text
    assert text is not None
    source = random.Random(0)
    sounds = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]

    def name() -> str:
        return "".join(source.choice(sounds) for _ in range(4)).title()

    keys = torch.stack(
        [
            text.key(editor.family.encode(f"The {name().lower()} of {name()} lies in"))
            for _ in range(entries)
        ]
    )
    values = torch.randn(entries, editor.codebook.values.shape[1])
    tensors = {
        "keys": keys,
        "values": values,
        "radii": torch.full((entries,), editor.codebook.radius),
        "labels": torch.zeros(entries, 1, dtype=torch.int64),
    }
    like = out.with_name(out.name + "-like")
    editor.save_pretrained(like)
    file = out.with_suffix(".safetensors")
    save_file(tensors, file)
    command = [sys.executable, "-m", "grace_edit", "codebook", "import", str(file)]
    subprocess.run([*command, "--out", str(out), "--like", str(like)], check=True)


def edited(server: Server, load: Load, history: History, plain: dict[str, str]) -> dict[str, Any]:
    """Load a server that is edited, kill it in the midst, and check everything."""
    before = server.memory
    found: dict[str, Any] = {}

    def kill() -> None:
        time.sleep(0.4 * (load._end - time.perf_counter()))
        found["memory_mb"] = [round(before), round(server.memory)]
        load.down.set()
        acknowledged = list(zip(history.versions, history.edits, strict=True))
        server.stop(signal.SIGKILL)
        acknowledged = list(zip(history.versions, history.edits, strict=True))
        found["restart_seconds"] = round(server.start(), 1)
        found["acknowledged_before_the_kill"] = len(acknowledged)
        found["lost"] = _lost(server, acknowledged, load, history)
        load.down.clear()

    seconds = load.run(load.edit, kill)
    edits = sorted(history.seconds)
    return {
        **figures(load.sent, seconds - found["restart_seconds"]),
        **check(load.sent, history, plain),
        **found,
        "memory_mb_at_the_end": round(server.memory),
        "edits": len(edits),
        "edits_refused": len(load.failed_edits),
        "first_refusal": load.failed_edits[0][:300] if load.failed_edits else None,
        "edit_seconds_p50": round(edits[len(edits) // 2], 2) if edits else None,
        "not_answered_while_killed": load.refused,
    }


def _lost(server: Server, acknowledged: list[Any], load: Load, history: History) -> list[str]:
    """Return what was acknowledged and is not there; take note of what is there beyond that."""
    _, _, status = server.ask("GET", "/v1/status")
    live: dict[str, str] = {}
    after = -1
    while True:
        _, _, page = server.ask("GET", f"/v1/edits?limit=1000&after={after}")
        for edit in page["edits"]:
            live[edit["prompt"]] = edit["target"].strip()
            after = edit["id"]
        if not page["more"]:
            break
    lost = []
    if acknowledged and status["version"] < acknowledged[-1][0]:
        lost.append(f"version {status['version']} after {acknowledged[-1][0]}")
    last = dict(edit for _, edit in acknowledged)
    for question, answer in last.items():
        if live.get(question) == answer:
            continue
        if (question, live.get(question)) == load.unknown:
            history.add(status["version"], question, live[question], 0.0)
        else:
            lost.append(f"{question} {answer}, there is {live.get(question)}")
    return lost


def main() -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--entries", type=int, default=10_000)
    made.add_argument("--note", default="", help="about the machine, kept with the figures")
    told = made.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    book = told.out / "edits"
    if not book.exists():
        prepare(told.model, told.entries, book)
    grace = [sys.executable, "-m", "grace_edit", "serve", "--model", told.model, "--json"]
    grace += ["--codebook", str(book), "--continuous-batching"]
    own = Server([*_transformers(), "serve", told.model, "--continuous-batching"], "transformers")
    own.command += ["--device", "cpu", "--cb-num-blocks", "256", "--cb-block-size", "64"]
    own.command += ["--cb-max-batch-tokens", "512"]
    results: dict[str, Any] = {
        "clients": told.clients,
        "seconds": told.seconds,
        "entries": told.entries,
        "max_tokens": MAX_TOKENS,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "note": told.note,
    }
    plain: dict[str, str] = {}
    for name, server in (("transformers", own), ("unedited", None), ("edited", None)):
        if server is None:
            server = Server([*grace, "--port", "0"], name)
        else:
            server.port = _free_port()
            server.command += ["--host", "127.0.0.1", "--port", str(server.port)]
        server.start()
        try:
            if name == "edited":
                server.command[-1] = str(server.port)  # it comes back where it was
            answers = {q: server.chat(q)[1].strip() for q in (*FACTS, *OTHERS)}
            plain = plain or answers
            history = History()
            load = Load(server, told.clients, told.seconds, history)
            if name == "edited":
                results[name] = edited(server, load, history, plain)
            else:
                seconds = load.run()
                results[name] = {
                    **figures(load.sent, seconds),
                    "wrong": sum(x.said.strip() != plain[x.question] for x in load.sent),
                }
        finally:
            server.stop()
        print(name, json.dumps(results[name]), flush=True)
    (told.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    ok = results["edited"]
    good = not (ok["wrong"] or ok["stale"] or ok["errors_5xx"] or ok["lost"])
    return 0 if good else 1


def _transformers() -> list[str]:
    return [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
