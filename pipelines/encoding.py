"""The stages from live references to embeddings and memories: each a linear job over files of a workspace.

    references without duplicates -> unembedded -> embeddings -> index
                                  -> unwritten  -> payload shards

Only what the base does not have is embedded and encoded; what was live in an earlier version and is so again, is there
still. Models come as picklable factories and are loaded once a process.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.reusing import Base, filter_new, read_ids
from pipelines.running import EngineConfig, Unit, load_once, run_units
from pipelines.workspace import Workspace, read_tables
from schemas.protocols import EmbedderFactory, WriterFactory
from schemas.shards import write_shard
from schemas.tables import CONTAMINATED, DUPLICATES, embeddings_schema, rebatch, write_table


def iterate_live(work: Workspace, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yields the references that are neither near-duplicates nor contaminated, by ascending id, a file at a time."""
    duplicates = read_tables([work.duplicates_path], ["ref_id"], DUPLICATES)
    contaminated = read_tables(work.list_files("contaminated"), ["ref_id"], CONTAMINATED)
    dropped = pa.concat_tables([duplicates, contaminated])["ref_id"].combine_chunks()
    for path in work.list_files("references"):
        references = pq.read_table(path, columns=columns)
        yield references.filter(pc.invert(pc.is_in(references["ref_id"], value_set=dropped)))


def _split(tables: Iterator[pa.Table], columns: list[str], known: pa.Array, num_rows: int, folder: Path) -> int:
    """Writes columns of the references that are not known, ``num_rows`` a file; returns their number."""
    num_new = 0
    new = (filter_new(table, known).select(columns) for table in tables)
    for part, rows in enumerate(rebatch(new, num_rows)):
        num_new += len(rows)
        target = folder / f"{part:06d}.parquet"
        if not target.exists():
            write_table(rows, target)
    return num_new


def split_unembedded(work: Workspace, base: Base, references_per_shard: int) -> int:
    """Writes the live references without an embedding, and returns their number."""
    folder = work.get_folder("unembedded")
    return _split(iterate_live(work), ["ref_id", "text"], read_ids(base.embeddings), references_per_shard, folder)


def split_unwritten(work: Workspace, base: Base, references_per_shard: int) -> int:
    """Writes the live references without a memory in files of one shard each, and returns their number."""
    folder = work.get_folder("unwritten")
    return _split(iterate_live(work), ["ref_id", "token_ids"], read_ids(base.memories), references_per_shard, folder)


def split_by_use(
    work: Workspace, base: Base, uses: pa.Table, references_per_shard: int, limit: int | None
) -> tuple[int, int]:
    """Writes the live references without a memory as :func:`split_unwritten`, but the most used first.

    Args:
        work: has the gathered references.
        base: its memories are there already.
        uses: ``ref_id`` and ``count``; a reference that is not in it was never used.
        references_per_shard: references in a file.
        limit: references at most; None for all.

    Returns:
        The number of references written, and of those that the limit left out.
    """
    known, parts = read_ids(base.memories), []
    for table in iterate_live(work, ["ref_id", "token_ids"]):
        parts.append(filter_new(table, known))
    new = pa.concat_tables(parts).combine_chunks()
    places = pc.index_in(new["ref_id"], value_set=uses["ref_id"].combine_chunks())
    counts = uses["count"].combine_chunks().take(places.combine_chunks()).fill_null(0)
    order = pc.sort_indices(
        pa.table({"count": counts, "ref_id": new["ref_id"]}), [("count", "descending"), ("ref_id", "ascending")]
    )
    chosen = new.take(order[:limit] if limit is not None else order)
    for part, rows in enumerate(rebatch([chosen], references_per_shard)):
        target = work.get_folder("unwritten") / f"{part:06d}.parquet"
        if not target.exists():
            write_table(rows, target)
    return len(chosen), len(new) - len(chosen)


def count_live(work: Workspace) -> int:
    """Returns the number of live references."""
    return sum(len(table) for table in iterate_live(work, ["ref_id"]))


def _embed_references(unit: Unit, factory: EmbedderFactory) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "text"])
    embedder = load_once(factory)
    vectors = embedder.embed(references["text"].to_pylist())
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension)
    schema = embeddings_schema(embedder.dimension)
    write_table(pa.table({"ref_id": references["ref_id"], "vector": values}).cast(schema), unit.target)


def embed_references(work: Workspace, factory: EmbedderFactory, engine: EngineConfig) -> None:
    """Embeds the references of :func:`split_unembedded`."""
    folder = work.get_folder("embeddings")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("unembedded")]
    run_units("embed", units, functools.partial(_embed_references, factory=factory), engine)


def _write_memories(unit: Unit, factory: WriterFactory) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "token_ids"])
    tokens = references["token_ids"].combine_chunks()
    values, ends = tokens.flatten().to_numpy(), np.cumsum(tokens.value_lengths())
    writer = load_once(factory)
    written = writer.write(np.split(values, ends[:-1]))
    records = writer.layout.pack(written.payload, written.offsets, references["ref_id"].to_pylist())
    write_shard(unit.target, records, writer.layout, writer.fingerprint.digest)


def write_memories(work: Workspace, factory: WriterFactory, engine: EngineConfig) -> None:
    """Encodes the references of :func:`split_unwritten` into explicit memories, one payload shard a file."""
    folder = work.get_folder("shards")
    units = [
        Unit(source=path, target=folder / f"shard-{path.stem}.safetensors") for path in work.list_files("unwritten")
    ]
    run_units("write", units, functools.partial(_write_memories, factory=factory), engine)
