"""What the server needs beside transformers, and what to say where it is missing."""

from __future__ import annotations

import importlib.util

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
REMEDY = 'pip install "grace-kernels[serve]"'


def check() -> None:
    """Raise ModuleNotFoundError, with the command that mends it, if a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ModuleNotFoundError(
            f"the server needs {names}, not installed: {REMEDY}", name=missing[0]
        )
