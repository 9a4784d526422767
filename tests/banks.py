"""A small real bank for the tests of model/: real text, written and joined by the functions that builds use."""

import dataclasses
import functools
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa

from model.embedding import load_embedder
from model.tokenizing import CheckpointTokenizer
from model.writing import ReferenceWriter
from pipelines.assembling import hash_file, publish_segment, write_embedding_tables, write_memory_table
from pipelines.indexing import write_index
from pipelines.workspace import Workspace
from schemas.bank import PARTED_KINDS, Bank
from schemas.identifiers import hash_json, make_ref_id
from schemas.manifest import FileEntry, Manifest, commit_manifest, list_versions
from schemas.protocols import Embedder, Fingerprint, FloatArray, IntArray
from schemas.records import RecordLayout
from schemas.shards import write_shard
from schemas.stores import open_store
from schemas.tables import CONTAMINATED, DUPLICATES, REFERENCES, TOMBSTONES, embeddings_schema, write_table

REFERENCES_PER_SHARD = 16

LENGTHS = (128, 40, 97, 24, 5, 60)
"""Tokens of the references, in turn; 5 leaves slots of a memory empty."""


@functools.cache
def get_embedder() -> Embedder:
    """Returns the embedder of every bank made here, loaded once."""
    return load_embedder("static")


def make_references(tokenizer: CheckpointTokenizer, num_references: int) -> pa.Table:
    """Returns rows of the table ``references``: the beginnings of language reference topics, sorted by id."""
    encoded = tokenizer.encode([topics[name][:600] for name in sorted(topics)])
    rows: dict[str, tuple[str, str, list[int], int]] = {}
    for place, tokens in enumerate(encoded):
        tokens = tokens[: LENGTHS[place % len(LENGTHS)]]
        ref_id = make_ref_id(tokens, tokenizer.tokenizer_id)
        rows[ref_id] = (ref_id, tokenizer.decode(tokens), tokens.tolist(), len(tokens))
        if len(rows) == num_references:
            break
    assert len(rows) == num_references
    columns = zip(*sorted(rows.values()), strict=True)
    return pa.table(dict(zip(REFERENCES.names, map(list, columns), strict=True)), schema=REFERENCES)


def list_tokens(references: pa.Table) -> list[IntArray]:
    """Returns the token ids of references as a writer takes them."""
    return [np.asarray(tokens, dtype=np.int32) for tokens in references["token_ids"].to_pylist()]


def write_segment(work: Workspace, writer: ReferenceWriter, references: pa.Table, *, with_memories: bool) -> str:
    """Writes the parted tables of references, their index and their shards; returns the kind of the index."""
    write_table(references, work.get_folder("segment") / "references.parquet")
    embedder = get_embedder()
    vectors = embedder.embed(references["text"].to_pylist())
    columns = {
        "ref_id": references["ref_id"],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension),
    }
    embeddings = pa.table(columns).cast(embeddings_schema(embedder.dimension))
    write_table(embeddings, work.get_folder("embeddings") / "000000.parquet")
    if with_memories:
        for part, start in enumerate(range(0, len(references), REFERENCES_PER_SHARD)):
            rows = references.slice(start, REFERENCES_PER_SHARD)
            write_table(rows, work.get_folder("unwritten") / f"{part:06d}.parquet")
            written = writer.write(list_tokens(rows))
            records = writer.layout.pack(written.payload, written.offsets, rows["ref_id"].to_pylist())
            target = work.get_folder("shards") / f"shard-{part:06d}.safetensors"
            write_shard(target, records, writer.layout, writer.fingerprint.digest)
        write_memory_table(work)
    return write_embedding_tables(work)


def open_work(folder: Path) -> Workspace:
    """Makes the workspace of the next version of a bank."""
    work = Workspace(folder / "work" / f"version-{len(list_versions(folder)) + 1}")
    work.create()
    return work


def commit(
    folder: Path, writer: ReferenceWriter, files: list[FileEntry], counts: dict[str, object], cold: bool
) -> Bank:
    """Commits files as the next version and opens it."""
    versions = list_versions(folder)
    manifest = Manifest(
        version=len(versions) + 1,
        parent=versions[-1] if versions else None,
        operation="update" if versions else "build",
        created_at="2024-07-01T00:00:00+00:00",
        config={},
        build_id=hash_json([len(versions), [file.sha256 for file in files], cold]),
        files=files,
        counts=counts,
        seconds={},
        fingerprint=writer.fingerprint,
        embedder_id=get_embedder().embedder_id,
        layout=writer.layout,
        cold=cold,
    )
    commit_manifest(folder, manifest)
    shutil.rmtree(folder / "work")
    return Bank.open(folder)


def make_bank(folder: Path, writer: ReferenceWriter, *, num_references: int = 40, cold: bool = False) -> Bank:
    """Writes the next version of a bank, all of it anew in one segment, and opens it.

    Args:
        folder: the bank's folder.
        writer: the model that writes the memories, and whose tokenizer makes the references.
        num_references: references in the bank, all of them live.
        cold: leave the memories out.
    """
    work = open_work(folder)
    references = make_references(writer.checkpoint.tokenizer, num_references)
    index = write_segment(work, writer, references, with_memories=not cold)
    counts = {"references": {"read": num_references, "kept": num_references, "dropped": {}}, "index": index}
    return commit(folder, writer, publish_segment(work, open_store(folder)), counts, cold)


def extend_bank(
    bank: Bank,
    writer: ReferenceWriter,
    *,
    num_new: int = 0,
    deleted: Collection[str] = (),
    duplicates: Mapping[str, str] | None = None,
    with_memories: bool = True,
    cold: bool = False,
) -> Bank:
    """Commits a version with the segments of another and one more, and opens it.

    Args:
        bank: the newest version of a bank of :func:`make_bank`.
        writer: the model that writes the memories.
        num_new: references of the new segment: those that follow in :func:`make_references`.
        deleted: ids of references that stand in no document of the new version, in all.
        duplicates: ids of references that are near-duplicates, in all, and of those kept for them.
        with_memories: False leaves the memories of the new references out.
        cold: whether memories that are not stored are to be encoded.
    """
    folder = Path(bank.url)
    known = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    work = open_work(folder)
    index = ""
    if num_new:
        references = make_references(writer.checkpoint.tokenizer, len(known) + num_new)
        is_new = [ref_id not in known for ref_id in references["ref_id"].to_pylist()]
        index = write_segment(work, writer, references.filter(pa.array(is_new)), with_memories=with_memories)
    if deleted:
        write_table(pa.table([sorted(deleted)], schema=TOMBSTONES), work.get_folder("segment") / "tombstones.parquet")
    if duplicates:
        rows = [(ref_id, kept, 0.9, kept, 0.9, kept) for ref_id, kept in sorted(duplicates.items())]
        table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=DUPLICATES)
        write_table(table, work.get_folder("segment") / "duplicates.parquet")
    added = publish_segment(work, open_store(folder))
    kept_files = [file for file in bank.manifest.files if file.kind in PARTED_KINDS]
    num_live = len(known) + num_new - len({*deleted, *(duplicates or {})})
    counts = {"references": {"read": num_live, "kept": num_live, "dropped": {}}, "index": index}
    return commit(folder, writer, [*kept_files, *added], counts, cold)


def describe_file(bank: Path, kind: str, path: Path, num_rows: int) -> FileEntry:
    """Returns what a manifest says of a file that is in the bank's folder."""
    name = path.relative_to(bank).as_posix()
    return FileEntry(kind=kind, path=name, size_bytes=path.stat().st_size, sha256=hash_file(path), num_rows=num_rows)


def make_vector_segment(
    folder: Path, name: str, ref_ids: Sequence[str], vectors: FloatArray, factory: str | None = None
) -> list[FileEntry]:
    """Writes embeddings, rows ascending by id, and an index over them as a segment."""
    segment = folder / "segments" / name
    segment.mkdir(parents=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table([list(ref_ids), column], schema=embeddings_schema(vectors.shape[1]))
    write_table(table, segment / "embeddings.parquet")
    write_index(vectors, segment / "index.faiss", factory)
    files = {"embeddings": segment / "embeddings.parquet", "index": segment / "index.faiss"}
    return [describe_file(folder, kind, path, len(ref_ids)) for kind, path in files.items()]


def make_dropping_table(folder: Path, kind: str, ref_ids: Collection[str]) -> list[FileEntry]:
    """Writes the table of one kind of references that are not live, as a segment; none if there are none."""
    if not ref_ids:
        return []
    path = folder / "segments" / f"dropped-{kind}" / f"{kind}.parquet"
    path.parent.mkdir(parents=True)
    rows = sorted(ref_ids)
    values = {"ref_id": rows, "kept_ref_id": rows, "matched_ref_id": rows, "cluster": rows, "matched_doc_id": rows}
    schema = {"tombstones": TOMBSTONES, "duplicates": DUPLICATES, "contaminated": CONTAMINATED}[kind]
    columns = [values.get(name, [0.9] * len(rows)) for name in schema.names]
    write_table(pa.table(columns, schema=schema), path)
    return [describe_file(folder, kind, path, len(rows))]


def open_vector_bank(folder: Path, files: list[FileEntry]) -> Bank:
    """Opens files as a version of a bank of which nothing but the search is used."""
    nothing: dict[str, object] = {}
    fingerprint = Fingerprint(
        weights="",
        tokenizer="",
        architecture=nothing,
        rope=nothing,
        prefix_token_ids=[],
        memory_layers=[],
        selection=nothing,
        compute_dtype="",
        storage=nothing,
    )
    manifest = Manifest(
        version=1,
        parent=None,
        operation="build",
        created_at="",
        config={},
        build_id="",
        files=files,
        counts={},
        seconds={},
        fingerprint=fingerprint,
        embedder_id=get_embedder().embedder_id,
        layout=RecordLayout(num_layers=1, num_kv_heads=1, num_slots=1, head_dim=1),
        cold=True,
    )
    return Bank(folder, manifest)


def change_manifest(bank: Bank, **changes: object) -> Bank:
    """Returns the same files opened with another manifest, as a tampered or mixed-up bank would be."""
    return Bank(bank.store, dataclasses.replace(bank.manifest, **changes))
