"""The commands ``memory3 codec train`` and ``memory3 codec list``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flows.options import JsonOption, VersionOption, open_bank, show_work
from schemas.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Codecs: how the vectors of memories are stored in fewer bytes.")


@app.command()
def train(
    name: Annotated[str, typer.Option(help="Codec to train, see: memory3 codec list.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="File to write, ending in .safetensors.", metavar="FILE")],
    bank: Annotated[str | None, typer.Option("--bank", help="Bank to take references from.", metavar="URI")] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Or a corpus, as for build; may be given again.", metavar="PATH")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that writes; by default that of the bank, or memory3-tiny.")
    ] = None,
    references: Annotated[int, typer.Option(help="References to train on.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the training.")] = 0,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a codec on memories of a bank, or of a corpus, and measure it on memories it was not trained on.

    Example: memory3 codec train --name PRQ2x7x8 --bank my-bank --out prq.safetensors
    && memory3 migrate --bank my-bank --codec prq.safetensors
    """
    from flows.codec_training import CodecRequest, train_on_bank, train_on_corpus

    wanted = CodecRequest(name=name, out=out, model=model, num_references=references, seed=seed)
    if (bank is None) == (not corpus):
        raise InputError("give the references to train on: either --bank BANK or --corpus PATH")
    with show_work():
        if bank is not None:
            report = train_on_bank(open_bank(bank, at), wanted)
        else:
            report = train_on_corpus(corpus or [], wanted)
    from flows.console import print_codec_report, print_json

    if as_json:
        print_json({"file": str(out), **dataclasses.asdict(report)})
    else:
        print_codec_report(report, str(out))


@app.command("list")
def list_codecs(
    head_dim: Annotated[int, typer.Option(help="Size of a vector, 80 in the paper's model.")] = 80,
    bank: Annotated[
        str | None, typer.Option("--bank", help="Bank whose memories' shape is meant.", metavar="URI")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List codecs with the bytes they take: for the paper's model, for its shape with other vectors, or for a bank.

    Example: memory3 codec list --head-dim 80
    """
    from flows.codec_listing import describe_codecs, make_paper_layout
    from flows.console import print_codecs, print_json

    layout = make_paper_layout(head_dim) if bank is None else open_bank(bank, None).manifest.layout
    codecs = describe_codecs(layout)
    if as_json:
        print_json([dataclasses.asdict(codec) for codec in codecs])
    else:
        print_codecs(codecs, layout)
