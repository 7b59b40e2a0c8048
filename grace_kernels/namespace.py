"""The namespace of the operators; `hub/export.py` writes another one into what it exports.

An operator is registered once per process, so a copy of this package has names of its own.
"""

NAMESPACE = "grace"
