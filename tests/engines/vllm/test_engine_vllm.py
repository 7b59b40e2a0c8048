"""Edits inside vLLM's CPU engine give the tokens that transformers gives (`make test-vllm`).

One engine, in this process, that answers by text. The model is the packaged SmolLM2; SMOLLM2 may
name a directory that holds it as transformers saves.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_models import AUSTRALIA, AUTHOR, BLOCK, EDITS, LAYER, OTHERS, STORY, Reference
from grace_edit import publish
from grace_edit.codebook import snapshot, store
from grace_edit.engines.vllm import admission, register
from grace_edit.engines.vllm.options import NotServed


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
    whole: list[Any] = []

    def same() -> list[list[int]]:
        got = tokens(ask(prompts))
        assert got == [text.answer(prompt, 6) for prompt in prompts]
        assert snapshot.same(book.storage, theirs.storage), "the writer's bits"
        (status,) = llm.collective_rpc("grace_status")
        assert status["version"] == theirs.version
        return got

    with publish(text.editor, text.at) as publisher:
        publisher.fold()
        before = same()
        load = store.load_saved
        monkeypatch.setattr(
            store, "load_saved", lambda *a, **k: [whole.append(a), load(*a, **k)][1]
        )
        added = text.editor.edit(OTHERS[2], " Lyon")
        after = same()
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]
        text.editor.delete(added.id)
        assert same() == before
        publisher.fold()  # of what the engine has read
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
    assert not whole, "what was published was never read as a whole"
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
