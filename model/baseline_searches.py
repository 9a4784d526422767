"""Searches that retrieved memories are measured against, and one that asks another only once.

All stand where :class:`model.retrieving.Retriever` or :class:`model.overlap_filter.FilteredSearch` would.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from model.overlap_filter import Questions, QuestionSearch
from model.retrieving import Hit


class EmptySearch:
    """Finds nothing: the model reads as one that could and is given no memory."""

    def search(self, texts: Sequence[str], questions: Sequence[Questions], num_hits: int) -> list[list[Hit]]:
        """Returns nothing for each text."""
        return [[] for _ in texts]


class RandomSearch:
    """Draws references by the text alone: the same for the same text, and more of them continue fewer."""

    def __init__(self, ref_ids: Sequence[str]) -> None:
        """Takes the ids to draw from."""
        self._ref_ids = ref_ids

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text references drawn without replacement, all with a score of 0."""
        return [self._draw(text, min(num_hits, len(self._ref_ids))) for text in texts]

    def _draw(self, text: str, num_hits: int) -> list[Hit]:
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        generator = np.random.default_rng(seed)
        rows: dict[int, None] = {}
        while len(rows) < num_hits:
            rows.setdefault(int(generator.integers(len(self._ref_ids))))
        return [Hit(ref_id=self._ref_ids[row], score=0.0) for row in rows]


class RememberedSearch:
    """Asks a search once for each text, for the most references that anybody wants; fewer are the best of them."""

    def __init__(self, search: QuestionSearch, max_hits: int) -> None:
        """Stands in front of a search.

        Args:
            search: finds references.
            max_hits: the most that will be asked for.
        """
        self._search, self._max_hits = search, max_hits
        self._found: dict[tuple[str, Questions], list[Hit]] = {}

    def search(self, texts: Sequence[str], questions: Sequence[Questions], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the best references that give none of its questions away, best first.

        Raises:
            ValueError: more are wanted than were said to be.
        """
        if num_hits > self._max_hits:
            raise ValueError(f"{num_hits} references are wanted, at most {self._max_hits} are remembered")
        pairs = list(zip(texts, questions, strict=True))
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._found]
        found = self._search.search([text for text, _ in missing], [asked for _, asked in missing], self._max_hits)
        self._found |= zip(missing, found, strict=True)
        return [self._found[pair][:num_hits] for pair in pairs]
