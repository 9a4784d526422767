"""Embeddings and memories of a version copied as they are, for operations that rewrite its files.

    unembedded --its rows of the base's embeddings--> embeddings
    unwritten  --its records of the base's shards---> payload shards

The stages are those of :mod:`pipelines.encoding` with copies in place of models.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.encoding import iterate_live
from pipelines.reusing import read_ids
from pipelines.running import EngineConfig, Unit, run_units
from pipelines.workspace import Workspace
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.shards import ShardReader, write_shard
from schemas.tables import rebatch, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredMemories:
    """The memories of one segment.

    Attributes:
        table: its table of memories.
        shards: its shards by the names in the table.
    """

    table: Path
    shards: dict[str, Path]


def list_stored_memories(bank: Bank) -> list[StoredMemories]:
    """Locates the memories of a version, segment by segment."""
    shards: dict[str, dict[str, Path]] = {}
    for file in bank.manifest.list_files("shard"):
        segment, _, name = file.path.rpartition("/")
        shards.setdefault(segment, {})[name] = bank.locate(file)
    return [
        StoredMemories(table=bank.locate(file), shards=shards.get(file.path.rpartition("/")[0], {}))
        for file in bank.manifest.list_files("memories")
    ]


def split_live(work: Workspace, bank: Bank, references_per_shard: int) -> None:
    """Writes the live references a version has an embedding for, and those it has a memory for, in files by id."""
    for stage, kind in (("unembedded", "embeddings"), ("unwritten", "memories")):
        known = read_ids(bank.locate_all(kind))
        tables = (table.filter(pc.is_in(table["ref_id"], value_set=known)) for table in iterate_live(work, ["ref_id"]))
        for part, rows in enumerate(rebatch(tables, references_per_shard)):
            write_table(rows, work.get_folder(stage) / f"{part:06d}.parquet")


def _read_rows(path: Path, ref_ids: pa.Array) -> pa.Table:
    """Reads the rows of a table sorted by ``ref_id`` that are among ``ref_ids``, which ascend."""
    bounds = [("ref_id", ">=", ref_ids[0].as_py()), ("ref_id", "<=", ref_ids[-1].as_py())]
    table = pq.read_table(path, filters=bounds)
    return table.filter(pc.is_in(table["ref_id"], value_set=ref_ids))


def _copy_embeddings(unit: Unit, paths: Sequence[Path]) -> None:
    ref_ids = read_ids([unit.source])
    write_table(pa.concat_tables([_read_rows(path, ref_ids) for path in paths]).sort_by("ref_id"), unit.target)


def copy_embeddings(work: Workspace, bank: Bank, engine: EngineConfig) -> None:
    """Copies the embeddings of the references of :func:`split_live`."""
    folder = work.get_folder("embeddings")
    units = [Unit(source=path, target=folder / path.name) for path in work.list_files("unembedded")]
    process = functools.partial(_copy_embeddings, paths=bank.locate_all("embeddings"))
    run_units("copy-embeddings", units, process, engine)


def _copy_memories(unit: Unit, stored: Sequence[StoredMemories], fingerprint: str) -> None:
    ref_ids = read_ids([unit.source])
    records = None
    for memories in stored:
        places = _read_rows(memories.table, ref_ids).select(["ref_id", "shard", "row"]).combine_chunks()
        rows = pc.index_in(places["ref_id"], value_set=ref_ids).to_numpy()
        for name in pc.unique(places["shard"]).to_pylist():
            if name not in memories.shards:
                raise BankFormatError(f"{memories.table} names the shard {name!r}, which the manifest does not have")
            chosen = pc.equal(places["shard"], name).to_numpy()
            with ShardReader(memories.shards[name]) as shard:
                if records is None:
                    layout = shard.layout
                    records = np.empty((len(ref_ids), layout.stride_bytes), np.uint8)
                records[rows[chosen]] = shard.read(places["row"].to_numpy()[chosen].tolist())
    if records is None:
        raise BankFormatError(f"no memory is stored for {ref_ids[0].as_py()}; run memory3 verify --deep")
    layout.check_records(records, ref_ids.to_pylist(), origin=str(unit.source))
    write_shard(unit.target, records, layout, fingerprint)


def copy_memories(work: Workspace, bank: Bank, engine: EngineConfig) -> None:
    """Copies the memories of the references of :func:`split_live` into shards in the order of their ids."""
    folder = work.get_folder("shards")
    parts = work.list_files("unwritten")
    units = [Unit(source=path, target=folder / f"shard-{path.stem}.safetensors") for path in parts]
    digest = bank.manifest.fingerprint.digest
    process = functools.partial(_copy_memories, stored=list_stored_memories(bank), fingerprint=digest)
    run_units("copy-memories", units, process, engine)
