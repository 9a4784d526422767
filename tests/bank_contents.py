"""What a bank says, read by the plainest means: two banks can be compared whatever segments they are made of."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from model.loading import load_bank_codec
from model.verifying import MAX_CODED_ERROR
from schemas.bank import Bank
from schemas.codec_names import NONE
from schemas.records import Bytes

WHOLE_KINDS = (
    "documents",
    "occurrences",
    "rejects",
    "duplicates",
    "document_duplicates",
    "document_signatures",
    "contaminated",
)


def read_whole(bank: Bank, kind: str) -> pa.Table | None:
    """Returns a whole table, None if the version has none."""
    files = bank.manifest.list_files(kind)
    assert len(files) <= 1
    return pq.read_table(Path(bank.url) / files[0].path) if files else None


def read_parted(bank: Bank, kind: str) -> pa.Table:
    """Returns the rows of all segments sorted by reference, in which no reference comes twice."""
    tables = [pq.read_table(Path(bank.url) / file.path) for file in bank.manifest.list_files(kind)]
    table = pa.concat_tables(tables).sort_by("ref_id")
    assert pc.count_distinct(table["ref_id"]).as_py() == len(table)
    return table


def list_live(bank: Bank) -> set[str]:
    """Returns the references that stand in some document and are neither near-duplicates nor contaminated."""
    live = set(bank.read_table("occurrences")["ref_id"].to_pylist())
    for kind in ("duplicates", "contaminated"):
        table = read_whole(bank, kind)
        live -= set(table["ref_id"].to_pylist()) if table is not None else set()
    return live


def select(table: pa.Table, ref_ids: set[str]) -> pa.Table:
    """Returns the rows of some references; each has one."""
    found = table.filter(pc.is_in(table["ref_id"], value_set=pa.array(sorted(ref_ids), pa.string())))
    assert len(found) == len(ref_ids)
    return found


def read_memories(bank: Bank, ref_ids: set[str]) -> dict[str, Bytes]:
    """Returns the records of references, each read from the shard beside the table that names it."""
    records: dict[str, Bytes] = {}
    for file in bank.manifest.list_files("memories"):
        folder = file.path.rpartition("/")[0]
        shards = {other.path: other for other in bank.manifest.list_files("shard")}
        for row in pq.read_table(Path(bank.url) / file.path, columns=["ref_id", "shard", "row"]).to_pylist():
            if row["ref_id"] in ref_ids:
                assert row["ref_id"] not in records
                with bank.open_shard(shards[f"{folder}/{row['shard']}"]) as shard:
                    records[row["ref_id"]] = shard.read([row["row"]])[0]
    assert set(records) == ref_ids
    return records


def unpack(bank: Bank, records: dict[str, Bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns kept offsets, and key-values as float64, of records by ascending id; as they are, these are bfloat16."""
    payload, offsets = bank.manifest.layout.unpack(np.stack([records[ref_id] for ref_id in sorted(records)]))
    assert bank.manifest.layout.dtype == "bfloat16"
    if bank.manifest.layout.codec != NONE:
        decoded = load_bank_codec(bank).decode(torch.from_numpy(payload), torch.float32)
        return offsets, torch.stack(decoded).double().numpy()
    wide = np.ascontiguousarray(payload).view(np.uint16).astype(np.uint32) << 16
    return offsets, wide.view(np.float32).astype(np.float64)


def assert_equal_banks(bank: Bank, fresh: Bank, *, same_corpus: bool = True) -> None:
    """Checks that a bank says what a fresh build says.

    Args:
        bank: the bank.
        fresh: a fresh build of its documents.
        same_corpus: False where the bank was told to delete what the corpus of the fresh build lacks: places in files
            and what else was read differ.
    """
    for kind in WHOLE_KINDS if same_corpus else ("documents", "occurrences", "duplicates", "contaminated"):
        found, expected = read_whole(bank, kind), read_whole(fresh, kind)
        assert (found is None) == (expected is None), kind
        if found is None or expected is None:
            continue
        if not same_corpus and kind == "documents":
            found, expected = found.drop_columns("position"), expected.drop_columns("position")
        assert found.equals(expected), kind
    for name in ("documents", "references"):
        counts = bank.manifest.counts[name]
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
        assert not same_corpus or counts == fresh.manifest.counts[name]

    current = set(fresh.read_table("occurrences")["ref_id"].to_pylist())
    stored = {kind: read_parted(bank, kind) for kind in ("references", "signatures", "embeddings", "memories")}
    assert select(stored["references"], current).equals(read_parted(fresh, "references"))
    contaminated = read_whole(fresh, "contaminated")
    signed = current - set(contaminated["ref_id"].to_pylist() if contaminated is not None else [])
    assert select(stored["signatures"], signed).equals(read_parted(fresh, "signatures"))
    tombstones = read_whole(bank, "tombstones")
    dead = set(tombstones["ref_id"].to_pylist()) if tombstones is not None else set()
    assert dead == set(stored["references"]["ref_id"].to_pylist()) - current

    live = list_live(bank)
    assert live == list_live(fresh)
    duplicates = bank.read_table("duplicates")
    assert set(duplicates["kept_ref_id"].to_pylist()) <= live
    found = select(stored["embeddings"], live)
    assert found.equals(read_parted(fresh, "embeddings"))
    assert set(bank.read_dropped_ids().to_pylist()) >= set(stored["embeddings"]["ref_id"].to_pylist()) - live

    offsets, values = unpack(bank, read_memories(bank, live))
    expected_offsets, expected_values = unpack(fresh, read_memories(fresh, live))
    # The writer's batches differ, and with them the last bits: one memory in ten thousand keeps another token.
    assert np.mean(offsets == expected_offsets) >= 0.9999
    most = 2e-3 if bank.manifest.layout.codec == NONE else MAX_CODED_ERROR
    assert np.linalg.norm(values - expected_values) <= most * np.linalg.norm(expected_values)
