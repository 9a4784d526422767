"""Reading what nobody meant to be read: every record is accounted for, and memory stays bounded."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines import records
from pipelines.checking import check_corpus
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.errors import CorpusError
from tests.test_reading import CONFIG, DOCUMENTS, check_documents, read, read_file, write_documents, write_lines

ROOT = Path(__file__).parents[1]
MIB = 1 << 20

# Text -----------------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน กำนัน น้ำ",
    "arabic": "اَلْعَرَبِيَّةُ \u202bمكتوبة\u202c من اليمين ١٢٣",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \u200d",
    "null": "a\x00b\x00",
    "only null": "\x00",
    "mark inside": "a\ufeffb",
    "carriage returns": "one\r\ntwo\rthree\r\n",
    "separators": "one\u2028two\u2029three\x85four\x0bfive",
    "not characters": "\ufffe\uffff\U0010ffff",
    "combining": "e\u0301" * 50,
    "private": "\ue000\U000f0000",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("escaped", [True, False])
def test_text_of_every_kind_arrives_as_it_is(tmp_path: Path, name: str, escaped: bool) -> None:
    documents: list[dict[str, Any]] = [{"id": key, "text": text, "source": text} for key, text in SCRIPTS.items()]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(documents), tmp_path / name)
    else:
        write_lines(tmp_path / name, [json.dumps(row, ensure_ascii=escaped).encode() for row in documents])
    check_documents(read(tmp_path / name), documents, range(1, len(documents) + 1))


@pytest.mark.parametrize("key", SCRIPTS)
def test_text_files_of_every_kind_arrive_as_they_are(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.txt").write_bytes(SCRIPTS[key].encode())
    (row,) = read(tmp_path / "a.txt")
    assert (row["text"], row["reason"]) == (SCRIPTS[key], None)


def test_a_mark_and_carriage_returns_stand_around_records_not_in_them(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(DOCUMENTS[0]).encode(), json.dumps(DOCUMENTS[1]).encode(), b""]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    check_documents(read(tmp_path / "a.jsonl"), DOCUMENTS[:2], [1, 2])
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "b.jsonl") == []
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "x"}\n\xef\xbb\xbf{"text": "y"}\n')
    assert [row["reason"] for row in read(tmp_path / "c.jsonl")] == [None, records.NOT_JSON]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (rb'{"text": "\ud83d"}', records.NOT_JSON),
        (rb'{"text": "\udc00\ud83d"}', records.NOT_JSON),
        (rb'{"text": "x", "\ud800": 1}', records.NOT_JSON),
        (rb'{"text": "\ud83d\ude00"}', None),
        (b'{"text": "\xc0\x80"}', records.INVALID_UTF8),
        (b'{"text": "\xf8\x88\x80\x80\x80"}', records.INVALID_UTF8),
        (b'{"text": "\xe4\xb8"}', records.INVALID_UTF8),
        (b'{"text": "x", "other": "\xff"}', records.INVALID_UTF8),
        (b'{"text": "a\x00b"}', records.NOT_JSON),
        (b"\x00" * 50, records.NOT_JSON),
        (b'{"text": "x"} {"text": "y"}', records.NOT_JSON),
        (b'{"text": "x"', records.NOT_JSON),
        (b'{"text": "x", "n": 1e400}', records.NOT_JSON),
        (b'{"text": "x", "n": 123456789012345678901234567890}', None),
        (b'{"text": "first", "text": "x"}', None),
        (b"[" * 100_000, records.NOT_JSON),
        (b'{"a":' * 100_000, records.NOT_JSON),
        (b'{"text": "x", "a":' + b"[" * 2000 + b"]" * 2000 + b"}", records.NOT_JSON),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_hostile_line_is_one_record_and_harms_no_other(tmp_path: Path, line: bytes, reason: str | None) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": "before"}', line, b'{"text": "after"}'])
    rows = read(path)
    assert [row["position"] for row in rows] == [1, 2, 3]
    assert [row["reason"] for row in rows] == [None, reason, None]


def test_an_object_with_a_million_keys_is_a_record(tmp_path: Path) -> None:
    keys = b",".join(b'"k%d":0' % number for number in range(1_000_000))
    path = write_lines(tmp_path / "a.jsonl", [b'{"text":"x",' + keys + b"}", b'{"text": "y"}'])
    rows = read(path)
    assert [row["reason"] for row in rows] == [None, None]
    assert len(json.loads(rows[0]["metadata"])) == 1_000_000
    assert [row["metadata"] for row in read(path, ReadingConfig(metadata_columns=("k7",)))] == ['{"k7":0}', "{}"]


# Damaged and mistaken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_one_record_of_the_damage(tmp_path: Path, name: str) -> None:
    path = write_documents(tmp_path / name)
    content = path.read_bytes()
    for size_bytes in {*range(1, 30), *range(30, len(content), len(content) // 20)}:
        path.write_bytes(content[:size_bytes])
        rows = read(path)
        assert [row["reason"] for row in rows] == [None] * (len(rows) - 1) + [records.DAMAGED], size_bytes
        check_documents(rows[:-1], DOCUMENTS[: len(rows) - 1], range(1, len(rows)))


def test_files_without_bytes_hold_no_records_and_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b""))
    (tmp_path / "c.jsonl.zst").touch()
    (tmp_path / "d.jsonl.gz").touch()
    (tmp_path / "e.parquet").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "f.parquet")
    files = list_corpus_files([tmp_path])
    check_corpus(files, CONFIG)
    found = {file.name: [row["reason"] for row in read_file(file)] for file in files}
    assert {name: reasons for name, reasons in found.items() if reasons} == {"e.parquet": [records.DAMAGED]}


def test_rows_of_a_parquet_file_of_the_wrong_type_are_rejects_beside_files_that_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # Prefect, where it was started, raises the level of all loggers
    pq.write_table(pa.table({"id": ["a"], "text": ["fine"]}), tmp_path / "a.parquet")
    wrong = pa.table({"id": ["b", "c", "d"], "text": [[1, 2], None, []]})
    pq.write_table(wrong, tmp_path / "b.parquet")
    files = list_corpus_files([tmp_path])
    check_corpus(files, CONFIG)
    assert "1 of 2 files do not fit, their records are rejects" in caplog.text
    assert "b.parquet has list<" in caplog.text
    rows = read_file(files[1])
    assert [(row["doc_id"], row["reason"]) for row in rows] == [
        ("b", records.TEXT_NOT_A_STRING),
        ("c", records.MISSING_TEXT),
        ("d", records.TEXT_NOT_A_STRING),
    ]


def test_a_parquet_file_cut_anywhere_is_one_record_of_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [document["text"] for document in DOCUMENTS]}), path)
    content = path.read_bytes()
    for size_bytes in (1, 4, 12, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:size_bytes])
        assert [(row["position"], row["reason"]) for row in read(path)] == [(1, records.DAMAGED)]


def test_files_of_another_format_than_their_name_says_are_damage(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "b.jsonl.gz", "c.parquet"):
        (tmp_path / name).write_bytes(b'{"text": "plain"}\n' * 20)
    for file in list_corpus_files([tmp_path]):
        assert [row["reason"] for row in read_file(file)] == [records.DAMAGED]


# Names that are no files ----------------------------------------------------------------------------------------------


def test_loops_broken_links_and_pipes_end_and_are_accounted_for(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_documents(folder / "a.jsonl", DOCUMENTS[:2])
    (folder / "loop").symlink_to(folder)
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    (folder / "broken.jsonl").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.jsonl")
    for paths in ([folder], [folder / "**"], [folder / "*.jsonl"]):
        files = list_corpus_files(paths)
        check_corpus(files, CONFIG)
        found = {file.name: [row["reason"] for row in read_file(file)] for file in files}
        assert found == {
            "a.jsonl": [None, None],
            "broken.jsonl": [records.UNKNOWN_FORMAT],
            "pipe.jsonl": [records.UNKNOWN_FORMAT],
            "self.jsonl": [records.UNKNOWN_FORMAT],
        }
    for name in ("pipe.jsonl", "self.jsonl", "broken.jsonl"):
        with pytest.raises(CorpusError, match="is neither a file nor a folder"):
            list_corpus_files([folder / name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_known_error(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    path.chmod(0)
    files = list_corpus_files([tmp_path])
    with pytest.raises(CorpusError, match=r"cannot be opened: Permission denied; check that it may be read"):
        check_corpus(files, CONFIG)
    with pytest.raises(CorpusError, match=r"cannot be opened: Permission denied"):
        list(read_records(files[0], CONFIG))


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
warm, path, bound = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = ReadingConfig(max_document_bytes=bound)
for batch in read_records(list_corpus_files([warm])[0], config):
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = []
for batch in read_records(list_corpus_files([path])[0], config):
    found += batch.select(["position", "reason", "value"]).to_pylist()
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found[:3], len(found)]))
"""


def measure_reading(path: Path, max_document_bytes: int) -> tuple[int, list[dict[str, Any]], int]:
    """Reads a file in a process of its own; returns how much its memory grew, its first records and their number."""
    warm = path.parent / "warm"
    warm.mkdir()
    document = write_documents(warm / path.name) if not path.name.endswith("parquet") else warm / path.name
    if path.name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["x"]}), document)
    command = [sys.executable, "-c", MEASURE, str(document), str(path), str(max_document_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True).stdout
    growth_kib, found, num_records = json.loads(output)
    return growth_kib * 1024, found, num_records


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl"])
def test_a_line_of_two_hundred_megabytes_takes_the_memory_of_the_bound_and_no_more(tmp_path: Path, name: str) -> None:
    path, line_bytes = tmp_path / name, 200 * MIB
    with path.open("wb") as raw:
        if name.endswith("zst"):
            with zstandard.ZstdCompressor().stream_writer(raw) as sink:
                for _ in range(200):
                    sink.write(b"x" * MIB)
                sink.write(b'\n{"text": "after"}\n')
        else:
            raw.truncate(line_bytes)  # a hole: no blocks on disk
            raw.seek(line_bytes)
            raw.write(b'\n{"text": "after"}\n')
    growth_bytes, found, _ = measure_reading(path, 4 * MIB)
    assert growth_bytes < 32 * MIB
    assert [(row["position"], row["reason"], row["value"]) for row in found] == [
        (1, records.TOO_LARGE, float(line_bytes)),
        (2, None, None),
    ]


def test_metadata_is_bounded_like_text(tmp_path: Path) -> None:
    config = ReadingConfig(max_document_bytes=1000, batch_text_bytes=3000)
    blobs = pa.array([b"x" * 400, b"x" * 600, None])
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": ["t"] * 3, "blob": blobs}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", config)
    assert [(row["doc_id"], row["reason"]) for row in rows] == [("a", None), ("b", records.TOO_LARGE), ("c", None)]
    assert rows[1]["detail"] == "1211 bytes of metadata, the bound is 1000"
    assert (rows[1]["value"], rows[1]["threshold"]) == (1211.0, 1000.0)
    numbers = b",".join([b"1e15"] * 100)  # written out they are four times as long
    line = b'{"text": "t", "n": [' + numbers + b"]}"
    assert [row["reason"] for row in read(write_lines(tmp_path / "a.jsonl", [line]), config)] == [records.TOO_LARGE]


def test_batches_of_large_metadata_and_ids_are_bounded(tmp_path: Path) -> None:
    config = ReadingConfig(max_document_bytes=10_000, batch_text_bytes=30_000)
    lines = [json.dumps({"text": "t", "meta": "m" * 5000}).encode()] * 40
    lines += [json.dumps({"id": f"{number}" * 5000}).encode() for number in range(8)]
    (file,) = list_corpus_files([write_lines(tmp_path / "a.jsonl", lines)])
    batches = list(read_records(file, config))
    assert sum(batch.num_rows for batch in batches) == len(lines)
    for batch in batches:
        columns = [batch[name].to_pylist() for name in ("metadata", "doc_id", "text")]
        assert sum(len(value or "") for column in columns for value in column) <= config.batch_text_bytes


def test_many_large_documents_are_read_in_the_memory_of_a_few(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    line = json.dumps({"text": "word " * (MIB // 5), "meta": "m" * MIB}).encode() + b"\n"
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as sink:
        for _ in range(100):
            sink.write(line)
    growth_bytes, found, num_records = measure_reading(path, 4 * MIB)
    assert (num_records, found[0]["reason"]) == (100, None)
    assert growth_bytes < 64 * MIB


def test_a_parquet_row_group_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array(["word " * (MIB // 5)]).take(pa.array([0] * 100))
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, data_page_size=MIB, compression="zstd")
    assert pq.read_metadata(path).num_row_groups == 1
    growth_bytes, found, num_records = measure_reading(path, 4 * MIB)
    assert (num_records, found[0]["reason"]) == (100, None)
    assert growth_bytes < 64 * MIB
