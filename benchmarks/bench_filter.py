"""How fast the filter of evaluation compares questions with references: the fast way beside the slow ones.

    python -m benchmarks.bench_filter [--questions 200] [--candidates 10] [--rounds 3]

Questions and references are pieces of the documentation that comes with Python, each question with the references that
its embedding finds nearest, as in an evaluation: these share most with it. All ways must come to the same verdicts.
"""

from pydoc_data.topics import topics
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from flows.benching import BenchReport, BenchRow, describe_machine, time_in_turn
from flows.console import print_bench
from model.embedding import load_embedder
from model.overlap_filter import MAX_OVERLAP
from model.tokenizing import load_tokenizer
from schemas.overlap import exceeds_overlap, measure_overlap
from schemas.protocols import IntArray

REFERENCE_TOKENS = 128
QUESTION_TOKENS = 100

PLAIN_SHARE = 50
"""One in so many pairs is enough to time the plain way."""

Pair = tuple[IntArray, IntArray]

app = typer.Typer(add_completion=False)


def measure_plainly(text: IntArray, reference: IntArray) -> float:
    """Returns the overlap by the textbook: a table of common subsequences for each place that a match can begin at."""
    longest = 0
    for start in range(len(text)):
        row = [0] * (len(reference) + 1)
        for token in text[start : start + 2 * len(reference)].tolist():
            above = 0
            for place, other in enumerate(reference.tolist(), start=1):
                above, row[place] = row[place], above + 1 if token == other else max(row[place], row[place - 1])
        longest = max(longest, row[-1])
    return longest / len(reference)


def make_pairs(num_questions: int, num_candidates: int) -> list[Pair]:
    """Returns questions in tokens, each with the references nearest to it."""
    tokenizer, embedder = load_tokenizer("memory3-tiny"), load_embedder("static")
    encoded = tokenizer.encode([topics[name] for name in sorted(topics)])
    references = [
        ids[start : start + REFERENCE_TOKENS] for ids in encoded for start in range(0, len(ids), REFERENCE_TOKENS)
    ]
    generator = np.random.default_rng(0)
    long = [ids for ids in encoded if len(ids) > 2 * QUESTION_TOKENS]
    questions = []
    for place in range(num_questions):
        ids = long[place % len(long)]
        start = int(generator.integers(0, len(ids) - QUESTION_TOKENS))
        questions.append(ids[start : start + QUESTION_TOKENS])
    vectors_QD, vectors_RD = (
        embedder.embed([tokenizer.decode(ids) for ids in pieces]) for pieces in (questions, references)
    )
    nearest_QK = np.argsort(-(vectors_QD @ vectors_RD.T), axis=1)[:, :num_candidates]
    return [(question, references[row]) for question, rows in zip(questions, nearest_QK, strict=True) for row in rows]


def bench_filter(pairs: list[Pair], num_rounds: int) -> BenchReport:
    """Times the ways of finding out whether a reference is to be dropped.

    Raises:
        RuntimeError: they do not agree.
    """
    few = pairs[::PLAIN_SHARE]
    verdicts = [exceeds_overlap(text, reference, MAX_OVERLAP) for text, reference in pairs]
    measured = [measure_overlap(text, reference) > MAX_OVERLAP for text, reference in pairs]
    plain = [measure_plainly(text, reference) > MAX_OVERLAP for text, reference in few]
    if verdicts != measured or verdicts[::PLAIN_SHARE] != plain:
        raise RuntimeError("the ways of measuring overlap do not agree")
    spent = time_in_turn(
        {
            "bound": lambda: [exceeds_overlap(text, reference, MAX_OVERLAP) for text, reference in pairs],
            "measure": lambda: [measure_overlap(text, reference) for text, reference in pairs],
            "plain": lambda: [measure_plainly(text, reference) for text, reference in few],
        },
        num_rounds,
    )
    rates = {name: len(few if name == "plain" else pairs) / seconds for name, seconds in spent.items()}
    names = {
        "bound": "what the filter does: a bound, then exactly",
        "measure": "always exactly, 64 tokens at a time",
        "plain": "by the textbook, in Python",
    }
    return BenchReport(
        title=f"overlap of {len(pairs):,} pairs of question and candidate, {sum(verdicts):,} above {MAX_OVERLAP:.3g}",
        machine=describe_machine(),
        rows=[
            BenchRow(name=names[name], value=rate, unit="pairs/s", ratio=rate / rates["plain"], against="the textbook")
            for name, rate in rates.items()
        ],
    )


@app.command()
def main(
    questions: Annotated[int, typer.Option(min=1, help="Questions.")] = 200,
    candidates: Annotated[int, typer.Option(min=1, help="References each is compared with.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the best counts.")] = 3,
) -> None:
    """Print how many pairs a second the filter of evaluation compares.

    Example: python -m benchmarks.bench_filter --questions 500
    """
    with Console(stderr=True).status("comparing questions with references"):
        report = bench_filter(make_pairs(questions, candidates), rounds)
    print_bench(report)


if __name__ == "__main__":
    app()
