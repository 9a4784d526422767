"""Retrieval by the model's own attention: no embedder, no index; the stored keys are what is searched.

Where it stands: in the place of :class:`model.retrieving.Retriever`, for generation or for measuring. The keys of a
few pairs of memory layer and KV head are held in RAM and compared with every query of a text, a part of them at a time;
cold memories are written when the search is made. :class:`RerankedSearch` holds nothing and puts what another search
finds in a new order.

Shape letters: as in :mod:`model.attention_scoring`, and B texts.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from model.attention_scoring import AttentionScorer
from model.live_references import read_live_references
from model.retrieving import Hit, MemorySearch
from schemas.errors import InputError

MAX_KEY_BYTES = 8 << 30
"""What the keys of a search may take in RAM."""

KEY_ITEM_BYTES = 2

MEMORIES_AT_ONCE = 1024
"""Memories whose keys are made ready together: more are held twice for a moment."""

QUERIES_AT_ONCE = 1024
"""Queries of all texts of a batch, one text at least."""

RERANKED = 50
"""Hits of another search that are put in a new order."""


def order_hits(ref_ids: Sequence[str], scores_N: torch.Tensor, num_hits: int) -> list[Hit]:
    """Returns the best references, best first; of equally good ones those that stand first."""
    order = scores_N.sort(descending=True, stable=True).indices[:num_hits].tolist()
    return [Hit(ref_id=ref_ids[place], score=float(scores_N[place])) for place in order]


def split_texts(queries: Sequence[torch.Tensor], num_queries: int) -> Iterator[range]:
    """Yields places of texts in order, as many as have no more queries together, one at least."""
    start = 0
    while start < len(queries):
        stop, total = start + 1, queries[start].shape[1]
        while stop < len(queries) and total + queries[stop].shape[1] <= num_queries:
            total += queries[stop].shape[1]
            stop += 1
        yield range(start, stop)
        start = stop


class AttentionSearch:
    """Compares texts with all live memories of a version; a :class:`model.retrieving.MemorySearch`.

    Attributes:
        scorer: says how good a memory is.
    """

    def __init__(self, scorer: AttentionScorer, *, max_key_bytes: int = MAX_KEY_BYTES) -> None:
        """Brings the keys of the scorer's pairs into RAM.

        Args:
            scorer: with the pairs that count.
            max_key_bytes: bytes that the keys may take.

        Raises:
            InputError: they take more.
            BankError: as :meth:`model.fetching.FetchedMemories.fetch`.
        """
        self.scorer = scorer
        self._ref_ids: list[str] = read_live_references(scorer.memories.bank, [])["ref_id"].to_pylist()
        num_pairs, num_slots, _, dimension = scorer.sample_PSND.shape
        shape = (num_pairs, num_slots, len(self._ref_ids), dimension)
        size_bytes = KEY_ITEM_BYTES * math.prod(shape)
        if size_bytes > max_key_bytes:
            raise InputError(
                f"the keys of {len(self._ref_ids):,} references for {num_pairs} heads take {size_bytes:,} bytes, more "
                f"than {max_key_bytes:,}; choose fewer heads, or order what the embedder finds"
            )
        self._keys_PSND = torch.empty(shape, dtype=torch.float16, device=scorer.sample_PSND.device)
        for start in range(0, len(self._ref_ids), MEMORIES_AT_ONCE):
            some = slice(start, start + MEMORIES_AT_ONCE)
            self._keys_PSND[:, :, some] = scorer.fetch_keys(self._ref_ids[some])

    @property
    def size_bytes(self) -> int:
        """RAM that the keys take."""
        return self._keys_PSND.nbytes

    @torch.inference_mode()
    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the memories with the best scores, best first, none for a text without tokens.

        Raises:
            InputError: ``num_hits`` is below 1.
        """
        if num_hits < 1:
            raise InputError(f"asked for {num_hits} hits; ask for at least 1")
        queries = self.scorer.ask(texts)
        hits: list[list[Hit]] = []
        for places in split_texts(queries, QUERIES_AT_ONCE):
            some = [queries[place] for place in places]
            for queries_PQD, scores_N in zip(some, self._score(some), strict=True):
                hits.append(order_hits(self._ref_ids, scores_N, num_hits) if queries_PQD.shape[1] else [])
        return hits

    def _score(self, queries: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the scores of all memories, (B, N) on the CPU."""
        lengths = [queries_PQD.shape[1] for queries_PQD in queries]
        joined_PQD = torch.cat(list(queries), 1)
        scores_BN = torch.zeros(len(queries), len(self._ref_ids))
        for place, queries_QD in enumerate(joined_PQD):
            shares_NQ = self.scorer.share_out(place, queries_QD, self._keys_PSND[place])
            scores_BN += torch.stack(
                [part_NQ.sum(1) / max(1, part_NQ.shape[1]) for part_NQ in shares_NQ.split(lengths, 1)]
            ).cpu()
        return scores_BN / len(joined_PQD)


class RerankedSearch:
    """Orders what another search finds by attention; a :class:`model.retrieving.MemorySearch`."""

    def __init__(self, first: MemorySearch, scorer: AttentionScorer, *, depth: int = RERANKED) -> None:
        """Puts a scorer behind a search.

        Args:
            first: finds the candidates.
            scorer: with the pairs that count.
            depth: hits that are put in a new order; more that are asked for follow in the order of ``first``.

        Raises:
            InputError: the depth is below 1.
        """
        if depth < 1:
            raise InputError(f"ordering by attention: depth is {depth}, must be at least 1")
        self._first, self._scorer, self._depth = first, scorer, depth

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the references that the first search finds, the best by attention first.

        Scores of what follows behind ``depth`` are those of the first search.
        """
        found = self._first.search(texts, max(num_hits, self._depth))
        return [hits[:num_hits] for hits in self.order(texts, found)]

    def order(self, texts: Sequence[str], found: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """Returns hits of the first search in the new order."""
        candidates = [sorted(hit.ref_id for hit in hits[: self._depth]) for hits in found]
        ordered = []
        for ref_ids, hits, scores_PN in zip(
            candidates, found, self._scorer.score_candidates(texts, candidates), strict=True
        ):
            ordered.append([*order_hits(ref_ids, scores_PN.mean(0), len(ref_ids)), *hits[self._depth :]])
        return ordered
