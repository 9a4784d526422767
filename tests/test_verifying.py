"""``memory3 verify`` on a real bank of two segments: sound as it is, and every lie in a table found and named.

The lies are told well: the manifest has the right sizes, digests and numbers of rows, so that only looking at the
tables themselves, and at each other, can find them.
"""

import dataclasses
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.steps import Steps
from flows.verifying import Check, verify_bank
from model.cold import ColdStore
from pipelines.auditing import (
    audit_cold_store,
    audit_embeddings,
    audit_hashes,
    audit_headers,
    audit_manifest,
    audit_memories,
    audit_references,
    audit_sizes,
    audit_tables,
    audit_tags,
    list_notes,
)
from pipelines.running import LOOP_RUNNER
from schemas.bank import Bank
from schemas.manifest import FileEntry, make_manifest_name
from schemas.shards import write_shard
from schemas.stores import LocalStore
from schemas.tables import write_table
from tests.corpora import make_documents, write_lines

Change = Callable[[pa.Table], pa.Table]


def build_history(folder: Path, **changes: Any) -> Bank:
    """Builds a bank and updates it, so that its second version has every kind of table, in two segments.

    Documents and references have near-duplicates, some references are contaminated, and some stand in no document of
    the second version.
    """
    near = topics["class"].replace("inheritance", "heritage")[:1500] + topics["numbers"] + topics["for"]
    mixed = {"id": "mixed", "text": near, "source": "copies"}
    class_document = {"id": "topic/class", "text": topics["class"], "source": "topics"}
    documents = [*make_documents(), mixed, class_document]
    corpus = write_lines(folder / "corpus.jsonl", documents)
    tests = write_lines(folder / "tests.jsonl", [{"id": "question", "text": topics["assert"]}])
    settings = {
        "engine": {"runner": LOOP_RUNNER, "num_workers": 1},
        "document_deduplication": {"enabled": True},
        "decontamination": {"paths": [str(tests)]},
        "memory": {"references_per_shard": 16},
        **changes,
    }
    store = LocalStore(folder / "bank")
    build(store, [str(corpus)], apply_changes(BuildConfig(), settings), Steps())
    later = [document for document in documents if document["id"] not in ("topic/yield", "topic/global")]
    later.append({"id": "topic/while", "text": topics["while"] + topics["try"], "source": "topics"})
    write_lines(corpus, later)
    update(store, None, {}, Steps())
    return Bank.open(store)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_history(tmp_path_factory.mktemp("history"))


@pytest.fixture
def bank(original: Bank, tmp_path: Path) -> Bank:
    """A copy of the bank that may be damaged."""
    shutil.copytree(original.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


def list_failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


def believe(bank: Bank, *files: FileEntry) -> Bank:
    """Commits that the files are right as they are now: sizes, digests and rows in the manifest fit them."""
    changed = {}
    for file in files:
        path = Path(bank.url) / file.path
        content = path.read_bytes()
        num_rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else file.num_rows
        changed[file.path] = dataclasses.replace(
            file, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), num_rows=num_rows
        )
    return rewrite_manifest(bank, files=[changed.get(file.path, file) for file in bank.manifest.files])


def rewrite_manifest(bank: Bank, **changes: Any) -> Bank:
    manifest = dataclasses.replace(bank.manifest, **changes)
    (Path(bank.url) / make_manifest_name(manifest.version)).write_text(manifest.to_json())
    return Bank.open(bank.store, manifest.version)


def replace_table(bank: Bank, kind: str, change: Change, segment: int = 0) -> tuple[Bank, str]:
    """Changes one table, and the manifest with it; returns the bank and the path of the file."""
    file = bank.manifest.list_files(kind)[segment]
    path = Path(bank.url) / file.path
    table = pq.read_table(path)
    write_table(change(table).cast(table.schema), path)
    return believe(bank, file), file.path


def set_value(column: str, row: int, value: Any) -> Change:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        index = table.schema.get_field_index(column)
        return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))

    return change


def drop_row(row: int) -> Change:
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def swap_rows(table: pa.Table) -> pa.Table:
    return table.take(pa.array([1, 0, *range(2, len(table))]))


def repeat_row(table: pa.Table) -> pa.Table:
    return table.take(pa.array([0, *range(len(table))]))


# A sound bank ---------------------------------------------------------------------------------------------------------


def test_the_bank_has_every_kind_of_file_in_two_segments(original: Bank) -> None:
    kinds = [file.kind for file in original.manifest.files]
    parted = {"references", "signatures", "embeddings", "memories", "shard", "index"}
    whole = {"documents", "occurrences", "rejects", "duplicates", "document_duplicates", "document_signatures"}
    assert set(kinds) == parted | whole | {"contaminated", "tombstones"}
    assert all(kinds.count(kind) == 2 for kind in parted - {"shard"})
    assert all(file.num_rows for file in original.manifest.files)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("deep", [False, True])
def test_every_version_is_sound(bank: Bank, version: int, deep: bool) -> None:
    checks = verify_bank(Bank.open(bank.store, version), deep=deep)
    assert list_failed(checks) == {}
    assert {check.name: check.detail for check in checks}["notes"] == "none"
    said = json.loads((Path(bank.url) / f"checks/{version:08d}.json").read_text())
    assert (said["version"], said["deep"], said["passed"]) == (version, deep, True)
    assert [row["name"] for row in said["checks"]] == [check.name for check in checks[:-1]]


def test_a_cold_bank_is_sound_before_and_after_it_is_used(bank: Bank) -> None:
    files = [file for file in bank.manifest.files if file.kind not in ("memories", "shard")]
    bank = rewrite_manifest(bank, files=files, cold=True)
    assert list_failed(verify_bank(bank)) == {}
    store = ColdStore(bank.store.scratch, bank.manifest.fingerprint.digest)
    layout, ref_id = bank.manifest.layout, "ab" * 16
    payload = np.zeros((1, layout.payload_bytes), np.uint8)
    records = layout.pack(payload, np.zeros((1, *layout.offsets_shape), np.uint8), [ref_id])
    store.save([ref_id], records)
    store.close()
    assert audit_cold_store(bank) == ([], "1 memories encoded when retrieved")
    (path,) = (Path(bank.url) / "cold").glob("*.sqlite")
    with sqlite3.connect(path) as connection:
        records[0, 100] ^= 1
        connection.execute("UPDATE records SET record = ?", [records.tobytes()])
    assert f"{path} is damaged" in audit_cold_store(bank).wrong[0]
    assert ref_id in audit_cold_store(bank).wrong[0]
    path.write_bytes(b"not a database" * 1000)
    assert f"{path} is damaged" in list_failed(verify_bank(bank))["cold store"]


def test_a_bank_that_cannot_be_written_to_is_verified(bank: Bank) -> None:
    (Path(bank.url) / "checks").write_text("a file where the folder should be")
    checks = verify_bank(bank, deep=False)
    assert list_failed(checks) == {}
    assert checks[-1].name == "notes"
    assert "checks/00000002.json cannot be written" in checks[-1].detail


def test_the_result_says_what_failed(bank: Bank) -> None:
    file = bank.manifest.list_files("rejects")[0]
    (Path(bank.url) / file.path).unlink()
    checks = verify_bank(bank)
    assert list_failed(checks)["files"] == f"{file.path} is missing"
    assert "not done" in list_failed(checks)["encoded again"]
    said = json.loads((Path(bank.url) / "checks/00000002.json").read_text())
    assert said["passed"] is False
    assert {row["name"]: row["detail"] for row in said["checks"]}["files"] == f"{file.path} is missing"


# Notes, tags and counts -----------------------------------------------------------------------------------------------


def test_what_belongs_to_no_version_is_noted(bank: Bank) -> None:
    folder = Path(bank.url)
    first = bank.manifest.list_files("references")[0].path
    (folder / first).with_name("stray.parquet").write_bytes(b"")
    (folder / "segments" / "half").mkdir()
    (folder / "segments" / "half" / "x.tmp").write_bytes(b"")
    (folder / "manifests" / "00000003.json.77.tmp").write_bytes(b"")
    notes = "; ".join(list_notes(bank))
    assert "stray.parquet belongs to no version" in notes
    assert "segments/half/x.tmp belongs to no version" in notes
    assert "manifests/00000003.json.77.tmp is unfinished" in notes
    assert len(list_notes(bank)) == 3
    assert list_failed(verify_bank(bank, deep=False)) == {}


def test_other_versions_that_are_not_whole_are_noted(bank: Bank) -> None:
    folder = Path(bank.url)
    first = Bank.open(bank.store, 1)
    mine = {file.path for file in bank.manifest.files}
    gone = next(file.path for file in first.manifest.files if file.path not in mine)
    (folder / gone).unlink()
    assert list_notes(bank) == [f"version 1 lacks {gone}, or it has another size"]
    (folder / make_manifest_name(1)).write_text("{")
    assert "version 1 cannot be opened" in list_notes(bank)[0]
    (folder / make_manifest_name(1)).unlink()
    notes = list_notes(bank)
    assert notes[0] == "version 1, from which this one was made, is gone"
    assert all("belongs to no version" in note for note in notes[1:])


@pytest.mark.parametrize("content", ['{"version": 9}', '{"version": "1"}', "{", "[]", '{"version": true}', "[" * 9999])
def test_a_tag_of_no_version_is_named(bank: Bank, content: str) -> None:
    bank.store.replace("tags/good.json", b'{"version": 1}\n')
    assert audit_tags(bank) == ([], "1 tags")
    bank.store.replace("tags/bad.json", content.encode())
    (found,) = audit_tags(bank).wrong
    assert found.startswith("tags/bad.json ")


@pytest.mark.parametrize(
    ("what", "key", "message"),
    [
        ("documents", "read", "documents read, but"),
        ("references", "kept", "references read, but"),
        ("references", "dropped", "does not count the references"),
    ],
)
def test_counts_that_do_not_add_up_are_found(bank: Bank, what: str, key: str, message: str) -> None:
    counts = json.loads(json.dumps(bank.manifest.counts))
    if key == "dropped":
        del counts[what][key]
    else:
        counts[what][key] += 1
    (found,) = audit_manifest(rewrite_manifest(bank, counts=counts)).wrong
    assert found.startswith("manifests/00000002.json")
    assert message in found


def test_counts_that_add_up_but_are_not_true_are_found(bank: Bank) -> None:
    counts = json.loads(json.dumps(bank.manifest.counts))
    counts["documents"]["read"] += 1
    counts["documents"]["kept"] += 1
    assert audit_manifest(rewrite_manifest(bank, counts=counts)).wrong == []
    assert "manifests/00000002.json counts" in "; ".join(audit_tables(Bank.open(bank.store)).wrong)


def test_files_of_a_wrong_number_or_kind_are_found(bank: Bank) -> None:
    files = bank.manifest.files
    without = [file for file in files if file.kind != "occurrences"]
    assert "no file of the kind 'occurrences'" in audit_manifest(rewrite_manifest(bank, files=without)).wrong[0]
    documents = bank.manifest.list_files("documents")[0]
    twice = dataclasses.replace(documents, path=documents.path.replace("documents", "documents2"))
    assert "2 files of the kind 'documents'" in audit_manifest(rewrite_manifest(bank, files=[*files, twice])).wrong[0]
    unknown = dataclasses.replace(twice, kind="novelties")
    assert "unknown kind 'novelties'" in audit_manifest(rewrite_manifest(bank, files=[*files, unknown])).wrong[0]
    references = bank.manifest.list_files("references")[0]
    again = dataclasses.replace(references, path=references.path.replace("references", "references2"))
    wrong = audit_manifest(rewrite_manifest(bank, files=[*files, again])).wrong
    assert "2 files of the kind 'references' in the segment" in wrong[0]


# Tables against each other --------------------------------------------------------------------------------------------

OTHER_ID = "0" * 31 + "1"

LIES: list[tuple[str, int, Change, str]] = [
    ("documents", 0, swap_rows, "not sorted by doc_id"),
    ("documents", 0, repeat_row, "not sorted by doc_id"),
    ("documents", 0, drop_row(2), "occurrences of other documents"),
    ("documents", 0, set_value("num_references", 2, lambda number: number + 1), "other numbers of references"),
    ("documents", 0, set_value("size_bytes", 2, lambda number: number + 1), "do not reach its end"),
    ("documents", 0, set_value("num_chars", 2, lambda number: number - 1), "do not reach its end"),
    ("occurrences", 0, drop_row(3), "occurrences"),
    ("occurrences", 0, set_value("ordinal", 1, 7), "does not number the references"),
    ("occurrences", 0, set_value("start_byte", 1, lambda place: place + 1), "do not follow each other (start_byte)"),
    ("occurrences", 0, set_value("start_char", 1, lambda place: place - 1), "do not follow each other (start_char)"),
    ("occurrences", 0, set_value("start_byte", 0, 1), "do not follow each other (start_byte)"),
    ("occurrences", 0, set_value("ref_id", 1, OTHER_ID), "names references not stored"),
    ("references", 0, drop_row(0), "names references not stored"),
    ("references", 1, swap_rows, "not sorted by ref_id"),
    ("references", 1, repeat_row, "not sorted by ref_id"),
    ("tombstones", 0, drop_row(0), "lacks references that stand in no document"),
    ("tombstones", 0, set_value("ref_id", 0, OTHER_ID), "that stand in a document or are not stored"),
    ("embeddings", 0, drop_row(0), "lacks live references"),
    ("embeddings", 1, set_value("ref_id", 0, OTHER_ID), "names references not stored"),
    ("memories", 0, drop_row(4), "lacks live references"),
    ("memories", 1, repeat_row, "an id stands more than once"),
    ("signatures", 0, drop_row(0), "lacks references that were compared"),
    ("duplicates", 0, set_value("kept_ref_id", 0, OTHER_ID), "keeps texts that are not live"),
    ("duplicates", 0, set_value("ref_id", 0, OTHER_ID), "drops texts that are not there"),
    ("duplicates", 0, set_value("cluster", 0, "f" * 32), "a cluster that is not named by its least id"),
    ("duplicates", 0, set_value("jaccard", 0, 1.5), "has a jaccard outside"),
    ("duplicates", 0, set_value("jaccard", 0, float("nan")), "has a jaccard outside"),
    ("duplicates", 0, set_value("matched_jaccard", 0, 0.79), "has a matched_jaccard outside of [0.8, 1]"),
    ("duplicates", 0, set_value("matched_ref_id", 0, OTHER_ID), "matches texts that are in no cluster"),
    ("contaminated", 0, set_value("ref_id", 0, OTHER_ID), "names references not stored"),
    ("contaminated", 0, set_value("overlap", 0, 0.0), "has an overlap outside"),
    ("document_duplicates", 0, set_value("kept_doc_id", 0, "nobody"), "keeps texts that are not live"),
    ("document_duplicates", 0, set_value("doc_id", 0, "topic/assert"), "drops documents that are kept"),
    ("document_signatures", 0, drop_row(0), "lacks documents that were compared"),
    ("document_signatures", 0, set_value("doc_id", 0, "!"), "has documents that are not there"),
    ("rejects", 0, drop_row(0), "other numbers of reasons"),
    ("rejects", 0, set_value("reason", 0, "whim"), "other numbers of reasons"),
]


@pytest.mark.parametrize(("kind", "segment", "change", "message"), LIES)
def test_a_lie_in_a_table_is_found(bank: Bank, kind: str, segment: int, change: Change, message: str) -> None:
    liar, path = replace_table(bank, kind, change, segment)
    assert audit_hashes(liar).wrong == []
    assert audit_headers(liar).wrong == []
    found = [finding for finding in audit_tables(liar).wrong if message in finding]
    assert found
    assert any(path in finding or "manifests/00000002.json" in finding for finding in found)


def test_two_live_texts_in_a_cluster_are_found(bank: Bank) -> None:
    duplicates = bank.read_table("duplicates")
    row = duplicates.to_pylist()[0]
    occurring = sorted(set(bank.read_table("occurrences")["ref_id"].to_pylist()))
    dropped = set(bank.read_dropped_ids().to_pylist())
    other = next(ref_id for ref_id in occurring if ref_id not in dropped and ref_id != row["kept_ref_id"])
    another = next(ref_id for ref_id in reversed(occurring) if ref_id not in {*dropped, other, row["kept_ref_id"]})
    added = pa.Table.from_pylist([{**row, "ref_id": another, "kept_ref_id": other, "matched_ref_id": other}])
    liar, path = replace_table(
        bank, "duplicates", lambda table: pa.concat_tables([table, added.cast(table.schema)]).sort_by("ref_id")
    )
    assert any(path in finding and "two live texts" in finding for finding in audit_tables(liar).wrong)


def test_an_id_in_two_segments_is_found(bank: Bank) -> None:
    for kind in ("references", "embeddings", "memories"):
        first = bank.manifest.list_files(kind)[0]
        row = pq.read_table(Path(bank.url) / first.path).slice(3, 1)

        def add(table: pa.Table, row: pa.Table = row) -> pa.Table:
            return pa.concat_tables([table, row]).sort_by("ref_id")

        bank, path = replace_table(bank, kind, add, segment=1)
        found = [finding for finding in audit_tables(bank).wrong if "more than once" in finding and path in finding]
        assert found
        assert first.path in found[0]


def test_references_may_overlap_only_where_that_is_configured(bank: Bank) -> None:
    place = bank.read_table("occurrences", ["ordinal"])["ordinal"].to_pylist().index(1)
    liar, path = replace_table(bank, "occurrences", set_value("start_byte", place, lambda start: start - 1))
    (found,) = audit_tables(liar).wrong
    assert path in found
    config = json.loads(json.dumps(bank.manifest.config))
    config["chunking"]["overlap_tokens"] = 16
    assert audit_tables(rewrite_manifest(liar, config=config)).wrong == []


# Rows of one table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("token_ids", lambda tokens: [tokens[0] + 1, *tokens[1:]], "whose ids are not those of their tokens"),
        ("ref_id", OTHER_ID, "whose ids are not those of their tokens, for instance " + OTHER_ID),
        ("num_tokens", lambda number: number - 1, "num_tokens is not the number"),
        ("token_ids", lambda tokens: tokens[:-1], "num_tokens is not the number"),
    ],
)
def test_a_reference_that_is_not_its_tokens_is_found(bank: Bank, column: str, value: Any, message: str) -> None:
    liar, path = replace_table(bank, "references", set_value(column, 0, value), segment=1)
    (found,) = audit_references(liar).wrong
    assert path in found
    assert message in found


def test_a_reference_that_is_too_long_is_found(bank: Bank) -> None:
    config = json.loads(json.dumps(bank.manifest.config))
    config["chunking"]["max_tokens"] = 64
    assert "more than 64" in audit_references(rewrite_manifest(bank, config=config)).wrong[0]


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf"), 1.01])
def test_a_vector_of_another_length_is_found(bank: Bank, factor: float) -> None:
    change = set_value("vector", 2, lambda vector: [factor * value for value in vector])
    liar, path = replace_table(bank, "embeddings", change, segment=1)
    (found,) = audit_embeddings(liar).wrong
    assert path in found
    assert liar.read_table("embeddings", ["ref_id"])["ref_id"].to_pylist()


def test_a_text_without_a_known_word_may_have_no_vector(bank: Bank) -> None:
    liar, _ = replace_table(bank, "embeddings", set_value("vector", 2, lambda vector: [0.0] * len(vector)), segment=1)
    assert audit_embeddings(liar).wrong == []


# Memories and indexes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("row", 1, "names a row of"),
        ("row", -1, "names rows that"),
        ("row", 99, "names rows that"),
        ("shard", "shard-000009.safetensors", "which is not in its segment"),
        ("shard", "../x", "which is not in its segment"),
        ("offsets", lambda offsets: [(offsets[0] + 1) % 256, *offsets[1:]], "has other offsets than the records of"),
        ("ref_id", OTHER_ID, f"in place of that of {OTHER_ID}"),
        ("ref_id", "no id", "'no id' is no id"),
    ],
)
def test_a_place_of_a_memory_that_is_not_true_is_found(bank: Bank, column: str, value: Any, message: str) -> None:
    liar, path = replace_table(bank, "memories", set_value(column, 0, value), segment=0)
    assert audit_headers(liar).wrong == []
    found = audit_memories(liar).wrong
    assert len(found) == 1
    assert message in found[0]
    assert path.rpartition("/")[0] in found[0] or "no id" in message


def test_a_memory_that_no_reference_has_is_found(bank: Bank) -> None:
    liar, path = replace_table(bank, "memories", drop_row(0), segment=0)
    (found,) = audit_memories(liar).wrong
    assert "has memories that" in found
    assert path in found


def test_shards_of_another_size_or_without_a_table_are_found(bank: Bank) -> None:
    file = bank.manifest.list_files("shard")[0]
    with bank.open_shard(file) as shard:
        records = shard.read(range(shard.num_records - 1))
    write_shard(Path(bank.url) / file.path, records, bank.manifest.layout, bank.manifest.fingerprint.digest)
    assert file.path in audit_sizes(bank).wrong[0]
    liar = believe(bank, file)
    assert file.path in audit_headers(liar).wrong[0]
    lonely = [file for file in bank.manifest.files if file.kind != "memories"]
    assert "in no table of memories" in audit_memories(rewrite_manifest(bank, files=lonely)).wrong[0]


def test_an_index_of_other_vectors_is_found(bank: Bank) -> None:
    first, second = bank.manifest.list_files("embeddings")
    vectors = pq.read_table(Path(bank.url) / second.path)["vector"].to_pylist()
    liar, path = replace_table(bank, "embeddings", set_value("vector", 3, vectors[1]), segment=0)
    failed = list_failed(verify_bank(liar))
    assert path in failed["indexes"]
    assert first.path.rpartition("/")[0] in failed["indexes"]
    index = bank.manifest.list_files("index")
    shutil.copy(Path(bank.url) / index[1].path, Path(bank.url) / index[0].path)
    failed = list_failed(verify_bank(believe(liar, index[0]), deep=False))
    assert index[0].path in failed["indexes"]


def test_an_inverted_file_is_compared_with_its_embeddings(bank: Bank) -> None:
    from pipelines.indexing import write_index

    file = bank.manifest.list_files("index")[0]
    table = bank.manifest.list_files("embeddings")[0]
    vectors = np.array(pq.read_table(Path(bank.url) / table.path)["vector"].to_pylist(), np.float32)
    write_index(vectors, Path(bank.url) / file.path, "IVF2,SQ8")
    assert "indexes" not in list_failed(verify_bank(believe(bank, file)))
    vectors[[3, 4]] = vectors[[4, 3]]
    write_index(vectors, Path(bank.url) / file.path, "IVF2,SQ8")
    assert file.path in list_failed(verify_bank(believe(bank, file)))["indexes"]


# What models say ------------------------------------------------------------------------------------------------------


def test_memories_of_other_numbers_are_found(bank: Bank) -> None:
    """Every record is whole and in its place, but the model would write others."""
    table = bank.read_table("memories", ["ref_id", "shard", "row"])
    layout = bank.manifest.layout
    files = bank.manifest.list_files("shard")
    for file in files:
        with bank.open_shard(file) as shard:
            records = shard.read(range(shard.num_records))
        payload, offsets = layout.unpack(records)
        packed = layout.pack(payload ^ 0x40, offsets, layout.read_ref_ids(records))
        write_shard(Path(bank.url) / file.path, packed, layout, bank.manifest.fingerprint.digest)
    liar = believe(bank, *files)
    failed = list_failed(verify_bank(liar))
    assert list(failed) == ["encoded again"]
    assert any(file.path.rpartition("/")[0] in failed["encoded again"] for file in files)
    assert len(table)


def test_texts_and_vectors_of_others_are_found(bank: Bank) -> None:
    def shift(column: str) -> Change:
        def change(table: pa.Table) -> pa.Table:
            order = pa.array([*range(1, len(table)), 0])
            index = table.schema.get_field_index(column)
            return table.set_column(index, table.schema.field(column), table[column].take(order))

        return change

    liar, path = replace_table(bank, "references", shift("text"), segment=0)
    failed = list_failed(verify_bank(liar))
    assert set(failed) == {"tokens again", "embedded again"}
    assert path in failed["tokens again"]
    assert path.replace("references", "embeddings") in failed["embedded again"]


def test_another_model_is_said_to_be_one(bank: Bank) -> None:
    fingerprint = dataclasses.replace(bank.manifest.fingerprint, rope={"rope_theta": 1.0})
    files = bank.manifest.list_files("shard")
    for file in files:
        with bank.open_shard(file) as shard:
            records = shard.read(range(shard.num_records))
        write_shard(Path(bank.url) / file.path, records, bank.manifest.layout, fingerprint.digest)
    liar = believe(rewrite_manifest(bank, fingerprint=fingerprint, embedder_id="other:0"), *files)
    failed = list_failed(verify_bank(liar))
    assert set(failed) == {"embedded again", "encoded again"}
    assert "rope differ" in failed["encoded again"]
    assert "other:0" in failed["embedded again"]


def test_ids_are_compared_as_whole_columns(original: Bank) -> None:
    """The bank of these tests is as rich as they need: chains, tombstones, and rows that are not live any more."""
    stored = original.read_table("references", ["ref_id"])["ref_id"]
    dropped = original.read_dropped_ids()
    embedded = original.read_table("embeddings", ["ref_id"])["ref_id"]
    assert pc.any(pc.is_in(embedded, value_set=dropped)).as_py()
    assert len(stored) > len(embedded)
