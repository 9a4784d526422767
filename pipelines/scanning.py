"""What texts consist of: characters, lines, paragraphs and sentences, counted in one pass over their UTF-8 bytes.

    records -> **counts** -> measures (:mod:`pipelines.measuring`) -> filters

The pass is a compiled loop over a whole batch. It hashes every line and paragraph, of which :mod:`pipelines.repetition`
counts those that come again. What is said of a text depends on that text alone.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa

from pipelines.repetition import Counts, count_repeated
from pipelines.words import JOINERS, SPACELESS_SCRIPTS, Bytes, Hashes, freeze_array, mix_bits

BULLETS = "*+-\u2010\u2012\u2013\u2014\u2022\u2023\u2043\u00b7\u25a0\u25a1\u25aa\u25ab\u25b6\u25cb\u25cf\u25e6\u30fb"
"""Characters that make a line one of a list when they open it."""

SENTENCE_MARKS = ".!?\u2026\u0589\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4"
"""Characters that end a sentence where white space or the end of the text follows."""

WIDE_SENTENCE_MARKS = "\u3002\uff01\uff1f\uff0e\uff61"
"""Characters that end a sentence whatever follows."""

CLOSING_MARKS = "\"')]\u00bb\u2019\u201d\u300d\u300f\uff09\u300b"
"""Characters that may stand between the end of a sentence and the white space after it."""

_SPACE, _IN_WORD, _ALPHABETIC, _MARK, _SPACELESS, _BULLET, _SENTENCE, _CLOSING = (1 << bit for bit in range(8))
"""Kinds of character, as bits. A sentence mark that needs no white space is also ``_SPACELESS``."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_LINE_FEED, _HASH, _DOT, _ELLIPSIS, _REPLACEMENT = 0x0A, 0x23, 0x2E, 0x2026, 0xFFFD


class TextCounts(NamedTuple):
    """Counts of N texts, int64 (N,) each.

    Attributes:
        characters: characters other than white space.
        alphabetic: letters of any script, with the combining marks in words.
        spaced_words: runs of letters, numbers and underscores in scripts written with spaces.
        spaced_word_chars: characters in them, with combining marks.
        spaceless_words: letters of scripts written without spaces, each a word.
        pieces: runs of characters between white space.
        alphabetic_pieces: those with a letter in them.
        hashes: characters ``#``.
        ellipses: three dots, or the one character for them.
        lines: lines that are not blank.
        bullet_lines: those that begin with one of :data:`BULLETS`.
        ellipsis_lines: those that end in an ellipsis.
        sentences: ends of sentences.
        line_chars: characters of the lines, without the white space around each.
        duplicate_lines: lines equal to an earlier one but for white space around them.
        duplicate_line_chars: characters in those.
        paragraphs: runs of lines between blank lines.
        duplicate_paragraphs: paragraphs with the same lines as an earlier one.
        duplicate_paragraph_chars: characters in the lines of those.
    """

    characters: Counts
    alphabetic: Counts
    spaced_words: Counts
    spaced_word_chars: Counts
    spaceless_words: Counts
    pieces: Counts
    alphabetic_pieces: Counts
    hashes: Counts
    ellipses: Counts
    lines: Counts
    bullet_lines: Counts
    ellipsis_lines: Counts
    sentences: Counts
    line_chars: Counts
    duplicate_lines: Counts
    duplicate_line_chars: Counts
    paragraphs: Counts
    duplicate_paragraphs: Counts
    duplicate_paragraph_chars: Counts


def count_text(texts: pa.Array) -> TextCounts:
    """Counts characters, lines, paragraphs and sentences of an array of strings without nulls."""
    wide = texts.cast(pa.large_string())
    if isinstance(wide, pa.ChunkedArray):
        wide = wide.combine_chunks()
    _, offsets_buffer, data_buffer = wide.buffers()
    data = freeze_array(np.frombuffer(data_buffer or b"", np.uint8))
    offsets = np.zeros(1, np.int64)
    if len(wide):
        offsets = np.frombuffer(offsets_buffer, np.int64)[wide.offset : wide.offset + len(wide) + 1]
    offsets = freeze_array(offsets)
    counts, lines, line_chars, line_offsets, paragraphs, paragraph_chars, paragraph_offsets = _scan_texts(
        data, offsets, _classify_code_points()
    )
    repeated_lines = count_repeated(lines, line_chars, line_offsets)
    repeated_paragraphs = count_repeated(paragraphs, paragraph_chars, paragraph_offsets)
    return TextCounts._make([*counts.T, *repeated_lines.T, np.diff(paragraph_offsets), *repeated_paragraphs.T])


@cache
def _classify_code_points() -> Bytes:
    """Returns the kinds of every number that four bytes of UTF-8 can hold, (2**21,)."""
    kinds = np.zeros(1 << 21, np.uint8)
    for first, end in ((0, 0x40000), (0xE0000, 0xE1000)):  # nothing but private use is assigned elsewhere
        names = "".join(map(unicodedata.category, map(chr, range(first, end))))
        major, minor = np.frombuffer(names.encode("ascii"), "S1").reshape(-1, 2).T
        letters, numbers, marks = major == b"L", major == b"N", major == b"M"
        part = kinds[first:end]
        part[letters | numbers] = _IN_WORD
        part[letters] |= _ALPHABETIC
        part[marks] |= _MARK
        part[letters | (numbers & (minor == b"l"))] |= _SPACELESS
    in_script = np.zeros(1 << 21, np.bool_)
    for first, last in SPACELESS_SCRIPTS:
        in_script[first : last + 1] = True
    kinds[~in_script] &= ~np.uint8(_SPACELESS)
    kinds[ord("_")] = _IN_WORD
    kinds[list(JOINERS)] |= _MARK
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    for characters, kind in (
        (BULLETS, _BULLET),
        (SENTENCE_MARKS, _SENTENCE),
        (WIDE_SENTENCE_MARKS, _SENTENCE | _SPACELESS),
        (CLOSING_MARKS, _CLOSING),
    ):
        kinds[list(map(ord, characters))] |= kind
    return kinds


@numba.njit(cache=True, nogil=True)
def _scan_texts(
    data: Bytes, offsets: Counts, kinds: Bytes
) -> tuple[Counts, Hashes, Counts, Counts, Hashes, Counts, Counts]:
    """Counts characters and hashes lines and paragraphs in one pass over UTF-8 bytes.

    Returns:
        Counts (N, 14) in the order of :class:`TextCounts` up to ``line_chars``; then hashes, characters and offsets
        (N+1,) of all lines, and the same of all paragraphs.
    """
    num_texts = len(offsets) - 1
    capacity = num_texts
    for place in range(offsets[0], offsets[num_texts]):
        capacity += data[place] == _LINE_FEED
    counts = np.zeros((num_texts, 14), np.int64)
    lines = np.empty(capacity, np.uint64)
    line_chars = np.empty(capacity, np.int64)
    line_offsets = np.zeros(num_texts + 1, np.int64)
    paragraphs = np.empty(capacity, np.uint64)
    paragraph_chars = np.empty(capacity, np.int64)
    paragraph_offsets = np.zeros(num_texts + 1, np.int64)
    num_lines = 0
    num_paragraphs = 0
    for text in range(num_texts):
        place = offsets[text]
        end = offsets[text + 1]
        characters = alphabetic = spaced_words = spaced_word_chars = spaceless_words = 0
        pieces = alphabetic_pieces = hashes = ellipses = bullet_lines = ellipsis_lines = sentences = 0
        all_line_chars = 0
        word_kind = 0  # of the character before: 0 in no word, 1 in a spaced one, 2 a word of its own
        piece_kind = 0  # kinds of the characters of the piece so far, joined
        sentence_kind = 0  # of the sentence mark whose end is open
        dots = 0
        running_hash = line_hash = _BASE  # with and without the white space after the last character
        running_chars = stripped_chars = 0
        ends_in_ellipsis = False
        paragraph_hash = _BASE
        in_paragraph = 0
        # One step past the end closes the last line and paragraph, as a line feed would.
        while place <= end:
            if place == end:
                code = np.uint32(_LINE_FEED)
                place += 1
            else:
                code = np.uint32(data[place])
                size = 1 if code < 0x80 else 2 if code < 0xE0 else 3 if code < 0xF0 else 4
                if place + size > end:
                    code = np.uint32(_REPLACEMENT)  # cannot be in valid UTF-8
                    size = end - place
                elif size == 2:
                    code = (code & np.uint32(0x1F)) << np.uint32(6) | np.uint32(data[place + 1] & 0x3F)
                elif size == 3:
                    code = (
                        (code & np.uint32(0x0F)) << np.uint32(12)
                        | np.uint32(data[place + 1] & 0x3F) << np.uint32(6)
                        | np.uint32(data[place + 2] & 0x3F)
                    )
                elif size == 4:
                    code = (
                        (code & np.uint32(0x07)) << np.uint32(18)
                        | np.uint32(data[place + 1] & 0x3F) << np.uint32(12)
                        | np.uint32(data[place + 2] & 0x3F) << np.uint32(6)
                        | np.uint32(data[place + 3] & 0x3F)
                    )
                place += size
            kind = kinds[code]
            if kind & _SPACE:
                word_kind = 0
                dots = 0
                if piece_kind:
                    pieces += 1
                    alphabetic_pieces += (piece_kind & _ALPHABETIC) != 0
                    piece_kind = 0
                    sentences += sentence_kind != 0
                    sentence_kind = 0
                if code != _LINE_FEED:
                    if stripped_chars:
                        running_hash = (running_hash ^ np.uint64(code)) * _BASE
                        running_chars += 1
                    continue
                if stripped_chars:
                    lines[num_lines] = mix_bits(line_hash)
                    line_chars[num_lines] = stripped_chars
                    paragraph_hash = (paragraph_hash ^ lines[num_lines]) * _BASE
                    num_lines += 1
                    in_paragraph += stripped_chars
                    all_line_chars += stripped_chars
                    ellipsis_lines += ends_in_ellipsis
                    running_hash = line_hash = _BASE
                    running_chars = stripped_chars = 0
                    if place <= end:
                        continue
                if in_paragraph:
                    paragraphs[num_paragraphs] = mix_bits(paragraph_hash)
                    paragraph_chars[num_paragraphs] = in_paragraph
                    num_paragraphs += 1
                    in_paragraph = 0
                    paragraph_hash = _BASE
                continue
            characters += 1
            if stripped_chars == 0:
                bullet_lines += (kind & _BULLET) != 0
            running_hash = line_hash = (running_hash ^ np.uint64(code)) * _BASE
            running_chars += 1
            stripped_chars = running_chars
            piece_kind |= kind | _SPACE  # which no character of a piece is, so that it is not 0
            alphabetic += (kind & _ALPHABETIC) != 0 or ((kind & _MARK) != 0 and word_kind > 0)
            if kind & (_IN_WORD | _MARK):
                dots = 0
                ends_in_ellipsis = False
                sentences += (sentence_kind & _SPACELESS) != 0
                sentence_kind = 0
                if kind & _SPACELESS and not kind & _MARK:
                    spaceless_words += 1
                    word_kind = 2
                elif kind & _MARK:
                    spaced_word_chars += word_kind == 1
                else:
                    spaced_words += word_kind != 1
                    spaced_word_chars += 1
                    word_kind = 1
                continue
            word_kind = 0
            dots = dots + 1 if code == _DOT else 0
            ends_in_ellipsis = code == _ELLIPSIS or dots >= 3
            # Every third dot of a run makes three dots.
            ellipses += code == _ELLIPSIS or (dots > 0 and dots % 3 == 0)
            hashes += code == _HASH
            if kind & _SENTENCE:
                sentence_kind |= kind
            elif not kind & _CLOSING:
                sentences += (sentence_kind & _SPACELESS) != 0
                sentence_kind = 0
        line_offsets[text + 1] = num_lines
        paragraph_offsets[text + 1] = num_paragraphs
        counts[text, 0] = characters
        counts[text, 1] = alphabetic
        counts[text, 2] = spaced_words
        counts[text, 3] = spaced_word_chars
        counts[text, 4] = spaceless_words
        counts[text, 5] = pieces
        counts[text, 6] = alphabetic_pieces
        counts[text, 7] = hashes
        counts[text, 8] = ellipses
        counts[text, 9] = num_lines - line_offsets[text]
        counts[text, 10] = bullet_lines
        counts[text, 11] = ellipsis_lines
        counts[text, 12] = sentences
        counts[text, 13] = all_line_chars
    return (
        counts,
        lines[:num_lines],
        line_chars[:num_lines],
        line_offsets,
        paragraphs[:num_paragraphs],
        paragraph_chars[:num_paragraphs],
        paragraph_offsets,
    )
