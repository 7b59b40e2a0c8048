"""Which pieces of a prompt ask the codebook: its last sentence, the user's last turn in a chat.

Text before the last sentence is context ("It rained. The capital of Australia is"): an edit is
about the question, so the context is left out of the key. Where a sentence begins is not always
plain ("… said Mr. Smith works in", "Edward J. King speaks"), so a prompt has one span or two: the
last sentence as a careful reader cuts it, and as a hasty one does, where they differ. Both ask, and
the nearest row of a prompt decides.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = frozenset(
    "adm bros capt cmdr co col corp dr fr ft gen gov hon inc jr lt ltd maj messrs mr mrs ms mt no "
    "pl prof rep rev sen sgt sr st vol vs".split()
)
_POINTING_BACK = frozenset(
    "he her his i it its she that their there these they this those we you your".split()
)
_LONGEST_BACK_REFERENCE = 5
"""Words of a last sentence like "They play as", which says nothing without the one before it."""

_END = re.compile(
    r"(?P<mark>[.!?…]+)[\"'”’)\]]*(?P<space>\s+)|(?P<line>\s*\n\s*)|(?P<full>[。！？])"
)
_WORD = re.compile(r"\w+")


def last_sentence(text: str, *, careful: bool = True) -> str:
    """Return the last sentence of `text`, with the one before it where it points back to that.

    Args:
        text: any text; an empty one gives an empty span.
        careful: do not end a sentence behind an abbreviation or an initial, nor before a
            lower-case letter. Otherwise every full stop, exclamation or question mark before a
            space ends one, as the end of a line does in both cases.
    """
    text = text.strip()
    starts = [0, *(end for end in _ends(text, careful) if end < len(text))]
    for start in reversed(starts):
        words = _WORD.findall(text[start:])
        points_back = (
            bool(words)
            and words[0].lower() in _POINTING_BACK
            and len(words) <= _LONGEST_BACK_REFERENCE
        )
        if words and not points_back:
            return text[start:]
    return text


def spans(text: str) -> list[str]:
    """Return the spans of a prompt that ask: the careful last sentence, then the hasty one if
    it is another. At least one, at most two."""
    careful = last_sentence(text)
    hasty = last_sentence(careful, careful=False)
    return [careful] if hasty == careful else [careful, hasty]


def _ends(text: str, careful: bool) -> list[int]:
    ends = []
    for match in _END.finditer(text):
        ends_surely = match["mark"] is None or "\n" in match["space"]
        if ends_surely or not careful or _ends_a_sentence(text, match):
            ends.append(match.end())
    return ends


def _ends_a_sentence(text: str, match: re.Match[str]) -> bool:
    if text[match.end() : match.end() + 1].islower():
        return False
    if match["mark"] != ".":
        return True
    before = re.search(r"\w+$", text[: match.start()])
    if before is None:
        return True
    word = before[0]
    initial = len(word) == 1 and word.isalpha()
    return not (initial or word.lower() in _ABBREVIATIONS)
