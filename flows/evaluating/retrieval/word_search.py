"""BM25: references by the words that they share with a question, the baseline without any model.

Words are those of :mod:`pipelines.words`: case folded, and a letter of a script without spaces is a word of its own, so
a Chinese question is searched by its characters. The index is that of ``bm25s`` (Lucene's form of BM25, k1 1.5, b 0.75)
and stands in RAM; making it takes seconds for ten thousand references.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from model.live_references import read_live_references
from model.retrieving import Hit
from pipelines.words import Hashes, find_words
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.protocols import FloatArray, LongArray


def select_best(scores: FloatArray, num_hits: int) -> LongArray:
    """Returns the places of the greatest scores above 0, best first, of equal ones the first."""
    num_hits = min(num_hits, len(scores))
    last = np.partition(scores, len(scores) - num_hits)[len(scores) - num_hits]
    places = np.flatnonzero((scores >= last) & (scores > 0))
    best: LongArray = places[np.argsort(-scores[places], kind="stable")][:num_hits]
    return best


class WordSearch:
    """Finds live references of a version by BM25; a :class:`model.retrieving.MemorySearch`."""

    def __init__(self, bank: Bank) -> None:
        """Reads the texts of a version and indexes their words.

        Raises:
            InputError: there are no live references, or none has a word.
            BankFormatError: a table is missing or damaged.
        """
        import bm25s

        live = read_live_references(bank, ["text"])
        self._ref_ids: list[str] = live["ref_id"].to_pylist()
        words = find_words(live["text"])
        self._vocabulary: Hashes
        self._vocabulary, places = np.unique(words.hashes, return_inverse=True)
        if not len(self._vocabulary):
            raise InputError(f"the references of bank {bank.url} have no words to search by")
        documents = [part.tolist() for part in np.split(places, words.offsets[1:-1])]
        names = {str(place): place for place in range(len(self._vocabulary))}
        self._index = bm25s.BM25()
        self._index.index((documents, names), create_empty_token=False, show_progress=False)

    def search(self, texts: Sequence[str], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the references that share a word with it, best first.

        Raises:
            InputError: ``num_hits`` is below 1.
        """
        if num_hits < 1:
            raise InputError(f"asked for {num_hits} hits; ask for at least 1")
        words = find_words(pa.array(texts, pa.string()))
        return [
            self._rank(words.hashes[start:end], num_hits)
            for start, end in zip(words.offsets[:-1], words.offsets[1:], strict=True)
        ]

    def _rank(self, hashes: Hashes, num_hits: int) -> list[Hit]:
        places = np.minimum(np.searchsorted(self._vocabulary, hashes), len(self._vocabulary) - 1)
        known = places[self._vocabulary[places] == hashes]
        if not len(known):
            return []
        scores = self._index.get_scores_from_ids(known.tolist())
        return [Hit(ref_id=self._ref_ids[row], score=float(scores[row])) for row in select_best(scores, num_hits)]
