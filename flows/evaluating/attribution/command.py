"""The command ``memory3 eval attribution``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.evaluating.printing import check_out
from flows.options import BankOption, JsonOption, VersionOption, open_bank, show_work, stop_at_once


def evaluate_attribution(
    bank: BankOption,
    model: Annotated[
        str | None, typer.Option(help="memory3-tiny, or a model's folder; by default the one that wrote the bank.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Held-out documents, whose passages are continued; may be given again.", metavar="PATH"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='In their place JSON lines of prompts: {"prompt": ...}.', metavar="FILE.jsonl")
    ] = None,
    chunks: Annotated[int, typer.Option(help="Generated chunks of 64 tokens, for each temperature.")] = 500,
    chunks_per_text: Annotated[int, typer.Option(help="Chunks of each text.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt that is cut from a document.")] = 128,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 takes the likeliest token; may be given again. 0 and 0.8 if not given."),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.2,
    memories: Annotated[int, typer.Option(help="Memories a chunk.")] = 5,
    max_overlap: Annotated[
        float, typer.Option(help="References that overlap a prompt by more are not read; 1 is off.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Texts that are read together.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the choice of passages and of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for figures, items and failures.", metavar="DIR")] = None,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check citations: is the memory with the most attention the one that a text is owed to?

    Prompts are continued; each memory of each generated chunk is left out once, and the tokens are read again. The top
    citation is held against a random memory of the same chunk, on generated texts and on the real ones.

    Example: memory3 eval attribution --bank my-bank --corpus held-out/
    """
    with show_work():
        stop_at_once()
        check_out(out)
        from flows.evaluating.attribution.suite import AttributionOptions, run_attribution

        options = AttributionOptions(
            num_chunks=chunks,
            chunks_per_text=chunks_per_text,
            prompt_tokens=prompt_tokens,
            temperatures=tuple(temperature or (0.0, 0.8)),
            repetition_penalty=repetition_penalty,
            num_memories=memories,
            max_overlap=max_overlap,
            batch_size=batch_size,
            seed=seed,
        )
        report = run_attribution(
            model, open_bank(bank, at), options, corpus=corpus or (), prompts=prompts, device=device
        )
    from flows.evaluating.printing import finish_suite

    finish_suite(report, as_json=as_json, out=out)
