"""Which of the near-duplicate references are dropped, and for which: the last step of near-duplicate removal.

    texts -> shingles -> signatures -> candidate pairs -> verified pairs -> **duplicates**

References joined by verified pairs form a cluster, of which the longest is kept. The result depends on the contents of
the references only, never on their order or on how they were cut into batches. After the paper's method section 3.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.minhashing import sign
from pipelines.pairing import (
    MAX_BUCKET,
    Jaccards,
    find_equal_sets,
    hash_bands,
    hash_sets,
    list_candidate_pairs,
    verify_pairs,
)
from pipelines.shingling import Hashes, Indices, shingle_texts
from schemas.errors import InputError
from schemas.tables import DUPLICATES

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeduplicationConfig:
    """How near-duplicates are found.

    With b bands of r values, a pair of similarity s is a candidate with probability ``1 - (1 - s**r)**b``: 0.9999 at
    the default threshold. Fewer, longer bands are cheaper and miss more.

    Attributes:
        num_words: words in a shingle.
        num_permutations: values in a signature.
        num_bands: parts a signature is cut into; divides ``num_permutations``.
        threshold: exact Jaccard similarity from which two references are near-duplicates, above 0 and up to 1.
        seed: seed of the permutations, as datasketch takes it.
        max_bucket: rows of a bucket up to which all its pairs are compared.
    """

    num_words: int = 5
    num_permutations: int = 120
    num_bands: int = 24
    threshold: float = 0.8
    seed: int = 1
    max_bucket: int = MAX_BUCKET

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of bounds, or the bands do not divide the permutations.
        """
        for name, least in (("num_words", 1), ("num_permutations", 1), ("num_bands", 1), ("max_bucket", 2)):
            if getattr(self, name) < least:
                raise InputError(f"deduplication: {name} is {getattr(self, name)}, must be at least {least}")
        if self.num_permutations % self.num_bands:
            raise InputError(
                f"deduplication: num_bands is {self.num_bands}, must divide num_permutations = {self.num_permutations}"
            )
        if not 0 < self.threshold <= 1:
            raise InputError(f"deduplication: threshold is {self.threshold}, must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"deduplication: seed is {self.seed}, must be 0..{(1 << 32) - 1}")


def find_duplicates(
    ref_ids: Sequence[str], texts: Sequence[str], num_tokens: Sequence[int], config: DeduplicationConfig
) -> pa.Table:
    """Finds the near-duplicates among references that fit into memory, in one process.

    The same functions in the same order as the jobs apply to batches, with the same result.

    Args:
        ref_ids: the references' ids, in any order; an id that comes again is the same reference and is passed over.
        texts: their texts.
        num_tokens: their lengths.
        config: how to find them.

    Returns:
        A table of :data:`schemas.tables.DUPLICATES`, see :func:`cluster_duplicates`.

    Raises:
        InputError: the columns have different lengths.
    """
    if not len(ref_ids) == len(texts) == len(num_tokens):
        raise InputError(
            f"duplicates: {len(ref_ids)} ids, {len(texts)} texts and {len(num_tokens)} lengths, must be equally many"
        )
    sorted_ids, rows = np.unique(np.asarray(ref_ids, dtype=np.str_), return_index=True)
    hashes, offsets = shingle_texts([texts[row] for row in rows], config.num_words)
    firsts = find_equal_sets(hash_sets(hashes, offsets))
    equal_pairs = np.stack([firsts, np.arange(len(rows))], axis=1)[firsts != np.arange(len(rows))]
    compared = np.flatnonzero((firsts == np.arange(len(rows))) & (np.diff(offsets) > 0))
    keys = hash_bands(sign(hashes, offsets, config.num_permutations, config.seed)[compared], config.num_bands)
    candidates, num_skipped = list_candidate_pairs(
        keys.ravel(), np.repeat(compared, config.num_bands), config.max_bucket
    )
    if num_skipped:
        logger.warning(
            "near-duplicates: %d of the pairs that share a band were not compared, because a band was shared by more "
            "than %d references; raise max_bucket to compare more",
            num_skipped,
            config.max_bucket,
        )
    pairs = np.concatenate([equal_pairs, candidates])
    jaccards = verify_pairs(pairs, hashes, offsets)
    lengths = np.asarray(num_tokens, dtype=np.int64)[rows]
    return cluster_duplicates(sorted_ids, lengths, pairs, jaccards, hashes, offsets, config)


def cluster_duplicates(
    ref_ids: Sequence[str] | pa.Array,
    num_tokens: Indices,
    pairs: Indices,
    jaccards: Jaccards,
    hashes: Hashes,
    offsets: Indices,
    config: DeduplicationConfig,
) -> pa.Table:
    """Joins verified pairs to clusters and keeps the longest reference of each, the smallest id if several are longest.

    Args:
        ref_ids: ids of all references (N,), ascending and distinct.
        num_tokens: their lengths (N,).
        pairs: rows int64 (P, 2) that were compared; the order does not matter.
        jaccards: exact similarity of each pair (P,); pairs below the threshold are left out.
        hashes: shingle sets of all references, see :func:`pipelines.shingling.shingle_texts`.
        offsets: their offsets (N+1,).
        config: gives the threshold.

    Returns:
        One row a dropped reference, ascending by ``ref_id``, schema :data:`schemas.tables.DUPLICATES`: ``jaccard`` is
        the similarity to the kept reference, which may lie below the threshold where a chain joins the two;
        ``matched_ref_id`` is the most similar of the references it was compared with and joined to, the smallest id of
        several; ``cluster`` is the smallest id of the cluster.

    Raises:
        InputError: the ids are not ascending and distinct.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids = pa.array(ref_ids, pa.string())
    if not pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py():
        raise InputError("duplicates: ref_ids are not ascending and distinct; sort them")
    joined = jaccards >= config.threshold
    left, right = pairs[joined].T
    similarities = jaccards[joined]
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(ids), len(ids)))
    labels = connected_components(graph, directed=False)[1].astype(np.int64)

    members = np.unique(pairs[joined])
    by_length = members[np.lexsort((members, -num_tokens[members]))]
    kept_of_label = _list_first_rows(labels, by_length)
    smallest_of_label = _list_first_rows(labels, members)
    kept = kept_of_label[labels[members]]
    dropped, kept = members[members != kept], kept[members != kept]
    matched, matched_jaccards = _find_best_matches(left, right, similarities, dropped)
    columns = {
        "ref_id": ids.take(dropped),
        "kept_ref_id": ids.take(kept),
        "jaccard": verify_pairs(np.stack([kept, dropped], axis=1), hashes, offsets),
        "matched_ref_id": ids.take(matched),
        "matched_jaccard": matched_jaccards,
        "cluster": ids.take(smallest_of_label[labels[dropped]]),
    }
    return pa.table(columns, schema=DUPLICATES)


def _list_first_rows(labels: Indices, rows: Indices) -> Indices:
    """Returns for each label the first of the rows that has it, in the order given; 0 for a label without a row."""
    firsts = np.zeros(len(labels), np.int64)
    present, places = np.unique(labels[rows], return_index=True)
    firsts[present] = rows[places]
    return firsts


def _find_best_matches(left: Indices, right: Indices, jaccards: Jaccards, rows: Indices) -> tuple[Indices, Jaccards]:
    """Returns the most similar partner of each row and the similarity; every row stands in some pair."""
    sources, targets = np.concatenate([left, right]), np.concatenate([right, left])
    both = np.concatenate([jaccards, jaccards])
    order = np.lexsort((targets, -both, sources))
    best = order[np.searchsorted(sources[order], rows)]
    return targets[best], both[best]
