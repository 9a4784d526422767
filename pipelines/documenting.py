"""The tables of a version's documents: what stands in them, where, and what was dropped.

    records, drops, chunks, occurrences of the base -> **documents, occurrences, rejects, document duplicates**

They are written before references are gathered, into the workspace's folder ``tables``, and go into the segment as
they are. For a deletion they are made of the tables of the base alone.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.chunking import CHUNKS
from pipelines.jobs import NEAR_DUPLICATE_DOCUMENT, read_drops, select_kept
from pipelines.records import RECORDS
from pipelines.reusing import Base, read_reused, take_occurrences
from pipelines.workspace import Workspace, list_finished, read_columns, read_tables
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.tables import (
    DOCUMENT_DUPLICATES,
    DOCUMENTS,
    OCCURRENCES,
    REJECTS,
    signatures_schema,
    write_table,
    write_tables,
)

DELETED = "deleted"

DOCUMENT_TABLES = ("documents", "occurrences", "rejects", "document_duplicates", "document_signatures")


def _count(values: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(values).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: entry["values"])}


def _widen(table: pa.Table) -> pa.Table:
    """Returns a table whose strings may be more than 2 GiB in a column, as sorting joins its chunks."""
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    return table.cast(pa.schema(fields))


def read_chunks(work: Workspace, columns: list[str]) -> pa.Table:
    """Returns columns of all chunks, but for texts and tokens small enough to be held."""
    tables = [read_columns(path, columns) for path in work.list_files("chunks")]
    return pa.concat_tables([pa.schema([CHUNKS.field(name) for name in columns]).empty_table(), *tables])


def write_document_tables(work: Workspace, base: Base) -> dict[str, Any]:
    """Writes the tables of all documents of a corpus; returns the counts of documents.

    Record files are read without their text.
    """
    tables = work.get_folder("tables")
    columns = [name for name in RECORDS.names if name != "text"]
    records = _widen(read_tables(work.list_files("records"), columns, RECORDS))
    drops = _widen(read_drops(work))

    cut = read_chunks(work, OCCURRENCES.names)
    occurrences = _widen(pa.concat_tables([cut, take_occurrences(read_reused(work), base)]))
    occurrences = occurrences.sort_by([("doc_id", "ascending"), ("ordinal", "ascending")])
    write_tables([occurrences], OCCURRENCES, tables / "occurrences.parquet")

    kept = select_kept(records, drops).sort_by("doc_id")
    per_document = occurrences.group_by("doc_id").aggregate([("ordinal", "count")]).sort_by("doc_id")
    places = pc.index_in(kept["doc_id"], value_set=per_document["doc_id"].combine_chunks())
    num_references = per_document["ordinal_count"].combine_chunks().take(places.combine_chunks()).fill_null(0)
    documents = kept.append_column("num_references", num_references.cast(pa.int32()))
    write_tables([documents.select(DOCUMENTS.names)], DOCUMENTS, tables / "documents.parquet")

    rejected = records.filter(pc.is_valid(records["reason"])).select(REJECTS.names)
    rejects = pa.concat_tables([rejected, drops.cast(rejected.schema)])
    rejects = rejects.sort_by([("path", "ascending"), ("position", "ascending"), ("reason", "ascending")])
    write_tables([rejects], REJECTS, tables / "rejects.parquet")

    if work.document_duplicates_path.exists():
        document_duplicates = pq.read_table(work.document_duplicates_path)
        write_table(document_duplicates.cast(DOCUMENT_DUPLICATES), tables / "document_duplicates.parquet")
        _write_document_signatures(work, tables / "document_signatures.parquet")
    return {"read": len(records), "kept": len(documents), "dropped": _count(rejects["reason"])}


def _write_document_signatures(work: Workspace, target: Path) -> None:
    """Writes the signatures of documents, which are compared in the order of the corpus, by ascending id."""
    columns = ["id", "signature", "sequence_key", "num_shingles"]
    signed = [read_columns(path, columns) for path in list_finished(work.get_folder("documents") / "signed")]
    schema = signatures_schema("doc_id", signed[0].schema.field("signature").type.list_size)
    write_table(pa.concat_tables(signed).sort_by("id").rename_columns(schema.names).cast(schema), target)


def _without(table: pa.Table, columns: list[str], ids: pa.Array) -> pa.Table:
    for column in columns:
        table = table.filter(pc.invert(pc.fill_null(pc.is_in(table[column], value_set=ids), False)))
    return table


def _without_compared(duplicates: pa.Table, ids: pa.Array) -> pa.Table:
    """Returns near-duplicates without documents that are gone, and without those that were found by one of them."""
    while True:
        left = _without(duplicates, ["doc_id", "kept_doc_id", "matched_doc_id"], ids)
        if len(left) == len(duplicates):
            break
        ids = duplicates["doc_id"].filter(pc.invert(pc.is_in(duplicates["doc_id"], value_set=left["doc_id"])))
        ids, duplicates = ids.combine_chunks(), left
    # A cluster is named by the least id in it, and each has one document that is kept.
    least = left.group_by("kept_doc_id").aggregate([("doc_id", "min")]).combine_chunks()
    names = pc.min_element_wise(least["kept_doc_id"], least["doc_id_min"])
    cluster = names.take(pc.index_in(left["kept_doc_id"], value_set=least["kept_doc_id"].combine_chunks()))
    return left.set_column(left.schema.get_field_index("cluster"), DOCUMENT_DUPLICATES.field("cluster"), cluster)


def write_remaining_tables(work: Workspace, bank: Bank, doc_ids: list[str]) -> dict[str, Any]:
    """Writes the tables of a version's documents without some of them; returns the counts of documents.

    A document that was dropped as a near-duplicate of a deleted one does not come back: the bank does not hold its
    text. It stays among the rejects until the next update.

    Raises:
        InputError: an id is neither that of a document of the version nor of one it dropped.
    """
    tables = work.get_folder("tables")
    ids = pa.array(dict.fromkeys(doc_ids), pa.string())
    documents, rejects = bank.read_table("documents"), bank.read_table("rejects")
    is_kept = pc.is_in(ids, value_set=documents["doc_id"].combine_chunks())
    is_rejected = pc.is_in(ids, value_set=rejects["doc_id"].combine_chunks())
    unknown = ids.filter(pc.invert(pc.or_(is_kept, is_rejected)))
    if len(unknown):
        raise InputError(
            f"bank {bank.url} has no document {unknown[0].as_py()!r}; list them with: "
            f"memory3 sql --bank {bank.url} 'select doc_id from documents'"
        )
    remaining = _without(documents, ["doc_id"], ids)
    write_tables([remaining], DOCUMENTS, tables / "documents.parquet")
    occurrences = bank.read_table("occurrences")
    write_tables([_without(occurrences, ["doc_id"], ids)], OCCURRENCES, tables / "occurrences.parquet")
    kept_rejects = _without(rejects, ["doc_id"], ids)
    if bank.manifest.list_files("document_duplicates"):
        duplicates = _without_compared(bank.read_table("document_duplicates"), ids)
        write_tables([duplicates], DOCUMENT_DUPLICATES, tables / "document_duplicates.parquet")
        there = pa.concat_tables([table.select(["doc_id"]) for table in (remaining, duplicates)]).combine_chunks()
        signatures = bank.read_table("document_signatures")
        is_there = pc.is_in(signatures["doc_id"], value_set=there["doc_id"].combine_chunks())
        write_tables([signatures.filter(is_there)], signatures.schema, tables / "document_signatures.parquet")
        # The detail names the document it is like.
        is_alone = pc.and_(
            pc.equal(kept_rejects["reason"], NEAR_DUPLICATE_DOCUMENT),
            pc.invert(pc.is_in(kept_rejects["doc_id"], value_set=duplicates["doc_id"].combine_chunks())),
        )
        details = pc.if_else(is_alone, "to a document that is gone", kept_rejects["detail"])
        column = REJECTS.get_field_index("detail")
        kept_rejects = kept_rejects.set_column(column, REJECTS.field("detail"), details)
    write_tables([kept_rejects], REJECTS, tables / "rejects.parquet")
    before = bank.manifest.counts["documents"]
    num_rejects, num_deleted = len(rejects) - len(kept_rejects), pc.sum(is_kept).as_py() or 0
    dropped = dict(_count(kept_rejects["reason"]))
    dropped[DELETED] = before["dropped"].get(DELETED, 0) + num_deleted + num_rejects
    return {"read": before["read"], "kept": before["kept"] - num_deleted, "dropped": dropped}
