"""A whole bank in an object store: opened, searched, fetched from, asked in SQL, it is the one it was copied from."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from model.embedding import load_embedder
from model.fetching import BankMemories
from model.retrieving import Retriever
from model.writing import Memories, ReferenceWriter
from pipelines.inspecting import open_views, run_query
from schemas.bank import SEGMENTS_FOLDER, Bank
from schemas.errors import BankError, BankFormatError, ConflictError
from schemas.manifest import commit_manifest, list_versions, make_manifest_name, read_manifest
from schemas.stores import LocalStore, StoreError
from tests.banks import change_manifest, extend_bank, make_bank
from tests.models import make_checkpoint
from tests.test_storage import NOWHERE, endpoint  # noqa: F401
from tests.test_stores import Proxy

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto, the object store, is missing"),
    pytest.mark.usefixtures("endpoint"),
]

URL = "s3://corpora/banks/a bank"

TEXTS = ["How are exceptions raised?", "integer division", "a name that is bound", "import"]

QUERIES = [
    "SELECT count(*) AS number, sum(num_tokens) AS tokens FROM references",
    "SELECT * FROM references ORDER BY ref_id",
    'SELECT ref_id, is_live FROM all_references ORDER BY "ref_id"',
    "SELECT * FROM memories ORDER BY ref_id",
    "SELECT ref_id, list_sum(vector) AS total FROM embeddings ORDER BY ref_id",
    "SELECT * FROM tombstones",
    "SELECT version, parent, operation, size_bytes FROM versions ORDER BY version",
    "SELECT * FROM files ORDER BY path",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where copies are kept."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def writer() -> ReferenceWriter:
    return ReferenceWriter(make_checkpoint("llama"))


@pytest.fixture(scope="module")
def local(writer: ReferenceWriter, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two versions: the second has another segment and a deleted reference."""
    first = make_bank(tmp_path_factory.mktemp("local") / "bank", writer, num_references=40)
    deleted = first.read_table("references", ["ref_id"])["ref_id"][3].as_py()
    return extend_bank(first, writer, num_new=20, deleted=[deleted])


def copy_up(local: Bank, url: str, folder: Path) -> Bank:
    """Copies a bank with all its versions into an object store, as a writer would put it there."""
    shutil.copytree(local.url, folder)
    remote = Bank(url, local.manifest)
    for segment in sorted((folder / SEGMENTS_FOLDER).iterdir()):
        remote.store.publish(segment, f"{SEGMENTS_FOLDER}/{segment.name}")
    for version in list_versions(local.store):
        commit_manifest(url, read_manifest(local.store, version))
    return Bank.open(url)


@pytest.fixture(scope="module")
def remote(
    endpoint: str,  # noqa: F811
    local: Bank,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bank:
    return copy_up(local, URL, tmp_path_factory.mktemp("copied") / "bank")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    between = Proxy(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    yield between
    between.server.shutdown()
    between.server.server_close()


def list_live(bank: Bank) -> list[str]:
    dropped = set(bank.read_dropped_ids().to_pylist())
    ids = bank.read_table("references", ["ref_id"])["ref_id"].to_pylist()
    return [ref_id for ref_id in ids if ref_id not in dropped]


def take_bytes(memories: Memories) -> list[bytes]:
    tensors = (memories.keys_LBHSD, memories.values_LBHSD, memories.offsets_LBHS)
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_the_files_are_those_of_the_folder(local: Bank, remote: Bank) -> None:
    assert isinstance(local.store, LocalStore)
    assert remote.store.list_files() == local.store.list_files()
    assert remote.url == URL
    assert remote.manifest == local.manifest
    assert list_versions(URL) == list_versions(local.store) == [1, 2]
    assert remote.is_complete()
    for name in local.store.list_files():
        assert remote.store.read(name) == local.store.read(name)


def test_tables_are_equal(local: Bank, remote: Bank) -> None:
    for version in (1, 2):
        here, there = Bank.open(local.store, version), Bank.open(URL, version)
        kinds = {file.kind for file in here.manifest.files if file.path.endswith(".parquet")}
        assert {"references", "embeddings", "memories"} <= kinds
        for kind in kinds:
            assert there.read_table(kind).equals(here.read_table(kind))
        assert there.read_dropped_ids().equals(here.read_dropped_ids())
    ref_ids = list_live(local)[::-3]
    assert remote.read_references(ref_ids, ["text"]).equals(local.read_references(ref_ids, ["text"]))


@pytest.mark.parametrize("sql", QUERIES)
def test_sql_answers_are_equal(local: Bank, remote: Bank, sql: str) -> None:
    with open_views(local) as here, open_views(remote) as there:
        expected = run_query(here, sql)
        assert expected.num_rows > 0
        assert run_query(there, sql).equals(expected)


def test_memories_are_equal_byte_for_byte(local: Bank, remote: Bank, writer: ReferenceWriter) -> None:
    here, there = BankMemories(local, writer), BankMemories(remote, writer)
    ref_ids = list_live(local)
    order = np.random.default_rng(0).permutation(len(ref_ids)).tolist()
    for wanted in (ref_ids[:1], [ref_ids[row] for row in order], ref_ids[-2:], []):
        assert np.array_equal(there.fetch_records(wanted), here.fetch_records(wanted))
        assert take_bytes(there.fetch(wanted)) == take_bytes(here.fetch(wanted))
    assert there.statistics == here.statistics


def test_searches_are_equal(local: Bank, remote: Bank) -> None:
    embedder = load_embedder("static")
    here, there = Retriever(local, embedder), Retriever(remote, embedder)
    assert there.num_references == here.num_references == len(list_live(local))
    assert there.search(TEXTS, 7) == here.search(TEXTS, 7)


def test_one_memory_is_one_request_and_nothing_is_downloaded(
    remote: Bank, local: Bank, writer: ReferenceWriter, proxy: Proxy
) -> None:
    bank = Bank.open(URL)
    memories = BankMemories(bank, writer, cache_bytes=0)
    ref_ids = list_live(local)
    memories.fetch(ref_ids)  # now the shards are open
    for ref_id in ref_ids[:5]:
        asked = len(proxy.asked)
        memories.fetch([ref_id])
        assert [method for method, _ in proxy.asked[asked:]] == ["GET"]
        assert "shard-" in proxy.asked[-1][1]
    # Neither a new endpoint's copies nor the others hold a shard.
    copies = [path.suffix for path in bank.store.scratch.rglob("*") if path.is_file()]
    assert ".parquet" in copies
    assert ".safetensors" not in copies


def test_a_shard_is_opened_by_one_request(remote: Bank, local: Bank) -> None:
    for file in remote.manifest.list_files("shard"):
        with remote.open_shard(file) as there, local.open_shard(file) as here:
            assert there.num_requests == 1
            rows = range(here.num_records)
            assert np.array_equal(there.read(rows), here.read(rows))
            assert there.num_requests == 2  # all rows are neighbours


def test_opening_again_downloads_nothing(remote: Bank, local: Bank, writer: ReferenceWriter, proxy: Proxy) -> None:
    embedder = load_embedder("static")
    for _ in range(2):
        asked = len(proxy.asked)
        bank = Bank.open(URL)
        memories, retriever = BankMemories(bank, writer), Retriever(bank, embedder)
        memories.fetch([hit.ref_id for hit in retriever.search(TEXTS[:1], 3)[0]])
    paths = [path for _, path in proxy.asked[asked:]]
    assert paths
    assert [path for path in paths if ".parquet" in path or ".faiss" in path] == []


def test_a_cold_bank_encodes_and_keeps(
    writer: ReferenceWriter,
    local: Bank,
    tmp_path: Path,
    endpoint: str,  # noqa: F811
) -> None:
    cold = make_bank(tmp_path / "cold", writer, num_references=10, cold=True)
    there = copy_up(cold, "s3://corpora/banks/cold", tmp_path / "copied")
    ref_ids = list_live(cold)[:4]
    first, second = BankMemories(there, writer), BankMemories(Bank.open(there.url), writer)
    expected = take_bytes(BankMemories(cold, writer).fetch(ref_ids))
    assert take_bytes(first.fetch(ref_ids)) == expected
    assert first.statistics.num_encoded == 4
    assert take_bytes(second.fetch(ref_ids)) == expected
    assert second.statistics.num_encoded == 0
    assert not [name for name in there.store.list_files() if name.startswith("cold")]


def test_of_two_who_commit_a_version_one_wins(remote: Bank) -> None:
    for version in range(100, 105):
        manifest = change_manifest(remote, version=version, parent=2).manifest

        def commit(_: int, manifest: object = manifest) -> bool:
            try:
                commit_manifest(URL, manifest)
            except ConflictError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(commit, range(2)))
        assert sorted(won) == [False, True]
        assert read_manifest(URL, version) == manifest
        with pytest.raises(ConflictError, match="committed by somebody else meanwhile; run again"):
            commit_manifest(URL, manifest)
        remote.store.remove([make_manifest_name(version)])


# What is not right ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(local: Bank, tmp_path: Path) -> Bank:
    """A bank in the store that a test may damage, and whose copies nobody else has."""
    return copy_up(local, f"s3://corpora/banks/{tmp_path.name}", tmp_path / "copied")


def read_all(bank: Bank, writer: ReferenceWriter) -> list[Callable[[], object]]:
    return [
        lambda: bank.read_table("references"),
        lambda: Retriever(bank, load_embedder("static")).search(TEXTS, 3),
        lambda: BankMemories(bank, writer).fetch(list_live(bank)),
    ]


@pytest.mark.parametrize(("kind", "number"), [("references", 0), ("index", 1), ("memories", 2), ("shard", 2)])
def test_a_damaged_object_is_noticed(copied: Bank, writer: ReferenceWriter, kind: str, number: int) -> None:
    for file in copied.manifest.list_files(kind):
        content = bytearray(copied.store.read(file.path))
        content[-10 if kind != "shard" else -copied.manifest.layout.stride_bytes] ^= 1
        copied.store.replace(file.path, bytes(content))
    with pytest.raises(BankFormatError, match="damaged"):
        read_all(copied, writer)[number]()


@pytest.mark.parametrize(("kind", "number"), [("references", 0), ("index", 1), ("memories", 2), ("shard", 2)])
def test_a_missing_object_is_named(copied: Bank, writer: ReferenceWriter, kind: str, number: int) -> None:
    files = copied.manifest.list_files(kind)
    copied.store.remove([file.path for file in files])
    with pytest.raises(BankFormatError, match=r"is missing from the bank") as caught:
        read_all(copied, writer)[number]()
    assert any(file.path in str(caught.value) for file in files)
    assert not copied.is_complete()
    copied.store.remove([make_manifest_name(copied.manifest.version)])
    with pytest.raises(BankFormatError, match=r"version 2 was removed while it was open; open another version"):
        read_all(copied, writer)[number]()


def test_a_copy_that_was_damaged_is_not_read(copied: Bank) -> None:
    file = copied.manifest.list_files("references")[0]
    expected = copied.read_table("references")
    path = copied.locate(file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert Bank.open(copied.url).read_table("references").equals(expected)
    path.write_bytes(bytes(content)[:-1])
    assert Bank.open(copied.url).read_table("references").equals(expected)


def test_a_shard_that_lies_about_its_rows_is_refused(copied: Bank) -> None:
    first, *_, last = copied.manifest.list_files("shard")
    copied.store.replace(first.path, copied.store.read(last.path))
    with pytest.raises(BankFormatError, match=r"shard-\d+.safetensors"):
        copied.open_shard(first)


def test_no_bank_and_no_bucket_are_told_apart() -> None:
    with pytest.raises(BankFormatError, match="^s3://corpora/nothing does not exist; make one with"):
        Bank.open("s3://corpora/nothing/")
    with pytest.raises(StoreError, match="^s3://nobodys-bucket does not exist; check the name of the bucket"):
        Bank.open("s3://nobodys-bucket/bank")


def test_a_lost_connection_is_no_damage(copied: Bank, writer: ReferenceWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = BankMemories(copied, writer)
    ref_ids = list_live(copied)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", NOWHERE)
        patch.setattr("schemas.object_urls.MAX_RETRIES", 0)
        for action in (lambda: memories.fetch(ref_ids), lambda: Bank.open(copied.url)):
            with pytest.raises(BankError, match=r"^s3://corpora cannot be reached"):
                action()
    assert len(take_bytes(memories.fetch(ref_ids))) == 3
