"""Texts as sets of hashed shingles: the first step of near-duplicate removal.

    texts -> **shingles** -> signatures -> candidate pairs -> verified pairs -> duplicates

A shingle is a run of ``num_words`` words, and two references are near-duplicates if their sets of shingles overlap.
What a word is depends on characters alone, never on a language (method section 3: nothing may assume spaces):

- The text is case folded and brought to Unicode normal form C first.
- Letters, numbers and the underscore form words. Hangul syllables are such letters, since Korean has spaces.
- Letters of scripts written without spaces (:data:`SPACELESS_SCRIPTS`: Chinese and Japanese, Thai, Lao, Khmer, Burmese
  and their neighbours) are words of their own, one a letter.
- Combining marks and the zero-width joiners belong to the word they follow, so Indic words stay whole; after anything
  that is not in a word they separate, like every other character.
- A text without any word, such as a line of punctuation, has its non-space characters for words.

What a letter is say the Unicode tables of the Python in use; a character they do not know yet separates.
A text of fewer words than a shingle holds is one shingle, so only a blank text has an empty set. Words and shingles are
hashed by polynomials over whole batches at once; stored signatures rest on the hashes, so they must not change.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from schemas.errors import InputError

Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Codes = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]

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

_SEPARATOR, _SPACE, _MARK, _LETTER, _WORD = range(5)
"""Kinds of character. ``_LETTER`` is a part of a word, ``_WORD`` a whole one."""

_WORD_BASE = 0x9E3779B97F4A7C15
_WORD_BASE_INVERSE = pow(_WORD_BASE, -1, 1 << 64)
_SHINGLE_BASE = np.uint64(0xD1B54A32D192ED03)
_TILE_CHARS = 1 << 18
_TILE_ITEMS = 1 << 16


def mix_bits(values: Hashes) -> Hashes:
    """Spreads every bit of 64-bit values over all bits: a bijection, MurmurHash3's finaliser."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def iterate_tiles(lengths: Indices, max_items: int = _TILE_ITEMS) -> Iterator[Indices]:
    """Yields groups of rows of similar length, so that ragged rows can be worked on as small rectangles.

    Args:
        lengths: items in each row (N,).
        max_items: bound on rows times longest row of a group; a longer row is a group of its own.

    Yields:
        Row numbers, by ascending length; every row of at least one item comes once.
    """
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    start = int(np.searchsorted(ascending, 1))
    while start < len(order):
        # Filled up as if all rows were as short as the first, then cut back to what the longest of those allows.
        end = start + max(1, max_items // int(ascending[start]))
        end = start + max(1, max_items // int(ascending[min(end, len(order)) - 1]))
        yield order[start:end]
        start = end


def shingle_texts(texts: Sequence[str], num_words: int) -> tuple[Hashes, Indices]:
    """Returns the set of hashed shingles of every text.

    The hash of a shingle depends on its words only, not on the batch. Memory stays at a few hundred bytes a character
    of the longest text, or of 2**18 characters if that is more, beside what is returned.

    Args:
        texts: N texts.
        num_words: words in a shingle, at least 1.

    Returns:
        The hashes of all texts one after the other, ascending and unique within each text, and their offsets int64
        (N+1,): text ``i`` has ``hashes[offsets[i]:offsets[i + 1]]``.

    Raises:
        InputError: ``num_words`` is below 1.
    """
    if num_words < 1:
        raise InputError(f"shingles: num_words is {num_words}, must be at least 1")
    folded = [unicodedata.normalize("NFC", text.casefold()) for text in texts]
    lengths = np.fromiter(map(len, folded), np.int64, len(folded))
    ends = np.cumsum(lengths)
    hashes: list[Hashes] = []
    counts: list[Indices] = []
    start = 0
    while start < len(folded):
        limit = ends[start] - lengths[start] + _TILE_CHARS
        end = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        tile_hashes, tile_counts = _shingle_tile(folded[start:end], lengths[start:end], num_words)
        hashes.append(tile_hashes)
        counts.append(tile_counts)
        start = end
    offsets = np.zeros(len(folded) + 1, np.int64)
    if counts:
        np.cumsum(np.concatenate(counts), out=offsets[1:])
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64), offsets


def _shingle_tile(folded: Sequence[str], lengths: Indices, num_words: int) -> tuple[Hashes, Indices]:
    # The line feed after each text separates, so no word reaches into the next text.
    joined = "\n".join(folded) + "\n"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32, copy=False)
    bounds = np.zeros(len(folded) + 1, np.int64)
    np.cumsum(lengths + 1, out=bounds[1:])
    starts, ends = _find_words(codes, bounds)
    words = _hash_words(codes, starts, ends)
    hashes, offsets = _hash_shingles(words, np.searchsorted(starts, bounds), num_words)
    return _sort_unique(hashes, offsets)


@cache
def _classify_code_points() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    majors = "".join(map(unicodedata.category, map(chr, range(0x110000))))
    major, minor = np.frombuffer(majors.encode("ascii"), "S1").reshape(-1, 2).T
    kinds = np.full(0x110000, _SEPARATOR, np.uint8)
    kinds[np.isin(major, [b"L", b"N"])] = _LETTER
    kinds[ord("_")] = _LETTER
    alone = (major == b"L") | ((major == b"N") & (minor == b"l"))
    for first, last in SPACELESS_SCRIPTS:
        kinds[first : last + 1][alone[first : last + 1]] = _WORD
    kinds[major == b"M"] = _MARK
    kinds[list(JOINERS)] = _MARK
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    return kinds


def _find_words(codes: Codes, bounds: Indices) -> tuple[Indices, Indices]:
    """Returns where each word starts and ends; every text, from bound to bound, ends in a line feed."""
    kinds = _classify_code_points()[codes]
    marks = kinds == _MARK
    carried = kinds
    if marks.any():
        places = np.arange(len(kinds))
        places[marks] = 0
        np.maximum.accumulate(places, out=places)
        # What a mark follows decides what it is; one that opens the batch follows nothing.
        carried = np.where(kinds[places] == _MARK, _SEPARATOR, kinds[places])
    inside = carried >= _LETTER
    opening = inside & ~marks
    opening[1:] &= (kinds[1:] == _WORD) | (carried[:-1] != _LETTER)
    wordless = np.add.reduceat(opening, bounds[:-1], dtype=np.int64) == 0
    if wordless.any():
        remaining = np.repeat(wordless, np.diff(bounds)) & (kinds != _SPACE)
        inside |= remaining
        opening |= remaining
    closing = inside.copy()
    closing[:-1] &= opening[1:] | ~inside[1:]
    return np.flatnonzero(opening), np.flatnonzero(closing) + 1


def _list_powers(base: int, num_powers: int) -> Hashes:
    powers = np.full(num_powers, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)


@cache
def _list_tile_powers(base: int) -> Hashes:
    return _list_powers(base, 2 * _TILE_CHARS)


def _hash_words(codes: Codes, starts: Indices, ends: Indices) -> Hashes:
    """Hashes each word as a polynomial in its code points, by differences of one running sum over the batch."""
    num_codes = len(codes)
    if num_codes <= 2 * _TILE_CHARS:
        powers, inverses = _list_tile_powers(_WORD_BASE), _list_tile_powers(_WORD_BASE_INVERSE)
    else:
        powers, inverses = _list_powers(_WORD_BASE, num_codes), _list_powers(_WORD_BASE_INVERSE, num_codes)
    sums = np.zeros(num_codes + 1, np.uint64)
    np.cumsum(codes * powers[:num_codes], out=sums[1:])
    # Divided by the power of its first place, so that it does not matter where in the batch the word stands.
    return mix_bits((sums[ends] - sums[starts]) * inverses[starts])


def _hash_shingles(words: Hashes, bounds: Indices, num_words: int) -> tuple[Hashes, Indices]:
    """Hashes the shingles of each text, the text's words being ``words[bounds[i]:bounds[i + 1]]``."""
    counts = np.diff(bounds)
    num_shingles = np.where(counts > 0, np.maximum(counts - num_words + 1, 1), 0)
    offsets = np.zeros(len(bounds), np.int64)
    np.cumsum(num_shingles, out=offsets[1:])
    # A window that reaches into the next text is never chosen, nor one that reaches past the end.
    windows = np.full(len(words), num_words, np.uint64)
    for place in range(min(num_words, len(words))):
        reaching = windows[: len(words) - place]
        reaching *= _SHINGLE_BASE
        reaching += words[place:]
    hashes = windows[np.arange(offsets[-1]) + np.repeat(bounds[:-1] - offsets[:-1], num_shingles)]
    for size in np.unique(counts[(counts > 0) & (counts < num_words)]):
        rows = np.flatnonzero(counts == size)
        shorter = np.full(len(rows), size, np.uint64)
        for place in range(size):
            shorter = shorter * _SHINGLE_BASE + words[bounds[rows] + place]
        hashes[offsets[rows]] = shorter
    return mix_bits(hashes), offsets


def _sort_unique(hashes: Hashes, offsets: Indices) -> tuple[Hashes, Indices]:
    """Sorts each text's hashes and drops repetitions; returns them with their new counts."""
    lengths = np.diff(offsets)
    num_kept = np.zeros(len(lengths), np.int64)
    kept = np.zeros(len(hashes), np.bool_)
    for rows in iterate_tiles(lengths):
        # A short row repeats its last hash to fill the rectangle; repetitions go away anyway.
        columns = np.minimum(np.arange(lengths[rows[-1]]), lengths[rows, None] - 1)
        tile = np.sort(hashes[offsets[rows, None] + columns], axis=1)
        distinct = np.ones(tile.shape, np.bool_)
        np.not_equal(tile[:, 1:], tile[:, :-1], out=distinct[:, 1:])
        counts = distinct.sum(axis=1)
        places = np.arange(counts.sum()) + np.repeat(offsets[rows] - (np.cumsum(counts) - counts), counts)
        hashes[places] = tile[distinct]
        kept[places] = True
        num_kept[rows] = counts
    return hashes[kept], num_kept
