"""The rankers that the retrieval suite compares, and what each finds for questions, with the time it takes.

    bank -> embedder, bm25, attention (full searches) -> embedder's best ordered by attention, fusions of rankings

What a question excludes is left out of its rankings.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from flows.evaluating.retrieval.figures import EMBEDDER
from flows.evaluating.retrieval.questions import Question
from flows.evaluating.retrieval.word_search import WordSearch
from flows.generation import open_writer
from flows.searching import open_retriever
from model.attention_heads import choose_heads, measure_heads
from model.attention_retrieving import RERANKED, AttentionSearch, RerankedSearch
from model.attention_scoring import AttentionScorer, make_scorer
from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.fusing import fuse_hits
from model.live_references import read_live_references
from model.retrieving import Hit, MemorySearch
from schemas.bank import Bank
from schemas.identifiers import hash_json

WORDS, ATTENTION, RERANKING, ALL = "bm25", "attention", "embedder>attention", "all three"

NUM_SEARCHES = 3
"""Rankers that search the whole bank."""

RANKING_DEPTH = 100
"""References of a ranking."""

SPARE_HITS = 16
"""Hits asked for beyond these, to make up for those that a question excludes: mostly one or two."""

QUESTIONS_AT_ONCE = 64

RANDOM_CANDIDATES = 50
"""References that stand in for the rest of the bank when heads are measured, beside the embedder's best."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFigure:
    """What a pair of memory layer and KV head finds alone.

    Attributes:
        layer: the layer of the model.
        head: the KV head.
        value: mean reciprocal rank of the answer among the candidates.
        is_chosen: whether the search by attention uses it.
    """

    layer: int
    head: int
    value: float
    is_chosen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedQuestions:
    """What all rankers found.

    Attributes:
        hits: for each ranker, for each question, the references, best first.
        seconds: for each ranker the time a question, among :data:`QUESTIONS_AT_ONCE` of them.
    """

    hits: dict[str, list[list[Hit]]]
    seconds: dict[str, float]


class Rankers:
    """The searches of one version of a bank.

    Attributes:
        memories: of the bank.
        heads: what each pair of memory layer and KV head found alone.
        attention: the search by attention.
    """

    def __init__(self, bank: Bank, model: str, *, device: str | None = None) -> None:
        """Opens the searches that need no questions.

        Args:
            bank: the version; its cold memories are written as they are needed.
            model: the checkpoint that wrote it, by name or folder.
            device: where to compute; None for where the bank was written.

        Raises:
            WrongModelError: the bank was written by another model.
            BankError: as its parts.
        """
        self.memories = BankMemories(bank, open_writer(bank, model, device=device))
        self._embedder, self._words = open_retriever(bank), WordSearch(bank)
        self._scorer: AttentionScorer = make_scorer(self.memories)
        self._ref_ids: list[str] = read_live_references(bank, [])["ref_id"].to_pylist()
        self.heads: list[HeadFigure] = []

    @property
    def num_references(self) -> int:
        """Live references of the version."""
        return len(self._ref_ids)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return self.memories.checkpoint

    def choose_heads(self, questions: Sequence[Question], num_heads: int) -> None:
        """Measures each head on questions that no table is made of, and makes the search of the best.

        Args:
            questions: with one answer each, at least one.
            num_heads: heads of the search.
        """
        texts = [question.text for question in questions]
        answers = [next(iter(question.answers)) for question in questions]
        found = self._embedder.search(texts, RERANKED)
        candidates = [self._draw_candidates(question, hits) for question, hits in zip(questions, found, strict=True)]
        values_QP = measure_heads(self._scorer, texts, candidates, answers)
        # Kinds count alike, however many questions there are of each.
        kinds = np.array([question.kind for question in questions])
        values_P = np.mean([values_QP[kinds == kind].mean(0) for kind in dict.fromkeys(kinds.tolist())], axis=0)
        chosen = choose_heads(values_P, self._scorer.pairs, num_heads)
        layers, num_kv_heads = self.checkpoint.memory_layers, self.checkpoint.num_kv_heads
        self.heads = [
            HeadFigure(
                layer=layers[pair // num_kv_heads],
                head=pair % num_kv_heads,
                value=float(value),
                is_chosen=pair in chosen,
            )
            for pair, value in zip(self._scorer.pairs, values_P, strict=True)
        ]
        self._chosen = self._scorer.select(chosen)
        self.attention = AttentionSearch(self._chosen)

    def _draw_candidates(self, question: Question, hits: Sequence[Hit]) -> list[str]:
        start = int(hash_json(question.key), 16) % len(self._ref_ids)
        others = [self._ref_ids[(start + place) % len(self._ref_ids)] for place in range(RANDOM_CANDIDATES)]
        names = dict.fromkeys([*question.answers, *(hit.ref_id for hit in hits), *others])
        return [name for name in names if name not in question.excluded]

    def ask(
        self,
        questions: Sequence[Question],
        *,
        depth: int = RANKING_DEPTH,
        done: Callable[[str, int], None] | None = None,
    ) -> AskedQuestions:
        """Asks every ranker every question.

        Args:
            questions: the questions, at least one.
            depth: references of each ranking.
            done: told which ranker has answered how many more questions.
        """
        searches: dict[str, MemorySearch] = {
            EMBEDDER: self._embedder,
            WORDS: self._words,
            ATTENTION: self.attention,
        }
        hits: dict[str, list[list[Hit]]] = {}
        seconds: dict[str, float] = {}
        for way, search in searches.items():
            found, taken = _search_all(way, search, questions, depth, done)
            hits[way] = [
                [hit for hit in row if hit.ref_id not in question.excluded][:depth]
                for question, row in zip(questions, found, strict=True)
            ]
            seconds[way] = taken / len(questions)
        started = time.perf_counter()
        reranking = RerankedSearch(self._embedder, self._chosen)
        hits[RERANKING] = reranking.order([question.text for question in questions], hits[EMBEDDER])
        seconds[RERANKING] = seconds[EMBEDDER] + (time.perf_counter() - started) / len(questions)
        for ways in [*combinations(searches, 2), tuple(searches)]:
            name = ALL if len(ways) == len(searches) else "+".join(ways)
            started = time.perf_counter()
            rows = zip(*(hits[way] for way in ways), strict=True)
            hits[name] = [fuse_hits(rankings, depth) for rankings in rows]
            joining = (time.perf_counter() - started) / len(questions)
            seconds[name] = sum(seconds[way] for way in ways) + joining
        return AskedQuestions(hits=hits, seconds=seconds)


def _search_all(
    way: str, search: MemorySearch, questions: Sequence[Question], depth: int, done: Callable[[str, int], None] | None
) -> tuple[list[list[Hit]], float]:
    """Returns what a search finds, with what is excluded, and the seconds it took."""
    found: list[list[Hit]] = []
    started = time.perf_counter()
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        some = questions[start : start + QUESTIONS_AT_ONCE]
        found += search.search([question.text for question in some], depth + SPARE_HITS)
        if done is not None:
            done(way, len(some))
    return found, time.perf_counter() - started
