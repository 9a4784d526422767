"""``memory3`` for tests that run hundreds of commands: processes of their own, forked from one that has imported all.

A command of the command line spends most of its time importing torch, Beam and Prefect. Here one process does that and
waits at a socket. The program ``memory3`` that :func:`start_commands` leaves in a folder hands it its arguments,
folder, environment and open files; it forks, and the child runs :func:`flows.cli.main` with them. Signals that the
program gets are handed on, and it ends with the child's exit code.

    shell -> memory3 (the program below) -> this process -> a fork for each command -> flows.cli.main
"""

import atexit
import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys

connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
asked = {{"arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}}
message = json.dumps(asked).encode()
socket.send_fds(connection, [len(message).to_bytes(8, "little")], [0, 1, 2])
connection.sendall(message)
child = int.from_bytes(connection.recv(8), "little")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
sys.exit(int.from_bytes(connection.recv(8), "little"))
"""
"""Does without the site's packages, so that it starts in milliseconds."""

IMPORTED = (
    "flows.build",
    "flows.cli",
    "flows.generation",
    "flows.migrating",
    "flows.reporting.making",
    "flows.reporting.page",
    "flows.serving.app",
    "flows.serving.running",
    "flows.training",
    "flows.preparing",
    "model.embedding",
    "model.loading",
    "pipelines.inspecting",
    "pipelines.jobs",
    "transformers.models.llama.modeling_llama",
)

START_SECONDS = 300.0


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("the program has gone")
        received += part
    return received


def _run_command(connection: socket.socket) -> int:
    """Takes the place of the program at the other end: its files, folder, environment and arguments."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    asked = json.loads(_receive(connection, int.from_bytes(length, "little")))
    connection.sendall(os.getpid().to_bytes(8, "little"))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["arguments"]
    # Usage names the program, not this module.
    sys.modules["__main__"].__package__ = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from flows.cli import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


def serve_commands(address: str) -> None:
    """Imports everything, then forks for each program that connects, until it is terminated."""
    for name in IMPORTED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    ends: dict[int, socket.socket] = {}
    while True:
        if waiting.select(0.02):
            connection, _ = listener.accept()
            child = os.fork()
            if child == 0:
                listener.close()
                code = 1
                try:
                    code = _run_command(connection)
                    sys.stdout.flush()
                finally:
                    # Nothing of the parent's is to be ended twice; what the command itself registered is.
                    atexit._run_exitfuncs()
                    os._exit(code)
            ends[child] = connection
        while ends:
            child, state = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            with contextlib.suppress(BrokenPipeError), ends.pop(child) as connection:
                code = os.waitstatus_to_exitcode(state)
                connection.sendall((code if code >= 0 else 128 - code).to_bytes(8, "little"))


@contextlib.contextmanager
def start_commands(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Leaves a program ``memory3`` in a folder that works until the end of the block; yields the folder.

    Args:
        folder: where the program goes; its path has to be short, as those of sockets are.
        environment: variables that stand while everything is imported, beside those of this process.
    """
    address = folder / "socket"
    program = folder / "memory3"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    command = [sys.executable, "-m", "tests.warm_commands", str(address)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not address.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield folder
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    serve_commands(sys.argv[1])
