"""What the commands of the suites have in common: options, and how a report names the command that made it."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import InputError

CorpusOption = Annotated[
    list[str],
    typer.Option(
        "--corpus",
        help="File or folder of text the model has not seen; may be given again. A file of many documents is a corpus.",
        metavar="PATH",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="memory3-tiny, or a model's folder; by default the one that wrote the bank."),
]
DocumentsOption = Annotated[int, typer.Option(help="Documents of each corpus at most, drawn by a hash of their text.")]
PassagesOption = Annotated[int, typer.Option(help="Passages of 512 tokens of a document at most.")]
MaxOverlapOption = Annotated[
    float | None,
    typer.Option(help="References that overlap a passage by more are not read: 2/3 if not given; 1 is off."),
]
DeviceOption = Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Folder for a page, charts, tables, and every item measured.", metavar="DIR"),
]


def describe_command() -> str:
    """Returns the command line that this program was started with, as one would type it."""
    return shlex.join(["memory3", *sys.argv[1:]])


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Returns the whole numbers of an option, which commas separate.

    Raises:
        InputError: one is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give whole numbers separated by commas") from error


def split_names(text: str) -> tuple[str, ...]:
    """Returns the names of an option, which commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
