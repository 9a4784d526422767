"""Documents cut into pieces, and each piece with the tokens of its own text.

    corpus (:mod:`pipelines.spans`) -> **pieces** -> pieces that are references (:mod:`pipelines.mending`)

A document is tokenized as a whole, or in large windows, and cut between tokens (:mod:`pipelines.cutting`). Where the
tokenizer says that the parts beside a cut have the same tokens alone, the tokens of a piece are a slice of the
document's; other pieces are tokenized again, so that each has the tokens of its own text.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np

from pipelines.boundaries import NO_CHARACTER, Mask, Positions, find_text_ends
from pipelines.cutting import HIGH, LOW, ROW, Windows, cut_windows
from pipelines.spans import Corpus, encode_spans
from schemas.protocols import IntArray, TextTokenizer

WINDOW_BYTES = 1 << 18
"""A longer document is tokenized in windows of at most this size, each from where the references before it end."""

GROUP_BYTES = 1 << 20
"""Text given to the tokenizer in one call, about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """References to be, P of them, in the order of the documents and of their text.

    Attributes:
        rows: the document of each, (P,).
        starts: its first byte in the data, (P,).
        ends: the byte after its last, (P,).
        prefixed: whether the head of its document comes before it, (P,).
        lows: its first token in ``token_ids``, (P,).
        counts: how many tokens it has, (P,).
        token_ids: the tokens of pieces in any order, with others between them.
    """

    rows: Positions
    starts: Positions
    ends: Positions
    prefixed: Mask
    lows: Positions
    counts: Positions
    token_ids: IntArray


def cut_documents(
    corpus: Corpus, tokenizer: TextTokenizer, *, max_tokens: int, min_fill: float, overlap_tokens: int
) -> Pieces:
    """Cuts all documents and gives each piece the tokens of its text alone; some may have too many or none.

    Args:
        corpus: the documents, not all of them empty.
        tokenizer: the language model's tokenizer.
        max_tokens: the greatest number of tokens in a piece, its head included, counted within the document.
        min_fill: the share of it that a piece is filled to before a boundary may end it.
        overlap_tokens: the greatest number of tokens that a piece shares with the one before.

    Returns:
        Pieces that tile the documents, or overlap and cover them.
    """
    budgets = np.maximum(max_tokens - corpus.num_head_tokens, 1)
    parts, token_ids, num_tokens = [], [], 0
    rows = np.flatnonzero(np.diff(corpus.offsets))
    begins = resumes = corpus.offsets[rows]
    while len(rows):  # one window of every document that is not done
        ends = np.minimum(begins + WINDOW_BYTES, corpus.offsets[rows + 1])
        while (inside := corpus.ranks[ends] == NO_CHARACTER).any():
            ends = ends - inside
        is_last = ends == corpus.offsets[rows + 1]
        left = []
        for group in _group_by_size(ends - begins):
            tokens = encode_spans(corpus, begins[group], ends[group], tokenizer)
            text_ends = find_text_ends(corpus.data, begins[group], ends[group])
            windows = Windows(
                rows=rows[group],
                begins=begins[group],
                resumes=resumes[group],
                ends=ends[group],
                text_ends=np.where(is_last[group], text_ends, begins[group]),
                is_last=is_last[group],
                budgets=budgets[rows[group]],
            )
            pieces, next_begins, next_resumes = cut_windows(
                corpus.data,
                corpus.ranks,
                windows,
                tokens,
                min_fill=min_fill,
                overlap_tokens=overlap_tokens,
                window_bytes=WINDOW_BYTES,
            )
            pieces[:, (LOW, HIGH)] += num_tokens
            num_tokens += len(tokens.token_ids)
            token_ids.append(tokens.token_ids)
            parts.append(pieces)
            left.append(np.stack([rows[group], next_begins, next_resumes])[:, ~is_last[group]])
        rows, begins, resumes = np.concatenate(left, axis=1)
    pieces = np.concatenate(parts)
    pieces = pieces[np.argsort(pieces[:, ROW], kind="stable")]
    return _encode_alone(pieces, token_ids, corpus, tokenizer)


def _encode_alone(pieces: Positions, token_ids: Sequence[IntArray], corpus: Corpus, tokenizer: TextTokenizer) -> Pieces:
    """Tokenizes again the pieces whose tokens are no slice of their document's, and those with a head before them."""
    rows, starts, ends, lows, highs, is_alone = (np.ascontiguousarray(column) for column in pieces.T)
    counts = highs - lows
    prefixed = _find_prefixed(corpus.data, rows, starts, ends, corpus.heads, corpus.head_offsets) & (counts > 0)
    alone = np.flatnonzero(prefixed | (is_alone != 0))
    all_ids, num_tokens = list(token_ids), sum(len(part) for part in token_ids)
    for group in _group_by_size(ends[alone] - starts[alone] + corpus.num_head_tokens[rows[alone]]):
        own = alone[group]
        tokens = encode_spans(corpus, starts[own], ends[own], tokenizer, rows[own], prefixed[own])
        lows[own] = tokens.offsets[:-1] + num_tokens
        counts[own] = np.diff(tokens.offsets)
        num_tokens += len(tokens.token_ids)
        all_ids.append(tokens.token_ids)
    return Pieces(
        rows=rows,
        starts=starts,
        ends=ends,
        prefixed=prefixed,
        lows=lows,
        counts=counts,
        token_ids=np.concatenate(all_ids),
    )


def _group_by_size(sizes: Positions) -> Iterator[slice]:
    """Yields slices of the sizes, each of about GROUP_BYTES in all."""
    groups = np.cumsum(sizes) // GROUP_BYTES
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(sizes)] if len(sizes) else []
    yield from (slice(start, end) for start, end in itertools.pairwise(edges))


@numba.njit(cache=True, nogil=True)
def _find_prefixed(data: Any, rows: Any, starts: Any, ends: Any, heads: Any, head_offsets: Any) -> Any:
    """Marks the pieces whose document has a title and which do not begin with it."""
    found = np.zeros(len(rows), dtype=np.bool_)
    for index in range(len(rows)):
        head, size = head_offsets[rows[index]], head_offsets[rows[index] + 1] - head_offsets[rows[index]] - 1
        same = 0
        while same < size and starts[index] + same < ends[index] and data[starts[index] + same] == heads[head + same]:
            same += 1
        found[index] = same < size
    return found
