"""Training sequences on disk: one folder with all that a training reads, written once and never changed.

dataset/
  dataset.json        what the folder is, with the digest of every file; written last
  sequences/*.parquet one row a sequence: tokens, where they are from, and what each chunk may read
  references.arrow    the tokens of these references and of others, see :mod:`schemas.reference_tokens`

Where it stands: ``pipelines`` writes it from a corpus and a bank, the loader of ``model`` draws batches from it.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.atomic import replace_atomically, write_bytes_atomically
from schemas.errors import DatasetFormatError
from schemas.identifiers import hash_json
from schemas.tables import rebatch

SEQUENCES_FORMAT = 1
"""The format version this release writes, and the only one it reads."""

MANIFEST_NAME = "dataset.json"
REFERENCES_NAME = "references.arrow"
SHARDS_FOLDER = "sequences"

SEQUENCES_PER_BLOCK = 256
"""Sequences in a row group of a shard, which is read as a whole; the last one of a shard may have fewer."""

CHUNK_TOKENS = 64
"""Tokens that retrieve together (method section 6)."""

DOCUMENT_SPAN = pa.struct(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("start_token", pa.int32(), nullable=False),
        pa.field("end_token", pa.int32(), nullable=False),
        pa.field("start_char", pa.int64(), nullable=False),
        pa.field("end_char", pa.int64(), nullable=False),
    ]
)
"""Tokens of a sequence, half open, without ``<s>`` and ``</s>``, and the characters of the document they stand for."""


def _list(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False))


PACKED = pa.schema(
    [
        pa.field("tokens", _list(pa.int32()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("documents", _list(DOCUMENT_SPAN), nullable=False),
    ]
)
"""Sequences before retrieval. All but the first token are targets, all but the last are read: n - 1 of each."""

SEQUENCES = pa.schema(
    [
        pa.field("sequence", pa.int64(), nullable=False),
        *PACKED,
        pa.field("ref_ids", _list(_list(pa.string())), nullable=False),
        pa.field("overlaps", _list(_list(pa.float32())), nullable=False),
        pa.field("similarities", _list(_list(pa.float32())), nullable=False),
        pa.field("num_leaking", pa.int32(), nullable=False),
        pa.field("num_own_place", pa.int32(), nullable=False),
    ]
)
"""One row a sequence, in ascending order of its number.

``ref_ids``, ``overlaps`` and ``similarities`` have an entry for each 64 tokens that are read, and in it one for each
reference they may read, best first. An overlap is the leak rule's, or where it need not be known exactly, a number it
does not exceed (:func:`schemas.overlap.bound_overlap`). ``num_leaking`` and ``num_own_place`` count what was retrieved
for some chunk but may not be read: because it gives the sequence away, or because it stands in the sequence (by the
strict rules of :mod:`pipelines.candidates`, anywhere in one of its documents).
"""


def count_chunks(num_tokens: int) -> int:
    """Returns the number of chunks of a sequence, whose last token is not read."""
    return -(-(num_tokens - 1) // CHUNK_TOKENS)


def write_sequences(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Writes sequences as one Parquet file, a block a row group, atomically and with equal bytes for equal rows."""
    with (
        replace_atomically(path) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=False, store_schema=True, write_page_checksum=True
        ) as writer,
    ):
        for table in rebatch(tables, SEQUENCES_PER_BLOCK):
            writer.write_table(table.cast(schema), row_group_size=SEQUENCES_PER_BLOCK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """A file of a dataset.

    Attributes:
        path: its place below the folder.
        num_rows: sequences, or references, in it.
        size_bytes: its size.
        sha256: digest of its bytes.
    """

    path: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankSource:
    """The version of a bank that references were retrieved from.

    Attributes:
        url: where it was.
        version: its number.
        fingerprint: digest of what determines its memories.
        embedder_id: what its references were embedded by.
    """

    url: str
    version: int
    fingerprint: str
    embedder_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """What a folder of training sequences is.

    Attributes:
        prepare_id: id of what it was made of and how; equal ids give equal sequences.
        tokenizer_id: whose tokens these are.
        bos_token_id: the token each document begins with.
        eos_token_id: the token each document ends with.
        sequence_tokens: tokens of a sequence that are read, at most.
        max_overlap: the leak rule's bound, which holds for what the loader adds too.
        bank: where references were retrieved; None if they were not.
        settings: how it was made.
        counts: documents read, kept and dropped, sequences, tokens, chunks, and what these retrieved but may not read.
        shards: the files of sequences, in order.
        references: the file of references; None without a bank.
    """

    prepare_id: str
    tokenizer_id: str
    bos_token_id: int
    eos_token_id: int
    sequence_tokens: int
    max_overlap: float
    bank: BankSource | None
    settings: dict[str, Any]
    counts: dict[str, Any]
    shards: tuple[DatasetFile, ...]
    references: DatasetFile | None

    @property
    def num_sequences(self) -> int:
        """Sequences of all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def dataset_id(self) -> str:
        """Id of the content: equal ids have equal sequences, and equal references for them."""
        files = [*self.shards, *([self.references] if self.references else [])]
        return hash_json([SEQUENCES_FORMAT, self.bos_token_id, self.max_overlap, [file.sha256 for file in files]])

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"format_version": SEQUENCES_FORMAT, **values}


def write_manifest(folder: Path, manifest: DatasetManifest) -> None:
    """Writes ``dataset.json``, which makes the folder a dataset."""
    write_bytes_atomically(folder / MANIFEST_NAME, json.dumps(manifest.to_json(), indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> DatasetManifest:
    """Reads ``dataset.json``.

    Raises:
        DatasetFormatError: there is none, it is damaged, or it is of a version this release does not know.
    """
    path = folder / MANIFEST_NAME
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DatasetFormatError(
            f"{folder} holds no finished training sequences: there is no {MANIFEST_NAME}; make them with: "
            f"memory3 train prepare --corpus PATH --out {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetFormatError(f"{path} is damaged: {error}; restore it or prepare the sequences again") from error
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != SEQUENCES_FORMAT:
        raise DatasetFormatError(
            f"{path} is of format version {found}, this release reads {SEQUENCES_FORMAT}; prepare the sequences again"
        )
    del values["format_version"]
    try:
        values["shards"] = tuple(DatasetFile(**shard) for shard in values["shards"])
        values["references"] = DatasetFile(**values["references"]) if values["references"] else None
        values["bank"] = BankSource(**values["bank"]) if values["bank"] else None
        return DatasetManifest(**values)
    except (KeyError, TypeError) as error:
        raise DatasetFormatError(f"{path} is damaged: {error}; restore it or prepare the sequences again") from error
