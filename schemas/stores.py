"""Where a bank's files are: the one small interface between a bank and a file system or an object store.

A name is a path below the bank, with forward slashes. Files are written once under names nobody else has, and found
through a manifest; the manifest itself is created exclusively. So a store needs no locks, no renames and no changes in
place, which is what object stores can do.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from schemas.atomic import make_temporary_path, remove_folder, sync_folder, write_bytes_atomically
from schemas.errors import BankError, BankFormatError, InputError, StorageFullError
from schemas.identifiers import hash_json
from schemas.object_urls import SCHEMES, is_object_url

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NO_FOLDER = frozenset({errno.ENOTDIR, errno.ELOOP})


class StoreError(BankError):
    """The place of a bank cannot be reached, read or written."""


class BankStore(Protocol):
    """The files of one bank.

    Beside what they say, all methods raise a :class:`~schemas.errors.BankError` of one sentence if the place cannot be
    reached or used, is full, or if a name leads out of the bank.
    """

    @property
    def url(self) -> str:
        """Where the bank is, as a user writes it."""
        ...

    @property
    def scratch(self) -> Path:
        """A folder of this machine for unfinished work and caches of this bank; it may not exist yet."""
        ...

    def list_files(self, folder: str = "") -> list[str]:
        """Returns the names of all files below a folder, sorted; none if there is no such folder."""
        ...

    def get_size(self, name: str) -> int | None:
        """Returns the size of a file in bytes, None if there is none."""
        ...

    def read(self, name: str) -> bytes:
        """Returns a file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        """Returns bytes of a file from ``start`` on, fewer if it ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def create(self, name: str, content: bytes) -> None:
        """Writes a file that must not exist yet, whole or not at all, and durably.

        Raises:
            FileExistsError: there is one; it stays as it is.
        """
        ...

    def replace(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all, whatever was there."""
        ...

    def publish(self, folder: Path, name: str) -> None:
        """Moves a folder of finished files to a name that no manifest uses yet; what is there already is replaced.

        If it fails, the folder stays, and the call can be repeated.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; those that are gone already are no error."""
        ...

    def localize(self, name: str, sha256: str) -> Path:
        """Returns a file of this machine with a file's bytes, for what reads only local files.

        Args:
            name: the file.
            sha256: digest of its bytes, by which a copy is found again.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...


@contextmanager
def explain_write_errors(place: str | Path) -> Iterator[None]:
    """Turns what a file system that is full, or may not be written, raises within into one sentence.

    Raises:
        StorageFullError: there is no space left.
        StoreError: the place may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError(
                f"no space is left on the device of {place}; nothing was committed: "
                "free some space and run the same command again"
            ) from error
        if error.errno in REFUSED:
            raise StoreError(f"{place} cannot be written ({error.strerror}); check who may write there") from error
        raise


def find_cache_folder(*key: str) -> Path:
    """Returns this user's folder of this machine for what belongs to a bank that is elsewhere; it may not exist yet.

    Args:
        key: what tells the bank from every other.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return caches / "memory3" / "banks" / hash_json(list(key))


def make_folder(folder: Path) -> None:
    """Makes a folder and those it is in, so that they survive a crash of the machine.

    Raises:
        StoreError: something on the way is a file.
    """
    if folder.is_dir():
        return
    try:
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{error.filename or folder} is a file and must be a folder; move it away") from error


class LocalStore:
    """A bank in a folder. No link within it is followed out of it."""

    def __init__(self, path: str | Path) -> None:
        """Names the folder, which need not exist yet."""
        self.path = Path(path)

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def scratch(self) -> Path:
        """The folder itself, since what is made there can be moved to its place; a cache folder if it is read-only."""
        if self.path.is_dir() and not os.access(self.path, os.W_OK):
            return find_cache_folder(os.path.realpath(self.path))
        return self.path

    def _find(self, name: str) -> Path:
        """Returns the path of a name that does not lead out of the bank."""
        path = self.path / name
        try:
            is_inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path))
        except ValueError as error:  # a zero byte
            raise BankFormatError(f"{self.url} can have no file {name!r}; do not use this bank") from error
        if not is_inside:
            raise BankFormatError(f"{path} leads out of the bank; do not use this bank")
        return path

    def _find_entry(self, name: str) -> Path:
        """Returns the path of a name that is to be written or removed: a link there is not followed."""
        path = self.path / name
        if path.name in ("", ".."):
            raise BankFormatError(f"{self.url} can have no file {name!r}; do not use this bank")
        return self._find(os.path.dirname(name)) / path.name

    @contextmanager
    def _explain_read_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError | IsADirectoryError) or error.errno in NO_FOLDER:
                raise FileNotFoundError(f"{self.url}/{name}") from error
            raise StoreError(
                f"{self.url}/{name} cannot be read ({error.strerror}); check who may read it, and the device"
            ) from error

    def list_files(self, folder: str = "") -> list[str]:
        """See :meth:`BankStore.list_files`; a link is a file, whatever it leads to."""

        def pass_over_missing(error: OSError) -> None:
            with suppress(FileNotFoundError), self._explain_read_errors(folder):
                raise error

        names: list[str] = []
        for path, folders, files in os.walk(self._find(folder), onerror=pass_over_missing):
            base = Path(path).relative_to(self.path)
            links = [name for name in folders if os.path.islink(os.path.join(path, name))]
            names += [(base / name).as_posix() for name in (*files, *links)]
        return sorted(names)

    def get_size(self, name: str) -> int | None:
        """See :meth:`BankStore.get_size`."""
        path = self._find(name)
        try:
            with self._explain_read_errors(name):
                return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """See :meth:`BankStore.read`."""
        path = self.localize(name, "")
        with self._explain_read_errors(name):
            return path.read_bytes()

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        """See :meth:`BankStore.read_range`."""
        path = self.localize(name, "")
        with self._explain_read_errors(name), path.open("rb") as file:
            file.seek(start)
            return file.read(size_bytes)

    def create(self, name: str, content: bytes) -> None:
        """See :meth:`BankStore.create`: a hard link fails if the name is taken."""
        path = self._find_entry(name)
        with explain_write_errors(self.path):
            make_folder(path.parent)
            temporary = make_temporary_path(path)
            try:
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)

    def replace(self, name: str, content: bytes) -> None:
        """See :meth:`BankStore.replace`."""
        path = self._find_entry(name)
        with explain_write_errors(self.path):
            make_folder(path.parent)
            write_bytes_atomically(path, content)

    def publish(self, folder: Path, name: str) -> None:
        """See :meth:`BankStore.publish`: a rename; if the folder is on another file system, a copy and a rename."""
        target = self._find_entry(name)
        with explain_write_errors(self.path):
            make_folder(target.parent)
            if folder.stat().st_dev == target.parent.stat().st_dev:
                _exchange(folder, target)
                return
            incoming = make_temporary_path(target)
            try:
                _copy_folder(folder, incoming)
                _exchange(incoming, target)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
            remove_folder(folder)

    def remove(self, names: Iterable[str]) -> None:
        """See :meth:`BankStore.remove`; folders that become empty go too."""
        for name in names:
            path = self._find_entry(name)
            with explain_write_errors(self.path):
                path.unlink(missing_ok=True)
                for parent in path.relative_to(self.path).parents[:-1]:
                    try:
                        (self.path / parent).rmdir()
                    except OSError:  # not empty, or gone
                        break

    def localize(self, name: str, sha256: str) -> Path:
        """See :meth:`BankStore.localize`: the file itself."""
        path = self._find(name)
        with self._explain_read_errors(name):
            if not path.is_file():
                raise FileNotFoundError(path)
        return path


def _copy_folder(source: Path, target: Path) -> None:
    """Copies a folder durably. ``shutil.copytree`` would hide the number of the error if the disk is full."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, target / path.name)
            continue
        with path.open("rb") as incoming, (target / path.name).open("xb") as outgoing:
            shutil.copyfileobj(incoming, outgoing)
            outgoing.flush()
            os.fsync(outgoing.fileno())
    sync_folder(target)


def _exchange(source: Path, target: Path) -> None:
    """Renames a folder, putting what has the new name away first; if that fails, all is as before."""
    outgoing = make_temporary_path(target)
    if os.path.lexists(target):
        target.rename(outgoing)
    try:
        source.rename(target)
    except OSError:
        if os.path.lexists(outgoing):
            outgoing.rename(target)
        raise
    sync_folder(target)
    sync_folder(target.parent)
    if outgoing.is_dir() and not outgoing.is_symlink():
        shutil.rmtree(outgoing)
    else:
        outgoing.unlink(missing_ok=True)


def open_store(place: "str | Path | BankStore") -> BankStore:
    """Returns the store a bank is in; one that is open already is returned as it is.

    Args:
        place: a folder, or the URL of one in an object store, such as ``s3://bucket/prefix``.

    Raises:
        BankError: a URL of another kind, or one that names no bucket.
    """
    if not isinstance(place, str):
        return LocalStore(place) if isinstance(place, Path) else place
    if is_object_url(place):
        from schemas.object_store import ObjectStore

        return ObjectStore(place)
    scheme, mark, _ = place.partition("://")
    if mark and scheme.isalnum():
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(f"{place} is no place for a bank; give a folder or a URL that begins with one of {known}")
    return LocalStore(place)
