"""Several rankings joined to one: reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

Where it stands: between searches whose scores cannot be compared, such as cosines and sums over words, and whoever asks
for references. Only ranks count, so nothing has to be fitted.
"""

from collections.abc import Sequence

from model.retrieving import Hit, MemorySearch
from schemas.errors import InputError

RANK_OFFSET = 60
"""What is added to every rank, as in the paper of the method: the first few ranks count nearly alike."""

FUSED_DEPTH = 100
"""Hits asked of each search: what stands behind these adds less than a hundred-and-sixtieth."""


def fuse_hits(rankings: Sequence[Sequence[Hit]], num_hits: int, *, rank_offset: int = RANK_OFFSET) -> list[Hit]:
    """Returns the best references of several rankings of the same question, best first; of equal ones the first by id.

    The score of a reference is the sum over rankings of ``1 / (rank_offset + rank)``, ranks from 1.

    Args:
        rankings: hits, each ranking best first and without repetition.
        num_hits: hits wanted.
        rank_offset: see :data:`RANK_OFFSET`.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.ref_id] = scores.get(hit.ref_id, 0.0) + 1 / (rank_offset + rank)
    ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return [Hit(ref_id=ref_id, score=score) for ref_id, score in ordered[:num_hits]]


class FusedSearch:
    """Asks several searches and joins their rankings; a :class:`model.retrieving.MemorySearch`."""

    def __init__(self, searches: Sequence[MemorySearch], *, depth: int = FUSED_DEPTH) -> None:
        """Joins searches over the same references.

        Args:
            searches: two or more.
            depth: hits asked of each.

        Raises:
            InputError: there are fewer than two searches, or the depth is below 1.
        """
        if len(searches) < 2 or depth < 1:
            raise InputError(f"fusion: {len(searches)} searches with depth {depth}; give two or more, and at least 1")
        self._searches, self._depth = tuple(searches), depth

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the best references of the joined rankings, best first."""
        found = [search.search(texts, max(num_hits, self._depth)) for search in self._searches]
        return [fuse_hits(rankings, num_hits) for rankings in zip(*found, strict=True)]
