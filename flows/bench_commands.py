"""The commands ``memory3 bench encode``, ``read``, ``codec`` and ``storage``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.options import JsonOption, VersionOption, open_bank, show_work
from schemas.errors import InputError

if TYPE_CHECKING:
    from flows.benching import BenchReport

app = typer.Typer(no_args_is_help=True, help="Measure what writing, reading and storing memories costs here.")

BankToRead = Annotated[str, typer.Option("--bank", help="Bank to measure with; it is only read.", metavar="URI")]
ModelOption = Annotated[
    str | None, typer.Option(help="memory3-tiny, or a model's folder; by default the one that wrote the bank.")
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds, of which the best counts.")]

STORED_CODECS = ["none", "int8", "turbo4", "turbo3", "PRQ2x7x8", "mapped-lloyd14", "OPQ20x80-Residual2x14-PQ8x10"]
"""What ``memory3 bench storage`` measures for the paper's model unless told otherwise."""


def _print(report: "BenchReport", *, as_json: bool) -> None:
    from flows.console import print_bench, print_json

    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        print_bench(report)


def _get_model(bank_config: dict[str, dict[str, str]], model: str | None) -> str:
    return bank_config["memory"]["model"] if model is None else model


@app.command()
def encode(
    bank: BankToRead,
    model: ModelOption = None,
    references: Annotated[int, typer.Option(min=1, help="References to write.")] = 256,
    rounds: RoundsOption = 3,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write references of a bank again, and compare with the bare forward pass of the same layers.

    Example: memory3 bench encode --bank my-bank
    """
    opened = open_bank(bank, at)
    name = _get_model(opened.manifest.config, model)
    with show_work():
        from flows.bench_encoding import bench_encoding, list_references
        from flows.generation import open_writer

        report = bench_encoding(
            open_writer(opened, name), list_references(opened, references), name=name, num_rounds=rounds
        )
    _print(report, as_json=as_json)


@app.command()
def read(
    bank: BankToRead,
    model: ModelOption = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences generated together; may be given again. 8 if not.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    long_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt whose first token is timed.")] = 512,
    rounds: RoundsOption = 2,
    device: Annotated[
        str | None, typer.Option(help="Where to compute; where the bank was written if not given.")
    ] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Measure 5 references as text too.")] = True,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate with memories, without, and with references as text; worst case: from the drive, nothing cached.

    Example: memory3 bench read --bank my-bank --batch-size 8 --batch-size 32
    """
    opened = open_bank(bank, at)
    with show_work():
        from flows.bench_reading import ReadingBench, bench_reading

        wanted = ReadingBench(
            batch_sizes=tuple(batch_size or [8]),
            num_prompt_tokens=prompt_tokens,
            num_new_tokens=new_tokens,
            num_long_tokens=long_tokens,
            num_rounds=rounds,
            with_text=text,
        )
        report = bench_reading(opened, _get_model(opened.manifest.config, model), wanted, device=device)
    _print(report, as_json=as_json)


@app.command()
def codec(
    bank: BankToRead,
    codec: Annotated[
        list[str] | None, typer.Option(help="Codec's name or file; may be given again.", metavar="NAME|FILE")
    ] = None,
    model: ModelOption = None,
    references: Annotated[int, typer.Option(min=4, max=200, help="References to measure on.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed that set them aside: that of the training.")] = 0,
    rounds: RoundsOption = 3,
    at: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure codecs on memories of a bank: bytes, the error of what is read, speed of coding and decoding.

    Codecs that are trained must be files of memory3 codec train, made with this bank, or another corpus, and this seed:
    then they have not seen what they are measured on.

    Example: memory3 bench codec --bank my-bank --codec int8 --codec turbo4 --codec prq.safetensors
    """
    opened = open_bank(bank, at)
    with show_work():
        from flows.bench_codecs import UNTRAINED, bench_codecs

        name = _get_model(opened.manifest.config, model)
        report = bench_codecs(
            opened, name, codec or list(UNTRAINED), num_references=references, num_rounds=rounds, seed=seed
        )
    _print(report, as_json=as_json)


@app.command()
def storage(
    model: Annotated[
        str | None, typer.Option(help="memory3-tiny, or a model's folder; by default the paper's 2.4B model.")
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Codec's name; may be given again.", metavar="NAME")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the drive to measure; that of temporary files if not given.")
    ] = None,
    reads: Annotated[int, typer.Option(min=5, help="Times that five memories are read.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Read five memories from the drive and decode them, codec by codec, warm and cold.

    Example: memory3 bench storage --codec int8 --codec turbo4 --folder /mnt/fast
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is no folder; make it, or name another")
    with show_work():
        from flows.bench_storage import bench_storage
        from flows.planning import read_shape
        from model.planning import paper_shape

        shape = paper_shape() if model is None else read_shape(model)
        codecs = codec or (STORED_CODECS if model is None else STORED_CODECS[:4])
        title = "the paper's 2.4B model" if model is None else model
        report = bench_storage(shape, codecs, title=title, folder=folder, num_reads=reads)
    _print(report, as_json=as_json)
