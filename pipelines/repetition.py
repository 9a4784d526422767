"""What texts repeat: lines, paragraphs and runs of words.

    records -> **counts** -> measures (:mod:`pipelines.measuring`) -> filters

Words and runs of words (n-grams) are counted by the hashes of :mod:`pipelines.words`, lines and paragraphs by those of
:mod:`pipelines.scanning`, in compiled loops over a whole batch; what is said of a text depends on that text alone.

A repetition is a line, paragraph or n-gram that stood in the text before; the first of them is none. N-grams are found
step by step: a run of n words can come twice only if both runs of n - 1 words in it do. So each step looks at the
places the last one left, of which ordinary text leaves few, and names a run by a pair of small numbers, exactly.

The measures are those of Rae et al. 2021 (Gopher, arXiv 2112.11446, section A.1.1), carried over to texts without
spaces: where most words are single letters of such a script, a run of n words is taken to be one of 2n letters.
"""

from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa

from pipelines.words import Hashes, iterate_words

Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
SmallCounts = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

TOP_SIZES = (2, 3, 4)
"""Words in the n-grams of which the most frequent is looked for."""

DUPLICATE_SIZES = (5, 6, 7, 8, 9, 10)
"""Words in the n-grams of which all repetitions are looked for."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


class WordCounts(NamedTuple):
    """What N texts' words are like.

    Attributes:
        words: their number, int64 (N,).
        distinct: distinct words, int64 (N,).
        entropy_bits: entropy of the words' shares, float64 (N,); 0 for a text without words.
        top_shares: share of the words' characters in the occurrences of the most frequent n-gram that occurs twice
            or more, for each of :data:`TOP_SIZES`; float64 (N, 3). Of several as frequent, the longest counts.
        duplicate_shares: share of the words' characters in repetitions of n-grams, each character counted once, for
            each of :data:`DUPLICATE_SIZES`; float64 (N, 6).
    """

    words: Counts
    distinct: Counts
    entropy_bits: Floats
    top_shares: Floats
    duplicate_shares: Floats


def count_words(texts: pa.Array, strides: Counts, max_words: int) -> WordCounts:
    """Counts words and n-grams.

    Args:
        texts: N strings.
        strides: words that are taken for one in an n-gram, (N,): 1, or 2 for scripts without spaces.
        max_words: the longest n-gram to look for, 1 to 10; shares of longer ones stay 0, and all but the number of
            words stay 0 for 0.
    """
    num_texts = len(texts)
    num_words, distinct = np.zeros(num_texts, np.int64), np.zeros(num_texts, np.int64)
    entropies, shares = np.zeros(num_texts), np.zeros((num_texts, len(TOP_SIZES) + len(DUPLICATE_SIZES)))
    for first, words in iterate_words(texts):
        tile = slice(first, first + len(words.offsets) - 1)
        num_words[tile] = np.diff(words.offsets)
        if max_words:
            distinct[tile], entropies[tile], shares[tile] = _count_ngrams(
                words.hashes, words.num_chars, words.offsets, strides[tile], max_words
            )
    return WordCounts(num_words, distinct, entropies, shares[:, : len(TOP_SIZES)], shares[:, len(TOP_SIZES) :])


@numba.njit(cache=True, nogil=True)
def _find_capacity(num_items: int) -> int:
    """Returns the size of a table that items fill by half at most: a power of two."""
    capacity = 16
    while capacity < 2 * num_items:
        capacity *= 2
    return capacity


@numba.njit(cache=True, nogil=True)
def _clear(table: SmallCounts | Hashes, capacity: int) -> None:
    """Empties a table; as a loop, which compiles several times faster than a slice."""
    for slot in range(capacity):
        table[slot] = 0


@numba.njit(cache=True, nogil=True)
def count_repeated(hashes: Hashes, num_chars: Counts, offsets: Counts) -> Counts:
    """Counts the items of each text, such as lines, that repeat an earlier one of it.

    Args:
        hashes: hashes of the items of all texts.
        num_chars: their characters.
        offsets: where the items of each text begin and end, (N+1,).

    Returns:
        The number of those items, and of the characters in them, int64 (N, 2).
    """
    num_texts = len(offsets) - 1
    longest = 0
    for text in range(num_texts):
        longest = max(longest, offsets[text + 1] - offsets[text])
    table = np.empty(_find_capacity(longest), np.uint64)
    repeated = np.zeros((num_texts, 2), np.int64)
    for text in range(num_texts):
        capacity = _find_capacity(offsets[text + 1] - offsets[text])
        _clear(table, capacity)
        for item in range(offsets[text], offsets[text + 1]):
            key = max(hashes[item], np.uint64(1))  # 0 marks a free slot
            slot = np.int64(key) & (capacity - 1)
            while table[slot] != 0 and table[slot] != key:
                slot = (slot + 1) & (capacity - 1)
            if table[slot] == key:
                repeated[text, 0] += 1
                repeated[text, 1] += num_chars[item]
            table[slot] = key
    return repeated


@numba.njit(cache=True, nogil=True)
def _number_key(
    key: np.uint64, slot: np.uint64, table: SmallCounts, mask: np.uint64, keys: Hashes, num_keys: int
) -> int:
    """Returns the number of a key, ``num_keys`` if it is new; ``table`` holds numbers + 1, ``keys`` their keys."""
    while True:
        slot &= mask
        number = table[slot]
        if number == 0:
            table[slot] = num_keys + 1
            keys[num_keys] = key
            return num_keys
        if keys[number - 1] == key:
            return int(number) - 1
        slot += np.uint64(1)


@numba.njit(cache=True, nogil=True)
def _count_ngrams(
    hashes: Hashes, num_chars: SmallCounts, offsets: Counts, strides: Counts, max_words: int
) -> tuple[Counts, Floats, Floats]:
    """Returns each text's distinct words (N,), the entropy of its words (N,) and its n-gram shares (N, 9)."""
    num_texts = len(offsets) - 1
    longest = 0
    for text in range(num_texts):
        longest = max(longest, offsets[text + 1] - offsets[text])
    distinct = np.zeros(num_texts, np.int64)
    entropies = np.zeros(num_texts, np.float64)
    shares = np.zeros((num_texts, 9), np.float64)
    table = np.empty(_find_capacity(longest), np.int32)
    keys = np.empty(longest, np.uint64)  # of each n-gram, by its number
    frequencies = np.empty(longest, np.int32)
    firsts = np.empty(longest, np.int32)  # where it comes first
    grams = np.empty(longest, np.int32)  # number of the n-gram at each place; -1 where it comes once
    units = np.empty(longest, np.int32)  # the same for runs of a stride's words
    places = np.empty(longest, np.int32)  # where n-grams that come twice begin, ascending
    pairs = np.empty(longest, np.uint64)  # keys of the n-grams at those places
    for text in range(num_texts):
        start = offsets[text]
        num_words = offsets[text + 1] - start
        if num_words == 0:
            continue
        capacity = _find_capacity(num_words)
        mask = np.uint64(capacity - 1)
        _clear(table, capacity)
        num_grams = 0
        num_all_chars = 0
        for place in range(num_words):
            num_all_chars += num_chars[start + place]
            key = hashes[start + place]
            number = _number_key(key, key, table, mask, keys, num_grams)
            if number == num_grams:
                frequencies[number] = 0
                num_grams += 1
            frequencies[number] += 1
            units[place] = number
        distinct[text] = num_grams
        total = 0.0
        for number in range(num_grams):
            if frequencies[number] > 1:
                total += frequencies[number] * np.log2(frequencies[number])
        entropies[text] = max(0.0, np.log2(num_words) - total / num_words)
        if max_words < 2:
            continue
        num_places = 0
        for place in range(num_words):
            number = units[place]
            is_repeated = frequencies[number] > 1
            grams[place] = number if is_repeated else -1
            places[num_places] = place
            num_places += is_repeated
        stride = strides[text]
        size = 1
        while num_places > 0 and size < max_words * stride:
            # An n-gram of ``step`` words more is one of ``size`` words and the run of a step at its end.
            step = 1 if size < stride else stride
            size += step
            order = size // stride
            is_duplicate_size = order >= 5
            num_fitting = num_places
            while num_fitting > 0 and places[num_fitting - 1] + size > num_words:
                num_fitting -= 1
            # Loops without branches, as no processor can foresee which n-grams come again.
            num_kept = 0
            for index in range(num_fitting):
                place = places[index]
                gram = grams[place]
                is_possible = grams[place + step] >= 0
                pairs[num_kept] = (np.uint64(gram) << np.uint64(32)) | np.uint64(units[place + size - step])
                places[num_kept] = place
                num_kept += is_possible
                # Predecessors have looked at this place already: places ascend.
                grams[place] = -1
            for index in range(num_fitting, num_places):
                grams[places[index]] = -1
            capacity = _find_capacity(num_kept)
            mask = np.uint64(capacity - 1)
            _clear(table, capacity)
            num_grams = 0
            covered = 0
            duplicate_chars = 0
            for index in range(num_kept):
                place = places[index]
                key = pairs[index]
                number = _number_key(key, (key * _BASE) >> np.uint64(32), table, mask, keys, num_grams)
                is_new = number == num_grams
                firsts[number] = place if is_new else firsts[number]
                frequencies[number] = 1 if is_new else frequencies[number] + 1
                grams[place] = number
                num_grams += is_new
                if is_duplicate_size and not is_new:
                    for covering in range(max(place, covered), place + size):
                        duplicate_chars += num_chars[start + covering]
                    covered = place + size
            if size <= stride:
                for place in range(num_words):
                    units[place] = grams[place]
            num_places = 0
            for index in range(num_kept):
                place = places[index]
                number = grams[place]
                is_repeated = frequencies[number] > 1
                grams[place] = number if is_repeated else -1
                places[num_places] = place
                num_places += is_repeated
            if is_duplicate_size:
                shares[text, order - 2] = duplicate_chars / num_all_chars
            elif order > 1:
                most = 2
                most_chars = 0
                for number in range(num_grams):
                    if frequencies[number] >= most:
                        chars = 0
                        for place in range(firsts[number], firsts[number] + size):
                            chars += num_chars[start + place]
                        if frequencies[number] > most or chars > most_chars:
                            most, most_chars = frequencies[number], chars
                shares[text, order - 2] = min(1.0, most * most_chars / num_all_chars)
    return distinct, entropies, shares
