"""Lifelong evaluation: the field's data sets, protocol and metrics, and baselines on one stream.

`command.run(Options(...))` does a whole evaluation. Below it: `loading.load` reads a data set,
`run.run_stream` runs a method on it, `results` turns what was measured into figures.
"""

from .command import BASELINES, Options, run
from .identity import EvaluationError, OtherRunError
from .loading import DataError, Loaded, NoDataError, load, load_questions
from .methods import Grace, Look, Made, Method
from .model import AskedModel
from .records import EditRecord, Question
from .run import Protocol, run_stream
from .settings import SETTINGS, Setting

__all__ = [
    "BASELINES",
    "SETTINGS",
    "AskedModel",
    "DataError",
    "EditRecord",
    "EvaluationError",
    "Grace",
    "Loaded",
    "Look",
    "Made",
    "Method",
    "NoDataError",
    "Options",
    "OtherRunError",
    "Protocol",
    "Question",
    "Setting",
    "load",
    "load_questions",
    "run",
    "run_stream",
]
