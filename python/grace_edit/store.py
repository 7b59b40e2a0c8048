"""Saving a codebook and loading it."""

from __future__ import annotations


class StoreError(ValueError):
    """A saved codebook is missing, damaged, of another kind, or too new."""
