"""Tables of records: whichever way one is written to, it knows which values are used."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from grace_edit.codebook.records import Edit, EditResult
from grace_edit.codebook.tables import Table

RESULT = EditResult(0, "add", 0, -1, math.inf, None, 1.0)


def edit(id: int, value: int, radius: float | None = None) -> Edit:
    return Edit(id, (1,), None, -1, 0, value, None, RESULT, radius=radius)


def filled() -> Table[Edit]:
    return Table({0: edit(0, 7), 1: edit(1, 7, 2.0), 2: edit(2, 8), 3: None})


def as_counted(table: Table[Edit]) -> Counter[int]:
    return Counter(record.value_id for record in dict(table).values() if record is not None)


WRITES: dict[str, Callable[[Any], Any]] = {
    "over another": lambda table: table.__setitem__(0, edit(0, 9, 5.0)),
    "over None": lambda table: table.__setitem__(3, edit(3, 9)),
    "None": lambda table: table.__setitem__(0, None),
    "del": lambda table: table.__delitem__(0),
    "pop": lambda table: table.pop(1),
    "pop of none": lambda table: table.pop(9, None),
    "popitem": lambda table: table.popitem(),
    "update": lambda table: table.update({0: edit(0, 9), 4: edit(4, 8)}),
    "setdefault": lambda table: (table.setdefault(4, edit(4, 8)), table.setdefault(0, edit(0, 9))),
    "clear": lambda table: table.clear(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_each_way_to_write_counts(write: Callable[[Any], Any]) -> None:
    for table in (filled(), copy.deepcopy(filled())):
        before = dict(table)
        write(table)
        assert table.values_used == as_counted(table)
        assert table.widest >= max((e.radius or 0.0 for e in table.values() if e), default=0.0)
        assert dict(table) != before or write is WRITES["pop of none"]


def test_there_is_no_other_way_to_write() -> None:
    writes = {"pop", "popitem", "update", "setdefault", "clear", "__setitem__", "__delitem__"}
    reads = {"get", "items", "keys", "values", "__getitem__", "__contains__", "__iter__", "__len__"}
    no_matter = {"__reversed__", "__class_getitem__"}  # Mapping says that there is none, and types
    like_a_dict = {name for name in dir(dict) if name in dir(Table) and not hasattr(object, name)}
    assert like_a_dict == writes | reads | no_matter
    assert not isinstance(filled(), dict)  # or `dict.update(table, ...)` would not count


def test_what_is_not_there_is_neither_taken_out_nor_counted() -> None:
    table = filled()
    with pytest.raises(KeyError):
        table.pop(9)
    with pytest.raises(KeyError):
        del table[9]
    assert (table.values_used, len(table), 9 in table) == ({7: 2, 8: 1}, 4, False)
