"""Ids that several documents have: one document keeps the id, the others are dropped with their reason.

    records of all files (:mod:`pipelines.records`) -> **rejects** -> references (:mod:`pipelines.chunking`)

The one step of reading that must see all documents at once; it looks at four columns of them.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.records import CONFLICTING_ID, DUPLICATE_DOCUMENT
from schemas.tables import REJECTS


def find_id_conflicts(records: pa.Table) -> pa.Table:
    """Finds the documents whose id another document has already.

    The first by path and position keeps the id. A later one is a ``duplicate_document`` if its text equals that of the
    first, else a ``conflicting_id``.

    Args:
        records: the kept records of all files, in any order, with columns path, position, doc_id and content_hash.

    Returns:
        The records to drop, as :data:`schemas.tables.REJECTS`, sorted by path and position.
    """
    paths, names = _encode_column(records, "path")
    path_ranks = np.empty(len(names), dtype=np.int64)
    path_ranks[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    places = path_ranks[paths]
    positions = records["position"].to_numpy()
    doc_ids, _ = _encode_column(records, "doc_id")
    hashes, _ = _encode_column(records, "content_hash")

    order = np.lexsort((positions, places, doc_ids))
    ordered_ids = doc_ids[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered_ids[1:] != ordered_ids[:-1]
    firsts = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    dropped, kept = order[~is_first], firsts[~is_first]
    by_place = np.lexsort((positions[dropped], places[dropped]))
    dropped, kept = dropped[by_place], kept[by_place]

    equal = pa.array(hashes[dropped] == hashes[kept])
    first = records.select(["path", "position"]).take(pa.array(kept))
    place = pc.binary_join_element_wise(first["path"], pc.cast(first["position"], pa.string()), ":")
    wording = pc.if_else(equal, "has the same id and text", "has the same id and another text")
    columns = {
        **{name: records[name].take(pa.array(dropped)) for name in ("path", "position", "doc_id")},
        "reason": pc.if_else(equal, DUPLICATE_DOCUMENT, CONFLICTING_ID),
        "detail": pc.binary_join_element_wise(place, wording, " "),
        "value": pa.nulls(len(dropped), pa.float64()),
        "threshold": pa.nulls(len(dropped), pa.float64()),
    }
    return pa.table(columns).cast(REJECTS)


def _encode_column(table: pa.Table, name: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], pa.Array]:
    """Returns a column as codes (rows,) and the distinct values they stand for."""
    encoded = table[name].dictionary_encode().unify_dictionaries()
    if encoded.num_chunks == 0:
        return np.empty(0, dtype=np.int64), pa.array([], pa.string())
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return codes.astype(np.int64), encoded.chunk(0).dictionary
