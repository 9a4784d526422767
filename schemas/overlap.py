"""The paper's measure of how much of a reference a text gives away (method section 7).

``overlap(t, r)`` is the length of the longest common subsequence of the tokens of a text t and a reference r over the
length of r, where the match may span at most ``2 |r|`` tokens of the text. Training leaves out references that overlap
a sequence by more than 0.9, evaluation those that overlap a question by more than 2/3, and a bank can be built without
the references that overlap a test set. Used by ``pipelines`` and ``model``, hence here.
"""

import numba
import numpy as np

from schemas.protocols import IntArray


def measure_overlap(text: IntArray, reference: IntArray) -> float:
    """Returns the overlap of a text and a reference, in [0, 1].

    Args:
        text: token ids int32 (tokens,).
        reference: token ids int32 (tokens,), at least one.
    """
    return float(find_longest_match(text, reference)) / len(reference)


@numba.njit(cache=True, nogil=True)
def find_longest_match(text: IntArray, reference: IntArray) -> int:
    """Returns the length of the longest common subsequence that spans at most twice the reference in the text.

    The bit-parallel way (Hyyro 2004), once for each place of the text that a match can begin at: bit j of ``row`` is
    cleared where the subsequence gets longer at token j of the reference.
    """
    size = len(reference)
    num_words = (size + 63) // 64
    distinct = np.unique(reference)
    masks = np.zeros((len(distinct), num_words), np.uint64)
    for place in range(size):
        entry = np.searchsorted(distinct, reference[place])
        masks[entry, place // 64] |= np.uint64(1) << np.uint64(place % 64)
    entries = np.full(len(text), -1, np.int64)
    for place in range(len(text)):
        entry = np.searchsorted(distinct, text[place])
        if entry < len(distinct) and distinct[entry] == text[place]:
            entries[place] = entry

    longest = 0
    row = np.empty(num_words, np.uint64)
    for start in range(len(text)):
        if entries[start] < 0:
            continue
        row[:] = ~np.uint64(0)
        for place in range(start, min(start + 2 * size, len(text))):
            entry = entries[place]
            if entry < 0:
                continue
            carry = np.uint64(0)
            for word in range(num_words):
                old = row[word]
                used = old & masks[entry, word]
                total = old + used
                overflow = np.uint64(1) if total < old else np.uint64(0)
                total += carry
                if total < carry:
                    overflow = np.uint64(1)
                row[word] = total | (old - used)
                carry = overflow
        length = 0
        for place in range(size):
            if (row[place // 64] >> np.uint64(place % 64)) & np.uint64(1) == np.uint64(0):
                length += 1
        longest = max(longest, length)
    return longest
