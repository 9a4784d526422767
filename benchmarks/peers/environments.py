"""The peers' own environments: one a peer, made on first use, with the versions pinned beside this file."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

OLDEST_PYTHON = {"text-dedup": (3, 12)}
"""Peers that do not run on every Python this project runs on, and the first version they do run on."""

NEWEST_MINOR = 14


class PeerError(Exception):
    """A peer cannot be installed here; the message says why."""


@functools.cache
def _list_interpreters() -> dict[tuple[int, int], str]:
    """Returns the Pythons of this machine by version: the one running, those on the path and those of pyenv."""
    found = {(sys.version_info[0], sys.version_info[1]): sys.executable}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(11, NEWEST_MINOR + 1):
        installed = [str(path) for path in sorted(pyenv.glob(f"3.{minor}.*/bin/python"))]
        path = shutil.which(f"python3.{minor}")
        for candidate in (*installed[-1:], *([path] if path else [])):
            answer = subprocess.run([candidate, "-c", "import sys; print(sys.version_info[1])"], capture_output=True)
            if answer.returncode == 0 and answer.stdout.strip() == str(minor).encode():
                found.setdefault((3, minor), candidate)
    return found


def _find_interpreter(peer: str) -> str:
    oldest = OLDEST_PYTHON.get(peer, (3, 11))
    suitable = [version for version in sorted(_list_interpreters()) if version >= oldest]
    if not suitable:
        raise PeerError(f"needs Python {oldest[0]}.{oldest[1]} or newer; install one beside this one")
    return _list_interpreters()[suitable[0]]


def find_environment(peer: str, folder: Path) -> Path:
    """Returns the interpreter of a peer's environment, which is made if it is not there or not as pinned.

    Args:
        peer: the name in ``requirements-<name>.txt``.
        folder: where the environments are.

    Raises:
        PeerError: there is no suitable Python, or the packages cannot be installed.
    """
    requirements = HERE / f"requirements-{peer}.txt"
    environment = folder / peer
    python = environment / "bin" / "python"
    stamp = environment / "installed.txt"
    if python.exists() and stamp.exists() and stamp.read_text() == requirements.read_text():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    commands = (
        [_find_interpreter(peer), "-m", "venv", "--clear", str(environment)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)],
    )
    for command in commands:
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            lines = [line for line in answer.stderr.splitlines() if re.match("(?i)error", line)]
            raise PeerError((lines or answer.stderr.splitlines() or ["installation failed"])[-1])
    shutil.copyfile(requirements, stamp)
    return python
