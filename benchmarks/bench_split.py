"""What a bank on a server costs: the same prompts with the bank at hand, and over HTTP, in turns.

Starts ``memory3 serve-bank`` for a bank on a free port of this machine. All ways of reading get the same prompts, in
turns, and begin each with an empty cache; what they generate is compared, and has to be equal.

    python -m benchmarks.bench_split --bank my-bank [--prompts 20] [--max-tokens 130]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics

from flows.console import print_rows
from flows.generation import open_generator, open_writer
from flows.remote.client import BankConnection, RemoteBank, RemoteRetriever
from flows.searching import open_retriever
from model.embedding import load_embedder
from model.fetching import BankMemories, FetchedMemories
from model.generating import GenerationConfig, Generator
from schemas.bank import Bank

MODEL = "memory3-tiny"


class CountingConnection(BankConnection):
    """Counts requests and bytes."""

    num_requests = num_sent = num_received = 0

    def ask(self, method: str, path: str, *, body: bytes | None = None, **settings: object) -> bytes:
        """See :meth:`flows.remote.client.BankConnection.ask`."""
        answer = super().ask(method, path, body=body, **settings)  # type: ignore[arg-type]
        self.num_requests += 1
        self.num_sent += len(body or b"")
        self.num_received += len(answer)
        return answer


def start_server(bank: str) -> tuple[subprocess.Popen[str], str]:
    """Starts a bank server; returns its process and its address."""
    command = [sys.executable, "-m", "flows.cli", "serve-bank", "--bank", bank, "--port", "0"]
    variables = {**os.environ, "MEMORY3_API_KEY": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    announcement = process.stdout.readline()
    found = re.search(r"http://[0-9.]+:[0-9]+", announcement)
    if not found:
        raise SystemExit("the server did not start")
    return process, found[0]


def time_all(
    ways: dict[str, Callable[[], Generator]], prompts: Sequence[str], num_tokens: int
) -> dict[str, list[float]]:
    """Returns the milliseconds a generated token that each way took, prompt by prompt.

    Raises:
        AssertionError: two ways differ in what they generate, not counting the one without memory.
    """
    config = GenerationConfig(max_new_tokens=num_tokens, stop_at_end=False)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in prompts:
        answers = {}
        for name, make in ways.items():
            generator = make()
            started = time.perf_counter()
            answers[name] = generator.generate_batch([prompt], config)
            found[name].append(1e3 * (time.perf_counter() - started) / num_tokens)
        assert answers["bank on a server"] == answers["bank at hand"]
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=130)
    given = parser.parse_args()
    process, url = start_server(given.bank)
    try:
        bank = Bank.open(given.bank)
        writer, retriever = open_writer(bank, MODEL), open_retriever(bank)
        connection = CountingConnection(url)
        remote = RemoteBank(connection)
        far = RemoteRetriever(remote, load_embedder(remote.description.embedder))
        plain = open_generator(MODEL, None, knowledge="none")
        ways = {
            "no memory": lambda: plain,
            "bank at hand": lambda: Generator(writer.checkpoint, retriever, BankMemories(bank, writer)),
            "bank on a server": lambda: Generator(writer.checkpoint, far, FetchedMemories(remote, writer)),
        }
        texts = [text[:400] for _, text in sorted(topics.items())]
        time_all(ways, texts[:1], given.max_tokens)
        before = connection.num_requests, connection.num_sent, connection.num_received
        seconds = time_all(ways, texts[1 : 1 + given.prompts], given.max_tokens)
    finally:
        process.terminate()
        process.wait()
    near = statistics.median(seconds["bank at hand"])
    rows = [
        [name, f"{statistics.median(taken):.2f}", f"{statistics.median(taken) / near:.2f}"]
        for name, taken in seconds.items()
    ]
    print_rows(["", "ms a token (median)", "beside the bank at hand"], rows, numeric={1, 2})
    counts = (connection.num_requests, connection.num_sent, connection.num_received)
    asked, sent, received = ((after - start) / given.prompts for after, start in zip(counts, before, strict=True))
    print(
        f"each prompt of 400 letters and {given.max_tokens} tokens: {asked:.1f} requests, {sent:,.0f} bytes sent, "
        f"{received:,.0f} received; a memory has {remote.layout.stride_bytes:,} bytes"
    )


if __name__ == "__main__":
    main()
