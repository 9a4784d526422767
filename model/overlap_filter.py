"""The paper's filter for evaluation: no chunk reads a reference that gives the question away (method section 7).

Stands between retrieval and reading: more candidates are retrieved than are read, those whose overlap with the question
is above a limit are left out, and the best of the others take their place. The measure is :mod:`schemas.overlap`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from model.retrieving import Hit, MemorySearch
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.overlap import exceeds_overlap, shares_run
from schemas.protocols import IntArray

MAX_OVERLAP = 2 / 3
"""The paper's limit for evaluation."""

CANDIDATES_PER_HIT = 2
"""References retrieved for each that is read, at first."""

GROWTH = 4
"""By how much more are retrieved where too few of them may be read."""

SEARCHES_AT_ONCE = 256
"""Texts that are embedded and searched together."""

Questions = tuple[tuple[int, ...], ...]
"""Texts in tokens that a reference must not give away; more than one where a question is asked in several wordings."""


class QuestionSearch(Protocol):
    """What finds references that give no question away: a :class:`FilteredSearch`, or something in front of one."""

    def search(self, texts: Sequence[str], questions: Sequence[Questions], num_hits: int) -> list[list[Hit]]:
        """Returns for each text the best references that give none of its questions away, best first."""
        ...


@dataclasses.dataclass(kw_only=True)
class FilterCounts:
    """What a filter did so far. A text that is searched for the same questions in one call counts once.

    Attributes:
        num_searches: texts that references were searched for.
        num_compared: candidates compared with the questions of the text that found them.
        num_dropped: those of them that were dropped.
        num_short: texts that were left with fewer references than wanted.
    """

    num_searches: int = 0
    num_compared: int = 0
    num_dropped: int = 0
    num_short: int = 0


class FilteredSearch:
    """Finds references that do not give a question away.

    Attributes:
        counts: what was searched and dropped so far.
        dropped_ids: the references that were dropped.
    """

    def __init__(
        self,
        bank: Bank,
        retriever: MemorySearch,
        *,
        max_overlap: float = MAX_OVERLAP,
        excluded: Mapping[Questions, Collection[str]] | None = None,
        shared_run: int | None = None,
    ) -> None:
        """Puts the filter in front of the search of a bank.

        Args:
            bank: holds the tokens of the references, of the same tokenizer as the questions'.
            retriever: searches it.
            max_overlap: the greatest overlap that is let through; 1 lets everything through.
            excluded: for questions the references that are dropped whatever their overlap, such as those of the very
                document that is asked about.
            shared_run: references are dropped that share so many consecutive tokens with a question; None for no such
                limit. The rule of GPT-3 for contaminated texts, there with 13 words (arXiv 2005.14165).

        Raises:
            InputError: the limit is not above 0 and at most 1, or the run has no token.
        """
        if not 0 < max_overlap <= 1:
            raise InputError(f"evaluation: max_overlap is {max_overlap}, must be above 0 and at most 1, which is off")
        self._bank, self._retriever, self._max_overlap = bank, retriever, max_overlap
        self._excluded = excluded or {}
        if shared_run is not None and shared_run < 1:
            raise InputError(f"evaluation: shared_run is {shared_run}, must be at least 1")
        self._shared_run = shared_run
        self._is_off = max_overlap == 1 and not self._excluded and shared_run is None
        self._reads_tokens = max_overlap < 1 or shared_run is not None
        self._tokens: dict[str, IntArray] = {}
        self.counts = FilterCounts()
        self.dropped_ids: set[str] = set()

    def search(self, texts: Sequence[str], questions: Sequence[Questions], num_hits: int) -> list[list[Hit]]:
        """Returns the best references for each text that give none of its questions away, best first.

        Args:
            texts: what to search for; an empty one finds nothing.
            questions: for each text what must not be given away.
            num_hits: references wanted for each text; fewer are returned only if the bank has no more.
        """
        pairs = list(zip(texts, questions, strict=True))
        distinct = [pair for pair in dict.fromkeys(pairs) if pair[0]]
        found: dict[tuple[str, Questions], list[Hit]] = {}
        for start in range(0, len(distinct), SEARCHES_AT_ONCE):
            found |= self._search_distinct(distinct[start : start + SEARCHES_AT_ONCE], num_hits)
        return [found.get(pair, []) for pair in pairs]

    def _search_distinct(
        self, pairs: Sequence[tuple[str, Questions]], num_hits: int
    ) -> dict[tuple[str, Questions], list[Hit]]:
        """Searches for texts, again and for more candidates where too few may be read."""
        num_asked = num_hits if self._is_off else CANDIDATES_PER_HIT * num_hits
        found: dict[tuple[str, Questions], list[Hit]] = {}
        verdicts: dict[tuple[Questions, str], bool] = {}
        wanted = list(pairs)
        while wanted:
            candidates = self._retriever.search([text for text, _ in wanted], num_asked)
            if self._reads_tokens:
                self._read_tokens(hit.ref_id for hits in candidates for hit in hits)
            short = []
            for pair, hits in zip(wanted, candidates, strict=True):
                kept, dropped, num_compared = self._choose(hits, pair[1], num_hits, verdicts)
                if len(kept) < num_hits and len(hits) == num_asked and not self._is_off:
                    short.append(pair)
                    continue
                found[pair] = kept
                self.counts.num_searches += 1
                self.counts.num_compared += num_compared
                self.counts.num_dropped += len(dropped)
                self.counts.num_short += len(kept) < num_hits
                self.dropped_ids.update(dropped)
            wanted = short
            num_asked *= GROWTH
        return found

    def _choose(
        self, hits: Sequence[Hit], questions: Questions, num_hits: int, verdicts: dict[tuple[Questions, str], bool]
    ) -> tuple[list[Hit], list[str], int]:
        """Returns the best hits that may be read, the ids of better ones that may not, and how many were compared."""
        if self._is_off:
            return list(hits), [], 0
        excluded = self._excluded.get(questions, ())
        texts = [np.array(question, dtype=np.int32) for question in questions]
        kept: list[Hit] = []
        dropped: list[str] = []
        for hit in hits:
            if len(kept) == num_hits:
                break
            key = questions, hit.ref_id
            if key not in verdicts:
                verdicts[key] = hit.ref_id in excluded or self._gives_away(texts, hit.ref_id)
            if verdicts[key]:
                dropped.append(hit.ref_id)
            else:
                kept.append(hit)
        return kept, dropped, len(kept) + len(dropped)

    def _gives_away(self, texts: Sequence[IntArray], ref_id: str) -> bool:
        if not self._reads_tokens:
            return False
        reference, length = self._tokens[ref_id], self._shared_run
        if length is not None and any(shares_run(text, reference, length) for text in texts):
            return True
        return self._max_overlap < 1 and any(exceeds_overlap(text, reference, self._max_overlap) for text in texts)

    def _read_tokens(self, ref_ids: Iterable[str]) -> None:
        missing = [ref_id for ref_id in dict.fromkeys(ref_ids) if ref_id not in self._tokens]
        if missing:
            rows = self._bank.read_references(missing, ["token_ids"])["token_ids"].to_pylist()
            arrays = [np.array(row, dtype=np.int32) for row in rows]
            self._tokens |= zip(missing, arrays, strict=True)
