"""A lifelong run: what is asked when, what the figures are, and that a kill changes none."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counting import record
from fake_method import PROTOCOL, UPSTREAM, FakeMethod, records
from grace_edit import GraceConfig
from grace_edit.evaluation import Grace, Protocol, run_stream
from grace_edit.evaluation.journal import Journal, read_units
from grace_edit.evaluation.results import (
    Figure,
    easyedit,
    figures_of,
    growth_of,
    headline,
    misses_of,
    ratios_of,
    to_csv,
)
from grace_edit.evaluation.run import Said

COUNT = 7


class Killed(BaseException):
    """What a kill is inside one process: nothing catches it, nothing is tidied."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one process nobody can see whether the disk was waited for."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a stream and kills it at some write."""
    add, save = Journal.add, Journal.save

    def run(go: Callable[[], Any], writes: int, how: str) -> None:
        left = [writes]

        def count() -> bool:
            left[0] -= 1
            return left[0] == 0

        def adding(journal: Journal, unit: str, found: dict[str, Any]) -> None:
            last = count()
            if last and how == "before":
                raise Killed
            if last and how == "torn":
                with open(journal.directory / "journal.jsonl", "ab") as file:
                    file.write(b'{"unit": "edit/1", "acc')
                raise Killed
            add(journal, unit, found)
            if last:
                raise Killed

        def saving(journal: Journal, edits: int, write: Callable[[Path], None]) -> None:
            last = count()
            if last and how == "torn":
                torn = journal.directory / "state" / f"{edits:06d}.new"
                torn.mkdir()
                (torn / "a.json").write_text("{")
                raise Killed
            if last and how == "before":
                raise Killed
            save(journal, edits, write)
            if last:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", adding)
            patch.setattr(Journal, "save", saving)
            with pytest.raises(Killed):
                go()

    return run


def run_fake(out: Path, **settings: Any) -> dict[str, Any]:
    return run_stream(FakeMethod, records(COUNT), out, PROTOCOL, upstream=UPSTREAM, **settings)


def without_times(figures: list[Figure]) -> list[Figure]:
    return [figure for figure in figures if "seconds" not in figure.score]


def all_of(units: dict[str, Any], count: int = COUNT) -> Any:
    """Everything that is made of a run, clock times aside."""
    edited = easyedit(units, records(count)) if count == COUNT else []
    for one in edited:
        del one["time"]
    growth = growth_of(units, count)
    return without_times(figures_of("fake", units, count)), growth, ratios_of(units, count), edited


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    """What a run that nobody stops ends with, and how often it writes to the disk."""
    writes = [0]
    add, save = Journal.add, Journal.save
    with pytest.MonkeyPatch.context() as patch:

        def adding(*given: Any) -> None:
            writes[0] += 1
            add(*given)

        def saving(*given: Any) -> None:
            writes[0] += 1
            save(*given)

        patch.setattr(Journal, "add", adding)
        patch.setattr(Journal, "save", saving)
        units = run_fake(tmp_path_factory.mktemp("whole"))
    return all_of(units), writes[0]


@pytest.mark.parametrize("how", ["before", "torn", "after"])
def test_a_run_killed_at_any_unit_ends_with_the_same_figures(
    how: str, whole: tuple[Any, int], killed: Callable[..., None], tmp_path: Path
) -> None:
    expected, writes = whole
    assert writes > 30
    for at in range(1, writes + 1):
        out = tmp_path / str(at)
        killed(lambda out=out: run_fake(out), at, how)
        # And once more, from the log that it left.
        for _ in range(2):
            assert all_of(run_fake(out)) == expected, f"killed at write {at}"


def test_a_run_killed_again_and_again_ends_with_the_same_figures(
    whole: tuple[Any, int], killed: Callable[..., None], tmp_path: Path
) -> None:
    expected, writes = whole
    deaths = 0
    for _ in range(writes):
        try:
            killed(lambda: run_fake(tmp_path), 5, "after")
            deaths += 1
        except pytest.fail.Exception:  # it came to its end
            break
    assert deaths > 5
    assert all_of(run_fake(tmp_path)) == expected


@pytest.mark.parametrize(("lines", "how"), [(4, "whole"), (9, "torn")])
def test_a_process_that_gets_kill_9_goes_on_in_another(
    lines: int, how: str, whole: tuple[Any, int], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("fake_method.py")
    done = subprocess.run([sys.executable, script, tmp_path, str(lines), how], timeout=1200)
    assert done.returncode == -signal.SIGKILL
    text = (tmp_path / "journal.jsonl").read_text()
    assert text.endswith("\n") == (how == "whole")
    assert all_of(run_fake(tmp_path)) == whole[0]


def test_finished_units_are_not_done_again(killed: Callable[..., None], tmp_path: Path) -> None:
    killed(lambda: run_fake(tmp_path), 30, "after")
    done = len((tmp_path / "journal.jsonl").read_text().splitlines())
    made: list[FakeMethod] = []

    def make() -> FakeMethod:
        made.append(FakeMethod())
        return made[-1]

    run_stream(make, records(COUNT), tmp_path, PROTOCOL, upstream=UPSTREAM)
    again = len((tmp_path / "journal.jsonl").read_text().splitlines()) - done
    assert again < 20
    # Edits after the last saved state alone are made again.
    assert len([call for call in made[0].calls if call[0] == "edit"]) <= PROTOCOL.save_every
    assert made[0].closed
    # A run that is done asks nobody.
    run_stream(make, records(COUNT), tmp_path, PROTOCOL, upstream=UPSTREAM)
    assert len(made) == 1


def test_the_last_state_alone_is_kept(tmp_path: Path) -> None:
    run_fake(tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == [f"{COUNT:06d}"]


def by_name(figures: list[Figure]) -> dict[tuple[int, str, str, str], float | None]:
    """Values by what they are of; teacher-forced locality by a name of its own."""
    found = {}
    for f in figures:
        forced = f.protocol == "forced" and f.score == "unchanged"
        found[f.edits, f.metric, "agreement" if forced else f.score, f.among] = f.value
    assert len(found) == len(figures)
    return found


def test_the_figures_of_a_stream_worked_out_by_hand(tmp_path: Path) -> None:
    method = FakeMethod()
    units = run_stream(lambda: method, records(COUNT), tmp_path, PROTOCOL, upstream=UPSTREAM)
    taken = set(method.facts)
    accepted = [f"fact {i} is" in taken for i in range(COUNT)]
    assert 0 < sum(accepted) < COUNT  # or the case says little
    share = sum(accepted) / COUNT
    found = by_name(figures_of("fake", units, COUNT))
    last = COUNT
    assert found[last, "stream", "accepted", "attempted"] == share
    assert found[last, "stream", "right before", "attempted"] == 0
    assert found[last, "stream", "keys", "accepted"] == sum(accepted)
    assert found[last, "stream", "edits per key", "accepted"] == 1
    # An edit that was refused counts as one that did not succeed.
    assert found[last, "ES", "exact", "attempted"] == share
    assert found[last, "ERR", "exact", "attempted"] == share
    assert found[last, "ERR", "exact", "accepted"] == 1
    assert found[last, "ERR", "fires", "accepted"] == 1
    assert found[last, "ERR", "right edit", "accepted"] == 1
    assert found[2, "ERR", "exact", "attempted"] == sum(accepted[:2]) / 2
    # Two tokens a target: one always leads, the other where the answer is right.
    assert found[last, "ERR", "accuracy", "accepted"] == 1
    assert found[last, "ERR", "accuracy", "attempted"] == pytest.approx(0.5 + share / 2)
    # One of three paraphrases begins with the prompt, one with that of the next record.
    assert found[last, "generality", "exact", "accepted"] == pytest.approx(1 / 3)
    assert found[last, "generality", "right edit", "accepted"] == pytest.approx(1 / 3)
    others = [accepted[(i + 1) % COUNT] for i in range(COUNT) if accepted[i]]
    fires = (1 + sum(others) / len(others)) / 3
    assert fires > 1 / 3
    assert found[last, "generality", "fires", "accepted"] == pytest.approx(fires)
    assert found[last, "generality", "exact where right", "accepted"] == 1
    # With the right edit forced the third is said as well; behind "indeed" nothing is.
    assert found[last, "generality", "exact, right edit forced", "accepted"] == pytest.approx(2 / 3)
    made = sum(accepted)
    assert misses_of(units, COUNT) == {
        "produced": made,
        "lucky": 0,
        "refused": 3 * (COUNT - made),
        "scope": made,
        "decoding": 0,
        "both": made,
    }
    assert found[last, "portability", "exact", "accepted"] == 1
    assert found[last, "neighbour", "fires", "attempted"] == 0
    assert found[last, "neighbour", "unchanged", "attempted"] == 1
    # "blue" is right and "red" is not, edited or not.
    assert found[0, "TRR", "exact", "all"] == found[last, "TRR", "exact", "all"] == 0.5
    assert found[last, "TRR", "f1", "all"] == 0.5
    assert found[last, "TRR", "fires", "all"] == 0
    assert (last, "TRR", "grace_f1", "all") not in found  # an encoder–decoder's
    # mean of exp(.25) and exp(1.25), each over two tokens
    assert found[0, "TRR", "perplexity", "all"] == pytest.approx((1.2840254 + 3.4903430) / 2)
    growth = growth_of(units, COUNT)
    assert [one.keys for one in growth] == [sum(accepted[: n + 1]) for n in range(COUNT)]
    ratios = ratios_of(units, COUNT)
    assert ratios["neighbour"] == [2.0] * COUNT
    assert sorted(set(ratios["edit"])) == [0.0, 2.0]


def test_prompts_that_no_edit_answers_are_generated_on_a_sample_alone(tmp_path: Path) -> None:
    method = FakeMethod()
    few = Protocol(verify_every=10**6)
    units = run_stream(lambda: method, records(COUNT), tmp_path, few, upstream=UPSTREAM)
    assert ("ask", "fact 00 is") not in method.calls
    assert ("ask", "fact 0 has") not in method.calls
    assert method.calls.count(("ask", "the sky is blue")) == 1  # before the first edit
    assert units["rest/0"]["neighbour"] == [
        {"fires": False, "distance": 2.0, "radius": 1.0, "same": True, "agreement": 1.0}
    ]
    scores = {figure.score for figure in figures_of("fake", units, COUNT)}
    assert "unchanged where none fires, verified" not in scores


def test_the_sample_shows_a_method_that_changes_what_it_does_not_answer(tmp_path: Path) -> None:
    every = Protocol(verify_every=1)
    score = "unchanged where none fires, verified"
    for leaky, value in ((False, 1.0), (True, 0.0)):
        units = run_stream(
            lambda leaky=leaky: FakeMethod(leaky=leaky),
            records(COUNT),
            tmp_path / str(leaky),
            every,
            upstream=UPSTREAM,
        )
        found = by_name(figures_of("fake", units, COUNT))
        assert found[COUNT, "neighbour", score, "all"] == value
        assert found[COUNT, "same_subject", score, "all"] == value
        assert found[COUNT, "TRR", score, "all"] == value
        assert found[COUNT, "neighbour", "unchanged", "attempted"] == value


def test_a_method_that_cannot_tell_is_compared_by_its_answers(tmp_path: Path) -> None:
    units = run_stream(
        lambda: FakeMethod(blind=True, leaky=True), records(COUNT), tmp_path, Protocol()
    )
    found = by_name(figures_of("fake", units, COUNT))
    assert found[COUNT, "neighbour", "unchanged", "attempted"] == 0
    assert (COUNT, "neighbour", "fires", "attempted") not in found
    assert ratios_of(units, COUNT) == {}


def test_what_the_unedited_model_says_is_asked_once_for_all_methods(tmp_path: Path) -> None:
    known: Said = {}
    asked = []
    for number in range(2):
        method = FakeMethod(blind=True)
        run_stream(
            lambda method=method: method,
            records(3),
            tmp_path / str(number),
            PROTOCOL,
            unedited=known,
        )
        asked.append(sum(call == ("ask", "fact 00 is") for call in method.calls))
    assert asked == [2, 1]
    first, second = (all_of(read_units(tmp_path / str(number)), 3) for number in range(2))
    assert first == second
    assert first[0]


def test_only_errors_leaves_out_what_the_model_answers_right(tmp_path: Path) -> None:
    right = [*records(2), *records(4)[2:]]
    right[1] = type(right[1])(id="1", prompt="the sky is blue", target="blue")
    method = FakeMethod()
    protocol = Protocol(only_errors=True)
    units = run_stream(lambda: method, right, tmp_path, protocol)
    assert units["edit/1"]["skipped"]
    assert ("edit", "the sky is blue") not in method.calls
    counts = {f.count for f in figures_of("fake", units, 4) if f.score == "accepted"}
    assert counts == {3}
    assert [one["case_id"] for one in easyedit(units, right)] == ["0", "2", "3"]


def test_fewer_past_edits_on_the_way_are_spread_and_all_are_asked_at_the_end(
    tmp_path: Path,
) -> None:
    protocol = Protocol(every=4, most_past=2)
    units = run_stream(FakeMethod, records(5), tmp_path, protocol)
    asked = [name for name in units if name.startswith("err/")]
    assert asked == ["err/4/1", "err/4/3", *(f"err/5/{i}" for i in range(5))]


def test_a_protocol_refuses_numbers_below_one() -> None:
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        Protocol(every=0)


def test_the_csv_holds_every_figure_and_says_its_protocol(tmp_path: Path) -> None:
    figures = figures_of("fake", run_fake(tmp_path), COUNT)
    lines = to_csv(figures).splitlines()
    assert lines[0] == "method,edits,metric,protocol,score,among,value,count"
    assert len(lines) == 1 + len(figures)
    protocols = {figure.protocol for figure in figures if figure.metric == "ERR"}
    assert protocols == {"free", "forced", "scope"}


def test_easyedits_keys_are_kept(tmp_path: Path) -> None:
    first = easyedit(run_fake(tmp_path), records(COUNT))[0]
    assert first["requested_rewrite"]["target_new"] == "new0"
    assert set(first) == {"case_id", "requested_rewrite", "time", "pre", "post"}
    assert first["pre"]["rewrite_acc"] == [0.5]
    post = first["post"]
    assert set(post) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
    assert len(post["rephrase_acc"]) == 3
    assert post["locality"] == {"neighborhood_acc": [1.0]}  # nothing is forced without an answer
    assert set(post["portability"]) == {"Reasoning_acc"}


def test_a_stream_needs_records_and_upstream_answers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records must hold at least one edit"):
        run_stream(FakeMethod, [], tmp_path, PROTOCOL)
    with pytest.raises(ValueError, match="upstream must have answers, got none for 'fact 0 has'"):
        run_stream(FakeMethod, records(1), tmp_path, PROTOCOL, upstream=records(1)[0].same_subject)


# With the editor itself

CONFIG = GraceConfig(layer="transformer.h.1.mlp", radius=0.5)
STREAM = [record(i) for i in range(4)]


@pytest.fixture
def graced(asked: Callable[[str], Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the stream with GRACE on a fresh small GPT-2."""

    def run(out: Path) -> dict[str, Any]:
        protocol = Protocol(every=2, save_every=3, verify_every=2)
        return run_stream(
            lambda: Grace(asked("gpt2"), CONFIG),
            STREAM,
            out,
            protocol,
            upstream=STREAM[0].unrelated,
        )

    return run


def test_grace_is_measured_right_and_resumes_to_the_same_figures(
    graced: Callable[..., dict[str, Any]],
    asked: Callable[[str], Any],
    killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    units = graced(tmp_path / "whole")
    expected = without_times(figures_of("grace", units, 4))
    short = headline(expected, "grace")
    assert short["accepted"] == short["ERR of accepted"] == short["ES"] == 1
    assert short["keys"] == 4
    assert short["ERR perplexity"] < 2
    assert short["neighbour unchanged"] == 1
    verified = [f for f in expected if f.score == "unchanged where none fires, verified"]
    assert sum(figure.count for figure in verified) > 3
    assert all(figure.value == 1 for figure in verified)
    assert ratios_of(units, 4)["edit"] == [0.0] * 4
    # What the log says of a paraphrase is what a fresh model with the saved codebook says.
    again = Grace(asked("gpt2"), CONFIG)
    again.restore(tmp_path / "whole" / "state" / "000004")
    told, _ = again.ask(STREAM[0].paraphrases[0], STREAM[0].target)
    assert units["rest/0"]["paraphrase"][0]["answer"] == told.text
    # Forced, an edit answers prompts it does not reach; afterwards it does not.
    far = record(9)
    own, _ = again.ask(far.prompt, STREAM[0].target)
    with again.answering(0):
        assert again.ask(far.prompt, STREAM[0].target)[0].text != own.text
        assert again.ask(STREAM[0].prompt, STREAM[0].target)[0].text == STREAM[0].target
        assert again.ask(STREAM[1].prompt, STREAM[1].target)[0].text != STREAM[1].target
    assert again.ask(far.prompt, STREAM[0].target)[0] == own
    for at in (5, 14):
        out = tmp_path / str(at)
        killed(lambda out=out: graced(out), at, "after")
        assert without_times(figures_of("grace", graced(out), 4)) == expected
        shutil.rmtree(out)
