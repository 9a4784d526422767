"""Results of queries as CSV, JSON and Parquet: every value of every type comes back, or is refused by name."""

import csv
import io
import json
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.rendering import format_table
from schemas.errors import InputError


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        yield opened


def run_query(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    return connection.sql(sql).to_arrow_table()


MIXED_SQL = """
select * from (values
    (1, 'a "quoted", text' || chr(10) || 'é', [1, 2], {'k': 1}, 1.5::decimal(4, 2), 'nan'::float,
     timestamp '2024-07-01 10:00:00', date '2024-07-01', 'ab'::blob, interval '1 day',
     12345678901234567890123::hugeint),
    (null, '', [], null, null, null, null, null, null, null, 7)
) t(n, s, l, o, d, f, t, c, b, i, h)
"""


def test_json_holds_every_value(connection: duckdb.DuckDBPyConnection) -> None:
    rows = json.loads(format_table(run_query(connection, MIXED_SQL), "json"))
    assert rows == [
        {
            "n": 1,
            "s": 'a "quoted", text\né',
            "l": [1, 2],
            "o": {"k": 1},
            "d": 1.5,
            "f": None,
            "t": "2024-07-01T10:00:00",
            "c": "2024-07-01",
            "b": "6162",
            "i": "P0M1DT0S",
            "h": "12345678901234567890123",
        },
        {"n": None, "s": "", "l": [], **dict.fromkeys("odftcbi"), "h": 7},
    ]


def test_a_sum_is_a_number_in_json(connection: duckdb.DuckDBPyConnection) -> None:
    table = run_query(connection, "select sum(i) as total from range(10) t(i)")
    assert json.loads(format_table(table, "json")) == [{"total": sum(table.column(0).to_pylist())}]
    assert json.loads(format_table(table.slice(0, 0), "json")) == []


def test_csv_reads_back(connection: duckdb.DuckDBPyConnection) -> None:
    text = format_table(run_query(connection, MIXED_SQL), "csv").decode()
    header, first, second = csv.reader(io.StringIO(text))
    assert header == list("nslodftcbih")
    assert first[:5] == ["1", 'a "quoted", text\né', "[1,2]", '{"k":1}', "1.50"]
    assert first[8:] == ["6162", "P0M1DT0S", "12345678901234567890123"]
    assert second == ["", "", "[]", *[""] * 7, "7"]


def test_parquet_keeps_the_table(connection: duckdb.DuckDBPyConnection) -> None:
    table = run_query(connection, "select i, [i, null] as l, i::varchar as s from range(100) t(i)")
    assert pq.read_table(io.BytesIO(format_table(table, "parquet"))).equals(table)


def test_formats_refuse_what_they_cannot_hold(connection: duckdb.DuckDBPyConnection) -> None:
    table = run_query(connection, MIXED_SQL)
    with pytest.raises(InputError, match="cast the column"):
        format_table(table, "parquet")
    with pytest.raises(InputError, match="'xml'"):
        format_table(table, "xml")
    with pytest.raises(InputError, match="two columns"):
        format_table(table.select([0, 1]).rename_columns(["a", "a"]), "json")
