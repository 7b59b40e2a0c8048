"""Stateless operators of GRACE model editing: find the codebook entry that answers a query."""

from .api import adapt, adapt_, lookup, nearest, warmup
from .backends import Backend, BackendUnavailable, build_info
from .sketch import Sketch

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Sketch",
    "adapt",
    "adapt_",
    "build_info",
    "lookup",
    "nearest",
    "warmup",
]
