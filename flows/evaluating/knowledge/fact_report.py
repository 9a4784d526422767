"""The tests on facts as people read them: tables, charts, and what they were asked."""

from collections.abc import Callable, Iterable, Sequence

from flows.evaluating.knowledge.auroc import EMPTY
from flows.evaluating.knowledge.fact_figures import (
    ALONE,
    CONTRADICTED,
    COUNTER,
    FORGET,
    GIVEN,
    NO_MEMORY,
    REPEATED,
    SEEN,
    UNCHANGED,
    UNSEEN,
    UPDATE,
    name_right_first,
    name_way,
)
from flows.evaluating.knowledge.fact_questions import ChosenFacts
from flows.evaluating.knowledge.fact_tests import MAX_MEMORIES
from flows.evaluating.knowledge.field_values import DATE, NAME, NUMBER, OTHER
from flows.evaluating.measurements import Measurement
from flows.evaluating.suite_reports import Chart, Point, Series, Table, Verdict

Labels = dict[tuple[str, str, str], Measurement]

TESTS = {
    "Update": (
        "old value preferred before",
        "new value preferred after",
        UPDATE,
        "update passed, by token",
        "odds moved to the new value",
        REPEATED,
        ALONE,
        "old value given before",
        "new value given after",
        "old given before, new after",
        "old value still given",
        "unchanged document, same choice",
        "unchanged document, same answer",
        "unchanged document, change of right choices",
    ),
    "Forget": (
        "preferred before",
        "preferred after",
        "preferred if never known",
        FORGET,
        "given before",
        "given after, not without memory",
    ),
    "Counterfactual": (
        COUNTER,
        CONTRADICTED,
        UNCHANGED,
        "bank's answer likeliest of all",
        "bank's answer given",
        "parameters' answer still likeliest",
    ),
    "Unanswerable": (
        GIVEN,
        f"{GIVEN}{EMPTY}",
        "AUROC of the confidence in the best candidate",
    ),
}

READING = (
    "choice",
    "choice by token",
    "exact",
    "right reference read",
    "choice where it was read",
    "attention to the right reference",
)

KINDS = (NUMBER, DATE, NAME, OTHER)


def tabulate_facts(measurements: Iterable[Measurement], chosen: ChosenFacts, numbers: Sequence[int]) -> list[Table]:
    """Returns the tables: each test, reading with more and more memories, and by kind of value."""
    found = _label(measurements)
    ways = [name_way(number) for number in numbers]
    tables = [
        _tabulate(
            f"{title}, {len(chosen.asked):,} facts", "outcome", names, ways, found, lambda name, way: (name, way, "")
        )
        for title, names in TESTS.items()
    ]
    right = [name_right_first(number) for number in range(1, MAX_MEMORIES + 1)]
    every = list(dict.fromkeys([*(name_way(number) for number in range(1, MAX_MEMORIES + 1)), *ways]))
    tables.append(
        _tabulate(
            f"Distractors: the same {len(chosen.asked):,} facts with more memories",
            "reads",
            [NO_MEMORY, *every, *right],
            READING,
            found,
            lambda way, name: (name, way, ""),
        )
    )
    groups = [group for group in (*KINDS, UNSEEN, SEEN) if any(label[2] == group for label in found)]
    for way in ways:
        names = ("choice", "exact", UPDATE, FORGET, COUNTER)
        tables.append(
            _tabulate(
                f"By kind of value, {way}",
                "facts",
                groups,
                names,
                found,
                lambda group, name, way=way: (name, way, group),  # type: ignore[misc]
                with_items=True,
            )
        )
    return tables


def chart_facts(measurements: Iterable[Measurement]) -> list[Chart]:
    """Returns the chart of choices by the number of memories."""
    found = _label(measurements)
    series = []
    for name in ("choice", "exact"):
        for what, name_of in (("retrieved", name_way), ("right one first", name_right_first)):
            points = [
                Point(x=number, interval=found[name, name_of(number), ""].interval)
                for number in range(1, MAX_MEMORIES + 1)
                if (name, name_of(number), "") in found
            ]
            series.append(Series(label=f"{name}, {what}", points=points))
    return [
        Chart(
            name="knowledge-distractors",
            title="Right answers by the number of memories",
            x_label="memories",
            y_label="share of facts",
            series=series,
        )
    ]


def decide_facts(measurements: Iterable[Measurement], numbers: Sequence[int]) -> list[Verdict]:
    """Returns the answers to what the tests were asked, for each number of memories.

    Most facts means that the lower end of the interval is above one half. A deletion has to hold for all of them.
    """
    found = _label(measurements)
    verdicts = []
    for number in numbers:
        way = name_way(number)
        for question, name in (
            ("an updated fact changes the answer", UPDATE),
            ("a deleted fact is gone", FORGET),
            ("the bank wins over the parameters", COUNTER),
        ):
            measured = found[name, way, ""]
            interval = measured.interval
            count = f"{measured.totals.sum():.0f} of {interval.num_items} facts, {interval.format_share()}"
            holds = interval.value == 1 if name == FORGET else interval.low > 0.5
            verdicts.append(Verdict(question=f"{question}, {way}?", holds=holds, evidence=count))
    return verdicts


def _label(measurements: Iterable[Measurement]) -> Labels:
    return {measured.label: measured for measured in measurements}


def _tabulate(
    title: str,
    heading: str,
    rows: Sequence[str],
    columns: Sequence[str],
    found: Labels,
    find: Callable[[str, str], tuple[str, str, str]],
    *,
    with_items: bool = False,
) -> Table:
    """Returns the measurements at each row and column; a cell is empty where nothing was measured, a row left out."""
    cells = []
    for row in rows:
        measured = [found.get(find(row, column)) for column in columns]
        shown = ["" if one is None else one.interval.format_share() for one in measured]
        if any(shown):
            number = next(len(one.keys) for one in measured if one is not None)
            cells.append([row, *([number] if with_items else []), *shown])
    titles = [heading, *(["number"] if with_items else []), *columns]
    return Table(title=title, columns=titles, rows=cells, numeric=frozenset(range(1, len(titles))))
