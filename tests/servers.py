"""Servers as processes of their own, for the tests of ``memory3 serve``."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import httpx
from openai import OpenAI

from flows.building import build, update
from flows.steps import Steps
from schemas.stores import LocalStore
from tests.test_equality import make_config, write_corpus

ROOT = Path(__file__).parents[1]

MODEL = "memory3-tiny"

DOCUMENTS = {name: topics[name] for name in ("assert", "del", "pass", "break", "continue")}

LONG = "The assert statement"
"""A prompt which the shipped model, taking the likeliest tokens, continues without an end."""


def build_bank(folder: Path, documents: dict[str, str] | None = None) -> Path:
    """Builds a cold bank below a folder, of a few topics if nothing else is given."""
    corpus = write_corpus(folder, documents or DOCUMENTS)
    settings = {"memory": {"cold": True}, "reading": {"title_column": "title"}}
    build(LocalStore(folder / "bank"), [str(corpus)], make_config(settings), Steps())
    return folder / "bank"


def update_bank(bank: Path, documents: dict[str, str]) -> None:
    """Makes a bank of :func:`build_bank` equal to other documents, as its next version."""
    corpus = write_corpus(bank.parent, documents)
    update(LocalStore(bank), [str(corpus)], {}, Steps())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that has said that it can be reached.

    Attributes:
        process: its process.
        announcement: what it has said.
        log: what it writes to standard error.
        key: the API key of clients.
    """

    process: subprocess.Popen[str]
    announcement: str
    log: Path
    key: str

    @property
    def url(self) -> str:
        """Where it is."""
        found = re.search(r"http://127\.0\.0\.1:[0-9]+", self.announcement)
        assert found, self.announcement
        return found[0]

    def connect(self, key: str | None = None) -> OpenAI:
        """Returns a client that says what the server says, without trying again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key if key is None else key, max_retries=0, timeout=120)

    def open_client(self) -> httpx.Client:
        """Returns a plain client."""
        return httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    def read_metric(self, name: str) -> float:
        """Returns the value of a metric, with its labels as Prometheus writes them; 0 if it is not there."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


def wait_until(is_so: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits for something that is to happen.

    Raises:
        AssertionError: it has not.
    """
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def run_server(
    bank: Path, log: Path, *options: str, key: str = "", command_name: str = "serve"
) -> Iterator[RunningServer]:
    """Runs ``memory3 serve``, or another command that serves, on a free port until the end of the block."""
    command = [sys.executable, "-m", "flows.cli", command_name, "--bank", str(bank), "--port", "0", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEMORY3_API_KEY": key}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=variables)
    assert process.stdout is not None
    try:
        announcement = process.stdout.readline()
        assert announcement, log.read_text()
        yield RunningServer(process=process, announcement=announcement, log=log, key=key or "none")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
