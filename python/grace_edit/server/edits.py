"""The edits of a served model: made one at a time in a thread of their own.

Requests go on meanwhile: they meet an edit in the moment it is committed, and wait for that alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from ..codebook.records import CapacityError, Edit, EditResult, UndoError
from ..editing.explanation import explain
from ..editor import GraceEditor
from ..families import Family, target_of
from ..keys.prompts import PromptReader
from .metrics import Metrics
from .sharing import Cores

T = TypeVar("T")

_MOST_WAITING = 64
_FIELDS = {"prompt", "target", "paraphrases", "negatives"}


class Refused(Exception):
    """A change that is not made.

    Args:
        status: of the reply.
        message: why, with the rule.
        result: of an edit whose target could not be reached.
    """

    def __init__(self, status: int, message: str, result: EditResult | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.result = status, message, result


class Edits:
    """Read and change the edits of an attached model.

    Args:
        family: of the attached model.
        metrics: where changes are counted.
        editor: makes the edits; what it has made is durable if it is published, see
            `grace_edit.publish`. None: they are made elsewhere and followed here.
    """

    def __init__(self, family: Family, metrics: Metrics, editor: GraceEditor | None) -> None:
        self.family, self.editor = family, editor
        self._metrics, self._cores = metrics, Cores(family.model)
        self._reader = None if family.tokenizer is None else PromptReader(family.tokenizer)
        self._changing = ThreadPoolExecutor(1, "grace-edit")
        self._reading = ThreadPoolExecutor(1, "grace-explain")
        self._waiting = 0

    @property
    def version(self) -> int:
        """The codebook's version now."""
        return self.family.adaptor.codebook.version

    def close(self) -> None:
        """Wait for the change that is being made; those that wait are not begun."""
        self._changing.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)
        self._cores.close()

    # Reading

    def count(self) -> dict[str, int]:
        """Return the numbers of edits and entries and the version that they belong to."""
        book = self.family.adaptor.codebook
        with book.lock:
            return {"version": book.version, "edits": book.edits, "entries": book.entries}

    async def listed(self, *, after: int, limit: int) -> dict[str, Any]:
        """Return the live edits behind an id, oldest first, at most `limit`, and the version."""
        return await _in(self._reading, self._listed, after, limit)

    def _listed(self, after: int, limit: int) -> dict[str, Any]:
        book = self.family.adaptor.codebook
        with book.lock:
            ids = [id for id in book.ids if id > after]
            found = [self._of(book.edit(id)) for id in ids[:limit]]
            told = {"version": book.version, "more": len(ids) > limit, "total": book.edits}
        # Lookups wait for the lock, not for tokenizers.
        return {**told, "edits": [self._shown(*one) for one in found]}

    async def one(self, id: int) -> dict[str, Any]:
        """Return an edit of the history. Raises Refused, 404."""
        return await _in(self._reading, self._one, id)

    def _one(self, id: int) -> dict[str, Any]:
        book = self.family.adaptor.codebook
        with book.lock:
            try:
                edit, radius = self._of(book.edit(id))
                parts, version = book.parts(edit.whole), book.version
            except KeyError:
                raise _unknown(id) from None
        more = {
            "paraphrases": [self._read(part.prompt) for part in parts],
            "negatives": [self._read(prompt) for prompt in edit.negatives],
        }
        return {"version": version, "edit": {**self._shown(edit, radius), **more}}

    def _of(self, edit: Edit) -> tuple[Edit, float | None]:
        radii = self.family.adaptor.codebook.radii
        return edit, float(radii[edit.slot]) if edit.live else None

    def _shown(self, edit: Edit, radius: float | None) -> dict[str, Any]:
        return {
            "id": edit.id,
            "state": edit.state,
            "prompt": self._read(edit.prompt),
            "target": self.family.show(target_of(edit.label)),
            "radius": radius,
        }

    def _read(self, prompt: Any) -> str | None:
        if prompt is None:
            return None
        return str(list(prompt)) if self._reader is None else self._reader.text(list(prompt))

    async def explain(self, prompt: Any) -> dict[str, Any]:
        """Say which edit answers a prompt, or comes nearest. Raises Refused, 422."""
        return await _in(self._reading, self._explain, prompt)

    def _explain(self, prompt: Any) -> dict[str, Any]:
        book = self.family.adaptor.codebook
        ids = _checked(lambda: self.family.encode(prompt))
        while True:
            version = book.version
            with self.family.working():
                why = explain(self.family, ids)
            if book.version == version:
                break
        told = {"version": version, **why.to_dict()}
        told["edit_prompt"] = None
        if why.edit_id is not None:
            told["edit_prompt"] = self._read(book.edit(why.edit_id).prompt)
        return finite(told)

    # Changing

    async def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Make an edit.

        Raises:
            Refused: 422, a field that breaks its rule, or a target that cannot be reached; 403, 429
                and 507 as every change.
        """
        unknown = sorted(set(body) - _FIELDS)
        if unknown:
            raise Refused(422, f"the fields must be among {sorted(_FIELDS)}, got {unknown}")
        for name in ("prompt", "target"):
            if name not in body:
                raise Refused(422, f"{name} must be given, got none")
        for name in ("paraphrases", "negatives"):
            if not isinstance(body.get(name, []), list):
                raise Refused(422, f"{name} must be a list of prompts, got {body[name]!r:.100}")
        return await self._change(lambda editor: self._add(editor, body))

    def _add(self, editor: GraceEditor, body: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        prompt, target = body["prompt"], body["target"]

        def edit() -> EditResult:
            asked = [body.get(name, []) for name in ("paraphrases", "negatives")]
            with self._cores.editing():
                return editor.edit(prompt, target, *asked)

        result: EditResult = _checked(edit)
        if not result.success:
            self._metrics.refuse()
            raise Refused(422, f"the edit could not be made: {result.reason}", result)
        self._metrics.change("add", time.perf_counter() - start)
        return {"id": result.id, "result": result.to_dict()}

    async def delete(self, id: int, *, purge: bool) -> dict[str, Any]:
        """Take an edit back. Raises Refused, 404, and as every change."""

        def delete(editor: GraceEditor) -> dict[str, Any]:
            editor.delete(id, purge=purge)
            return {"id": id, "purged": purge}

        def known(editor: GraceEditor) -> dict[str, Any]:
            try:
                done = self._seen(editor, delete)
            except KeyError:
                raise _unknown(id) from None
            self._metrics.change("delete")
            return done

        return await self._change(known)

    async def undo(self) -> dict[str, Any]:
        """Take the last change back. Raises Refused, 409: there is none; and as every change."""

        def undo(editor: GraceEditor) -> dict[str, Any]:
            editor.undo()
            return {}

        def known(editor: GraceEditor) -> dict[str, Any]:
            try:
                done = self._seen(editor, undo)
            except UndoError as error:
                raise Refused(409, str(error)) from None
            self._metrics.change("undo")
            return done

        return await self._change(known)

    def _seen(
        self, editor: GraceEditor, change: Callable[[GraceEditor], dict[str, Any]]
    ) -> dict[str, Any]:
        """Say which edits a change took away and which came back."""
        before = set(editor.codebook.ids)
        done = change(editor)
        after = set(editor.codebook.ids)
        return {**done, "gone": sorted(before - after), "back": sorted(after - before)}

    async def _change(self, change: Callable[[GraceEditor], dict[str, Any]]) -> dict[str, Any]:
        editor = self.editor
        if editor is None:
            raise Refused(403, "this server follows edits that are made elsewhere: make them there")
        if self._waiting >= _MOST_WAITING:
            raise Refused(429, f"at most {_MOST_WAITING} changes may wait, got one more")

        def work() -> dict[str, Any]:
            try:
                with editor.codebook.changing():  # the version is that of this change
                    return {**change(editor), "version": editor.codebook.version}
            except CapacityError as error:
                raise Refused(409, str(error)) from error
            except OSError as error:
                raise Refused(507, f"the change could not be kept, and is not made: {error}") from (
                    error
                )

        self._waiting += 1
        try:
            return finite(await _in(self._changing, work))
        finally:
            self._waiting -= 1


async def _in(pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    # Shielded: what is begun ends, and is kept, if the client leaves meanwhile.
    return await asyncio.shield(asyncio.get_running_loop().run_in_executor(pool, work, *args))


def _checked(work: Callable[[], T]) -> T:
    try:
        return work()
    except (ValueError, FloatingPointError) as error:
        raise Refused(422, str(error)) from error


def _unknown(id: int) -> Refused:
    return Refused(404, f"id must be that of an edit, got {id}")


def finite(data: Any) -> Any:
    """Return data with None in place of what is not finite, which JSON cannot hold."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not (-float("inf") < data < float("inf")):
        return None
    return data


def described(result: EditResult | None) -> dict[str, Any] | None:
    """Return a result as JSON holds it."""
    return None if result is None else finite(asdict(result))
