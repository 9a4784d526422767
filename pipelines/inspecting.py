"""SQL over one version of a bank: read-only DuckDB views of its tables.

Reads what the jobs have written; writes nothing. Each view stands for a table of ``schemas.tables``. What is kept a
reference (``references``, ``memories``, ``embeddings``, ``signatures``) is shown for live references only, though the
files hold rows of others too; ``all_references`` shows every stored one. ``versions`` and ``files`` come from the
manifests and tags.

Safety has two independent parts. The connection may open the version's Parquet files and nothing else, and its
settings are locked. That alone would not protect those files themselves: what DuckDB may read it may also overwrite,
even from inside a SELECT (``WITH x AS (COPY ...)``). So a user's text must parse as one query that reads at every
depth and calls no table function but those of :data:`TABLE_FUNCTIONS`: others run SQL out of a string
(``json_execute_serialized_sql`` would run that COPY) or leave tables behind (``read_csv(store_rejects := true)``). It
is then run by DuckDB's own ``query()``, which takes a single SELECT.

DuckDB does not notice that a page has other bytes than it once had, so before a query runs, the files of the views it
names are compared with their digests in the manifest, each once a connection.
"""

import glob
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Self

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.bank import DROPPING_KINDS, Bank
from schemas.errors import BankFormatError, InputError
from schemas.manifest import FileEntry, Manifest, list_versions, read_manifest
from schemas.tables import (
    CONTAMINATED,
    DOCUMENT_DUPLICATES,
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    TOMBSTONES,
    memories_schema,
)
from schemas.tags import list_tags

VIEWS = (
    "documents",
    "references",
    "all_references",
    "occurrences",
    "duplicates",
    "document_duplicates",
    "contaminated",
    "tombstones",
    "rejects",
    "memories",
    "embeddings",
    "signatures",
    "document_signatures",
    "versions",
    "files",
)
"""The views of a connection, in the order in which a person meets them."""

RESERVED_VIEW = "references"
"""The one view whose name is a reserved word of SQL."""

LIVE_VIEWS = ("references", "memories", "embeddings", "signatures")
"""Views that leave out rows of references that are not live; the rows of the files are in the schema ``stored``."""

TABLE_FUNCTIONS = frozenset(
    {
        "duckdb_columns",
        "duckdb_functions",
        "duckdb_keywords",
        "duckdb_types",
        "duckdb_views",
        "generate_series",
        "histogram",
        "histogram_values",
        "json_each",
        "json_tree",
        "pragma_table_info",
        "range",
        "repeat",
        "summary",
        "unnest",
    }
)
"""What a query may call in FROM: functions that read no file, run no text as SQL, and change nothing."""

READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
"""DuckDB's names of the parts of a statement that read; COPY, INSERT, UPDATE and DELETE have others."""

VERSIONS = pa.schema(
    [
        pa.field("version", pa.int32(), nullable=False),
        pa.field("parent", pa.int32()),
        pa.field("operation", pa.string(), nullable=False),
        pa.field("created_at", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("num_documents", pa.int64()),
        pa.field("num_documents_dropped", pa.int64()),
        pa.field("num_references", pa.int64()),
        pa.field("num_references_dropped", pa.int64()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("counts", pa.string(), nullable=False),
    ]
)

FILES = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("segment", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
    ]
)


class BankViews:
    """The views of one version of a bank, opened; to be closed, or used as a context.

    Attributes:
        bank: the version.
        connection: the database that has the views. A user's text goes through :func:`run_query` only.
    """

    def __init__(self, bank: Bank, connection: duckdb.DuckDBPyConnection) -> None:
        """Joins a version and its views; use :func:`open_views`."""
        self.bank = bank
        self.connection = connection

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connection."""
        self.close()


def open_views(bank: Bank) -> BankViews:
    """Opens the views of a bank's version in a fresh in-memory database.

    A table that the version does not have (a cold bank has no memories) is an empty view.

    Raises:
        BankFormatError: a file or a manifest of the bank is missing or damaged.
    """
    tables = _list_tables(bank)
    located = {
        name: [(file, bank.locate(file).absolute()) for file in bank.manifest.list_files(name)] for name in tables
    }
    versions = _describe_versions(bank)
    connection = duckdb.connect(":memory:")
    try:
        _lock_files(connection, [str(path) for group in located.values() for _, path in group])
        connection.execute("CREATE SCHEMA stored")
        for name, schema in tables.items():
            _create_view(connection, name, located[name], schema)
        _create_reference_views(connection)
        _create_table(connection, "versions", versions)
        _create_table(connection, "files", _describe_files(bank.manifest))
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except (duckdb.Error, pa.ArrowInvalid) as error:
        connection.close()
        raise BankFormatError(
            f"the tables of bank {bank.url} cannot be opened: {_shorten(error)}; run memory3 verify"
        ) from error
    return BankViews(bank, connection)


def quote_reserved(sql: str) -> str:
    """Puts quotes around the bare word ``references``, which is a view here but a reserved word in SQL.

    Strings, comments and names that are quoted already stay as they are.

    Raises:
        InputError: the text cannot be encoded as UTF-8.
    """
    try:
        text = sql.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the SQL is not valid Unicode at character {error.start}; write it in UTF-8") from error
    word = RESERVED_VIEW.encode()
    # DuckDB counts positions in bytes. Going backwards keeps the earlier ones right.
    for start, kind in reversed(duckdb.tokenize(sql)):
        end = start + len(word)
        if kind == duckdb.token_type.keyword and text[start:end].lower() == word:
            text = text[:start] + b'"' + text[start:end] + b'"' + text[end:]
    return text.decode()


def run_query(views: BankViews, sql: str) -> pa.Table:
    """Runs one query a user wrote and returns its whole result, in the query's order.

    Args:
        views: from :func:`open_views`.
        sql: one statement that reads: SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE or SHOW. It may name the view
            ``references`` without quotes.

    Raises:
        InputError: not exactly one statement, a statement that does not read, or an error in it; DuckDB's message is in
            the text, on one line.
        BankFormatError: a file of the bank is damaged, or was removed since it was opened.
    """
    connection = views.connection
    quoted = quote_reserved(sql)
    try:
        statements = connection.extract_statements(quoted)
        if len(statements) != 1:
            raise InputError(f"the SQL holds {len(statements)} statements; give exactly one query")
        kind = statements[0].type
        # PIVOT counts as several statements; query() says itself when it cannot take one.
        if kind not in (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI):
            raise InputError(
                f"a bank is read-only in SQL and {kind.name} is no query; use SELECT, DESCRIBE or SUMMARIZE"
            )
        _check_files(views.bank, _list_tables_read(connection, quoted))
        return connection.sql(f"FROM query({_quote_all([quoted])})").to_arrow_table()
    except duckdb.PermissionException as error:
        raise InputError(f"SQL can read only the bank's own views: {_shorten(error)}; {_list_views()}") from error
    except duckdb.IOException as error:
        raise BankFormatError(f"a file of the bank cannot be read: {_shorten(error)}; run memory3 verify") from error
    except duckdb.CatalogException as error:
        message = _shorten(error)
        if message.startswith("Catalog Error: Table "):
            # DuckDB's guess at the name meant is most often one of its own tables.
            message = f"{message.split(' Did you mean')[0].rstrip('!')}; {_list_views()}"
        raise InputError(f"the query failed: {message}") from error
    except duckdb.Error as error:
        raise InputError(f"the query failed: {_shorten(error)}") from error


def _list_tables_read(connection: duckdb.DuckDBPyConnection, sql: str) -> set[str]:
    """Returns the names of the tables and views that a statement reads, in lower case.

    Raises:
        InputError: it does not read at every depth, calls another function than :data:`TABLE_FUNCTIONS`, names a file,
            or is no single SELECT in DuckDB's grammar.
    """
    rows = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchall()
    try:
        tree = json.loads(rows[0][0])
    except RecursionError as error:
        raise InputError("the query failed: it is nested too deeply; break it up with WITH") from error
    if tree["error"]:
        raise InputError(f"the query failed: {' '.join(tree['error_message'].split())}")
    names = set()
    waiting: list[Any] = tree["statements"]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            waiting.extend(part.values())
            _check_part(part)
            names.add(str(part.get("table_name", "")).lower())
    return names


def _check_part(part: dict[str, Any]) -> None:
    """Refuses a part of a parsed statement that does more than read the bank's views."""
    # Every node that is a statement or could stand for one has its own WITH clause.
    if "cte_map" in part and part.get("type") not in READING_NODES:
        raise InputError("a bank is read-only in SQL and part of the query writes; use SELECT only")
    if part.get("type") == "TABLE_FUNCTION":
        name = part["function"]["function_name"].lower()
        if name not in TABLE_FUNCTIONS:
            raise InputError(
                f"SQL can read only the bank's own views, not call {name} in FROM; {_list_views()}; "
                f"the functions are: {', '.join(sorted(TABLE_FUNCTIONS))}"
            )
    if "/" in str(part.get("table_name", "")):
        raise InputError(f"SQL can read only the bank's own views, not the file {part['table_name']}; {_list_views()}")


def _check_files(bank: Bank, names: set[str]) -> None:
    """Makes sure that the files behind some views are as they were written.

    Raises:
        BankFormatError: one is not.
    """
    kinds = {RESERVED_VIEW if name == "all_references" else name for name in names}
    if not kinds.isdisjoint(LIVE_VIEWS):
        kinds |= set(DROPPING_KINDS)
    for file in bank.manifest.files:
        if file.kind in kinds and file.path.endswith(".parquet"):
            bank.check(file)


def _list_tables(bank: Bank) -> dict[str, pa.Schema]:
    """Returns the schema a view has when the version holds no file of that kind."""
    memories = memories_schema(bank.manifest.layout.num_offsets)
    key = pa.field("ref_id", pa.string(), nullable=False)
    signature = [
        pa.field("signature", pa.list_(pa.uint32()), nullable=False),
        pa.field("sequence_key", pa.uint64(), nullable=False),
        pa.field("num_shingles", pa.int64(), nullable=False),
    ]
    return {
        "documents": DOCUMENTS,
        "references": REFERENCES,
        "occurrences": OCCURRENCES,
        "duplicates": DUPLICATES,
        "document_duplicates": DOCUMENT_DUPLICATES,
        "contaminated": CONTAMINATED,
        "tombstones": TOMBSTONES,
        "rejects": REJECTS,
        "memories": memories.insert(1, pa.field("segment", pa.string(), nullable=False)),
        "embeddings": pa.schema([key, pa.field("vector", pa.list_(pa.float32()), nullable=False)]),
        "signatures": pa.schema([key, *signature]),
        "document_signatures": pa.schema([pa.field("doc_id", pa.string(), nullable=False), *signature]),
    }


def _lock_files(connection: duckdb.DuckDBPyConnection, paths: list[str]) -> None:
    """Names the only files that stay open to SQL; must run before external access is switched off."""
    # Each path also in the escaped form in which the views name it: a bank's folder may contain "[" or "*".
    allowed = [*paths, *map(glob.escape, paths)]
    # An empty folder name switches spilling off, which would otherwise write below the current folder.
    connection.execute("SET temp_directory = ''")
    connection.execute(f"SET allowed_paths = [{_quote_all(allowed)}]")


def _get_segment(file: FileEntry) -> str:
    """Returns the id of the segment a file stands in."""
    return PurePosixPath(file.path).parent.name


def _create_view(
    connection: duckdb.DuckDBPyConnection, name: str, located: list[tuple[FileEntry, Path]], schema: pa.Schema
) -> None:
    """Makes the rows of one kind of file visible; those of :data:`LIVE_VIEWS` in the hidden schema ``stored``."""
    target = f'{"stored" if name in LIVE_VIEWS else "main"}."{name}"'
    if not located:
        _create_table(connection, target, schema.empty_table())
        return
    paths = [glob.escape(str(path)) for _, path in located]
    if name == "memories":
        # The name of a shard repeats in other segments. The view may not ask for the file's name: a located file is not
        # always named as in the bank.
        parts = [
            f'SELECT ref_id, {_quote_all([_get_segment(file)])} AS segment, shard, "row", offsets'
            f" FROM read_parquet({_quote_all([path])})"
            for (file, _), path in zip(located, paths, strict=True)
        ]
        connection.execute(f"CREATE VIEW {target} AS {' UNION ALL '.join(parts)}")
        return
    columns = "*"
    if name == "embeddings":
        # Parquet loses the length of a vector, which DuckDB's distance functions ask for.
        dimension = pq.read_schema(located[0][1]).field("vector").type.list_size
        columns = f"* REPLACE (vector::FLOAT[{dimension}] AS vector)"
    connection.execute(f"CREATE VIEW {target} AS SELECT {columns} FROM read_parquet([{_quote_all(paths)}])")


def _create_reference_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes the views of live references, of what is kept of them, and of all references."""
    for name in LIVE_VIEWS:
        joins = " ".join(f"ANTI JOIN main.{kind} USING (ref_id)" for kind in DROPPING_KINDS)
        connection.execute(f'CREATE VIEW "{name}" AS SELECT * FROM stored."{name}" {joins}')
    connection.execute(
        "CREATE VIEW all_references AS SELECT r.*, coalesce(d.kept_ref_id, r.ref_id) AS kept_ref_id,"
        " d.ref_id IS NULL AND c.ref_id IS NULL AND t.ref_id IS NULL AS is_live, t.ref_id IS NOT NULL AS is_deleted"
        ' FROM stored."references" r LEFT JOIN main.duplicates d USING (ref_id)'
        " LEFT JOIN main.contaminated c USING (ref_id) LEFT JOIN main.tombstones t USING (ref_id)"
    )


def _create_table(connection: duckdb.DuckDBPyConnection, target: str, table: pa.Table) -> None:
    """Copies a small table into the in-memory database."""
    connection.register("incoming", table)
    connection.execute(f"CREATE TABLE {target} AS FROM incoming")
    connection.unregister("incoming")


def _describe_files(manifest: Manifest) -> pa.Table:
    """Returns the rows of the view ``files``."""
    files = sorted(manifest.files, key=lambda file: (file.kind, file.path))
    rows = [{**vars(file), "segment": _get_segment(file)} for file in files]
    return pa.Table.from_pylist(rows, FILES)


def _describe_versions(bank: Bank) -> pa.Table:
    """Returns the rows of the view ``versions``; counts that a version's operation did not take are null."""
    tags = list_tags(bank.store)
    rows = []
    for version in list_versions(bank.store):
        manifest = bank.manifest if version == bank.manifest.version else read_manifest(bank.store, version)
        row: dict[str, Any] = {
            "version": version,
            "parent": manifest.parent,
            "operation": manifest.operation,
            "created_at": manifest.created_at,
            "tags": [name for name, tagged in tags.items() if tagged == version],
            "size_bytes": sum(file.size_bytes for file in manifest.files),
            "counts": json.dumps(manifest.counts, sort_keys=True, ensure_ascii=False),
        }
        for name in ("documents", "references"):
            counts = manifest.counts.get(name, {})
            dropped = counts.get("dropped")
            row[f"num_{name}"] = counts.get("kept")
            row[f"num_{name}_dropped"] = None if dropped is None else sum(dropped.values())
        rows.append(row)
    return pa.Table.from_pylist(rows, VERSIONS)


def _quote_all(values: Iterable[str | Path]) -> str:
    """Returns values as SQL strings with commas between."""
    return ", ".join("'" + str(value).replace("'", "''") + "'" for value in values)


def _list_views() -> str:
    """Returns the end of an error after which the user can name a view."""
    return f"the views are: {', '.join(VIEWS)}"


def _shorten(error: Exception) -> str:
    """Returns an error's message on one line, without the picture of the SQL that DuckDB appends."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
