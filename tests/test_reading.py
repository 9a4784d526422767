"""Reading corpus files: every record is there once, kept or with its reason, whatever the file looks like."""

import datetime
import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import records
from pipelines.checking import check_corpus
from pipelines.conflicts import find_id_conflicts
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reading import read_records
from pipelines.records import RECORDS, ReadingConfig
from schemas.errors import CorpusError, InputError
from schemas.identifiers import hash_bytes
from schemas.tables import REJECTS

DOCUMENTS: list[dict[str, Any]] = [
    {"id": name, "text": topics[name], "source": "topics"} for name in sorted(topics)[:25]
] + [
    {"id": "zh", "text": "第一条 为了保护专利权人的合法权益。\r\n第二条\u2028", "source": "laws", "year": 2008},
    {"id": "nul", "text": "a\x00b\u200d\U0001f468", "source": "s", "tags": ["x", None], "a": {"z": 1, "b": 2.5}},
]
CONFIG = ReadingConfig()


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    content = b"\n".join(lines)
    if path.name.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    elif path.name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def write_documents(path: Path, documents: Sequence[dict[str, Any]] = tuple(DOCUMENTS)) -> Path:
    return write_lines(path, [json.dumps(document).encode() for document in documents])


def read(path: Path, config: ReadingConfig = CONFIG) -> list[dict[str, Any]]:
    (file,) = list_corpus_files([path])
    return read_file(file, config)


def read_file(file: CorpusFile, config: ReadingConfig = CONFIG) -> list[dict[str, Any]]:
    batches = list(read_records(file, config))
    assert all(batch.schema == RECORDS and batch.num_rows > 0 for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    rows = [row for batch in batches for row in batch.to_pylist()]
    for row in rows:
        assert row["path"] == file.path
        if row["reason"] is None:
            assert row["content_hash"] == hash_bytes(row["text"].encode())
            assert (row["size_bytes"], row["num_chars"]) == (len(row["text"].encode()), len(row["text"]))
            assert row["doc_id"]
        else:
            assert (row["text"], row["content_hash"], row["size_bytes"], row["num_chars"]) == (None, None, 0, 0)
            assert row["detail"]
    return rows


def check_documents(rows: list[dict[str, Any]], documents: Sequence[dict[str, Any]], positions: Sequence[int]) -> None:
    assert [row["position"] for row in rows] == list(positions)
    for row, document in zip(rows, documents, strict=True):
        rest = {name: value for name, value in document.items() if name not in ("id", "text", "source")}
        assert row["reason"] is None
        assert (row["doc_id"], row["text"], row["source"]) == (document["id"], document["text"], document["source"])
        assert row["metadata"] == json.dumps(rest, sort_keys=True, separators=(",", ":"))


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "A.JSONL"])
def test_lines_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    check_documents(read(write_documents(tmp_path / name)), DOCUMENTS, range(1, len(DOCUMENTS) + 1))


@pytest.mark.parametrize(("name", "compress"), [("a.jsonl.zst", zstandard.compress), ("a.jsonl.gz", gzip.compress)])
def test_files_of_several_frames_are_read_whole(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    content = b"".join(json.dumps(document).encode() + b"\n" for document in DOCUMENTS)
    cuts = [0, 7, 1000, 1000, 20_000, len(content)]
    frames = [compress(content[start:end]) for start, end in itertools.pairwise(cuts)]
    if name.endswith("zst"):
        frames.insert(2, b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip")  # a frame that holds no data
    (tmp_path / name).write_bytes(b"".join(frames))
    check_documents(read(tmp_path / name), DOCUMENTS, range(1, len(DOCUMENTS) + 1))


def test_byte_order_mark_blank_lines_and_line_ends_of_the_file_are_no_part_of_records(tmp_path: Path) -> None:
    lines = [json.dumps(document).encode() for document in DOCUMENTS[:3]]
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n  \n" + lines[1] + b"\n\n" + lines[2] + b"\r\n"
    )
    check_documents(read(tmp_path / "a.jsonl"), DOCUMENTS[:3], [1, 4, 6])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\xef\xbb\xbf\n")
    assert [row["text"] for row in read(tmp_path / "a.txt")] == ["one\r\ntwo\ufeff\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.txt"])
def test_empty_files_hold_no_lines(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, [b""])
    check_corpus(list_corpus_files([path]), CONFIG)
    assert [row["reason"] for row in read(path)] == ([records.EMPTY] if name == "a.txt" else [])


def test_parquet_rows_are_read_with_their_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([3, 1, 2]),
            "text": pa.array(["one", None, "thrée\x00"], pa.large_string()),
            "source": pa.array(["a", "b", None]),
            "when": pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3), None, None], pa.timestamp("ns")),
            "blob": pa.array([b"\xff\x00", b"", None]),
            "tags": pa.array([["x"], [], None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = read(tmp_path / "a.parquet")
    assert [(row["position"], row["doc_id"], row["text"], row["reason"]) for row in rows] == [
        (1, "3", "one", None),
        (2, "1", None, records.MISSING_TEXT),
        (3, "2", "thrée\x00", None),
    ]
    assert json.loads(rows[0]["metadata"]) == {"blob": "ff00", "tags": ["x"], "when": "2024-02-29 01:02:03.000000000"}
    assert json.loads(rows[2]["metadata"]) == {"blob": None, "source": None, "tags": None, "when": None}
    assert [row["source"] for row in rows] == ["a", "a.parquet", "a.parquet"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [document["text"] for document in DOCUMENTS]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet", row_group_size=5)
    check_corpus(list_corpus_files([tmp_path]), CONFIG)
    assert [row["text"] for row in read(tmp_path / "a.parquet")] == texts


def test_a_row_that_is_not_utf8_takes_no_other_with_it(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"tw\xffo", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row["text"] for row in rows] == ["one", None, "three"]
    assert rows[1]["reason"] == records.INVALID_UTF8
    assert "byte 2" in rows[1]["detail"]


def test_text_files_are_documents_named_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.md", "sub/a.txt", "c.RST"):
        (tmp_path / name).write_text(f"text of {name}\n")
    rows = [read_file(file)[0] for file in list_corpus_files([tmp_path])]
    assert [(row["doc_id"], row["source"]) for row in rows] == [
        ("b.md", "b.md"),
        ("c.RST", "c.RST"),
        ("sub/a.txt", "a.txt"),
    ]
    assert [row["text"] for row in rows] == ["text of b.md\n", "text of c.RST\n", "text of sub/a.txt\n"]
    assert read(tmp_path / "sub/a.txt")[0]["doc_id"] == "a.txt"


def test_batches_are_bounded_and_lose_nothing(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    (file,) = list_corpus_files([path])
    bound = 20_000
    batches = list(read_records(file, ReadingConfig(batch_text_bytes=bound)))
    assert len(batches) > 5
    assert pa.Table.from_batches(batches).equals(pa.Table.from_batches(read_records(file, CONFIG)).combine_chunks())
    for batch in batches:
        assert sum(batch["size_bytes"].to_pylist()) <= bound or batch.num_rows == 1


# Rejects --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason", "doc_id", "detail"),
    [
        (b'{"id": "a", "text": "x"', records.NOT_JSON, None, "line 1 column"),
        (b'{"id": "a", "text": NaN}', records.NOT_JSON, None, ""),
        (b'{"id": "a", "text": "\\ud800"}', records.NOT_JSON, None, "surrogate"),
        (b'{"id": "a", "text": "b\xff"}', records.INVALID_UTF8, None, "byte 22 of the line"),
        (b'{"id": "a", "text": "\xed\xa0\x80"}', records.INVALID_UTF8, None, "byte 21 of the line"),
        (b'["text"]', records.NOT_AN_OBJECT, None, "array"),
        (b'"text"', records.NOT_AN_OBJECT, None, "string"),
        (b"null", records.NOT_AN_OBJECT, None, "null"),
        (b'{"id": "a", "body": "x"}', records.MISSING_TEXT, "a", "'text'"),
        (b'{"id": 7, "text": null}', records.MISSING_TEXT, "7", "'text'"),
        (b'{"id": "a", "text": 5}', records.TEXT_NOT_A_STRING, "a", "number"),
        (b'{"id": "a", "text": ["x"]}', records.TEXT_NOT_A_STRING, "a", "array"),
        (b'{"id": "a", "text": ""}', records.EMPTY, "a", "0 characters"),
        (b'{"id": "a", "text": " \\n\\u3000\\u00a0"}', records.EMPTY, "a", "4 characters"),
        (b'{"id": "", "text": "x"}', records.INVALID_ID, None, "'id'"),
        (b'{"id": null, "text": "x"}', records.INVALID_ID, None, "None"),
        (b'{"id": true, "text": "x"}', records.INVALID_ID, None, "True"),
        (b'{"id": 1.5, "text": "x"}', records.INVALID_ID, None, "1.5"),
        (b'{"id": "a", "text": "' + b"x" * 500 + b'"}', records.TOO_LARGE, None, "523 bytes, the bound is 400"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason_and_its_neighbours_stay(
    tmp_path: Path, line: bytes, reason: str, doc_id: str | None, detail: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"id": 1, "text": "one"}', line, b'{"text": "three"}'])
    rows = read(path, ReadingConfig(max_document_bytes=400))
    assert [row["doc_id"] for row in rows] == ["1", doc_id, "a.jsonl:3"]
    assert [row["reason"] for row in rows] == [None, reason, None]
    assert [row["position"] for row in rows] == [1, 2, 3]
    assert detail in rows[1]["detail"]


def test_columns_nested_too_deeply_to_be_written_are_rejected(tmp_path: Path) -> None:
    nested = b'{"id": "a", "text": "x", "deep": ' + b"[" * 400 + b"]" * 400 + b"}"
    rows = read(write_lines(tmp_path / "a.jsonl", [nested, b'{"text": "two"}']))
    assert [row["reason"] for row in rows] == [records.NOT_JSON, None]


def test_a_source_that_is_no_string_stays_in_the_metadata(tmp_path: Path) -> None:
    (row,) = read(write_lines(tmp_path / "a.jsonl", [b'{"text": "x", "source": {"b": 1, "a": 2}}']))
    assert (row["source"], row["metadata"]) == ("a.jsonl", '{"source":{"a":2,"b":1}}')


def test_titles_are_taken_from_their_column_and_stay_in_the_metadata(tmp_path: Path) -> None:
    lines = [b'{"text": "x", "name": "T", "id": 1}', b'{"text": "y", "name": 5}', b'{"text": "z"}', b'{"name": "R"}']
    path = write_lines(tmp_path / "a.jsonl", lines)
    rows = read(path, ReadingConfig(title_column="name"))
    assert [row["title"] for row in rows] == ["T", "", "", ""]
    assert [row["metadata"] for row in rows] == ['{"name":"T"}', '{"name":5}', "{}", "{}"]
    assert [row["title"] for row in read(path)] == [""] * 4
    by_id = read(path, ReadingConfig(title_column="id", id_column="name"))
    assert [(row["doc_id"], row["title"]) for row in by_id] == [("T", ""), ("5", ""), ("a.jsonl:3", ""), ("R", "")]
    (row,) = read(
        write_lines(tmp_path / "b.jsonl", [b'{"text": "x", "source": "S"}']), ReadingConfig(title_column="source")
    )
    assert (row["title"], row["source"], row["metadata"]) == ("S", "S", "{}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_only_the_columns_named_are_carried_into_the_metadata(tmp_path: Path, name: str) -> None:
    documents = [{"id": "a", "text": "one", "source": "s", "x": 1, "y": [2], "z": None, "title": "T"}]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(documents), tmp_path / name)
    else:
        write_documents(tmp_path / name, documents)
    config = ReadingConfig(metadata_columns=("y", "z", "missing"), title_column="title")
    (row,) = read(tmp_path / name, config)
    assert (row["doc_id"], row["text"], row["source"], row["title"]) == ("a", "one", "s", "T")
    assert row["metadata"] == '{"y":[2],"z":null}'
    (row,) = read(tmp_path / name, ReadingConfig(metadata_columns=("missing",)))
    assert row["metadata"] == "{}"
    (row,) = read(tmp_path / name, ReadingConfig(metadata_columns=("no",), text_column="t", id_column="i"))
    assert (row["reason"], row["position"]) == (records.MISSING_TEXT, 1)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"uid": "u", "id": 5, "text": 1, "body": "b", "url": "w"}'])
    (row,) = read(path, ReadingConfig(id_column="uid", text_column="body", source_column="url"))
    assert (row["doc_id"], row["text"], row["source"], row["metadata"]) == ("u", "b", "w", '{"id":5,"text":1}')


def test_too_large_documents_are_rejected_in_every_format(tmp_path: Path) -> None:
    text = "word " * 100
    write_documents(tmp_path / "a.jsonl.gz", [{"id": "a", "text": text}, {"id": "b", "text": "small"}])
    pq.write_table(pa.table({"id": ["a", "b"], "text": [text, "small"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(text)
    config = ReadingConfig(max_document_bytes=499)
    rows = [row for file in list_corpus_files([tmp_path]) for row in read_file(file, config)]
    assert [row["reason"] for row in rows] == [records.TOO_LARGE, None, records.TOO_LARGE, None, records.TOO_LARGE]
    assert [row["doc_id"] for row in rows] == [None, "b", "a", "b", "c.txt"]
    assert all("499" in row["detail"] for row in rows if row["reason"])
    assert [row["threshold"] for row in rows] == [499.0, None, 499.0, None, 499.0]
    line_bytes = len(json.dumps({"id": "a", "text": text}))
    assert [row["value"] for row in rows] == [float(line_bytes), None, 500.0, None, 500.0]


def test_memory_does_not_grow_with_the_length_of_a_line(tmp_path: Path) -> None:
    import tracemalloc

    path = write_lines(tmp_path / "a.jsonl.zst", [b"x" * (64 << 20), b'{"text": "two"}'])
    tracemalloc.start()
    rows = read(path, ReadingConfig(max_document_bytes=1 << 20))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["reason"] for row in rows] == [records.TOO_LARGE, None]
    assert rows[0]["detail"].startswith(f"{64 << 20} bytes")
    assert peak_bytes < 8 << 20


def test_text_files_that_are_not_utf8_name_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    (row,) = read(tmp_path / "a.txt")
    assert (row["reason"], row["doc_id"]) == (records.INVALID_UTF8, "a.txt")
    assert "byte 2 of the file" in row["detail"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_of_a_truncated_file_the_lines_before_the_end_stay(tmp_path: Path, name: str, share: float) -> None:
    generator = random.Random(1)
    documents = [{"text": f"{row} {generator.random()} " * 9, "id": str(row), "source": "s"} for row in range(5000)]
    path = write_documents(tmp_path / name, documents)
    content = path.read_bytes()
    path.write_bytes(content[: max(6, int(len(content) * share))])
    check_corpus(list_corpus_files([path]), CONFIG)
    rows = read(path)
    num_kept = len(rows) - 1
    check_documents(rows[:-1], documents[:num_kept], range(1, num_kept + 1))
    assert (rows[-1]["reason"], rows[-1]["position"]) == (records.DAMAGED, num_kept + 1)
    assert (share - 0.2) * len(documents) < num_kept < max(1, (share + 0.2) * len(documents))


def test_a_damaged_frame_leaves_the_lines_of_the_frames_before_it(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 3) + b"no frame at all")
    rows = read(tmp_path / "a.jsonl.zst")
    assert [row["reason"] for row in rows] == [None, None, None, records.DAMAGED]


def test_of_a_damaged_parquet_file_only_the_damaged_row_group_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{row} {random.Random(row).random()}" for row in range(5000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(3).column(0).data_page_offset
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    rows = read(path)
    damage = rows.pop(3000)
    assert [(row["position"], row["text"]) for row in rows] == [
        (row + 1, text) for row, text in enumerate(texts) if not 3000 <= row < 4000
    ]
    assert (damage["reason"], damage["position"]) == (records.DAMAGED, 3001)
    assert damage["detail"].startswith("rows 3001 to 4000 cannot be read: ")
    path.write_bytes(content[:1000])
    check_corpus(list_corpus_files([path]), CONFIG)
    assert [(row["reason"], row["position"]) for row in read(path)] == [(records.DAMAGED, 1)]


def test_a_text_column_of_another_type_is_rejected_when_met_later(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert [row["reason"] for row in read(tmp_path / "a.parquet")] == [records.TEXT_NOT_A_STRING] * 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(["id", "text", "source", "other", "more"]), VALUES) | VALUES


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20), max_size=15))
def test_every_line_becomes_exactly_one_record(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    written = [
        number
        for number, line in enumerate(content.split(b"\n"), 1)
        if (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip(b" \t\r\x0b\x0c")
    ]
    rows = read(path)
    assert [row["position"] for row in rows] == written


# The check before a build ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_missing_text_column_is_found_before_reading(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"title": ["t"], "body": ["b"], "id": [1]}), tmp_path / name)
    else:
        write_lines(tmp_path / name, [b"broken", b'{"title": "t", "body": "b", "id": 1}', b'{"text": "x"}'])
    files = list_corpus_files([tmp_path])
    with pytest.raises(
        CorpusError, match=rf"{name} has no column 'text'; its columns are body, id, title; name another"
    ):
        check_corpus(files, CONFIG)
    check_corpus(files, ReadingConfig(text_column="body"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_text_column_that_is_not_text_is_found_before_reading(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": [1]}), tmp_path / name)
    else:
        write_lines(tmp_path / name, [b'{"text": null}', b'{"text": 1}'])
    with pytest.raises(CorpusError, match=r"in column 'text', not text; name another with --text-column"):
        check_corpus(list_corpus_files([tmp_path]), CONFIG)


def test_the_check_passes_what_reading_rejects(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [b"broken", b"[1]", b'{"text": null}', b'{"text": "x"}', b'{"body": 1}'])
    write_lines(tmp_path / "b.jsonl", [b"broken"])
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.csv").touch()
    check_corpus(list_corpus_files([tmp_path]), CONFIG)


@pytest.mark.parametrize("option", ["id_column", "source_column", "title_column"])
def test_a_mistyped_column_that_no_file_has_is_found_before_reading(tmp_path: Path, option: str) -> None:
    write_lines(tmp_path / "a.jsonl", [b'{"text": "x", "body": "b"}', b"broken", b'{"text": "y", "later": "z"}'])
    pq.write_table(pa.table({"text": ["t"], "key": ["k"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("x")
    files = list_corpus_files([tmp_path])
    message = (
        r"no file of the corpus has a column 'kye'; the columns are body, key, text: name one of them as " + option
    )
    with pytest.raises(CorpusError, match=message):
        check_corpus(files, ReadingConfig(**{option: "kye"}))
    for name in ("body", "key", "later"):
        check_corpus(files, ReadingConfig(**{option: name}))
    check_corpus(files, CONFIG)
    check_corpus(list_corpus_files([tmp_path / "c.txt"]), ReadingConfig(**{option: "kye"}))


@pytest.mark.parametrize(
    "values",
    [
        {"title_column": "text"},
        {"metadata_columns": ("x", "text")},
        {"metadata_columns": ("id",)},
        {"metadata_columns": ("",)},
    ],
    ids=str,
)
def test_columns_that_exclude_each_other_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^reading: (title|metadata)"):
        ReadingConfig(**values)


@pytest.mark.parametrize(
    "values", [{"max_document_bytes": 0}, {"batch_text_bytes": 1 << 40}, {"id_column": "text"}], ids=str
)
def test_config_out_of_bounds_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^reading: "):
        ReadingConfig(**values)


# Conflicts of ids -----------------------------------------------------------------------------------------------------

CONFLICT_ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.sampled_from("xyz"), st.sampled_from("01")),
    unique_by=lambda row: row[:2],
)


@settings(max_examples=200, deadline=None)
@given(rows=CONFLICT_ROWS, num_chunks=st.integers(1, 3))
def test_id_conflicts_match_a_search_row_by_row(rows: list[tuple[str, int, str, str]], num_chunks: int) -> None:
    names = ["path", "position", "doc_id", "content_hash"]
    types = pa.schema([RECORDS.field(name) for name in names])
    parts = [rows[start::num_chunks] for start in range(num_chunks)]
    table = pa.concat_tables(
        [pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in part], schema=types) for part in parts]
    )
    first: dict[str, tuple[str, int, str]] = {}
    expected = []
    for path, position, doc_id, content_hash in sorted(rows):
        if doc_id not in first:
            first[doc_id] = (path, position, content_hash)
            continue
        reason = records.DUPLICATE_DOCUMENT if first[doc_id][2] == content_hash else records.CONFLICTING_ID
        expected.append((path, position, doc_id, reason, f"{first[doc_id][0]}:{first[doc_id][1]} has the same id and"))
    found = find_id_conflicts(table)
    assert found.schema == REJECTS
    assert len(found) == len(expected)
    for row, (path, position, doc_id, reason, detail) in zip(found.to_pylist(), expected, strict=True):
        assert (row["path"], row["position"], row["doc_id"], row["reason"]) == (path, position, doc_id, reason)
        assert row["detail"].startswith(detail)
        assert ("another text" in row["detail"]) == (reason == records.CONFLICTING_ID)


def test_no_records_have_no_conflicts() -> None:
    assert find_id_conflicts(RECORDS.empty_table()).equals(REJECTS.empty_table())
