"""The command ``memory3 eval lm``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.options import JsonOption, VersionOption, open_bank, show_work, stop_at_once
from schemas.errors import InputError

if TYPE_CHECKING:
    from flows.evaluating.harness.harness_runs import HarnessReport


def evaluate_tasks(
    tasks: Annotated[
        list[str],
        typer.Option(
            help="Tasks of lm-eval, YAML files, or folders of these, separated by commas; may be given again.",
            metavar="NAME|PATH,...",
        ),
    ],
    bank: Annotated[str | None, typer.Option("--bank", help="Bank to read.", metavar="URI")] = None,
    model: Annotated[
        str | None, typer.Option(help="memory3-tiny, or a model's folder; by default the one that wrote the bank.")
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Measure the ordinary model.")] = False,
    rag: Annotated[bool, typer.Option("--rag", help="Put references into the prompt as text instead.")] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of YAML files whose names are known too.", metavar="DIR")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt; by default as the task says.")] = None,
    limit: Annotated[float | None, typer.Option(help="Documents of each task; below 1 the share of them.")] = None,
    max_overlap: Annotated[
        float | None,
        typer.Option(help="References that overlap a question by more are not read: 2/3 if not given; 1 is off."),
    ] = None,
    memories: Annotated[int, typer.Option(help="Memories a chunk, or references in a prompt.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Sequences that are read together.")] = 16,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens; by default what there is room for.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    no_bos: Annotated[
        bool, typer.Option("--no-bos", help="With --no-memory: begin contexts as lm-eval's hf model does.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the report with every request and answer.", metavar="FILE.json")
    ] = None,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of the lm-evaluation-harness, with five memories for every 64 tokens.

    Nothing is downloaded: tasks are YAML files whose data are local, or those of lm-eval whose data are in the cache.
    References that give a question away are left out of what is read, and counted. Baselines on the same model:
    --no-memory, and --rag. What is compared must have the same --max-length where texts are long.

    Example: memory3 eval lm --tasks questions.yaml --bank my-bank
    """
    if no_memory and rag:
        raise InputError("--no-memory and --rag exclude each other; give one of them")
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"{out.parent} is no folder; make it, or name another with --out")
    from flows.evaluating.harness.offline import go_offline

    go_offline()
    with show_work():
        stop_at_once()  # there is nothing half done that is worth keeping
        from flows.evaluating.evaluated_model import EvaluationOptions
        from flows.evaluating.harness.harness_runs import run_tasks, write_report
        from flows.evaluating.harness.harness_tasks import TaskOptions
        from model.overlap_filter import MAX_OVERLAP

        wanted = TaskOptions(
            tasks=tuple(tasks),
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            with_chat=chat,
            with_samples=out is not None,
        )
        options = EvaluationOptions(
            knowledge="none" if no_memory else "text" if rag else "memory",
            num_memories=memories,
            max_overlap=MAX_OVERLAP if max_overlap is None else max_overlap,
            batch_size=batch_size,
            max_length=max_length,
            with_bos=not no_bos,
        )
        opened = None if bank is None else open_bank(bank, at)
        report = run_tasks(model, opened, options, wanted, device=device)
    if out is not None:
        write_report(out, report)
    _print(report, as_json=as_json)


def _print(report: "HarnessReport", *, as_json: bool) -> None:
    from flows.console import print_harness_report, print_json

    if as_json:
        print_json({**report.to_json(), "samples": {}})
    else:
        print_harness_report(report)
