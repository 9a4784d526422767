"""Documents cut into references of at most 128 tokens (method section 3), at the ends of sentences where there are any.

Third step of the data flow: records (:mod:`pipelines.reading`) -> **references and where they stand** -> deduplication
and encoding. The references of a document tile it: joined in order they are its text again.

Where a cut stands beside white space is left to the tokenizer: a cut is only made between two tokens of the document
as a whole. A byte-level BPE keeps a space with the word after it and line ends with what is before them; so a
reference begins with `` The`` in the middle of a line and with ``The`` on a new one. Cutting after the space instead
would leave it behind as a token of its own and begin the next reference with another token than the document has
there; the two would no longer add up to the tokens counted, and pieces would have to be cut again.
"""

import dataclasses
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.boundaries import NO_BOUNDARY, find_boundaries, find_inner_positions
from schemas.errors import InputError
from schemas.identifiers import make_ref_id
from schemas.protocols import IntArray, TextTokenizer
from schemas.records import EMPTY_SLOT
from schemas.tables import OCCURRENCES, REFERENCES

CHUNKS = pa.schema([*OCCURRENCES, *(field for field in REFERENCES if field.name != "ref_id")])
"""One row a reference and place: the columns of the occurrences followed by those of the references."""

MIN_MAX_TOKENS = 16
SECTION_CHARS = 1 << 18
"""Longer documents are encoded in sections of at most this size, so that a tokenizer's memory use is bounded."""

GROUP_CHARS = 1 << 20
"""Text given to the tokenizer in one call."""

INNER = NO_BOUNDARY + 1
"""The rank of a cut inside what a reader sees as one character: made only where there is no other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """How documents are cut.

    Attributes:
        max_tokens: the greatest number of tokens in a reference (128 in the paper).
        min_fill: the share of ``max_tokens`` that a reference is filled to before a boundary may end it.
    """

    max_tokens: int = 128
    min_fill: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: ``max_tokens`` or ``min_fill`` is out of bounds.
        """
        if not MIN_MAX_TOKENS <= self.max_tokens <= EMPTY_SLOT:  # offsets of tokens are stored as one byte
            bounds = f"between {MIN_MAX_TOKENS} and {EMPTY_SLOT}"
            raise InputError(f"chunking: max_tokens is {self.max_tokens}, must be {bounds}")
        if not 0 <= self.min_fill < 1:
            raise InputError(f"chunking: min_fill is {self.min_fill}, must be at least 0 and less than 1")


class _Piece(NamedTuple):
    """A part of a document in characters, and the tokens of its text alone."""

    start: int
    end: int
    token_ids: IntArray


class _Cuts(NamedTuple):
    """The places where a text may be cut, with its start and end: C of them.

    ``positions`` are in characters, strictly ascending; ``num_tokens`` is how many tokens stand before each;
    ``ranks`` has a byte a place, the least is the best.
    """

    positions: list[int]
    num_tokens: list[int]
    ranks: bytes


def chunk_documents(
    doc_ids: Sequence[str], texts: Sequence[str], tokenizer: TextTokenizer, config: ChunkingConfig
) -> pa.Table:
    """Cuts documents into references.

    A reference ends at the best boundary (:func:`pipelines.boundaries.find_boundaries`) in the last part of the window
    that ``max_tokens`` allows, the later of two equal ones, and between two tokens where there is none. Its token ids
    are those of its own text encoded alone, so equal text has an equal ``ref_id`` wherever it stands. What becomes of
    a document does not depend on the others.

    Args:
        doc_ids: an id a document.
        texts: the documents.
        tokenizer: the language model's tokenizer.
        config: how to cut.

    Returns:
        A table of :data:`CHUNKS`, in the order of the documents and of their text. Spans are half open; those of a
        document tile it, white space and characters without a token included. A document without any token has no
        reference.

    Raises:
        InputError: ``max_tokens`` cannot hold a single character of a document, or the tokenizer gives no token to a
            part that had many within its document.
    """
    tokens = _encode_documents(texts, tokenizer, config)
    pieces = [_mend_pieces(text, parts, tokenizer, config) for text, parts in zip(texts, tokens, strict=True)]
    return _make_table(doc_ids, texts, pieces, tokenizer.tokenizer_id)


def _encode_documents(texts: Sequence[str], tokenizer: TextTokenizer, config: ChunkingConfig) -> list[list[_Piece]]:
    """Cuts each document by its tokens as a whole, then encodes each piece alone; some may have too many or none."""
    sections = [(row, *span) for row, text in enumerate(texts) for span in itertools.pairwise(_find_sections(text))]
    spans: list[tuple[int, int, int]] = []
    for group in _group_by_size(sections):
        parts = [texts[row][start:end] for row, start, end in group]
        for (row, start, _), part, (_, token_spans) in zip(
            group, parts, tokenizer.encode_with_spans(parts), strict=True
        ):
            places = [0, *_choose_cuts(part, _find_cuts(part, token_spans), config)]
            spans.extend((row, start + first, start + last) for first, last in itertools.pairwise(places))
    pieces: list[list[_Piece]] = [[] for _ in texts]
    for group in _group_by_size(spans):
        tokens = tokenizer.encode([texts[row][start:end] for row, start, end in group])
        for (row, start, end), token_ids in zip(group, tokens, strict=True):
            pieces[row].append(_Piece(start, end, token_ids))
    return pieces


def _group_by_size(spans: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Yields the spans (row, start, end) in groups of at most GROUP_CHARS characters, or of one span."""
    group: list[tuple[int, int, int]] = []
    num_chars = 0
    for span in spans:
        size = span[2] - span[1]
        if group and num_chars + size > GROUP_CHARS:
            yield group
            group, num_chars = [], 0
        group.append(span)
        num_chars += size
    if group:
        yield group


def _find_sections(text: str) -> list[int]:
    """Returns the ends of the sections of a text, 0 first: good boundaries in the last quarter of SECTION_CHARS."""
    places = [0]
    while len(text) - places[-1] > SECTION_CHARS:
        begin, end = places[-1] + SECTION_CHARS * 3 // 4, places[-1] + SECTION_CHARS
        positions, ranks = find_boundaries(text[begin:end])
        if len(positions):
            best = np.flatnonzero(ranks == ranks.min())[-1]
            places.append(begin + int(positions[best]))
        else:
            places.append(begin + int(np.flatnonzero(~find_inner_positions(text[begin:end]))[-1]))
    return [*places, len(text)] if text else places


def _find_cuts(text: str, spans: IntArray) -> _Cuts:
    """Finds the places between tokens; ``spans`` (tokens, 2) are those of the text's tokens."""
    ranks = np.full(len(text) + 1, NO_BOUNDARY, dtype=np.uint8)
    boundaries, boundary_ranks = find_boundaries(text)
    ranks[boundaries] = boundary_ranks
    ranks[:-1][find_inner_positions(text)] = INNER

    ends = np.maximum.accumulate(spans[:-1, 1])
    starts = np.minimum.accumulate(spans[:0:-1, 0])[::-1]
    positions = ends.copy()
    rank_bytes = ranks.tobytes()
    for index in np.flatnonzero(starts > ends):  # characters that no token covers
        positions[index] = _find_best_in_gap(text, rank_bytes, int(ends[index]), int(starts[index]))
    is_cut = (ends <= starts) & (positions > 0) & (positions < len(text))  # not inside a character of several tokens
    is_cut[1:] &= ~(is_cut[:-1] & (positions[1:] == positions[:-1]))
    positions, num_tokens = positions[is_cut], np.flatnonzero(is_cut) + 1
    outer = bytes([NO_BOUNDARY])
    return _Cuts(
        [0, *positions.tolist(), len(text)],
        [0, *num_tokens.tolist(), len(spans)],
        outer + ranks[positions].tobytes() + outer,
    )


def _find_best_in_gap(text: str, ranks: bytes, start: int, end: int) -> int:
    """Returns the place of the best rank in a gap between two tokens: after a line end, but before a mere space."""
    best = min(ranks[start : end + 1])
    last = ranks.rfind(best, start, end + 1)
    return last if text[last - 1] == "\n" else ranks.find(best, start, end + 1)


def _choose_cuts(text: str, cuts: _Cuts, config: ChunkingConfig) -> list[int]:
    """Returns the ends of the references in characters, the end of the text last."""
    positions, num_tokens, ranks = cuts
    last = len(positions) - 1
    last_with_text = bisect_left(positions, len(text.rstrip())) - 1
    min_tokens = math.ceil(config.min_fill * config.max_tokens)
    chosen = []
    at = 0
    while (high := bisect_right(num_tokens, num_tokens[at] + config.max_tokens) - 1) < last:
        if last_with_text > at:
            high = min(high, last_with_text)  # leaves text for the last reference, not only white space
        high = max(high, at + 1)
        low = min(max(bisect_left(num_tokens, num_tokens[at] + min_tokens), at + 1), high)
        best = _find_best(ranks, low, high)
        if ranks[best] == INNER:
            earlier = max(ranks.rfind(rank, at + 1, low) for rank in range(INNER))
            best = earlier if earlier > 0 else best
        at = best
        chosen.append(positions[at])
    return [*chosen, positions[last]]


def _find_best(ranks: bytes, low: int, high: int) -> int:
    """Returns the last place of the best rank among the places low to high, both included."""
    return next(place for rank in range(INNER + 1) if (place := ranks.rfind(rank, low, high + 1)) >= 0)


def _mend_pieces(text: str, pieces: list[_Piece], tokenizer: TextTokenizer, config: ChunkingConfig) -> list[_Piece]:
    """Splits pieces with too many tokens, and joins those without tokens or of white space to a neighbour.

    White space stays a reference of its own only if neither neighbour has room for it.
    """

    def is_weak(piece: _Piece) -> bool:
        return not len(piece.token_ids) or text[piece.start : piece.end].isspace()

    if not any(is_weak(piece) or len(piece.token_ids) > config.max_tokens for piece in pieces):
        return pieces
    mended: list[_Piece] = []
    for piece in (part for whole in pieces for part in _split_piece(text, whole, tokenizer, config)):
        if mended and (is_weak(mended[-1]) or is_weak(piece)):
            joined = _encode_piece(text, mended[-1].start, piece.end, tokenizer)
            if len(joined.token_ids) <= config.max_tokens:
                mended[-1] = joined
                continue
        mended.append(piece)
    without_tokens = [piece for piece in mended if not len(piece.token_ids)]
    if without_tokens == mended:
        return []
    if without_tokens:
        part = text[without_tokens[0].start : without_tokens[0].end]
        raise InputError(f"chunking: the tokenizer gives no token to {part!r:.80} alone, must give one; use another")
    return mended


def _encode_piece(text: str, start: int, end: int, tokenizer: TextTokenizer) -> _Piece:
    return _Piece(start, end, tokenizer.encode([text[start:end]])[0])


def _split_piece(text: str, piece: _Piece, tokenizer: TextTokenizer, config: ChunkingConfig) -> list[_Piece]:
    """Splits a piece until no part has too many tokens.

    Alone a piece can have more tokens than within the document, for instance where a tokenizer puts a space before
    every text. It is split at the best boundary of its middle half, so that no part becomes a mere rest.
    """
    if len(piece.token_ids) <= config.max_tokens:
        return [piece]
    part = text[piece.start : piece.end]
    if len(part) == 1:
        raise InputError(
            f"chunking: max_tokens is {config.max_tokens}, but the character {part!r} alone takes "
            f"{len(piece.token_ids)} tokens, must be at least that"
        )
    cuts = _find_cuts(part, tokenizer.encode_with_spans([part])[0][1])
    last = len(cuts.positions) - 1
    middle = len(part) // 2
    if last > 1:
        num_tokens = cuts.num_tokens[last]
        low = min(max(bisect_left(cuts.num_tokens, num_tokens / 4), 1), last - 1)
        high = min(max(bisect_right(cuts.num_tokens, num_tokens * 3 / 4) - 1, low), last - 1)
        middle = cuts.positions[_find_best(cuts.ranks, low, high)]
    halves = ((piece.start, piece.start + middle), (piece.start + middle, piece.end))
    return [
        part
        for start, end in halves
        for part in _split_piece(text, _encode_piece(text, start, end, tokenizer), tokenizer, config)
    ]


def _make_table(
    doc_ids: Sequence[str], texts: Sequence[str], pieces_of_documents: list[list[_Piece]], tokenizer_id: str
) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in CHUNKS.names if name != "token_ids"}
    token_ids: list[IntArray] = []
    for doc_id, text, pieces in zip(doc_ids, texts, pieces_of_documents, strict=True):
        parts = [text[piece.start : piece.end] for piece in pieces]
        ends = list(itertools.accumulate(len(part.encode()) for part in parts))
        columns["doc_id"].extend([doc_id] * len(pieces))
        columns["ordinal"].extend(range(len(pieces)))
        columns["start_byte"].extend([0, *ends][: len(pieces)])
        columns["end_byte"].extend(ends)
        columns["start_char"].extend(piece.start for piece in pieces)
        columns["end_char"].extend(piece.end for piece in pieces)
        columns["text"].extend(parts)
        token_ids.extend(piece.token_ids for piece in pieces)
    columns["ref_id"] = [make_ref_id(tokens, tokenizer_id) for tokens in token_ids]
    columns["num_tokens"] = [len(tokens) for tokens in token_ids]
    values = np.concatenate(token_ids) if token_ids else np.empty(0, dtype=np.int32)
    offsets = np.cumsum([0, *columns["num_tokens"]], dtype=np.int32)
    arrays = {name: pa.array(values, CHUNKS.field(name).type) for name, values in columns.items()}
    arrays["token_ids"] = pa.ListArray.from_arrays(offsets, values, type=CHUNKS.field("token_ids").type)
    return pa.table([arrays[name] for name in CHUNKS.names], schema=CHUNKS)
