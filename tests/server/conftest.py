"""A small model that talks, and a server of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor
from grace_edit.demo.small import small_gpt2
from grace_edit.server.app import build_app
from server_lab import CAPITAL, LAYER, RIVER, TEMPLATE, TOKEN, Client, serving
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make models of this size ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Batching collects garbage when it stops, among all that was ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def talker(once: Callable[..., Path]) -> Path:
    """A directory with a small GPT-2 that says Sydney, and on with `CAPITAL` itself Perth."""
    return once("talker", teach)


def teach(directory: Path) -> None:
    taught = {f"user: {CAPITAL} bot:": "Sydney", f"user: {RIVER} bot:": "Nile", CAPITAL: "Perth"}
    taught["Zanzibar Quito Oslo"] = "Canberra"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = small_gpt2(taught)
    torch.set_num_threads(threads)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture
def editor(talker: Path) -> GraceEditor:
    """An editor of it, with nothing edited yet."""
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    tokenizer = AutoTokenizer.from_pretrained(talker)
    return GraceEditor(model, tokenizer, GraceConfig(layer=LAYER, radius=0.5))


@pytest.fixture
def client(editor: GraceEditor, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of a server that takes changes and keeps them in memory; see `both`."""
    app = build_app(
        editor.family,
        name="talker",
        editor=editor,
        token=TOKEN,
        batched=getattr(request, "param", False),
    )
    with serving(app) as found:
        yield found


@pytest.fixture(scope="module")
def faulty(talker: Path) -> Iterator[Client]:
    """A client of a server that nothing is changed in, for all tests of a file."""
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    tokenizer = AutoTokenizer.from_pretrained(talker)
    made = GraceEditor(model, tokenizer, GraceConfig(layer=LAYER, radius=0.5))
    with serving(build_app(made.family, name="talker", editor=made, token=TOKEN)) as found:
        yield found
