"""The citations of an answer: found after its text has ended, a chunk at a time, in the thread of the model.

Where it stands: a batch (:mod:`flows.serving.batching`) calls this between the tokens of the prompts that go on, so
that nobody waits for more than one chunk's citations; a request that is given up ends with the chunk at hand.
"""

import dataclasses
import logging
from collections.abc import Callable

from flows.serving.editions import Edition
from flows.serving.errors import explain_error
from model.citing import CitedChunk, CitedText, Citer
from schemas.errors import BankError

_LOGGER = logging.getLogger(__name__)

MAX_CITED_TOKENS = 1024
"""Tokens of an answer whose citations are checked: each 64 of them are read once more for every memory."""

TOKENS_AT_ONCE = 4096
"""Tokens that are read together to check citations."""

CHANGED = "the bank has changed since this was generated, so that its citations cannot be checked; ask again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerCitations:
    """The citations of a text.

    Attributes:
        chunks: its chunks with their citations; empty if there is a problem.
        problem: why they could not be found; None if they were.
    """

    chunks: list[CitedChunk]
    problem: str | None = None


class AnswerCiter:
    """Finds the citations of a text, one chunk a step.

    What is read is the edition of the moment, and only if it is the one that the text has read: what was deleted is
    read for no citation either.
    """

    def __init__(
        self, find_edition: Callable[[], Edition], text: CitedText, versions: set[int], num_memories: int
    ) -> None:
        """Begins; nothing is computed before the first step.

        Args:
            find_edition: returns what is served at the moment.
            text: the text, with what its chunks have read.
            versions: the versions of the bank that it has read.
            num_memories: memories a chunk at most.
        """
        self._find_edition, self._text, self._versions = find_edition, text, versions
        self._num_memories = num_memories
        self._chunks: list[CitedChunk] = []

    def step(self) -> AnswerCitations | None:
        """Cites the next chunk.

        A memory that cannot be read is a problem of this text alone, whose answer is there already.

        Returns:
            All citations, once they are found or cannot be; None before.
        """
        edition = self._find_edition()
        if self._versions - {edition.version}:
            return AnswerCitations(chunks=[], problem=CHANGED)
        num_tokens = len(self._text.prompt) + len(self._text.generated)
        citer = Citer(
            edition.checkpoint,
            edition.memories,
            num_memories=self._num_memories,
            batch_size=max(1, TOKENS_AT_ONCE // num_tokens),
        )
        try:
            self._chunks.append(citer.cite_chunk(self._text, len(self._chunks)))
        except BankError as error:
            _LOGGER.error("version %d: citations: %s", edition.version, error)
            return AnswerCitations(chunks=[], problem=explain_error(error).body.message)
        return AnswerCitations(chunks=self._chunks) if len(self._chunks) == self._text.num_chunks else None
