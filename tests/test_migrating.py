"""A bank moved to another model: the same as if it had been built for it, step by step, and the old one serves on."""

import csv
import shutil
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.building import build, update
from flows.compacting import compact_bank
from flows.config import BuildConfig, MemoryConfig
from flows.deleting import delete_documents
from flows.drafting import read_settings
from flows.migrating import Migration, choose_config, count_occurrences, migrate_bank, read_uses
from flows.steps import Steps
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.loading import load_writer
from model.locating import SHIPPED_MODEL, find_checkpoint
from model.retrieving import Retriever
from model.writing import ReferenceWriter
from pipelines import encoding
from pipelines.running import Unit, clear_stop, request_stop
from schemas.bank import Bank
from schemas.codec_names import DEFAULT_CODEC
from schemas.errors import InputError, StoppedError, WrongModelError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, list_live, read_memories, read_whole
from tests.models import train_tokenizer
from tests.test_equality import change_word, make_config, write_corpus

DOCUMENTS = {
    "assert": topics["assert"],
    "copy": topics["with"],
    "empty": " \n",
    "global": topics["global"],
    "near": change_word(topics["with"], 40),
    "with": topics["with"],
}

SHARDS: dict[str, Any] = {"memory": {"references_per_shard": 4}}

SEARCHED_KINDS = ("references", "signatures", "embeddings", "index")


def test_a_rule_that_nobody_chose_does_not_follow_a_bank_to_another_model(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    migration = Migration(model=SHIPPED_MODEL)
    for rule, expected in (
        ({"num_slots": 8, "score": "softmax", "refit": False}, (None, None, None)),
        ({"num_slots": 4, "score": "softmax", "refit": False}, (4, "softmax", False)),
        ({}, (None, None, None)),
    ):
        memory = choose_config(BuildConfig(memory=MemoryConfig(**rule)), migration, store).memory
        assert (memory.num_slots, memory.score, memory.refit) == expected
    kept = choose_config(BuildConfig(memory=MemoryConfig(num_slots=8)), Migration(codec="int8"), store).memory
    assert (kept.num_slots, kept.codec) == (8, "int8")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the same architecture and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(find_checkpoint(SHIPPED_MODEL), folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    changed = {name: weight * (1 + 0.2 * torch.randn_like(weight)) for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped model with another tokenizer, which cuts texts into more tokens."""
    folder = tmp_path_factory.mktemp("models") / "retokenized"
    shutil.copytree(find_checkpoint(SHIPPED_MODEL), folder)
    (folder / "tokenizer.json").write_text(train_tokenizer(1024)._tokenizer.to_str())
    return str(folder)


def build_corpus(folder: Path, changes: dict[str, Any]) -> Bank:
    path = write_corpus(folder, DOCUMENTS)
    build(LocalStore(folder / "bank"), [str(path)], make_config(changes), Steps())
    return Bank.open(folder / "bank")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_corpus(tmp_path_factory.mktemp("built"), SHARDS)


@pytest.fixture
def store(built: Bank, tmp_path: Path) -> LocalStore:
    shutil.copytree(built.url, tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


def build_fresh(bank: Bank, folder: Path) -> Bank:
    """Builds a bank of the same corpus with the configuration that a version has now."""
    build(LocalStore(folder / "fresh"), bank.manifest.config["corpus"], read_settings(bank), Steps())
    return Bank.open(folder / "fresh")


def load_writer_of(model: str) -> ReferenceWriter:
    return load_writer(model, codec=DEFAULT_CODEC)


def assert_sound(bank: Bank) -> None:
    assert [check for check in verify_bank(bank, deep=True) if not check.passed] == []


def list_stored(bank: Bank) -> set[str]:
    """Returns the references whose memory stands in a shard."""
    files = bank.manifest.list_files("memories")
    tables = [pq.read_table(Path(bank.url) / file.path, columns=["ref_id"]) for file in files]
    ids = [ref_id for table in tables for ref_id in table["ref_id"].to_pylist()]
    assert len(ids) == len(set(ids))
    return set(ids)


def rank_references(bank: Bank, uses: dict[str, int]) -> list[str]:
    """Returns the live references, the most used first, of equally used ones the least id."""
    return sorted(list_live(bank), key=lambda ref_id: (-uses.get(ref_id, 0), ref_id))


# Another model with the same tokenizer --------------------------------------------------------------------------------


def test_memories_are_those_of_a_fresh_build_and_nothing_else_is_made(
    store: LocalStore, other_model: str, tmp_path: Path
) -> None:
    before = Bank.open(store)
    old_records = read_memories(before, list_live(before))
    reader = BankMemories(before, load_writer_of(SHIPPED_MODEL), cache_bytes=0)
    summary = migrate_bank(store, Migration(model=other_model))
    num_live = len(old_records)
    assert (summary["version"], summary["operation"], summary["unchanged"]) == (2, "migrate", False)
    assert summary["counts"]["changes"] == {"references": {"encoded": num_live, "not_encoded": 0}}
    bank = Bank.open(store)
    assert not bank.manifest.cold
    assert bank.manifest.config["memory"]["model"] == other_model
    for kind in SEARCHED_KINDS:
        assert bank.manifest.list_files(kind) == before.manifest.list_files(kind), kind
    assert not set(bank.manifest.list_files("shard")) & set(before.manifest.list_files("shard"))
    assert_equal_banks(bank, build_fresh(bank, tmp_path))
    new_records = read_memories(bank, set(old_records))
    assert all(not np.array_equal(new_records[ref_id], record) for ref_id, record in old_records.items())
    assert_sound(bank)

    # Each version serves its own model, whoever has opened it when.
    ref_id = min(old_records)
    assert np.array_equal(reader.fetch_records([ref_id])[0], old_records[ref_id])
    old = Bank.open(store, 1)
    assert_sound(old)
    assert read_memories(old, set(old_records)).keys() == old_records.keys()
    for version, right, wrong in ((old, SHIPPED_MODEL, other_model), (bank, other_model, SHIPPED_MODEL)):
        BankMemories(version, load_writer_of(right)).fetch([ref_id])
        with pytest.raises(WrongModelError, match="weights differ"):
            BankMemories(version, load_writer_of(wrong))


def test_the_most_used_come_first_and_the_rest_later(store: LocalStore, other_model: str, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "at-once")
    before = Bank.open(store)
    uses = Counter(before.read_table("occurrences")["ref_id"].to_pylist())
    assert len(set(uses.values())) > 1
    ranked = rank_references(before, uses)
    summary = migrate_bank(store, Migration(model=other_model, limit=5))
    assert summary["counts"]["changes"]["references"] == {"encoded": 5, "not_encoded": len(ranked) - 5}
    partly = Bank.open(store)
    assert partly.manifest.cold
    assert list_stored(partly) == set(ranked[:5])
    assert_sound(partly)

    # It is read and generates at once: what is not stored is encoded when it is asked for.
    writer, embedder = load_writer_of(other_model), load_embedder("static")
    memories = BankMemories(partly, writer)
    fetched = memories.fetch_records(ranked)
    assert (memories.statistics.num_read, memories.statistics.num_encoded) == (5, len(ranked) - 5)
    generator = Generator(writer.checkpoint, Retriever(partly, embedder), memories)
    assert list(generator.generate("The with statement is used to", GenerationConfig(max_new_tokens=3)))
    assert sum(generator.traces[0].attention) == pytest.approx(1.0)

    summary = migrate_bank(store, Migration(model=other_model))
    assert summary["counts"]["changes"]["references"] == {"encoded": len(ranked) - 5, "not_encoded": 0}
    whole = Bank.open(store)
    assert not whole.manifest.cold
    for kind in ("memories", "shard"):
        assert set(partly.manifest.list_files(kind)) < set(whole.manifest.list_files(kind)), kind
    assert list_stored(whole) == set(ranked)
    assert_sound(whole)
    assert migrate_bank(store, Migration(model=other_model))["unchanged"]
    assert list_versions(store) == [1, 2, 3]

    migrate_bank(LocalStore(tmp_path / "at-once"), Migration(model=other_model))
    assert_equal_banks(whole, Bank.open(tmp_path / "at-once"))
    stored = read_memories(whole, set(ranked))
    end = whole.manifest.layout.payload_bytes
    pairs = [(record[:end], stored[ref_id][:end]) for record, ref_id in zip(fetched, ranked, strict=True)]
    close = [np.abs(one.view(np.int16) - other.view(np.int16)).max() < 8 for one, other in pairs]
    assert np.mean(close) > 0.5  # the last bits of some depend on what they were written beside


def test_a_file_of_uses_says_which_come_first(store: LocalStore, other_model: str, tmp_path: Path) -> None:
    before = Bank.open(store)
    live = sorted(list_live(before))
    chosen = {live[-1]: 7, live[3]: 5, live[1]: 5}
    # In several rows, as logs of several days would have it; and with a reference that is not there any more.
    rows = [(live[-1], 3), (live[3], 5), (live[-1], 4), (live[1], 5), ("0" * 32, 100)]
    with (tmp_path / "uses.csv").open("w") as file:
        csv.writer(file).writerows([("when", "ref_id", "count"), *(("monday", *row) for row in rows)])
    pq.write_table(pa.table({"count": [n for _, n in rows], "ref_id": [r for r, _ in rows]}), tmp_path / "uses.parquet")
    tables = [read_uses(tmp_path / name) for name in ("uses.csv", "uses.parquet")]
    assert tables[0].equals(tables[1])
    migrate_bank(store, Migration(model=other_model, limit=2, uses=tables[0]))
    ranked = rank_references(before, chosen)
    assert ranked[:3] == [live[-1], live[1], live[3]]
    assert list_stored(Bank.open(store)) == set(ranked[:2])
    # On with the rest, by the same uses.
    migrate_bank(store, Migration(model=other_model, limit=1, uses=tables[0]))
    assert list_stored(Bank.open(store)) == set(ranked[:3])
    assert_sound(Bank.open(store))


def test_ids_of_digits_are_ids(tmp_path: Path) -> None:
    path = tmp_path / "uses.csv"
    path.write_text(f"ref_id,count\n{'0' * 31}1,5\n")
    assert read_uses(path).to_pylist() == [{"ref_id": "0" * 31 + "1", "count": 5}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("columns.csv", b"ref_id,number\na,1\n"),
        ("words.csv", b"ref_id,count\na,often\n"),
        ("empty.csv", b""),
        ("text.parquet", b"ref_id,count\na,1\n"),
        ("empty.parquet", b""),
        ("none.csv", None),
        ("none.parquet", None),
    ],
)
def test_a_bad_file_of_uses_is_one_clear_error(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} cannot be read as Parquet or CSV with the columns ref_id and count"):
        read_uses(tmp_path / name)


def test_what_cannot_be_asked_for_changes_nothing(store: LocalStore, other_tokenizer: str) -> None:
    with pytest.raises(InputError, match="limit is -1, must be at least 0"):
        Migration(model=SHIPPED_MODEL, limit=-1)
    with pytest.raises(InputError, match="nowhere"):
        migrate_bank(store, Migration(model="nowhere"))
    with pytest.raises(InputError, match="has another tokenizer .* leave out --first"):
        migrate_bank(store, Migration(model=other_tokenizer, limit=3))
    assert migrate_bank(store, Migration(model=SHIPPED_MODEL))["unchanged"]
    assert list_versions(store) == [1]


def test_with_no_memory_made_first_all_are_made_when_retrieved(store: LocalStore, other_model: str) -> None:
    summary = migrate_bank(store, Migration(model=other_model, limit=0))
    bank = Bank.open(store)
    live = sorted(list_live(bank))
    assert summary["counts"]["changes"]["references"] == {"encoded": 0, "not_encoded": len(live)}
    assert list_stored(bank) == set()
    memories = BankMemories(bank, load_writer_of(other_model))
    memories.fetch(live[:2])
    assert memories.statistics.num_encoded == 2
    assert_sound(bank)


def test_a_stopped_migration_goes_on_from_its_shards(
    store: LocalStore, other_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store.path, tmp_path / "undisturbed")
    write_unit = encoding._write_memories
    written: list[str] = []

    def stop_after_two(unit: Unit, **options: Any) -> None:
        write_unit(unit, **options)
        written.append(unit.target.name)
        if len(written) == 2:
            request_stop()

    monkeypatch.setattr(encoding, "_write_memories", stop_after_two)
    try:
        with pytest.raises(StoppedError, match="finished work is kept"):
            migrate_bank(store, Migration(model=other_model))
    finally:
        clear_stop()
    assert list_versions(store) == [1]
    finished = {path.name: path.stat().st_ino for path in store.path.glob("work/*/shards/*")}
    assert sorted(finished) == sorted(written)
    summary = migrate_bank(store, Migration(model=other_model))
    bank = Bank.open(store)
    names = [file.path.rpartition("/")[2] for file in bank.manifest.list_files("shard")]
    assert len(names) > 2
    assert sorted(written) == sorted(names)  # each was written once
    assert finished.items() <= {path.name: path.stat().st_ino for path in bank.locate_all("shard")}.items()
    assert summary["counts"]["changes"]["references"]["encoded"] == len(list_live(bank))
    monkeypatch.undo()
    migrate_bank(LocalStore(tmp_path / "undisturbed"), Migration(model=other_model))
    undisturbed = Bank.open(tmp_path / "undisturbed")
    assert bank.manifest.files == undisturbed.manifest.files


def test_a_stopped_migration_by_other_uses_begins_anew(
    store: LocalStore, other_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = sorted(list_live(Bank.open(store)))

    def make_uses(ref_ids: list[str]) -> pa.Table:
        columns = [ref_ids, list(range(len(ref_ids), 0, -1))]
        return pa.table(columns, schema=pa.schema([("ref_id", pa.string()), ("count", pa.int64())]))

    write_unit = encoding._write_memories

    def stop(unit: Unit, **options: Any) -> None:
        write_unit(unit, **options)
        # As if the run had been killed before it had written which references come next.
        for path in sorted(unit.source.parent.iterdir())[1:]:
            path.unlink()
        request_stop()

    monkeypatch.setattr(encoding, "_write_memories", stop)
    try:
        with pytest.raises(StoppedError):
            migrate_bank(store, Migration(model=other_model, uses=make_uses(live)))
    finally:
        clear_stop()
    monkeypatch.undo()
    migrate_bank(store, Migration(model=other_model, uses=make_uses(live[::-1])))
    bank = Bank.open(store)
    assert list_stored(bank) == set(live)
    assert_sound(bank)


def test_an_update_goes_on_with_the_new_model(store: LocalStore, other_model: str, tmp_path: Path) -> None:
    migrate_bank(store, Migration(model=other_model))
    migrated = Bank.open(store)
    assert update(store, None, {}, Steps())["unchanged"]
    (tmp_path / "next").mkdir()
    path = write_corpus(tmp_path / "next", {**DOCUMENTS, "pass": topics["pass"]})
    summary = update(store, [str(path)], {}, Steps())
    bank = Bank.open(store)
    num_new = len(list_live(bank) - list_live(migrated))
    assert num_new > 0
    assert summary["counts"]["changes"]["references"]["encoded"] == num_new
    assert set(migrated.manifest.list_files("shard")) < set(bank.manifest.list_files("shard"))
    assert_equal_banks(bank, build_fresh(bank, tmp_path))
    assert_sound(bank)


def test_only_live_references_are_encoded(store: LocalStore, other_model: str, tmp_path: Path) -> None:
    delete_documents(store, ["assert"])
    deleted = Bank.open(store)
    summary = migrate_bank(store, Migration(model=other_model))
    bank = Bank.open(store)
    live = list_live(bank)
    assert live == list_live(deleted)
    assert summary["counts"]["changes"]["references"]["encoded"] == len(live)
    assert list_stored(bank) == live
    assert bank.read_table("tombstones").equals(deleted.read_table("tombstones"))
    assert bank.manifest.counts["documents"] == deleted.manifest.counts["documents"]
    assert_sound(bank)
    compact_bank(store)
    compact = Bank.open(store)
    assert list_stored(compact) == live
    assert_sound(compact)


def test_a_cold_bank_is_warmed(tmp_path: Path) -> None:
    built = build_corpus(tmp_path, {"memory": {"cold": True, "references_per_shard": 4}})
    store = LocalStore(built.url)
    migrate_bank(store, Migration(model=SHIPPED_MODEL, limit=3))
    partly = Bank.open(store)
    ranked = rank_references(built, {row["ref_id"]: row["count"] for row in count_occurrences(built).to_pylist()})
    assert partly.manifest.cold
    assert list_stored(partly) == set(ranked[:3])
    migrate_bank(store, Migration(model=SHIPPED_MODEL))
    bank = Bank.open(store)
    assert not bank.manifest.cold
    assert_equal_banks(bank, build_fresh(bank, tmp_path))
    assert_sound(bank)


# Another tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reading": {"title_column": "title"}, "chunking": {"title_prefix": True, "overlap_tokens": 24}},
        {"document_deduplication": {"enabled": True, "threshold": 0.7}},
    ],
    ids=["plain", "titled-overlapping", "documents-compared"],
)
def test_documents_are_restored_and_cut_anew(changes: dict[str, Any], other_tokenizer: str, tmp_path: Path) -> None:
    before = build_corpus(tmp_path, changes)
    store = LocalStore(before.url)
    summary = migrate_bank(store, Migration(model=other_tokenizer))
    bank = Bank.open(store)
    assert summary["version"] == 2
    assert bank.manifest.fingerprint.tokenizer != before.manifest.fingerprint.tokenizer
    assert bank.manifest.counts["documents"] == before.manifest.counts["documents"]
    assert bank.manifest.counts["documents"]["dropped"]["empty"] == 1
    for kind in ("rejects", "document_duplicates", "document_signatures"):
        expected, found = read_whole(before, kind), read_whole(bank, kind)
        assert (found is None) == (expected is None), kind
        assert found is None or found.equals(expected), kind
    assert_equal_banks(bank, build_fresh(bank, tmp_path))
    assert_sound(bank)
    # The corpus is as it was.
    assert update(store, None, {}, Steps())["unchanged"]


def test_what_cannot_be_restored_is_said(store: LocalStore, other_tokenizer: str) -> None:
    from pipelines.restoring import restore_records
    from pipelines.workspace import Workspace
    from schemas.errors import BankFormatError

    bank = Bank.open(store)
    documents = bank.read_table("documents")
    hashes = pa.array(["0" * 32] * len(documents), pa.string())
    column = documents.schema.get_field_index("content_hash")
    changed = documents.set_column(column, documents.schema.field(column), hashes)

    class Changed(Bank):
        def read_table(self, kind: str, columns: list[str] | None = None) -> pa.Table:
            return changed if kind == "documents" else super().read_table(kind, columns)

    work = Workspace(store.path / "work" / "restored")
    work.create()
    with pytest.raises(BankFormatError, match="document assert of bank .* build the bank for the new model from its"):
        restore_records(work, Changed(store, bank.manifest))
