"""A file of edits that is being added: what is done is saved in between, and found again.

Whoever saves in between says so in the directory: under "adding", with the options that were given
and, for each line that is done, what it asked for and which edit or refusal came of it. The save at
the end does not say it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import serving
from ..codebook.records import EditResult
from ..editor import GraceEditor
from .models import SavedEdits
from .requests import Request

ADDING = "adding"

SAVE_EVERY = 20.0
"""Seconds between two saves, and at least"""
SHARE = 20.0
"""times as long as the last one took."""


class Saver:
    """Saves the edits of a file while they are made.

    Args:
        editor: makes them.
        out: where to.
        requests: of the whole file; those that are done have a result.
        settings: options that the next call must give too, by name; None: not given.
    """

    def __init__(
        self, editor: GraceEditor, out: Path, requests: list[Request], settings: dict[str, Any]
    ) -> None:
        self.editor, self.out, self.requests = editor, out, requests
        self.settings = {name: x for name, x in settings.items() if x is not None}
        self._last, self._took = time.monotonic(), 0.0

    def save_if_due(self) -> None:
        """Save unless that was done a short while ago."""
        if time.monotonic() - self._last >= max(SAVE_EVERY, SHARE * self._took):
            self.save()

    def save(self) -> int:
        """Save what is done, if any edit was accepted; return how many were."""
        start = time.monotonic()
        done = [request for request in self.requests if request.result is not None]
        accepted = sum(request.result.success for request in done if request.result is not None)
        if accepted:
            note = {"settings": self.settings, "done": [_note(request) for request in done]}
            serving.save(self.editor.family, self.editor.config, self.out, {ADDING: note})
        self._last = time.monotonic()
        self._took = self._last - start
        return accepted


def restore(saved: SavedEdits, requests: list[Request]) -> int:
    """Give requests that were done before the results they had.

    Returns:
        How many were done; 0 unless the file begins with what was begun in that directory.
    """
    done = saved.about(ADDING).get("done", [])
    asked = [_digest(request) for request in requests[: len(done)]]
    if not done or asked != [note["asked"] for note in done]:
        return 0
    for request, note in zip(requests, done, strict=False):
        if note["id"] is None:
            found = note["refused"]
            far = math.inf if found["distance"] is None else found["distance"]
            request.result = EditResult(**{**found, "distance": far})
            continue
        try:
            edit = saved.codebook.edit(note["id"])
        except KeyError:  # somebody has purged it since
            gone = EditResult(note["id"], None, None, -1, math.inf, None, None)
            request.result = replace(gone, reason="purged since it was made")
            continue
        request.result = edit.result
        request.radius = float(saved.codebook.radii[edit.slot]) if edit.live else None
    return len(done)


def _note(request: Request) -> dict[str, Any]:
    assert request.result is not None
    id = request.result.id
    refused = {} if id is not None else {"refused": request.result.to_dict()}
    return {"asked": _digest(request), "id": id, **refused}


def _digest(request: Request) -> str:
    asked = json.dumps(request.wanted, sort_keys=True).encode()
    return hashlib.blake2b(asked, digest_size=16).hexdigest()
