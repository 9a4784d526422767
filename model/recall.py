"""How many of the nearest references the indexes of a bank find: recall against comparing all.

The queries are embeddings of the bank itself, so that neither text nor embedding model plays a part. Each looks for its
nearest references but itself. A hit counts if it is as near as the last of the true ones, so that equally near
references stand in for each other.

Shape letters: Q queries, K hits, N references of a batch, D dimension.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.retrieving import SCORE_ERROR, Retriever
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.protocols import FloatArray

NUM_HITS = 5
"""References that a chunk reads."""

ROWS_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexRecall:
    """What the indexes of a version find.

    Attributes:
        num_queries: embeddings that were looked for.
        num_hits: references that each looked for.
        recall: share of the nearest that were found, 0 to 1.
        num_indexes: indexes of the version, one a segment.
        num_exact: those of them that compare a query with every vector.
        num_vectors: vectors in them.
        num_live: vectors of live references, the only ones that are found.
    """

    num_queries: int
    num_hits: int
    recall: float
    num_indexes: int
    num_exact: int
    num_vectors: int
    num_live: int


def measure_recall(bank: Bank, retriever: Retriever, *, num_queries: int, seed: int) -> IndexRecall:
    """Looks for the neighbours of a sample of the bank's own embeddings, by the indexes and by comparing all.

    Args:
        bank: the version.
        retriever: its indexes.
        num_queries: embeddings to look for, fewer if the bank has not as many.
        seed: of the sample.

    Raises:
        InputError: the bank has fewer than two live references whose text has a known word.
        BankFormatError: a table is damaged.
    """
    num_live = retriever.num_references
    draw = np.random.default_rng(seed)
    rows = draw.choice(num_live, min(num_queries, num_live), replace=False)
    ids, queries_QD = _read_vectors(bank, sorted(retriever.get_ref_id(int(row)) for row in rows))
    # The vector of a text without any known word is 0, to which all are equally near.
    is_known = np.linalg.norm(queries_QD, axis=1) > SCORE_ERROR
    ids, queries_QD = ids.filter(pa.array(is_known)), queries_QD[is_known]
    num_hits = min(NUM_HITS, num_live - 1)
    if not num_hits or not len(ids):
        raise InputError("the bank has too few references whose neighbours could be looked for")
    found = _search(retriever, ids.to_pylist(), queries_QD, num_hits)
    found_ids, vectors_ND = _read_vectors(bank, sorted({ref_id for hits in found for ref_id in hits}))
    places = pc.index_in(pa.array([ref_id for hits in found for ref_id in hits]), value_set=found_ids).to_numpy()
    similarities_QK = np.einsum("qd,qkd->qk", queries_QD, vectors_ND[places].reshape(len(ids), num_hits, -1))
    last_Q = _find_last_similarity(bank, ids, queries_QD, num_hits)
    files = bank.manifest.list_files("index")
    return IndexRecall(
        num_queries=len(ids),
        num_hits=num_hits,
        recall=float((similarities_QK >= last_Q[:, None] - SCORE_ERROR).mean()),
        num_indexes=len(files),
        num_exact=sum(bank.store.read_range(file.path, 0, 4) == b"IxFI" for file in files),
        num_vectors=sum(file.num_rows for file in files),
        num_live=num_live,
    )


def _read_vectors(bank: Bank, ref_ids: list[str]) -> tuple[pa.Array, FloatArray]:
    """Returns ids that have an embedding, in the order of the tables, and their vectors (N, D)."""
    rows = bank.read_rows("embeddings", "ref_id", ref_ids, ["ref_id", "vector"]).combine_chunks()
    vectors: FloatArray = rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    return rows["ref_id"].combine_chunks(), vectors


def _search(retriever: Retriever, ids: list[str], queries_QD: FloatArray, num_hits: int) -> list[list[str]]:
    """Returns for each query the ids of what the indexes hold for nearest, but for itself."""
    # One more is asked for, in place of the query itself.
    rows_QK, _ = retriever.search_vectors(queries_QD, num_hits + 1)
    found = []
    for ref_id, rows_K in zip(ids, rows_QK.tolist(), strict=True):
        hits = [retriever.get_ref_id(row) for row in rows_K]
        found.append([hit for hit in hits if hit != ref_id][:num_hits])
    return found


def _find_last_similarity(bank: Bank, ids: pa.Array, queries_QD: FloatArray, num_hits: int) -> FloatArray:
    """Returns how near the last of the nearest references of each query is, by comparing all live ones."""
    dropped = bank.read_dropped_ids()
    best_QK = np.full((len(ids), num_hits), -np.inf, np.float32)
    for file in bank.manifest.list_files("embeddings"):
        for batch in bank.iterate_table(file, ["ref_id", "vector"], ROWS_AT_ONCE):
            live = batch.filter(pc.invert(pc.is_in(batch["ref_id"], value_set=dropped)))
            vectors_ND = live["vector"].flatten().to_numpy().reshape(len(live), queries_QD.shape[1])
            scores_QN = queries_QD @ vectors_ND.T
            own = pc.index_in(ids, value_set=live["ref_id"])
            there = np.flatnonzero(pc.is_valid(own).to_numpy(zero_copy_only=False))
            scores_QN[there, own.drop_null().to_numpy()] = -np.inf
            joined = np.concatenate((best_QK, scores_QN), axis=1)
            best_QK = -np.partition(-joined, num_hits - 1, axis=1)[:, :num_hits]
    last_Q: FloatArray = best_QK.min(axis=1)
    return last_Q
