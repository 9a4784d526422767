"""The scratch folder of a build inside its bank: one build at a time, kept over a crash, gone after the commit."""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.workspace import Workspace
from schemas.bank import BANK_FOLDERS, WORK_FOLDER
from schemas.errors import BankFormatError, ConflictError, NothingLeftError
from schemas.identifiers import ID_LENGTH
from schemas.manifest import list_versions

LOCK_NAME = "LOCK"

BUILD_ID = re.compile(f"[0-9a-f]{{{ID_LENGTH}}}")


def check_target(bank: Path) -> None:
    """Makes sure that a folder may become, or is, a bank.

    Raises:
        BankFormatError: it is a file, or holds something else.
    """
    if not bank.exists():
        return
    if not bank.is_dir():
        raise BankFormatError(f"{bank} is a file; give a folder for the bank")
    if list_versions(bank):
        return
    # Without a version, only what an unfinished build has left is ours; a folder named "work" alone may be anybody's.
    begun = (bank / WORK_FOLDER / LOCK_NAME).is_file()
    strangers = sorted(path.name for path in bank.iterdir() if not begun or path.name not in BANK_FOLDERS)
    if strangers:
        raise BankFormatError(
            f"{bank} holds something else ({', '.join(strangers[:3])}{', ...' if len(strangers) > 3 else ''}); "
            "give an empty or new folder for the bank"
        )


@contextmanager
def open_workspace(bank: Path, build_id: str) -> Iterator[Workspace]:
    """Yields the workspace of a build, with whatever an earlier run of the same build has finished.

    Workspaces of other builds are removed: nobody will go on with them. On leaving without an error, or because nothing
    of the corpus is left, the workspace is removed too.

    Raises:
        ConflictError: another process builds in this bank.
    """
    folder = bank / WORK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f"another process is building in {bank}; wait for it, or give another folder"
            ) from error
        for other in folder.iterdir():
            if other.is_dir() and other.name != build_id and BUILD_ID.fullmatch(other.name):
                shutil.rmtree(other)
        workspace = Workspace(folder / build_id)
        workspace.create()
        try:
            yield workspace
        except NothingLeftError:
            shutil.rmtree(workspace.root)  # nothing in it is worth going on with
            raise
        shutil.rmtree(workspace.root)
