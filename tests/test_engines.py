"""Builds on engines of several processes: who worked, and whether one was killed, changes no byte of a bank."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.building import build
from flows.config import BuildConfig, apply_changes
from flows.steps import Steps
from flows.verifying import verify_bank
from pipelines.running import EngineConfig, check_runner
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import open_store
from tests.corpora import make_documents, write_lines
from tests.test_build import hash_files

START_SECONDS = 120


def find_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(stack: ExitStack, *command: str) -> subprocess.Popen[bytes]:
    """Starts a module of Python as a process that is ended with the stack."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def wait_for(port: int) -> None:
    for _ in range(START_SECONDS * 10):
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at port {port}")


def make_bank(folder: Path, corpus: Path, engine: EngineConfig) -> Bank:
    changes = {"engine": {"runner": engine.runner, "options": list(engine.options)}}
    build(open_store(str(folder)), [str(corpus)], apply_changes(BuildConfig(), changes), Steps())
    return Bank.open(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several files, so that there are units for several workers."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = make_documents()
    for part in range(4):
        write_lines(folder / f"part-{part}.jsonl", documents[part::4])
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "bank"
    make_bank(folder, corpus, EngineConfig())
    return hash_files(folder)


@pytest.fixture
def dask() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers, each a process; the scheduler's address and the workers."""
    with ExitStack() as stack:
        port = find_port()
        place = ["--host", "127.0.0.1", "--port", str(port)]
        start(stack, "distributed.cli.dask_scheduler", *place, "--no-dashboard")
        wait_for(port)
        address = f"tcp://127.0.0.1:{port}"
        once = ["--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        yield address, [start(stack, "distributed.cli.dask_worker", address, *once) for _ in range(2)]


@pytest.mark.slow
def test_dask_makes_the_same_bytes(
    dask: tuple[str, list[subprocess.Popen[bytes]]], corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    address, _ = dask
    engine = EngineConfig(runner="dask", options=(f"dask_client_address={address}",))
    make_bank(tmp_path / "bank", corpus, engine)
    assert hash_files(tmp_path / "bank") == expected


@pytest.mark.slow
def test_a_killed_dask_worker_changes_nothing(
    dask: tuple[str, list[subprocess.Popen[bytes]]], corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    address, workers = dask
    engine = EngineConfig(runner="dask", options=(f"dask_client_address={address}",))
    killed = threading.Event()

    def kill_during_writing() -> None:
        while not killed.is_set():
            if list((tmp_path / "bank" / "work").rglob("unwritten/*.parquet")):
                workers[0].kill()
                killed.set()
            time.sleep(0.02)

    watcher = threading.Thread(target=kill_during_writing, daemon=True)
    watcher.start()
    bank = make_bank(tmp_path / "bank", corpus, engine)
    assert killed.is_set()
    killed.set()
    assert workers[0].wait() != 0
    assert hash_files(tmp_path / "bank") == expected
    assert all(check.passed for check in verify_bank(bank, deep=True))


@pytest.mark.slow
def test_the_portable_protocol_makes_the_same_bytes(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        jobs, workers = find_port(), find_port()
        start(stack, "apache_beam.runners.portability.local_job_service_main", "-p", str(jobs))
        start(stack, "apache_beam.runners.worker.worker_pool_main", f"--service_port={workers}")
        wait_for(jobs)
        wait_for(workers)
        options = (
            f"job_endpoint=localhost:{jobs}",
            "environment_type=EXTERNAL",
            f"environment_config=localhost:{workers}",
        )
        make_bank(tmp_path / "bank", corpus, EngineConfig(runner="portable", options=options))
    assert hash_files(tmp_path / "bank") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("job_endpoint=127.0.0.1:9",), "nothing answers at 127.0.0.1:9"),
        (("dask_client_address=tcp://127.0.0.1:9",), "nothing answers at tcp://127.0.0.1:9"),
        (("job_endpoint=somewhere",), "the address 'somewhere' must be host:port"),
    ],
)
def test_an_engine_that_does_not_answer_is_named_at_once(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_runner(EngineConfig(runner="portable", options=options))


def test_an_engine_that_listens_is_taken() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        check_runner(EngineConfig(runner="dask", options=(f"dask_client_address={address}",)))


def test_options_of_older_banks_are_taken() -> None:
    assert EngineConfig(options=("--job_endpoint=localhost:8099",)) == EngineConfig(
        options=("job_endpoint=localhost:8099",)
    )


@pytest.mark.parametrize("option", ["-job_endpoint=localhost:8099", "=1", "job endpoint=1"])
def test_options_are_a_name_and_a_value(option: str) -> None:
    with pytest.raises(InputError, match="must be name=value"):
        EngineConfig(options=(option,))
