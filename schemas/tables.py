"""The tables of a bank, one pyarrow schema each. FORMAT.md says what every column means.

Tables are Parquet files sorted by their key, so that equal input gives equal bytes.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.atomic import replace_atomically

ROWS_PER_GROUP = 16_384
"""Rows in a Parquet row group: small enough to read a few rows cheaply, large enough to scan fast."""

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("num_chars", pa.int64(), nullable=False),
        pa.field("num_references", pa.int32(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
    ]
)

OCCURRENCES = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("start_byte", pa.int64(), nullable=False),
        pa.field("end_byte", pa.int64(), nullable=False),
        pa.field("start_char", pa.int64(), nullable=False),
        pa.field("end_char", pa.int64(), nullable=False),
        pa.field("ref_id", pa.string(), nullable=False),
    ]
)

REFERENCES = pa.schema(
    [
        pa.field("ref_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)

DUPLICATES = pa.schema(
    [
        pa.field("ref_id", pa.string(), nullable=False),
        pa.field("kept_ref_id", pa.string(), nullable=False),
        pa.field("jaccard", pa.float64(), nullable=False),
        pa.field("matched_ref_id", pa.string(), nullable=False),
        pa.field("matched_jaccard", pa.float64(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=True),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def signatures_schema(num_permutations: int) -> pa.Schema:
    """Returns the schema of the MinHash rows, datasketch's ``affine32`` values."""
    return pa.schema(
        [
            pa.field("ref_id", pa.string(), nullable=False),
            pa.field("signature", pa.list_(pa.uint32(), num_permutations), nullable=False),
        ]
    )


def embeddings_schema(dimension: int) -> pa.Schema:
    """Returns the schema of the reference embeddings, unit vectors of ``dimension`` float32."""
    return pa.schema(
        [
            pa.field("ref_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimension), nullable=False),
        ]
    )


def memories_schema(num_offsets: int) -> pa.Schema:
    """Returns the schema that says where each memory stands and which tokens it kept.

    Args:
        num_offsets: memory layers x KV heads x slots, the flattened shape of the kept offsets.
    """
    return pa.schema(
        [
            pa.field("ref_id", pa.string(), nullable=False),
            pa.field("shard", pa.string(), nullable=False),
            pa.field("row", pa.int32(), nullable=False),
            pa.field("offsets", pa.list_(pa.uint8(), num_offsets), nullable=False),
        ]
    )


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table as one Parquet file, atomically and with equal bytes for equal rows."""
    with replace_atomically(path) as temporary:
        pq.write_table(
            table.combine_chunks(),
            temporary,
            compression="zstd",
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=False,
            store_schema=True,
        )
