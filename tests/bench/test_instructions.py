"""The driver whose instructions are counted, and the report of the counts; no valgrind needed."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest

from benchmarks.instructions import __main__ as instructions


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    if shutil.which(instructions.COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler ({instructions.COMPILER[0]})")
    plain = instructions.FLAGS.replace("-O3", "-O0")  # compiles in less than half the time
    return instructions.compiled(tmp_path_factory.mktemp("driver"), plain)


def small_cases() -> list[instructions.Case]:
    keys, query = instructions.drawn(300, 40, 8)  # as many queries as take the product
    radii = keys.new_ones(300).float()
    return [
        instructions.Case("nearest", query, keys, radii),
        instructions.pruned_case(5000, 72),
    ]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name.partition(",")[0])
def test_the_driver_gives_the_answers_of_the_reference(driver, tmp_path, case):
    assert (case.expected()[0] >= 0).all()
    file = instructions.written(case, tmp_path / "case")
    isa, _ = instructions.answered([str(driver), str(file)], case)
    assert isa in ("avx2", "baseline")


def test_a_wrong_answer_of_the_driver_is_not_counted(driver, tmp_path):
    other, case = small_cases()
    file = instructions.written(case, tmp_path / "case")
    case = dataclasses.replace(case, query=other.query[:1, :1].expand(1, 72))
    with pytest.raises(RuntimeError, match="answers must be the reference's"):
        instructions.answered(
            [str(driver), str(file)], dataclasses.replace(case, query=case.query[:1])
        )


FIGURES = {
    "compiler": "c++ 1",
    "flags": "-O3",
    "margin": 0.02,
    "counts": {
        "a": {"isa": "avx2", "instructions": 1000},
        "b": {"isa": "avx2", "instructions": 1000},
    },
}


def changed(instructions: int = 1000, **other: str) -> dict:
    now = copy.deepcopy({**FIGURES, **other})
    now["counts"]["b"]["instructions"] = instructions
    return now


@pytest.mark.parametrize(
    ("count", "ratio", "flagged"),
    [(1020, "1.020", False), (1021, "1.021  MORE", True), (979, "0.979  fewer", False)],
)
def test_a_count_beyond_the_margin_is_flagged(count, ratio, flagged):
    lines, above = instructions.report(changed(count), FIGURES)
    assert above is flagged
    assert [line.split(maxsplit=3)[3] for line in lines[1:]] == ["1.000", ratio]


def test_another_compiler_is_named_and_another_instruction_set_not_compared():
    now = changed(5000, compiler="c++ 2")
    now["counts"]["b"]["isa"] = "baseline"
    lines, above = instructions.report(now, FIGURES)
    assert lines[0] == "compiler c++ 2, committed with c++ 1"
    assert lines[-1].endswith("(baseline, nothing committed)")
    assert not above


def test_a_machine_without_valgrind_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "valgrind" else name)
    for arguments, status in ([], 0), (["--strict"], 1):
        monkeypatch.setattr("sys.argv", ["instructions", *arguments])
        assert instructions.main() == status
        assert capsys.readouterr().out == "nothing was counted: there is no valgrind here\n"
