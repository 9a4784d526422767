"""Documents cut into references of at most 128 tokens (method section 3), at the ends of sentences where there are any.

Third step of the data flow: records (:mod:`pipelines.reading`) -> **references and where they stand** -> deduplication
and encoding. The references of a document tile it: joined in order they are its text again (unless they are asked to
overlap). The parts of the step, each on the UTF-8 bytes of a batch and on arrays of tokens:

    documents -> corpus (:mod:`pipelines.spans`), a rank a byte (:mod:`pipelines.boundaries`)
              -> pieces with tokens of their own (:mod:`pipelines.pieces`), cut by :mod:`pipelines.cutting`
              -> pieces that are references (:mod:`pipelines.mending`) -> table (:mod:`pipelines.tabulating`)
"""

import dataclasses

import pyarrow as pa

from pipelines.boundaries import BOUNDARIES
from pipelines.mending import mend_pieces
from pipelines.pieces import cut_documents
from pipelines.spans import Strings, read_corpus, to_array
from pipelines.tabulating import CHUNKS, make_table
from schemas.errors import InputError
from schemas.protocols import TextTokenizer
from schemas.records import EMPTY_SLOT

__all__ = ["CHUNKS", "ChunkingConfig", "chunk_documents"]

MIN_MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """How documents are cut.

    Attributes:
        max_tokens: the greatest number of tokens in a reference (128 in the paper).
        min_fill: the share of ``max_tokens`` that a reference is filled to before a boundary may end it.
        boundary: what counts as a boundary: ends of paragraphs, sentences, lines, clauses and words ("sentence"), of
            paragraphs, lines and words ("line"), or nothing ("hard": ``max_tokens`` tokens wherever that falls between
            what a reader sees as characters).
        overlap_tokens: the greatest number of tokens by which a reference begins before the end of the last one.
        title_prefix: whether a reference that does not begin with its document's title gets it, on a line of its own,
            put before its text.
        max_title_tokens: a longer title is cut at a word.
    """

    max_tokens: int = 128
    min_fill: float = 0.5
    boundary: str = "sentence"
    overlap_tokens: int = 0
    title_prefix: bool = False
    max_title_tokens: int = 32

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of bounds.
        """
        if not MIN_MAX_TOKENS <= self.max_tokens <= EMPTY_SLOT:  # offsets of tokens are stored as one byte
            bounds = f"between {MIN_MAX_TOKENS} and {EMPTY_SLOT}"
            raise InputError(f"chunking: max_tokens is {self.max_tokens}, must be {bounds}")
        if not 0 <= self.min_fill < 1:
            raise InputError(f"chunking: min_fill is {self.min_fill}, must be at least 0 and less than 1")
        if self.boundary not in BOUNDARIES:
            raise InputError(f"chunking: boundary is {self.boundary!r}, must be one of {', '.join(BOUNDARIES)}")
        if not 0 <= 2 * self.overlap_tokens < self.max_tokens:
            bounds = f"at least 0 and less than half of max_tokens ({self.max_tokens})"
            raise InputError(f"chunking: overlap_tokens is {self.overlap_tokens}, must be {bounds}")
        if self.max_title_tokens < 1 or (self.title_prefix and 2 * self.max_title_tokens > self.max_tokens):
            bounds = f"at least 1 and at most half of max_tokens ({self.max_tokens})"
            raise InputError(f"chunking: max_title_tokens is {self.max_title_tokens}, must be {bounds}")


def chunk_documents(
    doc_ids: Strings, texts: Strings, titles: Strings | None, tokenizer: TextTokenizer, config: ChunkingConfig
) -> pa.Table:
    """Cuts documents into references.

    A reference ends at the best boundary (:func:`pipelines.boundaries.rank_places`) in the last part of the window
    that ``max_tokens`` allows, the later of two equal ones, and between two tokens where there is none. Its token ids
    are those of its own text encoded alone, so equal text has an equal ``ref_id`` wherever it stands. What becomes of
    a document does not depend on the others.

    With ``overlap_tokens`` a reference but the first begins at the best boundary within that many tokens before the end
    of the last one, the earliest of equal ones; parts of a piece that had to be cut again do not overlap.

    Args:
        doc_ids: an id a document; this and the next two are arrays, chunked arrays or sequences of strings.
        texts: the documents.
        titles: a title a document, null or empty for none; asked for by ``title_prefix`` only.
        tokenizer: the language model's tokenizer.
        config: how to cut.

    Returns:
        A table of :data:`CHUNKS`, in the order of the documents and of their text. Spans are half open; those of a
        document tile it, or overlap and cover it, white space and characters without a token included. The text of a
        reference is its ``prefix`` and then its span. A document without any token has no reference.

    Raises:
        InputError: ``max_tokens`` cannot hold a single character of a document, the tokenizer gives no token to a
            part that had many within its document, or the batch's references have 2 GiB of text.
    """
    doc_ids, texts = to_array(doc_ids), to_array(texts)
    corpus = read_corpus(
        texts,
        titles if config.title_prefix else None,
        tokenizer,
        boundary=config.boundary,
        max_title_tokens=config.max_title_tokens,
    )
    if corpus.offsets[-1] == corpus.offsets[0]:
        return CHUNKS.empty_table()
    pieces = cut_documents(
        corpus,
        tokenizer,
        max_tokens=config.max_tokens,
        min_fill=config.min_fill,
        overlap_tokens=config.overlap_tokens,
    )
    pieces = mend_pieces(pieces, corpus, tokenizer, max_tokens=config.max_tokens, boundary=config.boundary)
    return make_table(doc_ids, pieces, corpus, tokenizer.tokenizer_id)
