"""The codebook: entries, the edits they answer for, every change to them, and their files."""

from .codebook import Codebook
from .records import CapacityError, Edit, EditResult, UndoError

__all__ = ["CapacityError", "Codebook", "Edit", "EditResult", "UndoError"]
