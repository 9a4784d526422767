"""The files of a corpus: which there are, and their bytes as lines in bounded memory.

First step of the data flow: paths -> **files** -> records -> references. :mod:`pipelines.reading` makes records of what
stands here; what lies in an object store comes through :mod:`pipelines.storage`.
"""

import dataclasses
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from pipelines.storage import is_object_url, list_objects, matches_part, open_object, split_pattern
from schemas.errors import CorpusError

JSONL = "jsonl"
PARQUET = "parquet"
TEXT = "text"
UNKNOWN = "unknown"

FORMATS = {
    ".jsonl": JSONL,
    ".jsonl.zst": "jsonl.zst",
    ".jsonl.gz": "jsonl.gz",
    ".parquet": PARQUET,
    ".txt": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
}
"""Format by the end of the file's name, in any case."""

COMPRESSIONS = {JSONL: None, "jsonl.zst": "zstd", "jsonl.gz": "gzip"}
"""The formats that hold lines, and how they are compressed."""

BLOCK_BYTES = 1 << 17


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
        path: as given, or the folder as given joined with the place in it.
        format: a value of :data:`FORMATS`, or ``unknown``.
        doc_id: the document's id if the file is one document (text), equal to ``name``; else None.
        size_bytes: its size on disk.
        name: its path below the corpus folder, or below the folder before a pattern's first wildcard, with forward
            slashes; the file's name if the file itself was given.
        fingerprint: what identifies the content when it was listed: size and time of the last change, of an object its
            tag too; "" of what is no file.
        etag: an object's tag; "" of a file.
    """

    path: str
    format: str
    doc_id: str | None
    size_bytes: int
    name: str = ""
    fingerprint: str = ""
    etag: str = ""


def list_corpus_files(paths: Sequence[str | Path]) -> list[CorpusFile]:
    """Finds the files of a corpus.

    Folders are walked recursively, symbolic links included, but no folder twice, so a loop ends. Files and folders
    whose name starts with a dot are skipped, unless they are named in ``paths``. Files of a format that is not known
    are listed as ``unknown``, so that each is counted as a reject.

    Args:
        paths: files, folders, and patterns of them with ``*``, ``?``, ``[...]`` and ``**`` (any number of folders), in
            any order; also URLs of such in an object store, ``s3://bucket/prefix`` (and gs, az). What exists under the
            very name wins over the pattern.

    Returns:
        Every file once, however often it is named, sorted by path.

    Raises:
        CorpusError: nothing was given, a path does not exist or cannot be listed, a named file has an unknown format,
            a folder or pattern holds no file of a known one, or an object store cannot be reached.
    """
    if not paths:
        raise CorpusError("no corpus was given; name at least one file or folder")
    found: dict[str, CorpusFile] = {}
    for path in sorted({os.fspath(path) for path in paths}):
        for file in _list_files_of(path):
            real_path = file.path if is_object_url(file.path) else os.path.realpath(file.path)
            if real_path not in found or _make_preference(file) < _make_preference(found[real_path]):
                found[real_path] = file
    return sorted(found.values(), key=lambda file: file.path)


def _make_preference(file: CorpusFile) -> tuple[bool, str, int, str]:
    """Orders the names of one file: the chosen one depends on the set of paths given, not on their order."""
    return file.format == UNKNOWN, file.path, -len(file.name), file.name


def _list_files_of(path: str) -> list[CorpusFile]:
    if is_object_url(path):
        kind, files = "file", list(_list_stored_files(path))
    elif os.path.isfile(path):
        kind, files = "file", [_describe_file(path, os.path.basename(path))]
    elif os.path.isdir(path):
        kind, files = "folder", list(_walk_folder(path, path))
    else:
        folder, patterns = split_pattern(path)
        if not patterns:
            raise CorpusError(f"{path} does not exist, or is neither a file nor a folder; check the path of the corpus")
        kind, files = "pattern", list(_list_matching_files(folder, patterns))
        if not files:
            raise CorpusError(f"no file matches {path}; check the pattern, and that the shell has not changed it")
    if all(file.format == UNKNOWN for file in files):
        supported = f"the formats are {' '.join(FORMATS)}"
        if kind == "file" and len(files) == 1:
            raise CorpusError(f"{path} has a format that is not known; {supported}")
        raise CorpusError(f"{kind} {path} holds no file that can be read; {supported}")
    return files


def _list_stored_files(url: str) -> Iterator[CorpusFile]:
    stored_objects = list_objects(url)
    if not stored_objects:
        raise CorpusError(f"{url} does not exist, or is empty; check the bucket and the prefix")
    for stored in stored_objects:
        file_format = _find_format(stored.name)
        doc_id = stored.name if file_format == TEXT else None
        yield CorpusFile(
            stored.url, file_format, doc_id, stored.size_bytes, stored.name, stored.fingerprint, stored.etag
        )


def _list_matching_files(folder: str, patterns: Sequence[str]) -> Iterator[CorpusFile]:
    """Yields the files that match, and those in folders that match, some perhaps twice, named below ``folder``."""
    for path in _expand_pattern(folder, patterns):
        if os.path.isdir(path or "."):
            yield from _walk_folder(path, folder)
        elif os.path.lexists(path):
            yield _describe_file(path, _make_name(path, folder))


def _expand_pattern(folder: str, patterns: Sequence[str]) -> Iterator[str]:
    """Yields the files and folders below a folder that match the parts of a pattern, some perhaps twice."""
    if not patterns:
        yield folder
    elif not os.path.isdir(folder or "."):
        return
    elif all(pattern == "**" for pattern in patterns):
        yield folder
    elif patterns[0] == "**":
        for inner, _ in _iterate_folders(folder):
            yield from _expand_pattern(inner, patterns[1:])
    else:
        for name in sorted(_list_names(folder)):
            if matches_part(name, patterns[0]):
                yield from _expand_pattern(os.path.join(folder, name), patterns[1:])


def _list_names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError as error:
        raise _refuse_folder(error) from error


def _refuse_folder(error: OSError) -> CorpusError:
    return CorpusError(f"folder {error.filename} cannot be listed: {error.strerror}; check its permissions")


def _iterate_folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and those below it, each once, with the names of their files; leaves out names with a dot."""

    def refuse(error: OSError) -> None:
        raise _refuse_folder(error) from error

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root or ".", onerror=refuse, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder if root else folder[2:], sorted(name for name in names if not name.startswith("."))


def _walk_folder(root: str, named_below: str) -> Iterator[CorpusFile]:
    for folder, names in _iterate_folders(root):
        for name in names:
            path = os.path.join(folder, name)
            yield _describe_file(path, _make_name(path, named_below))


def _make_name(path: str, folder: str) -> str:
    return Path(os.path.relpath(path, folder or ".")).as_posix()


def _find_format(name: str) -> str:
    return next((known for suffix, known in FORMATS.items() if name.lower().endswith(suffix)), UNKNOWN)


def _describe_file(path: str, name: str) -> CorpusFile:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"the file name {os.fsencode(path)!r} is not UTF-8; rename the file") from error
    try:
        status = os.stat(path)
    except OSError:  # a broken link, or a file that has just gone
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # pipes and sockets are never opened
        return CorpusFile(path, UNKNOWN, None, 0, name)
    file_format = _find_format(name)
    fingerprint = f"{status.st_size} {status.st_mtime_ns}"
    return CorpusFile(path, file_format, name if file_format == TEXT else None, status.st_size, name, fingerprint)


def open_file(file: CorpusFile) -> pa.NativeFile:
    """Opens a file for reading its bytes.

    Raises:
        CorpusError: it is gone or may not be read. Reading an object raises it too; see :mod:`pipelines.storage`.
    """
    if is_object_url(file.path):
        return open_object(file.path, file.size_bytes, file.etag)
    try:
        return pa.OSFile(file.path, "rb")
    except OSError as error:
        reason = error.strerror or error
        raise CorpusError(f"{file.path} cannot be opened: {reason}; check that it may be read") from error


class DamagedLineError(OSError):
    """The bytes of a file cannot be had from a line on.

    Attributes:
        number: the first line that is not whole, from 1.
    """

    def __init__(self, number: int, reason: str) -> None:
        """Joins the line's number and what is wrong with the file."""
        super().__init__(reason)
        self.number = number


def _iterate_blocks(file: CorpusFile) -> Iterator[bytes]:
    """Yields the decompressed bytes of a file in blocks, and everything before a damaged place.

    A read that meets the damage gives none of its bytes, so the file is then opened again and what is left before the
    damage is read byte by byte, at most one block of it.
    """
    num_done = 0
    with _open_stream(file) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                num_done += len(block)
                yield block
            return
        except OSError as error:
            damage = error
    rest = bytearray()
    with _open_stream(file) as stream, suppress(OSError):
        while num_done and (block := stream.read(min(num_done, BLOCK_BYTES))):
            num_done -= len(block)
        while len(rest) < BLOCK_BYTES and (byte := stream.read(1)):
            rest += byte
    yield bytes(rest)
    raise damage


@contextmanager
def _open_stream(file: CorpusFile) -> Iterator[pa.NativeFile]:
    """Opens a file of one of the :data:`COMPRESSIONS` for reading its decompressed bytes."""
    compression = COMPRESSIONS[file.format]
    with open_file(file) as raw:
        yield pa.CompressedInputStream(raw, compression) if compression else raw


def iterate_lines(file: CorpusFile, max_line_bytes: int, after: int = 0) -> Iterator[tuple[int, bytes | None, int]]:
    r"""Yields the lines of a file of one of the :data:`COMPRESSIONS`, holding at most one line and one block in memory.

    Lines end with ``\n``; a ``\r`` before it stays. Nothing is yielded for the missing line after a last ``\n``.

    Args:
        file: the file.
        max_line_bytes: bound of a line that is handed out.
        after: number of the last line that is only passed over, at the speed of counting ``\n``.

    Yields:
        The line's number, from 1; its bytes, or None if they are more than ``max_line_bytes``; how many they are.

    Raises:
        DamagedLineError: the compressed file is damaged or ends early; the whole lines before that were yielded.
        CorpusError: the file cannot be opened.
    """
    number, size_bytes = 1, 0  # of the line that has begun; while lines are passed over its size stays 0
    pieces: list[bytes] = []
    blocks = _iterate_blocks(file)
    while True:
        try:
            block = next(blocks, None)
        except OSError as error:
            raise DamagedLineError(number, str(error)) from error
        if block is None:
            break
        start = 0
        if number <= after:
            number, start = _pass_lines(block, number, after)
            if number <= after:
                continue
        while (end := block.find(b"\n", start)) >= 0:
            if size_bytes:
                size_bytes += end - start
                pieces.append(block[start:end])
                yield number, b"".join(pieces) if size_bytes <= max_line_bytes else None, size_bytes
                size_bytes = 0
                pieces.clear()
            else:
                yield number, block[start:end] if end - start <= max_line_bytes else None, end - start
            number, start = number + 1, end + 1
        size_bytes += len(block) - start
        if size_bytes <= max_line_bytes:
            pieces.append(block[start:])
        else:
            pieces.clear()
    if size_bytes:
        yield number, b"".join(pieces) if size_bytes <= max_line_bytes else None, size_bytes


def _pass_lines(block: bytes, number: int, after: int) -> tuple[int, int]:
    """Passes over the lines up to ``after``: returns the number of the line then begun and its start in the block."""
    num_ends = block.count(b"\n")
    if number + num_ends <= after:
        return number + num_ends, len(block)
    start = 0
    for _ in range(after - number + 1):
        start = block.find(b"\n", start) + 1
    return after + 1, start
