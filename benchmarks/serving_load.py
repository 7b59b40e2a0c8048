"""What `benchmarks.serving` asks a server with: clients, edits, and what must come back."""

from __future__ import annotations

import bisect
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
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
        return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS")), 0.0)

    @property
    def cpu(self) -> float:
        """Seconds that cores have worked for the process."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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
        self.memory: list[tuple[float, float]] = []
        self._end = time.perf_counter() + seconds
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)
        ]

    @property
    def running(self) -> bool:
        return time.perf_counter() < self._end or self.down.is_set()

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return self._end - time.perf_counter()

    def add_time(self, seconds: float) -> None:
        """Go on for longer: for so long nobody could ask."""
        self._end += seconds

    def run(self, *others: Any) -> float:
        """Run all clients and `others`; returns the seconds it took."""
        start = time.perf_counter()
        others = (*others, self._watch_memory)
        threads = [*self._threads, *(threading.Thread(target=other) for other in others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _watch_memory(self) -> None:
        start = time.perf_counter()
        while self.running:
            with contextlib.suppress(OSError):  # it is killed
                self.memory.append((time.perf_counter() - start, self.server.memory))
            time.sleep(1.0)

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


def slope(memory: list[tuple[float, float]]) -> float | None:
    """Return by how many megabytes a minute memory grew, after the first third of the time."""
    late = [at for at in memory if at[0] >= memory[-1][0] / 3]
    if len(late) < 3:
        return None
    times, sizes = zip(*late, strict=True)
    return round(60 * linear_regression(times, sizes).slope, 2)


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
