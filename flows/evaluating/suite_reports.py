"""What every suite of ``memory3 eval`` returns: figures with their items, tables, charts, and what failed.

suite -> SuiteReport -> printed (:mod:`flows.evaluating.printing`) or written (:mod:`flows.evaluating.folders`)

A suite is one module with its options, a function ``run_NAME`` that returns this, and a command beside it.
"""

import dataclasses
from typing import Any

from flows.evaluating.measurements import Interval, Measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table as people read it.

    Attributes:
        title: what it shows, with the number of items.
        columns: headings.
        rows: cells.
        numeric: places of the columns that stand right.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    numeric: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a chart.

    Attributes:
        x: a number on an axis, or a name.
        interval: the figure with its interval.
    """

    x: float | str
    interval: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together: a line where their places are numbers, bars where they are names."""

    label: str
    points: list[Point]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart.

    Attributes:
        name: of its file, without ending: small letters and hyphens.
        title: what it shows.
        x_label: what stands at the axis below.
        y_label: what stands at the other, with the unit.
        series: all of them with numbers for places, or all with names.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A question that a suite is asked, and its answer by the figures.

    Attributes:
        question: for instance "does memory beat none?".
        holds: the answer.
        evidence: the figures that it follows from.
    """

    question: str
    holds: bool
    evidence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What a suite found, and how.

    Attributes:
        suite: its name, as in ``memory3 eval NAME``.
        title: what it measures, in a few words.
        explanation: how, in a few sentences: what an item is, what was left out.
        command: the command that repeats it.
        data: what it was measured on: model, bank, version, corpora with digests, numbers.
        settings: its options.
        measurements: the figures with their items.
        tables: for people.
        charts: for people.
        verdicts: what it was asked.
        failures: each item that failed, with what was wanted and what came.
        seconds: how long it took, loading aside.
    """

    suite: str
    title: str
    explanation: str
    command: str
    data: dict[str, Any]
    settings: dict[str, Any]
    measurements: list[Measurement]
    tables: list[Table]
    charts: list[Chart]
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values: of each figure the interval, without the items."""
        figures = [
            {
                "name": measurement.name,
                "way": measurement.way,
                "group": measurement.group,
                "unit": measurement.unit,
                "better": measurement.better,
                **dataclasses.asdict(measurement.interval),
            }
            for measurement in self.measurements
        ]
        return {
            "suite": self.suite,
            "title": self.title,
            "explanation": self.explanation,
            "command": self.command,
            "data": self.data,
            "settings": self.settings,
            "figures": figures,
            "tables": [{**dataclasses.asdict(table), "numeric": sorted(table.numeric)} for table in self.tables],
            "charts": [dataclasses.asdict(chart) for chart in self.charts],
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
            "failures": self.failures,
            "seconds": round(self.seconds, 3),
        }
