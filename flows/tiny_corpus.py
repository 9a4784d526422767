"""The text that the shipped checkpoint is trained and measured on: three folders of JSON lines.

    train     what the model is trained on: of pages in several versions one
    banked    what banks are built of: the same documents, with all versions
    held_out  whole documents that no training has seen, with all versions

The corpora are not part of the project; the Python documentation is that of the machine.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import zstandard

from flows.splitting import is_held_out
from pipelines.formats import list_corpus_files
from pipelines.python_docs import iterate_python_docs
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.atomic import replace_atomically

SHARES = {"peps-2025-08": 1.0, "rfcs": 1.0, "psdocs": 1.0, "laws": 0.04}
"""The part of each corpus of the data folder that is used; the Python documentation of the machine is used whole."""

PYTHON_DOCS = "python-docs"

TRAINED_VERSION = "7.6"
"""Of the PowerShell pages, which exist in five versions, the one that is trained on."""

OTHER_VERSIONS = tuple(f"psdocs/reference/{version}/" for version in ("5.1", "7.4", "7.5", "7.7"))

PARTS = ("train", "banked", "held_out")


def _hash_share(doc_id: str) -> float:
    return int.from_bytes(hashlib.blake2b(b"share:" + doc_id.encode(), digest_size=4).digest(), "big") / 2**32


def _iterate_documents(data: Path, name: str) -> Iterator[dict[str, str]]:
    if name == PYTHON_DOCS:
        yield from iterate_python_docs()
        return
    for file in list_corpus_files([data / f"{name}.jsonl.zst"]):
        for batch in read_records(file, ReadingConfig()):
            for record in batch.select(["doc_id", "text", "source"]).to_pylist():
                if record["text"] is not None and _hash_share(record["doc_id"]) < SHARES[name]:
                    yield {"id": record["doc_id"], "text": record["text"], "source": record["source"]}


def find_parts(doc_id: str) -> tuple[str, ...]:
    """Returns the parts that a document belongs to."""
    if is_held_out(doc_id):
        return ("held_out",)
    return ("banked",) if doc_id.startswith(OTHER_VERSIONS) else ("train", "banked")


def write_parts(data: Path, target: Path) -> dict[str, dict[str, int]]:
    """Writes all parts, a file a source; returns the number of documents of each part and source.

    Args:
        data: folder with the corpora named in ``SHARES``.
        target: the folder for the parts.
    """
    counts: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    for name in (PYTHON_DOCS, *SHARES):
        lines: dict[str, list[str]] = {part: [] for part in PARTS}
        for document in _iterate_documents(data, name):
            for part in find_parts(document["id"]):
                lines[part].append(json.dumps(document, ensure_ascii=False))
        for part, of_part in lines.items():
            path = target / part / f"{name}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            packed = zstandard.ZstdCompressor(level=9).compress("".join(line + "\n" for line in of_part).encode())
            with replace_atomically(path) as temporary:
                temporary.write_bytes(packed)
            counts[part][name] = len(of_part)
    return counts
