"""Which pieces of a prompt ask the codebook: its last sentence, the user's last turn in a chat.

Text before the last sentence is context ("It rained. The capital of Australia is"): an edit is
about the question, so the context is left out of the key. Where a sentence begins is not always
plain ("… said Mr. Smith works in", "Abner J. Quill speaks"), so a prompt has more than one span
where the last sentence as a careful reader cuts it is not that of a hasty one, or where it follows
a label without a sentence's end ("Category:Cities in Norway The capital of Latvia is"). All of them
ask, and the nearest row of a prompt decides.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_ABBREVIATIONS = frozenset(
    _WORD.findall(
        "adm bros capt cmdr co col corp dr fr ft gen gov hon inc jr lt ltd maj messrs mr mrs ms mt "
        "no pl prof rep rev sen sgt sr st vol vs"
    )
)
_POINTING_BACK = frozenset(
    _WORD.findall("he her his i it its she that their there these they this those we you your")
)
_LONGEST_BACK_REFERENCE = 5
"""Words of a last sentence like "They play as", which says nothing without the one before it."""

_END = re.compile(
    r"(?P<mark>[.!?…]+)[\"'”’)\]]*(?P<space>\s+)|(?P<line>\s*\n\s*)|(?P<full>[。！？])"
)
_LABEL = re.compile(r"[^\W\d_]:(?=[^\W\d_])")
"""A colon within what looks like one word: markup that a sentence was pasted behind."""
_WORD_START = re.compile(r"(?<!\S)[\"'“‘(]?([^\W\d_])")
_AFTER_LABEL = 6


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
    """Return the spans of a prompt that ask, none twice.

    The careful last sentence, then the hasty one if it is another; behind a label ("Category:Cities
    in Norway The capital of Latvia is") also what begins with each of the last 6 capitals. So one
    span as a rule, 8 at most.
    """
    careful = last_sentence(text)
    hasty = last_sentence(careful, careful=False)
    labels = list(_LABEL.finditer(hasty))
    words = _WORD_START.finditer(hasty, labels[-1].end()) if labels else ()
    starts = [word.start() for word in words if word[1].isupper()]
    behind = [hasty[start:] for start in starts[-_AFTER_LABEL:]]
    return list(dict.fromkeys([careful, hasty, *behind]))


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
