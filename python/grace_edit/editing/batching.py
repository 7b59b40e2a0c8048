"""Many edits at once: values trained together, decisions taken one after the other.

What a value of an edit alone is trained to depends on nothing in the codebook, so it can be trained
before the edits that come first are made. Then each edit is made in its turn, as it would be
without others: where it turns out to share an entry, the value trained for it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..codebook.records import EditResult
from .asked import Wanted, distance
from .fitting import Fit, Task
from .making import EditMaker, Read
from .prefills import Prefills

_WINDOW = 64
"""Edits whose prompts are run before the first of them is made."""

_MOST_KEPT = 4096
"""Tokens of these prompts: what lies below the layer is kept of each until its edit is made."""

_MOST_TOKENS = 2048
"""In one forward of training, padding included: it bounds the memory for gradients."""


class Together:
    """Makes edits in their order, many of whose values are trained in the same forwards.

    Args:
        maker: makes the edits.
        wanted: all of them. Nothing but `make` may change the codebook before the last is made.
    """

    def __init__(self, maker: EditMaker, wanted: Sequence[Wanted]) -> None:
        self._maker = maker
        self._wanted = wanted
        self._read: dict[int, Read] = {}
        self._fits: dict[int, Fit] = {}

    def make(self, number: int) -> EditResult:
        """Make the edit of this number, which the one before it was made before.

        One whose value becomes NaN or infinite is refused.

        Raises: as `EditMaker.read`, of an edit that comes later too.
        """
        maker = self._maker
        if not maker.starts_warm or len(self._wanted) == 1:
            return maker.attempt(maker.read(self._wanted[number]))
        if number not in self._read:
            self._train(range(number, number + self._window(number)))
        return maker.attempt(self._read.pop(number), self._fits.pop(number, None))

    def _window(self, first: int) -> int:
        """Return how many edits are read together from the first on."""
        tokens = 0
        for count, wanted in enumerate(self._wanted[first : first + _WINDOW]):
            tokens += sum(map(len, (wanted.prompt, *wanted.paraphrases)))
            if count and tokens > _MOST_KEPT:
                return count
        return min(_WINDOW, len(self._wanted) - first)

    def _train(self, numbers: Sequence[int]) -> None:
        maker = self._maker
        prefills = Prefills(maker.family)
        every = [self._wanted[number] for number in numbers]
        prefills.read_ahead([prompt for one in every for prompt in (one.prompt, *one.paraphrases)])
        self._read = {number: maker.read(self._wanted[number], prefills) for number in numbers}
        tasks = {n: maker.task(self._read[n]) for n in numbers if self._needs_a_value(n)}
        for group in _groups(tasks):
            if len(group) > 1:
                fits = maker.train_many([tasks[number] for number in group])
                self._fits.update(zip(group, fits, strict=True))

    def _needs_a_value(self, number: int) -> bool:
        """Say whether an edit will probably get a value of its own."""
        read, maker = self._read[number], self._maker
        if maker.propose(read).case in ("expand", "absorb"):
            return False
        target = read.wanted.target
        earlier = (other for n, other in self._read.items() if n < number)
        same = [other.keys[0].query for other in earlier if other.wanted.target == target]
        return not any(self._are_near(read.keys[0].query, query) for query in same)

    def _are_near(self, query: Tensor, other: Tensor) -> bool:
        book = self._maker.takes
        near = 0.0 if book.policy == "nearest" else book.radius
        return distance(query, other) <= near


def _groups(tasks: dict[int, Task]) -> list[list[int]]:
    """Return the numbers of tasks in groups for a forward each, of prompts about as long."""
    sizes = {n: _size(task) for n, task in tasks.items()}
    groups: list[list[int]] = []
    rows = 0
    for number in sorted(tasks, key=lambda n: (sizes[n][1], n)):
        count, longest = sizes[number]
        if not groups or (rows + count) * longest > _MOST_TOKENS:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += count
    return groups


def _size(task: Task) -> tuple[int, int]:
    """Return how many rows a task has, and the tokens of the longest."""
    return len(task.asked), max(len(prompt) + len(target) for prompt, target in task.asked)
