"""The command ``memory3 eval retrieval``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.evaluating.printing import check_out
from flows.options import JsonOption, VersionOption, open_bank, show_work, stop_at_once
from schemas.errors import InputError


def evaluate_retrieval(
    bank: Annotated[
        str | None, typer.Option("--bank", help="Bank to ask questions of its own references.", metavar="URI")
    ] = None,
    beir: Annotated[
        Path | None,
        typer.Option(help="Folder with corpus.jsonl, queries.jsonl and qrels/test.tsv instead.", metavar="DIR"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="memory3-tiny, or a model's folder; by default the one that wrote the bank.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="With --beir: static, minilm, or a sentence-transformers model.")
    ] = None,
    references: Annotated[int, typer.Option(help="References that questions are made of, up to two each.")] = 1200,
    fit_references: Annotated[
        int, typer.Option(help="Other references, of whose questions attention heads are chosen.")
    ] = 150,
    heads: Annotated[int, typer.Option(help="Pairs of memory layer and KV head that attention searches.")] = 6,
    queries: Annotated[int | None, typer.Option(help="With --beir: queries, the first ones; all if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of references.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and its charts.", metavar="DIR")] = None,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what is found: by the embedder, by BM25, by the model's own attention, and by all together.

    Recall and reciprocal rank on questions made from a bank, or on a folder in the format of BEIR. Memories that a cold
    bank has not got yet are written, since attention searches their keys.

    Example: memory3 eval retrieval --bank my-bank --references 200
    """
    if (bank is None) == (beir is None):
        raise InputError("give either the bank with --bank, or a folder in the format of BEIR with --beir")
    if embedder is not None and beir is None:
        raise InputError("--embedder goes with --beir; a bank is searched with the embedder that it was built with")
    with show_work():
        stop_at_once()  # there is nothing half done that is worth keeping
        check_out(out)
        from flows.evaluating.retrieval.suite import RetrievalOptions, run_beir, run_retrieval

        options = RetrievalOptions(
            num_references=references, num_fit=fit_references, num_heads=heads, num_queries=queries, seed=seed
        )
        if beir is not None:
            report = run_beir(beir, options, model=model, embedder=embedder or "static", device=device)
        else:
            report = run_retrieval(open_bank(str(bank), at), options, model=model, device=device)
    from flows.evaluating.printing import finish_suite

    finish_suite(report, as_json=as_json, out=out)
