"""Corpora in an object store, read from a real server: the same records as from files, errors that say why."""

import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore, S3Store

from pipelines import storage
from pipelines.checking import check_corpus
from pipelines.formats import CorpusFile, iterate_lines, list_corpus_files, open_file
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from pipelines.storage import list_objects, open_object
from schemas.errors import CorpusError
from tests.test_reading import CONFIG, DOCUMENTS, read_file, write_documents

pytestmark = pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto, the object store, is missing")

START_SECONDS = 60
NOWHERE = "http://127.0.0.1:1"


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def request(url: str, method: str, content: bytes = b"") -> int:
    headers = {"Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, content, headers, method=method)) as response:
        status: int = response.status
        return status


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Starts the server once, with a bucket, and sets the environment as a user would."""
    url = f"http://127.0.0.1:{find_free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                request(f"{url}/corpora", "PUT")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ:
                if name.startswith("AWS_"):
                    patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ALLOW_HTTP", "true")
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_METADATA_ENDPOINT", NOWHERE)  # where machines in a cloud find credentials
            yield url
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(endpoint: str) -> Iterator[S3Store]:
    """The bucket, empty before and after."""
    store = S3Store("corpora")
    yield store
    for entries in obstore.list(store):
        obstore.delete(store, [entry["path"] for entry in entries])


def make_corpus(folder: Path) -> Path:
    """One file of each kind, with names that URLs would write in another way."""
    for name in ("a.jsonl", "deep/b.jsonl.zst", "deep/ü %20#+c.jsonl.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_documents(folder / name)
    texts = [document["text"] for document in DOCUMENTS]
    pq.write_table(pa.table({"text": texts}), folder / "deep" / "d.parquet", row_group_size=5)
    (folder / "e.txt").write_text(texts[0])
    (folder / "f.csv").write_text("a,b")
    (folder / "empty.txt").touch()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "g.txt").write_text("hidden")
    return folder


def upload(store: S3Store, folder: Path, prefix: str = "") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(store, prefix + path.relative_to(folder).as_posix(), path.read_bytes())


def read_all(files: list[CorpusFile]) -> list[dict[str, Any]]:
    rows = [row for file in files for row in read_file(file)]
    return [{name: value for name, value in row.items() if name != "path"} for row in rows]


# Listing --------------------------------------------------------------------------------------------------------------


def test_a_prefix_holds_what_the_folder_holds(tmp_path: Path, bucket: S3Store) -> None:
    folder = make_corpus(tmp_path / "data")
    upload(bucket, folder, "some/data/")
    obstore.put(bucket, "some/database.txt", b"another")
    local = list_corpus_files([folder])
    for url in ("s3://corpora/some/data", "s3://corpora/some/data/"):
        files = list_corpus_files([url])
        check_corpus(files, CONFIG)
        assert [(file.name, file.format, file.doc_id, file.size_bytes) for file in files] == [
            (file.name, file.format, file.doc_id, file.size_bytes) for file in local
        ]
        assert [file.path for file in files] == [f"s3://corpora/some/data/{file.name}" for file in files]
        assert read_all(files) == read_all(local)
    every = list_corpus_files(["s3://corpora"])
    assert [file.name for file in every] == [
        *(f"some/data/{file.name}" for file in files),
        "some/database.txt",
    ]


def test_files_and_objects_are_one_corpus(tmp_path: Path, bucket: S3Store) -> None:
    folder = make_corpus(tmp_path / "data")
    upload(bucket, folder)
    files = list_corpus_files([folder, "s3://corpora/", "s3://corpora/e.txt", "s3://corpora/deep"])
    assert len(files) == 2 * len(list_corpus_files([folder]))
    assert [file.name for file in list_corpus_files(["s3://corpora/e.txt"])] == ["e.txt"]
    assert read_all(list_corpus_files(["s3://corpora/e.txt"])) == read_all(list_corpus_files([folder / "e.txt"]))


@pytest.mark.parametrize(
    "pattern", ["*.jsonl", "**/*.jsonl*", "d*", "*/?.parquet", "deep/**", "**/[a-c]*", "e.*", "**/ü*"]
)
def test_patterns_find_the_same_in_a_store_as_in_a_folder(tmp_path: Path, bucket: S3Store, pattern: str) -> None:
    folder = make_corpus(tmp_path / "data")
    upload(bucket, folder, "x/")
    local = list_corpus_files([f"{folder}/{pattern}"])
    files = list_corpus_files([f"s3://corpora/x/{pattern}"])
    assert [(file.name, file.format) for file in files] == [(file.name, file.format) for file in local]
    assert files


def test_an_object_wins_over_its_name_as_a_pattern(bucket: S3Store) -> None:
    for name in ("a[1].txt", "a1.txt"):
        obstore.put(bucket, name, b"x")
    assert [file.name for file in list_corpus_files(["s3://corpora/a[1].txt"])] == ["a[1].txt"]
    obstore.delete(bucket, "a[1].txt")
    assert [file.name for file in list_corpus_files(["s3://corpora/a[1].txt"])] == ["a1.txt"]


def test_marks_of_folders_are_no_files(endpoint: str, bucket: S3Store) -> None:
    for name in ("mark/", "mark/inner/"):
        request(f"{endpoint}/corpora/{name}", "PUT")
    obstore.put(bucket, "mark/inner/a.txt", b"x")
    for url in ("s3://corpora/mark/", "s3://corpora", "s3://corpora/mark/inner/"):
        assert [file.path for file in list_corpus_files([url])] == ["s3://corpora/mark/inner/a.txt"]


def test_the_fingerprint_changes_with_the_content(bucket: S3Store) -> None:
    obstore.put(bucket, "a.txt", b"one")
    (first,) = list_corpus_files(["s3://corpora/a.txt"])
    assert list_corpus_files(["s3://corpora/a.txt"]) == [first]
    assert list_corpus_files(["s3://corpora"]) == [first]
    assert first.etag
    obstore.put(bucket, "a.txt", b"two")
    (second,) = list_corpus_files(["s3://corpora/a.txt"])
    assert second.fingerprint != first.fingerprint


# Reading --------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=60),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 70), st.integers(-1, 40)), max_size=12),
    block_bytes=st.integers(1, 20),
    num_blocks=st.integers(1, 3),
)
def test_an_object_reads_like_a_file(
    content: bytes, steps: list[tuple[int, int, int]], block_bytes: int, num_blocks: int
) -> None:
    store = MemoryStore()
    obstore.put(store, "key", content)
    etag = obstore.head(store, "key")["e_tag"] or ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK_BYTES", block_bytes)
        patch.setattr(storage, "NUM_BLOCKS", num_blocks)
        reader = storage._ObjectReader("s3://bucket/key", store, "key", len(content), etag)
        expected = io.BytesIO(content)
        for whence, offset, size_bytes in steps:
            place = max(0, {0: 0, 1: expected.tell(), 2: len(content)}[whence] + offset)
            assert reader.seek(place) == expected.seek(place)
            assert reader.read(size_bytes) == expected.read(size_bytes)
            assert reader.tell() == expected.tell()
            assert len(reader._blocks) <= num_blocks
        assert reader.seek(-len(content), os.SEEK_END) == 0
        assert reader.read() == content


@pytest.mark.parametrize("block_bytes", [100, 1 << 14])
def test_objects_are_read_in_blocks_of_any_size(
    tmp_path: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    folder = make_corpus(tmp_path / "data")
    if block_bytes == 100:
        (folder / "a.jsonl").unlink()
        (folder / "deep" / "ü %20#+c.jsonl.gz").unlink()
        write_documents(folder / "deep" / "b.jsonl.zst", DOCUMENTS[-2:])
        pq.write_table(pa.table({"text": ["x", "y"]}), folder / "deep" / "d.parquet")
        (folder / "e.txt").write_text("x" * 250)
    upload(bucket, folder)
    monkeypatch.setattr(storage, "BLOCK_BYTES", block_bytes)
    assert read_all(list_corpus_files(["s3://corpora"])) == read_all(list_corpus_files([folder]))


def test_reading_goes_on_after_a_record(tmp_path: Path, bucket: S3Store) -> None:
    folder = make_corpus(tmp_path / "data")
    upload(bucket, folder)
    config = ReadingConfig(batch_text_bytes=20_000)
    for file in list_corpus_files(["s3://corpora"]):
        batches = list(read_records(file, config))
        for number, batch in enumerate(batches):
            assert list(read_records(file, config, after=batch["position"][-1].as_py())) == batches[number + 1 :]


# Errors ---------------------------------------------------------------------------------------------------------------


def check_error(error: pytest.ExceptionInfo[CorpusError]) -> None:
    assert "\n" not in str(error.value)
    assert "Debug source" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://corpora/nothing", r"^s3://corpora/nothing does not exist, or is empty; check the bucket"),
        ("s3://corpora/*.parquet", r"^s3://corpora/\*.parquet does not exist, or is empty"),
        ("s3://nobodys-bucket/a.txt", r"^s3://nobodys-bucket does not exist; check the name of the bucket"),
        ("s3://nobodys-bucket", r"^s3://nobodys-bucket does not exist"),
        ("s3://", r"^s3:// names no bucket"),
        ("s3:///a.txt", r"names no bucket that can be; write it as s3://BUCKET/PREFIX$"),
        ("s3://two words/a.txt", r"names no bucket"),
        ("s3://corpora/a//b.txt", r"^s3://corpora/a//b.txt cannot be read: .*empty path segment"),
        ("s3://corpora/table.csv", r"table.csv has a format that is not known"),
    ],
)
def test_what_is_not_there_is_one_sentence(bucket: S3Store, url: str, message: str) -> None:
    obstore.put(bucket, "table.csv", b"x")
    with pytest.raises(CorpusError, match=message) as caught:
        list_corpus_files([url])
    check_error(caught)


def test_an_endpoint_that_does_not_answer_is_one_sentence(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    obstore.put(bucket, "a.jsonl", b'{"text": "x"}')
    (file,) = list_corpus_files(["s3://corpora"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    message = r"^s3://corpora cannot be reached \(.*\); check the network and AWS_ENDPOINT_URL$"
    with pytest.raises(CorpusError, match=message) as caught:
        list_corpus_files(["s3://corpora"])
    check_error(caught)
    # A lost connection is not a damaged file: nothing is rejected for it.
    with pytest.raises(CorpusError, match=message):
        list(read_records(file, CONFIG))
    with pytest.raises(CorpusError, match=message):
        check_corpus([file], CONFIG)


@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL", "nonsense"), ("AWS_ALLOW_HTTP", "perhaps")])
def test_an_environment_that_makes_no_sense_is_one_sentence(
    bucket: S3Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError, match=value) as caught:
        list_corpus_files(["s3://corpora"])
    check_error(caught)


def test_plain_http_must_be_allowed(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(CorpusError, match="set AWS_ALLOW_HTTP=true") as caught:
        list_corpus_files(["s3://corpora"])
    check_error(caught)


def test_missing_credentials_name_the_variables(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    obstore.put(bucket, "a.txt", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        CorpusError, match=r"^no credentials were found for s3://corpora; set AWS_ACCESS_KEY_ID"
    ) as caught:
        list_corpus_files(["s3://corpora"])
    check_error(caught)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(CorpusError, match="may not be read with these credentials"):
        list(list_corpus_files(["s3://corpora/a.txt"]))


def test_refused_credentials_are_one_sentence(endpoint: str, bucket: S3Store) -> None:
    obstore.put(bucket, "a.jsonl", b'{"text": "x"}')
    (file,) = list_corpus_files(["s3://corpora"])
    request(f"{endpoint}/moto-api/reset-auth", "POST", b"0")  # from now on the server asks who asks
    try:
        for url in ("s3://corpora/a.jsonl", "s3://corpora"):
            with pytest.raises(CorpusError, match=r"may not be read with these credentials; check AWS_") as caught:
                list_corpus_files([url])
            check_error(caught)
        with pytest.raises(CorpusError, match=r"may not be read with these credentials"):
            list(read_records(file, CONFIG))
    finally:
        request(f"{endpoint}/moto-api/reset-auth", "POST", b"inf")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_an_object_that_is_replaced_or_gone_is_never_read_in_part(
    tmp_path: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1 << 14)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["x" * 50_000]}), tmp_path / name)
    elif name.endswith("txt"):
        (tmp_path / name).write_text("x" * 50_000)
    else:
        write_documents(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    obstore.put(bucket, name, content)
    (file,) = list_corpus_files([f"s3://corpora/{name}"])
    with open_file(file) as stream:
        assert stream.read(10) == content[:10]
        obstore.put(bucket, name, content[:-1] + b"?")
        if len(content) > 1 << 14:
            with pytest.raises(CorpusError, match="has changed since it was listed; run the command again"):
                stream.read()
    with pytest.raises(CorpusError, match="has changed since it was listed"):
        list(read_records(file, CONFIG))
    obstore.delete(bucket, name)
    with pytest.raises(CorpusError, match="is gone since it was listed; run the command again"):
        list(read_records(file, CONFIG))


def test_an_object_that_is_shorter_than_listed_is_never_read_in_part(bucket: S3Store) -> None:
    obstore.put(bucket, "a.txt", b"short")
    with pytest.raises(CorpusError, match="has changed since it was listed"):
        open_object("s3://corpora/a.txt", 100, "").read()
    assert open_object("s3://corpora/a.txt", 5, "").read() == b"short"


def test_other_stores_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(CorpusError, match=r"^az://container cannot be opened: .*; check AZURE_STORAGE_ACCOUNT_NAME"):
        list_objects("az://container/x")


def test_lines_of_an_object_are_passed_over_like_those_of_a_file(tmp_path: Path, bucket: S3Store) -> None:
    obstore.put(bucket, "a.jsonl", b"one\ntwo\nthree")
    (file,) = list_corpus_files(["s3://corpora/a.jsonl"])
    assert list(iterate_lines(file, 100, after=1)) == [(2, b"two", 3), (3, b"three", 5)]
