"""The proofs in docs/error-bounds.md are where code says they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "error-bounds.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no source tree")


def test_lemmas_are_numbered_in_order_and_each_is_proven() -> None:
    parts = re.split(r"^\*\*Lemma (\d+)\*\*", PAGE.read_text(), flags=re.MULTILINE)
    numbers, texts = parts[1::2], parts[2::2]
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert [number for number, text in zip(numbers, texts, strict=True) if "∎" not in text] == []


def test_code_names_lemmas_that_there_are_and_every_bound_of_a_kernel_is_named() -> None:
    named: set[str] = set()
    for folder, suffixes in (("csrc", {".h", ".cpp", ".cuh"}), ("grace_kernels", {".py"})):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                named |= set(re.findall(r"\bLemma (\d+)\b", path.read_text()))
    lemmas = set(re.findall(r"^\*\*Lemma (\d+)\*\*", PAGE.read_text(), flags=re.MULTILINE))
    # 1, 3, 4, 11 and 15 are steps on the way to the others.
    assert lemmas - named == {"1", "3", "4", "11", "15"}
    assert named <= lemmas
