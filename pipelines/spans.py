"""A batch of documents as bytes, with their titles, and spans of it as strings and as tokens.

    records (:mod:`pipelines.reading`) -> **corpus** -> pieces (:mod:`pipelines.pieces`)

All that follows works on the corpus: a piece or a reference is a span of its bytes, and becomes a string of its own
only for the tokenizer and in the table.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

import numba
import numpy as np
import pyarrow as pa

from pipelines.boundaries import Bytes, Mask, Positions, Ranks, rank_places
from schemas.errors import InputError
from schemas.protocols import EncodedTexts, TextTokenizer

MAX_ARRAY_BYTES = (1 << 31) - 1
"""Text that an array of strings can hold."""

Strings: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | None]
"""A column of strings in any form it may be given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A batch of D documents as bytes.

    Attributes:
        data: their UTF-8, one after the other.
        offsets: document i is ``data[offsets[i]:offsets[i + 1]]``, (D+1,).
        ranks: how good a cut is before each byte, and at the end.
        heads: what to put before the references of each document, a title and a line end, one after the other.
        head_offsets: where each begins, (D+1,); a document without a title has nothing.
        num_head_tokens: how many tokens each has, (D,).
    """

    data: Bytes
    offsets: Positions
    ranks: Ranks
    heads: Bytes
    head_offsets: Positions
    num_head_tokens: Positions


def read_corpus(
    texts: pa.Array, titles: Strings | None, tokenizer: TextTokenizer, *, boundary: str, max_title_tokens: int
) -> Corpus:
    """Makes the corpus of a batch, without copying its text.

    Args:
        texts: D documents, an array of type string without nulls.
        titles: a title a document, null or empty for none; None if none is to be put before references.
        tokenizer: the language model's tokenizer.
        boundary: what counts as a boundary, one of :data:`pipelines.boundaries.BOUNDARIES`.
        max_title_tokens: a longer title is cut at a word.
    """
    data, offsets = get_bytes(texts)
    lines = [""] * len(texts)
    num_tokens = np.zeros(len(texts), dtype=np.int64)
    if titles is not None and len(texts):
        short = _shorten_titles(to_array(titles).to_pylist(), tokenizer, max_title_tokens)
        lines = [f"{title}\n" if title else "" for title in short]
        num_tokens = np.diff(tokenizer.encode_texts(pa.array(lines, pa.string())).offsets)
    heads, head_offsets = get_bytes(pa.array(lines, pa.string()))
    return Corpus(
        data=data,
        offsets=offsets,
        ranks=rank_places(data, offsets, boundary),
        heads=heads,
        head_offsets=head_offsets,
        num_head_tokens=num_tokens,
    )


def to_array(values: Strings) -> pa.Array:
    """Returns a column as one array of type string."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(pa.string()) if isinstance(values, pa.Array) else pa.array(values, pa.string())


def get_bytes(texts: pa.Array) -> tuple[Bytes, Positions]:
    """Returns the UTF-8 of N strings (type string) and where each begins, int64 (N+1,), without copying the former."""
    _, places, content = texts.buffers()
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    if len(texts):
        offsets[:] = np.frombuffer(places, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(b"" if content is None else content, dtype=np.uint8), offsets


def encode_spans(
    corpus: Corpus,
    starts: Positions,
    ends: Positions,
    tokenizer: TextTokenizer,
    rows: Positions | None = None,
    prefixed: Mask | None = None,
) -> EncodedTexts:
    """Tokenizes spans of the data, with heads before those prefixed.

    Args:
        corpus: the documents.
        starts: first byte of each span, (S,).
        ends: the byte after its last, (S,).
        tokenizer: the language model's tokenizer.
        rows: the document of each span, (S,); this and the next are given together or not at all.
        prefixed: whether the head of its document comes before it, (S,).

    Returns:
        The tokens of the S texts. The arrays are contiguous and writable, so that kernels are compiled for them once.

    Raises:
        InputError: the texts have 2 GiB.
    """
    nothing = np.zeros_like(starts)
    heads = (nothing, nothing) if rows is None or prefixed is None else locate_heads(corpus, rows, prefixed)
    tokens = tokenizer.encode_texts(join_spans(corpus.heads, *heads, corpus.data, starts, ends))
    types = {"token_ids": np.int32, "starts": np.int64, "ends": np.int64, "separable": np.bool_, "offsets": np.int64}
    return EncodedTexts(**{name: np.require(getattr(tokens, name), kind, ["C", "W"]) for name, kind in types.items()})


def locate_heads(corpus: Corpus, rows: Positions, prefixed: Mask) -> tuple[Positions, Positions]:
    """Returns where the heads that come before P pieces begin and end, (P,) each; empty for those not prefixed."""
    return np.where(prefixed, corpus.head_offsets[rows], 0), np.where(prefixed, corpus.head_offsets[rows + 1], 0)


def join_spans(
    heads: Bytes, head_starts: Positions, head_ends: Positions, data: Bytes, starts: Positions, ends: Positions
) -> pa.Array:
    """Returns S strings, each a span of ``heads`` and then one of ``data``; starts and ends are int64 (S,).

    Raises:
        InputError: the strings have 2 GiB.
    """
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(head_ends - head_starts + ends - starts, out=offsets[1:])
    if offsets[-1] > MAX_ARRAY_BYTES:
        raise InputError(f"chunking: a batch's references have {offsets[-1]} bytes, must be at most {MAX_ARRAY_BYTES}")
    content = np.empty(offsets[-1], dtype=np.uint8)
    _copy_spans(heads, head_starts, head_ends, data, starts, ends, offsets, content)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(content)]
    return pa.StringArray.from_buffers(len(starts), buffers[1], buffers[2])


def _shorten_titles(titles: Sequence[str | None], tokenizer: TextTokenizer, max_title_tokens: int) -> list[str]:
    """Returns the titles, each on one line and within ``max_title_tokens``: the words, or else characters, that fit."""
    lines = [" ".join((title or "").split()) for title in titles]
    num_tokens = np.diff(tokenizer.encode_texts(pa.array(lines, pa.string())).offsets)
    for index in np.flatnonzero(num_tokens > max_title_tokens).tolist():
        words = lines[index].split(" ")
        starts = [" ".join(words[:num_words]) for num_words in range(1, len(words) + 1)]
        if len(tokenizer.encode(starts[:1])[0]) > max_title_tokens:
            starts = [lines[index][:num_chars] for num_chars in range(len(words[0]))]
        num_fitting = bisect_right(starts, max_title_tokens, key=lambda start: len(tokenizer.encode([start])[0]))
        lines[index] = starts[num_fitting - 1]
    return lines


@numba.njit(cache=True, nogil=True)
def _copy_spans(
    heads: Any, head_starts: Any, head_ends: Any, data: Any, starts: Any, ends: Any, offsets: Any, content: Any
) -> None:
    """Writes spans of ``heads`` and ``data`` by turns to ``content``, from ``offsets`` on."""
    for index in range(len(starts)):
        middle = offsets[index] + head_ends[index] - head_starts[index]
        for shift in range(middle - offsets[index]):
            content[offsets[index] + shift] = heads[head_starts[index] + shift]
        for shift in range(offsets[index + 1] - middle):
            content[middle + shift] = data[starts[index] + shift]
