"""Saved edits listed, taken back, merged, compared, exported and imported; files begun and gone on
with. Edits are inserted with given queries and values where no model is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from grace_edit import GraceEditor
from grace_edit.cli import unfinished
from grace_edit.codebook import store
from safetensors.torch import save_file

LAYER = "transformer.h.1.mlp"
PAIRS = [
    ("the capital of france is", "rome"),
    ("who wrote this long film", "oslo"),
    ("where was that river", "paris"),
    ("a very bad river", "madrid"),
]


def add(grace, gpt2, path, out, *options):
    done = grace("edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", path, "--out", out,
                 "--json", *options)  # fmt: skip
    return done, (json.loads(done.stdout) if done.stdout else None)


def told(grace, *arguments):
    done = grace(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def made(gpt2, tmp_path_factory):
    """Edits of the GPT-2, the first superseded, one of two prompts; made once."""
    from grace_edit.cli import app
    from typer.testing import CliRunner

    where = tmp_path_factory.mktemp("made")
    records = [{"prompt": prompt, "target": target} for prompt, target in PAIRS[:3]]
    records[1] |= {"paraphrases": ["who wrote that long film"], "negatives": ["a good film"]}
    records.append({"prompt": PAIRS[0][0], "target": "vienna"})
    path = lines(where / "edits.jsonl", *records)
    arguments = ["edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", path]
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, [str(x) for x in [*arguments, "--out", where / "edits"]])
    assert done.exit_code == 0, done.output
    return where / "edits"


@pytest.fixture
def saved(made, tmp_path):
    """A copy of these edits to change."""
    out = tmp_path / "saved"
    out.mkdir()
    for path in made.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)


def test_ls_shows_live_edits_and_with_all_the_whole_history(grace, saved, no_model):
    rows = told(grace, "edit", "ls", "--codebook", saved)["edits"]
    assert [(row["id"], row["prompt"], row["target"], row["keys"]) for row in rows] == [
        (1, PAIRS[1][0], "oslo", 2),
        (3, PAIRS[2][0], "paris", 1),
        (4, PAIRS[0][0], "vienna", 1),
    ]
    assert rows[0]["paraphrases"] == ["who wrote that long film"]
    assert rows[0]["negatives"] == ["a good film"]
    assert all(row["state"] == "live" and row["radius"] > 0 and row["proven"] for row in rows)
    rows = told(grace, "edit", "ls", "--codebook", saved, "--all")["edits"]
    assert (rows[0]["id"], rows[0]["state"], rows[0]["superseded_by"]) == (0, "superseded", 4)
    assert rows[0]["radius"] is None
    shown = grace("edit", "ls", "--codebook", saved, "--all").stdout
    for text in ("superseded by 4", PAIRS[0][0], "vienna", "live edits 3, entries "):
        assert text in shown


def test_ls_shows_hits_where_they_are_counted(grace, saved):
    book, described, beside = store.load_all(saved)
    book.count_hits = True
    index, _ = book.lookup(torch.stack([book.query_of(3)] * 2))
    book.count_answers(index)
    store.save(book, saved, described, beside)
    rows = told(grace, "edit", "ls", "--codebook", saved, "--all")["edits"]
    assert [(row["id"], row["hits"]) for row in rows] == [(0, None), (1, 0), (3, 2), (4, 0)]
    assert "hits" in grace("edit", "ls", "--codebook", saved).stdout


def test_expire_takes_back_what_answered_nobody_for_long(grace, saved, no_model):
    refused = grace("edit", "expire", "--codebook", saved, "--unused-for", "30d")
    assert refused.exit_code == 4
    assert "hits are not counted" in refused.stderr
    book, described, beside = store.load_all(saved)
    now = int(time.time())
    book.storage.hits.go_on({3: 5}, {3: now - 60}, {1: now - 29 * 86400}, now - 40 * 86400)
    store.save(book, saved, described, beside)
    rows = told(grace, "edit", "ls", "--codebook", saved)["edits"]
    assert [(row["hits"], row["last_hit"]) for row in rows] == [(0, None), (5, now - 60), (0, None)]
    long = ("edit", "expire", "--codebook", saved, "--unused-for")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for time_of, keep, ids in (("30d", (), [0, 4]), ("5000h", (), []), ("90m", ("--keep", 4), [1])):
        found = told(grace, *long, time_of, *keep, "--dry-run")
        assert (found["dry_run"], [row["id"] for row in found["taken_back"]]) == (True, ids)
        assert found["edits"] == 3
    shown = grace(*long, "30d", "--dry-run").stdout
    assert f'would be taken back: edit 4, "{PAIRS[0][0]}" -> "vienna"' in shown
    for wrong in (("soon",), ("30",), ("30d", "--keep", 77)):
        assert grace(*long, *wrong).exit_code in (2, 3)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    # The edit that 4 had superseded goes with it.
    found = told(grace, *long, "30d")
    assert [row["id"] for row in found["taken_back"]] == [0, 4]
    assert (found["dry_run"], found["live_again"], found["edits"]) == (False, [], 2)
    assert store.load(saved)[0].ids == [1, 3]


def test_rm_takes_edits_back_and_those_they_superseded_come_back(grace, saved, no_model):
    told_now = told(grace, "edit", "rm", 4, 3, "--codebook", saved)
    assert [row["id"] for row in told_now["taken_back"]] == [4, 3]
    assert [(row["id"], row["target"]) for row in told_now["live_again"]] == [(0, "rome")]
    assert told_now["edits"] == 2
    book, described, _ = store.load_all(saved)
    book.check()
    assert book.ids == [0, 1]
    assert book.edit(4).state == "deleted"
    assert described["serving"]["layer"] == LAYER
    shown = grace("edit", "rm", 0, "--codebook", saved, "--purge").stdout
    assert f'purged: edit 0, "{PAIRS[0][0]}" -> "rome"' in shown
    assert [edit.id for edit in store.load(saved)[0].history] == [1, 3, 4]


def test_rm_of_wrong_ids_names_them_all_and_changes_nothing(grace, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    done = grace("edit", "rm", 1, 2, 9, "--codebook", saved)
    assert done.exit_code == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: id must be that of a whole edit, got 2, a key of edit 1",
        "error: id must be that of an edit in the history, got 9",
    ]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    missing = saved.parent / "absent"
    assert grace("edit", "rm", 1, "--codebook", missing).exit_code == 3
    assert not missing.exists()


def test_undo_goes_back_edit_by_edit_until_there_is_none(grace, saved, no_model):
    first = told(grace, "edit", "undo", "--codebook", saved)
    assert [(row["id"], row["state"], row["radius"]) for row in first["taken_back"]] == [
        (4, "deleted", None)
    ]
    assert [row["id"] for row in first["live_again"]] == [0]
    undone = [told(grace, "edit", "undo", "--codebook", saved)["taken_back"] for _ in range(3)]
    assert [[row["id"] for row in rows] for rows in undone] == [[3], [1], [0]]
    done = grace("edit", "undo", "--codebook", saved)
    assert done.exit_code == 3
    assert "must hold an edit to take back, got none" in done.stderr


def test_compact_forgets_what_is_not_live_and_changes_nothing_that_is_served(
    grace, saved, no_model
):
    told(grace, "edit", "rm", 3, "--codebook", saved)
    before = store.load(saved)[0]
    kept = told(grace, "codebook", "compact", saved, "--keep", 2)
    assert (kept["forgotten"], kept["history"]) == (0, 4)
    done = told(grace, "codebook", "compact", saved)
    assert (done["forgotten"], done["edits"], done["history"]) == (2, 2, 2)
    assert done["bytes"] < done["bytes_before"]
    after = store.load(saved)[0]
    assert [edit.id for edit in after.history] == before.ids == [1, 4]
    for name in ("keys", "values", "radii"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    told(grace, "codebook", "verify", saved)
    # Edit 4 had superseded edit 0, which is forgotten.
    assert told(grace, "edit", "rm", 4, "--codebook", saved)["live_again"] == []
    assert (
        "forgot 1 deleted and superseded edits, kept 0"
        in grace("codebook", "compact", saved).stdout
    )
    assert grace("codebook", "compact", saved, "--keep", "-1").exit_code == 2
    missing = saved.parent / "absent"
    assert grace("codebook", "compact", missing).exit_code == 3
    assert not missing.exists()


KILLED = """
import os, signal
from grace_edit import GraceEditor
from grace_edit.__main__ import main
from grace_edit.cli import unfinished

unfinished.SAVE_EVERY = unfinished.SHARE = 0.0
honest, made = GraceEditor.edit, []

def edit(self, **given):
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(honest(self, **given))
    return made[-1]

GraceEditor.edit = edit
main()
"""


def test_a_file_whose_process_was_killed_goes_on_where_it_stopped(
    grace, gpt2, tmp_path, monkeypatch
):
    records = [{"prompt": prompt, "target": target} for prompt, target in PAIRS]
    refused = {"prompt": PAIRS[2][0], "target": "paris rome madrid oslo vienna warsaw"}
    records.insert(1, refused)
    path, out, whole = lines(tmp_path / "e.jsonl", *records), tmp_path / "out", tmp_path / "whole"
    command = ["edit", "add", "--model", gpt2, "--layer", LAYER, "--edits", path, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, command)], env=environment, capture_output=True
    )
    assert killed.returncode == -9, killed.stderr
    assert store.load(out)[0].ids == [0, 1]

    asked, honest = [], GraceEditor.edit

    def edit(self, **given):
        asked.append(given["prompt"])
        return honest(self, **given)

    monkeypatch.setattr(GraceEditor, "edit", edit)
    done, result = add(grace, gpt2, path, out)
    assert asked == [PAIRS[2][0], PAIRS[3][0]]
    assert done.exit_code == 4
    assert (result["done_before"], result["accepted"], result["refused"]) == (3, 4, 1)

    _, at_once = add(grace, gpt2, path, whole)
    assert _without_radii(result) == _without_radii(at_once)
    one, other = store.load(out)[0], store.load(whole)[0]
    for name in ("keys", "values", "radii"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.history == other.history
    # It is finished: from now on these are edits like any others.
    assert add(grace, gpt2, path, out)[0].exit_code == 4
    assert "adding" not in store.load(out)[1]


def _without_radii(result):
    """Later edits may make an entry smaller, and each call tells the radius that it sees."""
    return [{**row, "radius": None} for row in result["results"]]


def begun(grace, gpt2, path, out, monkeypatch, made=2):
    """Begin a file and be interrupted after some edits."""
    honest, count = GraceEditor.edit, []

    def edit(self, **given):
        if len(count) == made:
            raise KeyboardInterrupt
        count.append(1)
        return honest(self, **given)

    with monkeypatch.context() as patched:
        patched.setattr(GraceEditor, "edit", edit)
        done, _ = add(grace, gpt2, path, out)
    assert done.exit_code == 130, done.stderr


def test_only_the_file_that_was_begun_goes_on_and_only_with_its_options(
    grace, gpt2, tmp_path, monkeypatch
):
    records = [{"prompt": prompt, "target": target} for prompt, target in PAIRS]
    out = tmp_path / "out"
    path = lines(tmp_path / "e.jsonl", *records)
    begun(grace, gpt2, path, out, monkeypatch)
    other = lines(tmp_path / "other.jsonl", records[0], records[2])
    done, _ = add(grace, gpt2, other, out)
    assert done.exit_code == 4
    assert "holds saved edits" in done.stderr
    done, _ = add(grace, gpt2, path, out, "--radius", 2.0)
    assert done.exit_code == 2
    assert f"--radius must be left out for {out}, begun with None, got 2.0" in done.stderr
    # Lines behind those that are done may have changed.
    longer = lines(tmp_path / "longer.jsonl", *records[:2], records[3])
    done, result = add(grace, gpt2, longer, out)
    assert done.exit_code == 0, done.stderr
    assert (result["done_before"], result["accepted"], result["edits"]) == (2, 3, 3)


def test_an_edit_that_was_purged_meanwhile_stays_away(grace, gpt2, tmp_path, monkeypatch):
    records = [{"prompt": prompt, "target": target} for prompt, target in PAIRS[:3]]
    path, out = lines(tmp_path / "e.jsonl", *records), tmp_path / "out"
    begun(grace, gpt2, path, out, monkeypatch)
    assert grace("edit", "rm", 0, "--codebook", out, "--purge").exit_code == 0
    done, result = add(grace, gpt2, path, out)
    assert done.exit_code == 0, done.stderr
    assert result["results"][0]["reason"] == "purged since it was made"
    assert store.load(out)[0].ids == [1, 2]


def test_saving_in_between_takes_a_small_share_of_the_time(monkeypatch):
    clock, saves = [0.0], []
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: clock[0])
    saver = unfinished.Saver(None, None, [], {})

    def save():
        saves.append(clock[0])
        saver._last, saver._took = clock[0], 3.0

    monkeypatch.setattr(saver, "save", save)
    for _ in range(200):
        clock[0] += 1
        saver.save_if_due()
    assert saves == [20.0, 80.0, 140.0, 200.0]


def test_verify_checks_the_files_the_codebook_and_with_a_model_every_prompt(grace, saved, gpt2):
    checked = told(grace, "codebook", "verify", saved)
    assert (checked["edits"], checked["keys"], checked["misses"]) == (3, 4, None)
    checked = told(grace, "codebook", "verify", saved, "--model", gpt2)
    assert checked["misses"] == []
    shown = grace("codebook", "verify", saved).stdout
    assert "3 edits with 4 keys, " in shown
    assert "no model was asked" in shown


def test_verify_names_a_promise_that_is_broken(grace, saved):
    book, described, beside = store.load_all(saved)
    book.keys[1] += 1.0
    store.save(book, saved, described, beside)
    done = grace("codebook", "verify", saved)
    assert done.exit_code == 5
    assert done.stderr == f"error: {saved}: a promise is broken: a key is not its edit's query\n"


def test_verify_lists_edits_whose_prompts_have_other_queries_now(grace, saved, gpt2, monkeypatch):
    from grace_edit.editing.verification import Misfire

    missing = [Misfire(1, "padded", 2.0, 1.0)]
    monkeypatch.setattr(GraceEditor, "verify", lambda self, progress: missing)
    done = grace("codebook", "verify", saved, "--model", gpt2)
    assert done.exit_code == 1
    assert done.stderr == "error: 1 prompts miss their edits\n"
    assert "padded" in done.stdout


@pytest.fixture
def other(saved, tmp_path):
    """The same edits, but one has another target, one is gone and one is new."""
    book, described, beside = store.load_all(saved)
    prompt, query = book.edit(3).prompt, book.query_of(3)
    book.delete(1)
    book.insert(query, [20], book.values[0] + 1, prompt)
    book.insert(query + 50, [21], book.values[0] + 2, [5, 6, 7])
    out = tmp_path / "other"
    store.save(book, out, described, beside)
    return out


def test_diff_names_edits_of_one_side_and_other_targets(grace, saved, other, no_model):
    found = told(grace, "codebook", "diff", saved, other)
    assert [row["id"] for row in found["only_first"]] == [1]
    assert [row["id"] for row in found["only_second"]] == [6]
    (pair,) = found["differ"]
    assert (pair["first"]["id"], pair["second"]["id"]) == (3, 5)
    assert pair["in"] == ["target", "value"]
    assert (found["same"], found["other_kind"]) == (1, [])
    shown = grace("codebook", "diff", saved, other).stdout
    assert "only in A 1, only in B 1, differ 1, same 1" in shown
    assert "other target, value" in shown


def test_merge_refuses_conflicts_with_a_list_and_takes_the_preferred(
    grace, saved, other, tmp_path, no_model
):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    out = tmp_path / "both"
    done = grace("codebook", "merge", saved, other, "--out", out, "--json")
    assert done.exit_code == 4
    assert done.stderr.startswith(f"error: 1 edits of {other} contradict {saved}; nothing was")
    (pair,) = json.loads(done.stdout)["conflicts"]
    assert (pair["first"]["id"], pair["first"]["target"]) == (3, "paris")
    assert pair["second"]["id"] == 5
    assert not out.exists()
    merged = told(grace, "codebook", "merge", saved, other, "--out", out, "--prefer", "first")
    assert (merged["made"], merged["same"], len(merged["conflicts"])) == (1, 1, 1)
    book, described, _ = store.load_all(out)
    book.check()
    assert book.ids == [1, 3, 4, 5]
    assert described == store.load(saved)[1]
    assert grace("codebook", "merge", saved, other, "--out", out).exit_code == 4  # not written over
    last = tmp_path / "last"
    shown = grace("codebook", "merge", saved, other, "--out", last, "--prefer", "last")
    assert shown.exit_code == 0
    assert "made 2 edits of B, 1 were there, 1 conflicts, B's edits made" in shown.stdout
    assert store.load(last)[0].edit(3).state == "superseded"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_merge_refuses_edits_of_another_model_layer_or_query(grace, saved, tmp_path):
    book, described, beside = store.load_all(saved)
    described["model"]["fingerprint"]["below"] = "another"
    described["serving"]["layer"] = "transformer.h.0.mlp"
    other = tmp_path / "other"
    store.save(book, other, described, beside)
    done = grace("codebook", "merge", saved, other, "--out", tmp_path / "out")
    assert done.exit_code == 4
    assert done.stderr.rstrip().endswith("got another layer")  # of the model nothing is known then
    assert told(grace, "codebook", "diff", saved, other)["other_kind"] == ["layer"]
    described["serving"]["layer"] = store.load_all(saved)[1]["serving"]["layer"]
    third = tmp_path / "third"
    store.save(book, third, described, beside)
    assert told(grace, "codebook", "diff", saved, third)["other_kind"] == ["model"]


def test_exported_lines_are_edits_that_add_makes_again(grace, saved, gpt2, tmp_path):
    path, again = tmp_path / "out.jsonl", tmp_path / "again"
    exported = told(grace, "codebook", "export", saved, "--out", path)
    assert (exported["edits"], exported["as_ids"], exported["left_out"]) == (3, 0, 0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0] == {
        "prompt": PAIRS[1][0],
        "target": "oslo",
        "paraphrases": ["who wrote that long film"],
        "negatives": ["a good film"],
    }
    done, result = add(grace, gpt2, path, again)
    assert done.exit_code == 0, done.stderr
    assert result["edits"] == 3
    found = told(grace, "codebook", "diff", saved, again)
    assert (found["only_first"], found["only_second"]) == ([], [])
    assert all(pair["in"] == ["value"] for pair in found["differ"])
    assert grace("codebook", "export", saved, "--out", path).exit_code == 4  # not written over


def test_what_text_would_not_say_is_exported_as_ids_and_read_as_such(grace, saved, gpt2, tmp_path):
    book, described, beside = store.load_all(saved)
    ids = [7, 4, 8]  # an end token inside, which is no text
    book.insert(book.query_of(3) + 50, [30], book.values[0], ids)
    book.insert(book.query_of(3) + 90, [30], book.values[0])
    store.save(book, saved, described, beside)
    path = tmp_path / "out.jsonl"
    exported = told(grace, "codebook", "export", saved, "--out", path)
    assert (exported["edits"], exported["as_ids"], exported["left_out"]) == (4, 1, 1)
    last = path.read_text().splitlines()[-1]
    assert json.loads(last) == {"prompt": ids, "target": [30]}
    one = tmp_path / "one.jsonl"
    one.write_text(last)
    done, result = add(grace, gpt2, one, tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    assert store.load(tmp_path / "again")[0].edit(0).prompt == tuple(ids)
    assert result["results"][0]["prompt"] == ids


def test_exported_tensors_answer_as_the_edits_did(grace, saved, gpt2, tmp_path, no_model):
    path, out = tmp_path / "entries.safetensors", tmp_path / "imported"
    assert grace("edit", "rm", 3, "--codebook", saved).exit_code == 0  # leaves a dead slot
    entries = store.load(saved)[0].entries
    assert told(grace, "codebook", "export", saved, "--out", path)["entries"] == entries
    assert told(grace, "codebook", "import", path, "--out", out)["entries"] == entries
    before, described = store.load(saved)
    after, kept = store.load(out)
    after.check()
    assert kept == described
    asked = torch.cat([before.keys[:4] + shift for shift in (0.0, 1e-3, 0.5, 9.0)])
    (one, near), (other, far) = before.lookup(asked), after.lookup(asked)
    assert torch.equal(near, far)
    assert 0 < int((one >= 0).sum()) < len(one)
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        assert (a < 0) == (b < 0)
        if a >= 0:
            assert before.labels[a] == after.labels[b]
            assert torch.equal(before.values[a], after.values[b])
    assert grace("codebook", "import", path, "--out", out).exit_code == 4  # not written over


def test_an_imported_codebook_serves_its_model(grace, saved, tmp_path):
    path, out = tmp_path / "entries.safetensors", tmp_path / "imported"
    told(grace, "codebook", "export", saved, "--out", path)
    told(grace, "codebook", "import", path, "--out", out)
    answer = json.loads(grace("explain", PAIRS[2][0], "--codebook", out, "--json").stdout)
    assert (answer["hit"], answer["with_edits"].split()[0]) == (True, "paris")
    done = grace("edit", "undo", "--codebook", out)
    assert done.exit_code == 3  # no edit was made there
    assert "got imported ones, which `grace edit rm` takes back" in done.stderr


def test_tensors_of_another_program_are_taken_like_edits_of_the_model(grace, saved, tmp_path):
    path, out = tmp_path / "entries.safetensors", tmp_path / "imported"
    width = store.load(saved)[0].keys.shape[1]
    tensors = {
        "keys": torch.randn(3, width),
        "values": torch.randn(3, width),
        "radii": torch.tensor([0.1, 0.2, 0.3]),
        "labels": torch.tensor([[5, 6], [7, 8], [9, 10]]),
    }
    save_file(tensors, path)
    done = grace("codebook", "import", path, "--out", out)
    assert done.exit_code == 5
    assert "does not say of which model it is" in done.stderr
    assert told(grace, "codebook", "import", path, "--out", out, "--like", saved)["entries"] == 3
    book, described = store.load(out)
    assert book.labels == [(5, 6), (7, 8), (9, 10)]
    assert torch.equal(book.radii[:3], tensors["radii"])
    assert described["serving"] == store.load(saved)[1]["serving"]
    save_file({**tensors, "keys": torch.randn(3, width + 1)}, path)
    done = grace("codebook", "import", path, "--out", tmp_path / "other", "--like", saved)
    assert done.exit_code == 2
    assert f"keys must be [N, {width}]" in done.stderr
    path.write_bytes(b"nonsense")
    done = grace("codebook", "import", path, "--out", tmp_path / "other", "--like", saved)
    assert (done.exit_code, done.stderr.count("\n")) == (5, 1)


def test_json_lines_are_not_imported_but_made(grace, edits_file, tmp_path):
    path = edits_file(PAIRS[0])
    done = grace("codebook", "import", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"grace edit add --edits {path}" in done.stderr
