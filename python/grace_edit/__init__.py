"""Edit transformers models with GRACE and serve the edits.

`GraceEditor` makes edits, `load` serves saved ones. The operators are in `grace_kernels`.
"""

from .adaptor import GraceAdaptor
from .attach import detach
from .codebook import Codebook
from .config import GraceConfig
from .editor import Explanation, GraceEditor
from .positions import QueryPlan
from .records import CapacityError, EditResult, UndoError
from .serving import load
from .store import StoreError
from .verifying import Misfire

__all__ = [
    "CapacityError",
    "Codebook",
    "EditResult",
    "Explanation",
    "GraceAdaptor",
    "GraceConfig",
    "GraceEditor",
    "Misfire",
    "QueryPlan",
    "StoreError",
    "UndoError",
    "detach",
    "load",
]
