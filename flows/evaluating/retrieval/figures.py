"""The figures of the retrieval suite: what each ranker found, as measurements, tables and charts.

questions, rankings -> scores a question -> measurements -> tables, charts, verdicts, failures
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flows.evaluating.measurements import MIN_ITEMS, Interval, Measurement, measure_by_item, subtract
from flows.evaluating.retrieval.beir_folders import BEIR
from flows.evaluating.retrieval.questions import Question, group_by_source
from flows.evaluating.retrieval.ranking_scores import (
    compute_gain,
    compute_recall,
    compute_reciprocal_rank,
    compute_success,
)
from flows.evaluating.suite_reports import Chart, Point, Series, Table, Verdict

Rankings = dict[str, list[list[str]]]
"""By ranker, for each question, the names of what it found, best first."""


def list_items(questions: Sequence[Question]) -> list[str]:
    """Returns what questions are of, each once."""
    return list(dict.fromkeys(question.item for question in questions))


def count_questions(questions: Sequence[Question]) -> str:
    """Returns how many there are, and of how many documents, as people read it."""
    told, num_items = f"{len(questions):,} questions", len(list_items(questions))
    return told if num_items == len(questions) else f"{told} of {num_items:,} documents"


Score = Callable[[Sequence[str], Mapping[str, float], int], float]

EMBEDDER = "embedder"
"""What the others are compared with: the search that generation uses."""

DEPTHS = (1, 2, 3, 5, 10, 20)

LAST_DEPTH = 20

QUICK_ROUNDS = 2000
"""Rounds of the bootstrap for charts and sources, of which there are many."""

MIN_SOURCE_QUESTIONS = 20
"""A source with fewer questions of a kind, or of too few documents, has no row of its own."""


def list_scores(kind: str) -> list[tuple[str, Score, int]]:
    """Returns what a table shows of a kind of questions: names, functions and depths.

    Questions of a bank have one answer, or several that are equally good, so that one of them is all that is wanted.
    """
    if kind == BEIR:
        recalls = [(f"recall@{depth}", compute_recall, depth) for depth in (1, 5, 20)]
        return [*recalls, ("MRR@10", compute_reciprocal_rank, 10), ("nDCG@10", compute_gain, 10)]
    recalls = [(f"recall@{depth}", compute_success, depth) for depth in (1, 5, 20)]
    return [*recalls, ("MRR@20", compute_reciprocal_rank, LAST_DEPTH)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedQuestions:
    """Questions of one kind and what each ranker found.

    Attributes:
        kind: the kind.
        questions: the questions.
        rankings: see :data:`Rankings`.
    """

    kind: str
    questions: list[Question]
    rankings: Rankings

    def __str__(self) -> str:
        """Returns how many questions of how many documents these are."""
        return count_questions(self.questions)

    def measure(self, name: str, way: str, score: Score, depth: int) -> Measurement:
        """Returns the mean of a score of a ranker over questions, document by document."""
        pairs = zip(self.questions, self.rankings[way], strict=True)
        values = [score(ranking, question.answers, depth) for question, ranking in pairs]
        return measure_by_item(name, way, [question.item for question in self.questions], values, group=self.kind)

    def measure_all(self) -> dict[str, dict[str, Measurement]]:
        """Returns for each ranker its measurements by name."""
        return {
            way: {name: self.measure(name, way, score, depth) for name, score, depth in list_scores(self.kind)}
            for way in self.rankings
        }

    def draw_chart(self) -> Chart:
        """Returns the chart of recall over the number of references taken."""
        score = compute_recall if self.kind == BEIR else compute_success
        series = []
        for way in self.rankings:
            intervals = [
                self.measure(f"recall@{depth}", way, score, depth).measure_interval(rounds=QUICK_ROUNDS)
                for depth in DEPTHS
            ]
            points = [Point(x=float(depth), interval=found) for depth, found in zip(DEPTHS, intervals, strict=True)]
            series.append(Series(label=way, points=points))
        return Chart(
            name=f"recall-{self.kind}",
            title=f"Recall, {self}: {self.kind}",
            x_label="references taken" if self.kind != BEIR else "documents taken",
            y_label="share found",
            series=series,
        )

    def list_failures(self) -> list[dict[str, Any]]:
        """Returns the questions that no ranker answers within :data:`LAST_DEPTH`."""
        failed = []
        for place, question in enumerate(self.questions):
            rankings = {way: found[place] for way, found in self.rankings.items()}
            if not any(compute_success(ranking, question.answers, LAST_DEPTH) for ranking in rankings.values()):
                failed.append(
                    {
                        "question": question.key,
                        "source": question.source,
                        "text": question.text,
                        "wanted": sorted(question.answers),
                        "found": {way: ranking[:1] for way, ranking in rankings.items()},
                    }
                )
        return failed


def make_table(ranked: RankedQuestions, found: dict[str, dict[str, Measurement]], seconds: dict[str, float]) -> Table:
    """Returns the table of rankers, with the time that each takes for a question."""
    names = [name for name, _, _ in list_scores(ranked.kind)]
    rows: list[list[Any]] = []
    for way, by_name in found.items():
        intervals = [by_name[name].interval for name in names]
        rows.append([way, *(interval.format(3) for interval in intervals), f"{1000 * seconds[way]:.1f}"])
    return Table(
        title=f"{ranked.kind}: {ranked}",
        columns=["ranker", *names, "ms a question"],
        rows=rows,
        numeric=frozenset(range(1, len(names) + 2)),
    )


def make_source_table(
    ranked: RankedQuestions, found: dict[str, dict[str, Measurement]]
) -> tuple[Table, list[Measurement]]:
    """Returns recall@5 of each ranker by source, and the measurements that it shows."""
    groups = {
        source: questions
        for source, questions in group_by_source(ranked.questions).items()
        if source and len(questions) >= MIN_SOURCE_QUESTIONS and len(list_items(questions)) >= MIN_ITEMS
    }
    parts = [
        by_name["recall@5"].select(f"{ranked.kind}: {source}", list_items(questions))
        for source, questions in groups.items()
        for by_name in found.values()
    ]
    by_label = {(part.way, part.group): part for part in parts}
    rows: list[list[Any]] = [
        [
            source,
            count_questions(questions),
            *(
                by_label[way, f"{ranked.kind}: {source}"].measure_interval(rounds=QUICK_ROUNDS).format_share()
                for way in found
            ),
        ]
        for source, questions in groups.items()
    ]
    title = f"{ranked.kind}: recall@5 by source"
    numeric = frozenset(range(1, len(found) + 2))
    return Table(title=title, columns=["source", "asked", *found], rows=rows, numeric=numeric), parts


def compare_rankers(
    ranked: RankedQuestions, found: dict[str, dict[str, Measurement]]
) -> tuple[list[Measurement], list[Verdict]]:
    """Returns by how much each ranker exceeds the embedder, document by document, and what follows."""
    names = [list_scores(ranked.kind)[place][0] for place in (1, -1)]
    differences, verdicts = [], []
    for way, by_name in found.items():
        if way == EMBEDDER:
            continue
        gained: dict[str, Interval] = {}
        for name in names:
            difference = subtract(f"{name} over {EMBEDDER}", way, by_name[name], found[EMBEDDER][name])
            differences.append(difference)
            gained[name] = difference.interval
        verdicts.append(
            Verdict(
                question=f"{ranked.kind}: is {way} better than {EMBEDDER}?",
                holds=all(interval.is_above_zero for interval in gained.values()),
                evidence=", ".join(f"{name} {interval.format(3, signed=True)}" for name, interval in gained.items()),
            )
        )
    return differences, verdicts
