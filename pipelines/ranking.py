"""A cut in the ranking of all documents by their quality scores (method section 3).

    scores of the kept records -> **documents to drop** -> references (:mod:`pipelines.chunking`)

The rules of :mod:`pipelines.filtering` judge each text alone; a share of the best needs the scores of all.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def choose_score_cut(
    scores: np.ndarray[tuple[int, ...], np.dtype[np.floating]],
    doc_ids: pa.Array | pa.ChunkedArray,
    threshold: float | None = None,
    top_share: float | None = None,
) -> Mask:
    """Chooses the documents to drop for their quality scores (method section 3).

    Args:
        scores: a score a document, the higher the better (N,); one that is not a number is below all others.
        doc_ids: their ids (N,), all different; of equal scores the lesser id, by its UTF-8 bytes, is the better.
        threshold: the least score to keep, compared in the type of ``scores``; None for no bound.
        top_share: share of all documents to keep, the best ones, rounded up to a whole document; None for all.

    Returns:
        True for what is to be dropped, (N,), by either bound. The order of the documents makes no difference.

    Raises:
        InputError: ``top_share`` is not within (0, 1], or ``threshold`` is not finite.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise InputError(f"quality: threshold is {threshold}, must be a finite number")
    if top_share is not None and not 0 < top_share <= 1:
        raise InputError(f"quality: top_share is {top_share}, must be above 0 and at most 1")
    if len(scores) != len(doc_ids):
        raise ValueError(f"there are {len(scores)} scores for {len(doc_ids)} documents")
    dropped = np.zeros(len(scores), np.bool_)
    if threshold is not None:
        dropped |= ~(scores >= scores.dtype.type(threshold))
    if top_share is not None:
        worth = np.where(np.isnan(scores), -math.inf, scores)
        order = pc.sort_indices(
            pa.table({"score": worth, "doc_id": doc_ids}),
            sort_keys=[("score", "descending"), ("doc_id", "ascending")],
        ).to_numpy()
        # The decimal share is meant: 0.07 * 100 is above 7 in binary.
        dropped[order[math.ceil(round(top_share * len(scores), 6)) :]] = True
    return dropped
