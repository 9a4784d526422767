"""The command ``memory3 report``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.options import BankOption, JsonOption, open_bank, show_work
from schemas.errors import BankFormatError, InputError

app = typer.Typer()


@app.command()
def report(
    bank: BankOption,
    out: Annotated[Path | None, typer.Option(help="HTML file to write.", metavar="FILE")] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", "--version", help="Version to report on: a number, a tag, or -1 for the one before."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Verify every byte, as verify --deep does.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Model to measure the codec with; that of the bank if it is at hand.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="References that codec and index are measured on; 0 measures neither.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every sample.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a report on a version as one HTML file.

    It has what was read and dropped, lengths, sources, duplicates side by side, bytes, what codec and index cost,
    timings, and the changes to the parent version. The file holds all it shows and sends nothing anywhere. If the
    version is damaged, the report says where, and the command ends with exit code 1.

    Example: memory3 report --bank my-bank --out report.html
    """
    if out is None and not as_json:
        raise InputError("give the file to write with --out report.html, or --json for the figures alone")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"out is {out}, must be a file in a folder that is there")
    opened = open_bank(bank, at)
    with show_work():
        from flows.reporting.making import ReportRequest, make_report

        wanted = ReportRequest(deep=deep, model=model, num_samples=samples, seed=seed)
        made = make_report(opened, wanted)
        if out is not None:
            from flows.reporting.page import write_page

            write_page(made, out)
    from flows.console import print_json, print_report

    if as_json:
        print_json(made.to_json())
    else:
        print_report(made, str(out))
    failed = [check.name for check in made.verification.checks if not check.passed]
    if failed:
        raise BankFormatError(f"{bank} version {made.head.version} is damaged: {', '.join(failed)}; run memory3 verify")
