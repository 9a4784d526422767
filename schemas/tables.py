"""The tables of a bank, one pyarrow schema each. FORMAT.md says what every column means.

Tables are Parquet files sorted by their key, so that equal input gives equal bytes.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
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
        pa.field("title", pa.string(), nullable=False),
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
        pa.field("prefix", pa.string(), nullable=False),
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


def duplicates_schema(id_column: str) -> pa.Schema:
    """Returns the schema of what was dropped as a near-duplicate, for texts named by ``id_column``."""
    return pa.schema(
        [
            pa.field(id_column, pa.string(), nullable=False),
            pa.field(f"kept_{id_column}", pa.string(), nullable=False),
            pa.field("jaccard", pa.float64(), nullable=False),
            pa.field(f"matched_{id_column}", pa.string(), nullable=False),
            pa.field("matched_jaccard", pa.float64(), nullable=False),
            pa.field("cluster", pa.string(), nullable=False),
        ]
    )


DUPLICATES = duplicates_schema("ref_id")

DOCUMENT_DUPLICATES = duplicates_schema("doc_id")

CONTAMINATED = pa.schema(
    [
        pa.field("ref_id", pa.string(), nullable=False),
        pa.field("overlap", pa.float64(), nullable=False),
        pa.field("matched_doc_id", pa.string(), nullable=False),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=True),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=True),
        pa.field("threshold", pa.float64(), nullable=True),
    ]
)


def signatures_schema(id_column: str, num_permutations: int) -> pa.Schema:
    """Returns the schema of the MinHash rows, datasketch's ``affine32`` values, of texts named by ``id_column``."""
    return pa.schema(
        [
            pa.field(id_column, pa.string(), nullable=False),
            pa.field("signature", pa.list_(pa.uint32(), num_permutations), nullable=False),
            pa.field("sequence_key", pa.uint64(), nullable=False),
            pa.field("num_shingles", pa.int64(), nullable=False),
        ]
    )


TOMBSTONES = pa.schema([pa.field("ref_id", pa.string(), nullable=False)])


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


def find_schema(kind: str, found: pa.Schema) -> pa.Schema | None:
    """Returns the schema that a table of a kind must have, None if there is no such kind of table.

    Args:
        kind: the kind of file.
        found: the schema that a file has; where the length of lists differs between banks, it is taken from there.
    """
    fixed = {
        "documents": DOCUMENTS,
        "occurrences": OCCURRENCES,
        "references": REFERENCES,
        "duplicates": DUPLICATES,
        "document_duplicates": DOCUMENT_DUPLICATES,
        "contaminated": CONTAMINATED,
        "rejects": REJECTS,
        "tombstones": TOMBSTONES,
    }
    if kind in fixed:
        return fixed[kind]
    sized: dict[str, tuple[str, Callable[[int], pa.Schema]]] = {
        "signatures": ("signature", functools.partial(signatures_schema, "ref_id")),
        "document_signatures": ("signature", functools.partial(signatures_schema, "doc_id")),
        "embeddings": ("vector", embeddings_schema),
        "memories": ("offsets", memories_schema),
    }
    if kind not in sized:
        return None
    column, make = sized[kind]
    index = found.get_field_index(column)
    is_sized = index >= 0 and pa.types.is_fixed_size_list(found.field(index).type)
    return make(found.field(index).type.list_size if is_sized else 1)


def rebatch(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Yields the rows of tables of one schema as tables of exactly ``num_rows``, the last of fewer; none if empty."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in tables:
        waiting.append(table)
        num_waiting += len(table)
        if num_waiting < num_rows:
            continue
        joined = pa.concat_tables(waiting)
        num_whole = num_waiting - num_waiting % num_rows
        for start in range(0, num_whole, num_rows):
            yield joined.slice(start, num_rows).combine_chunks()
        waiting, num_waiting = [joined.slice(num_whole)], num_waiting - num_whole
    if num_waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def write_tables(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Writes tables one after the other as one Parquet file, atomically; returns the number of rows.

    The bytes depend on the rows alone, not on how they are spread over the tables.
    """
    num_rows = 0
    with (
        replace_atomically(path) as temporary,
        # Zstandard's frames have no checksum here: a changed byte in a page would be read as another text or number.
        pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=False, store_schema=True, write_page_checksum=True
        ) as writer,
    ):
        for table in rebatch(tables, ROWS_PER_GROUP):
            writer.write_table(table.cast(schema), row_group_size=ROWS_PER_GROUP)
            num_rows += len(table)
    return num_rows


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table as one Parquet file, atomically and with equal bytes for equal rows."""
    write_tables([table], table.schema, path)
