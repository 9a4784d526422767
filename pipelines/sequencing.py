"""The stages from records to training sequences with what their chunks may read, in the order data flows.

    records -> packed sequences -> candidates of each chunk, without leaking ones -> shards -> dataset

What a chunk may read, and why, is in :mod:`pipelines.candidates`; the loader chooses among it.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.candidates import CandidateSource, OwnPlaces, add_candidates
from pipelines.jobs import list_row_groups, read_drops, read_kept
from pipelines.packing import PackingConfig, pack_documents
from pipelines.records import RECORDS
from pipelines.running import EngineConfig, Unit, load_once, run_units
from pipelines.workspace import Workspace, read_tables
from schemas.bank import Bank
from schemas.protocols import TokenizerFactory
from schemas.reference_tokens import REFERENCE_TOKENS, ReferenceTokens, write_reference_tokens
from schemas.sequences import (
    PACKED,
    SEQUENCES,
    SEQUENCES_PER_BLOCK,
    SHARDS_FOLDER,
    write_sequences,
)

PACKED_FOLDER = "packed"

# Records -> packed sequences ------------------------------------------------------------------------------------------


def _pack_row_group(unit: Unit, factory: TokenizerFactory, config: PackingConfig, drops_folder: Path) -> None:
    kept = read_kept(unit, ["doc_id", "text"], drops_folder)
    ids, texts = (kept[name].combine_chunks() for name in ("doc_id", "text"))
    write_sequences([pack_documents(ids, texts, load_once(factory), config)], PACKED, unit.target)


def pack_corpus(work: Workspace, factory: TokenizerFactory, config: PackingConfig, engine: EngineConfig) -> None:
    """Packs the kept documents of each row group of records."""
    folder = work.get_folder(PACKED_FOLDER)
    folder.mkdir(exist_ok=True)
    units = [
        Unit(source=path, part=part, target=folder / f"{path.stem}-{part:05d}.parquet")
        for path, part in list_row_groups(work)
    ]
    process = functools.partial(_pack_row_group, factory=factory, config=config, drops_folder=work.get_folder("drops"))
    run_units("pack", units, process, engine)


# Bank -> tokens of its references -------------------------------------------------------------------------------------


def write_bank_references(bank: Bank, target: Path) -> None:
    """Writes the tokens of all live references of a version, sorted by id."""
    if target.exists():
        return
    stored = bank.read_table("references", REFERENCE_TOKENS.names)
    live = stored.filter(pc.invert(pc.is_in(stored["ref_id"], value_set=bank.read_dropped_ids())))
    write_reference_tokens([live.sort_by("ref_id")], target)


# Packed sequences -> shards -------------------------------------------------------------------------------------------


def _write_shard(unit: Unit, source: CandidateSource | None) -> None:
    packed = pq.read_table(unit.source)
    own = None
    if source is not None and (source.config.exclude_own_place or source.config.strict_share):
        doc_ids = {span["doc_id"] for spans in packed["documents"].to_pylist() for span in spans}
        own = OwnPlaces(load_once(source.bank), sorted(doc_ids))

    def iterate_blocks() -> Iterator[pa.Table]:
        for start in range(0, len(packed), SEQUENCES_PER_BLOCK):
            block = packed.slice(start, SEQUENCES_PER_BLOCK)
            columns = add_candidates(block, unit.first_row + start, source, own)
            arrays = [
                block[field.name].combine_chunks()
                if field.name in PACKED.names
                else pa.array(columns[field.name], field.type)
                for field in SEQUENCES
            ]
            yield pa.table(arrays, schema=SEQUENCES)

    write_sequences(iterate_blocks(), SEQUENCES, unit.target)


def list_shard_units(work: Workspace) -> list[Unit]:
    """Returns a unit for each packed file that has a sequence; its target is the shard."""
    units: list[Unit] = []
    num_rows = 0
    for path in work.list_files(PACKED_FOLDER):
        size = pq.read_metadata(path).num_rows
        if size:
            target = work.get_folder(SHARDS_FOLDER) / f"{len(units):06d}.parquet"
            units.append(Unit(source=path, target=target, first_row=num_rows))
            num_rows += size
    return units


def write_shards(work: Workspace, source: CandidateSource | None, engine: EngineConfig) -> None:
    """Writes a shard of each packed file, with candidates where there is a bank to search."""
    work.get_folder(SHARDS_FOLDER).mkdir(exist_ok=True)
    run_units("retrieve", list_shard_units(work), functools.partial(_write_shard, source=source), engine)


# Shards -> references a training needs, counts ------------------------------------------------------------------------


def count_documents(work: Workspace) -> dict[str, Any]:
    """Returns the number of records read and kept, and of those dropped for each reason."""
    reasons = read_tables(work.list_files("records"), ["reason"], RECORDS)["reason"]
    dropped: Counter[str] = Counter(reasons.drop_null().to_pylist())
    dropped.update(read_drops(work)["reason"].to_pylist())
    return {"read": len(reasons), "kept": len(reasons) - dropped.total(), "dropped": dict(sorted(dropped.items()))}


def write_dataset_references(shards: Sequence[Path], source: CandidateSource, target: Path, seed: int) -> int:
    """Writes the references that some chunk may read and a random sample of the others; returns their number."""
    stored = ReferenceTokens(source.references)
    if len(stored) <= source.config.num_distractors:
        rows = np.arange(len(stored))
    else:
        ids = [pq.read_table(path, columns=["ref_ids"])["ref_ids"].combine_chunks() for path in shards]
        used = pc.unique(pa.concat_arrays([pc.list_flatten(pc.list_flatten(column)) for column in ids]))
        is_chosen = np.zeros(len(stored), np.bool_)
        is_chosen[stored.find_rows(used)] = True
        others = np.flatnonzero(~is_chosen)
        generator = np.random.default_rng(seed)
        num_others = min(len(others), source.config.num_distractors)
        is_chosen[generator.choice(others, num_others, replace=False)] = True
        rows = np.flatnonzero(is_chosen)
    return write_reference_tokens(stored.iterate_tables(rows), target)


def count_sequences(shards: Sequence[Path]) -> dict[str, int]:
    """Returns what stands in shards, and what their chunks retrieved but may not read."""
    names = (
        "sequences",
        "tokens",
        "targets",
        "chunks",
        "chunks_without_candidate",
        "candidates",
        "leaking",
        "own_place",
    )
    counts = dict.fromkeys(names, 0)
    columns = ["num_tokens", "ref_ids", "num_leaking", "num_own_place"]
    for path in shards:
        table = pq.read_table(path, columns=columns)
        of_chunks = pc.list_value_length(pc.list_flatten(table["ref_ids"].combine_chunks()))
        num_tokens = pc.sum(table["num_tokens"]).as_py()
        counts["sequences"] += len(table)
        counts["tokens"] += num_tokens
        counts["targets"] += num_tokens - len(table)
        counts["chunks"] += len(of_chunks)
        counts["chunks_without_candidate"] += pc.sum(pc.equal(of_chunks, 0)).as_py() or 0
        counts["candidates"] += pc.sum(of_chunks).as_py() or 0
        counts["leaking"] += pc.sum(table["num_leaking"]).as_py()
        counts["own_place"] += pc.sum(table["num_own_place"]).as_py()
    return counts
