"""Figures for Prometheus: what was asked, what answered, how long it took."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..codebook.codebook import Codebook
from .answering import Trace

_LOOKUPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0)
_WORK = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/edits", "/v1/models")


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        book: the codebook that answers.
    """

    def __init__(self, book: Codebook) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter(
            "grace_requests", "Requests, by path and status.", ("path", "status"), registry=own
        )
        self._took = Histogram(
            "grace_request_seconds", "Time to the end of a reply.", buckets=_WORK, registry=own
        )
        self._hits = Counter("grace_hits", "Prompts that an edit answered.", registry=own)
        self._misses = Counter("grace_misses", "Prompts that no edit answered.", registry=own)
        self._lookup = Histogram(
            "grace_lookup_seconds",
            "Time to ask the codebook, as the host sees it; with query=text of making the key too.",
            buckets=_LOOKUPS,
            registry=own,
        )
        self._changes = Counter(
            "grace_changes", "Changes of the edits, by kind.", ("kind",), registry=own
        )
        self._refused = Counter(
            "grace_edits_refused", "Edits whose target could not be reached.", registry=own
        )
        self._edit = Histogram(
            "grace_edit_seconds",
            "Time to make an edit, until it is on disk.",
            buckets=_WORK,
            registry=own,
        )
        for name, about, read in (
            ("version", "Version of the codebook.", lambda: book.version),
            ("entries", "Entries that can answer.", lambda: book.entries),
            ("edits", "Live edits.", lambda: book.edits),
        ):
            Gauge(f"grace_codebook_{name}", about, registry=own).set_function(read)

    def request(self, path: str, status: int, seconds: float, trace: Trace) -> None:
        """Count a request that is over; status 0: its reply was never begun."""
        # A name for each path that anybody thinks of would fill the memory.
        known = next((known for known in _PATHS if path.startswith(known)), "other")
        self._requests.labels(known, str(status)).inc()
        found = trace.answered
        if found is None:
            return
        self._took.observe(seconds)
        (self._misses if found.edit is None else self._hits).inc()
        self._lookup.observe(found.seconds)

    def change(self, kind: str, seconds: float | None = None) -> None:
        """Count a change: "add", "delete" or "undo"; `seconds`: an edit took."""
        self._changes.labels(kind).inc()
        if seconds is not None:
            self._edit.observe(seconds)

    def refuse(self) -> None:
        """Count an edit that could not be made."""
        self._refused.inc()

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return bytes(generate_latest(self._registry))
