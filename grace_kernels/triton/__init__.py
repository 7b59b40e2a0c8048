"""The Triton implementation. Importing it imports triton; `backends.py` does so when needed."""
