"""Entry point of the command line: `grace`, or `python -m grace_edit`."""

from __future__ import annotations

import importlib.util
import sys

REMEDY = 'pip install "grace-kernels[cli]"'


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f"error: the command line needs {names}, not installed; {REMEDY}", file=sys.stderr)
        raise SystemExit(2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A prompt may hold what the terminal's encoding does not.
            stream.reconfigure(errors="backslashreplace")
    from .cli import app

    app(prog_name="grace")


if __name__ == "__main__":
    main()
