"""The CUDA library, compiled but not run: symbols, spills, what the machine code loads.

Its arithmetic is tested in `cuda_emulation`, on a CPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .test_library import ALLOWED, ALLOWED_TORCH

ROOT = Path(__file__).parents[2]
KERNELS = 2 * 13  # 3 of direct_kernel for each of three dtypes, 2 of tensor_kernel for two; pruned
FORMS = 3 * (4 + 1 + 1)  # for each dtype 4 of exact_kernel, apart_kernel, coordinates_kernel
WARPGROUPS = 2 * 3  # of warpgroup_kernel, for two dtypes; empty but for sm_90a


def tool(name: str) -> str | None:
    """Return where a CUDA tool is: on the path, in a toolkit, or in Triton, which ships some."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/bin" for home in homes if home]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


@dataclass(frozen=True)
class Built:
    """A library and what the build said."""

    library: Path
    said: str


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """_C_cuda.so, built by setup.py in a copy of the tree that has no CPU kernels to compile."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree")
    if shutil.which("nvcc") is None and tool("nvcc") is None:
        pytest.skip("there is no nvcc")
    if shutil.which("c++") is None and "CXX" not in os.environ:
        pytest.skip("there is no C++ compiler")
    tree = tmp_path_factory.mktemp("cuda_build") / "tree"
    for name in ("csrc", "grace_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pyc*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    (tree / "csrc" / "cpu" / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    environment = {name: v for name, v in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=1800,
        env={**environment, "GRACE_KERNELS_COMPILE": "cuda"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Built(tree / "grace_kernels" / "_C_cuda.so", done.stdout + done.stderr)


def cuobjdump(built: Built, *options: str) -> str:
    """Return what cuobjdump prints about the library."""
    program = tool("cuobjdump")
    if program is None:
        pytest.skip("there is no cuobjdump")
    done = subprocess.run(
        [program, *options, str(built.library)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Macros and functions of the stable interface that are newer than torch 2.10.
NEWER = re.compile(
    r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b|\bTORCH_VERSION_2_1[1-9]_|\bfrom_blob\b"
    r"|\bGenerator\b|\btorch_\w*generator\w*|\btorch_exception_get_what\w*|\btorch_tag_\w+"
    r"|\btorch_library_(def_with_tags|set_python_module)\b|\bset_python_module\b"
    r"|\btorch_(stream_native_handle|new_stable_ivalue|delete_stable_ivalue)\b"
    r"|\bnative_?[hH]andle\b"
)


def test_the_sources_use_nothing_newer_than_the_oldest_torch() -> None:
    sources = sorted((ROOT / "csrc").glob("**/*.[chi]*"))
    if not sources:
        pytest.skip("no source tree")
    assert {ROOT / "csrc" / "cuda" / "lookup.cu", ROOT / "csrc" / "operators.h"} <= {*sources}
    found = {path.name: NEWER.search(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: hit[0] for name, hit in found.items() if hit} == {}


def test_the_library_needs_only_the_c_and_cpp_run_time_and_torchs_stable_interface(
    built: Built,
) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(built.library)],
        capture_output=True,
        text=True,
        check=True,
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "torch_library_impl" in symbols
    assert "aoti_torch_get_current_cuda_stream" in symbols
    symbols = [name for name in symbols if name not in ALLOWED_TORCH]
    assert [name for name in symbols if not ALLOWED.fullmatch(name)] == []


def test_nothing_of_the_cuda_run_time_is_left_to_be_found(built: Built) -> None:
    listed = subprocess.run(
        ["nm", "-D", str(built.library)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert [name for name in names if name.startswith(("cuda", "cu", "__cuda"))] == []


def test_no_kernel_spills_registers_or_has_a_stack(built: Built) -> None:
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+a?)'\n.*\n\s*"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        built.said,
    )
    assert sorted({arch for _, arch, *_ in found}) == ["sm_80", "sm_90a"]
    assert len(found) == 2 * (KERNELS + FORMS + WARPGROUPS)
    assert [entry for entry in found if entry[2:] != ("0", "0", "0")] == []
    functions = re.findall(r"\d+ bytes spill stores, \d+ bytes spill loads", built.said)
    assert set(functions) == {"0 bytes spill stores, 0 bytes spill loads"}


def test_there_is_machine_code_for_sm_80_and_sm_90_and_ptx_for_what_comes_after(
    built: Built,
) -> None:
    # Older ones leave out the a of sm_90a.
    cubins = re.findall(r"\.(sm_\d+)a?\.cubin", cuobjdump(built, "--list-elf"))
    assert sorted(set(cubins)) == ["sm_80", "sm_90"]
    assert set(re.findall(r"\.(sm_\d+)\.ptx", cuobjdump(built, "--list-ptx"))) == {"sm_90"}


def loops(ptx: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of every loop of every kernel, the kernel's name first."""
    for entry in ptx.split(".visible .entry ")[1:]:
        name = entry.split("(")[0]
        lines = entry.split("\n.func")[0].split("\n.visible")[0].splitlines()
        places = {
            line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line.strip())
        }
        for at, line in enumerate(lines):
            branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
            if branch and places.get(branch[1], at) < at:
                yield name, lines[places[branch[1]] : at + 1]


def test_the_scan_loads_16_bytes_at_a_time_and_has_no_double_precision(built: Built) -> None:
    ptx = cuobjdump(built, "--dump-ptx")
    scans: dict[str, list[list[str]]] = {}
    for name, lines in loops(ptx):
        body = "\n".join(lines)
        # What overlaps loads with arithmetic; the smallest such loop of a kernel is its scan.
        if "cp.async.cg" in body and re.search(r"\bsub\.f32|mma\.sync", body):
            scans.setdefault(name, []).append(lines)
    assert len(scans) == KERNELS
    for name, found in scans.items():
        body = "\n".join(min(found, key=len))
        assert ".f64" not in body, name
        assert re.search(r"cp\.async\.cg\.shared\.global\S* \[%\w+\], \[%\w+\], 16;", body), name
        assert not re.search(r"ld\.global\.(nc\.)?[usbf]\d+ ", body), name
        if re.search(r"tensor_(pruned_)?kernel", name):
            assert "ldmatrix.sync.aligned.m8n8.x4" in body, name
            assert "mma.sync.aligned.m16n8k16" in body, name
        else:
            assert "ld.global.v4" in body, name
            assert ".f64" not in body, name


def test_the_sketch_of_a_query_takes_tensor_cores_and_16_byte_loads(built: Built) -> None:
    found = set()
    for name, lines in loops(cuobjdump(built, "--dump-ptx")):
        body = "\n".join(lines)
        if "cp.async" not in body and "m16n8k16.row.col.f32.bf16.bf16.f32" in body:
            assert "cvt.rn.bf16x2.f32" in body, name
            assert "ld.global.v4" in body, name
            assert ".f64" not in body, name
            found.add(name)
    pruned = {name for name in found if "_pruned_kernel" in name}
    assert len(pruned) == KERNELS // 2
    # A block of those has 32 elements a warp: the compiler may see that this is no loop.
    assert all("coordinates_kernel" in name for name in found - pruned)


def test_the_exact_scan_copies_16_bytes_at_a_time_and_adds_doubles_unfused(built: Built) -> None:
    ptx = cuobjdump(built, "--dump-ptx")
    scans: dict[str, list[list[str]]] = {}
    for name, lines in loops(ptx):
        body = "\n".join(lines)
        ours = re.search("exact_kernel|apart_kernel", name)
        if ours and "cp.async.cg" in body and "sub.rn.f64" in body:
            scans.setdefault(name, []).append(lines)
    assert len(scans) == 3 * (4 + 1)
    for name, found in scans.items():
        body = "\n".join(min(found, key=len))
        assert re.search(r"cp\.async\.cg\.shared\.global\S* \[%\w+\], \[%\w+\], 16;", body), name
        assert "ld.shared.v4" in body, name
        assert "mul.rn.f64" in body, name
        assert "add.rn.f64" in body, name
        assert not re.search(r"ld\.global\.(nc\.)?[usbf]\d+ ", body), name
        assert ".local" not in body, name


def functions(sass: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the machine code of every kernel of an architecture."""
    for part in re.split(r"\bFunction : ", sass)[1:]:
        name, _, code = part.partition("\n")
        yield name.strip(), code


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_machine_code_of_the_exact_form_is_what_was_meant(built: Built, arch: str) -> None:
    told = {}
    for name, code in functions(cuobjdump(built, "--dump-sass", "-arch", arch)):
        if "exact_kernel" in name or "apart_kernel" in name:
            told[name] = code
    assert len(told) == 3 * (4 + 1)
    for name, code in told.items():
        assert re.search(r"\bDADD\b", code), name
        assert re.search(r"\bDMUL\b", code), name
        assert not re.search(r"\bDFMA\b", code), name
        assert re.search(r"\bLDGSTS\S*\.128\b", code), name
        assert re.search(r"\bLDS\.128\b", code), name
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_the_scan_by_warpgroups_multiplies_what_lies_in_shared_memory(built: Built) -> None:
    told = {}
    for name, code in functions(cuobjdump(built, "--dump-sass", "-arch", "sm_90")):
        if "warpgroup_kernel" in name:
            told[name] = code
    assert len(told) == WARPGROUPS
    for name, code in told.items():
        assert re.search(r"\bHGMMA\.64x(128|32)x16\.F32", code), name
        assert re.search(r"\bLDGSTS\S*\.128\b", code), name
        assert re.search(r"\bLDS\.128\b", code), name
        assert len(re.findall(r"\bUSETMAXREG", code)) == 2, name
        assert not re.search(r"\b(LDL|STL|HMMA|DFMA)\b", code), name
    # What the assembler says where it cannot do as it was told.
    assert re.findall(r".*(?:serialized|setmaxnreg).*", built.said) == []
    # With fewer than these the warpgroups that multiply would wait for registers for ever.
    registers = re.findall(
        r"entry function '\w*warpgroup_kernel\w*' for 'sm_90a'\n(?:.*\n){2}.*Used (\d+)", built.said
    )
    assert registers == ["168"] * WARPGROUPS


def test_dependent_launches_are_compiled_where_there_are_some(built: Built) -> None:
    ptx = cuobjdump(built, "--dump-ptx")
    waits = {
        entry.split("(")[0]
        for entry in ptx.split(".visible .entry ")[1:]
        if "griddepcontrol.wait" in entry
    }
    assert sum("apart_kernel" in name for name in waits) == 3
    assert sum("_pruned_kernel" in name for name in waits) == KERNELS // 2
    assert "griddepcontrol.launch_dependents" in ptx


def test_the_canonical_sum_is_not_fused(built: Built) -> None:
    ptx = cuobjdump(built, "--dump-ptx")
    assert "mul.rn.f64" in ptx
    assert "add.rn.f64" in ptx
    assert "fma.rn.f64" not in ptx
    assert ".ftz" not in ptx
