"""What the engine core does, with stand-ins for vLLM's configuration and the model's checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, publish
from grace_edit.codebook import files, snapshot, store
from grace_edit.engines.vllm import admission, checkpoint
from grace_edit.engines.vllm.admission import Admission, private_key
from grace_edit.engines.vllm.layer import EditedLayer, find_layer
from grace_edit.engines.vllm.options import NotServed, Options, check_engine, read, with_variable
from grace_edit.engines.vllm.saved import Described, SavedEdits
from grace_edit.engines.vllm.seams import _extra_keys, _telling
from text_models import NEIGHBOUR, OTHER, QUESTION, TARGET, text_editor, tokenizer
from tiny_models import LAYERS, build, run_of
from torch import nn

WORDS = tokenizer()
IDS = {text: WORDS(text).input_ids for text in (QUESTION, NEIGHBOUR, OTHER)}


def engine_of(model: Any, **changed: Any) -> Any:
    """Return as much of a `VllmConfig` as is read."""
    about = {
        "hf_config": model.config,
        "dtype": torch.float32,
        "quantization": None,
        "trust_remote_code": False,
        "enforce_eager": True,
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "tokenizer": "",
        "tokenizer_revision": None,
        "get_hidden_size": lambda: model.config.hidden_size,
        **changed,
    }
    return SimpleNamespace(model_config=SimpleNamespace(**about), load_config=None)


@pytest.fixture
def served(trained, tmp_path, monkeypatch):
    """Return a model with an edit saved, and what an engine would read of its checkpoint."""
    monkeypatch.setattr("grace_edit.engines.vllm.saved._tokenizer", lambda config: WORDS)

    def made(query: str = "text", **config: Any):
        model = trained("llama")
        weights = dict(model.state_dict())
        if query == "text":
            editor = text_editor(model, "llama", **config)
            assert editor.edit(QUESTION, TARGET).success
        else:
            layer = LAYERS["llama"]
            editor = GraceEditor(model, None, GraceConfig(layer=layer, query=query, **config))
            assert editor.edit(run_of(3, 5), run_of(20, 3)).success
        editor.save_pretrained(tmp_path)
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight" or not tied(model)}
        monkeypatch.setattr(checkpoint, "_weights", lambda config: iter(weights.items()))
        return SimpleNamespace(
            editor=editor, engine=engine_of(model), weights=weights, at=str(tmp_path)
        )

    return made


def tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def request(id: str, ids: list[int] | None, **more: Any) -> Any:
    given = {"prompt_embeds": None, "prompt_is_token_ids": None, "resumable": False, **more}
    return SimpleNamespace(request_id=id, prompt_token_ids=ids, **given)


def step(new: list[str] = (), finished: tuple[str, ...] = ()) -> Any:  # type: ignore[assignment]
    requests = [SimpleNamespace(req_id=id) for id in new]
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(finished))


@pytest.fixture(autouse=True)
def no_other_requests(monkeypatch):
    """An engine of other tests in this process may have left some."""
    monkeypatch.setattr(admission, "_private", {})


def test_a_prompt_that_is_answered_takes_the_value_along_and_others_take_nothing(served):
    it = served()
    core = Admission(it.engine, Options(it.at, interval=0))
    for name, text in (("a", QUESTION), ("b", NEIGHBOUR), ("c", OTHER)):
        core.admit(request(name, IDS[text]))
    news = core.news(step(["b", "a"]))
    book = it.editor.codebook
    assert list(news.values) == ["a"]
    assert torch.equal(news.values["a"], book.values[0])
    assert news.version == book.version
    assert core.news(step(["a"])).values, "a request that was preempted may be scheduled anew"
    assert core.news(step([], ("a",))).finished == {"a"}
    assert not core.news(step(["a"])).values
    assert not admission._private


def test_a_request_that_comes_after_a_save_is_answered_with_it(served):
    it = served()
    core = Admission(it.engine, Options(it.at, interval=0))
    core.admit(request("before", IDS[QUESTION]))
    it.editor.edit(QUESTION, " ".join(WORDS.convert_ids_to_tokens(run_of(30, 3))))
    it.editor.save_pretrained(it.at)
    core.admit(request("after", IDS[QUESTION]))
    it.editor.undo()
    it.editor.undo()
    it.editor.save_pretrained(it.at)
    core.admit(request("deleted", IDS[QUESTION]))
    values = core.news(step(["before", "after", "deleted"])).values
    assert list(values) == ["before", "after"]
    assert not torch.equal(values["before"], values["after"])


def test_what_is_published_is_followed_in_place_and_never_read_whole(served, monkeypatch, caplog):
    it = served()
    with publish(it.editor, it.at) as publisher:
        publisher.fold()  # what was saved before has no log
        core = Admission(it.engine, Options(it.at, interval=0))
        book, theirs = core._edits.book, it.editor.codebook
        tensors = [t.data_ptr() for t in (book.keys, book.values, book.radii, book.count)]
        with monkeypatch.context() as no_reading:
            no_reading.setattr(store, "load_saved", lambda *_, **__: pytest.fail("read anew"))
            core.admit(request("before", IDS[QUESTION]))
            it.editor.edit(QUESTION, " ".join(WORDS.convert_ids_to_tokens(run_of(30, 3))))
            core.admit(request("after", IDS[QUESTION]))
            assert snapshot.same(book.storage, theirs.storage)
            assert core.news(step()).version == theirs.version
            publisher.fold()
            it.editor.undo()
            it.editor.undo()
            assert publisher.log_bytes > 0
            core.admit(request("deleted", IDS[QUESTION]))
            assert snapshot.same(book.storage, theirs.storage)
        values = core.news(step(["before", "after", "deleted"])).values
        assert list(values) == ["before", "after"]
        assert not torch.equal(values["before"], values["after"])
        assert core._edits.book is book
        assert tensors == [t.data_ptr() for t in (book.keys, book.values, book.radii, book.count)]
        it.editor.edit(QUESTION, TARGET)
        (log,) = Path(it.at).glob("edits-*.log")
        content = bytearray(log.read_bytes())
        content[-1] ^= 1
        log.write_bytes(content)
        for name in ("damaged", "again"):
            core.admit(request(name, IDS[QUESTION]))
        assert caplog.text.count("is damaged") == 1
        assert not core.news(step(["damaged"])).values
        assert core.news(step()).version < theirs.version


def test_new_edits_are_there_before_the_next_request_asks(served):
    it = served()
    with publish(it.editor, it.at):
        core = Admission(it.engine, Options(it.at, interval=0.01))
        try:
            it.editor.edit(NEIGHBOUR, TARGET)
            until = time.monotonic() + 60
            while core.news(step()).version != it.editor.codebook.version:
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            core.close()
        it.editor.undo()
        assert core.news(step()).version != it.editor.codebook.version, "it looks no more"
        core.admit(request("a", IDS[NEIGHBOUR]))
        assert core.news(step()).version == it.editor.codebook.version
        assert not core.news(step(["a"])).values


def test_looking_ends_with_the_engine_and_goes_on_behind_an_error(served, tmp_path, caplog):
    it = served()
    core = Admission(it.engine, Options(it.at, interval=0.01))
    thread = core._thread
    (tmp_path / "grace_config.json").rename(tmp_path / "elsewhere")
    until = time.monotonic() + 60
    while "cannot be read" not in caplog.text:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert thread.is_alive()
    core.admit(request("a", IDS[QUESTION]))
    assert core.news(step(["a"])).values, "what was there before goes on"
    del core
    thread.join(60)
    assert not thread.is_alive()
    assert caplog.text.count("cannot be read") == 1, "said once, not with each look"


def test_what_could_not_be_read_once_is_read_at_the_next_look(served, monkeypatch):
    it = served()
    with publish(it.editor, it.at) as publisher:
        core = Admission(it.engine, Options(it.at, interval=0))
        core.news(step())
        edit = it.editor.edit(NEIGHBOUR, TARGET)
        publisher.fold()  # the log that was read is gone
        with monkeypatch.context() as broken:
            broken.setattr(files, "describe", refused)
            core.admit(request("a", IDS[NEIGHBOUR]))
            assert core.news(step(["a"])).version != it.editor.codebook.version
        core.admit(request("b", IDS[NEIGHBOUR]))
        assert edit.success
        assert core.news(step(["b"])).version == it.editor.codebook.version
        it.editor.delete(edit.id)  # in the log that is new
        core.admit(request("c", IDS[NEIGHBOUR]))
        assert core.news(step(["c"])).version == it.editor.codebook.version


def refused(directory):
    raise files.StoreError(f"{directory}: cannot be read (too many open files)")


def test_only_the_block_an_answered_prompt_ends_in_is_its_own_and_what_follows_it(served):
    it = served()
    core = Admission(it.engine, Options(it.at, interval=0))
    core.admit(request("hit", IDS[QUESTION]))
    core.admit(request("miss", IDS[NEIGHBOUR]))
    n = len(IDS[QUESTION])
    assert private_key("hit", n - 1, n + 3) == private_key("hit", 0, n) != ()
    for start, end in ((0, n - 1), (n, n + 4)):
        assert private_key("hit", start, end) == (), "before it is shared, behind it is chained"
    assert private_key("miss", 0, 99) == ()


def test_under_activations_no_prompt_shares_the_block_with_its_end(served):
    it = served("last")
    core = Admission(it.engine, Options(it.at, interval=0))
    core.admit(request("a", run_of(3, 5)))
    core.admit(request("b", run_of(9, 5)))
    assert private_key("a", 4, 8)
    assert private_key("b", 4, 8)
    assert private_key("a", 4, 8) != private_key("b", 4, 8)
    assert not private_key("a", 0, 4)


def test_workers_are_sent_everything_once_and_then_what_changed(served):
    it = served("last")
    with publish(it.editor, it.at):
        core = Admission(it.engine, Options(it.at, interval=0))
        theirs = it.editor.codebook
        first = core.news(step()).changed
        assert first.slots.tolist() == [0]
        assert torch.equal(first.values[0], theirs.values[0])
        assert core.news(step()).changed is None
        it.editor.edit(run_of(40, 5), run_of(9, 3))
        core.admit(request("a", run_of(40, 5)))
        then = core.news(step()).changed
        assert then.count == 2
        assert then.slots.tolist() == [1]
        assert torch.equal(then.keys[0], theirs.keys[1])
        core.admit(request("b", run_of(40, 5)))
        assert core.news(step()).changed is None


def test_changes_between_two_steps_are_one_message_of_what_they_left(served):
    it = served("last")
    with publish(it.editor, it.at):
        core = Admission(it.engine, Options(it.at, interval=0))
        layer = EditedLayer(
            "model.layers.1.mlp", query="last", width=48, dtype=torch.float32, device="cpu",
            capacity=it.editor.codebook.capacity, requests=4, may_grow=True,
        )  # fmt: skip
        layer.write(core.news(step()).changed)
        theirs = it.editor.codebook
        for round in range(3):
            it.editor.edit(run_of(40, 5), run_of(9, 3))
            core.admit(request("a", [5]))
            it.editor.edit(run_of(40, 5), run_of(20 + round, 3))
            core.admit(request("b", [5]))
            if round == 1:
                it.editor.undo()
                it.editor.undo()
            core.admit(request("c", [5]))
            changed = core.news(step()).changed
            assert changed.slots.tolist() == [1]
            layer.write(changed)
            count = int(theirs.count)
            assert int(layer._count) == count == (1 if round == 1 else 2)
            for mine, own in (("_keys", "keys"), ("_values", "values"), ("_radii", "radii")):
                assert torch.equal(getattr(layer, mine)[:count], getattr(theirs, own)[:count])
            if round == 0:
                it.editor.undo()
                it.editor.undo()


def test_edits_past_the_room_of_captured_graphs_are_kept_back_until_there_is_room(served, caplog):
    it = served("last", capacity=2)
    it.engine.model_config.enforce_eager = False
    with publish(it.editor, it.at):
        core = Admission(it.engine, Options(it.at, interval=0))
        core.news(step())
        before = it.editor.codebook.version
        it.editor.edit(run_of(40, 5), run_of(9, 3))
        it.editor.edit(run_of(50, 5), run_of(9, 3))
        for name in "ab":
            core.admit(request(name, [5]))
        news = core.news(step())
        assert news.changed is None
        assert news.version == before
        assert caplog.text.count("3 entries are more than the 2 there is room for") == 1
        it.editor.undo()
        core.admit(request("c", [5]))
        news = core.news(step())
        assert news.changed.slots.tolist() == [1]
        assert torch.equal(news.changed.keys[0], it.editor.codebook.keys[1])
        assert news.version == it.editor.codebook.version


def test_another_model_is_refused_by_its_checkpoint(served):
    it = served()
    it.weights["model.layers.2.mlp.up_proj.weight"] += 1
    with pytest.raises(NotServed, match=r"edits of another model: the checkpoint differs above"):
        SavedEdits(it.engine, Options(it.at))
    it.weights["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(NotServed, match="differs below and above the layer"):
        SavedEdits(it.engine, Options(it.at))


def test_what_cannot_be_checked_is_refused_unless_the_option_says_so(served, caplog):
    it = served("last")
    it.engine.model_config.quantization = "fp8"
    with pytest.raises(NotServed, match=r"weights are quantised \(fp8\).*\"unchecked\": true"):
        SavedEdits(it.engine, Options(it.at))
    SavedEdits(it.engine, Options(it.at, unchecked=True))
    assert "served unchecked" in caplog.text
    it.engine.model_config.quantization = None
    del it.weights["model.norm.weight"]
    with pytest.raises(NotServed, match=r"it has no model\.norm\.weight"):
        SavedEdits(it.engine, Options(it.at))


def test_saved_edits_of_another_layer_are_not_taken_while_serving(served, caplog):
    it = served("last")
    edits = SavedEdits(it.engine, Options(it.at))
    version = edits.book.version
    it.editor.detach()
    other = GraceEditor(it.editor.model, None, GraceConfig(layer="model.layers.2.mlp"))
    other.save_pretrained(it.at)
    edits.refresh()
    assert edits.version == edits.book.version == version
    assert "start it again" in caplog.text
    edits.refresh()
    assert caplog.text.count("start it again") == 1, "said once, not with each request"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"query": "mean"}, "query must be 'text' or 'last'"),
        ({"replace": "prompt"}, "replace must be 'last'"),
    ],
    ids=lambda x: str(x),
)
def test_what_vllm_cannot_ask_is_refused(served, config, message):
    it = served(**{"query": "last", **config})
    with pytest.raises(NotServed, match=message):
        Described(it.at)


def test_another_dtype_is_refused_with_the_one_to_choose(served):
    it = served("last")
    with pytest.raises(NotServed, match="start with --dtype float32"):
        Described(it.at).check_dtype(torch.bfloat16, 48)
    with pytest.raises(NotServed, match="take and give 64 numbers"):
        Described(it.at).check_dtype(torch.float32, 64)


def test_requests_whose_prompt_cannot_be_told_are_refused_one_by_one(served):
    it = served()
    core = Admission(it.engine, Options(it.at, interval=0))
    with pytest.raises(ValueError, match="no streaming sessions"):
        core.admit(request("a", [5], resumable=True))
    with pytest.raises(ValueError, match="got embeddings"):
        core.admit(request("a", None, prompt_embeds=torch.zeros(3, 48)))


def test_the_layer_is_found_by_name_or_end_and_refused_with_what_is_near():
    model = build("llama")
    assert find_layer(model, "model.layers.1.mlp") is model.model.layers[1].mlp
    inside = nn.ModuleDict({"language_model": model})
    assert find_layer(inside, "model.layers.1.mlp") is model.model.layers[1].mlp
    with pytest.raises(NotServed, match=r"got 0; near: model\.layers\.0\.mlp"):
        find_layer(model, "transformer.h.1.mlp")
    with pytest.raises(NotServed, match="fuses it with others"):
        find_layer(model, "model.layers.1.mlp.down_proj")


# The option, and the functions that are wrapped.


def test_the_option_is_read_and_its_mistakes_are_named(tmp_path, monkeypatch):
    at = str(tmp_path)
    assert read({}) is None
    assert read(None) is None
    assert read({"grace": {"codebook": at}}) == Options(at)
    for wrong in (
        {"codebooks": at},
        at,
        {"codebook": at, "unchecked": "yes"},
        {"codebook": "no"},
        {"codebook": at, "interval": -1},
        {"codebook": at, "interval": True},
    ):
        with pytest.raises(NotServed, match="grace"):
            read({"grace": wrong})
    monkeypatch.delenv("GRACE_CODEBOOK", raising=False)
    assert with_variable({"a": 1}) == {"a": 1}
    monkeypatch.setenv("GRACE_CODEBOOK", at)
    assert read(with_variable({"a": 1})) == Options(at)
    explicit = {"grace": {"codebook": "elsewhere"}}
    assert with_variable(explicit) == explicit


def parts_of_engine() -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            use_ubatching=False,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(fuse_norm_quant=True, fuse_act_quant=False)
        ),
        model_config=SimpleNamespace(
            runner_type="generate", is_encoder_decoder=False, quantization=None
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        kv_transfer_config=None,
    )


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config", "use_ubatching", True, "enable_dbo"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallel prefill"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallel decoding"),
        ("model_config", "quantization", "fp8", "fused quantisation"),
        ("model_config", "runner_type", "pooling", "do not generate"),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
        ("cache_config", "kv_sharing_fast_prefill", True, "fast prefill"),
        (None, "speculative_config", object(), "speculative decoding"),
        (None, "kv_transfer_config", object(), "KV transfer"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_what_edits_were_not_tried_with_stops_the_engine_by_name(part, name, value, said):
    config = parts_of_engine()
    check_engine(config)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(NotServed, match=said):
        check_engine(config)


def test_a_scheduler_sends_the_news_with_each_step_and_refuses_edits_it_cannot_serve(served):
    it = served()

    class Scheduler:
        def __init__(self, vllm_config: Any, block_size: int) -> None:
            self.block_size = block_size

        def schedule(self, throttle: bool = False) -> Any:
            return step(["a"])

        def shutdown(self) -> str:
            return "down"

    telling = _telling(Scheduler)
    assert telling is _telling(Scheduler)
    assert telling.__name__ == "Scheduler"
    it.engine.cache_config = SimpleNamespace(enable_prefix_caching=False)
    it.engine.additional_config = {}
    assert not hasattr(telling(it.engine, block_size=4).schedule(), "grace")
    it.engine.additional_config = {"grace": {"codebook": it.at}}
    made = telling(vllm_config=it.engine, block_size=4)
    made.grace.admit(request("a", IDS[QUESTION]))
    assert made.block_size == 4
    assert list(made.schedule(throttle=True).grace.values) == ["a"]
    assert made.grace._thread.is_alive()
    assert made.shutdown() == "down"
    assert not made.grace._thread.is_alive()
    it.weights["model.norm.weight"] += 1
    with pytest.raises(NotServed, match="another model"):
        telling(vllm_config=it.engine, block_size=4)


def test_the_hash_of_a_block_holds_the_mark_beside_what_it_held():
    admission._private["a"] = 6
    salted = lambda request, start, end, i: ((("cache_salt", "s"),), i)  # noqa: E731
    plain = lambda request, start, end, i: (None, i)  # noqa: E731
    one = SimpleNamespace(request_id="a")
    assert _extra_keys(plain, one, 0, 4, 7) == (None, 7)
    assert _extra_keys(plain, one, 4, 8, 7) == ((("grace", "a"),), 7)
    assert _extra_keys(salted, one, 4, 8, 7) == ((("cache_salt", "s"), ("grace", "a")), 7)
