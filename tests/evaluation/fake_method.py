"""A method without a model: answers are a dictionary's, so a run of it takes milliseconds.

An edit of a prompt answers that prompt and what begins with it; everything else is answered by the
prompt's own last word. What an edit stores depends on all edits before it, so that one made anew
from a wrong state shows.

As a program it runs a stream and kills itself, as a power cut would, after some lines of its log.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grace_edit.evaluation import EditRecord, Look, Made, Method, Protocol, Question, run_stream
from grace_edit.evaluation.journal import Journal
from grace_edit.evaluation.model import Answer, Forced


class FakeModel:
    """What a run asks of a model."""

    family = "causal"

    def label(self, target: Any) -> str:
        return str(target).strip()


class FakeMethod(Method):
    """See above; `calls` counts what was asked, `blind` is a method that cannot tell its fires."""

    def __init__(self, *, blind: bool = False, leaky: bool = False) -> None:
        super().__init__(FakeModel(), "fake")  # type: ignore[arg-type]
        self.blind, self.leaky = blind, leaky
        self.facts: dict[str, str] = {}
        self.mixed = ""
        self.enabled = True
        self.calls: list[tuple[str, str]] = []
        self.closed = False
        self.forced: int | None = None

    def edit(self, record: EditRecord) -> Made:
        self.calls.append(("edit", record.prompt))
        self.mixed = hashlib.sha256((self.mixed + record.prompt).encode()).hexdigest()
        refused = self.mixed[0] in "01234567"
        if not refused:
            self.facts[record.prompt] = str(record.target)
        edit = None if refused else int(record.id)
        return Made(not refused, int(self.mixed[1], 16), "add", "refused" if refused else "", edit)

    def _nearest(self, prompt: str) -> str | None:
        found = [known for known in self.facts if prompt.startswith(known)]
        return max(found, key=len) if found else None

    def look(self, prompt: str) -> Look | None:
        if self.blind:
            return None
        nearest = self._nearest(prompt)
        if nearest is None:
            return Look(False, "", (), 2.0, 1.0)
        edits = (int(nearest.split()[1]),)
        return Look(True, self.facts[nearest], edits, len(prompt) / len(nearest) - 1, 1.0)

    def ask(self, prompt: str, target: Any, least: int = 1) -> tuple[Answer, Forced | None]:
        self.calls.append(("ask", prompt))
        text = prompt.split()[-1]
        if self.enabled:
            nearest = self._nearest(prompt)
            text = text if nearest is None else self.facts[nearest]
            if self.forced is not None and not prompt.startswith("indeed"):
                text = f"new{self.forced}"
            if self.leaky and nearest is None and self.facts:
                text += "!"
        answer = Answer(text, [len(text)])
        if target is None:
            return answer, None
        right = text == str(target)
        return answer, Forced([1, int(right)], [1, 1], [0.5, 0.0 if right else 2.0])

    @contextmanager
    def answering(self, edit: int) -> Iterator[None]:
        """Say the edit's target, except behind "indeed", where none decodes."""
        self.forced = edit
        try:
            yield
        finally:
            self.forced = None

    @contextmanager
    def unedited(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @property
    def keys(self) -> int | None:
        return len(self.facts)

    def save(self, directory: Path) -> None:
        (directory / "a.json").write_text(json.dumps(self.facts))
        (directory / "b.json").write_text(json.dumps(self.mixed))

    def restore(self, directory: Path) -> None:
        self.facts = json.loads((directory / "a.json").read_text())
        self.mixed = json.loads((directory / "b.json").read_text())

    def close(self) -> None:
        self.closed = True


def records(count: int) -> list[EditRecord]:
    return [
        EditRecord(
            id=str(i),
            prompt=f"fact {i} is",
            target=f"new{i}",
            paraphrases=(
                f"fact {i} is really",
                f"indeed fact {i} is",
                f"fact {(i + 1) % count} is not this",
            ),
            neighbours=(Question(f"fact {i}0 is", (f"old{i}",)),),
            same_subject=(Question(f"fact {i} has"),),
            portability=(Question(f"fact {i} is why", (f"new{i}", "because"), "Reasoning"),),
        )
        for i in range(count)
    ]


UPSTREAM = (Question("the sky is blue", ("blue",)), Question("grass is red", ("green", "Green")))
PROTOCOL = Protocol(every=2, save_every=3, verify_every=3)


def main(out: Path, lines: int, torn: bool) -> None:
    """Run, and die by SIGKILL once the log has got so many lines, the last one torn or whole."""
    add = Journal.add
    left = [lines]

    def dying(journal: Journal, unit: str, found: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] == 0:
            if torn:
                with open(journal.directory / "journal.jsonl", "ab") as file:
                    file.write(b'{"unit": "edit/')
            else:
                add(journal, unit, found)
            os.kill(os.getpid(), signal.SIGKILL)
        add(journal, unit, found)

    Journal.add = dying  # type: ignore[method-assign]
    run_stream(FakeMethod, records(7), out, PROTOCOL, upstream=UPSTREAM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "torn")
