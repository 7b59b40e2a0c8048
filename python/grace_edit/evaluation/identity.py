"""What a run in a directory is of, and where it was at work: nothing else goes on with it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .journal import write_whole

_IDENTITY, _ENVIRONMENTS = "identity.json", "environments.json"


class EvaluationError(ValueError):
    """The options cannot be run; the message says which and why."""


class OtherRunError(EvaluationError):
    """The directory holds a run with other options."""


def environment() -> dict[str, Any]:
    """Return what figures may depend on: versions, processor, threads, and the date."""
    import transformers

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def environments(out: Path) -> list[dict[str, Any]]:
    """Return every environment that this run was at work in, the present one last."""
    path = out / _ENVIRONMENTS
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    now = environment()
    if now not in found:
        found.append(now)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found, indent=1) + "\n")
    return found


def digest(value: Any) -> str:
    """Return a hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of(directory: Any) -> str | None:
    """Return a hash of the files in a directory; None for what is no directory."""
    if directory is None or not Path(str(directory)).is_dir():
        return None
    files = sorted(path for path in Path(str(directory)).iterdir() if path.is_file())
    hashes = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return digest(hashes)


def same_run(directory: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with a run of something else.

    Args:
        directory: of the run, made if it is not there.
        identity: what the run is of, as JSON can hold it.

    Raises:
        OtherRunError: the directory holds a run of something else.
    """
    path = directory / _IDENTITY
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(identity, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    other = [
        name for name in identity if before.get(name) != json.loads(json.dumps(identity[name]))
    ]
    if other:
        raise OtherRunError(
            f"{directory}: holds a run with another {' and '.join(other)}; name another directory "
            "or remove it"
        )
