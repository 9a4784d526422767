"""``memory3 search``: live references by meaning, with their text and where they stand."""

import dataclasses

import pyarrow as pa
import pyarrow.compute as pc

from model.embedding import load_embedder
from model.retrieving import Retriever
from schemas.bank import Bank


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundReference:
    """A hit of a search.

    Attributes:
        ref_id: the reference.
        score: cosine similarity with the query.
        text: its text.
        doc_id: the first document it stands in.
    """

    ref_id: str
    score: float
    text: str
    doc_id: str


def open_retriever(bank: Bank) -> Retriever:
    """Opens the index of a bank with the embedder that the bank was built with."""
    config = bank.manifest.config
    return Retriever(bank, load_embedder(config["embedding"]["embedder"], device=config["memory"]["device"]))


def describe_hits(bank: Bank, retriever: Retriever, query: str, num_hits: int) -> list[FoundReference]:
    """Searches one query and adds text and document to each hit."""
    hits = retriever.search([query], num_hits)[0]
    if not hits:
        return []
    texts = bank.read_references([hit.ref_id for hit in hits], ["text"])["text"].to_pylist()
    places = bank.read_table("occurrences", ["doc_id", "ref_id"])
    wanted = pa.array([hit.ref_id for hit in hits], pa.string())
    first = pc.index_in(wanted, value_set=places["ref_id"].combine_chunks())
    documents = places["doc_id"].combine_chunks().take(first).to_pylist()
    return [
        FoundReference(ref_id=hit.ref_id, score=round(hit.score, 4), text=text, doc_id=doc_id)
        for hit, text, doc_id in zip(hits, texts, documents, strict=True)
    ]


def search_bank(bank: Bank, query: str, num_hits: int) -> list[FoundReference]:
    """Opens a bank and searches it."""
    return describe_hits(bank, open_retriever(bank), query, num_hits)
