"""The last step of a build: the files of all stages joined to one segment of the bank.

A segment is a folder of tables, payload shards and an index, named by a hash of its contents, so that equal input gives
an equal name. It is made inside the workspace and renamed into the bank; it becomes part of the bank only when a
manifest that lists it is committed.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.indexing import write_index
from pipelines.jobs import read_chunks, read_drops, select_kept
from pipelines.records import RECORDS
from pipelines.workspace import Workspace, list_finished, read_columns, read_tables
from schemas.atomic import sync_folder
from schemas.bank import SEGMENTS_FOLDER
from schemas.identifiers import hash_json
from schemas.manifest import FileEntry
from schemas.shards import ShardReader
from schemas.tables import (
    CONTAMINATED,
    DOCUMENT_DUPLICATES,
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    memories_schema,
    signatures_schema,
    write_table,
    write_tables,
)

EXACT_DUPLICATE = "exact_duplicate"
NEAR_DUPLICATE = "near_duplicate"
CONTAMINATED_REFERENCE = "contaminated"


def _count(values: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(values).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: entry["values"])}


def begin_segment(work: Workspace) -> None:
    """Empties the segment's folder of what an interrupted run has left there."""
    shutil.rmtree(work.get_folder("segment"))
    work.create()


def write_document_tables(work: Workspace) -> dict[str, Any]:
    """Writes ``documents``, ``rejects``, ``occurrences`` and what compares documents; returns the counts of documents.

    Record files are read without their text.
    """
    segment = work.get_folder("segment")
    columns = [name for name in RECORDS.names if name not in ("text", "title")]
    records = _widen(read_tables(work.list_files("records"), columns, RECORDS))
    drops = _widen(read_drops(work))

    occurrences = _widen(read_chunks(work, OCCURRENCES.names))
    occurrences = occurrences.sort_by([("doc_id", "ascending"), ("ordinal", "ascending")])
    write_tables([occurrences], OCCURRENCES, segment / "occurrences.parquet")

    kept = select_kept(records, drops).sort_by("doc_id")
    per_document = occurrences.group_by("doc_id").aggregate([("ordinal", "count")]).sort_by("doc_id")
    places = pc.index_in(kept["doc_id"], value_set=per_document["doc_id"].combine_chunks())
    num_references = per_document["ordinal_count"].combine_chunks().take(places.combine_chunks()).fill_null(0)
    documents = kept.append_column("num_references", num_references.cast(pa.int32()))
    write_tables([documents.select(DOCUMENTS.names)], DOCUMENTS, segment / "documents.parquet")

    rejected = records.filter(pc.is_valid(records["reason"])).select(REJECTS.names)
    rejects = pa.concat_tables([rejected, drops.cast(rejected.schema)])
    rejects = rejects.sort_by([("path", "ascending"), ("position", "ascending"), ("reason", "ascending")])
    write_tables([rejects], REJECTS, segment / "rejects.parquet")

    if work.document_duplicates_path.exists():
        document_duplicates = pq.read_table(work.document_duplicates_path)
        write_table(document_duplicates.cast(DOCUMENT_DUPLICATES), segment / "document_duplicates.parquet")
        _write_signatures(
            work.get_folder("documents"), "doc_id", segment / "document_signatures.parquet", ordered=False
        )
    return {"read": len(records), "kept": len(documents), "dropped": _count(rejects["reason"])}


def _widen(table: pa.Table) -> pa.Table:
    """Returns a table whose strings may be more than 2 GiB in a column, as sorting joins its chunks."""
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    return table.cast(pa.schema(fields))


def _write_signatures(compared: Path, id_column: str, target: Path, *, ordered: bool) -> None:
    """Writes the signatures of compared texts, by ascending id; ``ordered``: the files are in that order already."""
    tables = [read_columns(path, ["id", "signature"]) for path in list_finished(compared / "signed")]
    schema = signatures_schema(id_column, tables[0].schema.field("signature").type.list_size)
    if not ordered:
        tables = [pa.concat_tables(tables).sort_by("id")]
    write_tables((table.rename_columns(schema.names) for table in tables), schema, target)


def write_reference_tables(work: Workspace) -> dict[str, Any]:
    """Writes ``references``, ``duplicates``, ``contaminated`` and ``signatures``; returns the counts of references."""
    segment = work.get_folder("segment")
    files = work.list_files("references")
    num_tokens = read_tables(files, ["num_tokens"], REFERENCES)["num_tokens"]
    write_tables((pq.read_table(path) for path in files), REFERENCES, segment / "references.parquet")
    duplicates = pq.read_table(work.duplicates_path)
    write_table(duplicates.cast(DUPLICATES), segment / "duplicates.parquet")
    contaminated = read_tables(work.list_files("contaminated"), CONTAMINATED.names, CONTAMINATED)
    if work.list_files("contaminated"):
        write_table(contaminated.sort_by("ref_id"), segment / "contaminated.parquet")
    if list_finished(work.get_folder("compared") / "signed"):
        _write_signatures(work.get_folder("compared"), "ref_id", segment / "signatures.parquet", ordered=True)

    num_read = pq.read_metadata(segment / "occurrences.parquet").num_rows
    dropped = {
        CONTAMINATED_REFERENCE: len(contaminated),
        EXACT_DUPLICATE: num_read - len(num_tokens),
        NEAR_DUPLICATE: len(duplicates),
    }
    return {
        "read": num_read,
        "kept": num_read - sum(dropped.values()),
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "tokens": int(pc.sum(num_tokens).as_py()),
    }


def write_embedding_tables(work: Workspace) -> str:
    """Writes ``embeddings`` and the index over them; returns FAISS's description of the index."""
    segment = work.get_folder("segment")
    embeddings = pa.concat_tables([pq.read_table(path) for path in work.list_files("embeddings")]).combine_chunks()
    write_table(embeddings, segment / "embeddings.parquet")
    vectors = embeddings["vector"].combine_chunks()
    return write_index(vectors.flatten().to_numpy().reshape(len(vectors), -1), segment / "index.faiss")


def write_memory_table(work: Workspace) -> None:
    """Writes ``memories``, read off the shards, and puts the shards beside it; nothing in a cold bank."""
    shards, live = work.list_files("shards"), work.list_files("live")
    if not shards:
        return
    segment = work.get_folder("segment")
    tables = []
    for shard_path, live_path in zip(shards, live, strict=True):
        target = segment / shard_path.name
        if not target.exists():
            os.link(shard_path, target)
        with ShardReader(shard_path) as shard:
            _, offsets = shard.layout.unpack(shard.read(range(shard.num_records)))
            num_offsets = shard.layout.num_offsets
        columns = {
            "ref_id": pq.read_table(live_path, columns=["ref_id"])["ref_id"].combine_chunks(),
            "shard": pa.array([shard_path.name] * len(offsets), pa.string()),
            "row": pa.array(np.arange(len(offsets), dtype=np.int32)),
            "offsets": pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(offsets).ravel()), num_offsets),
        }
        tables.append(pa.table(columns).cast(memories_schema(num_offsets)))
    write_table(pa.concat_tables(tables), segment / "memories.parquet")


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        kind, num_rows = path.stem, pq.read_metadata(path).num_rows
    elif path.suffix == ".faiss":
        kind, num_rows = "index", pq.read_metadata(path.with_name("embeddings.parquet")).num_rows
    else:
        with ShardReader(path) as shard:
            kind, num_rows = "shard", shard.num_records
    return {"kind": kind, "size_bytes": path.stat().st_size, "sha256": hash_file(path), "num_rows": num_rows}


def _holds(folder: Path, described: dict[str, dict[str, Any]]) -> bool:
    return all(
        (folder / name).is_file() and hash_file(folder / name) == entry["sha256"] for name, entry in described.items()
    )


def publish_segment(work: Workspace, bank: Path) -> list[FileEntry]:
    """Moves the segment into the bank under a name made of its contents; returns its files, sorted by path."""
    segment = work.get_folder("segment")
    described = {path.name: _describe_file(path) for path in work.list_files("segment")}
    name = hash_json({file: entry["sha256"] for file, entry in described.items()})
    target = bank / SEGMENTS_FOLDER / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and _holds(target, described):
        shutil.rmtree(segment)  # an earlier version has the very same files
    else:
        if target.exists():
            shutil.rmtree(target)  # damaged since: these are the bytes its manifests promise
        segment.rename(target)
    for folder in (target.parent, bank):
        sync_folder(folder)
    return [FileEntry(path=f"{SEGMENTS_FOLDER}/{name}/{file}", **entry) for file, entry in described.items()]
