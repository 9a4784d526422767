"""Reading on from a record: the batches that are left are the very same, whatever came before them."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import records
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from tests.test_reading import CONFIG, read_file, write_lines

WHOLE_FILES = ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.txt"]
FILES_TO_READ_ON = [*WHOLE_FILES, "damaged.jsonl.zst", "damaged.jsonl.gz", "damaged.parquet"]


def make_mixed_documents() -> list[dict[str, Any]]:
    """Real texts with records that are rejected between them."""
    documents: list[dict[str, Any]] = []
    for number, name in enumerate(sorted(topics)[:30]):
        documents.append({"id": name, "text": topics[name][: 80 * number], "source": "topics", "number": number})
    return documents


def write_to_read_on(folder: Path, name: str) -> Path:
    """Writes a file with kept and rejected records; names that start with ``damaged`` end or break off early."""
    documents = make_mixed_documents()
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(documents), path, row_group_size=7, use_dictionary=False)
    elif name.endswith("txt"):
        path.write_text(documents[-1]["text"])
    elif name.endswith("csv"):
        path.write_text("a,b")
    else:
        lines = [json.dumps(document).encode() for document in documents]
        lines[5:5] = [b"", b"not json", b"  \r", b'{"id": "big", "text": "' + b"x" * 9000 + b'"}', b"[]"]
        write_lines(path, [b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    if name.startswith("damaged"):
        content = bytearray(path.read_bytes())
        if name.endswith("parquet"):
            metadata = pq.read_metadata(path)
            for group in (0, 4):
                start = metadata.row_group(group).column(1).data_page_offset
                content[start : start + 60] = b"\xff" * 60
        else:
            del content[len(content) * 2 // 3 :]
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", FILES_TO_READ_ON)
@pytest.mark.parametrize("batch_text_bytes", [1, 3000, 4 << 20])
def test_reading_on_after_a_batch_gives_the_batches_that_are_left(
    tmp_path: Path, name: str, batch_text_bytes: int
) -> None:
    (file,) = list_corpus_files([write_to_read_on(tmp_path, name)])
    config = ReadingConfig(batch_text_bytes=batch_text_bytes, max_document_bytes=8000)
    batches = list(read_records(file, config))
    positions = [position for batch in batches for position in batch["position"].to_pylist()]
    reasons = {reason for batch in batches for reason in batch["reason"].to_pylist()}
    assert (records.DAMAGED in reasons) == name.startswith("damaged")
    assert len(batches) == len(positions) or batch_text_bytes > 1
    for number, batch in enumerate(batches):
        assert list(read_records(file, config, after=batch["position"][-1].as_py())) == batches[number + 1 :]
    for after in range(0, positions[-1] + 3, 4):
        rest = [
            position for batch in read_records(file, config, after=after) for position in batch["position"].to_pylist()
        ]
        assert rest == [position for position in positions if position > after]


def test_a_file_of_an_unknown_format_is_one_record_that_can_be_passed_over(tmp_path: Path) -> None:
    write_to_read_on(tmp_path, "a.csv")
    (tmp_path / "b.txt").write_text("x")
    file = list_corpus_files([tmp_path])[0]
    assert [row["reason"] for row in read_file(file)] == [records.UNKNOWN_FORMAT]
    assert list(read_records(file, CONFIG, after=1)) == []
