"""How the suites of ``memory3 eval`` end: printed for people, as JSON, and written to a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.evaluating.suite_reports import SuiteReport


def print_suite(report: "SuiteReport") -> None:
    """Prints the tables of a suite, what it was asked, and how many failures there are."""
    from flows.console import print_rows

    print(f"{report.title}\n{report.explanation}")
    for table in report.tables:
        print(f"\n{table.title}")
        print_rows(table.columns, table.rows, numeric=table.numeric)
    for verdict in report.verdicts:
        print(f"{'yes' if verdict.holds else 'NO ':3} {verdict.question} {verdict.evidence}")
    if report.failures:
        print(f"{len(report.failures):,} failures; --out or --json lists them")
    print(f"{report.seconds:.0f} seconds")


def check_out(out: Path | None) -> None:
    """Checks before work begins that what is found can be written.

    Raises:
        InputError: the folder holds something else, or its parent is not there.
    """
    if out is not None:
        from flows.evaluating.folders import check_folder

        check_folder(out)


def finish_suite(report: "SuiteReport", *, as_json: bool, out: Path | None) -> None:
    """Prints a report, and writes it if a folder is named.

    Args:
        report: the report.
        as_json: print JSON instead of text.
        out: the folder; see :func:`flows.evaluating.folders.write_evaluation`.
    """
    from flows.console import print_json

    if out is not None:
        from flows.evaluating.folders import write_evaluation

        write_evaluation(out, [report])
    if as_json:
        print_json(report.to_json())
    else:
        print_suite(report)
