"""``memory3 generate --cite``: the chunks of what was generated, with the references and documents they owe it to.

the last generation of a generator -> citations (:mod:`model.citing`) -> documents of the references -> printed
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flows.serving.growing_text import UNFINISHED
from model.citing import CONFIRMED, Citation, CitedChunk, CitedText, Citer, list_reads
from model.fetching import BankMemories
from model.generating import Generator
from schemas.bank import Bank
from schemas.errors import InputError

MAX_DOCUMENTS = 5
"""Documents of a reference that are named; what stands on every page stands in many."""

BEGINNING_CHARS = 120
"""Of a reference's text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitedSource:
    """A reference that is cited.

    Attributes:
        number: what the text calls it: 1 for the first that is cited.
        ref_id: the reference.
        beginning: how its text begins.
        documents: the first documents it stands in.
        num_documents: in how many it does.
    """

    number: int
    ref_id: str
    beginning: str
    documents: tuple[str, ...]
    num_documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitingText:
    """A generated text with its citations.

    Attributes:
        chunks: its chunks.
        texts: their texts, which join to the whole.
        sources: what they cite, by reference.
    """

    chunks: list[CitedChunk]
    texts: list[str]
    sources: dict[str, CitedSource]

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the chunks as JSON values."""
        return [
            {
                "first_token": chunk.first_token,
                "num_tokens": len(chunk.tokens),
                "text": text,
                "logprob": chunk.logprob,
                "support": chunk.support,
                "noise": chunk.noise,
                "citations": [self._describe(citation) for citation in chunk.citations],
            }
            for chunk, text in zip(self.chunks, self.texts, strict=True)
        ]

    def _describe(self, citation: Citation) -> dict[str, Any]:
        source = dataclasses.asdict(self.sources[citation.ref_id])
        return {**source, **dataclasses.asdict(citation), "confirmed": citation.verdict == CONFIRMED}


def cut_texts(decode: Callable[[Sequence[int]], str], chunks: Sequence[CitedChunk]) -> list[str]:
    """Returns the texts of chunks, which join to the whole: a letter of two chunks belongs to the one that ends it."""
    tokens: list[int] = []
    texts = []
    shown = ""
    for place, chunk in enumerate(chunks):
        tokens += chunk.tokens
        text = decode(tokens)
        if place < len(chunks) - 1:
            text = text.rstrip(UNFINISHED)
        texts.append(text[len(shown) :])
        shown = text
    return texts


def number_sources(bank: Bank, chunks: Sequence[CitedChunk]) -> dict[str, CitedSource]:
    """Returns the references that chunks cite, numbered in the order in which they come, with their documents.

    Raises:
        BankFormatError: a table is missing or damaged.
    """
    ref_ids = list(dict.fromkeys(citation.ref_id for chunk in chunks for citation in chunk.citations))
    if not ref_ids:
        return {}
    texts = bank.read_references(ref_ids, ["text"])["text"].to_pylist()
    documents: dict[str, dict[str, None]] = {ref_id: {} for ref_id in ref_ids}
    for place in bank.read_rows("occurrences", "ref_id", ref_ids, ["ref_id", "doc_id"]).to_pylist():
        documents[place["ref_id"]][place["doc_id"]] = None
    return {
        ref_id: CitedSource(
            number=number,
            ref_id=ref_id,
            beginning=" ".join(text.split())[:BEGINNING_CHARS],
            documents=tuple(documents[ref_id])[:MAX_DOCUMENTS],
            num_documents=len(documents[ref_id]),
        )
        for number, (ref_id, text) in enumerate(zip(ref_ids, texts, strict=True), start=1)
    }


def cite_generation(generator: Generator, *, end_token_id: int | None = None) -> list[CitingText]:
    """Returns the citations of all that a generator has generated last.

    Args:
        generator: reads memories of a bank at hand.
        end_token_id: a token at which texts end, beside those of the model.

    Raises:
        InputError: nothing was read that could be cited.
    """
    memories = generator.memories
    if not isinstance(memories, BankMemories):
        raise InputError("only a text that read the memories of a bank at hand can cite them; give --bank FOLDER")
    trace = generator.trace
    texts: list[CitedText | None] = []
    for prompt, tokens, chunks in zip(trace.contexts, trace.generated, trace.chunks, strict=True):
        generated = tokens[: tokens.index(end_token_id)] if end_token_id in tokens else tokens
        reads = list_reads(chunks, len(prompt), len(generated))
        texts.append(CitedText(prompt=tuple(prompt), generated=tuple(generated), reads=reads) if generated else None)
    most = max((len(hits) for text in texts if text is not None for hits in text.reads), default=1)
    citer = Citer(generator.checkpoint, memories, num_memories=max(1, most))
    cited = iter(citer.cite([text for text in texts if text is not None]))
    found = []
    for text in texts:
        chunks_of_text = [] if text is None else next(cited)
        found.append(
            CitingText(
                chunks=chunks_of_text,
                texts=cut_texts(generator.checkpoint.tokenizer.decode, chunks_of_text),
                sources=number_sources(memories.bank, chunks_of_text),
            )
        )
    return found
