"""Edit transformers models with GRACE and serve the edits.

`GraceEditor` makes edits, `load` serves saved ones. The operators are in `grace_kernels`.
"""

from .adaptor.adaptor import GraceAdaptor
from .adaptor.attach import detach
from .adaptor.positions import QueryPlan
from .codebook.codebook import Codebook
from .codebook.files import StoreError
from .codebook.records import CapacityError, EditResult, UndoError
from .config import GraceConfig
from .durable.following import Follower, follow
from .durable.publishing import Publisher, publish
from .editing.explanation import Explanation
from .editing.scoring import Score
from .editing.verification import Misfire
from .editor import GraceEditor
from .layers import LayersError
from .serving import load
from .suggesting import LayerSuggestion, RadiusSuggestion, suggest_layer, suggest_radius

__all__ = [
    "CapacityError",
    "Codebook",
    "EditResult",
    "Explanation",
    "Follower",
    "GraceAdaptor",
    "GraceConfig",
    "GraceEditor",
    "LayerSuggestion",
    "LayersError",
    "Misfire",
    "Publisher",
    "QueryPlan",
    "RadiusSuggestion",
    "Score",
    "StoreError",
    "UndoError",
    "detach",
    "follow",
    "load",
    "publish",
    "suggest_layer",
    "suggest_radius",
]
