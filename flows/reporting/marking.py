"""Texts of a corpus made fit for a page: unreadable characters made visible, and differing words of two texts marked.

A text may hold anything: control characters, halves of surrogate pairs, characters that turn the direction of all that
follows them. Escaping for HTML is not done here but by the template engine.
"""

import dataclasses
import difflib
import re

MAX_TEXT_CHARS = 1500
"""Characters of a text that are shown; a reference has at most 128 tokens, seldom more than 700 characters."""

REPLACEMENT = "\ufffd"

_UNFIT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufff9-\uffff\ud800-\udfff]"
)
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a text.

    Attributes:
        text: the stretch.
        differs: whether the other text has something else in its place.
    """

    text: str
    differs: bool


def clean_text(text: str) -> str:
    """Returns a text as a page can show it.

    Control characters become their pictures, characters that steer the direction of text their numbers, and what is no
    character at all the replacement character. Ends of lines become line feeds.
    """
    return _UNFIT.sub(_show_unfit, text.replace("\r\n", "\n").replace("\r", "\n"))


def _show_unfit(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code in (0x61C, 0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return f"[U+{code:04X}]"
    return REPLACEMENT


def shorten_text(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Returns the beginning of a text, with an ellipsis where something is left out."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def mark_differences(left: str, right: str) -> tuple[list[Span], list[Span]]:
    """Returns the beginnings of two texts in stretches that both have, and stretches of words that differ.

    White space counts as equal whatever it is: near-duplicates are compared by their words.
    """
    words = [_WORD.findall(shorten_text(text)) for text in (left, right)]
    keys = [[" " if word.isspace() else word for word in side] for side in words]
    spans: tuple[list[Span], list[Span]] = ([], [])
    matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for operation, left_start, left_end, right_start, right_end in matcher.get_opcodes():
        for side, (start, end) in enumerate(((left_start, left_end), (right_start, right_end))):
            if start < end:
                spans[side].append(Span(text="".join(words[side][start:end]), differs=operation != "equal"))
    return spans
