"""The command ``memory3 eval knowledge``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.evaluating.printing import check_out
from flows.options import JsonOption, VersionOption, show_work, stop_at_once
from schemas.errors import InputError


def evaluate_knowledge(
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Documents with headers or tables of fields to ask about; may be given again.", metavar="PATH"
        ),
    ] = None,
    seen: Annotated[
        list[str] | None,
        typer.Option(help="More of them, which the model was trained on, where --corpus has too few.", metavar="PATH"),
    ] = None,
    squad: Annotated[
        list[Path] | None, typer.Option(help="Questions in SQuAD's format, version 1 or 2.", metavar="FILE.json")
    ] = None,
    halueval: Annotated[
        list[Path] | None,
        typer.Option(help="Questions in the format of HaluEval's qa_data.json.", metavar="FILE.json"),
    ] = None,
    truthfulqa: Annotated[
        list[Path] | None,
        typer.Option(help="Questions in TruthfulQA's format, CSV or mc_task.json.", metavar="FILE"),
    ] = None,
    bank: Annotated[
        str | None, typer.Option("--bank", help="Bank to read for TruthfulQA; without it nothing.", metavar="URI")
    ] = None,
    at: VersionOption = None,
    model: Annotated[str, typer.Option(help="memory3-tiny, or a model's folder.")] = "memory3-tiny",
    facts: Annotated[int, typer.Option(help="Facts in each test.")] = 200,
    controls: Annotated[int, typer.Option(help="Facts of documents that are left alone.")] = 100,
    alternatives: Annotated[int, typer.Option(help="Wrong answers of each question.")] = 4,
    memories: Annotated[int, typer.Option(help="Memories to read; one is always measured beside it.")] = 5,
    form: Annotated[
        str, typer.Option(help="What a question holds: entry (all that stands before the answer), or subject.")
    ] = "entry",
    chat: Annotated[bool, typer.Option("--chat", help="Ask in words, through the model's chat template.")] = False,
    limit: Annotated[int | None, typer.Option(help="Questions of each file.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="New folder for the banks; by default a temporary one.", metavar="DIR")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; the CPU if not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report with every item and failure.", metavar="DIR")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Edit, delete and contradict what a bank says, and see whether the answers follow.

    Facts are fields of headers and tables in the documents: mail-like headers, front matter, bullets, tables of
    parameters. A bank of them is built, updated and deleted from as any other, and the model is asked each time, with
    one memory and with several. Files of questions bring their own texts, which become a bank.

    Example: memory3 eval knowledge --corpus docs --facts 200
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it, or name another with --out")
    with show_work():
        stop_at_once()  # there is nothing half done that is worth keeping
        check_out(out)
        from flows.evaluating.knowledge.suite import KnowledgeOptions, run_knowledge

        options = KnowledgeOptions(
            corpus=tuple(corpus or ()),
            seen=tuple(seen or ()),
            squad=tuple(squad or ()),
            halueval=tuple(halueval or ()),
            truthfulqa=tuple(truthfulqa or ()),
            bank=bank,
            version=at,
            model=model,
            num_facts=facts,
            num_controls=controls,
            num_alternatives=alternatives,
            num_memories=memories,
            form=form,
            with_chat=chat,
            limit=limit,
            work=work,
            device=device,
        )
        report = run_knowledge(options)
    from flows.evaluating.printing import finish_suite

    finish_suite(report, as_json=as_json, out=out)
