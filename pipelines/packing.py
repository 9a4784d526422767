"""Documents packed into token sequences: nothing is lost, and every token but the first is a target exactly once.

    kept documents of a row group -> **sequences** -> what their chunks may read (:mod:`pipelines.sequencing`)

Documents, each ``<s> text </s>``, follow each other in an order drawn by hashing. The stream is cut so that a sequence
begins with the last token of the one before it: that token was a target there and is only read here. So N tokens have
N - 1 targets, whatever the length of a sequence.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.spans import get_bytes
from schemas.errors import InputError
from schemas.identifiers import hash_bytes
from schemas.protocols import EncodedTexts, IntArray, LongArray, TextTokenizer
from schemas.sequences import CHUNK_TOKENS, PACKED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How documents are packed.

    Attributes:
        bos_token_id: ``<s>``, before each document.
        eos_token_id: ``</s>``, after each document.
        sequence_tokens: tokens that a sequence reads and predicts, whole chunks of 64; it has one more.
        seed: seed of the order of documents.
    """

    bos_token_id: int
    eos_token_id: int
    sequence_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a length that is no whole number of chunks, or a negative token.
        """
        if self.sequence_tokens < CHUNK_TOKENS or self.sequence_tokens % CHUNK_TOKENS:
            raise InputError(
                f"packing: sequence_tokens is {self.sequence_tokens}, must be a positive multiple of {CHUNK_TOKENS}"
            )
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) < 0:
                raise InputError(f"packing: {name} is {getattr(self, name)}, must be at least 0")


def order_documents(doc_ids: list[str], seed: int) -> list[int]:
    """Returns the places of documents in an order that depends on their ids and the seed alone."""
    return sorted(range(len(doc_ids)), key=lambda place: hash_bytes(f"{seed}\0{doc_ids[place]}".encode()))


def pack_documents(doc_ids: pa.Array, texts: pa.Array, tokenizer: TextTokenizer, config: PackingConfig) -> pa.Table:
    """Packs documents into sequences.

    Args:
        doc_ids: an id a document, of type string.
        texts: the documents, of type string.
        tokenizer: the language model's tokenizer.
        config: how to pack.

    Returns:
        A table of :data:`schemas.sequences.PACKED`; only the last sequence is shorter than the others. A document has
        a span in each sequence that holds tokens of its text.
    """
    if not len(texts):
        return PACKED.empty_table()
    names = doc_ids.to_pylist()
    encoded = tokenizer.encode_texts(texts)
    order = np.array(order_documents(names, config.seed), dtype=np.int64)
    counts = np.diff(encoded.offsets)[order]
    ends = np.cumsum(counts + 2)
    firsts = ends - counts - 2  # where the <s> of each document stands in the stream
    stream = _fill_stream(encoded, order, firsts, ends, config)

    starts = np.arange(0, len(stream) - 1, config.sequence_tokens)
    stops = np.minimum(starts + config.sequence_tokens + 1, len(stream))
    spans = list(_iterate_spans(encoded, texts, order, firsts, starts, stops))
    sizes = stops - starts
    return pa.table(
        {
            "tokens": _make_lists(
                np.concatenate([stream[start:stop] for start, stop in zip(starts, stops, strict=True)]), sizes
            ),
            "num_tokens": pa.array(sizes, pa.int32()),
            "documents": [
                [
                    dict(zip(("doc_id", "start_token", "end_token", "start_char", "end_char"), row, strict=True))
                    for row in ((names[document], *places) for document, *places in of_sequence)
                ]
                for of_sequence in spans
            ],
        },
        schema=PACKED,
    )


def _make_lists(values: IntArray, sizes: LongArray) -> pa.Array:
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=PACKED.field("tokens").type)


def _fill_stream(
    encoded: EncodedTexts, order: LongArray, firsts: LongArray, ends: LongArray, config: PackingConfig
) -> IntArray:
    """Returns the tokens of the documents in their order, each between ``<s>`` and ``</s>``."""
    stream = np.empty(ends[-1], dtype=np.int32)
    is_text = np.ones(len(stream), dtype=np.bool_)
    is_text[firsts] = is_text[ends - 1] = False
    stream[firsts], stream[ends - 1] = config.bos_token_id, config.eos_token_id
    offsets = encoded.offsets
    stream[is_text] = np.concatenate([encoded.token_ids[offsets[row] : offsets[row + 1]] for row in order])
    return stream


def _iterate_spans(
    encoded: EncodedTexts, texts: pa.Array, order: LongArray, firsts: LongArray, starts: LongArray, stops: LongArray
) -> Iterator[list[tuple[int, ...]]]:
    """Yields for each sequence its documents: row, tokens from and to in the sequence, characters from and to."""
    data, offsets = get_bytes(texts)
    num_chars: Any = np.zeros(len(data) + 1, dtype=np.int64)
    np.cumsum(data & 0xC0 != 0x80, out=num_chars[1:])
    first = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        while first + 1 < len(firsts) and firsts[first + 1] <= start:
            first += 1
        spans: list[tuple[int, ...]] = []
        place = first
        while place < len(firsts) and firsts[place] < stop:
            row = int(order[place])
            text = int(firsts[place]) + 1
            low = max(start, text)
            high = min(stop, text + int(encoded.offsets[row + 1] - encoded.offsets[row]))
            if low < high:
                shift = int(encoded.offsets[row]) - text
                begin = offsets[row] + encoded.starts[low + shift]
                end = offsets[row] + encoded.ends[high - 1 + shift]
                # A token may begin or end inside a character: the span has the whole of it.
                zero = num_chars[offsets[row]]
                chars = int(num_chars[begin + 1] - 1 - zero), int(num_chars[end] - zero)
                spans.append((row, low - start, high - start, *chars))
            place += 1
        yield spans
