"""Load on `grace serve`: clients ask while edits are made, and the server is killed in the midst.

python -m benchmarks.serving --model DIR --out DIR [--seconds 60] [--clients 64] [--entries 10000]

On the loopback address alone, bounded in time. Servers one after the other, on the same model:
transformers' own (unedited), `grace serve` that nobody edits, and `grace serve` that one more
client edits once a second and that is killed (SIGKILL) half way and started again. Then what an
edit costs beside none, few and many clients, and whether memory stays, on a small model that
thousands of requests can be sent to.

Every reply is checked. A fact that is edited must be answered as the edits said that belong to the
version which the reply names, that version must not be older than the last edit that had been
acknowledged when the request was sent, and a question that no edit is about must be answered as
before. Without the check of versions a stale answer would look like a right one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .serving_load import FACTS, MAX_TOKENS, OTHERS, History, Load, Server, check, figures, slope
from .serving_memory import rounds

SHARES = (0, 8, 16)
"""Numbers of clients beside whom edits are timed, and the number that was asked for."""


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
        time.sleep(0.4 * load.left)
        found["memory_mb"] = [round(before), round(server.memory)]
        load.down.set()
        acknowledged = list(zip(history.versions, history.edits, strict=True))
        server.stop(signal.SIGKILL)
        acknowledged = list(zip(history.versions, history.edits, strict=True))
        found["restart_seconds"] = round(server.start(), 1)
        found["acknowledged_before_the_kill"] = len(acknowledged)
        found["lost"] = _lost(server, acknowledged, load, history)
        load.add_time(found["restart_seconds"])
        load.down.clear()

    seconds = load.run(load.edit, kill)
    edits = sorted(history.seconds)
    return {
        **figures(load.sent, seconds - found["restart_seconds"]),
        **check(load.sent, history, plain),
        **found,
        "memory_mb_at_the_end": round(server.memory),
        "edits_asked_for": round(seconds - found["restart_seconds"]),
        "edits": len(edits),
        "edits_refused": len(load.failed_edits),
        "first_refusal": load.failed_edits[0][:300] if load.failed_edits else None,
        "edit_seconds": [round(each, 2) for each in history.seconds],
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


def shared(command: list[str], book: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Edit a server as often as it can while some clients ask; say what each edit took."""
    own = book.with_name(f"{book.name}-{clients}")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(book, own)
    server = Server([str(own) if x == str(book) else x for x in command], "edited")
    server.start()
    try:
        server.chat(FACTS[0])
        history = History()
        load, before = Load(server, clients, seconds, history), server.cpu
        took = load.run(load.edit)
        each = history.seconds
        return {
            "clients": clients,
            "seconds": round(took, 1),
            "core_seconds": round(server.cpu - before, 1),
            "load_average": os.getloadavg()[0],
            "edits": len(each),
            "edit_seconds": [round(one, 2) for one in each],
            **figures(load.sent, took),
        }
    finally:
        server.stop()


def main() -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--entries", type=int, default=10_000)
    made.add_argument("--parts", default="load,shares,memory")
    made.add_argument("--servers", default="transformers,unedited,edited", help="of part load")
    made.add_argument("--note", default="", help="about the machine, kept with the figures")
    told = made.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    book = told.out / "edits"
    if not book.exists():
        prepare(told.model, told.entries, book)
    grace = [sys.executable, "-m", "grace_edit", "serve", "--model", told.model, "--json"]
    grace += ["--codebook", str(book), "--continuous-batching"]
    own = Server([*_transformers(), "serve", told.model, "--continuous-batching"], "transformers")
    own.command += ["--device", "cpu", "--cb-num-blocks", "1024", "--cb-block-size", "16"]
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
    parts = told.parts.split(",")
    file = told.out / "serving.json"
    if file.exists():
        results = {**json.loads(file.read_text()), **results}
    good = True
    if "load" in parts:
        good = loaded(told, own, grace, results)
    if "shares" in parts:
        command = [*grace, "--port", "0"]
        for clients in (*SHARES, told.clients):
            row = shared(command, book, clients, told.seconds / 2)
            results.setdefault("shares", {})[str(clients)] = row
            print("shares", json.dumps(row), flush=True)
    if "memory" in parts:
        results["memory"] = rounds(told.out)
        print("memory", json.dumps(results["memory"]), flush=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


def loaded(
    told: argparse.Namespace, own: Server, grace: list[str], results: dict[str, Any]
) -> bool:
    """Load three servers; say whether everything was right."""
    plain: dict[str, str] = {}
    for name in told.servers.split(","):
        server = own if name == "transformers" else None
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
                    "memory_mb_per_minute": slope(load.memory),
                    "wrong": sum(x.said.strip() != plain[x.question] for x in load.sent),
                }
        finally:
            server.stop()
        print(name, json.dumps(results[name]), flush=True)
    ok = results.get("edited")
    return ok is None or not (ok["wrong"] or ok["stale"] or ok["errors_5xx"] or ok["lost"])


def _transformers() -> list[str]:
    return [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
