"""The kinds of models that can be edited."""
