"""What a codebook says about its edits and entries: plain, frozen records, and its errors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Case = Literal["add", "update", "expand", "absorb", "split", "import"]
Label = tuple[int, ...]


class CapacityError(RuntimeError):
    """A frozen codebook is full: growing it would leave captured graphs on old memory."""


class UndoError(RuntimeError):
    """There is no earlier state to go back to."""


class TieError(RuntimeError):
    """Two entries are at exactly the same distance from a query, so that their slots decide."""


@dataclass(frozen=True)
class Decision:
    """What one edit does to the codebook.

    `neighbour_radius` is the radius of the nearest entry afterwards (None: there is no entry),
    `new_radius` that of the entry the edit gets (None: it gets none).
    """

    case: Case
    neighbour_radius: float | None
    new_radius: float | None
    fragile: bool = False


@dataclass(frozen=True)
class EditResult:
    """What became of one edit.

    `slot` is the entry that answers it; `neighbour` the entry that was nearest before it (-1: there
    was none) at `distance` (+inf then), with its radius before and after (None then). Losses are
    None where nothing was trained. A refused edit has `success=False`, `id=None` and a `reason`.
    `proven` says that with this value, as stored, the model itself was seen to produce the
    target, greedily; False where no model was asked (`Codebook.insert`, imported entries) or
    `policy="paper"` shared a value that does not; None: not known, of edits saved before this was
    noted. What samples and beams say follows from `probability`: what the model gives to the
    whole target behind the prompt (of several prompts the least), that is the share of samples at
    temperature 1 that begin with it; None where nothing was trained.
    `fragile`: its entry is smaller than the drift of the activations, or a contradicting entry lies
    within twice the drift, so that the same prompt in another batch may miss. `keys` counts the
    prompts that the edit answers: its own and its paraphrases.
    """

    id: int | None
    case: Case | None
    slot: int | None
    neighbour: int
    distance: float
    radius_before: float | None
    radius_after: float | None
    loss_start: float | None = None
    loss_end: float | None = None
    steps: int = 0
    fragile: bool = False
    success: bool = True
    reason: str = ""
    keys: int = 1
    probability: float | None = None
    proven: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them: what is not finite becomes None."""
        return {
            name: None if isinstance(item, float) and not math.isfinite(item) else item
            for name, item in asdict(self).items()
        }


@dataclass(frozen=True)
class Edit:
    """One edit of the history.

    `state`: "live", "superseded" (by the edit `superseded_by`, whose deletion may bring it back) or
    "deleted". `slot` is the entry that answers it (-1 unless live). `query_index` says where its
    query is stored (-1: it was imported, its query is the key in the slot of its own number).
    `value_id` names the value that answers it, or last did; `verified` the values that were seen to
    answer it (None: it was made without a model, an equal label is enough).

    An edit of several prompts is several records: one for its own prompt, whose id is the edit's,
    and a part for each paraphrase, whose `part_of` is that id. The ids of the parts follow it. They
    are made, superseded, deleted and purged together. `radius` is that of its new entry (None: the
    codebook's); an entry that was given one does not grow. `negatives` are prompts that the edit
    must not answer, kept with the edit, not with its parts.
    """

    id: int
    label: Label
    prompt: Label | None
    query_index: int
    slot: int
    value_id: int
    verified: frozenset[int] | None
    result: EditResult
    state: Literal["live", "superseded", "deleted"] = "live"
    superseded_by: int | None = None
    part_of: int | None = None
    radius: float | None = None
    negatives: tuple[Label, ...] = ()

    def but(self, **changed: Any) -> Edit:
        """Return it with other fields, as `dataclasses.replace`, in a fraction of the time."""
        made = object.__new__(Edit)
        made.__dict__.update(self.__dict__, **changed)
        return made

    @property
    def whole(self) -> int:
        """The id of the edit that this record is, or is a part of."""
        return self.id if self.part_of is None else self.part_of

    @property
    def live(self) -> bool:
        """Say whether the codebook answers this edit."""
        return self.state == "live"


@dataclass(frozen=True)
class Entry:
    """The host's side of a live slot.

    `value_id` names its value, `owner` the edit whose query is its key. `members` are the edits
    that it answers, in ascending order of id.
    """

    label: Label
    value_id: int
    owner: int
    members: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Proposal:
    """What an edit would do to the codebook as it is at `version`; nothing has been done yet.

    `query` `[D]` is the one that will be stored: that of the edit it supersedes, if there is one.
    `neighbour` is the nearest entry (-1: none) at `distance`, with its radius before and after.
    `new_radius` is None where no entry is made. `slot` is the entry whose value will answer the
    edit, -1 for a new one. `members` are the edits which that value answers already and will have
    to answer further on; `supersedes` those that this one replaces, with all their parts.
    `radius`, `part_of` and `negatives` are kept with the edit; see `Edit`.
    """

    query: Tensor
    label: Label
    prompt: Label | None
    case: Case
    slot: int
    neighbour: int
    distance: float
    radius_before: float | None
    radius_after: float | None
    new_radius: float | None
    members: tuple[int, ...]
    supersedes: tuple[int, ...]
    fragile: bool
    own_entry: bool
    version: int
    radius: float | None = None
    part_of: int | None = None
    negatives: tuple[Label, ...] = ()


@dataclass
class Imported:
    """Entries that were given as tensors. They cost no record until something happens to them.

    Slot i, value i and edit i belong together, with label i and, at first, radius i.
    """

    labels: list[Label] = field(default_factory=list)
    radii: Tensor = field(default_factory=lambda: torch.zeros(0))
