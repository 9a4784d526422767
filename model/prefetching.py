"""Loads for the next chunk while the current one is decoded.

The next memories are asked for with the last 64 tokens, which are not all known before the chunk ends. But most of
them are, and nearly the same question mostly finds the same memories: they are looked up and read ahead, into the cache
of :class:`model.fetching.FetchedMemories`. What a chunk reads is still decided by the question as the method asks it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from model.knowledge import Knowledge
from schemas.errors import BankError


def use_one_core() -> None:
    """Lets FAISS search on one core in this thread, which is not the one of the model.

    Once there are more OpenMP threads than cores, all of them go to sleep between operations, those of the model too:
    decoding was half as slow again for as long as a second team of threads was there.
    """
    import faiss

    faiss.omp_set_num_threads(1)


def _read_ahead(knowledge: Knowledge, texts: Sequence[str], num_memories: int) -> None:
    hits = knowledge.retriever.search(texts, num_memories)
    knowledge.memories.read_ahead(list(dict.fromkeys(hit.ref_id for of_text in hits for hit in of_text)))


class Prefetcher:
    """Reads memories ahead in a thread of its own, one question at a time."""

    def __init__(self) -> None:
        """Makes the thread."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=use_one_core)
        self._running: Future[None] | None = None

    def start(self, knowledge: Knowledge, texts: Sequence[str], num_memories: int) -> None:
        """Begins to read what texts like these will want."""
        self.finish()
        self._running = self._pool.submit(_read_ahead, knowledge, texts, num_memories)

    def finish(self) -> None:
        """Waits until nothing is being read; the search may then be used by others.

        A memory that cannot be read is no error here: it may not be wanted, and whoever wants it is told.
        """
        running, self._running = self._running, None
        error = None if running is None else running.exception()
        if error is not None and not isinstance(error, BankError):
            raise error

    def __enter__(self) -> "Prefetcher":
        """Returns the prefetcher itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, after what it is reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)
