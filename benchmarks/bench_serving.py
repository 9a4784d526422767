"""What many clients get from ``memory3 serve``: waiting times, requests a second, errors, and the memory it takes.

Starts a server of its own for a bank on a free port of this machine, and clients that ask without a pause, every other
one as a stream, through the openai client.

    python -m benchmarks.bench_serving --bank my-bank [--clients 32] [--minutes 3] [--max-tokens 32]
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from openai import APIError, OpenAI
from rich.console import Console

PROMPTS = [text[:200] for name, text in sorted(topics.items())[:40]]


class Measurements:
    """What all clients have seen; safe to use from several threads."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._lock = threading.Lock()
        self.first_token_seconds: list[float] = []
        self.answer_seconds: list[float] = []
        self.num_tokens = 0
        self.errors: list[str] = []

    def add(self, first_token: float | None, whole: float, num_tokens: int) -> None:
        """Notes an answer; the time to its first token is known for a stream only."""
        with self._lock:
            if first_token is not None:
                self.first_token_seconds.append(first_token)
            self.answer_seconds.append(whole)
            self.num_tokens += num_tokens

    def add_error(self, error: str) -> None:
        """Notes an error."""
        with self._lock:
            self.errors.append(error)


def ask(client: OpenAI, number: int, max_tokens: int, found: Measurements) -> None:
    """Asks once, every other time for a stream."""
    settings: dict[str, Any] = {
        "model": "memory3-tiny",
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": max_tokens,
        "seed": number,
    }
    started, first = time.monotonic(), None
    if number % 2:
        usage = None
        for event in client.completions.create(stream=True, stream_options={"include_usage": True}, **settings):
            first = first or time.monotonic() - started
            usage = event.usage or usage
    else:
        usage = client.completions.create(**settings).usage
    found.add(first, time.monotonic() - started, usage.completion_tokens if usage else 0)


def ask_until(
    client: OpenAI, numbers: "itertools.count[int]", max_tokens: int, end: float, found: Measurements
) -> None:
    """Asks without a pause until a time."""
    while time.monotonic() < end:
        try:
            ask(client, next(numbers), max_tokens, found)
        except APIError as error:
            found.add_error(f"{type(error).__name__}: {error}")


def read_resident_mb(process: int) -> float:
    """Returns the memory that a process has in RAM."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+([0-9]+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def describe(seconds: list[float]) -> str:
    """Returns the median and the 95th percentile."""
    if len(seconds) < 2:
        return "too few"
    return f"p50 {statistics.median(seconds):.2f} s   p95 {statistics.quantiles(seconds, n=20)[-1]:.2f} s"


def main() -> None:
    """Runs server and clients, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "flows.cli", "serve", "--bank", arguments.bank, "--port", "0"]
    console = Console(width=120, highlight=False)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stdout is not None
        address = re.search(r"http://\S+:[0-9]+", server.stdout.readline())
        if address is None:
            sys.exit("the server did not start")
        found, numbers = Measurements(), itertools.count()
        client = OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0, timeout=600)
        ask(client, next(numbers), arguments.max_tokens, Measurements())
        resident = [read_resident_mb(server.pid)]
        started = time.monotonic()
        end = started + 60 * arguments.minutes
        with ThreadPoolExecutor(arguments.clients) as pool:
            for _ in range(arguments.clients):
                pool.submit(ask_until, client, numbers, arguments.max_tokens, end, found)
            time.sleep(30 * arguments.minutes)
            resident.append(read_resident_mb(server.pid))
        elapsed = time.monotonic() - started
        resident.append(read_resident_mb(server.pid))
        server.terminate()
    num_answers = len(found.answer_seconds)
    console.print(f"{arguments.clients} clients for {elapsed:.0f} s, {arguments.max_tokens} tokens an answer at most")
    console.print(f"first token   {describe(found.first_token_seconds)}")
    console.print(f"whole answer  {describe(found.answer_seconds)}")
    console.print(f"answers       {num_answers:,}, {num_answers / elapsed:.1f} a second")
    console.print(f"tokens        {found.num_tokens / elapsed:.0f} a second")
    console.print(f"errors        {len(found.errors)}  {'; '.join(sorted(set(found.errors))[:3])}".rstrip())
    console.print("resident      " + ", ".join(f"{size:.0f} MB" for size in resident) + " at the start, middle and end")
    console.print(f"exit status   {server.returncode}")
    if found.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
