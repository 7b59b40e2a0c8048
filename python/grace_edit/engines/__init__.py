"""Edited models inside the engines that serve them: what each engine needs of its own."""
