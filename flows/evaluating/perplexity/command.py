"""The command ``memory3 eval perplexity``."""

from typing import Annotated

import typer

from flows.evaluating.printing import check_out
from flows.evaluating.suite_options import (
    CorpusOption,
    DeviceOption,
    DocumentsOption,
    MaxOverlapOption,
    ModelOption,
    OutOption,
    PassagesOption,
    parse_numbers,
    split_names,
)
from flows.options import BankOption, JsonOption, VersionOption, open_bank, show_work, stop_at_once


def evaluate_perplexity(
    bank: BankOption,
    corpus: CorpusOption,
    model: ModelOption = None,
    documents: DocumentsOption = 40,
    passages: PassagesOption = 2,
    references: Annotated[
        str,
        typer.Option(help="References a chunk: the first compares all ways, the others are swept.", metavar="N,..."),
    ] = "5,1,2,3,7",
    ways: Annotated[
        str | None,
        typer.Option(
            help="Some of: plain, random, retrieved, compressed, all tokens, in context, text.", metavar="WAY,..."
        ),
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(help="What compresses memories: the bank's, turbo4 and turbo3 if not given.", metavar="NAME,..."),
    ] = None,
    max_overlap: MaxOverlapOption = None,
    max_prompt: Annotated[
        int | None,
        typer.Option(help="Longest prompt with references as text, in tokens; else what memories take."),
    ] = None,
    own_document: Annotated[
        bool,
        typer.Option("--own-document", help="Read references of the document that is scored too, if the bank has it."),
    ] = False,
    shared_run: Annotated[
        int, typer.Option(help="References that share so many tokens in a row with a passage are not read; 0 is off.")
    ] = 13,
    device: DeviceOption = None,
    at: VersionOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the loss of held-out text with no memory, random, retrieved, compressed and whole memories, and text.

    Every way scores the same tokens; what is scored does not choose what is read, and references that give a passage
    away are left out. Gains have 95% intervals over documents.

    Example: memory3 eval perplexity --bank my-bank --corpus docs/ --documents 8 --references 2
    """
    with show_work():
        stop_at_once()
        check_out(out)
        from flows.evaluating.perplexity.suite import PerplexityOptions, run_perplexity
        from flows.evaluating.perplexity.ways import WAYS, WayOptions
        from flows.evaluating.printing import finish_suite
        from model.overlap_filter import MAX_OVERLAP

        options = PerplexityOptions(
            corpus=tuple(corpus),
            num_documents=documents,
            num_passages=passages,
            ways=WayOptions(
                num_references=parse_numbers("--references", references),
                ways=WAYS if ways is None else split_names(ways),
                codecs=None if codecs is None else split_names(codecs),
                max_overlap=MAX_OVERLAP if max_overlap is None else max_overlap,
                max_prompt_tokens=max_prompt,
                own_document=own_document,
                shared_run=shared_run,
            ),
        )
        report = run_perplexity(open_bank(bank, at), model, options, device=device)
        finish_suite(report, as_json=as_json, out=out)
