"""SQL over one version of a bank: read-only DuckDB views of its tables.

Reads what the jobs have written; writes nothing. Each view stands for a table of ``schemas.tables``, except that
``references`` shows only live references and ``all_references`` every stored one; ``versions`` and ``files`` come from
the manifests.

Safety has two independent parts. The connection may open the version's Parquet files and nothing else, and its
settings are locked. That alone would not protect those files themselves: what DuckDB may read it may also overwrite,
even from inside a SELECT (``WITH x AS (COPY ...)``). So a user's text is run by DuckDB's ``query()`` table function,
which takes a single SELECT and refuses a statement that writes at any depth.
"""

import glob
import json
from collections.abc import Iterable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.bank import Bank
from schemas.errors import BankFormatError, InputError
from schemas.manifest import Manifest, list_versions, read_manifest
from schemas.tables import (
    CONTAMINATED,
    DOCUMENT_DUPLICATES,
    DOCUMENTS,
    DUPLICATES,
    OCCURRENCES,
    REFERENCES,
    REJECTS,
    memories_schema,
)

VIEWS = (
    "documents",
    "references",
    "all_references",
    "occurrences",
    "duplicates",
    "document_duplicates",
    "contaminated",
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

VERSIONS = pa.schema(
    [
        pa.field("version", pa.int32(), nullable=False),
        pa.field("parent", pa.int32()),
        pa.field("operation", pa.string(), nullable=False),
        pa.field("created_at", pa.string(), nullable=False),
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
        pa.field("path", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
    ]
)


def open_views(bank: Bank) -> duckdb.DuckDBPyConnection:
    """Opens the views of a bank's version in a fresh in-memory database.

    A table that the version does not have (a cold bank has no memories) is an empty view. The caller closes the
    connection; text from a user goes through :func:`run_query` only.

    Raises:
        BankFormatError: a file or a manifest of the bank is missing or damaged.
    """
    tables = _list_tables(bank)
    paths = {name: [str(path.absolute()) for path in bank.locate_all(name)] for name in tables}
    versions = [read_manifest(bank.path, version) for version in list_versions(bank.path)]
    connection = duckdb.connect(":memory:")
    try:
        _lock_files(connection, [path for group in paths.values() for path in group])
        connection.execute("CREATE SCHEMA stored")
        for name, schema in tables.items():
            _create_view(connection, name, paths[name], schema)
        _create_table(
            connection, "stored.tombstones", pa.table({"ref_id": pa.array(bank.manifest.tombstones, pa.string())})
        )
        _create_reference_views(connection)
        _create_table(connection, "versions", pa.Table.from_pylist([_describe_version(m) for m in versions], VERSIONS))
        files = sorted(bank.manifest.files, key=lambda file: (file.kind, file.path))
        _create_table(connection, "files", pa.Table.from_pylist([vars(file) for file in files], FILES))
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except (duckdb.Error, pa.ArrowInvalid) as error:
        connection.close()
        raise BankFormatError(
            f"the tables of bank {bank.path} cannot be opened: {_shorten(error)}; run memory3 verify"
        ) from error
    return connection


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


def run_query(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """Runs one query a user wrote and returns its whole result, in the query's order.

    Args:
        connection: from :func:`open_views`.
        sql: one statement that reads: SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE or SHOW. It may name the view
            ``references`` without quotes.

    Raises:
        InputError: not exactly one statement, a statement that does not read, or an error in it; DuckDB's message is in
            the text, on one line.
        BankFormatError: a file of the bank was damaged or removed since it was opened.
    """
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
        return connection.sql(f"FROM query({_quote_all([quoted])})").to_arrow_table()
    except duckdb.PermissionException as error:
        # DuckDB takes a missing file for a folder to search, which it then may not.
        gone = [path for path in _list_allowed(connection) if path in str(error) and not Path(path).exists()]
        if gone:
            raise BankFormatError(f"{gone[0]} is missing from the bank; run memory3 verify") from error
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


def _list_tables(bank: Bank) -> dict[str, pa.Schema]:
    """Returns the schema a view has when the version holds no file of that kind."""
    layout = bank.manifest.layout
    key = pa.field("ref_id", pa.string(), nullable=False)
    signature = pa.field("signature", pa.list_(pa.uint32()), nullable=False)
    return {
        "documents": DOCUMENTS,
        "references": REFERENCES,
        "occurrences": OCCURRENCES,
        "duplicates": DUPLICATES,
        "document_duplicates": DOCUMENT_DUPLICATES,
        "contaminated": CONTAMINATED,
        "rejects": REJECTS,
        "memories": memories_schema(layout.num_offsets),
        "embeddings": pa.schema([key, pa.field("vector", pa.list_(pa.float32()), nullable=False)]),
        "signatures": pa.schema([key, signature]),
        "document_signatures": pa.schema([pa.field("doc_id", pa.string(), nullable=False), signature]),
    }


def _lock_files(connection: duckdb.DuckDBPyConnection, paths: list[str]) -> None:
    """Names the only files that stay open to SQL; must run before external access is switched off."""
    # Each path also in the escaped form in which the views name it: a bank's folder may contain "[" or "*".
    allowed = [*paths, *map(glob.escape, paths)]
    # An empty folder name switches spilling off, which would otherwise write below the current folder.
    connection.execute("SET temp_directory = ''")
    connection.execute(f"SET allowed_paths = [{_quote_all(allowed)}]")


def _list_allowed(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Returns the files that SQL may open."""
    # Fetched to the end: a connection with an unfinished result takes no other work.
    rows = connection.execute("SELECT unnest(current_setting('allowed_paths'))").fetchall()
    return [path for (path,) in rows]


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, paths: list[str], schema: pa.Schema) -> None:
    """Makes one kind of file visible; ``references`` goes to the hidden schema ``stored``."""
    target = f'{"stored" if name == RESERVED_VIEW else "main"}."{name}"'
    if not paths:
        _create_table(connection, target, schema.empty_table())
        return
    columns = "*"
    if name == "embeddings":
        # Parquet loses the length of a vector, which DuckDB's distance functions ask for.
        dimension = pq.read_schema(paths[0]).field("vector").type.list_size
        columns = f"* REPLACE (vector::FLOAT[{dimension}] AS vector)"
    connection.execute(
        f"CREATE VIEW {target} AS SELECT {columns} FROM read_parquet([{_quote_all(map(glob.escape, paths))}])"
    )


def _create_reference_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes the views of live and of all references."""
    connection.execute(
        'CREATE VIEW "references" AS SELECT * FROM stored."references"'
        " ANTI JOIN main.duplicates USING (ref_id) ANTI JOIN main.contaminated USING (ref_id)"
        " ANTI JOIN stored.tombstones USING (ref_id)"
    )
    connection.execute(
        "CREATE VIEW all_references AS SELECT r.*, coalesce(d.kept_ref_id, r.ref_id) AS kept_ref_id,"
        " d.ref_id IS NULL AND c.ref_id IS NULL AND t.ref_id IS NULL AS is_live"
        ' FROM stored."references" r LEFT JOIN main.duplicates d USING (ref_id)'
        " LEFT JOIN main.contaminated c USING (ref_id) LEFT JOIN stored.tombstones t USING (ref_id)"
    )


def _create_table(connection: duckdb.DuckDBPyConnection, target: str, table: pa.Table) -> None:
    """Copies a small table into the in-memory database."""
    connection.register("incoming", table)
    connection.execute(f"CREATE TABLE {target} AS FROM incoming")
    connection.unregister("incoming")


def _describe_version(manifest: Manifest) -> dict[str, int | str | None]:
    """Returns a version's row; counts that its operation did not take are null."""
    row: dict[str, int | str | None] = {
        "version": manifest.version,
        "parent": manifest.parent,
        "operation": manifest.operation,
        "created_at": manifest.created_at,
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "counts": json.dumps(manifest.counts, sort_keys=True, ensure_ascii=False),
    }
    for name in ("documents", "references"):
        counts = manifest.counts.get(name, {})
        dropped = counts.get("dropped")
        row[f"num_{name}"] = counts.get("kept")
        row[f"num_{name}_dropped"] = None if dropped is None else sum(dropped.values())
    return row


def _quote_all(values: Iterable[str | Path]) -> str:
    """Returns values as SQL strings with commas between."""
    return ", ".join("'" + str(value).replace("'", "''") + "'" for value in values)


def _list_views() -> str:
    """Returns the end of an error after which the user can name a view."""
    return f"the views are: {', '.join(VIEWS)}"


def _shorten(error: Exception) -> str:
    """Returns an error's message on one line, without the picture of the SQL that DuckDB appends."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
