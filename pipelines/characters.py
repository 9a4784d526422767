"""What characters mean to a cut, in many scripts: white space, marks, letters with case, parts of other characters.

Read by :mod:`pipelines.boundaries`, the first step of cutting documents: a table of bits a code point, made once a
process from Python's Unicode database and the lists below. The kernels there are compiled with the bits, and their
cache does not see a change made here: delete ``__pycache__`` after one.
"""

# ruff: noqa: RUF001  (the marks of many scripts look like those of ASCII)

import functools
import unicodedata

import numpy as np

Classes = np.ndarray[tuple[int], np.dtype[np.uint16]]

# The marks of Latin, Greek and Cyrillic stand inside numbers, names and abbreviations too, so white space must follow,
# and no small letter ("e.g. this"). The marks of other scripts (CJK, Devanagari, Arabic, Armenian, Ethiopic, Khmer,
# Myanmar, Tibetan) have one meaning. A single … is a mark of the first kind, two or more of the second.
_CLOSERS = "\"'’”›»)]}`*_」』】）〉》〕］｝〗〙〛｣﹂﹄＂＇"
_SPACED_ENDS = ".!?…‽‼⁇⁈⁉"
_PLAIN_ENDS = "。！？；｡।॥؟۔։።፧។៕။\u0f0d༎"
_SPACED_CLAUSE_ENDS = ",;:—–"
_PLAIN_CLAUSE_ENDS = "，、：､،؛"
_OPENERS = "([{"
_SMALL_RANGES = (("a", "z"), ("ß", "ö"), ("ø", "ÿ"), ("α", "ω"), ("а", "я"), ("ё", "ё"))
_TITLE_ENDINGS = "bcdfghjklmnpqrstvwxz"

SPACE = 1
NEWLINE = 1 << 1
SPACED_END = 1 << 2
PLAIN_END = 1 << 3
SPACED_CLAUSE_END = 1 << 4
PLAIN_CLAUSE_END = 1 << 5
MARK = SPACED_END | PLAIN_END | SPACED_CLAUSE_END | PLAIN_CLAUSE_END
CLOSER = 1 << 6
SMALL = 1 << 7
CASED = 1 << 8
DIGIT = 1 << 9
OPENER = 1 << 10
TITLE_ENDING = 1 << 11
CAPITAL = 1 << 12
EXTENDING = 1 << 13
REGIONAL = 1 << 14

NUM_CLASSES = 0x20000
"""Code points in the table; the kernels know the few above that matter."""

_NEWLINES = (0x0A, 0x0C, 0x0D, 0x85, 0x2028, 0x2029)
ZERO_WIDTH_JOINER = 0x200D


@functools.cache
def get_classes() -> Classes:
    """Returns for each code point below 0x20000 the classes it is in, as bits."""
    characters = [chr(point) for point in range(NUM_CLASSES)]
    categories = np.array([unicodedata.category(character) for character in characters])
    classes = np.zeros(NUM_CLASSES, dtype=np.uint16)
    classes[[character.isspace() for character in characters]] |= SPACE
    classes[np.isin(categories, ("Lu", "Ll", "Lt"))] |= CASED
    classes[np.strings.startswith(categories, "M")] |= EXTENDING
    classes[list(_NEWLINES)] |= NEWLINE
    for bit, members in (
        (SPACED_END, _SPACED_ENDS),
        (PLAIN_END, _PLAIN_ENDS),
        (SPACED_CLAUSE_END, _SPACED_CLAUSE_ENDS),
        (PLAIN_CLAUSE_END, _PLAIN_CLAUSE_ENDS),
        (CLOSER, _CLOSERS),
        (OPENER, _OPENERS),
        (TITLE_ENDING, _TITLE_ENDINGS),
    ):
        classes[[ord(character) for character in members]] |= bit
    for first, last in _SMALL_RANGES:
        classes[ord(first) : ord(last) + 1] |= SMALL
    classes[ord("0") : ord("9") + 1] |= DIGIT
    classes[ord("A") : ord("Z") + 1] |= CAPITAL
    classes[[ZERO_WIDTH_JOINER, 0x200C, 0x0E33, 0x0EB3]] |= EXTENDING
    classes[0x1160:0x1200] |= EXTENDING  # vowels and finals of Hangul written in parts
    classes[0x1F3FB:0x1F400] |= EXTENDING  # skin tones
    classes[0x1F1E6:0x1F200] |= REGIONAL
    return classes
