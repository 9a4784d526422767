"""Good places to cut a text, in any language: ends of paragraphs, sentences, lines, clauses and words.

Used by :mod:`pipelines.chunking`. White space is found by numpy over the code points, punctuation by one pass of one
compiled expression; nothing assumes spaces between words. Text with neither (much of Thai) has no boundaries here and
is cut between tokens.
"""

# ruff: noqa: RUF001  (the marks of many scripts look like those of ASCII)

import functools
import re
import unicodedata

import numpy as np

PARAGRAPH_END = 0
SENTENCE_END = 1
LINE_END = 2
CLAUSE_END = 3
WORD_END = 4
NO_BOUNDARY = 5

CodePoints = np.ndarray[tuple[int], np.dtype[np.uint8]] | np.ndarray[tuple[int], np.dtype[np.uint32]]
Positions = np.ndarray[tuple[int], np.dtype[np.int32]]
Ranks = np.ndarray[tuple[int], np.dtype[np.uint8]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

_CLOSERS = "\"'’”›»)\\]}`*_」』】）〉》〕］｝〗〙〛｣﹂﹄＂＇"

# The marks of Latin, Greek and Cyrillic stand inside numbers, names and abbreviations too, so white space must follow,
# and no small letter ("e.g. this"). The marks of other scripts (CJK, Devanagari, Arabic, Armenian, Ethiopic, Khmer,
# Myanmar, Tibetan) have one meaning.
_SPACED_ENDS = ".!?…‽‼⁇-⁉"
_PLAIN_ENDS = "。！？；｡।॥؟۔։።፧។៕။\u0f0d༎"
_SPACED_CLAUSE_ENDS = ",;:—–"
_PLAIN_CLAUSE_ENDS = "，、：､،؛"

# The expression begins with one set of characters, which makes the search for a match six times as fast as with a
# choice; what the mark was is asked afterwards by looking back. The empty group 1 tells sentences from clauses.
_MARKS = re.compile(
    rf"[{_SPACED_ENDS}{_PLAIN_ENDS}{_SPACED_CLAUSE_ENDS}{_PLAIN_CLAUSE_ENDS}](?:"
    rf"(?:(?<=[{_SPACED_ENDS}])[{_SPACED_ENDS}]*+[{_CLOSERS}]*+(?=\s++(?![a-zß-öø-ÿα-ωа-яё]))"
    rf"|(?:(?<=[{_PLAIN_ENDS}])|(?<=…)…)(?:[{_PLAIN_ENDS}]|…{{2,}})*+[{_CLOSERS}]*+)()"
    rf"|(?<=[{_SPACED_CLAUSE_ENDS}])(?=\s)|(?<=[{_PLAIN_CLAUSE_ENDS}]))"
)

_NEWLINES = (0x0A, 0x0C, 0x0D, 0x85, 0x2028, 0x2029)
_LAST_SPACE = 0x3000
_ZERO_WIDTH_JOINER = 0x200D
_REGIONAL_INDICATORS = (0x1F1E6, 0x1F1FF)


def get_code_points(text: str) -> CodePoints:
    """Returns the code points of a text, shape (characters,): uint8 if all are ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def find_boundaries(text: str) -> tuple[Positions, Ranks]:
    r"""Finds the places of a text after which a cut is good.

    White space between two pieces of text gives two places with the same rank: before it, and after it or, if it holds
    line ends, after the last of them (so that an indentation stays with its line). Blank lines end a paragraph; marks
    end a sentence or a clause together with the quotes and brackets that close after them.

    Returns:
        The places in characters, ascending, each greater than 0 and less than the length of the text; and the rank of
        each, from ``PARAGRAPH_END``, the best, to ``WORD_END``.
    """
    ranks = np.full(len(text) + 1, NO_BOUNDARY, dtype=np.uint8)
    befores, afters, gap_ranks = _find_gaps(get_code_points(text))
    ranks[befores] = gap_ranks
    ranks[afters] = gap_ranks

    marks = [(match.end(), SENTENCE_END if match.lastindex else CLAUSE_END) for match in _MARKS.finditer(text)]
    if marks:
        places, mark_ranks = np.array(marks, dtype=np.int64).T
        ranks[places] = np.minimum(ranks[places], mark_ranks)
        gaps = np.minimum(np.searchsorted(befores, places), max(0, len(befores) - 1))
        follows = befores[gaps] == places if len(befores) else np.zeros(len(places), dtype=bool)
        ends = afters[gaps[follows]]
        ranks[ends] = np.minimum(ranks[ends], mark_ranks[follows])
    positions = np.flatnonzero(ranks[1:-1] != NO_BOUNDARY) + 1
    return positions.astype(np.int32), ranks[positions]


def _find_gaps(points: CodePoints) -> tuple[Positions, Positions, Ranks]:
    """Returns for each run of white space its start, the place to cut after it, and its rank."""
    is_space = _look_up(_get_space_table(), points)
    edges = np.flatnonzero(np.diff(is_space, prepend=False, append=False))
    starts, ends = edges[0::2], edges[1::2]

    is_newline = np.isin(points[is_space], _NEWLINES)
    spaces = np.flatnonzero(is_space)
    newlines = spaces[is_newline]
    newlines = newlines[~_starts_crlf(points, newlines)]
    first, last = np.searchsorted(newlines, starts), np.searchsorted(newlines, ends)
    num_newlines = last - first
    afters = ends.copy()
    has_newline = num_newlines > 0
    afters[has_newline] = newlines[last[has_newline] - 1] + 1
    ranks = np.where(num_newlines > 1, PARAGRAPH_END, np.where(has_newline, LINE_END, WORD_END))
    return starts.astype(np.int32), afters.astype(np.int32), ranks.astype(np.uint8)


def _starts_crlf(points: CodePoints, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Mask:
    following = points[np.minimum(places + 1, len(points) - 1)]
    starts: Mask = (points[places] == 0x0D) & (following == 0x0A)
    return starts


def find_inner_positions(text: str) -> Mask:
    r"""Marks the places inside what a reader sees as one character.

    These are the places before combining marks, variation selectors and emoji modifiers, on both sides of a zero width
    joiner, between the two halves of a flag, and inside ``\r\n``. A cheap approximation of the grapheme clusters of
    Unicode (UAX 29): conjuncts of Indic scripts count as several.

    Returns:
        One value a character, shape (characters,): True if no cut should come before it.
    """
    points = get_code_points(text)
    inner = np.zeros(len(points), dtype=bool)
    if not len(points):
        return inner
    inner[1:] = (points[:-1] == 0x0D) & (points[1:] == 0x0A)
    if points.dtype == np.uint32:
        inner |= _look_up(_get_extending_table(), points)
        inner[1:] |= points[:-1] == _ZERO_WIDTH_JOINER
        is_half = (points >= _REGIONAL_INDICATORS[0]) & (points <= _REGIONAL_INDICATORS[1])
        inner[1:] |= is_half[:-1] & is_half[1:]
    inner[0] = False
    return inner


def _look_up(table: Mask, points: CodePoints) -> Mask:
    """Returns the entry of each code point; the last entry stands for all that are greater."""
    found: Mask = table[points if points.dtype == np.uint8 else np.minimum(points, len(table) - 1)]
    return found


@functools.cache
def _get_space_table() -> Mask:
    """Returns for each code point whether it is white space; the last entry stands for the rest."""
    return np.array([chr(point).isspace() for point in range(_LAST_SPACE + 2)])


@functools.cache
def _get_extending_table() -> Mask:
    """Returns for each code point whether it belongs to the character before it; the last entry stands for the rest."""
    table = np.zeros(0xE01F1, dtype=bool)
    for start, end in ((0x300, 0x20000), (0xE0100, 0xE01F0)):
        table[start:end] = [unicodedata.category(chr(point))[0] == "M" for point in range(start, end)]
    table[[_ZERO_WIDTH_JOINER, 0x200C, 0x0E33, 0x0EB3]] = True
    table[0x1160:0x1200] = True  # vowels and finals of Hangul written in parts
    table[0x1F3FB:0x1F400] = True  # skin tones
    table[0xE0020:0xE0080] = True  # tags of regional flags
    return table
