"""Memories by reference id from a real bank, warm and cold, the cache before them, and the search that names them."""

import dataclasses
import gc
import hashlib
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from model.checkpoint import Checkpoint
from model.embedding import SHIPPED_EMBEDDER, load_embedder
from model.fetching import BankMemories, RecordCache
from model.retrieving import Hit, Retriever
from model.selecting import SelectionConfig
from model.static_embedding import StaticEmbedder
from model.writing import Memories, ReferenceWriter
from pipelines.indexing import write_index
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError, WrongModelError
from schemas.protocols import Embedder
from schemas.records import EMPTY_SLOT, Bytes
from schemas.shards import ShardReader, write_shard
from schemas.tables import memories_schema, write_table
from tests.banks import REFERENCES_PER_SHARD, change_manifest, list_tokens, make_bank, make_references
from tests.models import make_checkpoint, train_tokenizer

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
    shutil.copytree(warm.path, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


@pytest.fixture
def cold(writer: ReferenceWriter, tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "cold-bank", writer, num_references=NUM_REFERENCES, cold=True)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder("static")


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
    before = hash_files(copied.path)
    memories = BankMemories(copied, writer)
    expected = memories.fetch_records(ref_ids).copy()
    first = memories.fetch(ref_ids)
    for tensor in (first.keys_LBHSD, first.values_LBHSD, first.offsets_LBHS):
        tensor.fill_(77)
    memories.fetch_records(ref_ids)[:] = 77
    memories.fetch_records(ref_ids[:1])[:] = 77
    assert memories.statistics.num_cached == 2 * NUM_REFERENCES + 1
    assert np.array_equal(memories.fetch_records(ref_ids), expected)
    assert np.array_equal(BankMemories(copied, writer).fetch_records(ref_ids), expected)
    assert hash_files(copied.path) == before


def test_one_memory_asked_for_twice_is_two_copies(warm: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    records = BankMemories(warm, writer).fetch_records([ref_ids[3]] * 2)
    assert np.array_equal(records[0], records[1])
    before = records[1].copy()
    records[0] = ~records[0]
    assert np.array_equal(records[1], before)


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
    assert dataclasses.astuple(memories.statistics) == (0, 10, 0)


def test_memories_in_the_cache_are_not_read_again(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(copied, writer)
    expected = memories.fetch_records(ref_ids)
    for path in copied.locate_all("shard"):
        path.write_bytes(b"")
    assert np.array_equal(memories.fetch_records(ref_ids[::-1]), expected[::-1])
    assert dataclasses.astuple(memories.statistics) == (NUM_REFERENCES, NUM_REFERENCES, 0)


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

    second = BankMemories(Bank.open(cold.path), writer)
    mixed = [ref_ids[place] for place in (30, 2, 30, 17)]
    assert np.array_equal(second.fetch_records(mixed), expected[[30, 2, 30, 17]])
    assert dataclasses.astuple(second.statistics) == (0, 3, 0)


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
    shutil.rmtree(cold.path / "cold")
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
    (path,) = (cold.path / "cold").glob("*.sqlite")
    path.write_bytes(b"text, not a database" * 100)
    with pytest.raises(BankFormatError, match=path.name):
        BankMemories(cold, writer).fetch(ref_ids[:2])


def test_every_memory_comes_from_one_place(cold: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    memories = BankMemories(cold, writer)
    memories.fetch_records(ref_ids[:5])
    memories.fetch_records(ref_ids[:7])
    assert dataclasses.astuple(memories.statistics) == (5, 0, 7)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_versions_of_other_stored_types_do_not_share_a_cold_store(
    cold: Bank, checkpoint: Checkpoint, ref_ids: list[str], dtype: str
) -> None:
    BankMemories(cold, ReferenceWriter(checkpoint)).fetch(ref_ids[:4])
    writer = ReferenceWriter(checkpoint, dtype=dtype)
    second = make_bank(cold.path, writer, num_references=NUM_REFERENCES, cold=True)
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


# Other models, damaged banks ------------------------------------------------------------------------------------------


def change_tokenizer(checkpoint: Checkpoint) -> ReferenceWriter:
    return ReferenceWriter(dataclasses.replace(checkpoint, tokenizer=train_tokenizer(400)))


def change_rope_base(checkpoint: Checkpoint) -> ReferenceWriter:
    rope = {**checkpoint.config.rope_parameters, "rope_theta": 500_000.0}
    return ReferenceWriter(make_checkpoint("llama", rope_parameters=rope))


def change_one_weight(checkpoint: Checkpoint) -> ReferenceWriter:
    other = make_checkpoint("llama")
    other.decoder.get_parameter(f"layers.{other.memory_layers[-1]}.self_attn.v_proj.weight")[3, 5] += 1e-3
    return ReferenceWriter(other)


OTHER_MODELS: dict[str, tuple[Callable[[Checkpoint], ReferenceWriter], str]] = {
    "seed": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", seed=1)), "weights"),
    "one-weight": (change_one_weight, "weights"),
    "tokenizer": (change_tokenizer, "tokenizer"),
    "rope-base": (change_rope_base, "rope"),
    "slots": (lambda checkpoint: ReferenceWriter(checkpoint, SelectionConfig(num_slots=4)), "selection"),
    "score": (lambda checkpoint: ReferenceWriter(checkpoint, SelectionConfig(score="exp")), "selection"),
    "layers": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", memory_layers=[1])), "memory_layers"),
    "norm": (lambda checkpoint: ReferenceWriter(make_checkpoint("llama", rms_norm_eps=1e-5)), "architecture"),
}


@pytest.mark.parametrize("name", sorted(OTHER_MODELS))
@pytest.mark.parametrize("is_cold", [False, True])
def test_a_bank_of_another_model_is_refused_by_the_part_that_differs(
    warm: Bank, checkpoint: Checkpoint, name: str, is_cold: bool
) -> None:
    make_writer, part = OTHER_MODELS[name]
    bank = change_manifest(warm, cold=is_cold)
    with pytest.raises(
        WrongModelError, match=f"another model: {part}(, storage)? differ; use the model it was built with"
    ):
        BankMemories(bank, make_writer(checkpoint))
    assert not (warm.path / "cold").exists()


def test_a_weight_past_the_memory_layers_makes_no_difference(warm: Bank, ref_ids: list[str]) -> None:
    other = make_checkpoint("llama")
    other.decoder.get_parameter(f"layers.{other.memory_layers[-1] + 1}.self_attn.v_proj.weight")[3, 5] += 1.0
    other.head.get_parameter("weight")[0, 0] += 1.0
    assert BankMemories(warm, ReferenceWriter(other)).fetch_records(ref_ids[:2]).any()


@pytest.mark.parametrize("name", ["llama-rope-scaled", "qwen2", "qwen3", "mistral"])
def test_a_fingerprint_that_went_through_json_is_the_writers(tmp_path: Path, name: str) -> None:
    writer = ReferenceWriter(make_checkpoint(name))
    bank = make_bank(tmp_path, writer, num_references=3)
    assert bank.manifest.fingerprint == writer.fingerprint
    assert bank.manifest.fingerprint.digest == writer.fingerprint.digest
    assert BankMemories(bank, writer).fetch(make_references(writer.checkpoint.tokenizer, 3)["ref_id"].to_pylist())


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


def test_a_row_the_shard_does_not_have_is_refused(copied: Bank, writer: ReferenceWriter, ref_ids: list[str]) -> None:
    path = copied.locate_all("memories")[0]
    table = pq.read_table(path)
    rows = [row + 5 for row in table["row"].to_pylist()]
    changed = table.set_column(2, "row", [rows]).cast(memories_schema(writer.layout.num_offsets))
    write_table(changed, path)
    with pytest.raises(BankFormatError, match=r"asked for row"):
        BankMemories(copied, writer).fetch(ref_ids)


@pytest.mark.parametrize("kind", ["memories", "references"])
def test_a_missing_table_is_named(copied: Bank, writer: ReferenceWriter, ref_ids: list[str], kind: str) -> None:
    bank = change_manifest(copied, cold=kind == "references")
    bank.locate_all(kind)[0].unlink()
    with pytest.raises(BankFormatError, match=f"{kind}.parquet is missing"):
        BankMemories(bank, writer).fetch(ref_ids[:1])


# Retrieval ------------------------------------------------------------------------------------------------------------


def read_texts(bank: Bank) -> list[str]:
    texts: list[str] = bank.read_table("references", ["text"])["text"].to_pylist()
    return texts


def test_every_reference_retrieves_itself(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    retriever = Retriever(warm, embedder)
    assert retriever.num_references == NUM_REFERENCES
    assert [retriever.get_ref_id(row) for row in range(NUM_REFERENCES)] == ref_ids
    hits = retriever.search(read_texts(warm), 1)
    assert [hit.ref_id for (hit,) in hits] == ref_ids
    assert [hit.score for (hit,) in hits] == pytest.approx([1.0] * NUM_REFERENCES, abs=1e-5)


def test_retrieval_equals_brute_force(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    queries = ["the assert statement", "a lambda makes a function", "truth values of objects", "import a module", "x"]
    references = embedder.embed(read_texts(warm)).astype(np.float64)
    found = Retriever(warm, embedder).search(queries, 7)
    for hits, query in zip(found, queries, strict=True):
        similarities = references @ embedder.embed([query])[0].astype(np.float64)
        best = sorted(range(NUM_REFERENCES), key=lambda row: -similarities[row])[:7]
        assert [hit.ref_id for hit in hits] == [ref_ids[row] for row in best]
        assert [hit.score for hit in hits] == pytest.approx([similarities[row] for row in best], abs=1e-5)


def test_rows_and_hits_agree(warm: Bank, embedder: Embedder) -> None:
    retriever = Retriever(warm, embedder)
    queries = ["generators", "slices of a list"]
    rows, similarities = retriever.search_rows(queries, 4)
    assert rows.shape == similarities.shape == (2, 4)
    for hits, row_of, score_of in zip(retriever.search(queries, 4), rows, similarities, strict=True):
        expected = [
            Hit(ref_id=retriever.get_ref_id(row), score=float(score))
            for row, score in zip(row_of, score_of, strict=True)
        ]
        assert hits == expected


def test_more_hits_than_references_are_all_references(warm: Bank, embedder: Embedder, ref_ids: list[str]) -> None:
    retriever = Retriever(warm, embedder)
    (hits,) = retriever.search(["with"], NUM_REFERENCES + 25)
    assert sorted(hit.ref_id for hit in hits) == ref_ids
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    rows, _ = retriever.search_rows(["with"], NUM_REFERENCES + 25)
    assert rows[0, NUM_REFERENCES:].tolist() == [-1] * 25
    assert retriever.search([], 5) == []


@pytest.mark.parametrize("num_hits", [0, -1])
def test_fewer_than_one_hit_is_refused(warm: Bank, embedder: Embedder, num_hits: int) -> None:
    with pytest.raises(InputError, match=f"asked for {num_hits} hits; ask for at least 1"):
        Retriever(warm, embedder).search(["with"], num_hits)


def test_another_embedder_is_refused(warm: Bank, embedder: Embedder, tmp_path: Path) -> None:
    """One number of the table is another, and so is the model's id."""
    table = load_file(SHIPPED_EMBEDDER / "model.safetensors")["embedding.weight"]
    table[1000, 0] += 1
    save_file({"embedding.weight": table}, tmp_path / "model.safetensors")
    shutil.copy(SHIPPED_EMBEDDER / "tokenizer.json", tmp_path / "tokenizer.json")
    other = StaticEmbedder(tmp_path)
    with pytest.raises(WrongModelError, match=f"embedded by {embedder.embedder_id}, .* is {other.embedder_id}"):
        Retriever(warm, other)


@pytest.mark.parametrize("how", ["empty", "cut", "foreign", "half"])
def test_a_damaged_index_is_named(copied: Bank, embedder: Embedder, how: str) -> None:
    (path,) = copied.locate_all("index")
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-1], "foreign": b"PAR1" * 99, "half": content[:20]}[how])
    with pytest.raises(BankFormatError, match=r"index\.faiss is damaged; build the bank again"):
        Retriever(copied, embedder)


@pytest.mark.parametrize("change", ["fewer", "narrower"])
def test_an_index_that_does_not_fit_its_table_is_refused(copied: Bank, embedder: Embedder, change: str) -> None:
    (path,) = copied.locate_all("index")
    index = faiss.read_index(str(path))
    vectors = index.reconstruct_n(0, index.ntotal)
    write_index(vectors[:-1] if change == "fewer" else np.ascontiguousarray(vectors[:, :-8]), path)
    with pytest.raises(BankFormatError, match=r"index\.faiss has .* vectors of .*, the table of embeddings 40 of 128"):
        Retriever(copied, embedder)


def test_a_missing_index_is_named(copied: Bank, embedder: Embedder) -> None:
    copied.locate_all("index")[0].unlink()
    with pytest.raises(BankFormatError, match=r"index\.faiss is missing"):
        Retriever(copied, embedder)


def test_a_version_without_an_index_is_refused(warm: Bank, embedder: Embedder) -> None:
    bank = change_manifest(warm, files=[file for file in warm.manifest.files if file.kind != "index"])
    with pytest.raises(BankFormatError, match="index"):
        Retriever(bank, embedder)
