"""Records about models that count (see tests/edit/tiny_models.py): "w4 w5" goes on "w6"."""

from __future__ import annotations

from grace_edit.evaluation import EditRecord, Question

FIRST, WORDS = 4, 60
"""Of the models' words."""


def words(start: int, length: int) -> str:
    """Return a run of successors as text."""
    return " ".join(f"w{FIRST + (start + i) % WORDS}" for i in range(length))


def record(number: int) -> EditRecord:
    """Return an edit of a run of successors, with questions of every kind."""
    start = 7 * number
    prompt, target = words(start, 5), words(start + 20, 2)
    return EditRecord(
        id=str(number),
        prompt=prompt,
        target=target,
        old=words(start + 5, 2),
        subject=f"w{FIRST + start % WORDS}",
        paraphrases=(words(start - 1, 6), words(start + 1, 4)),
        neighbours=tuple(
            Question(words(start + far, 5), (words(start + far + 5, 2),)) for far in (30, 40)
        ),
        same_subject=(Question(words(start, 2), (words(start + 2, 2),)),),
        unrelated=(Question(words(start + 25, 7), (words(start + 32, 2),)),),
        portability=(Question(words(start + 2, 5), (words(start + 7, 2),), "Reasoning"),),
    )
