"""Tables of edits and of entries that know what their records refer to, without a look at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from .records import Edit, Entry

R = TypeVar("R", bound=Edit | Entry)


class Table(dict[int, R | None]):
    """Records by number; None: there is less to say than as imported.

    Written by `table[number] = record` and `pop` alone.

    Attributes:
        values_used: how many records refer to each value, by its number.
        widest: no record here was ever given a larger radius; 0: none was given one.
    """

    def __init__(self, records: Mapping[int, R | None] = MappingProxyType({})) -> None:
        super().__init__()
        self.values_used: Counter[int] = Counter()
        self.widest = 0.0
        for number, record in records.items():
            self[number] = record

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __setitem__(self, number: int, record: R | None) -> None:
        self._count(self.get(number), -1)
        self._count(record, 1)
        super().__setitem__(number, record)
        self.widest = max(self.widest, getattr(record, "radius", None) or 0.0)

    def pop(self, number: int, *default: Any) -> Any:
        """Take a record out and return it, as of a dict."""
        self._count(self.get(number), -1)
        return super().pop(number, *default)

    def _count(self, record: R | None, by: int) -> None:
        if record is not None:
            self.values_used[record.value_id] += by
            if not self.values_used[record.value_id]:
                del self.values_used[record.value_id]
