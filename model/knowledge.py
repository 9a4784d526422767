"""What the chunks of a generation retrieve from."""

import dataclasses
from collections.abc import Callable

from model.fetching import FetchedMemories
from model.retrieving import MemorySearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge:
    """One version of a bank: its search and its memories.

    Attributes:
        retriever: finds memories.
        memories: fetches them.
        version: number of the version, for those who ask which chunk has read which; None if nobody does.
    """

    retriever: MemorySearch
    memories: FetchedMemories
    version: int | None = None


KnowledgeSource = Callable[[], Knowledge]
"""Asked before each retrieval. All that it returns is of one model, and of memories of one shape."""
