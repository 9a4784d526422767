"""What several commands of the command line have in common: their options, and how a long one runs."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from schemas.bank import Bank

BankOption = Annotated[str, typer.Option("--bank", help="Folder or s3:// URL of the bank.", metavar="URI")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
VersionOption = Annotated[
    str | None, typer.Option("--at", help="Version to read: a number, a tag, or -1 for the one before the newest.")
]
RunnerOption = Annotated[
    str | None, typer.Option(help="Beam runner that does the work: FnApiRunner if not given, dask, portable, ...")
]
RunnerOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--runner-option", help="Of that runner, as job_endpoint=host:8099; may be given again.", metavar="NAME=VALUE"
    ),
]
WorkersOption = Annotated[int | None, typer.Option(help="Threads of the embedded runner; one a core if not given.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")]


def stop_at_once() -> None:
    """Takes :func:`stop_gently` back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_gently() -> None:
    """Makes the first Ctrl-C end the work after the units at hand, and a second one end it at once."""
    from pipelines.running import clear_stop, request_stop

    clear_stop()

    def handle(_number: int, _frame: FrameType | None) -> None:
        request_stop()
        sys.stderr.write("\nstopping after the work at hand; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)


@contextmanager
def show_work(*, with_engine: bool = False) -> Iterator[None]:
    """Shows the progress of what runs within, which Ctrl-C ends in order.

    Args:
        with_engine: whether Prefect's engine is started first.
    """
    from flows.progress import choose_display, set_display, show_stage

    display = choose_display()
    set_display(display)
    stop_gently()
    try:
        if with_engine:
            with show_stage("engine"):
                from flows.engine import start_engine

                start_engine()
        yield
    finally:
        display.close()


def open_bank(place: str, at: str | None) -> "Bank":
    """Opens the version of a bank that ``--at`` names, the newest if it is not given.

    Raises:
        BankError: there is none.
    """
    from schemas.bank import Bank
    from schemas.stores import open_store
    from schemas.tags import find_version

    store = open_store(place)
    return Bank.open(store, find_version(store, at))


def print_result(summary: dict[str, Any], bank: str, *, as_json: bool) -> None:
    """Prints what an operation that makes a version returns."""
    from flows.console import print_changes, print_json, print_summary

    if as_json:
        print_json(summary)
    elif summary.get("dry_run"):
        print_changes(summary["changes"], f"{bank} version {summary['version']} would change:")
    else:
        print_summary(summary, bank)
