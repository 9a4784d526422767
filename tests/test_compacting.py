"""A version rewritten as one segment: the files of a fresh build, nothing encoded, and no damage carried over."""

import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from flows.building import build, update
from flows.compacting import compact_bank, is_compact
from flows.deleting import delete_documents
from flows.drafting import read_settings
from flows.steps import Steps
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.loading import load_writer
from model.retrieving import Retriever
from schemas.bank import Bank
from schemas.codec_names import DEFAULT_CODEC
from schemas.errors import BankFormatError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, list_live, read_memories
from tests.test_equality import change_word, make_config, write_corpus

FIRST = {
    "assert": topics["assert"],
    "global": topics["global"],
    "near": change_word(topics["with"], 40),
    "with": topics["with"],
}
SECOND = {"assert": topics["assert"] + topics["pass"], "del": topics["del"], "near": FIRST["near"], "empty": ""}
LEFT = {name: text for name, text in SECOND.items() if name != "del"}

SHARDS: dict[str, Any] = {"references_per_shard": 4}


def build_history(folder: Path, changes: dict[str, Any]) -> LocalStore:
    """Makes a bank of three versions: documents added, changed, gone with an update, and one deleted."""
    store = LocalStore(folder / "bank")
    path = write_corpus(folder, FIRST)
    build(store, [str(path)], make_config(changes), Steps())
    write_corpus(folder, SECOND)
    update(store, None, {}, Steps())
    delete_documents(store, ["del"])
    return store


def build_fresh(bank: Bank, folder: Path) -> Bank:
    (path,) = map(Path, bank.manifest.config["corpus"])
    write_corpus(path.parent, LEFT)
    build(LocalStore(folder / "fresh"), [str(path)], read_settings(bank), Steps())
    return Bank.open(folder / "fresh")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return build_history(tmp_path_factory.mktemp("grown"), {"memory": SHARDS})


@pytest.fixture
def store(grown: LocalStore, tmp_path: Path) -> LocalStore:
    shutil.copytree(grown.path, tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


def assert_sound(bank: Bank) -> None:
    assert [check for check in verify_bank(bank, deep=True) if not check.passed] == []


def list_segments(bank: Bank) -> set[str]:
    return {file.path.rpartition("/")[0] for file in bank.manifest.files}


def test_a_compact_version_is_that_of_a_fresh_build_and_nothing_is_encoded(store: LocalStore, tmp_path: Path) -> None:
    before = Bank.open(store)
    live = list_live(before)
    records = read_memories(before, live)
    assert len(list_segments(before)) == 3
    assert not is_compact(before)
    summary = compact_bank(store)
    assert (summary["version"], summary["operation"], summary["unchanged"]) == (4, "compact", False)
    bank = Bank.open(store)
    assert is_compact(bank)
    assert len(list_segments(bank)) == 1
    assert not bank.manifest.list_files("tombstones")
    for name in ("documents", "references", "pairs_not_compared"):
        assert bank.manifest.counts[name] == before.manifest.counts[name], name
    assert {"embed", "write", "models"}.isdisjoint(summary["seconds"])
    # The very bytes: models would have left others, as what a memory was written beside shows in its last bits.
    copied = read_memories(bank, live)
    assert all(np.array_equal(copied[ref_id], record) for ref_id, record in records.items())
    assert sum(file.num_rows for file in bank.manifest.list_files("shard")) == len(live)

    fresh = build_fresh(bank, tmp_path)
    assert_equal_banks(bank, fresh, same_corpus=False)
    found = {file.path.rpartition("/")[2]: file for file in bank.manifest.files}
    expected = {file.path.rpartition("/")[2]: file for file in fresh.manifest.files}
    assert found.keys() == expected.keys()
    differing = {name for name in expected if found[name].sha256 != expected[name].sha256}
    # Other bits of memories; other places in the corpus, of which what was deleted was a part.
    assert {name for name in differing if not name.startswith("shard")} <= {"documents.parquet", "rejects.parquet"}
    assert all(found[name].num_rows == expected[name].num_rows for name in expected)
    assert_sound(bank)
    assert_sound(Bank.open(store, 3))


def test_a_compact_bank_is_searched_and_read_as_before(store: LocalStore) -> None:
    before, embedder, writer = Bank.open(store), load_embedder("static"), load_writer(codec=DEFAULT_CODEC)
    retriever, memories = Retriever(before, embedder), BankMemories(before, writer)
    queries = [topics["with"][:200], topics["pass"][:200], "what is deleted"]
    expected = retriever.search(queries, 8)
    compact_bank(store)
    bank = Bank.open(store)
    assert Retriever(bank, embedder).search(queries, 8) == expected
    ref_ids = sorted({hit.ref_id for hits in expected for hit in hits})
    after = BankMemories(bank, writer)
    assert np.array_equal(after.fetch_records(ref_ids), memories.fetch_records(ref_ids))
    assert after.statistics.num_encoded == 0
    # Who has the version before open goes on.
    assert retriever.search(queries, 8) == expected


def test_a_compact_bank_stays_as_it_is(store: LocalStore) -> None:
    compact_bank(store)
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    before.pop(store.path / "work" / "LOCK")
    summary = compact_bank(store)
    assert (summary["version"], summary["unchanged"]) == (4, True)
    after = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    after.pop(store.path / "work" / "LOCK")
    assert after == before
    first = Bank.open(store, 1)
    assert is_compact(first)


def test_an_update_goes_on_from_a_compact_version(store: LocalStore, tmp_path: Path) -> None:
    compact_bank(store)
    (tmp_path / "next").mkdir()
    path = write_corpus(tmp_path / "next", SECOND)
    summary = update(store, [str(path)], {}, Steps())
    changes = summary["counts"]["changes"]
    assert changes["documents"] == {"added": 1, "changed": 0, "removed": 0, "unchanged": 2, "chunked": 1}
    # What was deleted is forgotten by a compact version, and made again.
    assert changes["references"]["encoded"] == changes["references"]["new"] > 0
    bank = Bank.open(store)
    build(LocalStore(tmp_path / "fresh"), [str(path)], read_settings(bank), Steps())
    assert_equal_banks(bank, Bank.open(tmp_path / "fresh"))
    assert_sound(bank)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"cold": True}},
        {"memory": SHARDS, "deduplication": {"enabled": False}},
        {"memory": SHARDS, "document_deduplication": {"enabled": True, "threshold": 0.7}},
    ],
    ids=["cold", "not-compared", "documents-compared"],
)
def test_banks_of_other_kinds(changes: dict[str, Any], tmp_path: Path) -> None:
    store = build_history(tmp_path, changes)
    before = Bank.open(store)
    kinds = {file.kind for file in before.manifest.files} - {"tombstones"}
    compact_bank(store)
    bank = Bank.open(store)
    assert is_compact(bank)
    assert bank.manifest.cold == before.manifest.cold
    assert {file.kind for file in bank.manifest.files} == kinds
    assert list_live(bank) == list_live(before)
    for kind in ("documents", "occurrences", "rejects", "duplicates"):
        assert bank.read_table(kind).equals(before.read_table(kind)), kind
    assert bank.read_table("embeddings", ["ref_id"])["ref_id"].to_pylist() == sorted(list_live(bank))
    assert_sound(bank)


def test_contaminated_references_stay_out(tmp_path: Path) -> None:
    tests = tmp_path / "tests.jsonl"
    write_corpus(tmp_path, {"t": topics["assert"]}).rename(tests)
    store = build_history(tmp_path, {"memory": SHARDS, "decontamination": {"paths": [str(tests)]}})
    before = Bank.open(store)
    assert len(before.read_table("contaminated"))
    tests.unlink()  # nothing new is looked at
    compact_bank(store)
    bank = Bank.open(store)
    assert bank.read_table("contaminated").equals(before.read_table("contaminated"))
    assert list_live(bank) == list_live(before)
    assert_sound(bank)


COPIED_KINDS = ("documents", "occurrences", "references", "signatures", "embeddings", "memories", "duplicates", "shard")


@pytest.mark.parametrize("kind", COPIED_KINDS)
def test_damage_is_not_copied_into_a_sound_version(kind: str, store: LocalStore) -> None:
    file = Bank.open(store).manifest.list_files(kind)[0]
    path = store.path / file.path
    content = bytearray(path.read_bytes())
    # Of a shard all records, since one of a reference that is not live any more is not copied.
    for place in range(len(content) // 3, len(content), 2048 if kind == "shard" else len(content)):
        content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(BankFormatError, match="damaged|has changed since it was written"):
        compact_bank(store)
    assert list_versions(store) == [1, 2, 3]


def test_a_missing_file_is_named(store: LocalStore) -> None:
    file = Bank.open(store).manifest.list_files("shard")[0]
    (store.path / file.path).unlink()
    with pytest.raises(BankFormatError, match=rf"{file.path} is missing from the bank"):
        compact_bank(store)
    assert list_versions(store) == [1, 2, 3]
