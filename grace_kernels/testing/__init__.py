"""For tests and benchmarks: inputs, random codebooks with sketches, an oracle, comparison."""

from .inputs import (
    INF,
    NAN,
    Case,
    fusion_shows,
    order_shows,
    regimes,
    swap_shows,
    ties_within_rounding,
)
from .oracle import oracle, oracle_squared_distance, same_bits
from .random_codebooks import Draw, SketchCase, random_codebook

__all__ = [
    "INF",
    "NAN",
    "Case",
    "Draw",
    "SketchCase",
    "fusion_shows",
    "oracle",
    "oracle_squared_distance",
    "order_shows",
    "random_codebook",
    "regimes",
    "same_bits",
    "swap_shows",
    "ties_within_rounding",
]
