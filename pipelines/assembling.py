"""The last step of every operation that makes a version: the files of all stages joined to one segment of the bank.

A segment is a folder of tables, payload shards and an index, named by a hash of its contents, so that equal input gives
an equal name. It is made inside the workspace and moved into the bank; it becomes part of the bank only when a manifest
that lists it is committed. Of the parted kinds it holds only what the base does not have. The parameters of a trained
codec are a segment of their own, so that all versions with this codec name the same file.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.indexing import write_index
from pipelines.reusing import Base, filter_new, read_ids
from pipelines.workspace import Workspace, list_finished, read_columns, read_tables
from schemas.atomic import replace_atomically
from schemas.bank import SEGMENTS_FOLDER
from schemas.errors import BankError, BankFormatError
from schemas.identifiers import hash_json
from schemas.manifest import CODEC_KIND, FileEntry
from schemas.shards import ShardReader
from schemas.stores import BankStore
from schemas.tables import (
    CONTAMINATED,
    DUPLICATES,
    REFERENCES,
    TOMBSTONES,
    memories_schema,
    signatures_schema,
    write_table,
    write_tables,
)

EXACT_DUPLICATE = "exact_duplicate"
NEAR_DUPLICATE = "near_duplicate"
CONTAMINATED_REFERENCE = "contaminated"

CODEC_NAME = "codec.safetensors"


def begin_segment(work: Workspace) -> None:
    """Makes the segment of the tables of documents alone, whatever an interrupted run has left there."""
    segment = work.get_folder("segment")
    shutil.rmtree(segment)
    work.create()
    for path in work.list_files("tables"):
        os.link(path, segment / path.name)


def _write_new(tables: Iterator[pa.Table], schema: pa.Schema, target: Path) -> None:
    """Writes a parted table; none if it has no row."""
    if not write_tables(tables, schema, target):
        target.unlink()


def write_reference_tables(work: Workspace, base: Base) -> dict[str, Any]:
    """Writes what is known of references; returns the counts of them."""
    segment = work.get_folder("segment")
    files = work.list_files("references")
    gathered = (pq.read_table(path) for path in files)
    if base.references:
        gathered = (table.filter(pc.invert(table["is_stored"])) for table in gathered)
    new = (table.select(REFERENCES.names) for table in gathered)
    _write_new(new, REFERENCES, segment / "references.parquet")

    duplicates = pq.read_table(work.duplicates_path)
    write_table(duplicates.cast(DUPLICATES), segment / "duplicates.parquet")
    contaminated = read_tables(work.list_files("contaminated"), CONTAMINATED.names, CONTAMINATED)
    if work.list_files("contaminated"):
        write_table(contaminated.sort_by("ref_id"), segment / "contaminated.parquet")
    _write_new_signatures(work, base, segment / "signatures.parquet")

    current = read_tables(files, ["ref_id", "num_tokens"], REFERENCES)
    stored = pa.table({"ref_id": read_ids(base.references)})
    gone = filter_new(stored, current["ref_id"].combine_chunks()).sort_by("ref_id")
    _write_new(iter([gone.cast(TOMBSTONES)]), TOMBSTONES, segment / "tombstones.parquet")

    num_read = pq.read_metadata(segment / "occurrences.parquet").num_rows
    dropped = {
        CONTAMINATED_REFERENCE: len(contaminated),
        EXACT_DUPLICATE: num_read - len(current),
        NEAR_DUPLICATE: len(duplicates),
    }
    return {
        "read": num_read,
        "kept": num_read - sum(dropped.values()),
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "tokens": int(pc.sum(current["num_tokens"]).as_py() or 0),
    }


def _write_new_signatures(work: Workspace, base: Base, target: Path) -> None:
    """Writes the signatures that the base does not have; the parts are in the order of ids."""
    files = list_finished(work.get_folder("compared") / "signed")
    if not files:
        return
    known = read_ids(base.signatures)
    columns = ["id", "signature", "sequence_key", "num_shingles"]
    schema = signatures_schema("ref_id", read_columns(files[0], columns).schema.field("signature").type.list_size)
    tables = (read_columns(path, columns).rename_columns(schema.names) for path in files)
    _write_new((filter_new(table, known) for table in tables), schema, target)


def write_embedding_tables(work: Workspace) -> str:
    """Writes ``embeddings`` and the index over them; returns FAISS's description of the index, "" if there is none."""
    segment = work.get_folder("segment")
    files = work.list_files("embeddings")
    if not files:
        return ""
    embeddings = pa.concat_tables([pq.read_table(path) for path in files]).combine_chunks()
    write_table(embeddings, segment / "embeddings.parquet")
    vectors = embeddings["vector"].combine_chunks()
    return write_index(vectors.flatten().to_numpy().reshape(len(vectors), -1), segment / "index.faiss")


def write_memory_table(work: Workspace) -> None:
    """Writes ``memories``, read off the shards, and puts the shards beside it; nothing if there are none."""
    shards, written = work.list_files("shards"), work.list_files("unwritten")
    if not shards:
        return
    segment = work.get_folder("segment")
    tables = []
    for shard_path, written_path in zip(shards, written, strict=True):
        target = segment / shard_path.name
        if not target.exists():
            os.link(shard_path, target)
        with ShardReader(shard_path) as shard:
            _, offsets = shard.layout.unpack(shard.read(range(shard.num_records)))
            num_offsets = shard.layout.num_offsets
        columns = {
            "ref_id": pq.read_table(written_path, columns=["ref_id"])["ref_id"].combine_chunks(),
            "shard": pa.array([shard_path.name] * len(offsets), pa.string()),
            "row": pa.array(np.arange(len(offsets), dtype=np.int32)),
            "offsets": pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(offsets).ravel()), num_offsets),
        }
        tables.append(pa.table(columns).cast(memories_schema(num_offsets)))
    # Written in the order of use, where that matters; found by id.
    write_table(pa.concat_tables(tables).sort_by("ref_id"), segment / "memories.parquet")


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        kind, num_rows = path.stem, pq.read_metadata(path).num_rows
    elif path.suffix == ".faiss":
        kind, num_rows = "index", pq.read_metadata(path.with_name("embeddings.parquet")).num_rows
    elif path.name == CODEC_NAME:
        kind, num_rows = CODEC_KIND, 0
    else:
        with ShardReader(path) as shard:
            kind, num_rows = "shard", shard.num_records
    return {"kind": kind, "size_bytes": path.stat().st_size, "sha256": hash_file(path), "num_rows": num_rows}


def _holds(store: BankStore, name: str, described: dict[str, dict[str, Any]]) -> bool:
    """Tells whether a segment that is there already has the very files."""
    if any(store.get_size(f"{name}/{file}") != entry["size_bytes"] for file, entry in described.items()):
        return False
    try:
        return all(
            hash_file(store.localize(f"{name}/{file}", entry["sha256"])) == entry["sha256"]
            for file, entry in described.items()
        )
    except BankFormatError:  # a remote store finds it out by itself
        return False


def publish_segment(work: Workspace, store: BankStore) -> list[FileEntry]:
    """Moves the segment into the bank under a name made of its contents; returns its files, sorted by path."""
    return _publish(work.get_folder("segment"), store)


def copy_codec(work: Workspace, codec_file: Path) -> Path:
    """Copies the file of a trained codec into the workspace, for :func:`publish_codec`; returns the copy."""
    target = work.get_folder("codec") / CODEC_NAME
    target.parent.mkdir(exist_ok=True)
    with replace_atomically(target) as temporary:
        shutil.copyfile(codec_file, temporary)
    return target


def publish_codec(work: Workspace, store: BankStore) -> list[FileEntry]:
    """Moves the copy of :func:`copy_codec` into the bank, in a segment of its own; returns it as a list of one."""
    return _publish(work.get_folder("codec"), store)


def _publish(segment: Path, store: BankStore) -> list[FileEntry]:
    described = {path.name: _describe_file(path) for path in list_finished(segment)}
    if not described:  # a second try after a move that failed halfway: a version without its files would be committed
        raise BankError(f"{segment} has no files to publish; nothing was committed: run the same command again")
    content = hash_json({file: entry["sha256"] for file, entry in described.items()})
    name = f"{SEGMENTS_FOLDER}/{content}"
    # An earlier version may have the very same files. If they were damaged since: these are the bytes it promises.
    if not _holds(store, name, described):
        store.publish(segment, name)
    return [FileEntry(path=f"{name}/{file}", **entry) for file, entry in described.items()]
