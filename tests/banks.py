"""A small real bank for the tests of model/: real text, written and joined by the functions that builds use."""

import dataclasses
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa

from model.embedding import load_embedder
from model.tokenizing import CheckpointTokenizer
from model.writing import ReferenceWriter
from pipelines.assembling import publish_segment, write_embedding_tables, write_memory_table
from pipelines.workspace import Workspace
from schemas.bank import Bank
from schemas.identifiers import hash_json, make_ref_id
from schemas.manifest import Manifest, commit_manifest, list_versions
from schemas.protocols import IntArray
from schemas.shards import write_shard
from schemas.tables import REFERENCES, embeddings_schema, write_table

REFERENCES_PER_SHARD = 16

LENGTHS = (128, 40, 97, 24, 5, 60)
"""Tokens of the references, in turn; 5 leaves slots of a memory empty."""


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


def make_bank(folder: Path, writer: ReferenceWriter, *, num_references: int = 40, cold: bool = False) -> Bank:
    """Writes the next version of a bank and opens it.

    Args:
        folder: the bank's folder.
        writer: the model that writes the memories, and whose tokenizer makes the references.
        num_references: references in the bank, all of them live.
        cold: leave the memories out.
    """
    versions = list_versions(folder)
    work = Workspace(folder / "work" / f"version-{len(versions) + 1}")
    work.create()
    references = make_references(writer.checkpoint.tokenizer, num_references)
    write_table(references, work.get_folder("segment") / "references.parquet")

    embedder = load_embedder("static")
    vectors = embedder.embed(references["text"].to_pylist())
    columns = {
        "ref_id": references["ref_id"],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension),
    }
    embeddings = pa.table(columns).cast(embeddings_schema(embedder.dimension))
    write_table(embeddings, work.get_folder("embeddings") / "000000.parquet")
    index = write_embedding_tables(work)

    if not cold:
        for part, start in enumerate(range(0, num_references, REFERENCES_PER_SHARD)):
            live = references.slice(start, REFERENCES_PER_SHARD)
            write_table(live, work.get_folder("live") / f"{part:06d}.parquet")
            written = writer.write(list_tokens(live))
            records = writer.layout.pack(written.payload, written.offsets)
            target = work.get_folder("shards") / f"shard-{part:06d}.safetensors"
            write_shard(target, records, writer.layout, writer.fingerprint.digest)
        write_memory_table(work)

    counts = {"read": num_references, "kept": num_references, "dropped": {}}
    manifest = Manifest(
        version=len(versions) + 1,
        parent=versions[-1] if versions else None,
        operation="build",
        created_at="2024-07-01T00:00:00+00:00",
        config={},
        build_id=hash_json([len(versions), num_references, cold]),
        files=publish_segment(work, folder),
        counts={"references": counts, "index": index},
        seconds={},
        fingerprint=writer.fingerprint,
        embedder_id=embedder.embedder_id,
        layout=writer.layout,
        cold=cold,
    )
    commit_manifest(folder, manifest)
    shutil.rmtree(folder / "work")
    return Bank.open(folder)


def change_manifest(bank: Bank, **changes: object) -> Bank:
    """Returns the same files opened with another manifest, as a tampered or mixed-up bank would be."""
    return Bank(bank.path, dataclasses.replace(bank.manifest, **changes))
