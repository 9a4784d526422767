"""Memories by reference id from a real bank of one or several segments, warm and cold, and the cache before them."""

import dataclasses
import gc
import hashlib
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.cold import IDS_PER_QUERY, ColdStore
from model.fetching import BankMemories, RecordCache
from model.writing import Memories, ReferenceWriter
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.records import EMPTY_SLOT, Bytes
from schemas.shards import ShardReader, write_shard
from schemas.tables import write_table
from tests.banks import (
    REFERENCES_PER_SHARD,
    change_manifest,
    describe_file,
    extend_bank,
    list_tokens,
    make_bank,
    make_dropping_table,
)
from tests.models import make_checkpoint

NUM_REFERENCES = 40


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def writer(checkpoint: Checkpoint) -> ReferenceWriter:
    return ReferenceWriter(checkpoint)


@pytest.fixture(scope="module")
def warm(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("warm") / "bank", writer, num_references=NUM_REFERENCES)


@pytest.fixture(scope="module")
def ref_ids(warm: Bank) -> list[str]:
    ids: list[str] = warm.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return ids


@pytest.fixture
def copied(warm: Bank, tmp_path: Path) -> Bank:
    """The warm bank in a folder that a test may damage."""
    shutil.copytree(warm.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


@pytest.fixture(scope="module")
def cold_as_made(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("cold") / "bank", writer, num_references=NUM_REFERENCES, cold=True)


@pytest.fixture
def cold(cold_as_made: Bank, tmp_path: Path) -> Bank:
    """A cold bank of which nothing has been encoded yet."""
    shutil.copytree(cold_as_made.url, tmp_path / "cold-bank")
    return Bank.open(tmp_path / "cold-bank")


def write_again(bank: Bank, writer: ReferenceWriter) -> dict[str, tuple[bytes, bytes]]:
    """Payload and offsets of every reference, written anew in the groups that make a shard."""
    references = bank.read_table("references")
    fresh = {}
    for start in range(0, len(references), REFERENCES_PER_SHARD):
        part = references.slice(start, REFERENCES_PER_SHARD)
        written = writer.write(list_tokens(part))
        for ref_id, payload, offsets in zip(part["ref_id"].to_pylist(), written.payload, written.offsets, strict=True):
            fresh[ref_id] = (payload.tobytes(), offsets.tobytes())
    return fresh


def take_bytes(memories: Memories, row: int, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Payload and offsets of one fetched memory, put together layer by layer."""
    payload = b""
    for layer in range(len(memories.keys_LBHSD)):
        for part in (memories.keys_LBHSD, memories.values_LBHSD):
            payload += part[layer, row].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    offsets = b"".join(
        bytes(int(offset) for offset in layer[row].flatten().tolist()) for layer in memories.offsets_LBHS
    )
    return payload, offsets


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Warm banks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fetched_memories_equal_freshly_written_ones_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, dtype: str
) -> None:
    writer = ReferenceWriter(checkpoint, dtype=dtype)
    bank = make_bank(tmp_path, writer, num_references=20)
    fresh = write_again(bank, writer)
    asked = [sorted(fresh)[place] for place in (19, 0, 7, 19, 16, 15, 0, 0, 3)]
    memories = BankMemories(bank, writer).fetch(asked)
    assert memories.keys_LBHSD.shape == memories.values_LBHSD.shape == (2, len(asked), 2, 8, 16)
    assert memories.offsets_LBHS.shape == (2, len(asked), 2, 8)
    assert memories.keys_LBHSD.dtype == memories.values_LBHSD.dtype == torch.float32
    for row, ref_id in enumerate(asked):
        assert take_bytes(memories, row, getattr(torch, dtype)) == fresh[ref_id]


def test_every_memory_is_there_from_every_shard(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    assert len(warm.manifest.list_files("shard")) == 3
    fresh = write_again(warm, writer)
    asked = [ref_ids[place] for place in np.random.default_rng(0).permutation(NUM_REFERENCES)]
    memories = BankMemories(warm, writer).fetch(asked)
    assert {ref_id: take_bytes(memories, row, torch.bfloat16) for row, ref_id in enumerate(asked)} == fresh
    empty = (memories.offsets_LBHS == EMPTY_SLOT).any(-1).any(-1).any(0)
    lengths = warm.read_references(asked, ["num_tokens"])["num_tokens"].to_pylist()
    assert empty.tolist() == [length < 8 for length in lengths]
    assert 0 < int(empty.sum()) < NUM_REFERENCES


def test_fetched_memories_are_copies(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    before = hash_files(Path(copied.url))
    memories = BankMemories(copied, writer)
    expected = memories.fetch_records(ref_ids).copy()
    for asked in (ref_ids, ref_ids[:1], ref_ids[:1]):
        first, second = memories.fetch(asked), memories.fetch(asked)
        for name in ("keys_LBHSD", "values_LBHSD", "offsets_LBHS"):
            kept = getattr(second, name).clone()
            getattr(first, name).fill_(77)
            assert torch.equal(getattr(second, name), kept)
            assert not torch.equal(getattr(first, name), kept)
    assert memories.statistics.num_cached == 2 * NUM_REFERENCES + 4
    assert np.array_equal(memories.fetch_records(ref_ids), expected)
    assert np.array_equal(BankMemories(copied, writer).fetch_records(ref_ids), expected)
    assert hash_files(Path(copied.url)) == before


def test_records_are_read_only(warm: Bank, cold: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    for bank in (warm, cold):
        memories = BankMemories(bank, writer)
        for asked in (ref_ids[:3], ref_ids[:3], [ref_ids[3]] * 2, []):
            records = memories.fetch_records(asked)
            assert not records.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            memories.fetch_records(ref_ids[:1])[0, 0] = 1


def test_a_float32_memory_that_needs_no_conversion_is_a_copy_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    writer = ReferenceWriter(checkpoint, dtype="float32")
    bank = make_bank(tmp_path, writer, num_references=2)
    (ref_id, _) = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    memories = BankMemories(bank, writer)
    expected = memories.fetch_records([ref_id]).copy()
    memories.fetch([ref_id]).keys_LBHSD.fill_(77)
    assert np.array_equal(memories.fetch_records([ref_id]), expected)
    assert (
        take_bytes(memories.fetch([ref_id]), 0, torch.float32)[0]
        == expected[0, : writer.layout.payload_bytes].tobytes()
    )


def test_threads_get_what_one_gets(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    expected = dict(zip(ref_ids, BankMemories(warm, writer).fetch_records(ref_ids), strict=True))
    memories = BankMemories(warm, writer, cache_bytes=5 * writer.layout.stride_bytes)
    orders = [[ref_ids[place] for place in np.random.default_rng(seed).permutation(40)[:7]] for seed in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for order, records in zip(orders, pool.map(memories.fetch_records, orders), strict=True):
            assert np.array_equal(records, np.stack([expected[ref_id] for ref_id in order]))
    statistics = memories.statistics
    assert statistics.num_cached + statistics.num_read == 7 * 60


@pytest.mark.parametrize("place", [0, 1])
def test_an_unknown_reference_has_no_memory(
    warm: Bank, writer: ReferenceWriter, ref_ids: list[str], place: int
) -> None:
    unknown = ("0" * 32, "f" * 32)[place]
    with pytest.raises(BankFormatError, match=f"no memory for {unknown}"):
        BankMemories(warm, writer).fetch([ref_ids[0], unknown, ref_ids[1]])


def test_an_id_with_something_after_it_has_no_memory(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    with pytest.raises(BankFormatError, match="no memory for"):
        BankMemories(warm, writer).fetch([ref_ids[0] + "0"])


def test_no_memories_can_be_fetched(warm: Bank, writer: ReferenceWriter) -> None:
    assert BankMemories(warm, writer).fetch([]).keys_LBHSD.shape == (2, 0, 2, 8, 16)


# The cache ------------------------------------------------------------------------------------------------------------


class SlowCache:
    """The same cache as a plain list, least recently used first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.entries: list[tuple[str, bytes]] = []

    def get(self, ref_id: str) -> bytes | None:
        for entry in self.entries:
            if entry[0] == ref_id:
                self.entries = [other for other in self.entries if other is not entry] + [entry]
                return entry[1]
        return None

    def put(self, ref_id: str, record: bytes) -> None:
        if len(record) > self.capacity_bytes:
            return
        self.entries.append((ref_id, record))
        while sum(len(kept) for _, kept in self.entries) > self.capacity_bytes:
            del self.entries[0]


@given(
    capacity_bytes=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 15), min_size=6, max_size=6),
    asked=st.lists(st.integers(0, 5), max_size=40),
)
def test_the_cache_equals_a_slow_one(capacity_bytes: int, sizes: list[int], asked: list[int]) -> None:
    cache, slow = RecordCache(capacity_bytes), SlowCache(capacity_bytes)
    for number in asked:
        record = np.full(sizes[number], number, dtype=np.uint8)
        found, expected = cache.get(str(number)), slow.get(str(number))
        assert (found is None) == (expected is None)
        if found is None:
            cache.put(str(number), record)
            slow.put(str(number), record.tobytes())
        else:
            assert found.tobytes() == expected
        assert cache.size_bytes == sum(len(kept) for _, kept in slow.entries) <= capacity_bytes
    assert {str(n) for n in range(6) if cache.get(str(n)) is not None} == {ref_id for ref_id, _ in slow.entries}


@settings(max_examples=40)
@given(num_kept=st.integers(0, 5), spare_bytes=st.integers(0, 63), asked=st.lists(st.integers(0, 7), max_size=30))
def test_hits_are_counted_as_a_slow_cache_has_them(
    warm: Bank, writer: ReferenceWriter, ref_ids: list[str], num_kept: int, spare_bytes: int, asked: list[int]
) -> None:
    capacity_bytes = num_kept * writer.layout.stride_bytes + spare_bytes
    memories, slow = BankMemories(warm, writer, cache_bytes=capacity_bytes), SlowCache(capacity_bytes)
    num_hits = 0
    for number in asked:
        record = memories.fetch_records([ref_ids[number]])[0].tobytes()
        kept = slow.get(ref_ids[number])
        if kept is None:
            slow.put(ref_ids[number], record)
        else:
            num_hits += 1
            assert record == kept
    assert memories.statistics.num_cached == num_hits
    assert memories.statistics.num_read == len(asked) - num_hits
    assert memories.statistics.num_encoded == 0


def test_a_cache_of_no_bytes_keeps_nothing(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(warm, writer, cache_bytes=0)
    first = memories.fetch_records([*ref_ids[:5], *ref_ids[:5]])
    assert np.array_equal(first[:5], first[5:])
    assert np.array_equal(memories.fetch_records(ref_ids[:5]), first[:5])
    assert dataclasses.astuple(memories.statistics) == (0, 10, 0, 0)


def test_memories_in_the_cache_are_not_read_again(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(copied, writer)
    expected = memories.fetch_records(ref_ids)
    for path in copied.locate_all("shard"):
        path.write_bytes(b"")
    assert np.array_equal(memories.fetch_records(ref_ids[::-1]), expected[::-1])
    assert dataclasses.astuple(memories.statistics) == (NUM_REFERENCES, NUM_REFERENCES, 0, 0)


def test_what_is_read_ahead_is_in_the_cache_and_counts_as_nothing_else(
    copied: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    expected = BankMemories(copied, writer).fetch_records(ref_ids)
    memories = BankMemories(copied, writer)
    memories.read_ahead([*ref_ids[:6], *ref_ids[:2]])
    assert dataclasses.astuple(memories.statistics) == (0, 0, 0, 6)
    memories.read_ahead(ref_ids[:7])
    assert dataclasses.astuple(memories.statistics) == (0, 0, 0, 7)
    for path in copied.locate_all("shard"):
        path.write_bytes(b"")
    assert np.array_equal(memories.fetch_records(ref_ids[:7]), expected[:7])
    assert dataclasses.astuple(memories.statistics) == (7, 0, 0, 7)


def test_the_cache_holds_no_more_memory_than_it_may(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    stride_bytes = writer.layout.stride_bytes
    memories = BankMemories(warm, writer, cache_bytes=2 * stride_bytes)
    tracemalloc.start()
    try:
        memories.fetch_records(ref_ids)
        gc.collect()
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        held = tracemalloc.take_snapshot().filter_traces([arrays]).statistics("filename")
    finally:
        tracemalloc.stop()
    assert sum(entry.size for entry in held) <= 4 * stride_bytes


# Cold banks -----------------------------------------------------------------------------------------------------------


def fetch_in_shards(memories: BankMemories, ref_ids: list[str]) -> Bytes:
    """Fetches in the groups that a warm bank is written in: the last bit of a number may depend on the batch."""
    starts = range(0, len(ref_ids), REFERENCES_PER_SHARD)
    return np.concatenate([memories.fetch_records(ref_ids[start : start + REFERENCES_PER_SHARD]) for start in starts])


def test_a_cold_bank_encodes_once_and_equals_a_warm_one(
    cold: Bank, warm: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    assert cold.manifest.list_files("shard") == []
    expected = BankMemories(warm, writer).fetch_records(ref_ids)

    first = BankMemories(cold, writer)
    assert np.array_equal(fetch_in_shards(first, ref_ids), expected)
    assert first.statistics.num_encoded == NUM_REFERENCES
    assert np.array_equal(first.fetch_records(ref_ids), expected)
    assert first.statistics.num_cached == first.statistics.num_encoded == NUM_REFERENCES

    second = BankMemories(Bank.open(Path(cold.url)), writer)
    mixed = [ref_ids[place] for place in (30, 2, 30, 17)]
    assert np.array_equal(second.fetch_records(mixed), expected[[30, 2, 30, 17]])
    assert dataclasses.astuple(second.statistics) == (0, 3, 0, 0)


def test_a_cold_bank_encodes_only_what_is_missing(
    cold: Bank, warm: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    expected = BankMemories(warm, writer).fetch_records(ref_ids)
    BankMemories(cold, writer).fetch_records(ref_ids[:REFERENCES_PER_SHARD])
    memories = BankMemories(cold, writer)
    found = memories.fetch_records(ref_ids[: 2 * REFERENCES_PER_SHARD][::-1])
    assert np.array_equal(found, expected[: 2 * REFERENCES_PER_SHARD][::-1])
    assert memories.statistics.num_encoded == REFERENCES_PER_SHARD


def test_two_readers_of_a_cold_bank_share_what_either_encodes(
    cold: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    first, second = BankMemories(cold, writer), BankMemories(cold, writer)
    expected = first.fetch_records(ref_ids[:6])
    assert np.array_equal(second.fetch_records(ref_ids[:6]), expected)
    assert (first.statistics.num_encoded, second.statistics.num_encoded) == (6, 0)


def test_deleting_the_cold_store_loses_nothing_but_time(
    cold: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    first = fetch_in_shards(BankMemories(cold, writer), ref_ids)
    shutil.rmtree(Path(cold.url) / "cold")
    memories = BankMemories(cold, writer)
    assert np.array_equal(fetch_in_shards(memories, ref_ids), first)
    assert memories.statistics.num_encoded == NUM_REFERENCES


def test_a_cold_bank_without_a_cache_in_ram_reads_its_store(
    cold: Bank, writer: ReferenceWriter, ref_ids: list[str]
) -> None:
    memories = BankMemories(cold, writer, cache_bytes=0)
    first = memories.fetch_records(ref_ids[:4])
    assert np.array_equal(memories.fetch_records(ref_ids[:4]), first)
    assert (memories.statistics.num_cached, memories.statistics.num_encoded) == (0, 4)


def test_an_unknown_reference_is_not_encoded(cold: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(cold, writer)
    with pytest.raises(BankFormatError, match=f"no reference {'f' * 32}"):
        memories.fetch([ref_ids[0], "f" * 32])
    assert memories.statistics.num_encoded == 0


def test_a_damaged_cold_store_is_named(cold: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    BankMemories(cold, writer).fetch(ref_ids[:2])
    gc.collect()
    (path,) = (Path(cold.url) / "cold").glob("*.sqlite")
    path.write_bytes(b"text, not a database" * 100)
    with pytest.raises(BankFormatError, match=path.name):
        BankMemories(cold, writer).fetch(ref_ids[:2])


def test_every_memory_comes_from_one_place(cold: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(cold, writer)
    memories.fetch_records(ref_ids[:5])
    memories.fetch_records(ref_ids[:7])
    assert dataclasses.astuple(memories.statistics) == (5, 0, 7, 0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_versions_of_other_stored_types_do_not_share_a_cold_store(
    cold: Bank, checkpoint: Checkpoint, ref_ids: list[str], dtype: str
) -> None:
    BankMemories(cold, ReferenceWriter(checkpoint)).fetch(ref_ids[:4])
    writer = ReferenceWriter(checkpoint, dtype=dtype)
    second = make_bank(Path(cold.url), writer, num_references=NUM_REFERENCES, cold=True)
    fetched = BankMemories(second, writer).fetch(ref_ids[:4])
    expected = writer.write(list_tokens(second.read_references(ref_ids[:4], ["token_ids"])))
    for row in range(4):
        assert take_bytes(fetched, row, getattr(torch, dtype))[0] == expected.payload[row].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_cold_bank_stores_its_own_type_or_refuses(
    cold: Bank, checkpoint: Checkpoint, ref_ids: list[str], dtype: str
) -> None:
    expected = ReferenceWriter(checkpoint).write(list_tokens(cold.read_references(ref_ids[:4], ["token_ids"])))
    try:
        fetched = BankMemories(cold, ReferenceWriter(checkpoint, dtype=dtype)).fetch(ref_ids[:4])
    except WrongModelError:
        return
    for row in range(4):
        assert take_bytes(fetched, row, torch.bfloat16)[0] == expected.payload[row].tobytes()


# Damaged banks ------------------------------------------------------------------------------------------------------


def replace_shard(bank: Bank, *, fingerprint: str | None = None, dtype: str | None = None) -> Path:
    """Writes the second shard anew under another fingerprint or with another type, and returns its path."""
    path = bank.locate_all("shard")[1]
    with ShardReader(path) as shard:
        records, layout, own = shard.read(range(shard.num_records)), shard.layout, shard.fingerprint
    if dtype is not None:
        layout = dataclasses.replace(layout, dtype=dtype)
    write_shard(path, records, layout, fingerprint or own)
    return path


@pytest.mark.parametrize("changes", [{"fingerprint": "0" * 32}, {"dtype": "float16"}])
def test_a_foreign_shard_is_refused_by_name(
    copied: Bank, writer: ReferenceWriter, ref_ids: list[str], changes: dict[str, str]
) -> None:
    path = replace_shard(copied, **changes)
    memories = BankMemories(copied, writer)
    assert memories.fetch_records(ref_ids[:REFERENCES_PER_SHARD]).any()
    with pytest.raises(BankFormatError, match=f"{path.name} belongs to another bank"):
        memories.fetch(ref_ids[REFERENCES_PER_SHARD : REFERENCES_PER_SHARD + 1])


def test_a_missing_shard_is_named(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    path = copied.locate_all("shard")[2]
    path.unlink()
    with pytest.raises(BankFormatError, match=f"{path.name} is missing"):
        BankMemories(copied, writer).fetch(ref_ids)


def test_a_cut_shard_is_named(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    path = copied.locate_all("shard")[0]
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(BankFormatError, match=f"{path.name} has .* bytes"):
        BankMemories(copied, writer).fetch(ref_ids)


def test_a_shard_the_manifest_does_not_have_is_named(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    lost = warm.manifest.list_files("shard")[0]
    bank = change_manifest(warm, files=[file for file in warm.manifest.files if file != lost])
    with pytest.raises(BankFormatError, match=f"names the shard '{Path(lost.path).name}'"):
        BankMemories(bank, writer).fetch(ref_ids)


def replace_table(bank: Bank, kind: str, change: Callable[[pa.Table], pa.Table]) -> Bank:
    """Writes a table anew, and the manifest with it: a bank that says of itself that it is whole."""
    (file,) = bank.manifest.list_files(kind)
    path = bank.locate(file)
    changed = change(pq.read_table(path))
    write_table(changed, path)
    described = describe_file(Path(bank.url), kind, path, len(changed))
    return change_manifest(bank, files=[described if entry == file else entry for entry in bank.manifest.files])


def test_a_row_the_shard_does_not_have_is_refused(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    def move(table: pa.Table) -> pa.Table:
        return table.set_column(
            2, table.schema.field("row"), pa.array([row + 5 for row in table["row"].to_pylist()], pa.int32())
        )

    with pytest.raises(BankFormatError, match=r"asked for row"):
        BankMemories(replace_table(copied, "memories", move), writer).fetch(ref_ids)


def test_the_memory_of_another_reference_is_refused(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    def swap(table: pa.Table) -> pa.Table:
        rows = table["row"].to_pylist()
        return table.set_column(2, table.schema.field("row"), pa.array([rows[1], rows[0], *rows[2:]], pa.int32()))

    memories = BankMemories(replace_table(copied, "memories", swap), writer)
    with pytest.raises(BankFormatError, match=f"holds the memory of reference {ref_ids[1]} in place of .*{ref_ids[0]}"):
        memories.fetch(ref_ids[:1])
    assert memories.fetch_records(ref_ids[2:]).any()


@pytest.mark.parametrize("bit", [0, 3])
@pytest.mark.parametrize("part", ["payload", "offsets"])
def test_a_flipped_bit_is_found_when_the_memory_is_read(
    copied: Bank, writer: ReferenceWriter, ref_ids: list[str], part: str, bit: int
) -> None:
    path, layout = copied.locate_all("shard")[0], writer.layout
    content = bytearray(path.read_bytes())
    start = len(content) - REFERENCES_PER_SHARD * layout.stride_bytes + 4 * layout.stride_bytes
    content[start + (100 if part == "payload" else layout.payload_bytes + 3)] ^= 1 << bit
    path.write_bytes(content)
    memories = BankMemories(copied, writer)
    for _ in range(2):
        with pytest.raises(BankFormatError, match=f"shard-000000.* is damaged: record of reference {ref_ids[4]}"):
            memories.fetch(ref_ids[:6])
    assert memories.fetch_records([*ref_ids[:4], *ref_ids[5:]]).any()


@pytest.mark.parametrize("value", ["f" * 31, "f" * 33, ""])
def test_what_is_no_id_is_refused(copied: Bank, writer: ReferenceWriter, value: str) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        ids = table["ref_id"].to_pylist()
        return table.set_column(0, table.schema.field("ref_id"), [[*ids[:-1], value]])

    with pytest.raises(BankFormatError, match=r"memories\.parquet has values that are no ids"):
        BankMemories(replace_table(copied, "memories", spoil), writer)


@pytest.mark.parametrize("kind", ["memories", "references"])
def test_a_missing_table_is_named(copied: Bank, writer: ReferenceWriter, ref_ids: list[str], kind: str) -> None:
    copied.locate_all(kind)[0].unlink()
    files = [file for file in copied.manifest.files if kind == "memories" or file.kind != "memories"]
    bank = change_manifest(copied, cold=kind == "references", files=files)
    with pytest.raises(BankFormatError, match=f"{kind}.parquet is missing"):
        BankMemories(bank, writer).fetch(ref_ids[:1])


def test_a_warm_version_without_memories_is_refused(warm: Bank, writer: ReferenceWriter) -> None:
    files = [file for file in warm.manifest.files if file.kind != "memories"]
    with pytest.raises(BankFormatError, match="has no table 'memories'"):
        BankMemories(change_manifest(warm, files=files), writer)


# Several segments -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The third version of a bank: 20, 19 and 9 references in three segments; four of them are not live."""
    bank = make_bank(tmp_path_factory.mktemp("chain") / "bank", writer, num_references=20)
    bank = extend_bank(bank, writer, num_new=19)
    ids = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return extend_bank(
        bank, writer, num_new=9, deleted=[ids[2], ids[25]], duplicates={ids[7]: ids[30], ids[38]: ids[0]}
    )


def list_ids(bank: Bank) -> tuple[list[str], list[str]]:
    """Ids of the live references, and of those that are not."""
    dropped = bank.read_dropped_ids().to_pylist()
    ids = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return [ref_id for ref_id in ids if ref_id not in dropped], dropped


def test_memories_are_found_in_the_segment_they_stand_in(chain: Bank, writer: ReferenceWriter) -> None:
    names = [file.path.rpartition("/")[2] for file in chain.manifest.list_files("shard")]
    assert len(names) == 5 > len(set(names))  # names repeat in other segments
    live, _ = list_ids(chain)
    assert len(live) == 44
    order = [live[place] for place in np.random.default_rng(1).permutation(44)]
    stored = BankMemories(chain, writer).fetch(order)
    # Written one at a time, so equal up to rounding, and in other bytes than those of any other reference.
    references = chain.read_references(order, ["token_ids"])
    for row in range(44):
        written = writer.write(list_tokens(references.slice(row, 1)))
        expected = torch.from_numpy(written.payload).view(torch.bfloat16).view(writer.layout.payload_shape).float()
        found = torch.stack((stored.keys_LBHSD[:, row], stored.values_LBHSD[:, row]), 1)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert np.array_equal(stored.offsets_LBHS[:, row].numpy(), written.offsets[0])


def test_earlier_versions_read_what_they_had(chain: Bank, writer: ReferenceWriter) -> None:
    _, dropped = list_ids(chain)
    second = Bank.open(chain.url, 2)
    assert len(list_ids(second)[0]) == 39
    assert BankMemories(second, writer).fetch_records(dropped).any(1).all()
    newest = chain.read_table("references", ["ref_id"])["ref_id"].to_pylist()[-1]
    third = chain.manifest.list_files("references")
    only_third = {file.path for file in third} - {file.path for file in second.manifest.list_files("references")}
    assert len(only_third) == 1
    with pytest.raises(BankFormatError, match="has no memory for|stands"):
        BankMemories(Bank.open(chain.url, 1), writer).fetch_records([newest, *dropped])


@pytest.mark.parametrize("is_cold", [False, True])
def test_a_reference_that_is_not_live_says_why(chain: Bank, writer: ReferenceWriter, is_cold: bool) -> None:
    live, dropped = list_ids(chain)
    bank = change_manifest(chain, cold=is_cold)
    kept = dict(
        zip(*(chain.read_table("duplicates")[name].to_pylist() for name in ("ref_id", "kept_ref_id")), strict=True)
    )
    deleted = chain.read_table("tombstones")["ref_id"].to_pylist()
    assert sorted([*kept, *deleted]) == sorted(dropped)
    for ref_id in dropped:
        reason = f"near-duplicate of {kept[ref_id]}" if ref_id in kept else "stands in no document any more"
        with pytest.raises(InputError, match=f"reference {ref_id} is not live in version 3 of .*: it .*{reason}"):
            BankMemories(bank, writer).fetch([live[0], ref_id])
        assert BankMemories(bank, writer).fetch_records([kept.get(ref_id, live[0])]).any()


def test_a_contaminated_reference_says_by_what(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    files = make_dropping_table(Path(copied.url), "contaminated", [ref_ids[5]])
    bank = change_manifest(copied, files=[*copied.manifest.files, *files])
    with pytest.raises(
        InputError, match=f"{ref_ids[5]} is not live in .* overlaps with {ref_ids[5]}, a document of the"
    ):
        BankMemories(bank, writer).fetch(ref_ids[5:6])


def test_a_deleted_near_duplicate_is_deleted(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    kinds = ("duplicates", "contaminated", "tombstones")
    files = [file for kind in kinds for file in make_dropping_table(Path(copied.url), kind, [ref_ids[5]])]
    with pytest.raises(InputError, match="stands in no document any more"):
        BankMemories(change_manifest(copied, files=[*copied.manifest.files, *files]), writer).fetch(ref_ids[5:6])


def test_a_partly_migrated_bank_reads_what_is_there_and_encodes_the_rest(
    writer: ReferenceWriter, warm: Bank, ref_ids: list[str], tmp_path: Path
) -> None:
    bank = make_bank(tmp_path / "bank", writer, num_references=20)
    stored = set(bank.read_table("references", ["ref_id"])["ref_id"].to_pylist())
    bank = extend_bank(bank, writer, num_new=20, with_memories=False, cold=True)
    assert sorted(bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()) == ref_ids
    memories = BankMemories(bank, writer)
    fetched, expected = memories.fetch(ref_ids), BankMemories(warm, writer).fetch(ref_ids)
    assert dataclasses.astuple(memories.statistics) == (0, 20, 20, 0)
    torch.testing.assert_close(fetched.keys_LBHSD, expected.keys_LBHSD, rtol=0.02, atol=0.02)
    assert torch.equal(fetched.offsets_LBHS, expected.offsets_LBHS)
    again = BankMemories(bank, writer)
    again.fetch(ref_ids)
    assert dataclasses.astuple(again.statistics) == (0, 40, 0, 0)
    with pytest.raises(BankFormatError, match="has no memory for"):
        BankMemories(change_manifest(bank, cold=False), writer).fetch([ref_ids[0], *sorted(set(ref_ids) - stored)])


@pytest.mark.parametrize("how", ["flipped", "cut", "swapped", "text"])
def test_a_damaged_record_of_the_cold_store_is_encoded_again(
    cold: Bank, writer: ReferenceWriter, ref_ids: list[str], how: str
) -> None:
    expected = BankMemories(cold, writer).fetch_records(ref_ids[:6])
    (path,) = (Path(cold.url) / "cold").glob("*.sqlite")
    record = expected[2].tobytes()
    damaged: dict[str, bytes | str] = {
        "flipped": record[:50] + bytes([record[50] ^ 4]) + record[51:],
        "cut": record[:-64],
        "swapped": expected[3].tobytes(),
        "text": "no record",
    }
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE records SET record = ? WHERE ref_id = ?", (damaged[how], ref_ids[2]))
    memories = BankMemories(cold, writer)
    found = memories.fetch(ref_ids[:6])
    assert dataclasses.astuple(memories.statistics) == (0, 5, 1, 0)
    layout = writer.layout
    assert torch.equal(
        found.offsets_LBHS[:, 3].flatten(),
        torch.from_numpy(expected[3, layout.payload_bytes :][: layout.num_offsets].astype(np.int64)),
    )
    again = BankMemories(cold, writer)
    assert np.array_equal(again.fetch_records(ref_ids[:6])[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    assert dataclasses.astuple(again.statistics) == (0, 6, 0, 0)


def test_more_ids_than_a_query_takes_are_looked_up_in_parts(tmp_path: Path) -> None:
    store = ColdStore(tmp_path / "not-there-yet", "f" * 32)
    ids = [f"{number:032x}" for number in range(2 * IDS_PER_QUERY + 1)]
    records = np.arange(len(ids) * 4, dtype=np.int64).view(np.uint8).reshape(len(ids), -1)
    store.save(ids[::2], records[::2])
    found = store.load(ids)
    store.close()
    assert list(found) == ids[::2]
    assert all(np.array_equal(found[ref_id], records[row]) for row, ref_id in enumerate(ids) if row % 2 == 0)
