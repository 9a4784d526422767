"""Texts as sequences of hashed words: what near-duplicate removal and the filters look at.

    texts -> **words** -> shingles, signatures, measures

What a word is depends on characters alone, never on a language (method section 3: nothing may assume spaces):

- The text is case folded and brought to Unicode normal form C first.
- Letters, numbers and the underscore form words. Hangul syllables are such letters, since Korean has spaces.
- Letters of scripts written without spaces (:data:`SPACELESS_SCRIPTS`: Chinese and Japanese, Thai, Lao, Khmer, Burmese
  and their neighbours) are words of their own, one a letter.
- Combining marks and the zero-width joiners belong to the word they follow, so Indic words stay whole; after anything
  that is not in a word they separate, like every other character.
- A text without any word, such as a line of punctuation, has its non-space characters for words.

What a letter is say the Unicode tables of the Python in use; a character they do not know yet separates.

One pass over the UTF-8 bytes does it all: a table gives each character's kind and its case fold. Where folding and
normalising are more than a character for a character, as for the German sharp s, Python's own functions prepare the
text. A word's hash is a polynomial in its code points; stored signatures rest on it, so it must not change.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import pyarrow as pa

from schemas.errors import InputError

Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Codes = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]

Item = TypeVar("Item", bound=np.generic)
Array = np.ndarray[tuple[Any, ...], np.dtype[Item]]

SPACELESS_SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x3005, 0x3007),  # iteration mark, closing mark and zero of Chinese
    (0x3021, 0x30FF),  # Hangzhou numerals, kana
    (0x31F0, 0x31FF),  # kana extensions
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),  # ideographs
    (0xA9E0, 0xA9FF),  # Burmese extensions
    (0xAA60, 0xAADF),  # Burmese extensions, Tai Viet
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0xFF66, 0xFF9F),  # halfwidth kana
    (0x1AFF0, 0x1B16F),  # kana supplement
    (0x20000, 0x3FFFF),  # ideographs
)
"""First and last code points; in them a letter or letter-like number (Unicode L*, Nl) is a word of its own."""

JOINERS = (0x200C, 0x200D)

_SEPARATOR, _SPACE, _MARK, _LETTER, _WORD, _COMPLEX = range(6)
"""Kinds of character: ``_LETTER`` is a part of a word, ``_WORD`` a whole one, ``_COMPLEX`` is left to Python."""

_NUM_CODES = 0x110000
_ASSIGNED = ((0, 0xD800), (0xE000, 0x40000), (0xE0000, 0xF0000))
"""Code points that can have properties: the other planes are unassigned or for private use, and so separate."""

_KIND_SHIFT, _CLASS_SHIFT, _CODE_MASK = 21, 24, (1 << 21) - 1
_REPLACEMENT = 0xFFFD
_WORD_BASE = np.uint64(0x9E3779B97F4A7C15)
_TILE_BYTES = 1 << 17


class Words(NamedTuple):
    """The words of N texts, one text after the other.

    Attributes:
        hashes: hash of each word's folded code points (W,).
        num_chars: characters of each word after folding, marks included (W,).
        offsets: where each text's words begin and end (N+1,): text ``i`` has ``hashes[offsets[i]:offsets[i + 1]]``.
    """

    hashes: Hashes
    num_chars: Counts
    offsets: Indices


@numba.njit(cache=True, nogil=True)
def mix_bits(value: np.uint64) -> np.uint64:
    """Spreads every bit of a 64-bit value over all bits: a bijection, MurmurHash3's finaliser; for kernels."""
    # numba keeps compiled kernels by their own file: those that call this from another one would not see a change.
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    value ^= value >> np.uint64(33)
    return value


def find_words(texts: pa.Array | pa.ChunkedArray) -> Words:
    """Returns the hashed words of every text.

    The hash of a word depends on its characters only, not on the text or the batch.

    Args:
        texts: N texts, a string array of any kind, sliced or in chunks; null counts as blank.

    Raises:
        InputError: ``texts`` are not strings.
    """
    hashes, num_chars, offsets = [], [], [np.zeros(1, np.int64)]
    for _, words in iterate_words(texts):
        hashes.append(words.hashes.copy())
        num_chars.append(words.num_chars.copy())
        offsets.append(words.offsets[1:] + offsets[-1][-1])
    if not hashes:
        return Words(np.empty(0, np.uint64), np.empty(0, np.int32), offsets[0])
    return Words(np.concatenate(hashes), np.concatenate(num_chars), np.concatenate(offsets))


def iterate_words(texts: pa.Array | pa.ChunkedArray, tile_bytes: int = _TILE_BYTES) -> Iterator[tuple[int, Words]]:
    """Yields the words of tiles of texts, for work that needs no more than a tile at a time.

    Memory is a dozen bytes for each byte of the tile, a tile being ``tile_bytes`` or one longer text. Texts with
    characters left to Python take some times more while they are worked on, one at a time.

    Args:
        texts: as in :func:`find_words`.
        tile_bytes: size of a tile; the words do not depend on it.

    Yields:
        The number of the tile's first text and the words of its texts, whose offsets begin with 0. The arrays are
        views of buffers that the next tile overwrites.

    Raises:
        InputError: ``texts`` are not strings.
    """
    data, bounds = _view_texts(texts)
    # A word has a byte or more of its own. What is not written to never takes memory.
    hashes, num_chars = np.empty(0, np.uint64), np.empty(0, np.int32)
    table = _tabulate_characters()
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + tile_bytes, side="right")) - 1)
        offsets = np.zeros(last - first + 1, np.int64)
        size_bytes = int(bounds[last] - bounds[first])
        if size_bytes > len(hashes):
            hashes, num_chars = _grow(hashes, size_bytes), _grow(num_chars, size_bytes)
        row = first
        while True:
            row += _split_texts(data, bounds[row : last + 1], table, hashes, num_chars, offsets[row - first :])
            if row == last:
                break
            folded, folded_bounds = _fold_text(data[bounds[row] : bounds[row + 1]])
            needed = int(offsets[row - first]) + len(folded) + int(bounds[last] - bounds[row + 1])
            if needed > len(hashes):
                hashes, num_chars = _grow(hashes, needed), _grow(num_chars, needed)
            folded_table = _tabulate_folded_characters()
            row += _split_texts(folded, folded_bounds, folded_table, hashes, num_chars, offsets[row - first :])
        yield first, Words(hashes[: offsets[-1]], num_chars[: offsets[-1]], offsets)
        first = last


def freeze_array(array: Array[Item]) -> Array[Item]:
    """Returns a read-only, contiguous view: for a kernel's inputs, since a kernel is compiled once a kind of array."""
    view = np.require(np.asarray(array), requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view


def _grow(buffer: Array[Item], size: int) -> Array[Item]:
    grown = np.empty(size, buffer.dtype)
    grown[: len(buffer)] = buffer
    return grown


def _view_texts(texts: pa.Array | pa.ChunkedArray) -> tuple[Bytes, Indices]:
    """Returns the UTF-8 bytes of an Arrow array and where its texts begin and end (N+1,), without copying the bytes."""
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise InputError(f"words: texts are {texts.type}, must be strings")
    texts = texts.cast(pa.large_string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if texts.null_count:
        texts = texts.fill_null("")
    _, bounds, data = texts.buffers()
    if len(texts) == 0:
        return freeze_array(np.empty(0, np.uint8)), freeze_array(np.zeros(1, np.int64))
    view = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return freeze_array(view), freeze_array(np.frombuffer(bounds, np.int64)[texts.offset :][: len(texts) + 1])


def _fold_text(data: Bytes) -> tuple[Bytes, Indices]:
    text = data.tobytes().decode(errors="replace")
    folded = unicodedata.normalize("NFC", text.casefold()).encode()
    return freeze_array(np.frombuffer(folded, np.uint8)), freeze_array(np.array([0, len(folded)], np.int64))


# Tables ---------------------------------------------------------------------------------------------------------------


@cache
def _classify_characters() -> Bytes:
    """Returns the kind of every code point, as it is after folding."""
    kinds = np.full(_NUM_CODES, _SEPARATOR, np.uint8)
    for first, last in _ASSIGNED:
        categories = "".join(map(unicodedata.category, map(chr, range(first, last))))
        major, minor = np.frombuffer(categories.encode("ascii"), np.uint8).reshape(-1, 2).T
        letters, numbers = major == ord("L"), major == ord("N")
        part = kinds[first:last]
        part[letters | numbers] = _LETTER
        part[major == ord("M")] = _MARK
        alone = letters | (numbers & (minor == ord("l")))
        for script_first, script_last in SPACELESS_SCRIPTS:
            inside = slice(max(script_first - first, 0), max(script_last + 1 - first, 0))
            part[inside][alone[inside]] = _WORD
    kinds[ord("_")] = _LETTER
    kinds[list(JOINERS)] = _MARK
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    return kinds


@cache
def _tabulate_folded_characters() -> Codes:
    """Returns the table for texts that are folded and normalised already, with every code point as it is."""
    kinds = _classify_characters().astype(np.uint32) << np.uint32(_KIND_SHIFT)
    return freeze_array(np.arange(_NUM_CODES, dtype=np.uint32) | kinds)


def _iterate_blocks() -> Iterator[str]:
    """Yields the characters that can have properties in blocks of 256, most of which have nothing to look at."""
    for first, last in _ASSIGNED:
        for start in range(first, last, 256):
            yield "".join(map(chr, range(start, start + 256)))


@cache
def _tabulate_characters() -> Codes:
    """Returns each code point's case fold, with the fold's kind and canonical combining class in the higher bits.

    A text is in normal form C after folding if its characters are and their combining classes, but for zero, do not
    descend (Unicode Standard Annex 15, detecting normalization forms); then a fold of one character for one is right.
    The kind is ``_COMPLEX`` where that does not hold: the fold is several characters, is replaced in the normal form,
    or may be joined to the character before it.
    """
    plain = _tabulate_folded_characters()
    table = plain.copy()
    # The medials and finals of Hangul syllables; Python lists no decompositions for these.
    joining = {part for code in range(0xAC00, 0xAC00 + 588) for part in unicodedata.normalize("NFD", chr(code))[1:]}
    complex_codes = []
    for block in _iterate_blocks():
        if unicodedata.normalize("NFD", block) == block:
            continue  # no character of the block is composed
        for character, decomposition in zip(block, map(unicodedata.decomposition, block), strict=True):
            if decomposition and decomposition[0] != "<":
                joining.update(chr(int(code, 16)) for code in decomposition.split()[1:])
                if unicodedata.normalize("NFC", character) != character:
                    complex_codes.append(ord(character))
    marks = np.flatnonzero((plain >> np.uint32(_KIND_SHIFT)) == _MARK)
    classes = np.array([unicodedata.combining(chr(code)) for code in marks.tolist()], np.uint32)
    table[marks] |= classes << np.uint32(_CLASS_SHIFT)
    complex_codes.extend(map(ord, joining))
    table[complex_codes] = _COMPLEX << _KIND_SHIFT
    folds = table.copy()
    for block in _iterate_blocks():
        if block.casefold() == block:
            continue
        for character, fold in zip(block, map(str.casefold, block), strict=True):
            if fold != character:
                folds[ord(character)] = table[ord(fold)] if len(fold) == 1 else _COMPLEX << _KIND_SHIFT
    return freeze_array(folds)


# Kernels --------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _split_texts(
    data: Bytes, bounds: Indices, table: Codes, hashes: Hashes, num_chars: Counts, offsets: Indices
) -> int:
    """Appends the words of texts from the place ``offsets[0]`` on, and fills ``offsets`` after it.

    Returns how many texts were done: all, or those before the first with a character or an order of combining marks
    that is left to Python.
    """
    num_words = offsets[0]
    for row in range(len(bounds) - 1):
        end = _split_text(data, bounds[row], bounds[row + 1], table, False, hashes, num_chars, num_words)
        if end == num_words:
            end = _split_text(data, bounds[row], bounds[row + 1], table, True, hashes, num_chars, num_words)
        if end < 0:
            return row
        num_words = end
        offsets[row + 1] = num_words
    return len(bounds) - 1


@numba.njit(cache=True, nogil=True)
def _split_text(
    data: Bytes,
    start: int,
    end: int,
    table: Codes,
    wordless: bool,
    hashes: Hashes,
    num_chars: Counts,
    num_words: int,
) -> int:
    """Appends the words of one text, or its single characters if it is ``wordless``; returns their end, or -1."""
    state = _SEPARATOR  # what a mark would follow: the kind of the open word, if there is one
    previous_class = 0
    value, power, length = np.uint64(0), np.uint64(1), 0
    place = start
    while place < end:
        code = int(data[place])
        if code < 0x80:
            place += 1
        elif code < 0xE0:
            # Texts are valid UTF-8; the checks only keep the kernel inside of the buffer if they are not.
            code = (code & 0x1F) << 6 | int(data[place + 1]) & 0x3F if place + 2 <= end else _REPLACEMENT
            place += 2
        elif code < 0xF0:
            if place + 3 <= end:
                code = (code & 0x0F) << 12 | (int(data[place + 1]) & 0x3F) << 6 | int(data[place + 2]) & 0x3F
            else:
                code = _REPLACEMENT
            place += 3
        else:
            if place + 4 <= end:
                code = (code & 0x07) << 18 | (int(data[place + 1]) & 0x3F) << 12
                code |= (int(data[place + 2]) & 0x3F) << 6 | int(data[place + 3]) & 0x3F
                code = code if code < _NUM_CODES else _REPLACEMENT
            else:
                code = _REPLACEMENT
            place += 4
        entry = int(table[code])
        kind = (entry >> _KIND_SHIFT) & 7
        combining_class = entry >> _CLASS_SHIFT
        if kind == _COMPLEX or 0 < combining_class < previous_class:
            return -1
        previous_class = combining_class
        if wordless:
            kind = _SPACE if kind == _SPACE else _WORD
        letter = np.uint64(entry & _CODE_MASK)
        if (kind == _LETTER and state == _LETTER) or (kind == _MARK and state != _SEPARATOR):
            value += letter * power
            power *= _WORD_BASE
            length += 1
            continue
        if state != _SEPARATOR:
            hashes[num_words] = mix_bits(value)
            num_chars[num_words] = length
            num_words += 1
        state = _SEPARATOR
        if kind >= _LETTER:
            state = kind
            value, power, length = letter, _WORD_BASE, 1
    if state != _SEPARATOR:
        hashes[num_words] = mix_bits(value)
        num_chars[num_words] = length
        num_words += 1
    return num_words
