"""The scratch folder of an operation on a bank: one writer at a time, kept over a crash, gone after the commit.

The lock keeps two writers of one machine from doing the same work twice; that of two only one commits holds without it,
on any store.
"""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.workspace import WORKSPACE_FORMAT, Workspace
from schemas.atomic import write_bytes_atomically
from schemas.bank import BANK_FOLDERS, WORK_FOLDER, Bank
from schemas.errors import BankFormatError, ConflictError, NothingLeftError, StorageFullError
from schemas.identifiers import ID_LENGTH, hash_json
from schemas.manifest import list_versions
from schemas.stores import FULL, BankStore, LocalStore, explain_write_errors

LOCK_NAME = "LOCK"

VERSION_NAME = "version"
"""File of a workspace with the number of the version that was the newest when its operation was last begun."""

BUILD_ID = re.compile(f"[0-9a-f]{{{ID_LENGTH}}}")


def check_target(store: BankStore) -> None:
    """Makes sure that a place may become, or is, a bank.

    Raises:
        BankFormatError: it is a file, or holds something else.
    """
    if isinstance(store, LocalStore) and store.path.exists() and not store.path.is_dir():
        raise BankFormatError(f"{store.url} is a file; give a folder for the bank")
    if list_versions(store):
        return
    if isinstance(store, LocalStore):
        found = {path.name for path in store.path.iterdir()} if store.path.exists() else set()
    else:
        found = {name.partition("/")[0] for name in store.list_files()}
    # Without a version, only what an unfinished build has left is ours; a folder named "work" alone may be anybody's.
    begun = (store.scratch / WORK_FOLDER / LOCK_NAME).is_file()
    strangers = sorted(name for name in found if not begun or name not in BANK_FOLDERS)
    if strangers:
        raise BankFormatError(
            f"{store.url} holds something else ({', '.join(strangers[:3])}{', ...' if len(strangers) > 3 else ''}); "
            "give an empty or new folder for the bank"
        )


def make_work_id(operation: str, parent: Bank | None, *details: object) -> str:
    """Returns the id of an operation's workspace: equal if it is the same operation on the same version."""
    return hash_json([WORKSPACE_FORMAT, operation, parent.manifest.to_json() if parent else None, *details])


@contextmanager
def lock_bank(store: BankStore) -> Iterator[None]:
    """Keeps other writers of this machine away from a bank.

    Raises:
        ConflictError: another process writes to it.
        StorageFullError: there is not even space for the lock.
    """
    folder = store.scratch / WORK_FOLDER
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK_NAME).open("w")
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f"another process is writing to {store.url}; nothing was changed; wait for it and run again"
            ) from error
        yield


def _find_newest(store: BankStore) -> bytes:
    return b"%d" % (list_versions(store) or [0])[-1]


def _read_version(workspace: Path) -> bytes:
    with suppress(FileNotFoundError):
        return (workspace / VERSION_NAME).read_bytes()
    return b""


def list_abandoned(store: BankStore) -> list[Path]:
    """Returns the workspaces nobody will go on with: a version was committed since, perhaps by their own operation."""
    newest = _find_newest(store)
    found = sorted((store.scratch / WORK_FOLDER).glob("*"))
    return [path for path in found if BUILD_ID.fullmatch(path.name) and path.is_dir() and _read_version(path) != newest]


@contextmanager
def open_workspace(store: BankStore, work_id: str, *, keep: bool = False) -> Iterator[Workspace]:
    """Yields the workspace of an operation, with whatever an earlier run of the same operation has finished.

    Workspaces that nobody will go on with are removed. On leaving without an error, or because nothing of the corpus is
    left, the workspace is removed too.

    Args:
        store: the bank, locked by :func:`lock_bank`.
        work_id: see :func:`make_work_id`.
        keep: whether the workspace stays when all went well, for a run that goes on from it.

    Raises:
        StorageFullError: there is no space left; finished work is kept.
    """
    folder = store.scratch / WORK_FOLDER
    workspace = Workspace(folder / work_id)
    for other in list_abandoned(store):
        if other != workspace.root:
            shutil.rmtree(other)
    try:
        workspace.create()
        write_bytes_atomically(workspace.root / VERSION_NAME, _find_newest(store))
        yield workspace
    except NothingLeftError:
        shutil.rmtree(workspace.root)  # nothing in it is worth going on with
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageFullError(
            f"no space is left on the device of {folder}; nothing was committed and finished work is kept: "
            "free some space and run the same command again"
        ) from error
    if not keep:
        shutil.rmtree(workspace.root)
