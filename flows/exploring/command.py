"""The command ``memory3 explore``."""

from typing import Annotated

import typer

from flows.options import BankOption

app = typer.Typer()

LOOKING_SECONDS = 600.0
"""Time for a request: one person waits for it, who can stop it, and not many clients."""


@app.command()
def explore(
    bank: BankOption,
    model: Annotated[str, typer.Option(help="memory3-tiny, or the folder of a transformers model.")] = "memory3-tiny",
    at: Annotated[
        str | None, typer.Option("--at", help="Version to look into: a number, or a tag, which is followed.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of this machine to be at; 0 takes a free one.")] = 8001,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute; one for a small model, else PyTorch's choice."),
    ] = None,
) -> None:
    """Look into a bank in the browser: search, references, versions, and a playground.

    A reference is shown with the tokens that each layer and head of its memory keeps, with its sources and
    near-duplicates; two versions with what came and went; the playground generates with and without memory side by
    side, and shows what each chunk has read. The page loads nothing from elsewhere, and only this machine can reach it;
    memory3 serve --explore has it for others too.

    Example: memory3 explore --bank my-bank
    """
    from flows.serving.running import run_server
    from flows.serving.settings import ServingConfig, read_api_key

    config = ServingConfig(
        bank=bank,
        model=model,
        at=at,
        port=port,
        api_key=read_api_key(None),
        device=device,
        num_threads=threads,
        timeout_seconds=LOOKING_SECONDS,
        explore=True,
    )
    run_server(config, opens_browser=not no_browser)
