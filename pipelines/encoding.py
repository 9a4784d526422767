"""The stages from live references to embeddings and memories: each a linear job over files of a workspace.

    references without duplicates -> live -> embeddings -> index
                                     live -> payload shards

Models come as picklable factories and are loaded once a process.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.running import EngineConfig, Unit, load_once, run_units
from pipelines.workspace import Workspace, read_tables
from schemas.protocols import EmbedderFactory, WriterFactory
from schemas.shards import write_shard
from schemas.tables import CONTAMINATED, DUPLICATES, embeddings_schema, rebatch, write_table


def iterate_live(work: Workspace) -> Iterator[pa.Table]:
    """Yields the references that are neither near-duplicates nor contaminated, by ascending id, a file at a time."""
    duplicates = read_tables([work.duplicates_path], ["ref_id"], DUPLICATES)
    contaminated = read_tables(work.list_files("contaminated"), ["ref_id"], CONTAMINATED)
    dropped = pa.concat_tables([duplicates, contaminated])["ref_id"].combine_chunks()
    for path in work.list_files("references"):
        references = pq.read_table(path)
        yield references.filter(pc.invert(pc.is_in(references["ref_id"], value_set=dropped)))


def split_live(work: Workspace, references_per_shard: int) -> int:
    """Writes the live references in files of one shard each, and returns their number."""
    num_live = 0
    for part, live in enumerate(rebatch(iterate_live(work), references_per_shard)):
        num_live += len(live)
        target = work.get_folder("live") / f"{part:06d}.parquet"
        if not target.exists():
            write_table(live, target)
    return num_live


def _embed_references(unit: Unit, factory: EmbedderFactory) -> None:
    references = pq.read_table(unit.source, columns=["ref_id", "text"])
    embedder = load_once(factory)
    vectors = embedder.embed(references["text"].to_pylist())
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), embedder.dimension)
    schema = embeddings_schema(embedder.dimension)
    write_table(pa.table({"ref_id": references["ref_id"], "vector": values}).cast(schema), unit.target)


def embed_references(work: Workspace, factory: EmbedderFactory, engine: EngineConfig) -> None:
    """Embeds the live references."""
    folder = work.get_folder("embeddings")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("live")]
    run_units("embed", units, functools.partial(_embed_references, factory=factory), engine)


def _write_memories(unit: Unit, factory: WriterFactory) -> None:
    tokens = pq.read_table(unit.source, columns=["token_ids"])["token_ids"].combine_chunks()
    values, ends = tokens.flatten().to_numpy(), np.cumsum(tokens.value_lengths())
    writer = load_once(factory)
    written = writer.write(np.split(values, ends[:-1]))
    records = writer.layout.pack(written.payload, written.offsets)
    write_shard(unit.target, records, writer.layout, writer.fingerprint.digest)


def write_memories(work: Workspace, factory: WriterFactory, engine: EngineConfig) -> None:
    """Encodes the live references into explicit memories, one payload shard a file."""
    folder = work.get_folder("shards")
    units = [Unit(source=path, target=folder / f"shard-{path.stem}.safetensors") for path in work.list_files("live")]
    run_units("write", units, functools.partial(_write_memories, factory=factory), engine)
