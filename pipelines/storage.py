"""Corpora in object stores: which objects there are, and their bytes as a file that is read in bounded memory.

Stands beside the local file system at the very start of the data flow: :mod:`pipelines.formats` lists and opens files
through here when a path is a URL such as ``s3://bucket/prefix``. Everything goes through obstore, which is loaded only
then and takes credentials, region and endpoint from the usual environment variables (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP`` ...; ``GOOGLE_*`` and ``AZURE_*`` for the other two).

An object is read in ranges of one size, each asked for with the tag that was listed: an object that is replaced while
it is read is an error, never a mixture of two. Every failure of a store is a :class:`CorpusError`, so that a lost
connection is never taken for a damaged file.
"""

import dataclasses
import fnmatch
import functools
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa

from schemas.errors import CorpusError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Where each kind of store finds who asks."""

ENVIRONMENT_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
METADATA_SERVICES = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "/metadata/identity")
"""Asked for credentials by obstore on machines that are given none."""

MAX_REASON_CHARS = 200

BLOCK_BYTES = 4 << 20
"""Bytes of one request."""

NUM_BLOCKS = 8
"""Blocks of one object that are kept: the columns of a Parquet file are read side by side."""

MAX_RETRIES = 3
RETRY_TIMEOUT = timedelta(seconds=30)
"""A store that is silent is given up after a minute: obstore waits 5 s for a connection and 30 s for an answer."""

MAGIC = re.compile(r"[*?\[]")
"""The characters that make a path a pattern."""


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """One object as a store lists it.

    Attributes:
        url: scheme, bucket and key, as they are: nothing is percent-encoded.
        name: its place below the folder that was asked for; the last part of the key if the object itself was.
        size_bytes: its size.
        etag: the store's tag of this content, "" if it has none.
        fingerprint: what identifies the content: size, tag and time of the last change.
    """

    url: str
    name: str
    size_bytes: int
    etag: str
    fingerprint: str


def is_object_url(path: str) -> bool:
    """Tells whether a path is the URL of an object, a folder or a pattern in an object store."""
    return path.partition("://")[0] in SCHEMES and "://" in path


def split_pattern(path: str) -> tuple[str, list[str]]:
    """Splits a path into the folder before its first pattern and the parts from there on, none if it has no pattern."""
    parts = path.split("/")
    first = next((index for index, part in enumerate(parts) if MAGIC.search(part)), len(parts))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else ""), [part for part in parts[first:] if part]


def matches_part(name: str, pattern: str) -> bool:
    """Tells whether one part of a path matches; a name that starts with a dot needs a pattern that does."""
    return fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))


def matches_parts(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Tells whether the parts of a path, or the first few of them, which are then a folder, match a pattern's parts.

    ``**`` stands for any number of folders. No ``*`` or ``**`` reaches a name that starts with a dot.
    """
    if not patterns:
        return not any(part.startswith(".") for part in parts)
    if patterns[0] == "**":
        deeper = len(parts) > 1 and not parts[0].startswith(".") and matches_parts(parts[1:], patterns)
        return deeper or (bool(parts) and matches_parts(parts, patterns[1:]))
    return bool(parts) and matches_part(parts[0], patterns[0]) and matches_parts(parts[1:], patterns[1:])


@contextmanager
def _explain_errors(url: str) -> Iterator[None]:
    """Turns what obstore raises within into one sentence that says what to do."""
    from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError

    scheme, _, place = url.partition("://")
    bucket = f"{scheme}://{place.partition('/')[0]}"
    refused = f"{url} may not be read with these credentials; check {VARIABLES[scheme]}, and what they are allowed"
    try:
        yield
    except PreconditionError as error:
        raise CorpusError(f"{url} has changed since it was listed; run the command again") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise CorpusError(refused) from error
    except FileNotFoundError as error:
        raise CorpusError(f"{url} is gone since it was listed; run the command again") from error
    except (BaseError, ValueError) as error:
        reason = str(error)
        if "NoSuchBucket" in reason or "ContainerNotFound" in reason or "bucket does not exist" in reason:
            raise CorpusError(f"{bucket} does not exist; check the name of the bucket and the endpoint") from error
        if any(service in reason for service in METADATA_SERVICES):
            raise CorpusError(f"no credentials were found for {bucket}; set {VARIABLES[scheme]}") from error
        if "status code: 403" in reason or "status code: 401" in reason:  # of a listing obstore does not tell it apart
            raise CorpusError(refused) from error
        if "builder error" in reason:
            raise CorpusError(f"{bucket}: the endpoint is plain http; set AWS_ALLOW_HTTP=true to allow that") from error
        if "HTTP error" in reason:
            raise CorpusError(
                f"{bucket} cannot be reached ({_shorten(error)}); check the network and AWS_ENDPOINT_URL"
            ) from error
        raise CorpusError(f"{url} cannot be read: {_shorten(error)}") from error


def _shorten(error: Exception) -> str:
    """Returns the first line of an error of obstore; the rest is its inner state."""
    return str(error).partition("\n")[0][:MAX_REASON_CHARS].strip()


def list_objects(url: str) -> list[StoredObject]:
    """Finds the objects a URL stands for.

    Args:
        url: an object; or a folder, which stands for everything below it but names that start with a dot; or a pattern
            with ``*``, ``?``, ``[...]`` and ``**``. What exists under the very name wins over the pattern.

    Returns:
        The objects in the order of their keys, none if nothing is there. Marks of folders, empty objects without a
        suffix, are left out.

    Raises:
        CorpusError: the bucket does not exist, or the store cannot be reached or refuses.
    """
    import obstore

    store, key = _find_store(url)
    with _explain_errors(url):
        if key and not url.endswith("/"):
            try:
                return [_describe(url, obstore.head(store, key), key.rpartition("/")[2])]
            except FileNotFoundError:
                pass
        listed = list(itertools.chain.from_iterable(obstore.list(store, key or None)))
        patterns: list[str] = []
        base = key
        if not listed and MAGIC.search(key):
            base, patterns = split_pattern(key)
            listed = list(itertools.chain.from_iterable(obstore.list(store, base or None)))
    objects = []
    for entry in listed:
        name = entry["path"][len(base) :].strip("/")
        is_mark = not entry["size"] and "." not in name.rpartition("/")[2]
        if name and not is_mark and matches_parts(name.split("/"), patterns):
            objects.append(_describe(url, entry, name))
    return sorted(objects, key=lambda stored: stored.url)


def _describe(url: str, entry: Any, name: str) -> StoredObject:
    etag = entry["e_tag"] or ""
    return StoredObject(
        url="/".join([*url.split("/")[:3], entry["path"]]),
        name=name,
        size_bytes=entry["size"],
        etag=etag,
        fingerprint=f"{entry['size']} {etag} {entry['last_modified'].isoformat()}",
    )


def open_object(url: str, size_bytes: int, etag: str) -> pa.NativeFile:
    """Opens an object that was listed for reading; nothing is asked of the store before the first read.

    Raises:
        CorpusError: the URL or the environment cannot be used. Reading raises it too: the object is gone or another
            by now, or the store cannot be reached or refuses.
    """
    store, key = _find_store(url)
    return pa.PythonFile(_ObjectReader(url, store, key, size_bytes, etag), mode="r")


class _ObjectReader:
    """What pyarrow asks of a file, over an object: whole blocks are fetched and the last few of them kept."""

    def __init__(self, url: str, store: "ObjectStore", key: str, size_bytes: int, etag: str) -> None:
        self._url, self._store, self._key, self._size_bytes, self._etag = url, store, key, size_bytes, etag
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.closed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = start + offset
        return self._position

    def read(self, size_bytes: int = -1) -> bytes:
        left_bytes = max(0, self._size_bytes - self._position)
        end = self._position + (left_bytes if size_bytes < 0 else min(size_bytes, left_bytes))
        pieces = []
        while self._position < end:
            index, start = divmod(self._position, BLOCK_BYTES)
            piece = self._get_block(index)[start : start + end - self._position]
            self._position += len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        self._blocks.clear()
        self.closed = True

    def _get_block(self, index: int) -> bytes:
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        while len(self._blocks) >= NUM_BLOCKS:
            self._blocks.popitem(last=False)
        self._blocks[index] = self._fetch(index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, self._size_bytes))
        return self._blocks[index]

    def _fetch(self, start: int, end: int) -> bytes:
        import obstore

        options: GetOptions = {"range": (start, end)}
        if self._etag:
            options["if_match"] = self._etag
        with _explain_errors(self._url):
            content = bytes(obstore.get(self._store, self._key, options=options).bytes())
        if len(content) != end - start:
            raise CorpusError(f"{self._url} has changed since it was listed; run the command again")
        return content


def _find_store(url: str) -> "tuple[ObjectStore, str]":
    """Returns the store of a URL and the key in it, "" for the whole bucket."""
    scheme, _, place = url.partition("://")
    bucket, _, key = place.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise CorpusError(f"{url} names no bucket that can be; write it as {scheme}://BUCKET/PREFIX")
    environment = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIXES)}
    for name in ENDPOINTS:
        value = environment.get(name)
        if value and not (urlsplit(value).scheme in ("http", "https") and urlsplit(value).hostname):
            raise CorpusError(f"{name} is {value!r}, must be a URL such as https://s3.example.com")
    return _make_store(scheme, bucket, tuple(sorted(environment.items()))), key.strip("/")


@functools.lru_cache(maxsize=16)
def _make_store(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> "ObjectStore":
    """Makes the client of a bucket; it reads the environment itself, which is here only to tell two apart."""
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    makers: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    try:
        store: ObjectStore = makers[scheme](
            bucket,
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": RETRY_TIMEOUT},
        )
    except (BaseError, ValueError) as error:
        raise CorpusError(
            f"{scheme}://{bucket} cannot be opened: {_shorten(error)}; check {VARIABLES[scheme]}"
        ) from error
    return store
