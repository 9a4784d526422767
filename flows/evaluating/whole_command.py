"""The command ``memory3 eval all``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.evaluating.suite_options import CorpusOption, DeviceOption, ModelOption, describe_command, split_names
from flows.options import BankOption, JsonOption, VersionOption, open_bank, show_work, stop_at_once
from schemas.errors import InputError


def evaluate_all(
    bank: BankOption,
    corpus: CorpusOption,
    out: Annotated[
        Path, typer.Option(help="Folder for a page, charts, tables, and every item measured.", metavar="DIR")
    ],
    model: ModelOption = None,
    seen: Annotated[
        list[str] | None,
        typer.Option(help="Documents the model was trained on, for facts where --corpus has too few.", metavar="PATH"),
    ] = None,
    suites: Annotated[
        str, typer.Option(help="Some of: perplexity, knowledge, attribution, retrieval.", metavar="NAME,...")
    ] = "perplexity,knowledge,attribution,retrieval",
    share: Annotated[float, typer.Option(help="Part of the items that each suite measures by itself.")] = 1.0,
    device: DeviceOption = None,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure everything: perplexity, knowledge, attribution and retrieval, to one folder with a page.

    Each suite is written when it is finished, and one that is there already, from the same inputs, is not measured
    again: after Ctrl-C the same command goes on. Compare folders with memory3 eval compare.

    Example: memory3 eval all --bank my-bank --corpus held-out/ --out results --share 0.1
    """
    with show_work():
        stop_at_once()
        from flows.console import print_json
        from flows.evaluating.folders import PAGE_FILE
        from flows.evaluating.whole import WholeOptions, run_suites

        options = WholeOptions(corpus=tuple(corpus), seen=tuple(seen or ()), suites=split_names(suites), share=share)

        def begin(name: str, is_done: bool) -> None:
            sys.stderr.write(f"{name}{': is there already' if is_done else ''}\n")

        failed = run_suites(
            open_bank(bank, at), model, options, out, command=describe_command(), device=device, begin=begin
        )
    if as_json:
        print_json({"page": str(out / PAGE_FILE), "not_measured": failed})
    else:
        print(f"{out / PAGE_FILE}")
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(f"not measured: {reasons}")
