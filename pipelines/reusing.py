"""What an operation takes over from the version it starts from, so that only what is new is worked on.

    documents of the base --match--> reused documents -> their occurrences
    references, signatures, embeddings, memories of the base --by ref_id--> what need not be made again

A document is matched by the hash of its content, not by its name: a renamed one is not cut again.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.workspace import Workspace
from schemas.bank import Bank
from schemas.tables import OCCURRENCES, write_table

REUSED = pa.schema([("doc_id", pa.string()), ("base_doc_id", pa.string())])
"""Documents that are not cut again, and the document of the base whose references they have."""

Paths = tuple[Path, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The tables of the version an operation starts from, as files of this machine; all empty for a first build.

    Attributes:
        documents: the table of documents.
        occurrences: where its references stand.
        references: every stored reference.
        signatures: their signatures.
        embeddings: their embeddings.
        memories: where their memories are.
    """

    documents: Paths = ()
    occurrences: Paths = ()
    references: Paths = ()
    signatures: Paths = ()
    embeddings: Paths = ()
    memories: Paths = ()

    @classmethod
    def of(cls, bank: Bank) -> "Base":
        """Locates the tables of a version, and makes sure that they are as they were written.

        Raises:
            BankFormatError: a table is missing or damaged: what is made from it would be, too.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: tuple(map(bank.check, bank.manifest.list_files(name))) for name in names})


def read_ids(paths: Sequence[Path], column: str = "ref_id") -> pa.Array:
    """Returns a column of ids of several Parquet files as one array."""
    columns = [pq.read_table(path, columns=[column])[column] for path in paths]
    return pa.concat_arrays([pa.array([], pa.string()), *(chunk for one in columns for chunk in one.chunks)])


def filter_new(table: pa.Table, known: pa.Array) -> pa.Table:
    """Returns the rows of a table whose ``ref_id`` is not among ``known``."""
    return table.filter(pc.invert(pc.is_in(table["ref_id"], value_set=known))) if len(known) else table


def read_range(paths: Sequence[Path], prefix: str, columns: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Reads the rows of tables sorted by ``ref_id`` whose id begins with ``prefix``, without reading the others."""
    end = f"{int(prefix, 16) + 1:0{len(prefix)}x}"
    bounds = [("ref_id", ">=", prefix)]
    if len(end) == len(prefix):
        bounds.append(("ref_id", "<", end))
    tables = [pq.read_table(path, columns=list(columns), filters=bounds) for path in paths]
    fields = pa.schema([schema.field(name) for name in columns])
    return pa.concat_tables([fields.empty_table(), *(table.cast(fields) for table in tables)])


# Documents of the base -> reused documents ----------------------------------------------------------------------------


def _make_keys(documents: pa.Table, *, by_title: bool) -> pa.ChunkedArray:
    """Returns what decides a document's references: its text, and its title where that goes into them."""
    if not by_title:
        return documents["content_hash"]
    return pc.binary_join_element_wise(documents["content_hash"], documents["title"], pa.scalar("\0"))


def match_documents(documents: pa.Table, base: Base, *, by_title: bool) -> pa.Table:
    """Finds the documents whose references are in the base already.

    Args:
        documents: columns doc_id, content_hash and title.
        base: the version to take from.
        by_title: whether references begin with titles.

    Returns:
        A table of :data:`REUSED`, in the order of ``documents``.
    """
    columns = ["doc_id", "content_hash", "title"]
    tables = [pq.read_table(path, columns=columns) for path in base.documents]
    if not tables:
        return REUSED.empty_table()
    known = pa.concat_tables(tables).combine_chunks()
    keys = _make_keys(known, by_title=by_title).combine_chunks()
    rows = pc.index_in(_make_keys(documents, by_title=by_title), value_set=keys)
    found = pc.is_valid(rows)
    columns_found = [documents["doc_id"].filter(found), known["doc_id"].take(rows.filter(found))]
    return pa.table(dict(zip(REUSED.names, columns_found, strict=True))).cast(REUSED)


def take_occurrences(reused: pa.Table, base: Base) -> pa.Table:
    """Returns the occurrences of reused documents, as :data:`schemas.tables.OCCURRENCES`, under their own ids."""
    tables = [pq.read_table(path) for path in base.occurrences]
    if not sum(map(len, tables)) or not len(reused):
        return OCCURRENCES.empty_table()
    known = pa.concat_tables(tables).combine_chunks()
    # The table is sorted by document, so that the occurrences of one are a run of rows.
    runs = pc.run_end_encode(known["doc_id"].combine_chunks(), run_end_type=pa.int64())
    ends = runs.run_ends.to_numpy()
    starts = np.append(0, ends[:-1])
    places = pc.index_in(reused["base_doc_id"], value_set=runs.values)
    has_any = pc.is_valid(places)  # a document without any token has no reference
    chosen = places.filter(has_any).to_numpy()
    lengths = (ends - starts)[chosen]
    offsets = np.append(0, np.cumsum(lengths))
    rows = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(starts[chosen], lengths)
    owners = np.repeat(np.arange(len(chosen)), lengths)
    doc_ids = reused["doc_id"].filter(has_any).combine_chunks().take(pa.array(owners))
    taken = known.take(pa.array(rows))
    return taken.set_column(0, OCCURRENCES.field("doc_id"), doc_ids).cast(OCCURRENCES)


def save_identity(work: Workspace) -> None:
    """Says that all documents of the workspace's tables are those of the base."""
    doc_ids = read_ids([work.get_folder("tables") / "documents.parquet"], "doc_id")
    write_table(pa.table([doc_ids, doc_ids], schema=REUSED), work.reused_path)


def read_reused(work: Workspace) -> pa.Table:
    """Returns the documents that were not cut again; empty if all were."""
    return pq.read_table(work.reused_path) if work.reused_path.exists() else REUSED.empty_table()
