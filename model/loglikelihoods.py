"""Log-likelihoods of continuations, many sequences at a time: by the ordinary model, or with memories.

What the lm-evaluation-harness asks of a model. With memories a prompt and what follows it read as in generation
(:mod:`model.generating`): each 64-token chunk of the prompt asks with its own text, the last one with the 64 tokens
that end the prompt; the first 64 tokens that are scored read what the prompt's last chunk read, and every 64 after
those ask with the 64 before them. A score is therefore the probability that generation would give the token. A document
has no prompt: its chunks count from its beginning, each asks with the chunk before it, and the first reads nothing. So
no token that is scored is part of the query of its own chunk, or of one before it.

Sequences are padded on the right, where nothing that is scored sees it; neither their order nor the size of a batch
enters a score beyond the rounding of a sum.

Shape letters: B sequences, T tokens, C chunks, M memories a chunk, L memory layers, E hidden size.
"""

import dataclasses
from collections.abc import Sequence

import torch

from model.checkpoint import Checkpoint
from model.chunked_reading import MemoryContext
from model.fresh_memories import MemorySource
from model.overlap_filter import Questions, QuestionSearch
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, check_memories_read, read_sequences
from model.retrieving import Hit
from schemas.errors import InputError
from schemas.protocols import FloatArray, MaskArray

BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredSequence:
    """A context and what follows it.

    Attributes:
        context: tokens that are given, at least one.
        continuation: tokens that are scored, at least one.
        earlier: None where the context is a prompt. For a part of a document the tokens that stand before it: they are
            not read, but the first chunk asks with the end of them.
        questions: texts that no reference it reads may give away, see :mod:`model.overlap_filter`.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    earlier: tuple[int, ...] | None = None
    questions: Questions = ()

    def __post_init__(self) -> None:
        """Checks that there is something to score, and something before it."""
        if not self.context or not self.continuation:
            raise ValueError(
                f"a context of {len(self.context)} and a continuation of {len(self.continuation)} tokens; give one "
                "token of each at least"
            )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Context and continuation."""
        return self.context + self.continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The scores of a continuation.

    Attributes:
        logprobs: of each token in nats, (tokens,) float64.
        is_likeliest: whether each token is the one of the highest probability.
        attention: the attention that the memories of each chunk got, summed over tokens and heads, (memory layers,
            chunks, memories); None where nothing was read.
    """

    logprobs: FloatArray
    is_likeliest: MaskArray
    attention: FloatArray | None = None

    @property
    def total(self) -> float:
        """The log-likelihood of the continuation in nats."""
        return float(self.logprobs.sum())

    @property
    def is_greedy(self) -> bool:
        """Whether greedy generation gives the continuation."""
        return bool(self.is_likeliest.all())


@dataclasses.dataclass(kw_only=True)
class ScoringCounts:
    """What was scored so far.

    Attributes:
        num_sequences: sequences.
        num_tokens: tokens of their continuations.
        num_reading: tokens that had memories to read, prompts included.
        attention: the attention that memories got from these, summed over tokens, heads and memory layers.
    """

    num_sequences: int = 0
    num_tokens: int = 0
    num_reading: int = 0
    attention: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """The chunks of a sequence.

    Attributes:
        chunk_of_token: the chunk of each token that is read, all but the last, (T - 1,).
        queries: for each chunk the tokens it asks with.
    """

    chunk_of_token: list[int]
    queries: list[tuple[int, ...]]


def plan_chunks(sequence: ScoredSequence) -> ChunkPlan:
    """Cuts a sequence into chunks, and says what each of them asks with."""
    tokens, num_given = sequence.tokens, len(sequence.context)
    num_read = len(tokens) - 1
    if sequence.earlier is not None:
        queries = [(*sequence.earlier, *sequence.context)[-CHUNK_TOKENS:]]
        queries += [tokens[start - CHUNK_TOKENS : start] for start in range(CHUNK_TOKENS, num_read, CHUNK_TOKENS)]
        return ChunkPlan(chunk_of_token=[place // CHUNK_TOKENS for place in range(num_read)], queries=queries)
    starts = range(0, num_given, CHUNK_TOKENS)
    ends = [min(start + CHUNK_TOKENS, num_given) for start in starts]
    queries = [tokens[max(0, end - CHUNK_TOKENS) : end] for end in ends]
    last = len(queries) - 1
    queries += [
        tokens[start - CHUNK_TOKENS : start] for start in range(num_given + CHUNK_TOKENS, len(tokens), CHUNK_TOKENS)
    ]
    # As in generation, the token that completes a chunk reads what the next one reads: it gives the first of that.
    chunks = [
        place // CHUNK_TOKENS if place < num_given else last + (place + 1 - num_given) // CHUNK_TOKENS
        for place in range(num_read)
    ]
    return ChunkPlan(chunk_of_token=chunks, queries=queries)


class SequenceScorer:
    """Scores sequences, many at a time.

    Attributes:
        checkpoint: the model.
        counts: what was scored so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        search: QuestionSearch | None = None,
        memories: MemorySource | None = None,
        *,
        num_memories: int = MEMORIES_PER_CHUNK,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Joins a model with a bank; without one it is the ordinary model, without the prefix.

        Args:
            checkpoint: the model.
            search: finds memories; None if :meth:`score_planned` alone is asked.
            memories: fetches them.
            num_memories: memories a chunk.
            batch_size: sequences that are read together.

        Raises:
            InputError: a number is below 1.
        """
        for name, value in (("num_memories", num_memories), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"evaluation: {name} is {value}, must be at least 1")
        if search is not None and memories is None:
            raise ValueError("give the memories of the bank that is searched")
        self.checkpoint = checkpoint
        self._search, self._memories = search, memories
        self._num_memories, self._batch_size = num_memories, batch_size
        self.counts = ScoringCounts()

    @property
    def max_tokens(self) -> int:
        """The longest sequence, its last token aside, which is not read."""
        num_before = 0 if self._memories is None else self.checkpoint.context_start
        return int(self.checkpoint.config.max_position_embeddings) - num_before

    @property
    def attention_share(self) -> float:
        """The part of the attention in memory layers that went to memories, of all tokens that had some to read."""
        num_layers, num_heads = len(self.checkpoint.memory_layers), int(self.checkpoint.config.num_attention_heads)
        return self.counts.attention / max(1, self.counts.num_reading * num_layers * num_heads)

    def score(self, sequences: Sequence[ScoredSequence]) -> list[TokenScores]:
        """Returns the scores of each sequence, in their order.

        Raises:
            InputError: a sequence does not fit the model.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        if self._search is None and self._memories is not None:
            raise ValueError("nothing says what these sequences read; give a search, or call score_planned")
        plans = [plan_chunks(sequence) for sequence in sequences] if self._search is not None else []
        return self.score_planned(sequences, plans, self._retrieve(sequences, plans))

    def score_planned(
        self,
        sequences: Sequence[ScoredSequence],
        plans: Sequence[ChunkPlan] = (),
        hits: Sequence[Sequence[Sequence[Hit]]] = (),
    ) -> list[TokenScores]:
        """Returns the scores of sequences that are told what they read, in their order.

        Args:
            sequences: what is scored.
            plans: the chunks of each; not looked at by the ordinary model.
            hits: for each chunk of each sequence the references it reads.

        Raises:
            InputError: a sequence does not fit the model.
            MemoryNotReadError: memories were given but got no attention.
        """
        longest = max((len(sequence.tokens) - 1 for sequence in sequences), default=0)
        if longest > self.max_tokens:
            raise InputError(f"a sequence has {longest} tokens; the model has room for {self.max_tokens}: shorten it")
        # Sequences of about the same length go together: the shorter ones of a batch are padded.
        order = sorted(range(len(sequences)), key=lambda place: (-len(sequences[place].tokens), place))
        scores: dict[int, TokenScores] = {}
        for start in range(0, len(order), self._batch_size):
            group = order[start : start + self._batch_size]
            batch = [sequences[place] for place in group]
            if self._memories is None:
                found = self._score_batch(batch)
            else:
                found = self._score_batch(batch, [plans[place] for place in group], [hits[place] for place in group])
            scores |= zip(group, found, strict=True)
            self.counts.num_sequences += len(batch)
            self.counts.num_tokens += sum(len(sequence.continuation) for sequence in batch)
        return [scores[place] for place in range(len(sequences))]

    def _retrieve(self, sequences: Sequence[ScoredSequence], plans: Sequence[ChunkPlan]) -> list[list[list[Hit]]]:
        """Returns for each chunk of each sequence the references it reads."""
        if self._search is None:
            return []
        texts, questions = [], []
        for sequence, plan in zip(sequences, plans, strict=True):
            texts += [self.checkpoint.tokenizer.decode(query) for query in plan.queries]
            questions += [sequence.questions] * len(plan.queries)
        found = iter(self._search.search(texts, questions, self._num_memories))
        return [[next(found) for _ in plan.queries] for plan in plans]

    @torch.inference_mode()
    def _score_batch(
        self,
        batch: Sequence[ScoredSequence],
        plans: Sequence[ChunkPlan] = (),
        hits: Sequence[Sequence[Sequence[Hit]]] = (),
    ) -> list[TokenScores]:
        inputs = [sequence.tokens[:-1] for sequence in batch]
        tokens_BT = self._pad(inputs, 0)
        attention_BLCM: Sequence[FloatArray | None] = [None] * len(batch)
        if self._memories is None:
            hidden_BTE, _ = read_sequences(self.checkpoint, tokens_BT, with_prefix=False)
        else:
            hidden_BTE, context = self._read_memories(tokens_BT, plans, hits)
            if context is not None and context.attention_LBCM is not None:
                attention_BLCM = list(context.attention_LBCM.transpose(0, 1).double().cpu().numpy())
        scores = []
        for sequence, hidden_TE, attention_LCM in zip(batch, hidden_BTE, attention_BLCM, strict=True):
            first = len(sequence.context) - 1
            logits_TV = self.checkpoint.head(hidden_TE[first : first + len(sequence.continuation)]).float()
            wanted_T = torch.tensor(sequence.continuation, device=logits_TV.device)
            logprobs_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])[:, 0]
            scores.append(
                TokenScores(
                    logprobs=logprobs_T.double().cpu().numpy(),
                    is_likeliest=(logits_TV.argmax(-1) == wanted_T).cpu().numpy(),
                    attention=attention_LCM,
                )
            )
        return scores

    def _read_memories(
        self, tokens_BT: torch.Tensor, plans: Sequence[ChunkPlan], hits: Sequence[Sequence[Sequence[Hit]]]
    ) -> tuple[torch.Tensor, MemoryContext | None]:
        assert self._memories is not None
        ref_ids = sorted({hit.ref_id for of_sequence in hits for of_chunk in of_sequence for hit in of_chunk})
        if not ref_ids:
            return read_sequences(self.checkpoint, tokens_BT)
        place = {ref_id: row for row, ref_id in enumerate(ref_ids)}
        num_chunks = max(map(len, hits))
        index_BCM = torch.full((len(hits), num_chunks, self._num_memories), -1)
        for row, of_sequence in enumerate(hits):
            for chunk, of_chunk in enumerate(of_sequence):
                index_BCM[row, chunk, : len(of_chunk)] = torch.tensor(
                    [place[hit.ref_id] for hit in of_chunk], dtype=torch.int64
                )
        index_BCM = index_BCM.to(self.checkpoint.device)
        chunks_BT = self._pad([plan.chunk_of_token for plan in plans], -1)
        memories = self._memories.fetch(ref_ids)
        hidden_BTE, context = read_sequences(self.checkpoint, tokens_BT, memories, index_BCM, chunks_BT)
        if context is not None and context.attention_LBCM is not None:
            check_memories_read(context, index_BCM)
            self.counts.attention += float(context.attention_LBCM.double().sum())
            has_memory_BT = (index_BCM >= 0).any(-1).gather(1, chunks_BT.clamp(min=0)) & (chunks_BT >= 0)
            self.counts.num_reading += int(has_memory_BT.sum())
        return hidden_BTE, context

    def _pad(self, rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, rows))
        padded = [[*row, *[filler] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, device=self.checkpoint.device)
