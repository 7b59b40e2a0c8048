"""In the engine core: what answers a request, found when it is admitted.

The prefix cache. A block of KV is wrong for others only where it holds a row that was replaced, or
one that comes after it. Under `replace="last"` that row is the last of a prompt, and no other
prompt that ends in that row takes its block from the cache, as the engine computes the last token
of every prompt anew. So a request that is answered, or under `query="last"` may be, gets blocks of
its own from the one that its prompt ends in, and everything before is shared with all, whatever
they answer, before an edit and after it. Requests that are not answered share all of theirs. An
edit therefore invalidates nothing.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

from torch import Tensor

from .news import Changed, News, entries_of
from .options import NotServed, Options
from .saved import SavedEdits

log = logging.getLogger("grace_edit")

_private: dict[str, int] = {}
"""Where the prompts end, in tokens, of requests that do not share the block with their end."""


def private_key(request_id: str, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Return what the hash of a request's block `[start, end)` of tokens holds beside the tokens.

    Empty where the block may be shared; hashes are chained, so those behind it are told apart too.
    """
    length = _private.get(request_id)
    if length is None or not start < length <= end:
        return ()
    return (("grace", request_id),)


class Admission:
    """Look requests up as they come and keep the answers until they are over.

    Args:
        config: a `VllmConfig`.
        options: the option `grace`.

    `admit` and `news` may run each in a thread of its own. Another one looks for new edits.

    Raises:
        NotServed: the edits cannot be served.
    """

    def __init__(self, config: Any, options: Options) -> None:
        self._edits = edits = SavedEdits(config, options)
        self._values: dict[str, Tensor] = {}
        self._looking = threading.Lock()  # held while the codebook changes or is asked
        self._telling = threading.Lock()  # held for what a step is told; nobody reads files in it
        self._version = edits.version
        self._changed: Changed | None = None
        self._untold: set[int] = set()  # slots that the workers know otherwise
        self._grows = config.model_config.enforce_eager
        self._room = edits.book.capacity
        self._refused = ""
        if edits.query == "last":
            self._untold.update(range(edits.book.storage.slots.in_use))
            self._note_changes()
        log.info(
            "serving %s: %d entries, version %d",
            options.codebook,
            edits.book.entries,
            edits.version,
        )
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if options.interval:
            self._thread = threading.Thread(
                target=_keep_looking,
                args=[weakref.ref(self), self._closed, options.interval],
                name="grace-admission",
                daemon=True,
            )
            self._thread.start()

    def admit(self, request: Any) -> None:
        """Find what answers a request, with the edits that are saved now.

        Args:
            request: an `EngineCoreRequest`, before it is queued.

        Raises:
            ValueError: it cannot be told where its prompt ends, or what it says.
        """
        if request.resumable:
            raise ValueError("an edited model takes no streaming sessions: their prompts grow")
        ids, text = request.prompt_token_ids, self._edits.text
        if text is None:
            self.look()
            length = len(ids) if ids is not None else len(request.prompt_embeds)
            _private[request.request_id] = length
            return
        if ids is None or request.prompt_is_token_ids is not None:
            raise ValueError(
                'edits with query="text" are asked by the ids of a prompt, got embeddings'
            )
        with self._looking:
            self._look()
            answered = text.answer(self._edits.book, [ids])
        if int(answered.index[0]) >= 0:
            _private[request.request_id] = len(ids)
            self._values[request.request_id] = answered.values[0].clone()

    def look(self) -> None:
        """Take what was saved or published since, for what comes next."""
        with self._looking:
            self._look()

    def news(self, scheduled: Any) -> News:
        """Return what the workers must know for a step.

        Args:
            scheduled: the step's `SchedulerOutput`.
        """
        with self._telling:
            version, changed, self._changed = self._version, self._changed, None
        known = self._values
        values = {
            r.req_id: known[r.req_id] for r in scheduled.scheduled_new_reqs if r.req_id in known
        }
        for id in scheduled.finished_req_ids:
            known.pop(id, None)
            _private.pop(id, None)
        finished = frozenset(scheduled.finished_req_ids)
        return News(version, values, finished, changed)

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        edits = self._edits
        edits.refresh()
        rows = edits.take_rows()
        if edits.query == "text":
            self._version = edits.version
        elif rows or edits.version != self._version:
            self._untold |= rows
            self._note_changes()

    def _note_changes(self) -> None:
        book = self._edits.book
        count, capacity = book.storage.slots.in_use, book.capacity
        if count > self._room and not self._grows:
            why = (
                f"{count} entries are more than the {self._room} there is room for in captured "
                "graphs; start the engine again"
            )
            if why != self._refused:
                log.error("saved edits are not served, those before them are: %s", why)
            self._refused = why
            return
        there = capacity if self._grows else min(capacity, self._room)
        with self._telling:
            unsent = () if self._changed is None else self._changed.slots.tolist()
            slots = self._untold.union(unsent)
            now = {slot for slot in slots if slot < there}
            self._untold = slots - now  # should there be room for them again
            self._changed = entries_of(book, now)
            self._version = self._edits.version


def _keep_looking(what: weakref.ref[Admission], closed: threading.Event, interval: float) -> None:
    told = ""
    while not closed.wait(interval):
        admission = what()
        if admission is None:
            return
        try:
            admission.look()
            told = ""
        except Exception as error:  # the thread must go on
            if str(error) != told:
                told = str(error)
                log.error("new edits are not looked for: %s", told)
        del admission


def check_marks() -> None:
    """Refuse an engine whose prefix cache does not ask `private_key`.

    Raises:
        NotServed: blocks of an answered request would be shared.
    """
    from types import SimpleNamespace

    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    request: Any = SimpleNamespace(
        request_id="grace: a request to see that the prefix cache tells it apart",
        block_hashes=[b"parent"],
        num_tokens=4,
        all_token_ids=[1, 2, 3, 4],
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        prompt_embeds=None,
    )
    hasher = get_request_block_hasher(2, lambda what: repr(what).encode())
    shared = hasher(request)
    _private[request.request_id] = 3
    try:
        alone = hasher(request)
    finally:
        del _private[request.request_id]
    if len(shared) != 1 or len(alone) != 1 or shared == alone:
        raise NotServed(
            "the prefix cache of this vLLM does not tell edited blocks apart; start it with "
            "--no-enable-prefix-caching"
        )
