"""Tables of edits and of entries that know what their records refer to, without a look at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from types import MappingProxyType
from typing import Any, TypeVar

from .records import Edit, Entry

R = TypeVar("R", bound=Edit | Entry)


class Table(MutableMapping[int, R | None]):
    """Records by number; None: there is less to say than as imported.

    No `dict`, some of whose methods would write without counting: here each goes by the two that
    count.

    Attributes:
        values_used: how many records refer to each value, by its number.
        widest: no record here was ever given a larger radius; 0: none was given one.
    """

    def __init__(self, records: Mapping[int, R | None] = MappingProxyType({})) -> None:
        self._records: dict[int, R | None] = {}
        self.values_used: Counter[int] = Counter()
        self.widest = 0.0
        self.update(records)

    def __setitem__(self, number: int, record: R | None) -> None:
        self._count(self._records.get(number), -1)
        self._count(record, 1)
        self._records[number] = record
        self.widest = max(self.widest, getattr(record, "radius", None) or 0.0)

    def __delitem__(self, number: int) -> None:
        self._count(self._records.pop(number), -1)

    def _count(self, record: R | None, by: int) -> None:
        if record is not None:
            self.values_used[record.value_id] += by
            if not self.values_used[record.value_id]:
                del self.values_used[record.value_id]

    def __getitem__(self, number: int) -> R | None:
        return self._records[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    # As inherited, at the speed of a dict.

    def __contains__(self, number: object) -> bool:
        return number in self._records

    def get(self, number: int, default: Any = None) -> Any:
        """Return a record, or `default` where there is none, as of a dict."""
        return self._records.get(number, default)

    def items(self) -> ItemsView[int, R | None]:
        """Return numbers and records, as of a dict."""
        return self._records.items()

    def values(self) -> ValuesView[R | None]:
        """Return the records, as of a dict."""
        return self._records.values()
