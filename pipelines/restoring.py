"""The documents of a bank put together again from their references, for a model with another tokenizer.

    occurrences, references of a version --join--> records, as reading a corpus leaves them

The references of a document cover it, so its text is theirs one after the other; that it is the very text is checked by
its hash.
"""

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.records import RECORDS
from pipelines.workspace import Workspace
from schemas.atomic import replace_atomically
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.identifiers import hash_bytes

DOCUMENTS_PER_FILE = 4096


def _join_texts(rows: list[dict[str, object]], texts: dict[str, str]) -> str:
    """Joins the references of one document, in their order; where they overlap, what was there already is left out."""
    pieces: list[str] = []
    end = 0
    for row in rows:
        start, stop = int(str(row["start_char"])), int(str(row["end_char"]))
        text = texts[str(row["ref_id"])][len(str(row["prefix"])) :]
        pieces.append(text[end - start : stop - start])
        end = stop
    return "".join(pieces)


def _restore_documents(bank: Bank, documents: pa.Table, occurrences: pa.Table) -> pa.Table:
    """Returns records of a run of documents.

    Raises:
        BankFormatError: the references of a document do not make up its text.
    """
    ids = pc.unique(occurrences["ref_id"])
    stored = bank.read_references(ids.to_pylist(), ["text"])
    texts = dict(zip(stored["ref_id"].to_pylist(), stored["text"].to_pylist(), strict=True))
    by_document = itertools.groupby(occurrences.to_pylist(), key=lambda row: str(row["doc_id"]))
    joined = {doc_id: _join_texts(list(rows), texts) for doc_id, rows in by_document}
    restored = [joined.get(doc_id, "") for doc_id in documents["doc_id"].to_pylist()]
    for doc_id, text, content_hash, size in zip(
        documents["doc_id"].to_pylist(),
        restored,
        documents["content_hash"].to_pylist(),
        documents["num_references"].to_pylist(),
        strict=True,
    ):
        if size and hash_bytes(text.encode()) != content_hash:
            raise BankFormatError(
                f"document {doc_id} of bank {bank.url} cannot be put together from its references; "
                "build the bank for the new model from its corpus"
            )
    columns = {name: documents[name] for name in documents.column_names if name in RECORDS.names}
    columns["text"] = pa.array(restored, pa.string())
    columns["reason"] = pa.nulls(len(documents), pa.string())
    columns["detail"] = pa.array([""] * len(documents), pa.string())
    columns["value"] = columns["threshold"] = pa.nulls(len(documents), pa.float64())
    return pa.table(columns).select(RECORDS.names).cast(RECORDS)


def _restore_rejects(rejects: pa.Table) -> pa.Table:
    size = len(rejects)
    columns = {name: rejects[name] for name in rejects.column_names}
    for name in ("source", "metadata", "title"):
        columns[name] = pa.array([""] * size, pa.string())
    for name in ("text", "content_hash"):
        columns[name] = pa.nulls(size, pa.string())
    columns["size_bytes"] = columns["num_chars"] = pa.array([0] * size, pa.int64())
    return pa.table(columns).select(RECORDS.names).cast(RECORDS)


def _iterate_records(bank: Bank) -> Iterator[pa.Table]:
    documents, occurrences = bank.read_table("documents"), bank.read_table("occurrences")
    start = 0
    for first in range(0, len(documents), DOCUMENTS_PER_FILE):
        some = documents.slice(first, DOCUMENTS_PER_FILE)
        num_rows = pc.sum(some["num_references"]).as_py() or 0
        yield _restore_documents(bank, some, occurrences.slice(start, num_rows))
        start += num_rows
    rejects = bank.read_table("rejects")
    if len(rejects):
        yield _restore_rejects(rejects)


def restore_records(work: Workspace, bank: Bank) -> None:
    """Writes the documents of a version, and what it rejected, as the records that reading its corpus would leave.

    Raises:
        BankFormatError: a document cannot be put together.
    """
    for part, records in enumerate(_iterate_records(bank)):
        target = work.get_folder("records") / f"{part:06d}.parquet"
        if not target.exists():
            with replace_atomically(target) as temporary:
                pq.write_table(records, temporary, row_group_size=max(1, len(records)))
