"""The codebook: entries, the edits they answer for, every change to them, and their files.

Imports run one way; from below:

* `records` says what an edit, an entry and a proposal are; `policy` takes decisions as pure
  functions, `settings` holds what it decides by.
* `storage` holds everything: `slots` (what lookups read, with its `sketch_upkeep`), `queries` (what
  edits asked, on the host) and the records; `journal` takes its changes back.
* `planning` decides about an edit, `retention` carries that out and keeps the others answered,
  `importing` fills, `audit` checks. They work on the storage.
* `deletion` deletes: `touched` finds the edits concerned, `replay_part` takes the decisions about
  them again in a `rehearsal`, which compares all queries at once (`comparing`); `replay` takes them
  in the codebook itself.
* `codebook` is the public face of all this; `moments` lets changes of several be seen at once;
  `snapshot` turns it into bytes, `store` keeps those on disk.
"""

from .codebook import Codebook
from .records import CapacityError, Edit, EditResult, UndoError

__all__ = ["CapacityError", "Codebook", "Edit", "EditResult", "UndoError"]
