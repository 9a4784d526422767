"""Records out of Parquet files, row group by row group.

    files (:mod:`pipelines.formats`) -> **rows of Parquet** -> records (:mod:`pipelines.records`)

A part of :mod:`pipelines.reading`. What can be read of a damaged file is read: one row, or one row group, is lost at a
time, and what is lost is a reject.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.formats import open_file
from pipelines.records import DAMAGED, INVALID_UTF8, Batches, ReadingConfig, Rows

MAX_PARQUET_ROWS = 1024


def read_parquet(rows: Rows, after: int) -> Batches:
    """Reads row group by row group, so that a read that begins at any of them sees the same batches.

    Of a damaged row group the rows before the damage stay; the rest of it is one reject, and the next group is read.

    Args:
        rows: what the records are added to; it names the file.
        after: the last position that was read before; 0 for a read from the start.

    Returns:
        Once a record, the batch that was full before it, mostly None.

    Raises:
        CorpusError: the file cannot be opened.
    """
    with open_file(rows.file) as stream:
        try:
            parquet = pq.ParquetFile(stream, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            if not after:
                yield rows.reject(1, DAMAGED, str(error))
            return
        columns = _choose_columns(parquet.schema_arrow, rows.config)
        end = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            position, end = end, end + group.num_rows
            if end <= after:
                continue
            num_rows = _choose_batch_rows(group, rows.config)
            try:
                for batch in parquet.iter_batches(num_rows, row_groups=[index], columns=columns, use_threads=False):
                    num_passed = min(batch.num_rows, max(0, after - position))
                    position += num_passed
                    for full in _add_batch(rows, position, batch.slice(num_passed)):
                        position += 1
                        yield full
            except (pa.ArrowException, OSError) as error:
                if position >= after:
                    lost = f"rows {position + 1} to {end} cannot be read: {error}"
                    yield rows.reject(position + 1, DAMAGED, lost)


def _choose_columns(schema: pa.Schema, config: ReadingConfig) -> list[str] | None:
    """Returns the columns to read, None for all, also for a file that has none of those named: its rows count."""
    if not config.metadata_columns:
        return None
    named = [config.id_column, config.text_column, config.source_column, config.title_column, *config.metadata_columns]
    return [name for name in dict.fromkeys(named) if name in schema.names] or None


def _choose_batch_rows(group: pq.RowGroupMetaData, config: ReadingConfig) -> int:
    mean_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    return int(min(MAX_PARQUET_ROWS, max(1, config.batch_text_bytes // mean_bytes)))


def _add_batch(rows: Rows, position: int, batch: pa.RecordBatch) -> Batches:
    """Adds the rows of Parquet that come after a position."""
    sizes = _measure_texts(batch, rows.config)
    for size_bytes, row in zip(sizes, _iterate_rows(_cast_times(batch)), strict=True):
        position += 1
        if isinstance(row, UnicodeDecodeError):
            yield rows.reject(position, INVALID_UTF8, f"{row.reason} at byte {row.start} of a value")
        elif isinstance(row, Exception):
            yield rows.reject(position, DAMAGED, str(row))
        else:
            yield rows.add_row(position, row, size_bytes)


def _measure_texts(batch: pa.RecordBatch, config: ReadingConfig) -> list[int]:
    """Returns the bytes of each text, 0 where there is none."""
    index = batch.schema.get_field_index(config.text_column)
    if index < 0 or not holds_text(batch.schema.field(index).type):
        return [0] * batch.num_rows
    texts = batch.column(index)
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    sizes: list[int] = pc.fill_null(pc.binary_length(texts), 0).to_pylist()
    return sizes


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


def holds_text(kind: pa.DataType) -> bool:
    """Says whether a column of this type holds strings, of whatever width and encoding."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
