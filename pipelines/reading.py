"""Documents out of files: every record read becomes one row, kept or rejected with its reason.

Second step of the data flow: files (:mod:`pipelines.formats`) -> **records** -> references (:mod:`pipelines.chunking`).
A line of JSON, a row of Parquet (:mod:`pipelines.row_groups`) and a text file each are one record
(:mod:`pipelines.records`).

JSON is read strictly (no NaN, no comments). An escape of half a surrogate pair stands for no character; such a line is
``not_json``. Of a column that is named twice in a record the last value counts.
"""

from collections.abc import Callable, Iterator

import orjson
import pyarrow as pa

from pipelines.formats import FORMATS, PARQUET, TEXT, UNKNOWN, CorpusFile, DamagedLineError, iterate_lines, open_file
from pipelines.records import (
    DAMAGED,
    INVALID_UTF8,
    NOT_AN_OBJECT,
    NOT_JSON,
    UNKNOWN_FORMAT,
    Batches,
    ReadingConfig,
    Rows,
    name_json_type,
)
from pipelines.row_groups import read_parquet

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_records(file: CorpusFile, config: ReadingConfig, after: int = 0) -> Iterator[pa.RecordBatch]:
    """Reads one file, or what of it comes after a record.

    Args:
        file: the file.
        config: how it is read.
        after: the last position that was read before; 0 for a read from the start. What comes before is passed over
            without a look at its content. If a batch ended there, the batches after it are the very same.

    Returns:
        Batches of :data:`pipelines.records.RECORDS` in the order of the file, each with at least one row; none for an
        empty file. The cuts between batches follow from the file and the config alone.

    Raises:
        CorpusError: the file cannot be opened.
    """
    rows = Rows(file, config)
    for batch in _find_reader(file.format)(rows, after):
        if batch is not None:
            yield batch
    last = rows.end_batch()
    if last is not None:
        yield last


def _find_reader(file_format: str) -> Callable[[Rows, int], Batches]:
    """Returns the function that adds the records of a file to rows and yields after each of them."""
    return {PARQUET: read_parquet, TEXT: _read_text, UNKNOWN: _read_unknown}.get(file_format, _read_lines)


def _read_unknown(rows: Rows, after: int) -> Batches:
    if not after:
        yield rows.reject(1, UNKNOWN_FORMAT, f"the formats are {' '.join(FORMATS)}")


def _read_text(rows: Rows, after: int) -> Batches:
    if after:
        return
    file, config = rows.file, rows.config
    with open_file(file) as stream:
        size_bytes = stream.size()
        content = stream.read() if size_bytes <= config.max_document_bytes else None
    if content is None:
        yield rows.reject_size(1, size_bytes, file.doc_id)
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield rows.reject(1, INVALID_UTF8, f"{error.reason} at byte {error.start} of the file", file.doc_id)
        return
    row = {config.id_column: file.doc_id, config.text_column: text.removeprefix("\ufeff")}
    yield rows.add_row(1, row, size_bytes)


def _read_lines(rows: Rows, after: int) -> Batches:
    try:
        for number, line, size_bytes in iterate_lines(rows.file, rows.config.max_document_bytes, after):
            if line is None:
                yield rows.reject_size(number, size_bytes)
                continue
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            try:
                row = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                if content and not content.isspace():
                    yield _reject_line(rows, number, line, error)
                continue
            if isinstance(row, dict):
                yield rows.add_row(number, row, size_bytes)
            else:
                yield rows.reject(number, NOT_AN_OBJECT, f"the line holds {name_json_type(row)}")
    except DamagedLineError as error:
        if error.number > after:
            yield rows.reject(error.number, DAMAGED, str(error))


def _reject_line(rows: Rows, number: int, line: bytes, error: orjson.JSONDecodeError) -> pa.RecordBatch | None:
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return rows.reject(number, INVALID_UTF8, f"{fault.reason} at byte {fault.start} of the line")
    return rows.reject(number, NOT_JSON, str(error))
