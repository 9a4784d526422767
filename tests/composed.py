"""The services of docker-compose.yml as processes on loopback: its commands, variables, volumes and health checks.

What an engine for containers gives each service, a host name, ports, folders, is put in the place of what the file
names, and nothing else: so what is tested is what the file says. A name and a port become 127.0.0.1 and a free port, a
volume becomes a folder. PostgreSQL's image has a command of its own; here it is Debian's PostgreSQL.
"""

import dataclasses
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"

OWNER = "MEMORY3_STACK_OWNER"
"""Variable by which a process and all it has started are known; as a container would hold them."""

FIRST_PORT, END_PORT, GRPC_OFFSET = 20_000, 30_000, 10_000
"""Where free ports are looked for. SeaweedFS takes a second one at this distance for each of its own."""

PORT = re.compile(r"(?<![\w.])(?:4200|5432|8000|8080|8081|8333|8786|8790|8888|9333)(?!\w)")
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")

START_SECONDS = 600.0
STOP_SECONDS = 20.0


class MissingError(Exception):
    """Something that has to be installed is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A service as the file has it, with variables filled in.

    Attributes:
        name: its name.
        command: entry point and command; empty where the image has one.
        environment: variables.
        health: the command that says whether it is well; empty for what runs once.
        volumes: folder in the container and what it is, a name or a path.
        needs: services that have to be there, or to have ended, before.
        num_replicas: how many of it run.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    health: list[str]
    volumes: dict[str, str]
    needs: list[str]
    num_replicas: int


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """Fills variables in as Compose does, everywhere in what YAML has given.

    Raises:
        KeyError: one that has no default is not set.
    """
    if isinstance(value, dict):
        return {key: fill_in(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_in(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if found := variables.get(name):
            return found
        if kind != "-":
            raise KeyError(f"{name} {text or ''}")
        return str(text)

    return VARIABLE.sub(replace, value)


def read_services(variables: Mapping[str, str]) -> dict[str, Service]:
    """Reads the services of the file, those that others need first."""
    asked = fill_in(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), variables)["services"]
    services = {
        name: Service(
            name=name,
            command=[*one.get("entrypoint", []), *one.get("command", [])],
            environment={key: str(value) for key, value in one.get("environment", {}).items()},
            health=one.get("healthcheck", {}).get("test", ["CMD"])[1:],
            volumes={target: source for source, target, *_ in (text.split(":") for text in one.get("volumes", []))},
            needs=list(one.get("depends_on", {})),
            num_replicas=one.get("deploy", {}).get("replicas", 1),
        )
        for name, one in asked.items()
    }
    ordered: dict[str, Service] = {}

    def add(name: str) -> None:
        for needed in services[name].needs:
            add(needed)
        ordered.setdefault(name, services[name])

    for name in services:
        add(name)
    return ordered


def find_postgres() -> Path:
    """Returns the folder of PostgreSQL's programs.

    Raises:
        MissingError: it is not installed.
    """
    folders = [Path(found).parent] if (found := shutil.which("initdb")) else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if not folders:
        raise MissingError("PostgreSQL is not installed: apt-get install postgresql")
    return folders[0]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Stack:
    """The services, each in a group of processes that can be killed and started again."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Reads the file and makes folders; nothing runs yet.

        Args:
            variables: what a user has put into ``.env``.

        Raises:
            MissingError: a program is not installed.
        """
        self._postgres = find_postgres()
        if shutil.which("weed", path=self._make_path()) is None:
            raise MissingError("SeaweedFS is not installed: make setup")
        self.services = read_services(variables)
        self.folder = Path(tempfile.mkdtemp(prefix="memory3-stack-"))
        self.folder.chmod(0o755)  # PostgreSQL runs as another user
        self._token = secrets.token_hex(8)
        self._ports: dict[tuple[str, int, str], int] = {}
        self._processes: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        for name in ("logs", "volumes", "tmp", "home"):
            (self.folder / name).mkdir()

    def _make_path(self) -> str:
        return f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def find_port(self, name: str, port: int | str, replica: int = 0) -> int:
        """Returns the port that stands for one of a service's own."""
        key = (name, replica, str(port))
        while key not in self._ports:
            found = FIRST_PORT + secrets.randbelow(END_PORT - FIRST_PORT)
            if found not in self._ports.values() and _is_free(found) and _is_free(found + GRPC_OFFSET):
                self._ports[key] = found
        return self._ports[key]

    def find_folder(self, source: str) -> Path:
        """Returns the folder that stands for a volume."""
        if "/" in source:
            return Path(source)
        folder = self.folder / "volumes" / source
        folder.mkdir(exist_ok=True)
        return folder

    def translate(self, text: str, service: Service, replica: int = 0) -> str:
        """Puts folders, addresses and ports of this machine in the place of those in a container."""
        folders = {target: str(self.find_folder(source)) for target, source in service.volumes.items()}
        folders["/tmp"] = str(self.folder / "tmp")
        places = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))
        names = "|".join(map(re.escape, self.services))
        pattern = (
            rf"(?<![\w:/.])(?P<place>{places})(?!\w)|(?<![\w-])(?P<host>{names}):(?P<port>\d+)|(?<=ip=)(?:{names})"
            rf"|(?P<every>0\.0\.0\.0)|(?P<own>{PORT.pattern})"
        )

        def replace(match: re.Match[str]) -> str:
            if place := match["place"]:
                return folders[place]
            if host := match["host"]:
                return f"127.0.0.1:{self.find_port(host, match['port'])}"
            if own := match["own"]:
                return str(self.find_port(service.name, own, replica))
            return "127.0.0.1"

        return re.sub(pattern, replace, text)

    def make_environment(self, service: Service, replica: int = 0) -> dict[str, str]:
        """Returns the variables of a service, and those that an image has."""
        return {
            "PATH": self._make_path(),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **{name: self.translate(value, service, replica) for name, value in service.environment.items()},
            OWNER: f"{self._token}/{service.name}/{replica}",
        }

    def _make_command(self, service: Service, replica: int) -> list[str]:
        if service.name == "postgres":
            return self._prepare_postgres(service)
        return [self.translate(word, service, replica) for word in service.command]

    def _prepare_postgres(self, service: Service) -> list[str]:
        """Makes the database as the image does when its volume is empty, and returns the command."""
        [data] = [self.find_folder(source) for source in service.volumes.values()]
        user = service.environment["POSTGRES_USER"]
        # Neither PostgreSQL nor initdb runs as root.
        prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if not any(data.iterdir()):
            password = self.folder / "home" / "password"
            password.write_text(service.environment["POSTGRES_PASSWORD"])
            if prefix:
                shutil.chown(data, "postgres")
                shutil.chown(password, "postgres")
            make = [str(self._postgres / "initdb"), "-D", str(data), "-U", user, f"--pwfile={password}"]
            subprocess.run([*prefix, *make, "--auth=scram-sha-256"], check=True, capture_output=True, cwd=self.folder)
            single = [str(self._postgres / "postgres"), "--single", "-D", str(data), "postgres"]
            question = f"CREATE DATABASE {service.environment['POSTGRES_DB']}\n".encode()
            subprocess.run([*prefix, *single], input=question, check=True, capture_output=True, cwd=self.folder)
        port = str(self.find_port("postgres", 5432))
        return [*prefix, str(self._postgres / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", port, "-k", ""]

    def read_log(self, name: str, replica: int = 0) -> str:
        """Returns what a service has printed."""
        path = self.folder / "logs" / f"{name}-{replica}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, name: str, replica: int = 0) -> None:
        """Starts one process of a service."""
        service = self.services[name]
        with (self.folder / "logs" / f"{name}-{replica}.log").open("ab") as log:
            self._processes[name, replica] = subprocess.Popen(
                self._make_command(service, replica),
                env=self.make_environment(service, replica),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_healthy(self, name: str, replica: int = 0) -> bool:
        """Asks a service's own health check."""
        service = self.services[name]
        command = [self.translate(word, service, replica) for word in service.health]
        environment = self.make_environment(service, replica)
        environment["PATH"] += f":{self._postgres}"
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    def wait(self, name: str, replica: int = 0) -> None:
        """Waits until a service is well, or, if it runs once, has ended well.

        Raises:
            AssertionError: it has not.
        """
        process = self._processes[name, replica]
        if not self.services[name].health:
            process.wait(START_SECONDS)
            assert process.returncode == 0, self.read_log(name, replica)[-3000:]
            return
        end = time.monotonic() + START_SECONDS
        while not self.is_healthy(name, replica):
            assert process.poll() is None, self.read_log(name, replica)[-3000:]
            assert time.monotonic() < end, self.read_log(name, replica)[-3000:]
            time.sleep(0.5)

    def up(self) -> None:
        """Starts all services in their order, each when those it needs are well."""
        for name, service in self.services.items():
            for replica in range(service.num_replicas):
                self.start(name, replica)
            for replica in range(service.num_replicas):
                self.wait(name, replica)

    def run(self, name: str, *command: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs another command with the variables of a service, as ``docker compose run`` does."""
        return subprocess.run(
            [self.translate(word, self.services[name]) for word in command],
            env=self.make_environment(self.services[name]),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def list_processes(self, name: str = "", replica: int = 0) -> list[int]:
        """Returns the processes of a service and all that they have started; without a name those of all."""
        mark = f"{OWNER}={self._token}/{f'{name}/{replica}' if name else ''}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                variables = path.read_bytes().split(b"\0")
                if mark in variables or (not name and any(variable.startswith(mark) for variable in variables)):
                    found.append(int(path.parent.name))
        return found

    def kill(self, name: str, replica: int = 0) -> None:
        """Kills a service with all that it has started, at once, as the end of its container would."""
        self._end(lambda: self.list_processes(name, replica), signal.SIGKILL)
        self._processes[name, replica].wait(STOP_SECONDS)

    def _end(self, find: Callable[[], list[int]], number: signal.Signals) -> None:
        end = time.monotonic() + STOP_SECONDS
        while (found := find()) and time.monotonic() < end:
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            time.sleep(0.1)

    def close(self, *, keep_logs: bool) -> None:
        """Ends every process and removes the folder; the logs may stay."""
        self._end(self.list_processes, signal.SIGKILL)
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        if keep_logs:
            for path in self.folder.iterdir():
                if path.name != "logs":
                    shutil.rmtree(path, ignore_errors=True)
            return
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_until(is_so: Callable[[], object], what: str, seconds: float, pause: float = 0.5) -> float:
    """Waits for something that is to happen, and returns the seconds that took.

    Raises:
        AssertionError: it has not.
    """
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, what
        time.sleep(pause)
    return time.monotonic() - started


def list_commands(service: Service) -> Iterator[list[str]]:
    """Yields each command of this project's own tools in a service's command line, also those in a line of a shell."""
    words = service.command
    lines = re.split(r"\|\||&&|\|", words[-1]) if words[:2] == ["sh", "-c"] else []
    for command in [line.split() for line in lines] or [words]:
        if command and command[0] == "exec":
            command = command[1:]
        if command and command[0] in ("memory3", "prefect", "dask"):
            yield command
