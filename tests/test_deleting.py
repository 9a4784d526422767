"""Documents taken out of a bank: what goes, what stays, what comes back, and that nothing is made twice."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from flows.building import build, update
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
from schemas.errors import InputError, NothingLeftError
from schemas.manifest import list_versions
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, list_live, read_whole
from tests.test_equality import change_word, make_config, write_corpus

DOCUMENTS = {
    "assert": topics["assert"],
    "global": topics["global"],
    "shares": topics["global"] + "\n\n" + topics["pass"] + topics["del"] + topics["yield"][:400],
    "with": topics["with"],
    "with-near": change_word(topics["with"], 40),
}
"""One stands alone, one shares references with another, and two are near-duplicates in their first reference."""


def build_corpus(folder: Path, documents: dict[str, str], changes: dict[str, Any]) -> Bank:
    path = write_corpus(folder, documents)
    build(LocalStore(folder / "bank"), [str(path)], make_config(changes), Steps())
    return Bank.open(folder / "bank")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_corpus(tmp_path_factory.mktemp("built"), DOCUMENTS, {})


@pytest.fixture
def store(built: Bank, tmp_path: Path) -> LocalStore:
    shutil.copytree(built.url, tmp_path / "bank")
    return LocalStore(tmp_path / "bank")


def build_without(bank: Bank, folder: Path, *names: str) -> Bank:
    """Builds a bank of all documents but some, from a corpus at the same place and with the same configuration."""
    (path,) = map(Path, bank.manifest.config["corpus"])
    content = path.read_bytes()
    try:
        write_corpus(path.parent, {name: text for name, text in DOCUMENTS.items() if name not in names})
        build(LocalStore(folder / "fresh"), [str(path)], read_settings(bank), Steps())
    finally:
        path.write_bytes(content)
    return Bank.open(folder / "fresh")


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns all files of a bank, but for unfinished work."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "work" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def expect_no_change(store: LocalStore) -> Iterator[None]:
    before = read_files(store.path)
    yield
    assert read_files(store.path) == before


def list_references(bank: Bank, doc_id: str) -> list[str]:
    rows = bank.read_table("occurrences").to_pylist()
    return [row["ref_id"] for row in rows if row["doc_id"] == doc_id]


def assert_sound(bank: Bank) -> None:
    assert [check for check in verify_bank(bank, deep=True) if not check.passed] == []


def test_a_document_is_gone_and_counted(store: LocalStore, tmp_path: Path) -> None:
    before = Bank.open(store)
    own = set(list_references(before, "assert"))
    assert own <= list_live(before)
    summary = delete_documents(store, ["assert"])
    assert (summary["version"], summary["operation"], summary["unchanged"]) == (2, "delete", False)
    num = len(DOCUMENTS)
    assert summary["counts"]["documents"] == {"read": num, "kept": num - 1, "dropped": {"deleted": 1}}
    assert summary["counts"]["changes"] == {
        "documents": {"added": 0, "changed": 0, "removed": 1, "unchanged": num - 1, "chunked": 0},
        "references": {"new": 0, "embedded": 0, "encoded": 0},
    }
    bank = Bank.open(store)
    assert bank.manifest.parent == 1
    assert "assert" not in bank.read_table("documents", ["doc_id"])["doc_id"].to_pylist()
    assert set(bank.read_table("tombstones")["ref_id"].to_pylist()) == own
    for kind in ("references", "embeddings", "memories", "shard", "index", "signatures"):
        assert bank.manifest.list_files(kind) == before.manifest.list_files(kind), kind
    assert_equal_banks(bank, build_without(bank, tmp_path, "assert"), same_corpus=False)
    assert_sound(bank)
    assert_sound(Bank.open(store, 1))


def test_what_is_deleted_is_not_found_and_not_read(store: LocalStore) -> None:
    embedder, writer = load_embedder("static"), load_writer(codec=DEFAULT_CODEC)
    before = Bank.open(store)
    own = list_references(before, "assert")
    query = before.read_references(own[:1], ["text"])["text"][0].as_py()
    old_retriever, old_memories = Retriever(before, embedder), BankMemories(before, writer)
    assert old_retriever.search([query], 1)[0][0].ref_id == own[0]
    delete_documents(store, ["assert"])
    bank = Bank.open(store)
    found = {hit.ref_id for hit in Retriever(bank, embedder).search([query], 100)[0]}
    assert found == list_live(bank)
    assert not found & set(own)
    with pytest.raises(InputError, match="it stands in no document any more"):
        BankMemories(bank, writer).fetch(own[:1])
    # Who opened the version before goes on reading it.
    assert old_retriever.search([query], 1)[0][0].ref_id == own[0]
    assert len(old_memories.fetch_records(own[:1])) == 1


def test_a_dry_run_says_what_would_change_and_changes_nothing(store: LocalStore) -> None:
    kept = find_kept_document(Bank.open(store))
    with expect_no_change(store):
        preview = delete_documents(store, [kept], dry_run=True)
    assert (preview["dry_run"], preview["version"]) == (True, 1)
    assert preview["changes"]["references"]["encoded"] > 0
    for stage in ("embeddings", "shards"):
        assert not list((store.path / "work").glob(f"*/{stage}/*")), stage
    summary = delete_documents(store, [kept])
    assert summary["counts"]["changes"] == preview["changes"]
    assert [path.name for path in (store.path / "work").iterdir()] == ["LOCK"]


def test_an_unknown_id_is_refused_whatever_else_is_asked_for(store: LocalStore) -> None:
    with expect_no_change(store):
        with pytest.raises(InputError, match=r"has no document 'nobody'; list them with: memory3 sql --bank"):
            delete_documents(store, ["assert", "nobody"])
        with pytest.raises(InputError, match="has no document ''"):
            delete_documents(store, [""])
    assert list_versions(store) == [1]


def test_the_last_document_cannot_go(store: LocalStore) -> None:
    with expect_no_change(store), pytest.raises(InputError, match="nothing would be left of bank"):
        delete_documents(store, list(DOCUMENTS))
    delete_documents(store, [name for name in DOCUMENTS if name != "assert"])
    with expect_no_change(store), pytest.raises(InputError, match="nothing would be left of bank"):
        delete_documents(store, ["assert"])
    assert list_live(Bank.open(store)) == set(list_references(Bank.open(store), "assert"))
    assert_sound(Bank.open(store))


def test_a_shared_reference_stays(store: LocalStore, tmp_path: Path) -> None:
    before = Bank.open(store)
    shared = set(list_references(before, "global")) & set(list_references(before, "shares"))
    assert shared
    delete_documents(store, ["global"])
    bank = Bank.open(store)
    assert shared <= list_live(bank)
    assert_equal_banks(bank, build_without(bank, tmp_path, "global"), same_corpus=False)
    delete_documents(store, ["shares"])
    assert not shared & list_live(Bank.open(store))


def find_kept_document(bank: Bank) -> str:
    """Returns that of the two near-duplicates whose references are live."""
    kept = set(bank.read_table("duplicates")["kept_ref_id"].to_pylist())
    (name,) = [name for name in ("with", "with-near") if kept & set(list_references(bank, name))]
    return name


def list_dropped(bank: Bank, doc_id: str) -> set[str]:
    """Returns the near-duplicates of the references of a document."""
    kept = set(list_references(bank, doc_id))
    return {row["ref_id"] for row in bank.read_table("duplicates").to_pylist() if row["kept_ref_id"] in kept}


def test_a_near_duplicate_is_promoted_and_its_memory_encoded(store: LocalStore, tmp_path: Path) -> None:
    before = Bank.open(store)
    kept = find_kept_document(before)
    dropped = list_dropped(before, kept)
    assert dropped
    assert not dropped & set(before.read_table("memories", ["ref_id"])["ref_id"].to_pylist())
    summary = delete_documents(store, [kept])
    num = len(dropped)
    assert summary["counts"]["changes"]["references"] == {"new": 0, "embedded": num, "encoded": num}
    bank = Bank.open(store)
    assert dropped <= list_live(bank)
    assert not dropped & set(bank.read_table("duplicates")["ref_id"].to_pylist())
    assert_equal_banks(bank, build_without(bank, tmp_path, kept), same_corpus=False)
    retriever = Retriever(bank, load_embedder("static"))
    for ref_id, text in zip(dropped, bank.read_references(list(dropped), ["text"])["text"].to_pylist(), strict=True):
        assert retriever.search([text], 1)[0][0].ref_id == ref_id
    assert len(BankMemories(bank, load_writer(codec=DEFAULT_CODEC)).fetch_records(sorted(dropped))) == num
    assert_sound(bank)


def test_a_second_deletion_goes_on_from_the_first(store: LocalStore, tmp_path: Path) -> None:
    kept = find_kept_document(Bank.open(store))
    delete_documents(store, [kept])
    with pytest.raises(InputError, match=f"has no document '{kept}'"):
        delete_documents(store, [kept])
    summary = delete_documents(store, ["shares", "shares"])
    num = len(DOCUMENTS)
    assert summary["counts"]["documents"] == {"read": num, "kept": num - 2, "dropped": {"deleted": 2}}
    assert summary["counts"]["changes"]["references"]["encoded"] == 0
    bank = Bank.open(store)
    assert_equal_banks(bank, build_without(bank, tmp_path, kept, "shares"), same_corpus=False)
    assert_sound(Bank.open(store))
    assert list_versions(store) == [1, 2, 3]


def test_an_update_brings_documents_back_and_encodes_nothing_again(store: LocalStore) -> None:
    kept = find_kept_document(Bank.open(store))
    delete_documents(store, [kept, "assert"])
    deleted = Bank.open(store)
    summary = update(store, None, {}, Steps())
    assert not summary["unchanged"]
    assert summary["counts"]["changes"] == {
        "documents": {"added": 2, "changed": 0, "removed": 0, "unchanged": len(DOCUMENTS) - 2, "chunked": 2},
        "references": {"new": 0, "embedded": 0, "encoded": 0},
    }
    bank = Bank.open(store)
    assert_equal_banks(bank, Bank.open(store, 1))
    assert bank.manifest.list_files("shard") == deleted.manifest.list_files("shard")
    assert not bank.manifest.list_files("tombstones")
    assert_sound(bank)


# Banks built otherwise ------------------------------------------------------------------------------------------------


def test_a_near_duplicate_document_comes_back_with_the_next_update(tmp_path: Path) -> None:
    changes = {"document_deduplication": {"enabled": True, "threshold": 0.7}}
    built = build_corpus(tmp_path, DOCUMENTS, changes)
    store = LocalStore(built.url)
    (pair,) = built.read_table("document_duplicates").to_pylist()
    kept, dropped = pair["kept_doc_id"], pair["doc_id"]
    assert {kept, dropped} == {"with", "with-near"}
    (reject,) = built.read_table("rejects").to_pylist()
    assert reject["doc_id"] == dropped
    summary = delete_documents(store, [kept])
    num = len(DOCUMENTS)
    assert summary["counts"]["documents"] == {
        "read": num,
        "kept": num - 2,
        "dropped": {reject["reason"]: 1, "deleted": 1},
    }
    bank = Bank.open(store)
    # Nothing names the deleted document any more.
    assert kept in reject["detail"]
    assert bank.read_table("rejects").to_pylist() == [{**reject, "detail": "to a document that is gone"}]
    assert len(bank.read_table("document_duplicates")) == 0
    assert kept not in bank.read_table("document_signatures")["doc_id"].to_pylist()
    assert not {kept, dropped} & set(bank.read_table("documents")["doc_id"].to_pylist())
    assert_sound(bank)
    write_corpus(tmp_path, {name: text for name, text in DOCUMENTS.items() if name != kept})
    update(store, None, {}, Steps())
    bank = Bank.open(store)
    assert dropped in bank.read_table("documents")["doc_id"].to_pylist()
    assert_equal_banks(bank, build_without(bank, tmp_path, kept), same_corpus=False)
    assert_sound(bank)


def test_whoever_was_dropped_by_way_of_a_deleted_document_is_left_out(tmp_path: Path) -> None:
    """Four documents in a chain, each like the next: one is kept for all, and they are joined through one another."""
    words = [*topics["with"].split()[:300]]
    documents = {}
    for step, name in enumerate("dbca"):
        documents[name] = " ".join(f"{word}{step}" if place < 12 * step else word for place, word in enumerate(words))
    changes = {"document_deduplication": {"enabled": True, "threshold": 0.7}}
    built = build_corpus(tmp_path, {**documents, "assert": topics["assert"]}, changes)
    pairs = {row["doc_id"]: row for row in built.read_table("document_duplicates").to_pylist()}
    assert len(pairs) == 3
    (kept,) = {row["kept_doc_id"] for row in pairs.values()}
    deleted = next(row["matched_doc_id"] for row in pairs.values() if row["matched_doc_id"] != kept)
    delete_documents(LocalStore(built.url), [deleted])
    bank = Bank.open(built.url)
    left = bank.read_table("document_duplicates").to_pylist()
    assert len(left) < 2
    assert not [row for row in left if deleted in row.values()]
    assert_sound(bank)
    delete_documents(LocalStore(built.url), [kept])
    assert len(Bank.open(built.url).read_table("document_duplicates")) == 0
    assert_sound(Bank.open(built.url))


def test_a_document_that_was_dropped_can_be_deleted(tmp_path: Path) -> None:
    changes = {"document_deduplication": {"enabled": True, "threshold": 0.7}}
    built = build_corpus(tmp_path, DOCUMENTS, changes)
    (pair,) = built.read_table("document_duplicates").to_pylist()
    live = list_live(built)
    summary = delete_documents(LocalStore(built.url), [pair["doc_id"]])
    num = len(DOCUMENTS)
    assert summary["counts"]["documents"] == {"read": num, "kept": num - 1, "dropped": {"deleted": 1}}
    bank = Bank.open(built.url)
    assert list_live(bank) == live
    for kind in ("rejects", "document_duplicates"):
        assert len(bank.read_table(kind)) == 0, kind
    assert pair["doc_id"] not in bank.read_table("document_signatures")["doc_id"].to_pylist()
    assert_sound(bank)


def test_a_cold_bank_stays_cold(tmp_path: Path) -> None:
    built = build_corpus(tmp_path, DOCUMENTS, {"memory": {"cold": True}})
    kept = find_kept_document(built)
    dropped = list_dropped(built, kept)
    summary = delete_documents(LocalStore(built.url), [kept])
    assert summary["counts"]["changes"]["references"] == {"new": 0, "embedded": len(dropped), "encoded": 0}
    bank = Bank.open(built.url)
    assert bank.manifest.cold
    assert not bank.manifest.list_files("memories")
    assert list_live(bank) >= dropped
    memories = BankMemories(bank, load_writer(codec=DEFAULT_CODEC))
    memories.fetch_records(sorted(dropped))
    assert memories.statistics.num_encoded == len(dropped)
    assert_sound(bank)


def test_what_was_contaminated_stays_out(tmp_path: Path) -> None:
    tests = tmp_path / "tests.jsonl"
    write_corpus(tmp_path, {"t": topics["pass"] + topics["del"]}).rename(tests)
    changes = {"decontamination": {"paths": [str(tests)]}}
    built = build_corpus(tmp_path, DOCUMENTS, changes)
    contaminated = set(built.read_table("contaminated")["ref_id"].to_pylist())
    assert contaminated
    kept = find_kept_document(built)
    delete_documents(LocalStore(built.url), [kept])
    bank = Bank.open(built.url)
    assert set(bank.read_table("contaminated")["ref_id"].to_pylist()) == contaminated
    assert not contaminated & list_live(bank)
    assert_equal_banks(bank, build_without(bank, tmp_path, kept), same_corpus=False)
    assert_sound(bank)
    own = set(list_references(bank, "shares"))
    assert contaminated <= own
    delete_documents(LocalStore(built.url), ["shares"])
    bank = Bank.open(built.url)
    assert read_whole(bank, "contaminated").num_rows == 0  # type: ignore[union-attr]
    assert contaminated <= set(bank.read_table("tombstones")["ref_id"].to_pylist())
    assert_sound(bank)


def test_a_bank_of_contaminated_references_only_is_refused(tmp_path: Path) -> None:
    tests = tmp_path / "tests.jsonl"
    write_corpus(tmp_path, {"t": topics["pass"]}).rename(tests)
    documents = {"assert": topics["assert"], "pass": topics["pass"]}
    built = build_corpus(tmp_path, documents, {"decontamination": {"paths": [str(tests)]}})
    store = LocalStore(built.url)
    with expect_no_change(store), pytest.raises(NothingLeftError, match="contaminated"):
        delete_documents(store, ["assert"])
