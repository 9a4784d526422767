"""The memories that the sequences of a generation read, chunk by chunk: retrieved, fetched, laid out, and noted.

Stands between retrieval and fetching, which know banks, and the reading session, which knows the model: all chunks of
the prompts are asked for at once, and after every 64 generated tokens those are the next question of each sequence.

Shape letters: B sequences, L memory layers, C chunks, M memories a chunk.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from model.checkpoint import Checkpoint
from model.knowledge import KnowledgeSource
from model.prefetching import Prefetcher
from model.reading import CHUNK_TOKENS, ReadingSession
from model.retrieving import Hit
from model.writing import Memories

FindHits = Callable[[Sequence[int], Sequence[str], int], list[list[Hit]]]
"""Returns references for texts: given the sequence that each text is of, the texts, and how many references."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkTrace:
    """What one chunk read.

    Attributes:
        first_token: place of its first token in the context.
        version: version of the bank that it retrieved from; None if nobody asks.
        hits: the references it retrieved, or inherited, best first.
        attention: the share of the memory attention each of them got, averaged over layers; sums to 1. Empty for
            references that stand in the prompt as text.
    """

    first_token: int
    hits: list[Hit]
    attention: list[float]
    version: int | None = None


@dataclasses.dataclass(kw_only=True)
class GenerationTrace:
    """What a generation read, and what came of it.

    Attributes:
        chunks: for each sequence its chunks.
        num_retrievals: queries asked so far.
        contexts: tokens of each prompt.
        generated: tokens that each sequence has got so far.
    """

    chunks: list[list[ChunkTrace]]
    num_retrievals: int = 0
    contexts: list[list[int]] = dataclasses.field(default_factory=list)
    generated: list[list[int]] = dataclasses.field(default_factory=list)


class ChunkMemories:
    """Reads prompts and keeps the memories of their sequences up to date while they grow."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: KnowledgeSource,
        trace: GenerationTrace,
        *,
        num_memories: int,
        num_new_tokens: int,
        prefetcher: Prefetcher | None = None,
        prefetch_tokens: int = 0,
        find: FindHits | None = None,
    ) -> None:
        """Joins a model with the memories of a bank.

        Args:
            checkpoint: the model that reads.
            source: says what is retrieved from.
            trace: what is read is noted here.
            num_memories: memories a chunk.
            num_new_tokens: tokens to be generated at most.
            prefetcher: reads ahead; None to read when memories are wanted.
            prefetch_tokens: tokens before the end of a chunk at which reading ahead begins.
            find: finds memories in the place of the retriever, where they depend on the sequence.
        """
        self._checkpoint = checkpoint
        self._source, self._knowledge = source, source()
        self._find = find
        self._trace, self._num_memories, self._num_new_tokens = trace, num_memories, num_new_tokens
        self._prefetcher, self._prefetch_tokens = prefetcher, prefetch_tokens
        self._lengths: list[int] = []
        self._generated: list[list[int]] = []
        self._hits: list[list[Hit]] = []
        self._num_before = 0

    def _retrieve(self, rows: Sequence[int], queries: Sequence[Sequence[int]]) -> list[list[Hit]]:
        self._knowledge = self._source()
        texts = [self._checkpoint.tokenizer.decode(query) for query in queries]
        self._trace.num_retrievals += len(queries)
        if not queries:
            return []
        if self._find is not None:
            return self._find(rows, texts, self._num_memories)
        return self._knowledge.retriever.search(texts, self._num_memories)

    def _fetch(self, hits: Sequence[Sequence[Hit]]) -> tuple[Memories | None, dict[str, int]]:
        distinct = list(dict.fromkeys(hit.ref_id for of_chunk in hits for hit in of_chunk))
        places = {ref_id: row for row, ref_id in enumerate(distinct)}
        return (self._knowledge.memories.fetch(distinct) if distinct else None), places

    def _index(self, hits: Sequence[Sequence[Hit]], places: dict[str, int]) -> torch.Tensor:
        width = self._num_memories
        rows = [[places[hit.ref_id] for hit in of_chunk] + [-1] * (width - len(of_chunk)) for of_chunk in hits]
        return torch.tensor(rows, device=self._checkpoint.device)

    def read_prompts(self, contexts: Sequence[Sequence[int]], num_expected: int) -> tuple[ReadingSession, torch.Tensor]:
        """Reads all chunks of all prompts in one call.

        Args:
            contexts: the tokens of each prompt.
            num_expected: tokens that a context will have in the end.

        Returns:
            The session that goes on, holding the memories of the last chunks, and the last logits (B, words).

        Raises:
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        device = self._checkpoint.device
        starts = [range(0, len(tokens), CHUNK_TOKENS) for tokens in contexts]
        # A last chunk that is not full asks with the 64 tokens that end the prompt: more words, the same place.
        queries = [
            tokens[max(0, min(start + CHUNK_TOKENS, len(tokens)) - CHUNK_TOKENS) : start + CHUNK_TOKENS]
            for tokens, of_context in zip(contexts, starts, strict=True)
            for start in of_context
        ]
        rows = [row for row, of_context in enumerate(starts) for _ in of_context]
        found = iter(self._retrieve(rows, queries))
        hits = [[next(found) for _ in of_context] for of_context in starts]
        memories, places = self._fetch([of_chunk for of_context in hits for of_chunk in of_context])
        num_chunks = max(map(len, hits))
        padded = [[*of_context, *[[]] * (num_chunks - len(of_context))] for of_context in hits]
        index_BCM = torch.stack([self._index(of_context, places) for of_context in padded])

        tokens_BT, lengths_B = pad_contexts(contexts, device)
        place = torch.arange(tokens_BT.shape[1], device=device)[None] - (tokens_BT.shape[1] - lengths_B[:, None])
        num_slots = self._num_memories * self._knowledge.memories.num_slots
        session = ReadingSession(
            self._checkpoint, batch_size=len(contexts), num_held_slots=num_slots, num_expected=num_expected
        )
        logits, read = session.read(
            tokens_BT, memories, index_BCM, place.clamp(min=0) // CHUNK_TOKENS, lengths_B=lengths_B, last_only=True
        )
        if read is not None and read.attention_LBCM is not None:
            shares_LBCM = _share(read.attention_LBCM)
            for row, of_context in enumerate(hits):
                for chunk, of_chunk in enumerate(of_context):
                    self._note(row, chunk * CHUNK_TOKENS, of_chunk, shares_LBCM[:, row, chunk])
        self._lengths = [len(tokens) for tokens in contexts]
        self._generated = [[] for _ in contexts]
        self._hold(session, [of_context[-1] for of_context in hits], memories, places)
        return session, logits[:, -1]

    def _hold(
        self, session: ReadingSession, hits: list[list[Hit]], memories: Memories | None, places: dict[str, int]
    ) -> None:
        self._session, self._hits = session, hits
        self._num_before = len(self._generated[0])
        if memories is not None:
            session.hold(memories, self._index(hits, places))

    def advance(self, tokens: Sequence[int], running: Sequence[bool], *, is_last: bool) -> None:
        """Takes note of the next token of each sequence; at the end of a chunk the next memories are laid out.

        Args:
            tokens: the tokens.
            running: which sequences have not ended; only these ask for further memories.
            is_last: nothing is generated after these tokens.
        """
        for of_sequence, token in zip(self._generated, tokens, strict=True):
            of_sequence.append(token)
        self._note_attention([row for row, alive in enumerate(running) if not alive])
        num_done = len(self._generated[0])
        num_left = -num_done % CHUNK_TOKENS
        if num_left == 0:
            self.note_attention()
        if is_last:
            return
        rows = [row for row, alive in enumerate(running) if alive]
        queries = [self._generated[row][-CHUNK_TOKENS:] for row in rows]
        if num_left == 0:
            if self._prefetcher is not None:
                self._prefetcher.finish()
            found = dict(zip(rows, self._retrieve(rows, queries), strict=True))
            hits = [found.get(row, []) for row in range(len(running))]
            self._hold(self._session, hits, *self._fetch(hits))
        elif self._prefetcher is not None and num_left == self._prefetch_tokens < self._num_new_tokens - num_done:
            texts = [self._checkpoint.tokenizer.decode(query) for query in queries]
            self._prefetcher.start(self._knowledge, texts, self._num_memories)

    def note_attention(self) -> None:
        """Notes what the current chunks have read since their memories were laid out, if anything."""
        self._note_attention(range(len(self._hits)))
        self._session.held = None

    def _note_attention(self, rows: Iterable[int]) -> None:
        """Notes it for some sequences, which are then done with these memories."""
        wanted = [row for row in rows if self._hits[row]]
        held = self._session.held
        received = held.sum_attention() if held is not None and wanted else None
        if received is None:
            return
        shares_LBM = _share(received)
        for row in wanted:
            self._note(row, self._lengths[row] + self._num_before, self._hits[row], shares_LBM[:, row])
            self._hits[row] = []

    def _note(self, row: int, first_token: int, hits: list[Hit], shares_LM: torch.Tensor) -> None:
        attention = shares_LM.mean(0).tolist()[: len(hits)]
        self._trace.chunks[row].append(
            ChunkTrace(first_token=first_token, hits=hits, attention=attention, version=self._knowledge.version)
        )


def _share(received: torch.Tensor) -> torch.Tensor:
    return (received / received.sum(-1, keepdim=True).clamp(min=1e-30)).cpu()


def pad_contexts(contexts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns contexts as one tensor (B, longest), padded on the left, and their lengths (B,)."""
    longest = max(map(len, contexts))
    rows = [[0] * (longest - len(tokens)) + list(tokens) for tokens in contexts]
    return torch.tensor(rows, device=device), torch.tensor([len(tokens) for tokens in contexts], device=device)
