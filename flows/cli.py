"""The command line. Every command imports what it needs when it runs, so that help and SQL answer at once."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import (
    bench_commands,
    codec_commands,
    deploy_commands,
    generate_command,
    maintenance,
    report_command,
    train_commands,
)
from flows.evaluating import command as eval_command
from flows.exploring import command as explore_command
from flows.options import (
    BankOption,
    JsonOption,
    RunnerOption,
    RunnerOptionsOption,
    VersionOption,
    WorkersOption,
    open_bank,
    print_result,
    show_work,
    stop_at_once,
    stop_gently,
)
from flows.remote import command as serve_bank_command
from flows.serving import command as serve_command
from schemas.errors import BankError, InputError

app = typer.Typer(
    name="memory3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Explicit memory for language models: build banks of memories from text, inspect them, and read them.\n\n"
    "Example: memory3 build --corpus docs/ --bank my-bank && memory3 search --bank my-bank 'how to install'",
)

app.add_typer(maintenance.app)
app.add_typer(generate_command.app)
app.add_typer(report_command.app)
app.add_typer(serve_command.app)
app.add_typer(serve_bank_command.app)
app.add_typer(explore_command.app)
app.add_typer(codec_commands.app, name="codec")
app.add_typer(bench_commands.app, name="bench")
app.add_typer(eval_command.app, name="eval")
app.add_typer(deploy_commands.app, name="deploy")
app.add_typer(train_commands.app, name="train")


@app.command()
def build(
    corpus: Annotated[
        list[str],
        typer.Option("--corpus", help="File, folder, glob or s3:// prefix; may be given again.", metavar="PATH"),
    ],
    bank: BankOption,
    preset: Annotated[str, typer.Option(help="Settings to start from: tiny or paper.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="YAML or TOML file with settings on top of the preset.")] = None,
    runner: RunnerOption = None,
    runner_options: RunnerOptionsOption = None,
    workers: WorkersOption = None,
    codec: Annotated[
        str | None, typer.Option(help="How vectors are stored; int8 if not given. See: memory3 codec list.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="memory3-tiny, or the folder of a transformers model.")] = None,
    embedder: Annotated[str | None, typer.Option(help="static, minilm, or a sentence-transformers model.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column or key that holds the text.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column or key that holds the document's id.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Column or key that says where it is from.")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column or key of a title to put before references.")] = None,
    filters: Annotated[str | None, typer.Option(help="Rules that drop documents: none, technical or paper.")] = None,
    deduplicate_documents: Annotated[
        bool, typer.Option("--deduplicate-documents", help="Drop near-duplicate documents before references are cut.")
    ] = False,
    keep: Annotated[str | None, typer.Option(help="Which of near-duplicates stays: longest or first.")] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(help="Test texts no reference may give away; may be given again.", metavar="PATH"),
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Encode memories when they are first retrieved.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a bank, or its next version, from a corpus.

    Reads .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt, .md and .rst files, folders and globs of them, and s3://
    prefixes (credentials and endpoint from the usual AWS_ variables). Started again after a stop, it goes on where it
    was.

    Example: memory3 build --corpus docs/ --corpus 'faq/*.jsonl.zst' --bank my-bank --filters technical
    """
    columns = {
        "text_column": text_column,
        "id_column": id_column,
        "source_column": source_column,
        "title_column": title_column,
    }
    changes: dict[str, Any] = {
        "reading": columns,
        "document_deduplication": {"enabled": deduplicate_documents or None, "keep": keep},
        "chunking": {"title_prefix": bool(title_column) or None},
        "decontamination": {"paths": decontaminate},
        "deduplication": {"keep": keep},
        "embedding": {"embedder": embedder},
        "memory": {"codec": codec, "model": model, "cold": cold or None},
        "engine": {"runner": runner, "num_workers": workers, "options": runner_options},
    }
    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in changes.items()
    }
    from flows.config import load_config

    settings = load_config(preset, config, given, filters)
    with show_work(with_engine=True):
        from flows.build import build_bank

        summary = build_bank(corpus, bank, settings.to_json())
    print_result(summary, bank, as_json=as_json)


@app.command()
def sql(
    bank: BankOption,
    query: Annotated[str | None, typer.Argument(help="One SELECT; without it, a prompt.", metavar="SELECT")] = None,
    at: VersionOption = None,
    style: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    as_json: JsonOption = False,
) -> None:
    """Query a bank with SQL.

    Views: documents references all_references occurrences duplicates document_duplicates contaminated tombstones
    rejects memories embeddings signatures document_signatures versions files. Which documents share a near-duplicate,
    and how near:

    select a.doc_id, b.doc_id, jaccard from duplicates d join occurrences a using (ref_id)
    join occurrences b on b.ref_id = d.kept_ref_id

    Example: memory3 sql --bank my-bank "select source, count(*) from documents group by all"
    """
    from pipelines.inspecting import open_views, run_query

    connection = open_views(open_bank(bank, at))
    wanted = "json" if as_json else style
    if query is not None:
        _print_table(run_query(connection, query), wanted)
        return
    while True:
        try:
            line = input("memory3> ")
        except EOFError:
            return
        if line.strip() in ("exit", "quit"):
            return
        if line.strip():
            try:
                _print_table(run_query(connection, line), wanted)
            except BankError as error:
                sys.stderr.write(f"error: {error}\n")


def _print_table(table: Any, style: str) -> None:
    if style == "table":
        from flows.console import print_arrow

        print_arrow(table)
    else:
        from pipelines.rendering import format_table

        sys.stdout.flush()
        sys.stdout.buffer.write(format_table(table, style))
        sys.stdout.buffer.flush()


@app.command()
def show(
    bank: BankOption,
    ref_id: Annotated[str, typer.Argument(help="Id of a reference, or its first digits.", metavar="REF_ID")],
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a reference: its text with the words its memory kept marked, its sources, its duplicates.

    Example: memory3 show --bank my-bank 3f2a9c
    """
    from flows.showing import describe_reference

    shown = describe_reference(open_bank(bank, at), ref_id)
    if as_json:
        from flows.console import print_json

        print_json(dataclasses.asdict(shown))
    else:
        from flows.console import print_reference

        print_reference(shown)


@app.command()
def search(
    bank: BankOption,
    query: Annotated[str, typer.Argument(help="What to look for.", metavar="QUERY")],
    num_hits: Annotated[int, typer.Option("-k", help="References to return.")] = 5,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the live references of a bank by meaning.

    Example: memory3 search --bank my-bank "context manager protocol" -k 3
    """
    from flows.searching import search_bank

    found = search_bank(open_bank(bank, at), query, num_hits)
    if as_json:
        from flows.console import print_json

        print_json([dataclasses.asdict(hit) for hit in found])
    else:
        from flows.console import print_hits

        print_hits(found)


@app.command()
def verify(
    bank: BankOption,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte, compare all tables, encode a sample again.")
    ] = False,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bank: sizes and headers of its files; with --deep also hashes, tables, index, and memories encoded again.

    Example: memory3 verify --bank my-bank --deep
    """
    from schemas.errors import BankFormatError

    opened = open_bank(bank, at)
    with show_work():
        from flows.verifying import verify_bank

        checks = verify_bank(opened, deep=deep)
    if as_json:
        from flows.console import print_json

        print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            print(f"{'ok' if check.passed else 'FAILED':<7}{check.name:<15}{check.detail}")
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise BankFormatError(f"{bank} version {opened.manifest.version} is damaged: {', '.join(failed)}; see above")
    if not as_json:
        print(f"{bank} version {opened.manifest.version} is sound")


@app.command()
def plan(
    paper: Annotated[bool, typer.Option("--paper", help="The figures of the paper's 2.4B model.")] = False,
    model: Annotated[
        str, typer.Option(help="memory3-tiny, tiny, mini, 0.9b, 2.4b, or the folder of a transformers model.")
    ] = "memory3-tiny",
    references: Annotated[int | None, typer.Option(help="Number of references in the bank.")] = None,
    codec: Annotated[str | None, typer.Option(help="Codec of the bank; the paper's size if not given.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the model on this machine too.")] = False,
    device: Annotated[str, typer.Option(help="Where to measure.")] = "cpu",
    compute_dtype: Annotated[str, typer.Option(help="Type to measure in.")] = "float32",
    training: Annotated[bool, typer.Option("--training", help="What training the model costs instead.")] = False,
    tokens: Annotated[int | None, typer.Option(help="Tokens of warmup; 20 a parameter if not given.")] = None,
    continual_tokens: Annotated[
        int | None, typer.Option(help="Tokens of continual training; a tenth of warmup if not given.")
    ] = None,
    gpu_tflops: Annotated[float, typer.Option(help="TFLOPs a second that a GPU has.")] = 990.0,
    utilisation: Annotated[float, typer.Option(help="Share of them that training gets.")] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Compute what memory costs: FLOPs to write and read, break-even uses, storage; with --measure also seconds.

    With --training: FLOPs and GPU hours of warmup and continual training, and what they store.

    Example: memory3 plan --model my-model --references 500000 --codec int8 --measure
    """
    from flows.console import print_plan
    from flows.planning import make_plan, measure_plan, plan_training

    if measure and (paper or training):
        raise InputError("--measure is for a model at hand; leave out --paper and --training, or give --model alone")
    if training:
        rows = plan_training(
            model,
            references,
            paper=paper,
            codec=codec,
            warmup_tokens=tokens,
            continual_tokens=continual_tokens,
            gpu_tflops=gpu_tflops,
            utilisation=utilisation,
        )
    else:
        rows = make_plan(model, references, paper=paper, codec=codec)
    if measure:
        with show_work():
            rows += measure_plan(model, device, compute_dtype, codec)
    if as_json:
        from flows.console import print_json

        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_plan(rows)


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where to put the bank; a cache folder if not given.")
    ] = None,
) -> None:
    """Build a bank of the Python documentation on this machine, search it, and generate with it.

    Example: memory3 demo
    """
    from flows.demo import run_demo

    stop_gently()
    run_demo(folder, built=stop_at_once)


def _run(command: Callable[[], Any]) -> int:
    try:
        command()
    except BankError as error:
        message = " ".join(str(error).split())
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": message}) + "\n")
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 0


def main() -> None:
    """Runs the command line; a known error is one line and exit code 1."""
    sys.exit(_run(app))


if __name__ == "__main__":
    main()
