"""Corpora in object stores: which objects there are, and their bytes as a file that is read in bounded memory.

Stands beside the local file system at the very start of the data flow: :mod:`pipelines.formats` lists and opens files
through here when a path is a URL such as ``s3://bucket/prefix``. :mod:`schemas.object_urls` finds the store.

An object is read in ranges of one size, each asked for with the tag that was listed: an object that is replaced while
it is read is an error, never a mixture of two. Every failure of a store is a :class:`CorpusError`, so that a lost
connection is never taken for a damaged file.
"""

import dataclasses
import fnmatch
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from schemas.errors import CorpusError
from schemas.object_urls import explain_errors, find_store, is_folder_mark
from schemas.object_urls import is_object_url as is_object_url

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

BLOCK_BYTES = 4 << 20
"""Bytes of one request."""

NUM_BLOCKS = 8
"""Blocks of one object that are kept: the columns of a Parquet file are read side by side."""

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
    from obstore.exceptions import PreconditionError

    with explain_errors(url, CorpusError):
        try:
            yield
        except PreconditionError as error:
            raise CorpusError(f"{url} has changed since it was listed; run the command again") from error
        except FileNotFoundError as error:
            raise CorpusError(f"{url} is gone since it was listed; run the command again") from error


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

    store, key = find_store(url, CorpusError)
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
        if name and not is_folder_mark(name, entry["size"]) and matches_parts(name.split("/"), patterns):
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
    store, key = find_store(url, CorpusError)
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
