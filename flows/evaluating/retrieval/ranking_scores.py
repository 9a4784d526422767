"""How good a ranking is: recall, reciprocal rank and discounted gain, as BEIR and trec_eval define them.

A ranking is a list of names, best first, without repetition; answers have grades above 0. Every score is between 0 and
1, the higher the better.
"""

import math
from collections.abc import Mapping, Sequence


def compute_recall(ranking: Sequence[str], answers: Mapping[str, float], depth: int) -> float:
    """Returns the share of the answers that stand among the first of a ranking."""
    return sum(name in answers for name in ranking[:depth]) / len(answers)


def compute_success(ranking: Sequence[str], answers: Mapping[str, float], depth: int) -> float:
    """Returns 1.0 if an answer stands among the first of a ranking, else 0.0; the recall where there is one answer."""
    return float(any(name in answers for name in ranking[:depth]))


def compute_reciprocal_rank(ranking: Sequence[str], answers: Mapping[str, float], depth: int) -> float:
    """Returns 1 over the rank of the first answer, 0.0 if it does not stand among the first ``depth``."""
    return next((1 / rank for rank, name in enumerate(ranking[:depth], 1) if name in answers), 0.0)


def compute_gain(ranking: Sequence[str], answers: Mapping[str, float], depth: int) -> float:
    """Returns nDCG: the grades found, each over the logarithm of its rank, as a share of the best possible sum."""
    found = [answers.get(name, 0.0) for name in ranking[:depth]]
    best = sorted(answers.values(), reverse=True)[:depth]
    return _discount(found) / _discount(best)


def _discount(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))
