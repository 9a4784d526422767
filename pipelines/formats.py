"""The files of a corpus: which there are, and their bytes as lines in bounded memory.

First step of the data flow: paths -> **files** -> records -> references. :mod:`pipelines.reading` makes records of what
stands here.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

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

BLOCK_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
        path: as given, or the folder as given joined with the place in it.
        format: a value of :data:`FORMATS`, or ``unknown``.
        doc_id: the document's id if the file is one document (text), equal to ``name``; else None.
        size_bytes: its size on disk.
        name: its path below the corpus folder with forward slashes; the file's name if the file itself was given.
    """

    path: str
    format: str
    doc_id: str | None
    size_bytes: int
    name: str = ""


def list_corpus_files(paths: Sequence[str | Path]) -> list[CorpusFile]:
    """Finds the files of a corpus.

    Folders are walked recursively, symbolic links included, but no folder twice, so a loop ends. Files and folders
    whose name starts with a dot are skipped, unless they are named in ``paths``. Files of a format that is not known
    are listed as ``unknown``, so that each is counted as a reject.

    Args:
        paths: files and folders, in any order.

    Returns:
        Every file once, however often it is named, sorted by path.

    Raises:
        CorpusError: nothing was given, a path does not exist or cannot be listed, a named file has an unknown format,
            or a folder holds no file of a known one.
    """
    if not paths:
        raise CorpusError("no corpus was given; name at least one file or folder")
    found: dict[str, CorpusFile] = {}
    for path in sorted({os.fspath(path) for path in paths}):
        for file in _list_files_of(path):
            real_path = os.path.realpath(file.path)
            if real_path not in found or _make_preference(file) < _make_preference(found[real_path]):
                found[real_path] = file
    return sorted(found.values(), key=lambda file: file.path)


def _make_preference(file: CorpusFile) -> tuple[bool, str, int, str]:
    """Orders the names of one file: the chosen one depends on the set of paths given, not on their order."""
    return file.format == UNKNOWN, file.path, -len(file.name), file.name


def _list_files_of(path: str) -> list[CorpusFile]:
    supported = " ".join(FORMATS)
    if os.path.isdir(path):
        files = list(_walk_folder(path))
        if all(file.format == UNKNOWN for file in files):
            raise CorpusError(f"folder {path} holds no file that can be read; the formats are {supported}")
        return files
    if not os.path.isfile(path):
        raise CorpusError(f"{path} does not exist, or is neither a file nor a folder; check the path of the corpus")
    file = _describe_file(path, os.path.basename(path))
    if file.format == UNKNOWN:
        raise CorpusError(f"{path} has a format that is not known; the formats are {supported}")
    return [file]


def _walk_folder(root: str) -> Iterator[CorpusFile]:
    def refuse(error: OSError) -> None:
        raise CorpusError(f"folder {error.filename} cannot be listed: {error.strerror}; check its permissions")

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = os.path.join(folder, name)
                yield _describe_file(path, Path(os.path.relpath(path, root)).as_posix())


def _describe_file(path: str, name: str) -> CorpusFile:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"the file name {os.fsencode(path)!r} is not UTF-8; rename the file") from error
    regular = os.path.isfile(path)  # not so for broken links, pipes and sockets, which are never opened
    matching = [known for suffix, known in FORMATS.items() if name.lower().endswith(suffix)]
    file_format = matching[0] if regular and matching else UNKNOWN
    size_bytes = os.path.getsize(path) if regular else 0
    return CorpusFile(path, file_format, name if file_format == TEXT else None, size_bytes, name)


def open_file(path: str) -> pa.NativeFile:
    """Opens a file for reading its bytes.

    Raises:
        CorpusError: it is gone or may not be read.
    """
    try:
        return pa.OSFile(path, "rb")
    except OSError as error:
        raise CorpusError(f"{path} cannot be opened: {error.strerror or error}; check that it may be read") from error


def _iterate_blocks(file: CorpusFile) -> Iterator[bytes]:
    """Yields the decompressed bytes of a file in blocks, and everything before a damaged place.

    A read that meets the damage gives none of its bytes, so the file is then opened again and what is left before the
    damage is read byte by byte, at most one block of it.
    """
    compression = COMPRESSIONS[file.format]
    num_done = 0
    block_bytes = BLOCK_BYTES
    while True:
        with open_file(file.path) as raw:
            stream = pa.CompressedInputStream(raw, compression) if compression else raw
            num_left = num_done
            while num_left:
                num_left -= len(stream.read(min(num_left, BLOCK_BYTES)))
            try:
                while block := stream.read(block_bytes):
                    num_done += len(block)
                    yield block
                return
            except OSError:
                if block_bytes == 1:
                    raise
                block_bytes = 1


def iterate_lines(file: CorpusFile, max_line_bytes: int) -> Iterator[tuple[int, bytes | None, int]]:
    r"""Yields the lines of a file of one of the :data:`COMPRESSIONS`, holding at most one line in memory.

    Lines end with ``\n``; a ``\r`` before it stays. Nothing is yielded for the missing line after a last ``\n``.

    Yields:
        The line's number, from 1; its bytes, or None if they are more than ``max_line_bytes``; how many they are.

    Raises:
        OSError: the compressed file is damaged or ends early; the whole lines before that were yielded.
        CorpusError: the file cannot be opened.
    """
    number, size_bytes = 1, 0
    pieces: list[bytes] = []
    for block in _iterate_blocks(file):
        for index, piece in enumerate(block.split(b"\n")):
            if index:
                yield number, b"".join(pieces) if size_bytes <= max_line_bytes else None, size_bytes
                number, size_bytes = number + 1, 0
                pieces.clear()
            size_bytes += len(piece)
            if size_bytes <= max_line_bytes:
                pieces.append(piece)
            else:
                pieces.clear()
    if size_bytes:
        yield number, b"".join(pieces) if size_bytes <= max_line_bytes else None, size_bytes
