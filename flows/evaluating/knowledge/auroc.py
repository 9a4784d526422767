"""How well a score tells items for which something holds from those for which it does not: the area under the ROC.

It is the share of pairs, one item of each kind, in which the first has the higher score; half a pair where they are
equal. As a measurement it is the mean of what each item adds to it, in the way of DeLong's variance, so that the
bootstrap over items gives its interval, whether or not both scores of a pair are of one item.
"""

from collections.abc import Mapping

import numpy as np

from flows.evaluating.measurements import Measurement, measure_share

EMPTY = ", left out: empty answer"
"""What follows the name of an area in that of the share of items that are no part of it."""


def measure_auroc(
    name: str, way: str, positives: Mapping[str, float], negatives: Mapping[str, float], *, group: str = ""
) -> Measurement:
    """Returns the area under the ROC of a score.

    Args:
        name: what it is called.
        way: of what.
        positives: the score of each item for which it holds, by key.
        negatives: of each for which it does not; the same key stands for the same item.
        group: which part of the items these are.

    Raises:
        ValueError: there is none of one kind.
    """
    if not positives or not negatives:
        raise ValueError(f"{name} of {way}: {len(positives)} positives and {len(negatives)} negatives")
    above = dict(zip(positives, _place(list(positives.values()), list(negatives.values())), strict=True))
    below = dict(zip(negatives, 1 - _place(list(negatives.values()), list(positives.values())), strict=True))
    area = float(np.mean(list(above.values())))
    keys = tuple(dict.fromkeys([*positives, *negatives]))
    totals = [
        area
        + (len(keys) / len(above) * (above[key] - area) if key in above else 0.0)
        + (len(keys) / len(below) * (below[key] - area) if key in below else 0.0)
        for key in keys
    ]
    return Measurement(
        name=name,
        way=way,
        group=group,
        unit="share",
        better="higher",
        keys=keys,
        totals=np.array(totals),
        weights=np.array([1.0] * len(keys)),
    )


def measure_confidence(
    name: str, way: str, positives: Mapping[str, float | None], negatives: Mapping[str, float | None]
) -> list[Measurement]:
    """Returns the area under the ROC of the confidence in answers, and the share of items without an answer.

    An empty answer has no confidence: it is left out of the area, which is missing where all of one kind are empty.

    Args:
        name: what the area is called.
        way: of what.
        positives: the confidence in each answer for which it holds, by key; None for an empty one.
        negatives: in each for which it does not.
    """
    given, others = (
        {key: score for key, score in some.items() if score is not None} for some in (positives, negatives)
    )
    keys = list(dict.fromkeys([*positives, *negatives]))
    is_empty = [any(key in some and some[key] is None for some in (positives, negatives)) for key in keys]
    empty = measure_share(f"{name}{EMPTY}", way, keys, is_empty, better="")
    return [*([measure_auroc(name, way, given, others)] if given and others else []), empty]


def _place(scores: list[float], others: list[float]) -> np.ndarray:
    """Returns for each score the share of the others that are lower, of equal ones half."""
    ordered = np.sort(others)
    lower = np.searchsorted(ordered, scores, side="left")
    not_higher = np.searchsorted(ordered, scores, side="right")
    return np.asarray((lower + not_higher) / (2 * len(ordered)), dtype=np.float64)
