"""Pieces made a table: the text, the tokens and the id of each reference, and where in which document it stands.

    pieces that are references (:mod:`pipelines.mending`) -> **chunks** -> references and occurrences of the bank

Columns are filled from the bytes and tokens of the whole batch; no reference becomes an object of Python but its id.
"""

import itertools
from typing import Any

import numba
import numpy as np
import pyarrow as pa

from pipelines.boundaries import Positions
from pipelines.pieces import Pieces
from pipelines.spans import Corpus, join_spans, locate_heads
from schemas.identifiers import hash_bytes
from schemas.protocols import IntArray
from schemas.tables import OCCURRENCES, REFERENCES

CHUNKS = pa.schema([*OCCURRENCES, *(field for field in REFERENCES if field.name != "ref_id")])
"""One row a reference and place: the columns of the occurrences followed by those of the references."""


def make_table(doc_ids: pa.Array, pieces: Pieces, corpus: Corpus, tokenizer_id: str) -> pa.Table:
    """Makes the table of pieces that are references.

    Args:
        doc_ids: an id a document, (D,).
        pieces: P pieces with at least one token each.
        corpus: the D documents.
        tokenizer_id: enters the ids of the references.

    Returns:
        A table of :data:`CHUNKS`, a row a piece.

    Raises:
        InputError: the references have 2 GiB of text.
    """
    num_pieces = len(pieces.rows)
    offsets = np.zeros(num_pieces + 1, dtype=np.int64)
    np.cumsum(pieces.counts, out=offsets[1:])
    token_ids = np.empty(offsets[-1], dtype=np.int32)
    _copy_tokens(pieces.token_ids, pieces.lows, offsets, token_ids)
    start_chars, end_chars = _count_characters(corpus.data, corpus.offsets, pieces.rows, pieces.starts, pieces.ends)
    heads = locate_heads(corpus, pieces.rows, pieces.prefixed)
    nothing = np.zeros_like(pieces.starts)
    columns = {
        "doc_id": doc_ids.take(pa.array(pieces.rows)),
        "ordinal": np.arange(num_pieces) - np.searchsorted(pieces.rows, pieces.rows),
        "start_byte": pieces.starts - corpus.offsets[pieces.rows],
        "end_byte": pieces.ends - corpus.offsets[pieces.rows],
        "start_char": start_chars,
        "end_char": end_chars,
        "prefix": join_spans(corpus.heads, *heads, corpus.data, nothing, nothing),
        "ref_id": _make_ref_ids(token_ids, offsets, tokenizer_id),
        "text": join_spans(corpus.heads, *heads, corpus.data, pieces.starts, pieces.ends),
        "token_ids": pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), pa.array(token_ids), type=CHUNKS.field("token_ids").type
        ),
        "num_tokens": pieces.counts,
    }
    return pa.table(
        [
            column if isinstance(column, pa.Array) else pa.array(column, CHUNKS.field(name).type)
            for name, column in columns.items()
        ],
        schema=CHUNKS,
    )


def _make_ref_ids(token_ids: IntArray, offsets: Positions, tokenizer_id: str) -> list[str]:
    """Returns :func:`schemas.identifiers.make_ref_id` of each reference, without an array for each."""
    head = tokenizer_id.encode() + b"\0"
    content = token_ids.astype("<i4", copy=False).data.cast("B")
    places = (4 * offsets).tolist()
    return [hash_bytes(head + content[start:end]) for start, end in itertools.pairwise(places)]


@numba.njit(cache=True, nogil=True)
def _copy_tokens(token_ids: Any, lows: Any, offsets: Any, found: Any) -> None:
    """Writes the tokens of each piece, from ``lows`` on, one piece after the other."""
    for index in range(len(lows)):
        for shift in range(offsets[index + 1] - offsets[index]):
            found[offsets[index] + shift] = token_ids[lows[index] + shift]


@numba.njit(cache=True, nogil=True)
def _count_characters(data: Any, offsets: Any, rows: Any, starts: Any, ends: Any) -> Any:
    """Returns the places of the pieces' starts and ends in characters of their document."""
    start_chars, end_chars = np.empty_like(starts), np.empty_like(starts)
    row, place, count = -1, 0, 0
    for index in range(len(rows)):
        if rows[index] != row:
            row = rows[index]
            place, count = offsets[row], 0
        for byte in data[place : starts[index]]:
            count += byte & 0xC0 != 0x80
        place = starts[index]
        start_chars[index] = count
        size = 0
        for byte in data[place : ends[index]]:
            size += byte & 0xC0 != 0x80
        end_chars[index] = count + size
    return start_chars, end_chars
