"""Progress bars, on stderr: where they are asked for, or where somebody is kept waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_PATIENCE = 2.0  # seconds


def bar(items: Sequence[Any], what: str, show: bool) -> Any:
    """Return `items` to walk over, with a progress bar if `show`."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit="")


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with what is done and what there is in all.

    For work that nobody asked for: a bar appears on a terminal alone, once the work has taken two
    seconds, and is taken away at the end.
    """
    from tqdm import tqdm

    # Only a terminal gets one: that is what None means.
    with tqdm(desc=what, unit="", delay=_PATIENCE, leave=False, disable=None) as shown:

        def advance(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield advance
