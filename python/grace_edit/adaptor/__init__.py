"""What stands round a layer: it asks the codebook and replaces the rows that an entry answers."""

from .adaptor import GraceAdaptor

__all__ = ["GraceAdaptor"]
