"""Two evaluations side by side: which figures differ by more than their items vary.

    folder A, folder B -> figures of the same name, way and group -> difference with interval

Where both have the same items with the same weights the difference is taken item by item, which is much sharper. Else
both are drawn anew each for itself; so a bank can be compared with one that was measured on other questions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flows.evaluating.folders import StoredSuite
from flows.evaluating.measurements import CONFIDENCE, MIN_ITEMS, Interval, Measurement, subtract

ROUNDING = 1e-6
"""Differences up to this come from sums in another order, in every item alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedFigure:
    """A figure of both evaluations.

    Attributes:
        suite: its suite.
        name: what was measured.
        way: of what.
        group: in which part of the items.
        first: its value in the first evaluation.
        second: its value in the second.
        difference: second minus first, with its interval.
        is_paired: whether both were measured on the same items.
        verdict: ``better``, ``worse``, ``changed`` where neither way is better, or ``same`` where the interval
            holds 0, nothing but rounding differs, or there are fewer than five items.
    """

    suite: str
    name: str
    way: str
    group: str
    first: float
    second: float
    difference: Interval
    is_paired: bool
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations compared.

    Attributes:
        figures: those that both have.
        changed_data: for each suite what was different: name, then the value in the first and in the second.
        only_first: figures that only the first has, as text.
        only_second: figures that only the second has.
    """

    figures: list[ComparedFigure]
    changed_data: dict[str, dict[str, tuple[Any, Any]]]
    only_first: list[str]
    only_second: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


def compare_evaluations(first: Sequence[StoredSuite], second: Sequence[StoredSuite]) -> Comparison:
    """Compares all figures that two evaluations have in common."""
    found_first = {(suite.report["suite"], *part.label): part for suite in first for part in suite.measurements}
    found_second = {(suite.report["suite"], *part.label): part for suite in second for part in suite.measurements}
    figures = [
        compare_figures(label[0], part, found_second[label])
        for label, part in found_first.items()
        if label in found_second
    ]
    reports = {suite.report["suite"]: suite.report for suite in second}
    changed = {
        suite.report["suite"]: find_changes(suite.report, reports[suite.report["suite"]])
        for suite in first
        if suite.report["suite"] in reports
    }
    return Comparison(
        figures=figures,
        changed_data=changed,
        only_first=[" ".join(filter(None, label)) for label in found_first if label not in found_second],
        only_second=[" ".join(filter(None, label)) for label in found_second if label not in found_first],
    )


def compare_figures(suite: str, first: Measurement, second: Measurement) -> ComparedFigure:
    """Compares one figure, item by item where both have the same items."""
    is_paired = (
        first.keys == second.keys and first.strata == second.strata and np.array_equal(first.weights, second.weights)
    )
    if is_paired:
        difference = subtract(first.name, first.way, second, first).interval
    else:
        drawn = second.draw_values(seed=1) - first.draw_values(seed=0)
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        difference = Interval(
            value=second.value - first.value,
            low=float(low),
            high=float(high),
            num_items=min(len(first.keys), len(second.keys)),
        )
    return ComparedFigure(
        suite=suite,
        name=first.name,
        way=first.way,
        group=first.group,
        first=first.value,
        second=second.value,
        difference=difference,
        is_paired=is_paired,
        verdict=judge(difference, first.better),
    )


def judge(difference: Interval, better: str) -> str:
    """Returns what a difference means, see :class:`ComparedFigure`."""
    if difference.num_items < MIN_ITEMS:
        return "same"
    if difference.low <= 0 <= difference.high or abs(difference.value) <= ROUNDING:
        return "same"
    if not better:
        return "changed"
    return "better" if (difference.value > 0) == (better == "higher") else "worse"


def find_changes(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns which data and settings of a suite differ: by name the value in the first and in the second."""
    changes = {}
    for part in ("data", "settings"):
        for name in dict.fromkeys((*first[part], *second[part])):
            values = first[part].get(name), second[part].get(name)
            if values[0] != values[1]:
                changes[name] = values
    return changes
