"""`grace serve`'s application: answers, stamps, edits and figures, over real connections."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from grace_edit import GraceConfig, GraceEditor, follow, publish
from grace_edit.codebook import files, store
from grace_edit.families.turns import answer_ids
from grace_edit.server.app import build_app
from grace_edit.serving import save
from server_lab import CAPITAL, LAYER, RIVER, TOKEN, WRITER, Client, both, serving
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.continuous_batching import ContinuousBatchingManager


@both
def test_a_correction_answers_the_next_request_and_undo_takes_it_back(client: Client) -> None:
    version = -1
    for stream in (False, True):
        before = client.chat(CAPITAL, stream=stream)
        assert (before.status, before.said) == (200, "Sydney")
        made = client.correct(CAPITAL, "Canberra")
        assert made.status == 200, made.body
        edited = client.chat(CAPITAL, stream=stream)
        assert (edited.said, edited.version) == ("Canberra", made.json["version"])
        assert client.chat(RIVER, stream=stream).said == "Nile"
        undone = client.ask("POST", "/v1/edits/undo", **WRITER)
        assert undone.json["gone"] == [made.json["id"]]
        after = client.chat(CAPITAL, stream=stream)
        assert (after.said, after.version) == ("Sydney", undone.json["version"])
        assert version <= before.version < edited.version < after.version
        version = after.version


@both
def test_who_asks_is_told_which_edit_answered(client: Client) -> None:
    made = client.correct(CAPITAL, "Canberra").json
    for stream in (False, True):
        hit = client.chat(CAPITAL, explain=True, stream=stream).headers
        assert hit["x-grace-edit"] == str(made["id"])
        assert (hit["x-grace-distance"], hit["x-grace-radius"]) == ("0", "0.5")
        miss = client.chat(RIVER, explain=True, stream=stream).headers
        assert miss["x-grace-edit"] == "none"
        assert "x-grace-radius" not in miss
        assert "x-grace-edit" not in client.chat(CAPITAL, stream=stream).headers
    told = client.chat(CAPITAL, explain=True).json["grace"]
    assert told == {"version": 1, "edit": made["id"], "distance": 0.0, "radius": 0.5}


@both
def test_plain_completions_and_responses_answer_with_the_edits_too(client: Client) -> None:
    plain = {"prompt": CAPITAL, "max_tokens": 1}
    assert client.ask("POST", "/v1/completions", plain).said == "Perth"
    made = client.ask("POST", "/v1/edits", {"prompt": CAPITAL, "target": " Canberra"}, **WRITER)
    assert made.status == 200, made.body
    for stream in (False, True):
        reply = client.ask("POST", "/v1/completions", {**plain, "stream": stream})
        assert (reply.said, reply.version) == ("Canberra", 1)
    asked = {"input": RIVER, "max_output_tokens": 4, "stream": False}
    reply = client.ask("POST", "/v1/responses", asked)
    assert reply.json["output"][0]["content"][0]["text"] == "Nile"
    assert reply.json["grace"]["version"] == reply.version == 1


def test_edits_are_listed_shown_explained_and_deleted(client: Client) -> None:
    first = client.correct(CAPITAL, "Canberra", negatives=[RIVER]).json
    second = client.correct(RIVER, "Quito").json
    listed = client.ask("GET", "/v1/edits").json
    assert [(e["id"], e["prompt"], e["target"]) for e in listed["edits"]] == [
        (first["id"], CAPITAL, "Canberra"),
        (second["id"], RIVER, "Quito"),
    ]
    assert (listed["total"], listed["more"], listed["version"]) == (2, False, second["version"])
    page = client.ask("GET", "/v1/edits?limit=1").json
    assert (len(page["edits"]), page["more"]) == (1, True)
    rest = client.ask("GET", f"/v1/edits?after={first['id']}").json
    assert [e["id"] for e in rest["edits"]] == [second["id"]]
    one = client.ask("GET", f"/v1/edits/{first['id']}").json["edit"]
    assert (one["state"], one["negatives"]) == ("live", [RIVER])
    prompt = {"prompt": [{"role": "user", "content": RIVER}]}
    why = client.ask("POST", "/v1/edits/explain", prompt).json
    assert (why["hit"], why["edit_id"], why["edit_prompt"]) == (True, second["id"], RIVER)
    gone = client.ask("DELETE", f"/v1/edits/{second['id']}", **WRITER).json
    assert (gone["gone"], gone["back"]) == ([second["id"]], [])
    assert client.chat(RIVER).said == "Nile"
    assert client.ask("GET", f"/v1/edits/{second['id']}").json["edit"]["state"] == "deleted"
    purged = client.ask("DELETE", f"/v1/edits/{second['id']}?purge=true", **WRITER)
    assert purged.status == 200, purged.body
    assert client.ask("GET", f"/v1/edits/{second['id']}").status == 404


def test_figures_say_what_was_asked_and_what_answered(client: Client) -> None:
    client.correct(CAPITAL, "Canberra")
    for message in (CAPITAL, CAPITAL, RIVER):
        assert client.chat(message).status == 200
    reply = client.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    figures = dict(re.findall(r"^(\w[^ ]*) ([\d.]+)$", reply.body.decode(), re.M))
    assert float(figures["grace_hits_total"]) == 2
    assert float(figures["grace_misses_total"]) == 1
    assert float(figures["grace_lookup_seconds_count"]) == 3
    assert float(figures["grace_edit_seconds_count"]) == 1
    for name in ("version", "entries", "edits"):
        assert float(figures[f"grace_codebook_{name}"]) == 1
    asked = 'grace_requests_total{path="/v1/chat/completions",status="200"}'
    assert float(figures[asked]) == 3


@both
def test_requests_go_on_while_an_edit_is_made_and_each_is_of_one_version(
    client: Client, editor: GraceEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, go_on = threading.Event(), threading.Event()
    edit = editor.edit

    def slow(*args: Any, **kwargs: Any) -> Any:
        with editor.codebook.transaction():
            training.set()
            assert go_on.wait(30)
            return edit(*args, **kwargs)

    monkeypatch.setattr(editor, "edit", slow)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(client.correct(CAPITAL, "Canberra")))
    thread.start()
    assert training.wait(30)
    during = client.chat(CAPITAL)  # the edit is in the midst: this does not wait for it
    assert (during.said, during.version) == ("Sydney", 0)
    assert client.ask("GET", "/v1/edits").json["edits"] == []
    go_on.set()
    thread.join(30)
    assert made[0].status == 200
    after = client.chat(CAPITAL)
    assert (after.said, after.version) == ("Canberra", made[0].json["version"])


def test_a_stream_is_stamped_by_what_answered_it_not_by_what_is_edited_later(
    editor: GraceEditor,
) -> None:
    """The edit is committed between the answer to the prompt and the end of the reply."""
    generate = type(editor.model).generate
    assert editor.edit(*correction(editor, CAPITAL, "Canberra")).success
    book = editor.codebook
    seen = []

    class Between:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            streamer = kwargs["streamer"]
            put = streamer.put

            def late(value: Any) -> None:
                put(value)
                if not seen and value.numel() == 1:
                    book.delete(0)
                    seen.append(book.version)

            streamer.put = late
            return generate(editor.model, *args, **kwargs)

    editor.model.__dict__["generate"] = Between()
    with serving(build_app(editor.family, name="talker")) as client:
        reply = client.chat(CAPITAL, stream=True, explain=True)
    assert seen == [2]
    assert (reply.said, reply.version, reply.headers["x-grace-edit"]) == ("Canberra", 1, "0")


def test_requests_in_one_batch_are_answered_and_stamped_each_for_itself(
    editor: GraceEditor,
) -> None:
    assert editor.edit(*correction(editor, CAPITAL, "Canberra")).success
    app = build_app(editor.family, name="talker", batched=True)
    plain = {"prompt": "capital of Egypt ?", "max_tokens": 6, "temperature": 0}
    with serving(app) as client, ThreadPoolExecutor(8) as pool:
        alone = client.ask("POST", "/v1/completions", plain).said
        chats = [CAPITAL, RIVER] * 8
        found = [
            pool.submit(client.chat, message, explain=True, stream=bool(n % 3))
            for n, message in enumerate(chats)
        ]
        others = [pool.submit(client.ask, "POST", "/v1/completions", plain) for _ in range(4)]
        for message, future in zip(chats, found, strict=True):
            reply = future.result()
            wanted = ("Canberra", "0") if message == CAPITAL else ("Nile", "none")
            assert (reply.said, reply.headers["x-grace-edit"]) == wanted
            assert reply.version == 1
        assert {future.result().said for future in others} == {alone}
        # What is chosen otherwise is generated alone, beside the batches.
        other = client.chat(CAPITAL, frequency_penalty=0.1)
        assert (other.said, other.version) == ("Canberra", 1)


def test_a_stream_that_is_over_before_anybody_listens_is_heard(
    editor: GraceEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ContinuousBatchingManager.add_request

    def late(*args: Any, **kwargs: Any) -> Any:
        done = add(*args, **kwargs)
        time.sleep(0.3)  # the batches go on in their own thread
        return done

    monkeypatch.setattr(ContinuousBatchingManager, "add_request", late)
    with serving(build_app(editor.family, name="talker", batched=True)) as client:
        assert client.chat(CAPITAL, stream=True).said == "Sydney"


def test_a_batch_leaves_the_configuration_to_the_forwards_of_other_threads(
    editor: GraceEditor,
) -> None:
    """transformers would have them attend to what comes after a token, while a batch runs."""
    seen = set()
    model: Any = editor.model
    hook = model.transformer.h[0].register_forward_pre_hook(
        lambda *_: seen.add(getattr(model.config, "is_causal", "as it was"))
    )
    with serving(build_app(editor.family, name="talker", batched=True)) as client:
        assert client.chat(CAPITAL).said == "Sydney"
    hook.remove()
    assert seen == {"as it was"}


def test_a_model_that_cannot_be_batched_is_refused_with_the_reason(talker: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(talker)
    made = GraceEditor(model, tokenizer, GraceConfig(layer=LAYER, radius=0.5))
    with pytest.raises(ValueError, match="attention must be sdpa, got eager"):
        build_app(made.family, name="talker", batched=True)


def correction(editor: GraceEditor, message: str, right: str) -> tuple[Any, Any]:
    turns = [{"role": "user", "content": message}]
    return turns, answer_ids(editor.model, editor.tokenizer, turns, right)


def test_what_was_acknowledged_is_on_disk_and_what_is_not_kept_is_not_made(
    talker: Path, editor: GraceEditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "edits"
    publisher = publish(editor, where)
    app = build_app(
        editor.family, name="talker", editor=editor, token=TOKEN, closing=publisher.close
    )

    def on_disk() -> tuple[list[int], int]:
        book = store.load(where)[0]
        return book.ids, book.version

    with serving(app) as client:
        assert client.correct(CAPITAL, "Canberra").status == 200
        assert on_disk() == ([0], editor.codebook.version)
        with pytest.raises(TimeoutError, match="one process at a time"):
            publish(editor, where, timeout=0.05)
        full = OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", Mock(side_effect=full))
            failed = client.correct(RIVER, "Quito")
            purge = client.ask("DELETE", "/v1/edits/0?purge=true", **WRITER)
        for refused in (failed, purge):
            assert refused.status == 507
            assert "No space left" in refused.error
        assert client.chat(RIVER).said == "Nile"
        assert client.chat(CAPITAL).said == "Canberra"
        assert client.ask("GET", "/v1/edits").json["total"] == 1
        assert on_disk()[0] == [0]
        made = client.correct(RIVER, "Quito")
        assert made.status == 200
        assert on_disk() == ([0, made.json["id"]], made.json["version"])
        assert client.ask("DELETE", "/v1/edits/0?purge=true", **WRITER).status == 200
        assert on_disk()[0] == [made.json["id"]]
        assert client.ask("POST", "/v1/edits/undo", **WRITER).status == 409
    with publish(editor, where):  # the server has let go of it
        assert on_disk()[0] == [made.json["id"]]


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("how", ["published", "saved"])
def test_a_follower_answers_as_the_writer_does_at_each_version_it_saved(
    talker: Path, editor: GraceEditor, tmp_path: Path, batched: bool, how: str
) -> None:
    where = tmp_path / "edits"
    writer = publish(editor, where)
    if how == "saved":
        writer.close()
    model = AutoModelForCausalLM.from_pretrained(talker).eval()
    follower = follow(model, AutoTokenizer.from_pretrained(talker), where, interval=0.01)
    family, book = follower.family, follower.codebook
    app = build_app(family, name="talker", batched=batched, closing=follower.close)
    with serving(app) as client:
        assert client.chat(CAPITAL).said == "Sydney"
        for right in ("Canberra", "Oslo"):
            assert editor.edit(*correction(editor, CAPITAL, right)).success
            assert editor.edit(*correction(editor, RIVER, "Quito")).success
            editor.save_pretrained(where)
            wait_until(lambda: client.ask("GET", "/v1/status").version == editor.codebook.version)
            # Saved again with something else beside, it has the version that it had.
            save(editor.family, editor.config, where, {"noted": right})
            snapshot = files.log_of(where, files.describe(where)["checksum"])
            wait_until(lambda snapshot=snapshot: follower._replica.log == snapshot)
            reply = client.chat(CAPITAL)
            assert (reply.said, reply.version) == (right, editor.codebook.version)
        served, described = book.version, (where / "grace_config.json").read_bytes()
        (where / "grace_config.json").write_bytes(b"damaged")
        wait_until(lambda: follower.error is not None)
        reply = client.chat(CAPITAL)
        assert (reply.said, reply.version) == ("Oslo", served)
        (where / "grace_config.json").write_bytes(described)
        wait_until(lambda: follower.error is None)
        editor.undo()
        editor.save_pretrained(where)
        wait_until(lambda: client.ask("GET", "/v1/status").version == editor.codebook.version)
        assert torch.equal(book.values, editor.codebook.values)
        assert client.correct(CAPITAL, "Perth").status == 403
    writer.close()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_without_an_editor_reads_and_refuses_changes(editor: GraceEditor) -> None:
    editor.edit([{"role": "user", "content": CAPITAL}], "Canberra")
    with serving(build_app(editor.family, name="talker", token=TOKEN)) as client:
        assert client.chat(CAPITAL).said.startswith("Canberra")
        refused = client.correct(RIVER, "Quito")
        assert refused.status == 403
        assert "made elsewhere" in refused.error
        assert client.ask("GET", "/v1/status").json["follows"] is True


def test_the_page_asks_nobody_else_and_is_allowed_to_ask_nobody_else(client: Client) -> None:
    reply = client.ask("GET", "/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(rb"(src|href)\s*=\s*[\"']?(https?:)?//", reply.body)
