"""Codebooks whose entries lie on several devices, and that answer like one on one device.

Imported by whoever wants it; `import grace_kernels` does not.
"""

from .arguments import process_group
from .codebook import ShardedCodebook
from .layout import Layout
from .rebalancing import rebalance

__all__ = ["Layout", "ShardedCodebook", "process_group", "rebalance"]
