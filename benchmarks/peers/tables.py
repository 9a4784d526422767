"""The results as tables: one a step, with a mark for every target."""

import dataclasses
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a result table.

    Attributes:
        table: the step it belongs to.
        cells: what it shows.
        is_met: whether its target is met, None if it has none.
    """

    table: str
    cells: tuple[str, ...]
    is_met: bool | None = None


SPEED_COLUMNS = ("tool", "input", "CPU seconds", "MB per CPU second", "peak MB", "ratio", "target")
COLUMNS = {
    "documents": ("Near-duplicate removal of documents; ratio: how many times as fast memory3 is", SPEED_COLUMNS),
    "references": ("Near-duplicate removal of references; ratio: how many times as fast memory3 is", SPEED_COLUMNS),
    "chunking": ("Chunking to spans; ratio: how many times as fast memory3 is", SPEED_COLUMNS),
    "beam": ("Corpus to references through Beam", ("", "plain loop", "FnApiRunner", "ratio", "at most")),
    "quality": ("Removed documents against all pairs", ("input", "tool", "removed", "precision", "recall", "at least")),
    "growth": ("Four times the text", ("step", "input", "of", "from, to", "ratio", "at most")),
}


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Prints a table a step, with a mark for every target."""
    for step, (title, columns) in COLUMNS.items():
        chosen = [row for row in rows if row.table == step]
        if not chosen:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for place, column in enumerate((*columns, "")):
            is_mark = place == len(columns)
            width = 22 if place == 2 else None
            table.add_column(
                column, justify="left" if place < 2 else "right", min_width=width, no_wrap=is_mark, overflow="fold"
            )
        for row in chosen:
            mark = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[row.is_met]
            table.add_row(*row.cells, mark)
        console.print(table)
    if rows:
        console.print(_count_targets(rows))


def _count_targets(rows: Sequence[Row]) -> str:
    targets = [row.is_met for row in rows if row.is_met is not None]
    return f"{sum(targets)} of {len(targets)} targets met" if targets else "the targets are for the whole data"
