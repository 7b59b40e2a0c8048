"""The command line of grace_edit. Needs typer and rich (`grace-kernels[cli]`)."""

from .app import app

__all__ = ["app"]
