"""Files and folders that are there whole or not at all: temporary name, fsync, rename."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def make_temporary_path(path: Path) -> Path:
    """Returns a name beside ``path`` that nobody else has: other threads, and other machines with equal process ids."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on leaving without an error it becomes ``path``.

    On an error the temporary file is removed and ``path`` stays as it was. The temporary name is random, so two that
    write the same file do not meet.
    """
    temporary = make_temporary_path(path)
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file, see :func:`replace_atomically`."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(content)


def remove_folder(folder: Path) -> None:
    """Removes a folder as far as can be, after taking its name away: what is found under the name is always whole."""
    gone = make_temporary_path(folder)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside ``path``; on leaving without an error it takes the place of ``path``.

    On an error it is removed and ``path`` stays as it was. Between two renames there is no ``path`` for a moment: after
    a crash just then both the old folder and the new one are whole, under temporary names.
    """
    temporary, old = make_temporary_path(path), make_temporary_path(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in temporary.rglob("*"):
            if written.is_file():
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)
