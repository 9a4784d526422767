"""Tables as bytes for files and for other programs: CSV, JSON and Parquet.

Takes the result of a query (``pipelines.inspecting``) or any other pyarrow table. Drawing a table for a person is the
command line's part.
"""

import io
from decimal import Decimal
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from schemas.errors import InputError

STYLES = ("csv", "json", "parquet")


def format_table(table: pa.Table, style: str) -> bytes:
    """Returns a table in one of :data:`STYLES`.

    ``csv`` has a header line; null is an empty field, an empty text is ``""``; lists and other nested values are JSON
    text. ``json`` is an array with one object a row, one line a row: times in ISO format, bytes as hexadecimal digits,
    not-a-number and infinity as null, whole numbers beyond 64 bits as text. ``parquet`` keeps every type.

    Raises:
        InputError: an unknown style, two columns of one name, or a type that the style cannot hold.
    """
    if style not in STYLES:
        raise InputError(f"format is {style!r}, must be one of {', '.join(STYLES)}")
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise InputError(f"two columns of the result are named {repeated[0]!r}; rename one with AS")
    if style == "json":
        rows = [_dump(row) for row in table.to_pylist()]
        return b"[" + b",\n ".join(rows) + b"]\n"
    sink = io.BytesIO()
    try:
        if style == "csv":
            pyarrow.csv.write_csv(_flatten(table), sink)
        else:
            pq.write_table(table, sink, compression="zstd")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(f"the result cannot be written as {style}: {error}; cast the column to VARCHAR") from error
    return sink.getvalue()


def _flatten(table: pa.Table) -> pa.Table:
    """Replaces columns that CSV has no form for by text."""
    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            convert = _dump_text
        elif pa.types.is_binary(field.type) or pa.types.is_interval(field.type):
            convert = _to_json
        else:
            continue
        texts = [None if value is None else convert(value) for value in table.column(index).to_pylist()]
        table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table


def _dump(value: Any) -> bytes:
    """Returns a value as JSON."""
    return orjson.dumps(value, default=_to_json, option=orjson.OPT_NON_STR_KEYS)


def _dump_text(value: Any) -> str:
    """Returns a value as JSON text."""
    return _dump(value).decode()


def _to_json(value: Any) -> Any:
    """Returns a JSON value for the types that have none; intervals become ISO 8601 durations."""
    if isinstance(value, Decimal):
        if value != value.to_integral_value():
            return float(value)
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, pa.MonthDayNano):
        return f"P{value.months}M{value.days}DT{value.nanoseconds / 1e9:.9g}S"
    return str(value)
