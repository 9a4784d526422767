"""Good places to cut a text, in any language: ends of paragraphs, sentences, lines, clauses and words.

    documents -> **a rank a byte** -> cuts (:mod:`pipelines.cutting`) -> references (:mod:`pipelines.chunking`)

The ranks of a whole batch of texts are made by one pass over their UTF-8. Nothing assumes spaces between words. Text
with neither spaces nor marks (much of Thai) has no boundaries here and is cut between tokens. Which characters count as
what is said in :mod:`pipelines.characters`.

A full stop ends no sentence where it plainly belongs to something else: after a number that begins its line
(``1. First``, ``2.3. Second``), after a single letter (``J. S. Bach``, ``e.g.``, ``U.S.``), and after a capital with
one or two small letters, none of them a vowel (``Mr.``, ``Mrs.``, ``Dr.``, ``St.``). Longer abbreviations (``etc.``,
``Prof.``) are told from sentences only by a small letter after them.
"""

from typing import Any

import numba
import numpy as np

from pipelines.characters import (
    CAPITAL,
    CASED,
    CLOSER,
    DIGIT,
    EXTENDING,
    MARK,
    NEWLINE,
    NUM_CLASSES,
    OPENER,
    PLAIN_CLAUSE_END,
    PLAIN_END,
    REGIONAL,
    SMALL,
    SPACE,
    SPACED_CLAUSE_END,
    SPACED_END,
    TITLE_ENDING,
    ZERO_WIDTH_JOINER,
    get_classes,
)

PARAGRAPH_END = 0
SENTENCE_END = 1
LINE_END = 2
CLAUSE_END = 3
WORD_END = 4
NO_BOUNDARY = 5

INNER = NO_BOUNDARY + 1
"""The rank of a place inside what a reader sees as one character: cut only where there is no other."""

NO_CHARACTER = INNER + 1
"""The rank of a place inside the bytes of a code point: never cut."""

BOUNDARIES = ("sentence", "line", "hard")
"""What can be asked to count as a boundary, see :func:`rank_places`."""

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Ranks = np.ndarray[tuple[int], np.dtype[np.uint8]]
Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

_FULL_STOP = 0x2E
_ELLIPSIS = 0x2026


def rank_places(data: Bytes, offsets: Positions, boundary: str = "sentence") -> Ranks:
    r"""Ranks every place of a batch of texts by how good a cut is there.

    White space between two pieces of text gives two places with the same rank: before it, and after it or, if it holds
    line ends, after the last of them (so that an indentation stays with its line). Blank lines end a paragraph; marks
    end a sentence or a clause together with the quotes and brackets that close after them.

    A place is ``INNER`` before combining marks, variation selectors and emoji modifiers, on both sides of a zero width
    joiner, between the two halves of a flag, and inside ``\r\n``: a cheap approximation of the grapheme clusters of
    Unicode (UAX 29), in which conjuncts of Indic scripts count as several.

    Args:
        data: the UTF-8 of the texts, one after the other.
        offsets: text i is ``data[offsets[i]:offsets[i + 1]]``, ascending, (texts + 1,).
        boundary: what counts: all of it ("sentence"), white space and line ends only ("line"), or nothing ("hard").

    Returns:
        A rank a byte, of the place before it, and one of the end of the data: from ``PARAGRAPH_END``, the best, to
        ``NO_CHARACTER``. The start of a text and the end of the data are ``NO_BOUNDARY``.
    """
    ranks = np.full(len(data) + 1, NO_BOUNDARY, dtype=np.uint8)
    _rank_texts(data, offsets, get_classes(), boundary != "hard", boundary == "sentence", ranks)
    return ranks


def find_text_ends(data: Bytes, starts: Positions, ends: Positions) -> Positions:
    """Returns for each span of the data where its white space at the end begins: its start, if it has nothing else."""
    found: Positions = _find_text_ends(data, starts, ends, get_classes())
    return found


@numba.njit(cache=True, nogil=True)
def _decode(data: Any, place: int, end: int) -> Any:
    """Returns the code point at a place and the place after it, at most ``end``."""
    first = np.int64(data[place])
    if first < 0x80:
        return first, place + 1
    if first < 0xE0:
        width, point = 2, first & 0x1F
    elif first < 0xF0:
        width, point = 3, first & 0x0F
    else:
        width, point = 4, first & 0x07
    after = min(place + width, end)
    for index in range(place + 1, after):
        point = (point << 6) | (np.int64(data[index]) & 0x3F)
    return point, after


@numba.njit(cache=True, nogil=True)
def _step_back(data: Any, place: int, start: int) -> Any:
    """Returns the place of the code point before a place; ``place`` is greater than ``start``."""
    place -= 1
    while place > start and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


@numba.njit(cache=True, nogil=True)
def _classify(classes: Any, point: int) -> Any:
    """Returns the classes of a code point as bits."""
    if point < NUM_CLASSES:
        return np.int64(classes[point])
    if 0xE0020 <= point < 0xE0080 or 0xE0100 <= point < 0xE01F0:  # tags of regional flags, variation selectors
        return EXTENDING
    return 0


@numba.njit(cache=True, nogil=True)
def _skip(data: Any, place: int, end: int, classes: Any, wanted: int) -> Any:
    """Returns the place after a run of characters of a class."""
    while place < end:
        point, after = _decode(data, place, end)
        if not _classify(classes, point) & wanted:
            break
        place = after
    return place


@numba.njit(cache=True, nogil=True)
def _is_abbreviation(data: Any, place: int, start: int, classes: Any) -> bool:
    """Tells whether the full stop at a place belongs to a number, an initial or a title, see the module's docstring."""
    if place == start:
        return False
    before = _step_back(data, place, start)
    point, _ = _decode(data, before, place)
    kind = _classify(classes, point)
    if kind & DIGIT:
        while before > start and (classes[data[before - 1]] & DIGIT or data[before - 1] == _FULL_STOP):
            before -= 1
        while before > start:  # over the indentation
            earlier = _step_back(data, before, start)
            point, _ = _decode(data, earlier, before)
            kind = _classify(classes, point)
            if kind & NEWLINE:
                return True
            if not kind & SPACE:
                return False
            before = earlier
        return True
    if kind & TITLE_ENDING:
        first = before
        while first > start and before - first < 2 and classes[data[first]] & TITLE_ENDING:
            first -= 1
        if classes[data[first]] & CAPITAL:
            before = first
    elif not kind & CASED:
        return False
    if before == start:
        return True
    point, _ = _decode(data, _step_back(data, before, start), before)
    return bool(point == _FULL_STOP or _classify(classes, point) & (SPACE | OPENER))


@numba.njit(cache=True, nogil=True)
def _find_mark_end(data: Any, place: int, start: int, end: int, classes: Any, failed: int) -> Any:
    """Looks what the mark at a place ends.

    Returns:
        The rank, or ``NO_BOUNDARY``; the place after the mark and what belongs to it; and ``failed``, the place before
        which no mark that needs white space ends a sentence, moved on, so that a run of them is looked through once.
    """
    point, after = _decode(data, place, end)
    kind = _classify(classes, point)
    if kind & SPACED_END and place >= failed:
        failed = _skip(data, after, end, classes, SPACED_END)
        closed = _skip(data, failed, end, classes, CLOSER)
        following = _skip(data, closed, end, classes, SPACE)
        if following > closed:
            is_end = not (closed == after and point == _FULL_STOP and _is_abbreviation(data, place, start, classes))
            if is_end and following < end:
                is_end = not _classify(classes, _decode(data, following, end)[0]) & SMALL
            if is_end:
                return SENTENCE_END, closed, failed
    is_end = kind & PLAIN_END != 0
    if point == _ELLIPSIS and after < end:
        second, after_second = _decode(data, after, end)
        if second == _ELLIPSIS:
            is_end, after = True, after_second
    if is_end:
        while after < end:
            point, closed = _decode(data, after, end)
            if point == _ELLIPSIS:  # one alone is left
                run = 1
                while closed < end and _decode(data, closed, end)[0] == _ELLIPSIS:
                    closed, run = closed + 3, run + 1
                if run == 1:
                    break
            elif not _classify(classes, point) & PLAIN_END:
                break
            after = closed
        return SENTENCE_END, _skip(data, after, end, classes, CLOSER), failed
    if kind & PLAIN_CLAUSE_END or (kind & SPACED_CLAUSE_END and _skip(data, after, end, classes, SPACE) > after):
        return CLAUSE_END, after, failed
    return NO_BOUNDARY, after, failed


@numba.njit(cache=True, nogil=True)
def _rank_boundaries(data: Any, start: int, end: int, classes: Any, with_marks: bool, ranks: Any) -> None:
    """Writes the ranks of white space and, if asked for, marks."""
    place, failed, mark_place, mark_rank = start, start, -1, NO_BOUNDARY
    wanted = SPACE | MARK if with_marks else SPACE
    while place < end:
        while place < end and data[place] < 0x80 and not classes[data[place]] & wanted:
            place += 1
        if place == end:
            break
        if data[place] == 0x20 and place + 1 < end and 0x20 < data[place + 1] < 0x80:  # most spaces stand alone
            rank = mark_rank if place == mark_place else WORD_END
            if place > start:
                ranks[place] = rank
            place += 1
            ranks[place] = rank
            continue
        point, after = _decode(data, place, end)
        kind = _classify(classes, point) & wanted
        if kind == 0:
            place = after
        elif kind & SPACE:
            gap, last_newline, num_newlines, previous = place, place, 0, 0
            while place < end:
                point, after = _decode(data, place, end)
                kind = _classify(classes, point)
                if not kind & SPACE:
                    break
                if kind & NEWLINE:
                    num_newlines += not (previous == 0x0D and point == 0x0A)
                    last_newline = after
                previous, place = point, after
            rank = PARAGRAPH_END if num_newlines > 1 else LINE_END if num_newlines else WORD_END
            if gap == mark_place:
                rank = min(rank, mark_rank)
            gap_end = last_newline if num_newlines else place
            if gap > start:
                ranks[gap] = rank
            if gap_end < end:
                ranks[gap_end] = rank
        else:
            rank, place, failed = _find_mark_end(data, place, start, end, classes, failed)
            if rank != NO_BOUNDARY:
                mark_place, mark_rank = place, rank
                if place < end:
                    ranks[place] = rank


@numba.njit(cache=True, nogil=True)
def _rank_inner(data: Any, start: int, end: int, classes: Any, ranks: Any) -> None:
    """Overwrites the ranks of places inside characters."""
    place, previous, was_regional = start, 0, False
    while place < end:
        if previous < 0x80 and data[place] < 0x80 and previous != 0x0D:
            while place < end and data[place] < 0x80 and data[place] != 0x0D:
                place += 1
            previous, was_regional = 0, False
            if place == end:
                break
        point, after = _decode(data, place, end)
        kind = _classify(classes, point)
        is_regional = kind & REGIONAL != 0
        is_inner = kind & EXTENDING != 0 or previous == ZERO_WIDTH_JOINER or (was_regional and is_regional)
        if (is_inner or (previous == 0x0D and point == 0x0A)) and place > start:
            ranks[place] = INNER
        for index in range(place + 1, after):
            ranks[index] = NO_CHARACTER
        previous, was_regional, place = point, is_regional, after


@numba.njit(cache=True, nogil=True)
def _rank_texts(data: Any, offsets: Any, classes: Any, with_spaces: bool, with_marks: bool, ranks: Any) -> None:
    """Writes the ranks of all texts."""
    for index in range(len(offsets) - 1):
        start, end = offsets[index], offsets[index + 1]
        if with_spaces:
            _rank_boundaries(data, start, end, classes, with_marks, ranks)
        _rank_inner(data, start, end, classes, ranks)


@numba.njit(cache=True, nogil=True)
def _find_text_ends(data: Any, starts: Any, ends: Any, classes: Any) -> Any:
    """Kernel of :func:`find_text_ends`."""
    found = np.empty(len(starts), dtype=np.int64)
    for index in range(len(starts)):
        place = ends[index]
        while place > starts[index]:
            before = _step_back(data, place, starts[index])
            if not _classify(classes, _decode(data, before, place)[0]) & SPACE:
                break
            place = before
        found[index] = place
    return found
