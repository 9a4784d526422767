"""The held-out texts that losses are measured on: a fixed sample of documents, and passages of each.

    corpus files -> documents, one of all versions of a page -> a sample by hash -> passages of 512 tokens

Documents are drawn by a hash of their text, so that neither the order of files nor other documents change the sample.
Of a page that is there in several versions one is taken: nearly equal texts are no independent items.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from flows.progress import show_stage
from flows.splitting import find_family
from model.checkpoint import Checkpoint
from model.evaluating import cut_passages
from model.reading import CHUNK_TOKENS
from pipelines.checking import check_corpus
from pipelines.formats import CorpusFile, list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.errors import InputError
from schemas.protocols import IntArray

NUM_DOCUMENTS = 40
"""Documents of a corpus by default."""

NUM_PASSAGES = 2
"""Passages of a document by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutDocument:
    """A document that losses are measured on.

    Attributes:
        doc_id: its id.
        source: the corpus it is of, see :func:`name_sources`.
        content_hash: of its text.
        text: its text.
    """

    doc_id: str
    source: str
    content_hash: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document.

    Attributes:
        doc_id: the document.
        source: its corpus.
        tokens: int, beginning with ``<s>``; two chunks at least.
    """

    doc_id: str
    source: str
    tokens: IntArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSample:
    """Passages, and what they were drawn from.

    Attributes:
        passages: document by document.
        num_read: records of the corpora.
        num_dropped: records that were rejected in reading, have the text of another, or are another version of a page.
        num_short: drawn documents without a passage of two chunks.
        digest: of the texts of all that were kept; the same for the same corpora.
        content_hashes: of the documents of the sample.
    """

    passages: list[Passage]
    num_read: int
    num_dropped: int
    num_short: int
    digest: str
    content_hashes: list[str]

    @property
    def sources(self) -> list[str]:
        """The corpora that have passages, in order."""
        return list(dict.fromkeys(passage.source for passage in self.passages))


def name_sources(files: Sequence[CorpusFile]) -> dict[str, str]:
    """Returns by path the corpus that a file belongs to: its name without endings, with its folder where two are alike.

    Files that are one document each are a corpus together, named after the folder that was given.
    """
    names = {}
    for file in files:
        folder = file.path.removesuffix(file.name).rstrip("/").rpartition("/")[2] or "text"
        names[file.path] = folder if file.doc_id is not None else file.path.rpartition("/")[2].partition(".")[0]
    lines = [name for file, name in zip(files, names.values(), strict=True) if file.doc_id is None]
    twice = {name for name in lines if lines.count(name) > 1}
    for file in files:
        if file.doc_id is None and names[file.path] in twice:
            names[file.path] = "/".join(file.path.split("/")[-2:])
    return names


def read_documents(corpus: Sequence[str]) -> tuple[list[HeldOutDocument], int]:
    """Returns the documents of corpora, one of all versions of each, sorted by hash; and the number of records read.

    Raises:
        CorpusError: a corpus cannot be read.
    """
    config = ReadingConfig()
    files = list_corpus_files(list(corpus))
    check_corpus(files, config)
    sources = name_sources(files)
    chosen: dict[tuple[str, str], HeldOutDocument] = {}
    num_read = num_files = 0
    columns = ["doc_id", "text", "content_hash"]
    with show_stage("texts", len(files), "files", lambda: num_files):
        for file in files:
            source = sources[file.path]
            for batch in read_records(file, config):
                num_read += batch.num_rows
                kept = batch.filter(pc.is_null(batch["reason"])).select(columns)
                for row in kept.to_pylist():
                    document = HeldOutDocument(source=source, **row)
                    family = source, find_family(document.doc_id)
                    known = chosen.get(family)
                    if known is None or document.content_hash < known.content_hash:
                        chosen[family] = document
            num_files += 1
    distinct = {document.content_hash: document for document in chosen.values()}
    return [distinct[key] for key in sorted(distinct)], num_read


def draw_passages(
    checkpoint: Checkpoint,
    corpus: Sequence[str],
    *,
    num_documents: int = NUM_DOCUMENTS,
    num_passages: int = NUM_PASSAGES,
) -> HeldOutSample:
    """Draws passages from corpora.

    Args:
        checkpoint: the model, whose tokens passages are cut in.
        corpus: files and folders; each file with many documents is a corpus of its own.
        num_documents: documents of each corpus at most.
        num_passages: passages of a document at most, at even distances.

    Raises:
        InputError: no document is long enough.
        CorpusError: a corpus cannot be read.
    """
    documents, num_read = read_documents(corpus)
    num_drawn: dict[str, int] = {}
    passages: list[Passage] = []
    hashes = []
    num_short = 0
    for document in documents:
        if num_drawn.get(document.source, 0) == num_documents:
            continue
        found = cut_passages(checkpoint, [document.text])
        if not found:
            num_short += 1
            continue
        num_drawn[document.source] = num_drawn.get(document.source, 0) + 1
        hashes.append(document.content_hash)
        rows = np.unique(np.linspace(0, len(found) - 1, num_passages).round().astype(int))
        passages += [
            Passage(doc_id=document.doc_id, source=document.source, tokens=found[row].astype(np.int32)) for row in rows
        ]
    if not passages:
        raise InputError(
            f"no text of {', '.join(corpus)} has {2 * CHUNK_TOKENS} tokens, the least that can be scored; "
            "give longer texts"
        )
    passages.sort(key=lambda passage: passage.source)  # stable: documents stay in their order
    return HeldOutSample(
        passages=passages,
        num_read=num_read,
        num_dropped=num_read - len(documents),
        num_short=num_short,
        digest=hashlib.sha256("".join(document.content_hash for document in documents).encode()).hexdigest(),
        content_hashes=hashes,
    )
