"""Where documents are cut: the choice among the places between tokens, by rank and number of tokens.

    ranks of places (:mod:`pipelines.boundaries`) + tokens -> **cuts** -> pieces (:mod:`pipelines.pieces`)

A cut is only made between two tokens of the document as a whole, so where it stands beside white space is left to the
tokenizer. A byte-level BPE keeps a space with the word after it and line ends with what is before them; so a reference
begins with `` The`` in the middle of a line and with ``The`` on a new one. Cutting after the space instead would leave
it behind as a token of its own and begin the next reference with another token than the document has there; the two
would no longer add up to the tokens counted, and pieces would have to be cut again.
"""

import dataclasses
import math
from typing import Any

import numba
import numpy as np

from pipelines.boundaries import INNER, NO_CHARACTER, Bytes, Mask, Positions, Ranks
from schemas.protocols import EncodedTexts, LongArray

MARGIN_BYTES = 256
"""Tokens so near to the end of a window may be others than those of the document, and end no reference."""

ROW, START, END, LOW, HIGH, ALONE = range(6)
"""Columns of the pieces that :func:`cut_windows` returns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Parts of documents to be cut, W of them, each of another document.

    Attributes:
        rows: the document of each, (W,).
        begins: its first byte in the data, (W,).
        resumes: where its new text begins; before it stands what overlaps with the piece before, (W,).
        ends: the byte after its last, (W,).
        text_ends: where its white space at the end begins, or where the window begins if that does not matter, (W,).
        is_last: whether it ends its document, (W,).
        budgets: the greatest number of tokens of a piece, (W,).
    """

    rows: Positions
    begins: Positions
    resumes: Positions
    ends: Positions
    text_ends: Positions
    is_last: Mask
    budgets: Positions


def cut_windows(
    data: Bytes,
    ranks: Ranks,
    windows: Windows,
    tokens: EncodedTexts,
    *,
    min_fill: float,
    overlap_tokens: int,
    window_bytes: int,
) -> tuple[Positions, Positions, Positions]:
    """Cuts windows of documents into pieces.

    Args:
        data: the bytes of the documents.
        ranks: how good a cut is before each byte, and at the end.
        windows: W windows.
        tokens: the tokens of each window's text.
        min_fill: the share of the budget that a piece is filled to before a boundary may end it.
        overlap_tokens: the greatest number of tokens that a piece shares with the one before.
        window_bytes: the usual size of a window.

    Returns:
        The pieces, int64 (P, 6): the document, the first byte and the byte after the last, the first token and the
        token after the last of those given, and whether the piece may have other tokens alone. Then where the next
        window of each document begins, and where its new text begins, (W,) each. The last piece of a window that does
        not end its document is left to the next window.
    """
    pieces, next_begins, next_resumes = _cut_windows(
        *(data, ranks, windows.rows, windows.begins, windows.resumes, windows.ends),
        *(windows.text_ends, windows.is_last, windows.budgets),
        *(tokens.starts, tokens.ends, tokens.separable, tokens.offsets),
        *(float(min_fill), overlap_tokens, window_bytes),
    )
    return pieces, next_begins, next_resumes


def find_cuts(data: Bytes, ranks: Ranks, starts: LongArray, ends: LongArray) -> tuple[Positions, Positions]:
    """Finds the places between tokens where one text may be cut.

    Args:
        data: the bytes of the text.
        ranks: how good a cut is before each byte, and at the end.
        starts: first byte of each token, (tokens,).
        ends: the byte after its last, (tokens,).

    Returns:
        The places, strictly ascending, the beginning first and the end last, and how many tokens stand before each,
        (places,) each.
    """
    places, counts = np.empty((2, len(starts) + 2), dtype=np.int64)
    last = _find_cuts(data, ranks, 0, len(data), starts, ends, places, counts)
    return places[: last + 1], counts[: last + 1]


@numba.njit(cache=True, nogil=True)
def _cut_windows(
    data: Any,
    ranks: Any,
    rows: Any,
    begins: Any,
    resumes: Any,
    ends: Any,
    text_ends: Any,
    is_last: Any,
    budgets: Any,
    token_starts: Any,
    token_ends: Any,
    separable: Any,
    offsets: Any,
    min_fill: float,
    overlap_tokens: int,
    window_bytes: int,
) -> Any:
    """Kernel of :func:`cut_windows`; ``offsets`` says which token is the first of each window."""
    num_windows = len(rows)
    most = 0
    for window in range(num_windows):
        most = max(most, offsets[window + 1] - offsets[window])
    places = np.empty(most + 2, dtype=np.int64)
    counts = np.empty(most + 2, dtype=np.int64)
    chosen = np.empty((most + 2, 2), dtype=np.int64)
    pieces = np.empty((offsets[num_windows] - offsets[0] + num_windows, 6), dtype=np.int64)
    num_pieces = 0
    next_begins, next_resumes = ends.copy(), ends.copy()
    for window in range(num_windows):
        begin, end, low, high = begins[window], ends[window], offsets[window], offsets[window + 1]
        own_starts, own_ends = token_starts[low:high], token_ends[low:high]
        last = _find_cuts(data, ranks, begin, end, own_starts, own_ends, places, counts)
        while not is_last[window] and last > 1 and places[last - 1] >= end - MARGIN_BYTES:
            last -= 1
        at, last_with_text = 0, last
        while at + 1 < last and places[at + 1] <= resumes[window]:
            at += 1
        while last_with_text > 0 and places[last_with_text] >= text_ends[window]:
            last_with_text -= 1
        budget = budgets[window]
        overlap = min(overlap_tokens, (budget - 1) // 2)
        min_tokens = math.ceil(min_fill * budget)
        num_chosen = _choose_cuts(
            data, ranks, places, counts, last, at, last_with_text, budget, min_tokens, overlap, chosen
        )
        is_waiting = not is_last[window] and chosen[num_chosen - 1, 1] == last
        for index in range(num_chosen - is_waiting):
            is_alone = False
            for edge in chosen[index]:
                if edge > 0 and places[edge] < end:
                    token, place = counts[edge], places[edge] - begin
                    is_joint = own_ends[token - 1] == place and own_starts[token] == place
                    is_alone |= not (is_joint and separable[low + token])
            first, final = chosen[index]
            pieces[num_pieces, ROW] = rows[window]
            pieces[num_pieces, START] = places[first]
            pieces[num_pieces, END] = places[final]
            pieces[num_pieces, LOW] = low + counts[first]
            pieces[num_pieces, HIGH] = low + counts[final]
            pieces[num_pieces, ALONE] = is_alone
            num_pieces += 1
        if is_waiting and num_chosen == 1:  # hardly a token in the whole window, or a run of them not to be cut
            cut = _find_best_after(ranks, end - (end - begin) // 4, end)
            pieces[num_pieces, ROW] = rows[window]
            pieces[num_pieces, START] = begin
            pieces[num_pieces, END] = cut
            pieces[num_pieces, LOW] = low
            pieces[num_pieces, HIGH] = high
            pieces[num_pieces, ALONE] = True
            num_pieces += 1
            next_begins[window] = next_resumes[window] = cut
        elif is_waiting:
            next_begins[window] = places[chosen[num_chosen - 1, 0]]
            next_resumes[window] = places[chosen[num_chosen - 2, 1]]
            if 2 * (next_resumes[window] - next_begins[window]) > window_bytes:
                next_begins[window] = next_resumes[window]
    return pieces[:num_pieces], next_begins, next_resumes


@numba.njit(cache=True, nogil=True)
def _find_cuts(data: Any, ranks: Any, begin: int, end: int, starts: Any, ends: Any, places: Any, counts: Any) -> int:
    """Kernel of :func:`find_cuts`, for the text from ``begin`` to ``end`` of the data.

    Writes to ``places`` and ``counts``, which have room for two more than there are tokens.

    Returns:
        The index of the last place.
    """
    num_tokens = len(starts)
    least = end - begin
    for token in range(num_tokens - 1, 0, -1):  # kept where the loop below has read them before it writes there
        least = min(least, starts[token])
        places[token] = least
    places[0], counts[0] = begin, 0
    num_places, greatest, previous = 1, 0, -1
    for token in range(num_tokens - 1):
        greatest = max(greatest, ends[token])
        least = places[token + 1]
        if greatest > least:  # inside a character of several tokens
            previous = -1
            continue
        place = begin + greatest
        if least > greatest:  # characters that no token covers
            place = _find_best_in_gap(data, ranks, begin + greatest, begin + least)
        if begin < place < end and place != previous and ranks[place] != NO_CHARACTER:
            places[num_places], counts[num_places] = place, token + 1
            num_places += 1
        previous = place
    places[num_places], counts[num_places] = end, num_tokens
    return num_places


@numba.njit(cache=True, nogil=True)
def _choose_cuts(
    data: Any,
    ranks: Any,
    places: Any,
    counts: Any,
    last: int,
    at: int,
    last_with_text: int,
    budget: int,
    min_tokens: int,
    overlap: int,
    chosen: Any,
) -> int:
    """Chooses pieces among the places of :func:`_find_cuts`.

    Args:
        data: the bytes of the documents.
        ranks: how good a cut is before each byte.
        places: where the text may be cut.
        counts: how many tokens stand before each place.
        last: the index of the last place, the end.
        at: the index of the place where new text begins.
        last_with_text: the index of the last place that leaves more than white space after it.
        budget: the greatest number of tokens of a piece.
        min_tokens: how many a piece has before a boundary may end it.
        overlap: the greatest number of tokens that a piece shares with the one before.
        chosen: receives the indices of the first and the last place of each piece.

    Returns:
        The number of pieces.
    """
    begin = high = num_chosen = 0
    while True:
        while high < last and counts[high + 1] <= counts[begin] + budget:
            high += 1
        if high == last:
            chosen[num_chosen, 0], chosen[num_chosen, 1] = begin, last
            return num_chosen + 1
        best = high
        if last_with_text > at:
            best = min(best, last_with_text)  # leaves text for the last reference, not only white space
        best = max(best, at + 1)
        place = best - 1
        while place > at and counts[place] >= counts[begin] + min_tokens:
            if ranks[places[place]] < ranks[places[best]]:
                best = place
            place -= 1
        if ranks[places[best]] == INNER:
            while place > at and ranks[places[place]] == INNER:
                place -= 1
            best = place if place > at else best
        chosen[num_chosen, 0], chosen[num_chosen, 1] = begin, best
        num_chosen += 1
        if best == last:
            return num_chosen
        begin, at = _find_overlap(data, ranks, places, counts, begin, best, overlap), best


@numba.njit(cache=True, nogil=True)
def _find_overlap(data: Any, ranks: Any, places: Any, counts: Any, begin: int, at: int, overlap: int) -> int:
    """Returns the index of the best place within the overlap before ``at``, the earliest of equal ones.

    Never the beginning of the last piece or before it. ``at`` itself where there is none.
    """
    best = at
    place = at - 1
    while place > begin and counts[at] - counts[place] <= overlap:
        rank = ranks[places[place]]
        if rank < INNER and (best == at or rank <= ranks[places[best]]):
            best = place
        place -= 1
    while best + 1 < at and data[places[best]] in (0x0A, 0x0D) and ranks[places[best + 1]] == ranks[places[best]]:
        best += 1  # not before the line ends of a boundary
    return best


@numba.njit(cache=True, nogil=True)
def _find_best_in_gap(data: Any, ranks: Any, start: int, end: int) -> int:
    """Returns the place of the best rank in a gap between two tokens: after a line end, but before a mere space."""
    first = last = start
    for place in range(start + 1, end + 1):
        if ranks[place] < ranks[first]:
            first = place
        if ranks[place] <= ranks[last]:
            last = place
    return last if last > start and data[last - 1] == 0x0A else first


@numba.njit(cache=True, nogil=True)
def _find_best_after(ranks: Any, start: int, end: int) -> int:
    """Returns the last place of the best rank after ``start``."""
    best = end
    for place in range(end - 1, start, -1):
        if ranks[place] < ranks[best]:
            best = place
    return best
