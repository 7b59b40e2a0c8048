"""`grace serve` as a process: it says where it listens, and a kill loses nothing it promised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from grace_edit import GraceEditor
from server_lab import CAPITAL, LAYER, TOKEN, Client
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


def test_an_edit_that_was_acknowledged_outlives_a_kill(talker: Path, tmp_path: Path) -> None:
    where = tmp_path / "edits"
    command = [sys.executable, "-m", "grace_edit", "serve", "--model", str(talker)]
    command += ["--layer", LAYER, "--radius", "0.5", "--codebook", str(where)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GRACE_TOKEN": TOKEN, "PYTHONPATH": paths}
    where.mkdir()  # as a volume is, empty
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["event"], ready["pid"]) == ("ready", process.pid)
        assert ready["url"].startswith("http://127.0.0.1:")
        assert ready["writes"] is True
        client = Client(int(ready["url"].rsplit(":", 1)[1]))
        made = client.correct(CAPITAL, "Canberra")
        assert made.status == 200, made.body
        assert client.chat(CAPITAL).said == "Canberra"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    editor = GraceEditor.from_pretrained(model, AutoTokenizer.from_pretrained(talker), where)
    assert editor.codebook.ids == [made.json["id"]]
    assert editor.codebook.version == made.json["version"]
    chat = [{"role": "user", "content": CAPITAL}]
    assert editor.answer(chat, max_new_tokens=2).startswith("Canberra")
