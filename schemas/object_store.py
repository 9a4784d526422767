"""A bank in an object store: whole objects put once, a commit that fails if the name is taken, and reads of ranges.

One implementation of :class:`schemas.stores.BankStore`, beside :class:`schemas.stores.LocalStore`; everything goes
through obstore. The store must honour ``If-None-Match: *`` (Amazon S3, MinIO, R2, Google Cloud Storage and Azure do):
by it, of two writers that commit the same version one wins.

What reads only local files (Parquet, FAISS) is given copies. A copy is named by the SHA-256 of its content, which is
checked when it is made; since then nobody has written to it if its time of change still is its mark, see
:func:`_mark_checked`. Otherwise it is checked again, and replaced if it is damaged. All copies may be deleted at any
time.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from schemas.atomic import remove_folder, replace_atomically
from schemas.errors import BankFormatError
from schemas.object_urls import ENDPOINTS, explain_errors, find_store, is_folder_mark
from schemas.stores import StoreError, explain_write_errors, find_cache_folder

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore as Client

PART_BYTES = 8 << 20
"""Bytes of one request: a larger file is sent and fetched in several at a time."""

MAX_PARTS = 5_000
"""A store takes 10 000 parts of one object at most."""

NUM_THREADS = 4
"""Requests at a time of one call."""

WRITER_KEY = "writer"
"""The attribute by which a writer recognises its own object."""

ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"
COPIES_FOLDER = "files"
DIGEST = re.compile("[0-9a-f]{64}")

UNNAMED = re.compile(r"[\x00-\x1f\x7f]")
"""What stands in no name of an object."""

MARK_SECONDS = 1 << 30

Input = TypeVar("Input")
Result = TypeVar("Result")


class ObjectStore:
    """A bank below a prefix of a bucket; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Names the place; nothing is asked of the store yet.

        Args:
            url: for instance ``s3://bucket/prefix``, with or without a slash at its end.

        Raises:
            StoreError: the URL names no bucket, or the environment cannot be used.
        """
        scheme, _, place = url.partition("://")
        self._url = f"{scheme}://{place.rstrip('/')}"
        _, prefix = find_store(self._url, StoreError)
        if any(part in ("", ".", "..") for part in prefix.split("/") if prefix) or UNNAMED.search(prefix):
            raise StoreError(f"{url!r} cannot be a place for a bank; write it as {scheme}://BUCKET/PREFIX")

    @property
    def url(self) -> str:
        """Scheme, bucket and prefix, without a slash at the end."""
        return self._url

    @property
    def scratch(self) -> Path:
        """A folder of this user's cache, of this place alone."""
        places = [os.environ[name] for name in (*ENDPOINTS, ACCOUNT) if os.environ.get(name)]
        return find_cache_folder(self._url, *places)

    def _find(self, name: str) -> "tuple[Client, str]":
        """Returns the client and the key of a name.

        Raises:
            BankFormatError: the name leads out of the bank, or no object can have it.
        """
        parts = name.split("/") if name else []
        if any(part in ("", ".", "..") for part in parts) or UNNAMED.search(name):
            raise BankFormatError(f"{self._url} can have no file {name!r}; do not use this bank")
        client, prefix = find_store(self._url, StoreError)
        return client, "/".join([*([prefix] if prefix else []), *parts])

    @contextmanager
    def _explain(self, name: str, action: str) -> Iterator[None]:
        with explain_errors(f"{self._url}/{name}", StoreError, action=action):
            yield

    def list_files(self, folder: str = "") -> list[str]:
        """See :meth:`BankStore.list_files`; empty objects without a suffix are marks of folders, not files."""
        found = ((name, entry["size"]) for name, entry in self._list_entries(folder).items())
        return sorted(name for name, size_bytes in found if name and not is_folder_mark(name, size_bytes))

    def list_ages(self, folder: str) -> dict[str, float]:
        """Returns the seconds since each file below a folder was written, by name: its clock's time to this one's."""
        now = datetime.now(UTC)
        entries = self._list_entries(folder)
        return {name: (now - entry["last_modified"]).total_seconds() for name, entry in entries.items()}

    def _list_entries(self, folder: str) -> "dict[str, ObjectMeta]":
        """Returns what the store says of the objects below a folder, by name."""
        import obstore

        client, key = self._find(folder.removesuffix("/"))
        _, prefix = self._find("")
        start = len(prefix) + 1 if prefix else 0
        with self._explain(folder, "listed"):
            entries = [entry for chunk in obstore.list(client, key or None, chunk_size=1000) for entry in chunk]
        return {entry["path"][start:]: entry for entry in entries}

    def get_size(self, name: str) -> int | None:
        """See :meth:`BankStore.get_size`."""
        import obstore

        client, key = self._find(name)
        try:
            with self._explain(name, "read"):
                return obstore.head(client, key)["size"]
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """See :meth:`BankStore.read`."""
        import obstore

        client, key = self._find(name)
        with self._explain(name, "read"):
            return bytes(obstore.get(client, key).bytes())

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        """See :meth:`BankStore.read_range`: one request."""
        import obstore

        client, key = self._find(name)
        if size_bytes > 0:
            try:
                with self._explain(name, "read"):
                    return bytes(obstore.get_range(client, key, start=start, length=size_bytes))
            except StoreError as error:
                if "status code: 416" not in str(error.__cause__):  # the object ends before the range begins
                    raise
        if self.get_size(name) is None:
            raise FileNotFoundError(f"{self._url}/{name}")
        return b""

    def create(self, name: str, content: bytes) -> None:
        """See :meth:`BankStore.create`: put-if-absent.

        An answer that is lost is asked for again, and then the object is there already: it carries a mark of its
        writer, by which it is known as one's own.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        client, key = self._find(name)
        mark = secrets.token_hex(16)
        try:
            with self._explain(name, "written"):
                try:
                    obstore.put(client, key, content, attributes={WRITER_KEY: mark}, mode="create", use_multipart=False)
                except AlreadyExistsError as error:
                    raise FileExistsError(f"{self._url}/{name}") from error
        except (FileExistsError, StoreError):
            if not self._is_marked(name, mark):
                raise

    def _is_marked(self, name: str, mark: str) -> bool:
        """Tells whether an object was put by the writer with this mark; False if the store does not say."""
        import obstore

        client, key = self._find(name)
        try:
            with self._explain(name, "read"):
                return obstore.get(client, key, options={"head": True}).attributes.get(WRITER_KEY) == mark
        except (StoreError, FileNotFoundError):
            return False

    def replace(self, name: str, content: bytes) -> None:
        """See :meth:`BankStore.replace`."""
        import obstore

        client, key = self._find(name)
        with self._explain(name, "written"):
            obstore.put(client, key, content)

    def publish(self, folder: Path, name: str) -> None:
        """See :meth:`BankStore.publish`: uploads the files, several at a time, and then removes the folder."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        targets = [f"{name}/{path.relative_to(folder).as_posix()}" for path in paths]
        _map_parallel(self._upload, list(zip(paths, targets, strict=True)))
        self.remove(set(self.list_files(name)) - set(targets))
        remove_folder(folder)

    def _upload(self, pair: tuple[Path, str]) -> None:
        import obstore

        path, name = pair
        client, key = self._find(name)
        part_bytes = max(PART_BYTES, path.stat().st_size // MAX_PARTS)
        with self._explain(name, "written"):
            obstore.put(client, key, path, chunk_size=part_bytes, max_concurrency=NUM_THREADS)

    def remove(self, names: Iterable[str]) -> None:
        """See :meth:`BankStore.remove`: many in one request, where the store can do that."""
        import obstore

        keys = [self._find(name)[1] for name in names]
        client, _ = self._find("")
        if not keys:
            return
        try:
            with self._explain("", "changed"):
                obstore.delete(client, keys)
        except FileNotFoundError:
            # Not every store passes over what is gone; the others may be left.
            for key in keys:
                try:
                    with self._explain("", "changed"):
                        obstore.delete(client, key)
                except FileNotFoundError:
                    continue

    def localize(self, name: str, sha256: str) -> Path:
        """See :meth:`BankStore.localize`: a copy in the scratch folder, made at the first call.

        Raises:
            BankFormatError: the object has another content, or ``sha256`` is no digest.
        """
        if not DIGEST.fullmatch(sha256):
            raise BankFormatError(f"{self._url}/{name} has no SHA-256 but {sha256!r}; do not use this bank")
        path = self.scratch / COPIES_FOLDER / (sha256 + PurePosixPath(name).suffix)
        if _is_marked_checked(path):
            return path
        with explain_write_errors(path.parent):
            if path.is_file() and _hash_file(path) == sha256:
                _mark_checked(path)
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as temporary:
                self._download(name, temporary)
                if _hash_file(temporary) != sha256:
                    raise BankFormatError(
                        f"{self._url}/{name} is damaged: it has not the SHA-256 of its manifest; "
                        "restore it or roll back to another version"
                    )
                _mark_checked(temporary)
        return path

    def _download(self, name: str, path: Path) -> None:
        """Writes an object to a file, several parts at a time."""
        size_bytes = self.get_size(name)
        if size_bytes is None:
            raise FileNotFoundError(f"{self._url}/{name}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:

            def fetch(start: int) -> None:
                part = memoryview(self.read_range(name, start, PART_BYTES))
                while part:  # a disk that is nearly full takes a piece, and fails at the next
                    written = os.pwrite(descriptor, part, start)
                    part, start = part[written:], start + written

            _map_parallel(fetch, range(0, size_bytes, PART_BYTES))
        finally:
            os.close(descriptor)


def _map_parallel(function: "Callable[[Input], Result]", values: "Iterable[Input]") -> "list[Result]":
    """Calls a function for each value, a few at a time; what has not begun when one fails is never begun."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            return list(pool.map(function, values))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark_checked(path: Path) -> None:
    """Marks a copy as checked by a time of change that follows from its size, which writing to it would change."""
    os.utime(path, times=(MARK_SECONDS, MARK_SECONDS + path.stat().st_size % MARK_SECONDS))


def _is_marked_checked(path: Path) -> bool:
    """Tells whether a copy is there and nobody has written to it since it was checked."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_mtime_ns == (MARK_SECONDS + status.st_size % MARK_SECONDS) * 10**9
