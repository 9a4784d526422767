"""The command ``memory3 eval compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.options import JsonOption

if TYPE_CHECKING:
    from flows.evaluating.comparison import Comparison

MARKS = {"better": "+ better", "worse": "- worse", "changed": "  changed", "same": ""}


def compare_two(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation: --out of an eval command.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another.", metavar="B")],
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Leave out figures whose difference is within its interval.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations figure by figure, item by item where both measured the same ones.

    Versions of a bank, models and codecs are compared so: give each evaluation a folder, and compare the two.

    Example: memory3 eval compare results-1/ results-2/ --only-changed
    """
    from flows.console import print_json
    from flows.evaluating.comparison import compare_evaluations
    from flows.evaluating.folders import read_evaluation

    found = compare_evaluations(read_evaluation(first), read_evaluation(second))
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, only_changed=only_changed)


def _print(found: "Comparison", *, only_changed: bool) -> None:
    from flows.console import print_rows
    from flows.evaluating.measurements import CONFIDENCE
    from flows.evaluating.page import format_value

    for suite, changes in found.changed_data.items():
        for name, (before, after) in changes.items():
            print(f"{suite}: {name.replace('_', ' ')} was {format_value(before)}, is {format_value(after)}")
    rows = [
        [
            figure.suite,
            figure.name,
            figure.way,
            figure.group,
            f"{figure.first:.4f}",
            f"{figure.second:.4f}",
            figure.difference.format(signed=True),
            "" if figure.is_paired else "other items",
            MARKS[figure.verdict],
        ]
        for figure in found.figures
        if not only_changed or figure.verdict != "same"
    ]
    columns = ["suite", "figure", "of", "in", "first", "second", "difference", "", ""]
    print_rows(columns, rows, numeric=frozenset((4, 5, 6)))
    num_same = sum(figure.verdict == "same" for figure in found.figures)
    by_chance = round((1 - CONFIDENCE) * len(found.figures))
    print(
        f"{len(found.figures):,} figures compared, {num_same:,} of them the same within their intervals; were nothing "
        f"different, about {by_chance:,} would seem to be"
    )
    for place, labels in (("first", found.only_first), ("second", found.only_second)):
        if labels:
            print(f"only in the {place}: {len(labels):,} figures")
