"""The compiled library: what it needs from outside, and which instruction set it uses."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import grace_kernels

from .conftest import COMPILED, ISAS
from .test_compile import in_a_fresh_process

compiled = pytest.mark.skipif(not COMPILED, reason="not compiled")
LIBRARY = Path(grace_kernels.__file__).with_name("_C.so")

# C, C++ and compiler run-time symbols, and torch's stable C interface. Nothing of Python's, and
# nothing of torch's C++ (at::, c10::, torch::), whose names change from version to version.
ALLOWED = re.compile(
    r"(.*@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_[\w.]+"
    r"|_ZN?[KVRO]*S[taosbid]\w*|_ZT[ISV]S\w*|__gmon_start__|_ITM_\w+|__cxa_finalize|__tls_get_addr"
    r"|aoti_torch_\w+)"
)
# Of the newer torch_* functions those that torch 2.10, the oldest supported, has: a library that
# needs another one does not load there.
ALLOWED_TORCH = {
    "torch_call_dispatcher",
    "torch_delete_list",
    "torch_delete_string",
    "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr",
    "torch_get_num_threads",
    "torch_library_impl",
    "torch_list_push_back",
    "torch_new_list_reserve_size",
    "torch_new_string_handle",
    "torch_parallel_for",
    "torch_string_c_str",
    "torch_string_length",
}


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF symbol names")
def test_the_library_needs_only_the_c_and_cpp_run_time_and_torchs_stable_interface() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "torch_library_impl" in symbols
    symbols = [name for name in symbols if name not in ALLOWED_TORCH]
    assert [name for name in symbols if not ALLOWED.fullmatch(name)] == []
    assert [name for name in symbols if name.startswith("_ZN2at") or name.startswith("Py")] == []


@compiled
def test_build_info_says_what_answers() -> None:
    info = grace_kernels.build_info()
    assert info["chosen"]["cpu"] == "cpu"
    assert info["cpu"]["isa"] in info["cpu"]["isas"]
    assert info["cpu"]["isas"][-1] == "baseline"
    assert info["torch"] == torch.__version__


@compiled
@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_instruction_set(name: str) -> None:
    code = "import grace_kernels; print(grace_kernels.build_info()['cpu']['isa'])"
    assert in_a_fresh_process(code, GRACE_KERNELS_ISA=name).strip() == name


@compiled
def test_the_widest_instruction_set_of_the_machine_is_used() -> None:
    code = "import grace_kernels; print(grace_kernels.build_info()['cpu']['isa'])"
    widest = next(name for name in ("avx512", "avx2", "baseline") if name in ISAS)
    assert in_a_fresh_process(code, GRACE_KERNELS_ISA="").strip() == widest


@compiled
def test_an_instruction_set_that_cannot_run_is_a_clear_error() -> None:
    printed = in_a_fresh_process(
        """
        import grace_kernels, torch
        for ask in (
            grace_kernels.build_info,
            lambda: grace_kernels.lookup(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)),
        ):
            try:
                ask()
            except ValueError as error:
                print(error)
        """,
        GRACE_KERNELS_ISA="avx1024",
    )
    expected = r"GRACE_KERNELS_ISA must be one of \S*baseline on this machine, got avx1024\n"
    assert re.fullmatch(f"({expected}){{2}}", printed), printed


def test_without_the_library_the_reference_answers_and_says_why(tmp_path: Path) -> None:
    package = tmp_path / "grace_kernels"
    shutil.copytree(LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    printed = in_a_fresh_process(
        """
        import grace_kernels, torch
        info = grace_kernels.build_info()
        print(info["chosen"]["cpu"], "|", info["cpu"]["reason"], "|", info["cpu"]["remedy"])
        print(grace_kernels.lookup(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3))[0].item())
        try:
            grace_kernels.lookup(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3), backend="cpu")
        except grace_kernels.BackendUnavailable as error:
            print(error)
        """,
        PYTHONPATH=str(tmp_path),
        PYTHONSAFEPATH="1",
    )
    chosen, answer, error = printed.splitlines()
    assert chosen.startswith("reference | the compiled library _C.so was not built | install a C++")
    assert answer == "0"
    assert error.startswith("backend 'cpu': the compiled library _C.so was not built; install")
