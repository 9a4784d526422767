"""Documents out of files: every record read becomes one row, kept or rejected with its reason.

Second step of the data flow: files (:mod:`pipelines.formats`) -> **records** -> references (:mod:`pipelines.chunking`).
A line of JSON, a row of Parquet and a text file each are one record. Kept and rejected records travel in the same
batches, so that read = kept + dropped holds wherever they are counted.

JSON is read strictly (no NaN, no comments). An escape of half a surrogate pair stands for no character; such a line is
``not_json``. Of a column that is named twice in a record the last value counts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.formats import FORMATS, PARQUET, TEXT, UNKNOWN, CorpusFile, iterate_lines, open_file
from schemas.errors import CorpusError, InputError
from schemas.identifiers import hash_bytes
from schemas.tables import REJECTS

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
    ]
)
"""One row a record. Positions count from 1: the line, the row of the Parquet file, 1 for a text file.

A kept record has a text and no reason, a reject has a reason and no text, no hash and sizes of 0. ``metadata`` is a
JSON object of the remaining columns, keys sorted. ``content_hash`` is the id of the text's UTF-8 bytes.
"""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_BATCH_ROWS = 4096
MAX_PARQUET_ROWS = 1024
PREFLIGHT_LINES = 1000
MAX_CONFIG_BYTES = 1 << 30  # far from the 2 GiB that an Arrow string column can hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How records are read.

    Attributes:
        id_column: the document's id, a string or an integer; if there is none, ``<file name>:<position>`` is the id.
        text_column: the document's text.
        source_column: where the document is from; if it holds no string, the file's name is the source.
        max_document_bytes: a longer line of JSON, text file or text in Parquet is rejected.
        batch_text_bytes: bound of the text and metadata in a batch; a single larger document is a batch of its own.
    """

    id_column: str = "id"
    text_column: str = "text"
    source_column: str = "source"
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


class _Record(NamedTuple):
    """The columns of :data:`RECORDS` but for the path."""

    position: int
    doc_id: str | None
    source: str
    metadata: str = "{}"
    text: str | None = None
    content_hash: str | None = None
    size_bytes: int = 0
    num_chars: int = 0
    reason: str | None = None
    detail: str = ""


def check_corpus(files: Sequence[CorpusFile], config: ReadingConfig) -> None:
    """Checks before workers start that the text column is there and holds strings.

    Looks at the schema of every Parquet file and at the first record of every file of lines. Empty and damaged files
    pass: reading rejects what is wrong with them.

    Raises:
        CorpusError: a file lacks the column or has it as another type, or cannot be opened.
    """
    for file in files:
        if file.format == PARQUET:
            columns = _describe_parquet(file)
        elif file.format in (TEXT, UNKNOWN):
            continue
        else:
            columns = _describe_lines(file, config)
        if columns is None:
            continue
        if config.text_column not in columns:
            names = ", ".join(sorted(columns)) or "none"
            raise CorpusError(
                f"{file.path} has no column {config.text_column!r}; its columns are {names}: "
                "name one with --text-column"
            )
        kind = columns[config.text_column]
        if kind != "string":
            raise CorpusError(
                f"{file.path} has {kind} in column {config.text_column!r}, not text; name another with --text-column"
            )


def _describe_parquet(file: CorpusFile) -> dict[str, str] | None:
    """Returns the columns with their types, ``string`` for all kinds of text; None if the file is damaged."""
    with open_file(file.path) as stream:
        try:
            schema = pq.read_schema(stream)
        except (pa.ArrowException, OSError):
            return None
    return {field.name: "string" if _holds_text(field.type) else str(field.type) for field in schema}


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _describe_lines(file: CorpusFile, config: ReadingConfig) -> dict[str, str] | None:
    """Returns the columns of the first record with a text or without its column, with the types of the values."""
    try:
        for number, line, _ in iterate_lines(file, config.max_document_bytes):
            if number > PREFLIGHT_LINES:
                return None
            try:
                row = orjson.loads((line or b"").removeprefix(BYTE_ORDER_MARK))
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict) and row.get(config.text_column, "") is not None:
                return {name: _name_json_type(value) for name, value in row.items()}
    except OSError:
        return None
    return None


def _name_json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def read_records(file: CorpusFile, config: ReadingConfig) -> Iterator[pa.RecordBatch]:
    """Reads one file.

    Returns:
        Batches of :data:`RECORDS` in the order of the file, each with at least one row; none for an empty file. The
        cuts between batches follow from the file and the config alone.

    Raises:
        CorpusError: the file cannot be opened.
    """
    waiting: list[_Record] = []
    num_bytes = 0
    for record in _find_reader(file.format)(file, config):
        size_bytes = record.size_bytes + len(record.metadata)
        if waiting and (num_bytes + size_bytes > config.batch_text_bytes or len(waiting) == MAX_BATCH_ROWS):
            yield _make_batch(file, waiting)
            waiting, num_bytes = [], 0
        waiting.append(record)
        num_bytes += size_bytes
    if waiting:
        yield _make_batch(file, waiting)


def _find_reader(file_format: str) -> Callable[[CorpusFile, ReadingConfig], Iterator[_Record]]:
    return {PARQUET: _read_parquet, TEXT: _read_text, UNKNOWN: _read_unknown}.get(file_format, _read_lines)


def _make_batch(file: CorpusFile, records: list[_Record]) -> pa.RecordBatch:
    columns = [[file.path] * len(records), *zip(*records, strict=True)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RECORDS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORDS)


def _get_file_name(file: CorpusFile) -> str:
    return file.path.rpartition("/")[2]


def _reject(file: CorpusFile, position: int, reason: str, detail: str, doc_id: str | None = None) -> _Record:
    return _Record(position, doc_id, _get_file_name(file), reason=reason, detail=detail)


def _read_unknown(file: CorpusFile, config: ReadingConfig) -> Iterator[_Record]:
    yield _reject(file, 1, UNKNOWN_FORMAT, f"the formats are {' '.join(FORMATS)}")


def _read_text(file: CorpusFile, config: ReadingConfig) -> Iterator[_Record]:
    with open_file(file.path) as stream:
        size_bytes = stream.size()
        content = stream.read() if size_bytes <= config.max_document_bytes else None
    if content is None:
        yield _reject_size(file, 1, size_bytes, config, file.doc_id)
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield _reject(file, 1, INVALID_UTF8, f"{error.reason} at byte {error.start} of the file", file.doc_id)
        return
    row = {config.id_column: file.doc_id, config.text_column: text.removeprefix("\ufeff")}
    yield _make_record(file, 1, row, config)


def _reject_size(
    file: CorpusFile, position: int, size_bytes: int, config: ReadingConfig, doc_id: str | None = None
) -> _Record:
    detail = f"{size_bytes} bytes, the bound is {config.max_document_bytes}"
    return _reject(file, position, TOO_LARGE, detail, doc_id)


def _read_lines(file: CorpusFile, config: ReadingConfig) -> Iterator[_Record]:
    number = 0
    try:
        for number, line, size_bytes in iterate_lines(file, config.max_document_bytes):
            if line is None:
                yield _reject_size(file, number, size_bytes, config)
                continue
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if content and not content.isspace():
                yield _parse_line(file, number, line, content, config)
    except OSError as error:
        yield _reject(file, number + 1, DAMAGED, str(error))


def _parse_line(file: CorpusFile, number: int, line: bytes, content: bytes, config: ReadingConfig) -> _Record:
    try:
        row = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as fault:
            return _reject(file, number, INVALID_UTF8, f"{fault.reason} at byte {fault.start} of the line")
        return _reject(file, number, NOT_JSON, str(error))
    if not isinstance(row, dict):
        return _reject(file, number, NOT_AN_OBJECT, f"the line holds {_name_json_type(row)}")
    return _make_record(file, number, row, config)


def _read_parquet(file: CorpusFile, config: ReadingConfig) -> Iterator[_Record]:
    position = 0
    with open_file(file.path) as stream:
        try:
            parquet = pq.ParquetFile(stream, buffer_size=1 << 20)
            for batch in parquet.iter_batches(_choose_batch_rows(parquet.metadata, config), use_threads=False):
                for row in _iterate_rows(_cast_times(batch)):
                    position += 1
                    if isinstance(row, UnicodeDecodeError):
                        yield _reject(file, position, INVALID_UTF8, f"{row.reason} at byte {row.start} of a value")
                    elif isinstance(row, Exception):
                        yield _reject(file, position, DAMAGED, str(row))
                    else:
                        yield _make_record(file, position, row, config)
        except (pa.ArrowException, OSError) as error:
            yield _reject(file, position + 1, DAMAGED, str(error))


def _choose_batch_rows(metadata: pq.FileMetaData, config: ReadingConfig) -> int:
    size_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    mean_bytes = max(1, size_bytes // max(1, metadata.num_rows))
    return int(min(MAX_PARQUET_ROWS, max(1, config.batch_text_bytes // mean_bytes)))


def _cast_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Writes points in time as text: Python's own types hold no nanoseconds."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) and not pa.types.is_interval(field.type):
            batch = batch.set_column(index, field.name, pc.cast(batch.column(index), pa.string()))
    return batch


def _iterate_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass  # some value has no form in Python; only its row is to be dropped
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield error


def _make_record(file: CorpusFile, position: int, row: dict[str, Any], config: ReadingConfig) -> _Record:
    """Makes the record of a row of JSON or Parquet, taking its id, text and source out of it."""
    value = row.pop(config.id_column, f"{file.name or _get_file_name(file)}:{position}")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        detail = f"column {config.id_column!r} holds {value!r:.80}, must be a string or an integer"
        return _reject(file, position, INVALID_ID, detail)
    doc_id = str(value)
    text = row.pop(config.text_column, None)
    if text is None:
        return _reject(file, position, MISSING_TEXT, f"no value in column {config.text_column!r}", doc_id)
    if not isinstance(text, str):
        detail = f"column {config.text_column!r} holds {_name_json_type(text)}"
        return _reject(file, position, TEXT_NOT_A_STRING, detail, doc_id)
    if not text or text.isspace():
        return _reject(file, position, EMPTY, f"{len(text)} characters, all white space", doc_id)
    content = text.encode()
    if len(content) > config.max_document_bytes:
        return _reject_size(file, position, len(content), config, doc_id)
    source = _get_file_name(file)
    if isinstance(row.get(config.source_column), str):
        source = row.pop(config.source_column)
    try:
        metadata = orjson.dumps(row, default=_make_json_value, option=orjson.OPT_SORT_KEYS).decode() if row else "{}"
    except orjson.JSONEncodeError as error:
        return _reject(file, position, NOT_JSON, f"the other columns cannot be written as JSON: {error}", doc_id)
    return _Record(position, doc_id, source, metadata, text, hash_bytes(content), len(content), len(text))


def _make_json_value(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def find_id_conflicts(records: pa.Table) -> pa.Table:
    """Finds the documents whose id another document has already.

    The first by path and position keeps the id. A later one is a ``duplicate_document`` if its text equals that of the
    first, else a ``conflicting_id``.

    Args:
        records: the kept records of all files, in any order, with columns path, position, doc_id and content_hash.

    Returns:
        The records to drop, as :data:`schemas.tables.REJECTS`, sorted by path and position.
    """
    paths, names = _encode_column(records, "path")
    path_ranks = np.empty(len(names), dtype=np.int64)
    path_ranks[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    places = path_ranks[paths]
    positions = records["position"].to_numpy()
    doc_ids, _ = _encode_column(records, "doc_id")
    hashes, _ = _encode_column(records, "content_hash")

    order = np.lexsort((positions, places, doc_ids))
    ordered_ids = doc_ids[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered_ids[1:] != ordered_ids[:-1]
    firsts = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    dropped, kept = order[~is_first], firsts[~is_first]
    by_place = np.lexsort((positions[dropped], places[dropped]))
    dropped, kept = dropped[by_place], kept[by_place]

    equal = pa.array(hashes[dropped] == hashes[kept])
    first = records.select(["path", "position"]).take(pa.array(kept))
    place = pc.binary_join_element_wise(first["path"], pc.cast(first["position"], pa.string()), ":")
    wording = pc.if_else(equal, "has the same id and text", "has the same id and another text")
    columns = {
        **{name: records[name].take(pa.array(dropped)) for name in ("path", "position", "doc_id")},
        "reason": pc.if_else(equal, DUPLICATE_DOCUMENT, CONFLICTING_ID),
        "detail": pc.binary_join_element_wise(place, wording, " "),
    }
    return pa.table(columns).cast(REJECTS)


def _encode_column(table: pa.Table, name: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], pa.Array]:
    """Returns a column as codes (rows,) and the distinct values they stand for."""
    encoded = table[name].dictionary_encode().unify_dictionaries()
    if encoded.num_chunks == 0:
        return np.empty(0, dtype=np.int64), pa.array([], pa.string())
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return codes.astype(np.int64), encoded.chunk(0).dictionary
