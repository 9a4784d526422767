"""The FAISS index over the embeddings of live references.

Row ``i`` of the index is row ``i`` of the table ``embeddings``. Up to ``EXACT_LIMIT`` references the search is exact;
beyond, an inverted file with 8-bit vectors keeps a query under a millisecond at a million references.
"""

import math
from pathlib import Path

import numpy as np

from schemas.atomic import replace_atomically
from schemas.protocols import FloatArray

EXACT_LIMIT = 200_000
"""References up to which every query is compared with every reference."""


def choose_factory(num_vectors: int) -> str:
    """Returns FAISS's description of the index for a number of vectors."""
    if num_vectors <= EXACT_LIMIT:
        return "Flat"
    return f"IVF{2 ** round(math.log2(2 * math.sqrt(num_vectors)))},SQ8"


def write_index(vectors: FloatArray, path: Path) -> str:
    """Builds an index of unit vectors (rows, dimension) for cosine similarity, writes it, and returns its description.

    Equal vectors give equal bytes: FAISS trains with a fixed seed.
    """
    import faiss

    factory = choose_factory(len(vectors))
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not index.is_trained:
        index.train(vectors)
        faiss.extract_index_ivf(index).nprobe = 32
    index.add(vectors)
    with replace_atomically(path) as temporary:
        faiss.write_index(index, str(temporary))
    return factory
