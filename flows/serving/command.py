"""The command ``memory3 serve``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.options import BankOption

app = typer.Typer()


@app.command()
def serve(
    bank: BankOption,
    model: Annotated[str, typer.Option(help="memory3-tiny, or the folder of a transformers model.")] = "memory3-tiny",
    at: Annotated[
        str | None, typer.Option("--at", help="Version to serve: a number, or a tag, which is followed.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the API key; else MEMORY3_API_KEY.", metavar="FILE")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everybody in who can reach the address.")] = False,
    max_batch: Annotated[int, typer.Option(help="Prompts that are generated at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Prompts that wait, at most; then 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for a request; then 504.")] = 120.0,
    max_request_kb: Annotated[int, typer.Option(help="Size of a request in KiB, at most; then 413.")] = 1024,
    watch_seconds: Annotated[float, typer.Option(help="Seconds between two looks for a new version.")] = 5.0,
    grace_seconds: Annotated[float, typer.Option(help="Seconds for requests under way at the end.")] = 30.0,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute; one for a small model, else PyTorch's choice."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default where the bank was written.")] = None,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memories kept in RAM, in MB; 0 keeps none.")] = 256,
    explore: Annotated[bool, typer.Option("--explore", help="Serve the page of memory3 explore too.")] = False,
) -> None:
    """Serve a model that reads a bank, by OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Beside them /v1/search, /v1/memories/REF_ID, /healthz, /readyz, /metrics and /openapi.json. A new version of the
    bank is served as soon as it is there, without an interruption. Requests under way are finished at Ctrl-C.

    Example: memory3 serve --bank my-bank --port 8000
    """
    from flows.serving.running import run_server
    from flows.serving.settings import ServingConfig, read_api_key

    config = ServingConfig(
        bank=bank,
        model=model,
        at=at,
        host=host,
        port=port,
        api_key=read_api_key(key_file),
        no_key=no_key,
        max_batch=max_batch,
        max_queue=max_queue,
        timeout_seconds=timeout,
        max_request_bytes=max_request_kb << 10,
        watch_seconds=watch_seconds,
        grace_seconds=grace_seconds,
        num_threads=threads,
        device=device,
        cache_bytes=cache_mb << 20,
        explore=explore,
    )
    run_server(config)
