"""Edits in engines of vLLM in processes of their own: compiled, with LoRA, and served."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import (
    AUSTRALIA,
    AUTHOR,
    BLOCK,
    EDITS,
    LAYER,
    OTHERS,
    STORY,
    Reference,
    answers_of,
    three_layers,
)
from grace_edit import GraceConfig, GraceEditor, publish
from grace_edit.codebook import store
from safetensors.torch import save_file

# A compiled engine: three layers of the same model, in a process of its own.

COMPILED = """
import json, os, sys
os.environ["VLLM_CACHE_ROOT"] = sys.argv[4]
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1], dtype="float32", max_model_len=256, max_num_seqs=8,
        additional_config={"grace": {"codebook": sys.argv[2]}},
    )
    assert str(llm.llm_engine.vllm_config.compilation_config.mode) != "0"
    how = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    out = llm.generate(json.loads(sys.argv[3]), how, use_tqdm=False)
    found = [list(one.outputs[0].token_ids) for one in out]
    print("FOUND", json.dumps([found, llm.collective_rpc("grace_status")[0]["hits"]]), flush=True)

    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    input()  # somebody has published a change
    before = [vars(compilation_counter.clone()), counters["stats"]["unique_graphs"]]
    assert before[1]
    out = llm.generate(json.loads(sys.argv[3]), how, use_tqdm=False)
    assert before == [vars(compilation_counter), counters["stats"]["unique_graphs"]]
    print("AGAIN", json.dumps([list(one.outputs[0].token_ids) for one in out]))
"""


@pytest.mark.parametrize("query", ["text", "last"])
def test_a_compiled_engine_answers_as_an_eager_model_and_follows_without_compiling(
    place, tmp_path, query
):
    editor, made = three_layers(place, tmp_path, query)
    prompts = [AUSTRALIA, "So it was said that " + OTHERS[2], OTHERS[3]]

    edited = answers_of(editor, prompts)
    with editor.disable():
        assert answers_of(editor, prompts)[0] != edited[0]
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    where = [str(tmp_path / name) for name in ("model", "edits")]
    command = [sys.executable, str(script), *where, json.dumps(prompts), str(tmp_path / "cache")]
    with (
        publish(editor, tmp_path / "edits") as publisher,
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        publisher.fold()
        too_long = threading.Timer(500, process.kill)
        too_long.start()
        try:
            said = ""
            while not said.startswith("FOUND "):
                said = process.stdout.readline()
                assert said, (tmp_path / "log").read_text()[-3000:]
            found, hits = json.loads(said.removeprefix("FOUND "))
            assert found == edited
            assert hits >= 1
            editor.codebook.insert(**{**made, "label": [2], "value": -made["value"]})
            again = answers_of(editor, prompts)
            assert again[0] != edited[0]
            rest, _ = process.communicate("\n")
        finally:
            too_long.cancel()
            process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads(rest.partition("AGAIN ")[2]) == again


# LoRA beside edits: the same three layers, in a process of its own.

ADAPTED = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1], dtype="float32", max_model_len=256, max_num_seqs=8, block_size=32,
        enforce_eager=True, enable_lora=True, max_lora_rank=8,
        additional_config={"grace": {"codebook": sys.argv[2]}},
    )
    how = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = json.loads(sys.argv[3])
    for lora in [None, LoRARequest("one", 1, sys.argv[4])] * 2:
        out = llm.generate(prompts, how, lora_request=lora, use_tqdm=False)
        cached = [one.num_cached_tokens for one in out]
        print("FOUND", json.dumps([[list(one.outputs[0].token_ids) for one in out], cached]))
"""


def write_adapter(model: Any, at: Path) -> None:
    """Write a LoRA of the first block's attention and MLP, and add it to the model's weights."""
    draw = torch.Generator().manual_seed(1)
    names, tensors = ["q_proj", "v_proj", "o_proj", "down_proj"], {}
    for name, module in list(model.named_modules()):
        if name.startswith("model.layers.0.") and name.rpartition(".")[2] in names:
            a = torch.randn(8, module.in_features, generator=draw) * 0.2
            b = torch.randn(module.out_features, 8, generator=draw) * 0.2
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += 2 * (b @ a)
    at.mkdir()
    save_file(tensors, at / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "bias": "none",
    }
    (at / "adapter_config.json").write_text(json.dumps({**about, "target_modules": names}))


def test_a_request_with_an_adapter_is_answered_as_its_model_would_be_and_shares_nothing_with_others(
    place, tmp_path
):
    from transformers import AutoModelForCausalLM

    editor, made = three_layers(place, tmp_path, "text")
    prompts = [AUSTRALIA, STORY * 2 + AUSTRALIA, *OTHERS[2:4], STORY * 2 + OTHERS[3]]
    plain = answers_of(editor, prompts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    write_adapter(model, tmp_path / "adapter")
    config = GraceConfig(layer="model.layers.1.mlp", query="text")
    adapted = GraceEditor(model, editor.tokenizer, config)
    without = answers_of(adapted, prompts)
    adapted.codebook.insert(**made)
    both = answers_of(adapted, prompts)
    assert [a == b for a, b in zip(both, without, strict=True)] == [False, False, True, True, True]
    assert both[2:] != plain[2:], "the adapter matters"
    script = tmp_path / "adapted.py"
    script.write_text(ADAPTED)
    where = [str(tmp_path / name) for name in ("model", "edits")]
    command = [sys.executable, str(script), *where, json.dumps(prompts), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    rounds = [json.loads(line.removeprefix("FOUND ")) for line in found]
    assert [answers for answers, _ in rounds] == [plain, both] * 2
    for _, cached in rounds[2:]:
        assert [tokens >= BLOCK for tokens in cached] == [False, True, False, False, True]


# A server, by activations.


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def serve(place: str, log: Path, port: int, **environment: str) -> subprocess.Popen[bytes]:
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    # What `vllm serve` runs; that command itself misses its version in the package for CPUs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", place]
    given = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
    where = [
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--block-size",
        str(BLOCK),
    ]
    with open(log, "wb") as out:
        return subprocess.Popen(
            command + given + where, env={**os.environ, **own}, stdout=out, stderr=out
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Served(Reference):
    """Edits by activations, and a server that has their directory from the environment."""

    port = 0

    def ask(self, prompt: str, length: int) -> list[int]:
        body = {"prompt": prompt, "max_tokens": length, "temperature": 0}
        more = {"ignore_eos": True, "return_token_ids": True}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps({**body, **more}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=120) as reply:
            return json.load(reply)["choices"][0]["token_ids"]


@pytest.fixture(scope="session")
def server(place: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("last")
    made = Served(place, folder / "edits", "last", EDITS[:1])
    made.port = free_port()
    process = serve(place, folder / "log", made.port, GRACE_CODEBOOK=str(made.at))
    try:
        until = time.monotonic() + 400
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{made.port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield made
    finally:
        stop(process)


def test_a_server_answers_by_activations_and_takes_new_edits_while_it_runs(server):
    prompts = [AUSTRALIA, AUTHOR, *OTHERS[1:3]]
    assert [server.ask(p, 6) for p in prompts] == [server.answer(p, 6) for p in prompts]
    plain = server.ask(AUTHOR, 6)
    assert server.editor.edit(*EDITS[1]).success
    server.save()
    assert server.ask(AUTHOR, 6) == server.answer(AUTHOR, 6) != plain
    server.editor.delete(1)
    server.save()
    assert server.ask(AUTHOR, 6) == plain


def test_a_server_follows_what_is_published_by_another_process(server):
    """Keys, values and radii travel to the worker as they change; nothing is saved as a whole."""
    prompts = [AUSTRALIA, *OTHERS[2:4]]
    plain = [server.ask(prompt, 6) for prompt in prompts]
    with publish(server.editor, server.at) as publisher:
        publisher.fold()
        added = [server.editor.edit(OTHERS[2], " Lyon"), server.editor.edit(OTHERS[3], " nine")]
        assert all(one.success for one in added)
        both = [server.answer(prompt, 6) for prompt in prompts]
        assert [server.ask(prompt, 6) for prompt in prompts] == both
        assert [a == b for a, b in zip(plain, both, strict=True)] == [True, False, False]
        server.editor.delete(added[0].id)
        assert [server.ask(prompt, 6) for prompt in prompts] == [*plain[:2], both[2]]
        server.editor.undo()
        assert [server.ask(prompt, 6) for prompt in prompts] == both
        for _ in added:
            server.editor.undo()
        assert [server.ask(prompt, 6) for prompt in prompts] == plain


def test_a_server_with_a_warm_cache_asks_at_the_end_of_each_prompt_anew(server):
    prompt = STORY * 3 + AUSTRALIA
    ids = server.tokenizer(prompt).input_ids
    # Activations behind a story are others: it takes an edit of its own.
    plain = server.ask(prompt, 6)
    assert server.editor.edit(prompt, " Melbourne").success
    server.save()
    assert len(ids) > 3 * BLOCK
    said = server.ask(prompt, BLOCK + 1)
    assert said[:6] == server.answer(prompt, 6) != plain
    on = prompt + server.tokenizer.decode(said[:BLOCK]) + " And the capital of France is"
    assert server.ask(on, 6) == server.answer(on, 6)


def test_a_server_does_not_start_where_the_edits_have_no_place(place, tmp_path, text):
    book, described, beside = store.load_all(text.at)
    described["serving"]["layer"] = LAYER + ".down_proj"
    store.save(book, tmp_path / "edits", described, beside)
    process = serve(place, tmp_path / "log", free_port(), GRACE_CODEBOOK=str(tmp_path / "edits"))
    try:
        assert process.wait(300) != 0
    finally:
        stop(process)
    assert f"{LAYER}.down_proj cannot be edited in vLLM" in (tmp_path / "log").read_text()
