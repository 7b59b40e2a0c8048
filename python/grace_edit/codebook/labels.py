"""Numbers in the place of labels, which a device can compare."""

from __future__ import annotations

from collections.abc import Iterable

from .records import Label

_MOST = 1024  # numbered before any is dropped


class Labels:
    """The number of each label that a slot holds, or may hold again by undoing.

    A key is what tells a label from others, see `Settings.label_key`. No number is used twice.
    """

    def __init__(self) -> None:
        self._numbers: dict[Label | float, int] = {}
        self._next = 0
        self._most = _MOST  # before those that nothing holds are dropped

    @property
    def are_many(self) -> bool:
        """Whether it is worth a look which of them nothing holds."""
        return len(self._numbers) >= self._most

    def number(self, key: Label | float) -> int:
        """Return the number of a label; a new one for a label that has none."""
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._next
            self._next += 1
        return number

    def known(self, key: Label | float) -> int:
        """Return the number of a label, -1 for one that has none."""
        return self._numbers.get(key, -1)

    def keep(self, held: Iterable[int]) -> None:
        """Let the labels of all other numbers lose theirs."""
        kept = set(held)
        self._numbers = {key: n for key, n in self._numbers.items() if n in kept}
        self._most = max(_MOST, 2 * len(self._numbers))
