"""SQL over a bank: what the views show, what SQL cannot reach, and results as CSV, JSON and Parquet."""

import csv
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import inspecting
from pipelines.inspecting import VIEWS, open_views, quote_reserved, run_query
from pipelines.rendering import format_table
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, InputError
from schemas.identifiers import make_ref_id
from schemas.manifest import FileEntry, Manifest, commit_manifest
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.tables import (
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    embeddings_schema,
    memories_schema,
    signatures_schema,
    write_table,
)

LAYOUT = RecordLayout(num_layers=2, num_kv_heads=2, num_slots=3, head_dim=4)
FINGERPRINT = Fingerprint(
    weights="w",
    tokenizer="t",
    architecture={},
    rope={},
    prefix_token_ids=[1],
    memory_layers=[0, 1],
    selection={},
    compute_dtype="float32",
    storage={},
)
NUM_REFERENCES = 7
TEXTS = [f"reference number {i}" for i in range(NUM_REFERENCES)]
IDS = [make_ref_id([i, i + 1], "t") for i in range(NUM_REFERENCES)]
KEPT, DROPPED, TOMBSTONED = IDS[0], {IDS[1], IDS[2]}, IDS[6]
"""References 1 and 2 are duplicates of 0, and 6 was deleted after its file was written."""


def make_file(bank: Path, kind: str, name: str, table: pa.Table) -> FileEntry:
    path = bank / "segments" / "s1" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(
        kind=kind, path=f"segments/s1/{name}", size_bytes=len(content), sha256=digest, num_rows=table.num_rows
    )


def make_manifest(version: int, files: list[FileEntry], tombstones: list[str]) -> Manifest:
    return Manifest(
        version=version,
        parent=version - 1 or None,
        operation="build" if version == 1 else "update",
        created_at=f"2024-07-0{version}T00:00:00+00:00",
        config={},
        build_id=f"b{version}",
        files=files,
        counts={"documents": {"read": 3, "kept": 1, "dropped": {"too short": version, "language": 1}}, "index": "Flat"},
        seconds={},
        fingerprint=FINGERPRINT,
        embedder_id="e",
        layout=LAYOUT,
        tombstones=tombstones,
    )


def make_references(rows: range) -> pa.Table:
    columns = [[IDS[i] for i in rows], [TEXTS[i] for i in rows], [[i, i + 1] for i in rows], [2 for _ in rows]]
    return pa.table(dict(zip(REFERENCES.names, columns, strict=True)), schema=REFERENCES)


def make_bank(path: Path) -> Path:
    """Writes a bank of two versions; the second adds more references, tables of their vectors, and a tombstone."""
    documents = pa.Table.from_pylist(
        [
            {
                "doc_id": "d1",
                "source": "s",
                "path": "a.txt",
                "position": 0,
                "content_hash": "c",
                "size_bytes": 90,
                "num_chars": 90,
                "num_references": NUM_REFERENCES,
                "metadata": "{}",
            }
        ],
        DOCUMENTS,
    )
    occurrences = pa.Table.from_pylist(
        [
            {
                "doc_id": "d1",
                "ordinal": i,
                "start_byte": i,
                "end_byte": i + 1,
                "start_char": i,
                "end_char": i + 1,
                "prefix": "",
                "ref_id": ref_id,
            }
            for i, ref_id in enumerate(IDS)
        ],
        OCCURRENCES,
    )
    duplicates = pa.Table.from_pylist(
        [
            {
                "ref_id": ref_id,
                "kept_ref_id": KEPT,
                "jaccard": 0.9,
                "matched_ref_id": KEPT,
                "matched_jaccard": 0.9,
                "cluster": KEPT,
            }
            for ref_id in sorted(DROPPED)
        ],
        DUPLICATES,
    )
    rejects = pa.Table.from_pylist(
        [{"path": "b.txt", "position": 0, "doc_id": None, "reason": "too short", "detail": "3 words"}], REJECTS
    )
    vectors = np.eye(NUM_REFERENCES, 8, dtype=np.float32)
    embeddings = pa.table({"ref_id": IDS, "vector": list(vectors)}, schema=embeddings_schema(8))
    signatures = pa.table(
        {"ref_id": IDS, "signature": [[i] * 4 for i in range(NUM_REFERENCES)]}, schema=signatures_schema("ref_id", 4)
    )
    memories = pa.table(
        {
            "ref_id": IDS,
            "shard": ["s"] * NUM_REFERENCES,
            "row": range(NUM_REFERENCES),
            "offsets": [[i] * LAYOUT.num_offsets for i in range(NUM_REFERENCES)],
        },
        schema=memories_schema(LAYOUT.num_offsets),
    )
    first = [
        make_file(path, "documents", "documents.parquet", documents),
        make_file(path, "occurrences", "occurrences.parquet", occurrences),
        make_file(path, "references", "references-0.parquet", make_references(range(4))),
        make_file(path, "duplicates", "duplicates.parquet", duplicates),
        make_file(path, "rejects", "rejects.parquet", rejects),
    ]
    commit_manifest(path, make_manifest(1, first, []))
    second = [
        make_file(path, "references", "references-1.parquet", make_references(range(4, NUM_REFERENCES))),
        make_file(path, "embeddings", "embeddings.parquet", embeddings),
        make_file(path, "signatures", "signatures.parquet", signatures),
        make_file(path, "memories", "memories.parquet", memories),
    ]
    commit_manifest(path, make_manifest(2, first + second, [TOMBSTONED]))
    return path


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("banks") / "it's a [b]*nk")


@pytest.fixture
def connection(bank: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with open_views(Bank.open(bank)) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        yield opened


def select_column(connection: duckdb.DuckDBPyConnection, sql: str) -> list[object]:
    return list(run_query(connection, sql).column(0).to_pylist())


def hash_files(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_references_shows_only_live_ones(connection: duckdb.DuckDBPyConnection) -> None:
    live = {ref_id: text for ref_id, text in zip(IDS, TEXTS, strict=True) if ref_id not in DROPPED | {TOMBSTONED}}
    rows = run_query(connection, "select * from references").to_pylist()
    assert {row["ref_id"]: row["text"] for row in rows} == live
    assert len(rows) == len(live) == 4
    assert rows[0].keys() == set(REFERENCES.names)


def test_all_references_shows_what_stands_for_each(connection: duckdb.DuckDBPyConnection) -> None:
    rows = run_query(connection, "select ref_id, kept_ref_id, is_live from all_references").to_pylist()
    expected = {ref_id: (KEPT if ref_id in DROPPED else ref_id, ref_id not in DROPPED | {TOMBSTONED}) for ref_id in IDS}
    assert {row["ref_id"]: (row["kept_ref_id"], row["is_live"]) for row in rows} == expected
    assert len(rows) == NUM_REFERENCES


def test_every_view_holds_the_rows_of_its_files(bank: Path, connection: duckdb.DuckDBPyConnection) -> None:
    opened = Bank.open(bank)
    assert set(select_column(connection, "show tables")) == set(VIEWS)
    for kind in ("documents", "occurrences", "duplicates", "rejects", "memories", "embeddings", "signatures"):
        expected = opened.read_table(kind).to_pylist()
        assert expected
        assert run_query(connection, f"from {kind}").to_pylist() == expected


def test_an_older_version_keeps_its_own_tables_and_missing_ones_are_empty(bank: Path) -> None:
    with open_views(Bank.open(bank, version=1)) as connection:
        assert set(select_column(connection, "select ref_id from references")) == {IDS[0], IDS[3]}
        for kind, columns in {
            "memories": ["ref_id", "shard", "row", "offsets"],
            "embeddings": ["ref_id", "vector"],
            "signatures": ["ref_id", "signature"],
        }.items():
            table = run_query(connection, f"from {kind}")
            assert table.num_rows == 0
            assert table.column_names == columns


def test_versions_and_files_come_from_the_manifests(bank: Path, connection: duckdb.DuckDBPyConnection) -> None:
    versions = run_query(connection, "from versions order by version").to_pylist()
    assert [(row["version"], row["parent"], row["operation"]) for row in versions] == [
        (1, None, "build"),
        (2, 1, "update"),
    ]
    assert [(row["num_documents"], row["num_documents_dropped"]) for row in versions] == [(1, 2), (1, 3)]
    assert [(row["num_references"], row["num_references_dropped"]) for row in versions] == [(None, None)] * 2
    assert select_column(connection, "select counts::json ->> 'index' from versions") == ["Flat", "Flat"]
    files = run_query(connection, "from files").to_pylist()
    assert len(files) == 9
    for row in files:
        content = (bank / row["path"]).read_bytes()
        assert (row["size_bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert versions[1]["size_bytes"] == sum(row["size_bytes"] for row in files) > versions[0]["size_bytes"]


def test_vectors_can_be_compared_without_a_cast(connection: duckdb.DuckDBPyConnection) -> None:
    nearest = select_column(
        connection,
        f"select ref_id from embeddings order by array_cosine_similarity(vector, "
        f"(select vector from embeddings where ref_id = '{IDS[5]}')) desc limit 1",
    )
    assert nearest == [IDS[5]]


def test_a_query_keeps_its_order(connection: duckdb.DuckDBPyConnection) -> None:
    sql = "select i, hash(i) % 97 as h from range(50000) t(i) order by h, i desc"
    rows = run_query(connection, sql).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["h"], -row["i"]))


@pytest.mark.parametrize(
    "sql",
    [
        "copy references to '{bank}/out.csv'",
        "copy (select 1) to '{file}' (format parquet, use_tmp_file false)",
        "with q as (copy (select 1) to '{file}' (format parquet, use_tmp_file false)) from q",
        "from query('with q as (copy (select 1) to ''{file}'' (format parquet, use_tmp_file false)) from q')",
        "explain analyze copy (select 1) to '{file}' (format parquet, use_tmp_file false)",
        "with q as (insert into versions by name select 9 as version returning *) from q",
        "with q as (delete from files returning *) from q",
        "drop view documents",
        "create table t as select 1",
        "export database '{bank}/out'",
        "from read_csv('/etc/passwd')",
        "from read_text('/etc/hostname')",
        "from glob('/etc/*')",
        "from '{bank}/manifests/00000001.json'",
        "from read_text('{bank}/segments/../manifests/00000001.json')",
        "attach '{bank}/new.db' as n",
        "attach ':memory:' as n",
        "install httpfs",
        "load httpfs",
        "load icu",
        "set enable_external_access = true",
        "set allowed_directories = ['/']",
        "reset lock_configuration",
        "pragma threads = 1",
    ],
)
def test_sql_cannot_write_or_reach_other_files(bank: Path, connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    target = next((bank / "segments").rglob("references-0.parquet"))
    before = hash_files(bank)
    text = sql.format(bank=str(bank).replace("'", "''"), file=str(target).replace("'", "''"))
    with pytest.raises(BankError) as caught:
        run_query(connection, text)
    assert "\n" not in str(caught.value)
    assert hash_files(bank) == before
    assert run_query(connection, "select count(*) as n from references").to_pylist() == [{"n": 4}]


def test_sql_cannot_read_variables_of_python(
    connection: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspecting, "some_table", pa.table({"a": [1]}), raising=False)
    with pytest.raises(InputError, match="some_table"):
        run_query(connection, "from some_table")


def test_the_connection_itself_is_locked(bank: Path, connection: duckdb.DuckDBPyConnection) -> None:
    assert connection.execute("select current_setting('allowed_directories')").fetchall() == [([],)]
    for sql in ("from read_csv('/etc/passwd')", "install httpfs", "set enable_external_access = true"):
        with pytest.raises(duckdb.Error, match=r"disabled|locked"):
            connection.execute(sql)
    target = str(bank / "out.csv").replace("'", "''")
    with pytest.raises(duckdb.PermissionException):
        connection.execute(f"copy (select 1) to '{target}'")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("select nothing from documents", "nothing"),
        ("select * from nowhere", "the views are: documents, references"),
        ("selct 1", "selct"),
        ("select 'open", "unterminated"),
        ("select ?", "parameters"),
        ("", "0 statements"),
        ("select 1; select 2", "2 statements"),
        ("select \ud800", "Unicode"),
    ],
)
def test_errors_are_one_line(connection: duckdb.DuckDBPyConnection, sql: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        run_query(connection, sql)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LINE 1" not in str(caught.value)


def test_a_final_semicolon_and_comments_are_fine(connection: duckdb.DuckDBPyConnection) -> None:
    assert select_column(connection, "/* all */ select count(*) from references; -- end") == [4]


def test_damage_is_named(tmp_path: Path) -> None:
    path = make_bank(tmp_path / "bank")
    target = path / "segments" / "s1" / "documents.parquet"
    target.write_bytes(b"not parquet")
    with pytest.raises(BankFormatError, match="memory3 verify"):
        open_views(Bank.open(path))
    target.unlink()
    with pytest.raises(BankFormatError, match="missing"):
        open_views(Bank.open(path))


def test_a_file_that_disappears_is_an_error_of_the_bank(tmp_path: Path) -> None:
    path = make_bank(tmp_path / "bank")
    with open_views(Bank.open(path)) as connection:
        (path / "segments" / "s1" / "rejects.parquet").unlink()
        with pytest.raises(BankFormatError, match="memory3 verify"):
            run_query(connection, "from rejects")


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select count(*) from references", 'select count(*) from "references"'),
        ("from References r, REFERENCES", 'from "References" r, "REFERENCES"'),
        ("select references.text from references", 'select "references".text from "references"'),
        ("select é, 'references' from references", "select é, 'references' from \"references\""),
        ('from "references" -- references', 'from "references" -- references'),
        ("/* references */ from all_references", "/* references */ from all_references"),
        ("select $$references$$, references_x", "select $$references$$, references_x"),
        ("select 'it''s references'", "select 'it''s references'"),
        ("select 'open references", "select 'open references"),
        ("", ""),
    ],
)
def test_only_the_bare_word_is_quoted(sql: str, expected: str) -> None:
    assert quote_reserved(sql) == expected
    assert quote_reserved(expected) == expected


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    column=st.sampled_from(["", "é", "语 "]),
)
def test_strings_are_never_changed(plain: duckdb.DuckDBPyConnection, text: str, column: str) -> None:
    literal = "'" + f"{text} references {text}".replace("'", "''") + "'"
    name = '"' + f"{column}references" + '"'
    sql = f"select {literal} as {name}"
    assert quote_reserved(sql) == sql
    found = run_query(plain, f"with references as ({sql}) from references")
    assert found.to_pylist() == [{name[1:-1]: f"{text} references {text}"}]


def test_importing_and_querying_load_no_heavy_library(bank: Path) -> None:
    code = (
        "import sys; from schemas.bank import Bank; from pipelines.inspecting import open_views, run_query;"
        "run_query(open_views(Bank.open(sys.argv[1])), 'from references');"
        "print([n for n in ('pandas', 'torch', 'apache_beam', 'scipy') if n in sys.modules])"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(bank)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


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
    table = run_query(connection, "select sum(size_bytes) as total from files")
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
    table = run_query(connection, "from all_references order by ref_id")
    assert pq.read_table(io.BytesIO(format_table(table, "parquet"))).equals(table)


def test_formats_refuse_what_they_cannot_hold(connection: duckdb.DuckDBPyConnection) -> None:
    table = run_query(connection, MIXED_SQL)
    with pytest.raises(InputError, match="cast the column"):
        format_table(table, "parquet")
    with pytest.raises(InputError, match="'xml'"):
        format_table(table, "xml")
    with pytest.raises(InputError, match="two columns"):
        format_table(table.select([0, 1]).rename_columns(["a", "a"]), "json")
