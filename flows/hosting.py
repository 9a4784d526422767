"""The process that keeps deployments going: it finds or starts a Prefect server, executes runs, and watches corpora.

    memory3 deploy -> server (found, or started here) <- runner: executes what is due, each run in its own process
                                                      <- watches: a thread each

Prefect's ephemeral server, which builds use, has no scheduler, so where no server answers a full one is started, for
the life of this process; it keeps its database in PREFECT_HOME, and runs and deployments are there again the next time.
"""

import asyncio
import contextvars
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, cast
from uuid import UUID

from flows.engine import configure_engine, start_engine
from flows.lost_runs import HEARTBEAT_SECONDS
from flows.progress import show_stage
from flows.run_records import SERVER_FAULTS, tolerate_server
from flows.watching import Watch, watch_corpus
from schemas.errors import BankError, InputError

HOST = "127.0.0.1"
PORT_VARIABLE = "PREFECT_SERVER_API_PORT"
DEFAULT_PORT = "4200"

LEASE_STORAGE = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"
"""A server that is started again must know which run has the place of a deployment: of one that is lost and forgotten
the place would never be free again. In memory is Prefect's default."""

START_SECONDS = 300.0
"""A first start makes the database, which takes minutes on a busy machine."""

STOP_SECONDS = 15.0
HEALTH_SECONDS = 2.0


def _is_server(url: str) -> bool:
    """Tells whether a Prefect server answers at the URL of an API."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=HEALTH_SECONDS) as response:
            return bool(response.read().strip() == b"true")
    except (http.client.HTTPException, urllib.error.URLError, OSError):
        return False


def _use_server(url: str) -> None:
    """Makes this process and those it starts talk to a server."""
    os.environ["PREFECT_API_URL"] = url
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def _find_server(url: str) -> str:
    """Returns the URL of the server that is configured, or answers where one would be started; "" if there is none."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or (url if _is_server(url) else "")


@contextmanager
def reach_server(*, can_start: bool) -> Iterator[str]:
    """Makes sure that a Prefect server answers, and yields the URL of its API.

    It is the configured one (PREFECT_API_URL, or a profile of Prefect), else one that answers at the usual port of this
    machine.

    Args:
        can_start: if neither is there, start a full server for as long as the block lasts; else an ephemeral one, which
            knows the same database and starts no runs.

    Raises:
        BankError: no server answers.
        InputError: the port is none.
    """
    configure_engine(level="INFO" if can_start else None)
    port = os.environ.get(PORT_VARIABLE, DEFAULT_PORT)
    if not port.isdecimal():
        raise InputError(f"{PORT_VARIABLE} is {port!r}, must be the number of a port")
    url = f"http://{HOST}:{port}/api"
    found = _find_server(url)
    if found or not can_start:
        if found:
            _use_server(found)
        start_engine()
        yield found
        return
    with tempfile.TemporaryFile() as output:
        process = _start_server(output)
        try:
            _wait_for_server(process, url, output)
            _use_server(url)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start_server(output: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Starts a server that Ctrl-C in this terminal does not reach: it has to outlive the runs."""
    port = os.environ.get(PORT_VARIABLE, DEFAULT_PORT)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", port]
    environment = {LEASE_STORAGE: LEASES_ON_DISK, **os.environ}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait_for_server(process: "subprocess.Popen[bytes]", url: str, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    with show_stage("server"):
        while not _is_server(url):
            if process.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                raise BankError(
                    f"the Prefect server at {url} did not start ({lines[-1] if lines else 'no output'}); free the "
                    f"port, choose another by {PORT_VARIABLE}, or name a server by PREFECT_API_URL"
                )
            time.sleep(0.5)


def serve_deployments(deployments: Sequence[object], watches: Sequence[Watch]) -> None:
    """Makes deployments and executes their runs in processes of this machine until Ctrl-C or SIGTERM.

    At the end their schedules are paused, since nobody would execute what they start; the next time they go on.

    Args:
        deployments: of :mod:`flows.deploying`.
        watches: corpora to look at meanwhile.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.runner import Runner

    runner = Runner(name="memory3", pause_on_shutdown=False, limit=None, heartbeat_seconds=HEARTBEAT_SECONDS)
    made: list[UUID] = []
    try:
        for deployment in deployments:
            assert isinstance(deployment, RunnerDeployment)
            made.append(cast(UUID, runner.add_deployment(deployment)))
        with run_watches(watches), suppress(KeyboardInterrupt):
            asyncio.run(runner.start())
    except (ExceptionGroup, *SERVER_FAULTS) as error:
        raise BankError(f"runs are not served any more: {find_reason(error)}; run the same command again") from error
    finally:
        _pause_schedules(made)


def find_reason(error: BaseException) -> str:
    """Returns what an error says, of several that came together the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def _pause_schedules(deployment_ids: Sequence[UUID]) -> None:
    """Pauses deployments; Prefect's own runner gives up at the first that somebody has removed meanwhile."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for deployment_id in deployment_ids:
            with tolerate_server():
                client.pause_deployment(deployment_id)


@contextmanager
def run_watches(watches: Sequence[Watch]) -> Iterator[None]:
    """Looks at corpora, each in a thread of its own, for as long as the block lasts."""
    stop = threading.Event()
    threads = []
    for watch in watches:
        # A new thread has none of the context that says which server is meant.
        run = contextvars.copy_context().run
        arguments = (watch_corpus, watch, stop, time.monotonic)
        threads.append(threading.Thread(target=run, args=arguments, name=f"watch {watch.deployment}", daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(STOP_SECONDS)


def watch_until_interrupt(watches: Sequence[Watch]) -> None:
    """Watches until Ctrl-C or SIGTERM, where workers elsewhere execute the runs."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: ended.set())
    with run_watches(watches), suppress(KeyboardInterrupt):
        ended.wait()
