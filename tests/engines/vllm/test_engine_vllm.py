"""Edits inside vLLM's CPU engine give the tokens that transformers gives (`make test-vllm`).

One engine, in this process, answers by text; a server, in processes of its own, by activations.
The model is the packaged SmolLM2; SMOLLM2 may name a directory that holds it as transformers saves.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
)

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, publish
from grace_edit.codebook import snapshot, store
from grace_edit.engines.vllm import admission, register
from grace_edit.engines.vllm.options import NotServed

LAYER = "model.layers.24.mlp"
AUSTRALIA, AUTHOR = "The capital of Australia is", "The author of Pride and Prejudice is"
EDITS = [(AUSTRALIA, " Melbourne"), (AUTHOR, " Charles Dickens")]
OTHERS = [
    "Australia's capital city is called",
    "The capital of Austria is",
    "The capital of France is",
    "Water boils at a temperature of",
    "Hello",
]
STORY = (
    "It had rained all night, and in the morning the road to the village was a river of mud. The "
    "two brothers who kept the mill looked at it from their door and said nothing for a while. "
)
BLOCK = 32


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of SmolLM2 as transformers saves it."""
    if "SMOLLM2" in os.environ:
        return os.environ["SMOLLM2"]
    from grace_edit.demo.smollm2 import load_smollm2

    where = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_smollm2()
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


class Reference:
    """The same edits in transformers, on a model of their own."""

    def __init__(self, place: str, at: Path, query: str, edits: list[tuple[str, str]]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.editor = GraceEditor(model, self.tokenizer, GraceConfig(layer=LAYER, query=query))
        self.at = at
        for prompt, target in edits:
            assert self.editor.edit(prompt, target).success
        self.save()

    def save(self) -> None:
        self.editor.save_pretrained(self.at)

    def answer(self, prompt: str, length: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")
        out = self.editor.model.generate(
            **ids, max_new_tokens=length, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        return out[0, ids.input_ids.shape[1] :].tolist()

    def log_probability(self, ids: list[int]) -> float:
        """Return that of the most probable token behind a prompt."""
        out = self.editor.model(torch.tensor([ids])).logits[0, -1]
        return float(out.log_softmax(0).max())


@pytest.fixture(scope="session")
def text(place: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(place, tmp_path_factory.mktemp("text"), "text", EDITS)


@pytest.fixture(scope="session")
def llm(place: str, text: Reference) -> Any:
    """An engine that cuts prompts into chunks of 64 tokens."""
    from vllm import LLM

    return LLM(
        model=place,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=True,
        block_size=BLOCK,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        seed=0,
        additional_config={"grace": {"codebook": str(text.at)}},
    )


@pytest.fixture
def ask(llm: Any) -> Callable[..., list[Any]]:
    """Return a function that generates greedily, all prompts at once."""
    from vllm import SamplingParams

    def asked(prompts: list[Any], length: int = 6, **more: Any) -> list[Any]:
        how = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **more)
        made = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        return llm.generate(made, how, use_tqdm=False)

    return asked


@pytest.fixture
def restored(text: Reference) -> Iterator[Reference]:
    """The reference, for a test that changes its edits."""
    journal = text.editor.codebook.storage.journal
    before = journal.steps
    yield text
    while journal.steps > before:
        text.editor.undo()
    text.save()


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in outputs]


def test_edits_other_wordings_and_neighbours_answer_as_in_transformers(ask, text, llm):
    prompts = [prompt for prompt, _ in EDITS] + OTHERS
    (before,) = llm.collective_rpc("grace_status")
    assert tokens(ask(prompts)) == [text.answer(prompt, 6) for prompt in prompts]
    (after,) = llm.collective_rpc("grace_status")
    assert after["layer"] == LAYER
    assert after["version"] == text.editor.codebook.version
    assert after["asked"] - before["asked"] == len(prompts)
    hits = sum(text.editor.explain(prompt).hit for prompt in prompts)
    assert after["hits"] - before["hits"] == hits >= 3


def test_thirty_two_requests_of_mixed_lengths_at_once_and_in_chunks(ask, text):
    prompts = []
    for i in range(32):
        question = [AUSTRALIA, AUTHOR, *OTHERS][i % 7]
        prompts.append(STORY * (i % 5) + "So it was. " * (i % 3) + question)
    sizes = {len(text.tokenizer(prompt).input_ids) for prompt in prompts}
    assert min(sizes) < 10
    assert max(sizes) > 160
    assert tokens(ask(prompts)) == [text.answer(prompt, 6) for prompt in prompts]


def test_a_warm_cache_serves_no_answer_from_before_an_edit_or_after_it(ask, restored):
    text = restored
    prompt = "Chapter one. " + STORY * 6 + "The capital of Peru is"
    size = len(text.tokenizer(prompt).input_ids)
    assert size > 250
    cold, plain = ask([prompt])[0], text.answer(prompt, 6)
    warm = ask([prompt])[0]
    assert tokens([cold, warm]) == [plain, plain]
    shared = (size - 1) // BLOCK * BLOCK
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, shared)

    id = text.editor.edit("The capital of Peru is", " Cusco").id
    text.save()
    edited = ask([prompt])[0]
    assert tokens([edited]) == [text.answer(prompt, 6)] != [plain]
    assert edited.num_cached_tokens == shared, "an edit invalidates nothing"

    text.editor.delete(id)
    text.save()
    back = ask([prompt])[0]
    assert tokens([back]) == [plain]
    assert back.num_cached_tokens == shared


def test_a_prompt_that_goes_on_behind_an_answered_one_does_not_inherit_its_answer(ask, text):
    """The block in which the answered prompt ended was filled with what was generated."""
    first = text.tokenizer("Once upon a time. " + STORY * 2 + AUSTRALIA).input_ids
    begins = (len(first) - 1) // BLOCK * BLOCK
    said = tokens(ask([first], BLOCK + 1))[0]
    assert said[:6] == text.answer(text.tokenizer.decode(first), 6)
    # Melbourne was put there by the edit; a prompt that quotes it ends elsewhere.
    longer = first + said[:BLOCK] + text.tokenizer(" The city is").input_ids
    assert len(longer) > begins + BLOCK
    for _ in range(2):
        got = ask([longer], 1, logprobs=1)[0]
        mine = max(one.logprob for one in got.outputs[0].logprobs[0].values())
        assert mine == pytest.approx(text.log_probability(longer), abs=1e-4)


def test_blocks_of_an_answered_prompt_are_not_found_by_one_that_goes_on_behind_it(ask, text):
    first = text.tokenizer("Long ago. " + STORY * 2 + AUSTRALIA).input_ids
    begins = (len(first) - 1) // BLOCK * BLOCK
    said = tokens(ask([first], BLOCK + 1))[0]
    assert ask([first + said], 1)[0].num_cached_tokens == begins
    missed = text.tokenizer("Long ago, " + STORY * 2 + OTHERS[2]).input_ids
    said = tokens(ask([missed], BLOCK + 1))[0]
    whole = (len(missed) + len(said) - 1) // BLOCK * BLOCK
    assert ask([missed + said], 1)[0].num_cached_tokens == whole, "a miss shares all of its own"


def test_a_request_that_was_preempted_gives_the_answer_it_was_admitted_with(llm, restored):
    from vllm import SamplingParams

    text = restored
    engine = llm.llm_engine
    prompt = STORY * 2 + AUSTRALIA
    wanted = text.answer(prompt, 8)
    how = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request("preempted", prompt, how)
    (before,) = llm.collective_rpc("grace_status")
    for _ in range(6):
        engine.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    text.editor.delete(0)
    text.save()
    done: list[Any] = []
    while engine.has_unfinished_requests():
        done += [one for one in engine.step() if one.finished]
    assert tokens(done) == [wanted]
    (after,) = llm.collective_rpc("grace_status")
    assert after["hits"] - before["hits"] == 2, "its prompt was computed twice"


def test_no_answer_is_stale_while_edits_and_requests_alternate(llm, restored):
    """Requests run while edits are deleted and come back; each has the answer of its admission."""
    from vllm import SamplingParams

    text, engine = restored, llm.llm_engine
    how = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [AUSTRALIA, AUTHOR, STORY * 2 + AUSTRALIA, OTHERS[2]]
    edited = [text.answer(prompt, 3) for prompt in prompts]
    text.editor.delete(0)
    without = [text.answer(prompt, 3) for prompt in prompts]
    assert [a == b for a, b in zip(edited, without, strict=True)] == [False, True, False, True]
    text.save()
    there, random_ = False, random.Random(0)
    wanted: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}

    def step() -> None:
        for one in engine.step():
            if one.finished:
                got[one.request_id] = list(one.outputs[0].token_ids)

    for number in range(240):
        if random_.random() < 0.4:
            text.editor.undo() if not there else text.editor.delete(0)
            text.save()
            there = not there
        which = random_.randrange(len(prompts))
        wanted[str(number)] = (edited if there else without)[which]
        engine.add_request(str(number), prompts[which], how)
        for _ in range(random_.randrange(3)):
            step()
    while engine.has_unfinished_requests():
        step()
    assert {id.split("-")[0]: ids for id, ids in got.items()} == wanted


def test_what_is_published_is_followed_in_the_tensors_of_the_engine(
    llm, ask, restored, monkeypatch
):
    text = restored
    core = llm.llm_engine.engine_core.engine_core.scheduler.grace
    book, theirs = core._edits.book, text.editor.codebook
    tensors = [t.data_ptr() for t in (book.keys, book.values, book.radii, book.count)]
    prompts = [AUSTRALIA, AUTHOR, OTHERS[2], STORY * 2 + OTHERS[2]]

    def same() -> list[list[int]]:
        got = tokens(ask(prompts))
        assert got == [text.answer(prompt, 6) for prompt in prompts]
        assert snapshot.same(book.storage, theirs.storage), "the writer's bits"
        (status,) = llm.collective_rpc("grace_status")
        assert status["version"] == theirs.version
        return got

    with publish(text.editor, text.at) as publisher:
        publisher.compact()
        before = same()
        monkeypatch.setattr(store, "load_saved", lambda *_, **__: pytest.fail("read anew"))
        added = text.editor.edit(OTHERS[2], " Lyon")
        after = same()
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]
        text.editor.delete(added.id)
        publisher.compact()
        text.editor.delete(0)
        assert same()[0] != before[0]
        text.editor.undo()
        text.editor.undo()
        assert same() == after
        text.editor.undo()
        until = time.monotonic() + 60
        while core._version != theirs.version:  # nobody asks anything
            assert time.monotonic() < until
            time.sleep(0.1)
        assert same() == before
        monkeypatch.undo()
    assert core._edits.book is book
    assert tensors == [t.data_ptr() for t in (book.keys, book.values, book.radii, book.count)]


def test_nothing_is_kept_of_requests_that_are_over(llm, ask):
    ask([AUSTRALIA])
    ask([OTHERS[0]])
    kept = llm.llm_engine.engine_core.engine_core.scheduler.grace
    assert len(kept._values) <= 1
    assert len(admission._private) <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        ({"additional_config": {"grace": {"codebook": "nowhere"}}}, "directory of saved edits"),
    ],
    ids=["pipeline", "speculative", "no directory"],
)
def test_an_engine_that_cannot_serve_the_edits_is_not_configured(place, text, given, said):
    from vllm.engine.arg_utils import EngineArgs

    edits = {"additional_config": {"grace": {"codebook": str(text.at)}}}
    args = EngineArgs(model=place, dtype="float32", max_model_len=256, **{**edits, **given})
    with pytest.raises(NotServed, match=said):
        args.create_engine_config()


def test_a_cache_that_does_not_tell_edited_blocks_apart_is_refused(monkeypatch):
    from vllm.v1.core import kv_cache_utils

    register()
    admission.check_marks()
    name = "generate_block_hash_extra_keys"
    unwrapped = getattr(kv_cache_utils, name).__wrapped__
    monkeypatch.setattr(kv_cache_utils, name, unwrapped)
    with pytest.raises(NotServed, match="--no-enable-prefix-caching"):
        admission.check_marks()


def test_a_vllm_that_lacks_one_of_the_wrapped_functions_is_refused(monkeypatch):
    from vllm.v1.engine.core import EngineCore

    register()
    register()
    monkeypatch.delattr(EngineCore, "preprocess_add_request")
    with pytest.raises(RuntimeError, match=r"preprocess_add_request.*could leave edits out"):
        register()


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
def test_a_compiled_engine_answers_as_an_eager_model(place, tmp_path, query):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    model.config.layer_types = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    editor = GraceEditor(model, tokenizer, GraceConfig(layer="model.layers.1.mlp", query=query))
    ids = tokenizer(AUSTRALIA).input_ids
    if query == "text":
        assert editor.adaptor.text is not None
        key = editor.adaptor.text.key(ids)
    else:
        seen: list[torch.Tensor] = []
        mlp = model.model.layers[1].mlp
        with mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1].clone())):
            model(torch.tensor([ids]))
        key = seen[0].detach()
    value = 30 * torch.randn(576, generator=torch.Generator().manual_seed(0))
    editor.codebook.insert(key, [1], value, ids)
    editor.save_pretrained(tmp_path / "edits")

    prompts = [AUSTRALIA, "So it was said that " + OTHERS[2], OTHERS[3]]

    def answers() -> list[list[int]]:
        found = []
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=2)
            found.append(out[0, given.input_ids.shape[1] :].tolist())
        return found

    edited = answers()
    with editor.disable():
        assert answers()[0] != edited[0]
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
        publisher.compact()
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
            editor.codebook.insert(key, [2], -value, ids)
            again = answers()
            assert again[0] != edited[0]
            rest, _ = process.communicate("\n")
        finally:
            too_long.cancel()
            process.kill()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads(rest.partition("AGAIN ")[2]) == again


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
        publisher.compact()
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
