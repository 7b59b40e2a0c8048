"""Progress bars, on stderr and only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def bar(items: Sequence[Any], what: str, show: bool) -> Any:
    """Return `items` to walk over, with a progress bar if `show`."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit="")
