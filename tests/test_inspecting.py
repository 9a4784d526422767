"""SQL over a bank: what the views show of which rows, and what SQL cannot reach or change."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import inspecting
from pipelines.inspecting import VIEWS, BankViews, open_views, quote_reserved, run_query
from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError
from schemas.identifiers import make_ref_id
from schemas.manifest import FileEntry, Manifest, commit_manifest
from schemas.protocols import Fingerprint
from schemas.records import RecordLayout
from schemas.stores import LocalStore
from schemas.tables import (
    CONTAMINATED,
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    TOMBSTONES,
    embeddings_schema,
    memories_schema,
    signatures_schema,
    write_table,
)
from schemas.tags import set_tag

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

LIVE = set(IDS) - DROPPED - {TOMBSTONED}

FIRST_SEGMENT, SECOND_SEGMENT = range(4), range(4, NUM_REFERENCES)
"""Places of the references that each segment added."""


def make_file(bank: Path, segment: str, kind: str, table: pa.Table) -> FileEntry:
    path = bank / "segments" / segment / f"{kind}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(
        kind=kind, path=f"segments/{segment}/{path.name}", size_bytes=len(content), sha256=digest, num_rows=len(table)
    )


def make_manifest(version: int, files: list[FileEntry]) -> Manifest:
    return Manifest(
        version=version,
        parent=version - 1 or None,
        operation="build" if version == 1 else "update",
        created_at=f"2024-07-0{version}T00:00:00+00:00",
        config={},
        build_id=f"b{version}",
        files=files,
        counts={
            "documents": {"read": 2 + version, "kept": 1, "dropped": {"too short": version, "language": 1}},
            "index": "Flat",
        },
        seconds={},
        fingerprint=FINGERPRINT,
        embedder_id="e",
        layout=LAYOUT,
    )


def make_parted_tables(rows: range) -> dict[str, pa.Table]:
    """Returns what a segment has of some references; also embeddings and memories of those that are not live."""
    ids = [IDS[i] for i in rows]
    columns = [ids, [TEXTS[i] for i in rows], [[i, i + 1] for i in rows], [2 for _ in rows]]
    signatures = {
        "ref_id": ids,
        "signature": [[i] * 4 for i in rows],
        "sequence_key": [2**63 + i for i in rows],
        "num_shingles": list(rows),
    }
    memories = {
        "ref_id": ids,
        "shard": ["shard-000000.safetensors" for _ in rows],
        "row": range(len(rows)),
        "offsets": [[i] * LAYOUT.num_offsets for i in rows],
    }
    vectors = list(np.eye(NUM_REFERENCES, 8, dtype=np.float32)[rows.start : rows.stop])
    return {
        "references": pa.table(dict(zip(REFERENCES.names, columns, strict=True)), schema=REFERENCES),
        "signatures": pa.table(signatures, schema=signatures_schema("ref_id", 4)),
        "embeddings": pa.table({"ref_id": ids, "vector": vectors}, schema=embeddings_schema(8)),
        "memories": pa.table(memories, schema=memories_schema(LAYOUT.num_offsets)),
    }


def make_bank(path: Path) -> Path:
    """Writes a bank of two versions; the second adds a segment of more references, and deletes one of them."""
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
                "title": "",
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
    tombstones = pa.table({"ref_id": [TOMBSTONED]}, schema=TOMBSTONES)
    first = [
        make_file(path, "s1", "documents", documents),
        make_file(path, "s1", "occurrences", occurrences),
        make_file(path, "s1", "duplicates", duplicates),
        make_file(path, "s1", "rejects", rejects),
        *(make_file(path, "s1", kind, table) for kind, table in make_parted_tables(FIRST_SEGMENT).items()),
    ]
    commit_manifest(path, make_manifest(1, first))
    second = [make_file(path, "s2", kind, table) for kind, table in make_parted_tables(SECOND_SEGMENT).items()]
    commit_manifest(path, make_manifest(2, [*first, *second, make_file(path, "s2", "tombstones", tombstones)]))
    set_tag(LocalStore(path), "old", 1)
    set_tag(LocalStore(path), "first", 1)
    return path


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("banks") / "it's a [b]*nk")


@pytest.fixture(scope="module")
def views(bank: Path) -> Iterator[BankViews]:
    with open_views(Bank.open(bank)) as opened:
        yield opened


def select_column(views: BankViews, sql: str) -> list[Any]:
    return list(run_query(views, sql).column(0).to_pylist())


def hash_files(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_references_shows_only_live_ones(views: BankViews) -> None:
    rows = run_query(views, "select * from references").to_pylist()
    assert {row["ref_id"]: row["text"] for row in rows} == {
        ref_id: text for ref_id, text in zip(IDS, TEXTS, strict=True) if ref_id in LIVE
    }
    assert len(rows) == len(LIVE) == 4
    assert rows[0].keys() == set(REFERENCES.names)


def test_all_references_shows_what_stands_for_each(views: BankViews) -> None:
    rows = run_query(views, "select ref_id, kept_ref_id, is_live, is_deleted from all_references").to_pylist()
    expected = {ref_id: (KEPT if ref_id in DROPPED else ref_id, ref_id in LIVE, ref_id == TOMBSTONED) for ref_id in IDS}
    assert {row["ref_id"]: (row["kept_ref_id"], row["is_live"], row["is_deleted"]) for row in rows} == expected
    assert len(rows) == NUM_REFERENCES


def test_every_view_holds_the_rows_of_its_files(bank: Path, views: BankViews) -> None:
    opened = Bank.open(bank)
    assert set(select_column(views, "show tables")) == set(VIEWS)
    for kind in ("documents", "occurrences", "duplicates", "rejects", "tombstones"):
        expected = opened.read_table(kind).to_pylist()
        assert expected
        assert run_query(views, f"from {kind}").to_pylist() == expected


@pytest.mark.parametrize("kind", ["memories", "embeddings", "signatures"])
def test_what_is_kept_a_reference_is_shown_for_live_ones(bank: Path, views: BankViews, kind: str) -> None:
    stored = Bank.open(bank).read_table(kind).to_pylist()
    assert {row["ref_id"] for row in stored} == set(IDS)
    expected = {row["ref_id"]: row for row in stored if row["ref_id"] in LIVE}
    if kind == "memories":
        for place, ref_id in enumerate(IDS):
            if ref_id in LIVE:
                expected[ref_id]["segment"] = "s1" if place in FIRST_SEGMENT else "s2"
    rows = run_query(views, f"from {kind}").to_pylist()
    assert {row["ref_id"]: row for row in rows} == expected
    assert len(rows) == len(LIVE)


def test_a_shard_is_one_file_by_its_segment(bank: Path, views: BankViews) -> None:
    rows = run_query(views, 'select segment, shard, "row" from memories').to_pylist()
    assert len({tuple(row.values()) for row in rows}) == len(rows) > len({(row["shard"], row["row"]) for row in rows})


def test_an_older_version_keeps_its_own_rows(bank: Path) -> None:
    with open_views(Bank.open(bank, version=1)) as views:
        for name in ("references", "memories", "embeddings", "signatures"):
            assert set(select_column(views, f"select ref_id from {name}")) == {IDS[0], IDS[3]}


def test_missing_tables_are_empty_views(bank: Path, views: BankViews) -> None:
    opened = Bank.open(bank)
    kept = [file for file in opened.manifest.files if file.kind in ("references", "documents")]
    with open_views(Bank(opened.store, dataclasses.replace(opened.manifest, files=kept))) as bare:
        for name in VIEWS:
            columns = run_query(views, f"from {name}").column_names
            table = run_query(bare, f"from {name}")
            assert table.column_names == columns, name
            assert (len(table) > 0) == (name in ("references", "all_references", "documents", "versions", "files")), (
                name
            )


@given(
    duplicates=st.sets(st.integers(0, NUM_REFERENCES - 1)),
    contaminated=st.sets(st.integers(0, NUM_REFERENCES - 1)),
    tombstones=st.sets(st.integers(0, NUM_REFERENCES - 1)),
)
@settings(max_examples=10)
def test_live_is_what_no_table_drops(
    tmp_path_factory: pytest.TempPathFactory, duplicates: set[int], contaminated: set[int], tombstones: set[int]
) -> None:
    path = tmp_path_factory.mktemp("random")
    dropped = {
        "duplicates": pa.table(
            [
                [IDS[i] for i in sorted(duplicates)],
                *([KEPT if t == pa.string() else 0.9 for _ in duplicates] for t in DUPLICATES.types[1:]),
            ],
            schema=DUPLICATES,
        ),
        "contaminated": pa.table(
            [[IDS[i] for i in sorted(contaminated)], [0.5 for _ in contaminated], ["test" for _ in contaminated]],
            schema=CONTAMINATED,
        ),
        "tombstones": pa.table([[IDS[i] for i in sorted(tombstones)]], schema=TOMBSTONES),
    }
    files = [make_file(path, "s2", kind, table) for kind, table in dropped.items()]
    for segment, rows in (("s1", FIRST_SEGMENT), ("s2", SECOND_SEGMENT)):
        files += [make_file(path, segment, kind, table) for kind, table in make_parted_tables(rows).items()]
    commit_manifest(path, make_manifest(1, files))
    live = {IDS[i] for i in range(NUM_REFERENCES) if i not in duplicates | contaminated | tombstones}
    with open_views(Bank.open(path)) as views:
        for name in ("references", "memories", "embeddings", "signatures"):
            assert sorted(select_column(views, f"select ref_id from {name}")) == sorted(live)
        assert set(select_column(views, "select ref_id from all_references where is_live")) == live
        deleted = select_column(views, "select ref_id from all_references where is_deleted")
        assert sorted(deleted) == [IDS[i] for i in sorted(tombstones, key=lambda i: IDS[i])]
        assert select_column(views, "select count(*) from all_references") == [NUM_REFERENCES]


def test_versions_and_files_come_from_the_manifests(bank: Path, views: BankViews) -> None:
    versions = run_query(views, "from versions order by version").to_pylist()
    assert [(row["version"], row["parent"], row["operation"]) for row in versions] == [
        (1, None, "build"),
        (2, 1, "update"),
    ]
    assert [row["tags"] for row in versions] == [["first", "old"], []]
    assert [(row["num_documents"], row["num_documents_dropped"]) for row in versions] == [(1, 2), (1, 3)]
    assert [(row["num_references"], row["num_references_dropped"]) for row in versions] == [(None, None)] * 2
    assert select_column(views, "select counts::json ->> 'index' from versions") == ["Flat", "Flat"]
    files = run_query(views, "from files").to_pylist()
    assert len(files) == 13
    for row in files:
        content = (bank / row["path"]).read_bytes()
        assert (row["size_bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert row["segment"] == row["path"].split("/")[1]
    assert versions[1]["size_bytes"] == sum(row["size_bytes"] for row in files) > versions[0]["size_bytes"]


class RenamingStore(LocalStore):
    """A store whose local copies have other names than its files, as those of an object store have."""

    def localize(self, name: str, sha256: str) -> Path:
        copy = self.path.parent / "copies" / f"{sha256}{Path(name).suffix}"
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(super().localize(name, sha256), copy)
        return copy


def test_only_local_copies_are_read(bank: Path, views: BankViews) -> None:
    store = RenamingStore(bank)
    with open_views(Bank.open(store)) as copied:
        for name in VIEWS:
            found, expected = (run_query(opened, f"from {name} order by all") for opened in (copied, views))
            assert found.equals(expected), name
        allowed = {
            Path(str(path)).name for path in select_column(copied, "select unnest(current_setting('allowed_paths'))")
        }
        assert allowed == {f"{file.sha256}.parquet" for file in Bank.open(bank).manifest.files}


def test_vectors_can_be_compared_without_a_cast(views: BankViews) -> None:
    nearest = select_column(
        views,
        f"select ref_id from embeddings order by array_cosine_similarity(vector, "
        f"(select vector from embeddings where ref_id = '{IDS[5]}')) desc limit 1",
    )
    assert nearest == [IDS[5]]


def test_a_query_keeps_its_order(views: BankViews) -> None:
    sql = "select i, hash(i) % 97 as h from range(50000) t(i) order by h, i desc"
    rows = run_query(views, sql).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["h"], -row["i"]))


HOSTILE = (
    """
copy references to '{bank}/out.csv'
copy (select 1) to '{file}' (format parquet, use_tmp_file false)
copy documents from '/etc/passwd'
with q as (copy (select 1) to '{file}' (format parquet, use_tmp_file false)) from q
from (with q as (copy (select 1) to '{file}' (format parquet, use_tmp_file false)) from q)
select 1 union all (with q as (copy (select 1) to '{file}' (format parquet, use_tmp_file false)) from q)
from query('with q as (copy (select 1) to ''{file}'' (format parquet, use_tmp_file false)) from q')
from json_execute_serialized_sql(json_serialize_sql(
'with q as (copy (select 1) to ''{file}'' (format parquet, use_tmp_file false)) from q'))
from Json_Execute_Serialized_SQL(json_serialize_sql('with q as (delete from files returning *) from q'))
select (select count(*) from system.main."json_execute_serialized_sql"(json_serialize_sql('select 1')))
from query_table('/etc/passwd')
explain analyze copy (select 1) to '{file}' (format parquet, use_tmp_file false)
with q as (insert into versions by name select 9 as version returning *) from q
with q as (delete from files returning *) from q
with q as (update files set kind = '' returning *) from q
drop view documents
create table t as select 1
create macro m() as 1
create temp view documents as select 1 as doc_id
create secret (type s3)
export database '{bank}/out'
import database '{bank}'
from read_csv('/etc/passwd')
from read_csv('{file}', store_rejects := true, rejects_table := 'documents', ignore_errors := true)
from read_text('/etc/hostname')
from read_blob('/proc/self/environ')
from read_json('/etc/passwd')
from sniff_csv('/etc/passwd')
from parquet_metadata('/etc/passwd')
from glob('/etc/*')
from '/etc/passwd'
from '/etc/*.csv'
from '{bank}/manifests/00000001.json'
from read_text('{bank}/segments/../manifests/00000001.json')
from 'https://example.org/x.csv'
from 's3://bucket/x.parquet'
from read_parquet('https://example.org/x.parquet')
select * from json_each((select content from read_text('/etc/hostname')))
select getenv('HOME')
select st_point(1, 2)
from enable_logging(storage := 'file', storage_path := '{bank}/logs')
from enable_profiling(format := 'json', save_location := '{bank}/profile.json')
from destroy_external_resource('query', 'select 1')
from create_external_resource('x', map {{'a': 'b'}})
from checkpoint()
from duckdb_secrets()
from duckdb_extensions()
from arrow_scan(1, 2, 3)
from pandas_scan(1)
call enable_logging()
attach '{bank}/new.db' as n
attach ':memory:' as n
detach memory
use memory
install httpfs
load httpfs
load icu
load '{bank}/x.duckdb_extension'
set enable_external_access = true
set allowed_directories = ['/']
set search_path = 'stored'
reset lock_configuration
pragma threads = 1
pragma enable_profiling = 'json'
prepare q as select 1
begin
vacuum
comment on view documents is 'x'
select 1; copy (select 1) to '{file}' (format parquet, use_tmp_file false)
select 1\0; copy (select 1) to '{file}' (format parquet, use_tmp_file false)
""".strip()
    .replace("(\n", "(")
    .split("\n")
)
"""Statements that write, reach other files, run text as SQL, or change the connection."""


@pytest.mark.parametrize("sql", HOSTILE)
def test_sql_cannot_write_or_reach_other_files(bank: Path, views: BankViews, sql: str) -> None:
    target = next((bank / "segments" / "s1").rglob("references.parquet"))
    before, tables = hash_files(bank), run_query(views, "show all tables")
    text = sql.format(bank=str(bank).replace("'", "''"), file=str(target).replace("'", "''")).replace("\\0", "\0")
    with pytest.raises(InputError) as caught:
        run_query(views, text)
    assert "\n" not in str(caught.value)
    assert hash_files(bank) == before
    assert run_query(views, "show all tables").equals(tables)
    assert run_query(views, "select count(*) as n from references").to_pylist() == [{"n": 4}]


def test_the_hole_that_the_list_of_functions_closes_is_real(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank")
    target = bank / "segments" / "s1" / "rejects.parquet"
    written = f"with q as (copy (select 1) to '{target}' (format parquet, use_tmp_file false)) from q".replace(
        "'", "''"
    )
    sql = f"from json_execute_serialized_sql(json_serialize_sql('{written}'))"
    before = target.read_bytes()
    with open_views(Bank.open(bank)) as views:
        with pytest.raises(InputError, match="json_execute_serialized_sql"):
            run_query(views, sql)
        assert target.read_bytes() == before
        views.connection.execute(f"FROM query('{sql.replace(chr(39), chr(39) * 2)}')")
        assert target.read_bytes() != before


@pytest.mark.parametrize(
    "sql",
    [
        "from documents",
        "table documents",
        "values (1), (2)",
        "describe references",
        "summarize documents",
        "show tables",
        "with q as (select ref_id from references) from q",
        "with recursive t(n) as (select 1 union all select n + 1 from t where n < 9) select sum(n) from t",
        "select ref_id from references except select ref_id from duplicates",
        "from range(3) r(i), unnest([1, 2]) u(j)",
        "select unnest(token_ids) from references",
        "select key from versions, json_each(counts)",
        "pivot occurrences on doc_id in ('d1') using count(*) group by ref_id",
        "unpivot (select num_chars, size_bytes from documents) on columns(*)",
        "select list_transform([1, 2], lambda x: x + 1)",
        "from histogram(references, num_tokens)",
        "select (select count(*) from duplicates), exists (from rejects)",
        "from references using sample 2 rows",
        "select ref_id, row_number() over (order by ref_id) from references qualify row_number() over () < 3",
    ],
)
def test_queries_that_read_are_run(views: BankViews, sql: str) -> None:
    assert len(run_query(views, sql)) > 0


def test_a_query_that_is_nested_too_deeply_is_an_error(views: BankViews) -> None:
    assert run_query(views, "select " + "(" * 300 + "1" + ")" * 300).num_rows == 1
    for depth in (3000, 100_000):
        with pytest.raises(InputError) as caught:
            run_query(views, "select " + "(" * depth + "1" + ")" * depth)
        assert "\n" not in str(caught.value)


def test_sql_cannot_read_variables_of_python(views: BankViews, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "some_table", pa.table({"a": [1]}), raising=False)
    with pytest.raises(InputError, match="some_table"):
        run_query(views, "from some_table")


def test_the_connection_itself_is_locked(bank: Path, views: BankViews) -> None:
    assert views.connection.execute("select current_setting('allowed_directories')").fetchall() == [([],)]
    for sql in ("from read_csv('/etc/passwd')", "install httpfs", "set enable_external_access = true"):
        with pytest.raises(duckdb.Error, match=r"disabled|locked"):
            views.connection.execute(sql)
    target = str(bank / "out.csv").replace("'", "''")
    with pytest.raises(duckdb.PermissionException):
        views.connection.execute(f"copy (select 1) to '{target}'")


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
def test_errors_are_one_line(views: BankViews, sql: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        run_query(views, sql)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LINE 1" not in str(caught.value)


def test_a_final_semicolon_and_comments_are_fine(views: BankViews) -> None:
    assert select_column(views, "/* all */ select count(*) from references; -- end") == [4]


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
    with open_views(Bank.open(path)) as views:
        (path / "segments" / "s1" / "rejects.parquet").unlink()
        with pytest.raises(BankFormatError, match="rejects.parquet is missing"):
            run_query(views, "from rejects")


OTHER_VIEWS = {"references": "all_references", "tombstones": "memories"}
"""For a kind of file, a view that reads it besides the one of its name."""


@given(
    kind=st.sampled_from(["references", "memories", "embeddings", "documents", "occurrences", "tombstones"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@settings(max_examples=15)
def test_no_changed_bit_is_read(tmp_path_factory: pytest.TempPathFactory, kind: str, place: float, bit: int) -> None:
    path = make_bank(tmp_path_factory.mktemp("damaged") / "bank")
    with open_views(Bank.open(path)) as views:
        target = sorted(path.rglob(f"{kind}.parquet"))[-1]
        content = bytearray(target.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        target.write_bytes(content)
        for name in (kind, OTHER_VIEWS.get(kind, kind)):
            with pytest.raises(BankFormatError, match=rf"{target.parent.name}/{kind}\.parquet.*memory3 verify"):
                run_query(views, f"with q as (select count(*) from {name.upper()}) from q")
        assert run_query(views, "select sum(size_bytes) from files").num_rows == 1


def test_files_that_changed_places_are_noticed(tmp_path: Path) -> None:
    path = make_bank(tmp_path / "bank")
    first, second = (path / "segments" / segment / "memories.parquet" for segment in ("s1", "s2"))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with open_views(Bank.open(path)) as views:
        with pytest.raises(BankFormatError, match="memories"):
            run_query(views, "from memories")
        assert run_query(views, "from references").num_rows == len(LIVE)


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
def test_strings_are_never_changed(views: BankViews, text: str, column: str) -> None:
    literal = "'" + f"{text} references {text}".replace("'", "''") + "'"
    name = '"' + f"{column}references" + '"'
    sql = f"select {literal} as {name}"
    assert quote_reserved(sql) == sql
    found = run_query(views, f"with references as ({sql}) from references")
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
