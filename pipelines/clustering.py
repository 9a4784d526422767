"""Which of the near-duplicates are dropped, and for which: the last step of near-duplicate removal.

    texts -> words -> signatures -> candidate pairs -> verified pairs -> **duplicates**

Works on documents and on references alike; both are called texts here. Texts joined by verified pairs form a cluster,
of which the preferred one is kept. The result depends on the contents of the texts only, never on their order or on how
they were cut into batches. After the paper's method section 3.
"""

import dataclasses
import fnmatch
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.minhashing import sign_texts
from pipelines.pairing import (
    MAX_BUCKET,
    Jaccards,
    find_equal_keys,
    hash_bands,
    list_candidate_pairs,
    verify_pairs,
)
from pipelines.shingling import shingle_texts
from pipelines.words import Indices
from schemas.errors import InputError
from schemas.tables import duplicates_schema

logger = logging.getLogger(__name__)

LONGEST = "longest"
FIRST = "first"
SOURCE = "source"

KEEP_POLICIES = (LONGEST, FIRST, SOURCE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeduplicationConfig:
    """How near-duplicates are found, and which of them stays.

    With b bands of r values, a pair of similarity s is a candidate with probability ``1 - (1 - s**r)**b``: 0.9977 at
    the default threshold. Fewer, longer bands are cheaper and miss more.

    Attributes:
        enabled: False finds none.
        num_words: words in a shingle.
        num_permutations: values in a signature.
        num_bands: parts a signature is cut into; divides ``num_permutations``.
        threshold: exact Jaccard similarity from which two texts are near-duplicates, above 0 and up to 1.
        seed: seed of the permutations, as datasketch takes it.
        max_bucket: texts that share a band up to which all their pairs are compared.
        keep: which text of a cluster is kept: the ``longest``; the ``first`` by document id and place; or that of the
            best ``source``, the longest of these.
        source_priority: for ``source``: patterns of sources (``*`` and ``?`` as in file names), the best first; sources
            that match none come last.
        strict: True drops a text only for one that is itself as similar as ``threshold``; False also for one that a
            chain of such pairs leads to.
    """

    enabled: bool = True
    num_words: int = 5
    num_permutations: int = 120
    num_bands: int = 20
    threshold: float = 0.8
    seed: int = 1
    max_bucket: int = MAX_BUCKET
    keep: str = LONGEST
    source_priority: tuple[str, ...] = ()
    strict: bool = False

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
        if self.keep not in KEEP_POLICIES:
            raise InputError(f"deduplication: keep is {self.keep!r}, must be one of {', '.join(KEEP_POLICIES)}")
        if bool(self.source_priority) != (self.keep == SOURCE):
            raise InputError(
                f"deduplication: keep is {self.keep!r} and source_priority {list(self.source_priority)}; "
                f"a list of sources and keep = {SOURCE!r} must be given together"
            )


def rank_sources(sources: pa.Array, priority: Sequence[str]) -> Indices:
    """Returns for each source the place of the first pattern it matches, ``len(priority)`` if none, int64 (N,)."""
    encoded = sources.dictionary_encode()
    places = [
        next((place for place, pattern in enumerate(priority) if fnmatch.fnmatchcase(name, pattern)), len(priority))
        for name in encoded.dictionary.to_pylist()
    ]
    ranks: Indices = np.array(places, np.int64)[encoded.indices.to_numpy()] if len(sources) else np.empty(0, np.int64)
    return ranks


def prefer_sources(ranks: Indices, sizes: Indices) -> Indices:
    """Returns preferences by which the best rank comes first, and of equal ranks the longest, int64 (N,)."""
    preferences: Indices = ranks * (int(sizes.max(initial=0)) + 1) - sizes
    return preferences


def find_duplicates(
    ids: pa.Array | Sequence[str], texts: pa.Array | Sequence[str], preferences: Indices, config: DeduplicationConfig
) -> pa.Table:
    """Finds the near-duplicates among texts that fit into memory, in one process.

    The same functions in the same order as the jobs apply to batches (:mod:`pipelines.comparing`), with the same
    result.

    Args:
        ids: N distinct ids, in any order.
        texts: the texts.
        preferences: of a cluster the text with the least value is kept, int64 (N,), for instance minus the length; of
            several the one with the smallest id.
        config: how to find them.

    Returns:
        A table as :func:`cluster_duplicates` makes it.

    Raises:
        InputError: the columns have different lengths, or an id comes twice.
    """
    ids, texts = pa.array(ids, pa.string()), pa.array(texts)
    if not len(ids) == len(texts) == len(preferences):
        raise InputError(
            f"duplicates: {len(ids)} ids, {len(texts)} texts and {len(preferences)} preferences, must be equally many"
        )
    signed = sign_texts(texts, config.num_words, config.num_permutations, config.seed)
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    firsts = find_equal_keys(signed.sequence_keys[order])
    rows = np.arange(len(ids))
    compared = np.flatnonzero((firsts == rows) & (signed.num_shingles[order] > 0))
    keys = hash_bands(signed.signatures[order[compared]], config.num_bands)
    pairs, num_left_out = list_candidate_pairs(keys.ravel(), np.repeat(compared, config.num_bands), config.max_bucket)
    if num_left_out:
        logger.warning(
            "near-duplicates: %d of the pairs that share a band were not compared, because a band was shared by more "
            "than %d texts; raise max_bucket to compare more",
            num_left_out,
            config.max_bucket,
        )
    candidates = np.unique(pairs)
    hashes, offsets = shingle_texts(texts.take(pa.array(order[candidates])), config.num_words)

    def measure(measured: Indices) -> Jaccards:
        return verify_pairs(np.searchsorted(candidates, measured), hashes, offsets)

    return cluster_duplicates(
        ids.take(pa.array(order)), preferences[order], firsts, pairs, measure(pairs), measure, config
    )


def cluster_duplicates(
    ids: pa.Array,
    preferences: Indices,
    firsts: Indices,
    pairs: Indices,
    jaccards: Jaccards,
    measure: Callable[[Indices], Jaccards],
    config: DeduplicationConfig,
) -> pa.Table:
    """Joins verified pairs to clusters and keeps the preferred text of each, the smallest id if several are.

    Args:
        ids: ids of all texts (N,), ascending and distinct; a text's row is its place here.
        preferences: the least is kept, int64 (N,).
        firsts: the first row with the same words, itself if there is none, int64 (N,). Such copies have similarity 1.
        pairs: rows int64 (P, 2) that were compared, all of them firsts; the order does not matter.
        jaccards: exact similarity of each pair (P,); pairs below the threshold are left out.
        measure: returns the exact similarities of further pairs of rows that stand in ``pairs``.
        config: gives the threshold, and whether the kept text must itself match.

    Returns:
        One row a dropped text, ascending by ``id``: ``kept_id``; ``jaccard``, the similarity of the two, which may lie
        below the threshold where a chain joins them; ``matched_id`` and ``matched_jaccard``, the most similar of the
        texts it was compared with and joined to, the smallest id of several; ``cluster``, the smallest id of those
        with the same kept text.

    Raises:
        InputError: the ids are not ascending and distinct.
    """
    if not pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py():
        raise InputError("duplicates: the ids are not ascending and distinct; name each text once, and sort them")
    joined = jaccards >= config.threshold
    edges, similarities = pairs[joined], jaccards[joined]
    copies = np.flatnonzero(firsts != np.arange(len(ids)))
    members = np.unique(np.concatenate([edges.ravel(), copies, firsts[copies]]))
    # Copies count as one text, for which the preferred of them stands.
    by_preference = members[np.lexsort((members, preferences[members]))]
    preferred = _take_first_rows(firsts[by_preference], by_preference, len(ids))
    ordered = by_preference[preferred[firsts[by_preference]] == by_preference]
    choose = _choose_strictly if config.strict else _choose_by_cluster
    kept_firsts = choose(edges, firsts[ordered], len(ids))
    kept = preferred[kept_firsts[firsts[members]]]
    smallest = _take_first_rows(kept, members, len(ids))
    is_dropped = members != kept
    dropped, kept = members[is_dropped], kept[is_dropped]

    to_copies = np.stack([firsts[copies], copies], axis=1)
    all_edges = np.concatenate([edges, to_copies])
    all_similarities = np.concatenate([similarities, np.ones(len(copies))])
    matched, matched_jaccards = _find_best_matches(all_edges, all_similarities, dropped)
    jaccards = np.ones(len(dropped))
    different = firsts[dropped] != firsts[kept]
    jaccards[different] = measure(np.stack([firsts[kept], firsts[dropped]], axis=1)[different])
    columns = [
        ids.take(pa.array(dropped)),
        ids.take(pa.array(kept)),
        pa.array(jaccards),
        ids.take(pa.array(matched)),
        pa.array(matched_jaccards),
        ids.take(pa.array(smallest[kept])),
    ]
    return pa.table(columns, schema=duplicates_schema("id"))


def _take_first_rows(groups: Indices, rows: Indices, num_rows: int) -> Indices:
    """Returns for each group, itself a row, the first of the rows that are in it; other places hold themselves."""
    firsts = np.arange(num_rows)
    present, places = np.unique(groups, return_index=True)
    firsts[present] = rows[places]
    return firsts


def _choose_by_cluster(edges: Indices, ordered: Indices, num_rows: int) -> Indices:
    """Returns for each row the most preferred of all that edges lead to; ``ordered`` has the rows by preference."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(num_rows, num_rows))
    labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return _take_first_rows(labels[ordered], ordered, num_rows)[labels]


def _choose_strictly(edges: Indices, ordered: Indices, num_rows: int) -> Indices:
    """Returns for each row itself or the one it is dropped for, its neighbour.

    Goes through the rows by preference: one that is not dropped yet is kept, and its neighbours are dropped for it.
    """
    order = np.lexsort((np.concatenate(edges[:, ::-1].T), np.concatenate(edges.T)))
    sources, targets = np.concatenate(edges.T)[order], np.concatenate(edges[:, ::-1].T)[order]
    starts = np.searchsorted(sources, ordered)
    ends = np.searchsorted(sources, ordered, side="right")
    chosen = np.full(num_rows, -1)
    for row, start, end in zip(ordered.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if chosen[row] < 0:
            chosen[row] = row
            neighbours = targets[start:end]
            chosen[neighbours[chosen[neighbours] < 0]] = row
    return np.where(chosen < 0, np.arange(num_rows), chosen)


def _find_best_matches(edges: Indices, jaccards: Jaccards, rows: Indices) -> tuple[Indices, Jaccards]:
    """Returns the most similar neighbour of each row and the similarity; every row has one."""
    sources, targets = np.concatenate(edges.T), np.concatenate(edges[:, ::-1].T)
    both = np.concatenate([jaccards, jaccards])
    order = np.lexsort((targets, -both, sources))
    best = order[np.searchsorted(sources[order], rows)]
    return targets[best], both[best]
