"""Records: one row for everything that a corpus file holds, kept or rejected with its reason.

    files (:mod:`pipelines.formats`) -> reading (:mod:`pipelines.reading`) -> **records** -> filters -> references

Here are the table, the reasons of rejects, how records are read, and :class:`Rows`, which every reader hands what it
finds. Kept and rejected records travel in the same batches, so that read = kept + dropped holds wherever they are
counted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.formats import CorpusFile
from schemas.errors import InputError
from schemas.identifiers import hash_bytes

NOT_JSON = "not_json"
NOT_AN_OBJECT = "not_an_object"
INVALID_UTF8 = "invalid_utf8"
INVALID_ID = "invalid_id"
MISSING_TEXT = "missing_text"
TEXT_NOT_A_STRING = "text_not_a_string"
EMPTY = "empty"
TOO_LARGE = "too_large"
UNKNOWN_FORMAT = "unknown_format"
DAMAGED = "damaged"
DUPLICATE_DOCUMENT = "duplicate_document"
CONFLICTING_ID = "conflicting_id"

RECORDS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=True),
        pa.field("source", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=True),
        pa.field("content_hash", pa.string(), nullable=True),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("num_chars", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=True),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=True),
        pa.field("threshold", pa.float64(), nullable=True),
    ]
)
"""One row a record. Positions count from 1: the line, the row of the Parquet file, 1 for a text file.

A kept record has a text and no reason, a reject has a reason and no text, no hash and sizes of 0. ``metadata`` is a
JSON object of the remaining columns, keys sorted. ``content_hash`` is the id of the text's UTF-8 bytes. ``title`` is ""
if there is none. ``value`` and ``threshold`` are what was measured and its bound, where the reason is a number.
"""

MAX_BATCH_ROWS = 4096
MISSING = object()
MAX_CONFIG_BYTES = 1 << 30  # far from the 2 GiB that an Arrow string column can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How records are read.

    Attributes:
        id_column: the document's id, a string or an integer; if there is none, ``<file name>:<position>`` is the id.
        text_column: the document's text.
        source_column: where the document is from; if it holds no string, the file's name is the source.
        title_column: the document's title, which stays in the metadata too; "" if there is none. Only a string is one.
        metadata_columns: the columns that are carried into the metadata where they are there; if none is named, all.
        max_document_bytes: a longer line of JSON, text file, text in Parquet or metadata is rejected.
        batch_text_bytes: bound of the text and metadata in a batch; a single larger document is a batch of its own.
    """

    id_column: str = "id"
    text_column: str = "text"
    source_column: str = "source"
    title_column: str = ""
    metadata_columns: tuple[str, ...] = ()
    max_document_bytes: int = 64 << 20
    batch_text_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a size out of bounds, or one column named for two purposes.
        """
        for name in ("max_document_bytes", "batch_text_bytes"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_CONFIG_BYTES:
                raise InputError(f"reading: {name} is {value}, must be between 1 and {MAX_CONFIG_BYTES}")
        columns = (self.id_column, self.text_column, self.source_column)
        if len(set(columns)) < len(columns):
            raise InputError(f"reading: id, text and source columns are {columns}, must be three different names")
        if self.title_column == self.text_column:
            raise InputError(f"reading: title_column is {self.title_column!r}, must be another than text_column")
        if not all(isinstance(name, str) and name for name in self.metadata_columns):
            raise InputError(f"reading: metadata_columns is {self.metadata_columns}, must be names of columns")
        taken = set(columns[:2]) & set(self.metadata_columns)
        if taken:
            raise InputError(f"reading: metadata_columns has {taken.pop()!r}, must be others than id and text columns")


Batches = Iterator[pa.RecordBatch | None]
"""What the readers yield, once a record: the batch that was full before it, mostly None."""


class Rows:
    """The rows of one file on their way into batches, as columns; rejects are few and kept aside.

    What adds a row returns the batch that it did not fit into any more, or None.

    Attributes:
        file: where they are from.
        config: how they are read.
    """

    def __init__(self, file: CorpusFile, config: ReadingConfig) -> None:
        """Begins the first batch of a file."""
        self.file = file
        self.config = config
        self._file_name = file.path.rpartition("/")[2]
        self._begin_batch()

    def _begin_batch(self) -> None:
        self._num_bytes = 0
        self._rows: list[tuple[int, str | None, str, str, str | None, str]] = []
        self._rejects: dict[int, tuple[str, str, float | None, float | None]] = {}

    def _add(self, row: tuple[int, str | None, str, str, str | None, str], size_bytes: int) -> pa.RecordBatch | None:
        """Adds position, id, source, metadata, text and title; they count for at least the text and metadata."""
        full = None
        if self._rows and (
            self._num_bytes + size_bytes > self.config.batch_text_bytes or len(self._rows) == MAX_BATCH_ROWS
        ):
            full = self._make_batch()
        self._rows.append(row)
        self._num_bytes += size_bytes
        return full

    def reject(
        self,
        position: int,
        reason: str,
        detail: str,
        doc_id: str | None = None,
        value: float | None = None,
        threshold: float | None = None,
    ) -> pa.RecordBatch | None:
        """Adds a record that is not kept."""
        row = (position, doc_id, self._file_name, "{}", None, "")
        full = self._add(row, len(detail) + len(doc_id or ""))
        self._rejects[len(self._rows) - 1] = (reason, detail, value, threshold)
        return full

    def reject_size(
        self, position: int, size_bytes: int, doc_id: str | None = None, what: str = ""
    ) -> pa.RecordBatch | None:
        """Adds a record that is not kept because it, or a part of it, is too large."""
        bound = self.config.max_document_bytes
        detail = f"{size_bytes} bytes{what}, the bound is {bound}"
        return self.reject(position, TOO_LARGE, detail, doc_id, float(size_bytes), float(bound))

    def add_row(self, position: int, row: dict[str, Any], size_bytes: int) -> pa.RecordBatch | None:
        """Adds a row of JSON or Parquet, taking its id, text and source out of it.

        Args:
            position: its place in the file.
            row: its columns.
            size_bytes: the bytes of its text, or of the whole line.
        """
        config = self.config
        title = row.get(config.title_column) if config.title_column else ""
        title = title if isinstance(title, str) else ""
        value = row.pop(config.id_column, MISSING)
        if type(value) is str and value:
            doc_id = value
        elif value is MISSING:
            doc_id = f"{self.file.name or self._file_name}:{position}"
        elif type(value) is int:
            doc_id = str(value)
        else:
            detail = f"column {config.id_column!r} holds {value!r:.80}, must be a string or an integer"
            return self.reject(position, INVALID_ID, detail)
        text = row.pop(config.text_column, None)
        if text is None:
            return self.reject(position, MISSING_TEXT, f"no value in column {config.text_column!r}", doc_id)
        if not isinstance(text, str):
            detail = f"column {config.text_column!r} holds {name_json_type(text)}"
            return self.reject(position, TEXT_NOT_A_STRING, detail, doc_id)
        if not text or text.isspace():
            return self.reject(position, EMPTY, f"{len(text)} characters, all white space", doc_id)
        if size_bytes > config.max_document_bytes:
            return self.reject_size(position, size_bytes, doc_id)
        source = row.get(config.source_column)
        if isinstance(source, str):
            del row[config.source_column]
        else:
            source = self._file_name
        if row and config.metadata_columns:
            row = {name: row[name] for name in config.metadata_columns if name in row}
        metadata = "{}"
        if row:
            try:
                written = orjson.dumps(row, default=_make_json_value, option=orjson.OPT_SORT_KEYS)
            except orjson.JSONEncodeError as error:
                return self.reject(position, NOT_JSON, f"the other columns cannot be written as JSON: {error}", doc_id)
            if len(written) > config.max_document_bytes:
                return self.reject_size(position, len(written), doc_id, " of metadata")
            metadata = written.decode()
            size_bytes += len(written)
        return self._add((position, doc_id, source, metadata, text, title), size_bytes)

    def end_batch(self) -> pa.RecordBatch | None:
        """Returns what has been added since the last batch, None if that is nothing."""
        return self._make_batch() if self._rows else None

    def _make_batch(self) -> pa.RecordBatch:
        num_rows = len(self._rows)
        positions, doc_ids, sources, metadata, texts, titles = zip(*self._rows, strict=True)
        encoded = pa.array(texts, pa.string())  # a text keeps its UTF-8 from here on, so to encode it again is a copy
        reasons: list[str | None] = [None] * num_rows
        details = [""] * num_rows
        values: list[float | None] = [None] * num_rows
        thresholds: list[float | None] = [None] * num_rows
        for index, reject in self._rejects.items():
            reasons[index], details[index], values[index], thresholds[index] = reject
        columns = {
            "path": pa.repeat(self.file.path, num_rows),
            "position": positions,
            "doc_id": doc_ids,
            "source": sources,
            "metadata": metadata,
            "text": encoded,
            "content_hash": [None if text is None else hash_bytes(text.encode()) for text in texts],
            "size_bytes": pc.fill_null(pc.binary_length(encoded), 0).cast(pa.int64()),
            "num_chars": [0 if text is None else len(text) for text in texts],
            "reason": reasons,
            "detail": details,
            "title": titles,
            "value": values,
            "threshold": thresholds,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in RECORDS]
        self._begin_batch()
        return pa.RecordBatch.from_arrays(arrays, schema=RECORDS)


def name_json_type(value: Any) -> str:
    """Returns what JSON calls the type of a value; the name of Python's type for one that JSON does not have."""
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _make_json_value(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
