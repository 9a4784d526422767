"""The FAISS index over the embeddings of a segment's references, and when the indexes of segments are to be merged.

Row ``i`` of an index is row ``i`` of the table ``embeddings`` of its segment. Up to ``EXACT_LIMIT`` references the
search is exact; beyond, an inverted file with 8-bit vectors keeps a query under a millisecond at a million references.

An index is never added to. An update brings a segment with an index of its own, and a search asks all of them. So an
inverted file always holds the very vectors it was trained on, and what updates bring is searched exactly: recall cannot
fall because the texts of today are others than those of the training. What does fall is speed, with every segment and
every row that is no longer live; :func:`explain_merge` says when it is time to write one index anew.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schemas.atomic import replace_atomically
from schemas.errors import InputError
from schemas.protocols import FloatArray

EXACT_LIMIT = 200_000
"""References up to which every query is compared with every reference."""

NUM_PROBES = 32
"""Lists of an inverted file that a query looks into."""

MAX_INDEXES = 16
"""Segments with an index in a version. Each costs a query as much as a few thousand references, however small it is."""

MAX_DEAD_SHARE = 1 / 3
"""Rows that need not be live. At a third a search compares half as many rows again as it needs to."""


def choose_factory(num_vectors: int) -> str:
    """Returns FAISS's description of the index for a number of vectors."""
    if num_vectors <= EXACT_LIMIT:
        return "Flat"
    return f"IVF{2 ** round(math.log2(2 * math.sqrt(num_vectors)))},SQ8"


def write_index(vectors: FloatArray, path: Path, factory: str | None = None) -> str:
    """Builds an index of unit vectors (rows, dimension) for cosine similarity, writes it, and returns its description.

    Equal vectors give equal bytes: FAISS trains with a fixed seed.

    Args:
        vectors: float32 (rows, dimension), unit vectors.
        path: where to write.
        factory: FAISS's description of the index; by default the one for this number of vectors.
    """
    import faiss

    factory = factory or choose_factory(len(vectors))
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not index.is_trained:
        index.train(vectors)
        faiss.extract_index_ivf(index).nprobe = NUM_PROBES
    index.add(vectors)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        # FAISS's own writer does not say that a disk is full, or not in a way that can be told from other errors.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    return factory


def explain_merge(num_vectors: Sequence[int], num_live: int) -> str | None:
    """Says why the indexes of a version should be merged into one, which trains it anew, or that they need not be.

    Args:
        num_vectors: rows of the index of each segment.
        num_live: rows of them all that are live.

    Returns:
        The reason, in words that follow "because"; None if the indexes may stay as they are.

    Raises:
        InputError: more rows are live than there are.
    """
    total = sum(num_vectors)
    if not 0 <= num_live <= total:
        raise InputError(f"num_live is {num_live}, must be 0..{total}, the number of rows")
    exact = [number for number in num_vectors if number <= EXACT_LIMIT]
    if len(exact) > 1 and sum(exact) > EXACT_LIMIT:
        return (
            f"{len(exact)} segments with {sum(exact)} references are searched by comparing each, "
            f"and past {EXACT_LIMIT} an inverted file is faster"
        )
    if total - num_live > MAX_DEAD_SHARE * total:
        return f"{total - num_live} of {total} rows of the index are no longer live, and every search passes them"
    if len(num_vectors) > MAX_INDEXES:
        return f"{len(num_vectors)} segments are searched one after the other, more than {MAX_INDEXES}"
    return None
