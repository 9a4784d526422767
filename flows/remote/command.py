"""The command ``memory3 serve-bank``."""

from pathlib import Path
from typing import Annotated

import typer

from flows.options import BankOption

app = typer.Typer()


@app.command("serve-bank")
def serve_bank(
    bank: BankOption,
    at: Annotated[
        str | None, typer.Option("--at", help="Version for clients that name none: a number, or a tag.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8100,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the API key; else MEMORY3_API_KEY.", metavar="FILE")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everybody in who can reach the address.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Searches and reads at a time.")] = 4,
    max_queue: Annotated[int, typer.Option(help="Requests that wait or are answered, at most; then 429.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds for a request; then 504.")] = 30.0,
    grace_seconds: Annotated[float, typer.Option(help="Seconds for requests under way at the end.")] = 10.0,
) -> None:
    """Serve the memories of a bank to clients that have the model: vectors come in, compressed memories go out.

    A client needs the model, the embedding model and nothing of the bank; it gives the server's address as --bank. It
    reads one version, as long as the bank has it; the next one begins with the newest. No model is loaded here.

    Example: memory3 serve-bank --bank my-bank --port 8100

    There: memory3 generate --bank http://127.0.0.1:8100 --prompt "To reset it,"
    """
    from flows.remote.server import run_bank_server
    from flows.remote.wire import MAX_BODY_BYTES
    from flows.serving.settings import ListeningConfig, read_api_key

    config = ListeningConfig(
        host=host,
        port=port,
        api_key=read_api_key(key_file),
        no_key=no_key,
        max_queue=max_queue,
        timeout_seconds=timeout,
        grace_seconds=grace_seconds,
        max_request_bytes=MAX_BODY_BYTES,
    )
    run_bank_server(bank, at, config, threads)
