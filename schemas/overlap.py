"""The paper's measure of how much of a reference a text gives away (method section 7).

``overlap(t, r)`` is the length of the longest common subsequence of the tokens of a text t and a reference r over the
length of r, where the match may span at most ``2 |r|`` tokens of the text. Training leaves out references that overlap
a sequence by more than 0.9, evaluation those that overlap a question by more than 2/3, and a bank can be built without
the references that overlap a test set. Beside it stands the stricter measure of GPT-3 for contaminated texts: tokens in
a row that both have. Used by ``pipelines`` and ``model``, hence here.
"""

from typing import Any

import numba
import numpy as np

from schemas.protocols import IntArray

SHARED_RUN = 13
"""So many consecutive tokens in common make a text contaminated; GPT-3 counted 13 words (arXiv 2005.14165)."""


def measure_overlap(text: IntArray, reference: IntArray) -> float:
    """Returns the overlap of a text and a reference, in [0, 1].

    Args:
        text: token ids int32 (tokens,).
        reference: token ids int32 (tokens,), at least one.
    """
    return float(find_longest_match(text, reference)) / len(reference)


def bound_overlap(text: IntArray, reference: IntArray) -> float:
    """Returns a number in [0, 1] that the overlap of a text and a reference does not exceed, some hundred times faster.

    It is the overlap without a bound on the span of the match: one pass over the text. A bound within the leak rule
    proves that the rule is kept.

    Args:
        text: token ids int32 (tokens,).
        reference: token ids int32 (tokens,), at least one.
    """
    return float(_find_longest_subsequence(text, reference)) / len(reference)


def exceeds_overlap(text: IntArray, reference: IntArray, max_overlap: float) -> bool:
    """Tells whether the overlap of a text and a reference is above a limit; exact, and mostly by the bound alone."""
    return bound_overlap(text, reference) > max_overlap and measure_overlap(text, reference) > max_overlap


@numba.njit(cache=True, nogil=True)
def shares_run(text: IntArray, reference: IntArray, length: int) -> bool:
    """Tells whether a text and a reference share so many consecutive tokens.

    Args:
        text: token ids int32 (tokens,).
        reference: token ids int32 (tokens,).
        length: of the run, at least 1.
    """
    # Entry j is the length of the common run that ends at this token of the text and at token j - 1 of the reference.
    runs = np.zeros(len(reference) + 1, np.int32)
    for token in text:
        for place in range(len(reference), 0, -1):
            runs[place] = runs[place - 1] + 1 if reference[place - 1] == token else 0
            if runs[place] >= length:
                return True
    return False


@numba.njit(cache=True, nogil=True)
def find_longest_match(text: IntArray, reference: IntArray) -> int:
    """Returns the length of the longest common subsequence that spans at most twice the reference in the text.

    The bit-parallel way (Hyyro 2004), once for each place of the text that a match can begin at: bit j of ``row`` is
    cleared where the subsequence gets longer at token j of the reference.
    """
    size = len(reference)
    masks, entries = _mark_places(text, reference)
    num_words = masks.shape[1]
    longest = 0
    row = np.empty(num_words, np.uint64)
    for start in range(len(text)):
        if entries[start] < 0:
            continue
        row[:] = ~np.uint64(0)
        for place in range(start, min(start + 2 * size, len(text))):
            if entries[place] >= 0:
                _advance(row, masks[entries[place]])
        longest = max(longest, _count_cleared(row, size))
    return longest


@numba.njit(cache=True, nogil=True)
def _find_longest_subsequence(text: IntArray, reference: IntArray) -> int:
    masks, entries = _mark_places(text, reference)
    row = np.full(masks.shape[1], ~np.uint64(0))
    for entry in entries:
        if entry >= 0:
            _advance(row, masks[entry])
    return _count_cleared(row, len(reference))


@numba.njit(cache=True, nogil=True)
def _mark_places(text: IntArray, reference: IntArray) -> Any:
    """Returns where each distinct token stands in the reference, as bits, and which of them each token of text is."""
    size = len(reference)
    distinct = np.unique(reference)
    masks = np.zeros((len(distinct), (size + 63) // 64), np.uint64)
    for place in range(size):
        entry = np.searchsorted(distinct, reference[place])
        masks[entry, place // 64] |= np.uint64(1) << np.uint64(place % 64)
    entries = np.full(len(text), -1, np.int64)
    for place in range(len(text)):
        entry = np.searchsorted(distinct, text[place])
        if entry < len(distinct) and distinct[entry] == text[place]:
            entries[place] = entry
    return masks, entries


@numba.njit(cache=True, nogil=True)
def _advance(row: Any, mask: Any) -> None:
    """Adds a token of the text: ``row`` and the places of the token are numbers of several words."""
    carry = np.uint64(0)
    for word in range(len(row)):
        old = row[word]
        used = old & mask[word]
        total = old + used
        overflow = np.uint64(1) if total < old else np.uint64(0)
        total += carry
        if total < carry:
            overflow = np.uint64(1)
        row[word] = total | (old - used)
        carry = overflow


@numba.njit(cache=True, nogil=True)
def _count_cleared(row: Any, size: int) -> int:
    length = 0
    for place in range(size):
        if (row[place // 64] >> np.uint64(place % 64)) & np.uint64(1) == np.uint64(0):
            length += 1
    return length
