"""Every kind of file of a real bank, damaged in every way: ``verify`` names it, and nobody reads a wrong number of it.

A reader of a damaged bank must raise an error of the bank or return exactly what it returns for the sound one.
"""

import functools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.generation import open_writer
from flows.showing import describe_reference
from flows.verifying import verify_bank
from model.embedding import load_embedder
from model.fetching import BankMemories
from model.retrieving import Retriever
from model.writing import ReferenceWriter
from pipelines.auditing import audit_cold_store, audit_hashes, audit_sizes
from pipelines.inspecting import open_views, run_query
from schemas.bank import PARTED_KINDS, Bank
from schemas.errors import BankError, BankFormatError
from schemas.manifest import FileEntry, make_manifest_name
from schemas.protocols import Embedder
from schemas.tables import write_table
from tests.test_verifying import build_history, list_failed, rewrite_manifest

KINDS = (
    "documents",
    "occurrences",
    "rejects",
    "duplicates",
    "document_duplicates",
    "document_signatures",
    "contaminated",
    "tombstones",
    "references",
    "signatures",
    "embeddings",
    "memories",
    "index",
    "shard",
)

QUESTIONS = ("what does a lambda expression do", "the class statement", "loops")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_history(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def writer(original: Bank) -> ReferenceWriter:
    return open_writer(original, "memory3-tiny")


@pytest.fixture(scope="module")
def live(original: Bank) -> list[str]:
    with open_views(original) as views:
        return sorted(run_query(views, "SELECT ref_id FROM references")["ref_id"].to_pylist())


@pytest.fixture
def bank(original: Bank, tmp_path: Path) -> Bank:
    """A copy of the bank that may be damaged."""
    shutil.copytree(original.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


def find(bank: Bank, kind: str) -> tuple[FileEntry, Path]:
    """Returns the last file of a kind: of the parted ones that of one segment of two."""
    file = bank.manifest.list_files(kind)[-1]
    return file, Path(bank.url) / file.path


# Readers --------------------------------------------------------------------------------------------------------------


def read_tables(bank: Bank, kind: str) -> Any:
    return bank.read_table(kind).combine_chunks() if kind not in ("shard", "index") else None


def read_sql(bank: Bank, kind: str) -> Any:
    if kind in ("shard", "index"):
        return None
    with open_views(bank) as views:
        if kind in ("references", "duplicates", "contaminated", "tombstones"):
            return run_query(views, "SELECT * FROM all_references ORDER BY ref_id")
        order = {"documents": 1, "occurrences": "doc_id, ordinal", "rejects": "path, position"}.get(kind, 1)
        return run_query(views, f"SELECT * FROM {kind} ORDER BY {order}")


def read_memories(bank: Bank, writer: ReferenceWriter, live: list[str]) -> Any:
    memories = BankMemories(bank, writer, cache_bytes=0).fetch(live)
    return [memories.keys_LBHSD.numpy(), memories.values_LBHSD.numpy(), memories.offsets_LBHS.numpy()]


@functools.cache
def load_static_embedder() -> Embedder:
    return load_embedder("static")


def read_hits(bank: Bank) -> Any:
    return Retriever(bank, load_static_embedder()).search(QUESTIONS, 10)


def read_shown(bank: Bank, live: list[str]) -> Any:
    return [describe_reference(bank, ref_id) for ref_id in live[::24]]


def observe(read: Callable[[], Any]) -> Any:
    """Returns what a reader returns, None if it says that the bank is damaged."""
    try:
        return read()
    except BankError:
        return None


def is_equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, list) and expected and isinstance(expected[0], np.ndarray):
        return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    return bool(found.equals(expected) if hasattr(expected, "equals") else found == expected)


def list_readers(bank: Bank, kind: str, writer: ReferenceWriter, live: list[str]) -> dict[str, Callable[[], Any]]:
    """Returns the readers that open files of a kind."""
    readers: dict[str, Callable[[], Any]] = {
        "table": lambda: read_tables(bank, kind),
        "sql": lambda: read_sql(bank, kind),
    }
    if kind in ("memories", "shard", "duplicates", "contaminated", "tombstones"):
        readers["memories"] = lambda: read_memories(bank, writer, live)
    if kind in ("embeddings", "index", "duplicates", "contaminated", "tombstones"):
        readers["hits"] = lambda: read_hits(bank)
    if kind in ("references", "memories", "occurrences", "duplicates", "contaminated"):
        readers["show"] = lambda: read_shown(bank, live)
    return readers


@pytest.fixture(scope="module")
def truth(original: Bank, writer: ReferenceWriter, live: list[str]) -> dict[str, dict[str, Any]]:
    """What every reader returns for the sound bank."""
    return {kind: {name: read() for name, read in list_readers(original, kind, writer, live).items()} for kind in KINDS}


def assert_nothing_wrong_is_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> int:
    """Checks that each reader raises an error or returns the truth; returns how many raised one."""
    fresh = Bank(bank.store, bank.manifest)
    num_raised = 0
    for name, read in list_readers(fresh, kind, writer, live).items():
        found = observe(read)
        expected = truth[kind][name]
        if found is None and expected is not None:
            num_raised += 1
        else:
            assert is_equal(found, expected), f"{name} reads something else of a damaged {kind}"
    return num_raised


def list_flips(content: bytes) -> Iterator[bytes]:
    """Yields copies with one bit changed: at both ends, and at places spread over all of it."""
    draw = np.random.default_rng(len(content))
    places = [0, 9, len(content) // 2, len(content) - 5, *draw.integers(0, len(content), 4).tolist()]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(draw.integers(8))
        yield bytes(changed)


# Files that a manifest names ------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_tried(original: Bank) -> None:
    assert {file.kind for file in original.manifest.files} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_named_and_not_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> None:
    file, path = find(bank, kind)
    num_raised = 0
    for changed in list_flips(path.read_bytes()):
        path.write_bytes(changed)
        assert audit_hashes(bank).wrong == [f"{file.path} has other bytes than when it was written"]
        num_raised += assert_nothing_wrong_is_read(bank, kind, truth, writer, live)
    assert num_raised
    failed = list_failed(verify_bank(Bank(bank.store, bank.manifest)))
    assert file.path in failed["files"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named_and_not_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> None:
    file, path = find(bank, kind)
    content = path.read_bytes()
    for size_bytes in (len(content) - 1, len(content) // 2, 7, 0):
        path.write_bytes(content[:size_bytes])
        message = f"{file.path} has {size_bytes} bytes, not {len(content)}"
        assert audit_hashes(bank).wrong == audit_sizes(bank).wrong == [message]
        assert assert_nothing_wrong_is_read(bank, kind, truth, writer, live)
    path.write_bytes(content + b"\0")
    assert file.path in audit_hashes(bank).wrong[0]
    assert_nothing_wrong_is_read(bank, kind, truth, writer, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named_and_not_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> None:
    file, path = find(bank, kind)
    path.unlink()
    assert assert_nothing_wrong_is_read(bank, kind, truth, writer, live)
    for deep in (False, True):
        assert list_failed(verify_bank(bank, deep=deep))["files"] == f"{file.path} is missing"
    path.mkdir()
    assert assert_nothing_wrong_is_read(bank, kind, truth, writer, live)
    assert file.path in audit_hashes(bank).wrong[0]


@pytest.mark.parametrize("kind", sorted(PARTED_KINDS))
def test_a_file_of_another_segment_is_named_and_not_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> None:
    files = bank.manifest.list_files(kind)
    one, other = (Path(bank.url) / file.path for file in (files[0], files[-1]))
    assert one.parent != other.parent
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert sorted(finding.split()[0] for finding in audit_hashes(bank).wrong) == sorted([files[0].path, files[-1].path])
    assert assert_nothing_wrong_is_read(bank, kind, truth, writer, live)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_version_is_named_and_not_read(
    bank: Bank, kind: str, truth: dict[str, dict[str, Any]], writer: ReferenceWriter, live: list[str]
) -> None:
    """The whole tables of the version before have other rows; of the parted ones that of the other segment is taken."""
    file, path = find(bank, kind)
    others = [*Bank.open(bank.store, 1).manifest.list_files(kind), *bank.manifest.list_files(kind)]
    donors = [other for other in others if other.sha256 != file.sha256]
    if not donors:
        assert kind in ("tombstones", "contaminated", "document_duplicates", "duplicates")
        return
    shutil.copy(Path(bank.url) / donors[0].path, path)
    assert file.path in audit_hashes(bank).wrong[0]
    assert assert_nothing_wrong_is_read(bank, kind, truth, writer, live)


def test_shards_of_equal_size_that_are_swapped_are_not_read(
    bank: Bank, writer: ReferenceWriter, live: list[str]
) -> None:
    """Nothing but the ids in the records tells one from the other."""
    files = bank.manifest.list_files("shard")
    one, other = next((a, b) for a in files for b in files if a.path < b.path and a.size_bytes == b.size_bytes)
    paths = [Path(bank.url) / file.path for file in (one, other)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    with pytest.raises(BankFormatError, match="in place of that of"):
        read_memories(bank, writer, live)
    assert [finding.split()[0] for finding in audit_hashes(bank).wrong] == [
        file.path for file in bank.manifest.files if file in (one, other)
    ]


def test_a_table_of_equal_size_and_rows_is_not_read(bank: Bank) -> None:
    """Ids alone compress alike: one table of deleted references may look like another."""
    file, path = find(bank, "tombstones")
    stored = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    for start in range(len(stored)):
        table = pq.read_table(path)
        write_table(bank.read_table("references", ["ref_id"]).slice(start, len(table)).cast(table.schema), path)
        if path.stat().st_size == file.size_bytes and audit_hashes(bank).wrong:
            break
    else:
        pytest.fail("no table of the same size was found")
    with pytest.raises(BankFormatError, match="has other bytes"):
        bank.read_dropped_ids()


def test_a_page_of_a_large_table_is_checked_when_it_is_read(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables above a bound are not hashed as a whole; with the bound at 0 every table is one of them."""
    monkeypatch.setattr("schemas.bank.HASHED_BYTES", 0)
    file, path = find(bank, "references")
    content, expected = path.read_bytes(), bank.read_table("references")
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = expected["ref_id"].to_pylist()[-3:]
    for chunk in chunks:
        start = min(place for place in (chunk.data_page_offset, chunk.dictionary_page_offset) if place)
        changed = bytearray(content)
        changed[start + chunk.total_compressed_size - 3] ^= 1
        path.write_bytes(changed)
        column = chunk.path_in_schema.split(".")[0]
        for read in (
            lambda column=column: bank.read_table("references", [column]),
            lambda column=column: list(bank.iterate_table(file, [column])),
            lambda column=column: bank.read_rows("references", "ref_id", wanted, [column]),
        ):
            with pytest.raises(BankFormatError, match=file.path):
                read()
    path.write_bytes(content)
    assert bank.read_table("references").equals(expected)


# Files beside the versions --------------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_manifest_is_believed(bank: Bank) -> None:
    path = Path(bank.url) / make_manifest_name(2)
    content = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(content), 200).tolist()
    num_raised = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        found = observe(lambda: Bank.open(bank.url).manifest)
        assert found in (None, bank.manifest)  # a bit of white space may change
        num_raised += found is None
    assert num_raised > 100
    for size_bytes in (0, 1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size_bytes])
        with pytest.raises(BankFormatError, match=r"00000002\.json"):
            Bank.open(bank.url)
    shutil.copy(Path(bank.url) / make_manifest_name(1), path)
    with pytest.raises(BankFormatError, match=r"00000002\.json says it is version 1"):
        Bank.open(bank.url)
    path.unlink()
    assert Bank.open(bank.url).manifest.version == 1


def test_a_damaged_manifest_of_another_version_is_noted(bank: Bank) -> None:
    path = Path(bank.url) / make_manifest_name(1)
    path.write_bytes(path.read_bytes().replace(b'"kept": ', b'"kept": 1'))
    checks = verify_bank(bank, deep=False)
    assert list_failed(checks) == {}
    assert "version 1 cannot be opened" in checks[-1].detail
    assert "00000001.json" in checks[-1].detail


def test_a_damaged_tag_is_named(bank: Bank) -> None:
    bank.store.replace("tags/first.json", b'{"version": 1}\n')
    assert list_failed(verify_bank(bank, deep=False)) == {}
    path = Path(bank.url) / "tags/first.json"
    content = path.read_bytes()
    for place in range(len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1 << 6
        path.write_bytes(changed)
        assert list_failed(verify_bank(bank, deep=False))["tags"].startswith("tags/first.json ")
    path.write_bytes(b"")
    assert list_failed(verify_bank(bank, deep=False))["tags"].startswith("tags/first.json ")


def test_a_damaged_cold_store_is_named_and_encodes_the_same_again(
    bank: Bank, writer: ReferenceWriter, live: list[str], truth: dict[str, dict[str, Any]]
) -> None:
    files = [file for file in bank.manifest.files if file.kind not in ("memories", "shard")]
    cold = rewrite_manifest(bank, files=files, cold=True)
    wanted = live[:10]
    memories = BankMemories(cold, writer, cache_bytes=0)
    fetched = memories.fetch(wanted)
    expected = [fetched.keys_LBHSD.numpy(), fetched.values_LBHSD.numpy(), fetched.offsets_LBHS.numpy()]
    (path,) = (Path(bank.url) / "cold").glob("*.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert audit_cold_store(cold) == ([], "10 memories encoded when retrieved")
    content = path.read_bytes()
    draw = np.random.default_rng(1)
    num_named = 0
    for place in [20, 100, 4096, *draw.integers(0, len(content), 25).tolist()]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        for companion in path.parent.glob("*.sqlite-*"):
            companion.unlink()
        findings = audit_cold_store(cold).wrong
        assert all(str(path) in finding for finding in findings)
        num_named += bool(findings)
        found = observe(lambda: read_memories(cold, writer, wanted))
        if found is not None:
            for one, other in zip(found, expected, strict=True):
                assert np.allclose(one, other, rtol=2e-2, atol=2e-2)
        elif not findings:
            pytest.fail("a reader refuses what verify does not name")
    assert num_named >= 20
    assert truth
