"""Citations: which memories a chunk of text owes its words to, by attention, and whether leaving them out says so too.

    prompt, text, what each chunk read (from the traces) -> variants -> log-likelihoods -> citations of each chunk

The share of a chunk's attention that a memory got names it as a citation; attention alone proves nothing. Therefore
each memory is left out in turn and the chunk's own tokens are read again, told and not generated: the **support** of a
memory is by how many nats the chunk is likelier with it than without, all other memories being read as before. Earlier
chunks keep theirs, and later ones are not read. The layout is that of generation (:mod:`model.generating`): token by
token the same memories, so the numbers are those of the model that wrote the text. The first chunk inherits what the
end of the prompt has read: there a memory is left out of both, as if it had not been retrieved.

Likelihoods are those of the model itself, before temperature and penalty of repetition.

Shape letters: L memory layers, C chunks, M memories a chunk.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.chunk_memories import ChunkTrace
from model.fetching import FetchedMemories
from model.loglikelihoods import BATCH_SIZE, ChunkPlan, ScoredSequence, SequenceScorer, TokenScores, plan_chunks
from model.overlap_filter import FilteredSearch, Questions
from model.reading import CHUNK_TOKENS
from model.retrieving import Hit
from schemas.protocols import FloatArray

CONFIRMED, SUPPORTED, UNCLEAR, REFUTED = "confirmed", "supported", "unclear", "refuted"
"""What leaving a memory out says: the text was likelier because of it, and of no other more; because of it, but of
another more; neither likelier nor less likely beyond noise; less likely."""

LEAST_SUPPORT = 0.1
"""Support in nats below which nothing is said: a chunk that is a tenth likelier owes a memory next to nothing."""

NOISE_FACTOR = 16.0
"""What rounding may do to the log-likelihood of T tokens, in units of the type's last place of 1 and of the square root
of T: in bfloat16 five times of what memories read in another order were seen to change, which changes nothing but
rounding. In float32 rounding is far below the least support."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitedText:
    """A finished text, and what its chunks read.

    Attributes:
        prompt: tokens of the prompt, with what a context begins with.
        generated: tokens that follow it, at least one.
        reads: the references of each chunk: those of the prompt, then those of what follows. The first of these has
            what the last of the prompt has.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    reads: tuple[tuple[Hit, ...], ...]

    def __post_init__(self) -> None:
        """Checks that every chunk says what it read."""
        expected = self.num_prompt_chunks + self.num_chunks
        if not self.prompt or not self.generated or len(self.reads) != expected:
            raise ValueError(
                f"a prompt of {len(self.prompt)} and {len(self.generated)} generated tokens have {expected} chunks, "
                f"not {len(self.reads)}; give a token of each at least, and what each chunk has read"
            )

    @property
    def num_prompt_chunks(self) -> int:
        """Chunks of the prompt."""
        return math.ceil(len(self.prompt) / CHUNK_TOKENS)

    @property
    def num_chunks(self) -> int:
        """Chunks of what follows the prompt."""
        return math.ceil(len(self.generated) / CHUNK_TOKENS)

    def list_tokens(self, number: int) -> tuple[int, ...]:
        """Returns the tokens of a generated chunk."""
        return self.generated[number * CHUNK_TOKENS : (number + 1) * CHUNK_TOKENS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Citation:
    """A memory that a chunk read.

    Attributes:
        ref_id: the reference.
        score: its similarity with the query.
        attention: its share of the attention that the chunk's tokens gave to memories, averaged over layers. The
            tokens are those that foretell the chunk: from the one before it to its last but one.
        support: by how many nats the chunk is likelier with it.
        verdict: :data:`CONFIRMED`, :data:`SUPPORTED`, :data:`UNCLEAR` or :data:`REFUTED`.
    """

    ref_id: str
    score: float
    attention: float
    support: float
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitedChunk:
    """A generated chunk with its citations.

    Attributes:
        first_token: its first token, counted from the beginning of the context.
        tokens: its tokens.
        logprob: their log-likelihood in nats, with all memories.
        support: by how many nats they are likelier with its memories than with none.
        noise: support that is no more than this, in nats, is none.
        citations: its memories, the one with the largest share of the attention first.
    """

    first_token: int
    tokens: tuple[int, ...]
    logprob: float
    support: float
    noise: float
    citations: tuple[Citation, ...]


def list_reads(traces: Sequence[ChunkTrace], num_prompt: int, num_generated: int) -> tuple[tuple[Hit, ...], ...]:
    """Returns what each chunk of a text read, as :class:`CitedText` wants it, from the traces of its generation.

    Args:
        traces: of the chunks that read anything.
        num_prompt: tokens of the prompt.
        num_generated: tokens that follow it.
    """
    by_place = {trace.first_token: tuple(trace.hits) for trace in traces}
    reads = [by_place.get(start, ()) for start in range(0, num_prompt, CHUNK_TOKENS)]
    # The first generated chunk has no trace of its own where a single token was generated: it inherits.
    reads += [
        by_place.get(num_prompt + start, ()) if start else reads[-1] for start in range(0, num_generated, CHUNK_TOKENS)
    ]
    return tuple(reads)


def retrieve_reads(
    checkpoint: Checkpoint,
    search: FilteredSearch,
    texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    questions: Sequence[Questions],
    num_memories: int,
) -> list[CitedText]:
    """Returns texts that nobody generated with what their chunks would have read, had they been.

    Args:
        checkpoint: the model.
        search: finds references.
        texts: for each the tokens of a prompt and those that follow it.
        questions: for each what no reference may give away.
        num_memories: memories a chunk.
    """
    plans = [plan_chunks(ScoredSequence(context=prompt, continuation=rest)) for prompt, rest in texts]
    queries = [checkpoint.tokenizer.decode(query) for plan in plans for query in plan.queries]
    asked = [of_text for of_text, plan in zip(questions, plans, strict=True) for _ in plan.queries]
    found = iter(search.search(queries, asked, num_memories))
    cited = []
    for (prompt, rest), plan in zip(texts, plans, strict=True):
        hits = [tuple(next(found)) for _ in plan.queries]
        num_prompt = math.ceil(len(prompt) / CHUNK_TOKENS)
        reads = (*hits[:num_prompt], hits[num_prompt - 1], *hits[num_prompt:])
        cited.append(CitedText(prompt=prompt, generated=rest, reads=reads))
    return cited


class Citer:
    """Says which memories the chunks of texts owe their words to."""

    def __init__(
        self, checkpoint: Checkpoint, memories: FetchedMemories, *, num_memories: int, batch_size: int = BATCH_SIZE
    ) -> None:
        """Joins a model with the memories that texts have read.

        Args:
            checkpoint: the model.
            memories: fetches them.
            num_memories: memories a chunk at most.
            batch_size: variants that are read together.

        Raises:
            InputError: a number is below 1.
        """
        self._scorer = SequenceScorer(checkpoint, None, memories, num_memories=num_memories, batch_size=batch_size)
        self._unit = float(torch.finfo(checkpoint.dtype).eps)

    def cite(self, texts: Sequence[CitedText]) -> list[list[CitedChunk]]:
        """Returns the generated chunks of texts with their citations.

        A chunk that read n memories takes n + 2 readings of the text up to its end; those of all texts are read in
        common batches.

        Raises:
            InputError: a text does not fit the model.
            MemoryNotReadError: memories were read but got no attention.
        """
        places = [(text, number) for text in texts for number in range(text.num_chunks)]
        found = iter(self._cite_chunks(places))
        return [[next(found) for _ in range(text.num_chunks)] for text in texts]

    def cite_chunk(self, text: CitedText, number: int) -> CitedChunk:
        """Returns a single generated chunk with its citations; see :meth:`cite`."""
        return self._cite_chunks([(text, number)])[0]

    def _cite_chunks(self, places: Sequence[tuple[CitedText, int]]) -> list[CitedChunk]:
        sequences: list[ScoredSequence] = []
        plans: list[ChunkPlan] = []
        reads: list[list[tuple[Hit, ...]]] = []
        for text, number in places:
            sequence, plan = lay_out_chunk(text, number)
            variants = list_variants(text, number)
            sequences += [sequence] * len(variants)
            plans += [plan] * len(variants)
            reads += variants
        scores = iter(self._scorer.score_planned(sequences, plans, reads))
        return [
            self._judge(text, number, [next(scores) for _ in list_variants(text, number)]) for text, number in places
        ]

    def _judge(self, text: CitedText, number: int, scores: Sequence[TokenScores]) -> CitedChunk:
        tokens, hits = text.list_tokens(number), text.reads[text.num_prompt_chunks + number]
        whole, *without = (score.total for score in scores)
        noise = max(LEAST_SUPPORT, NOISE_FACTOR * self._unit * math.sqrt(len(tokens)))
        supports = [whole - other for other in without[: len(hits)]]
        shares = _share_attention(scores[0].attention, text.num_prompt_chunks + number, len(hits))
        citations = [
            Citation(ref_id=hit.ref_id, score=hit.score, attention=share, support=support, verdict=verdict)
            for hit, share, support, verdict in zip(
                hits, shares, supports, judge_supports(supports, noise), strict=True
            )
        ]
        return CitedChunk(
            first_token=len(text.prompt) + number * CHUNK_TOKENS,
            tokens=tokens,
            logprob=whole,
            support=whole - without[-1] if hits else 0.0,
            noise=noise,
            citations=tuple(sorted(citations, key=lambda citation: -citation.attention)),
        )


def judge_supports(supports: Sequence[float], noise: float) -> list[str]:
    """Returns the verdict on each memory of a chunk.

    A citation is confirmed if its support is beyond noise and no other memory of the chunk has more: of all that
    the chunk could name it is the one that the text owes most to.

    Args:
        supports: in nats.
        noise: support that is none.
    """
    most = max(supports, default=0.0)
    return [
        REFUTED if support < -noise else UNCLEAR if support <= noise else CONFIRMED if support == most else SUPPORTED
        for support in supports
    ]


def lay_out_chunk(text: CitedText, number: int) -> tuple[ScoredSequence, ChunkPlan]:
    """Returns a text up to the end of a generated chunk, whose tokens are scored, and which chunk each token reads for.

    The last token of the prompt, which foretells the first generated one, belongs to the chunk of that one, and so on:
    in every chunk the tokens that foretell it.
    """
    num_given, num_before = len(text.prompt), number * CHUNK_TOKENS
    tokens = text.list_tokens(number)
    sequence = ScoredSequence(context=(*text.prompt, *text.generated[:num_before]), continuation=tokens)
    chunks = [
        place // CHUNK_TOKENS
        if place < num_given - 1
        else text.num_prompt_chunks + (place + 1 - num_given) // CHUNK_TOKENS
        for place in range(num_given + num_before + len(tokens) - 1)
    ]
    return sequence, ChunkPlan(chunk_of_token=chunks, queries=[])


def list_variants(text: CitedText, number: int) -> list[list[tuple[Hit, ...]]]:
    """Returns what the chunks of a text read up to a generated one: all; each of its memories left out; all of them.

    Where the chunk read nothing there is only the first.
    """
    last = text.num_prompt_chunks + number
    reads = list(text.reads[: last + 1])
    hits = reads[last]
    variants = [reads]
    leaving = [{hit.ref_id} for hit in hits] + [{hit.ref_id for hit in hits}]
    # The first generated chunk and the end of the prompt have read the same memories.
    touched = range(last if number else last - 1, last + 1)
    for left_out in leaving if hits else []:
        variant = list(reads)
        for chunk in touched:
            variant[chunk] = tuple(hit for hit in reads[chunk] if hit.ref_id not in left_out)
        variants.append(variant)
    return variants


def _share_attention(attention_LCM: FloatArray | None, chunk: int, num_hits: int) -> list[float]:
    """Returns the part of the memory attention of a chunk that each of its memories got, averaged over layers."""
    if attention_LCM is None or not num_hits:
        return [0.0] * num_hits
    received_LM = attention_LCM[:, chunk, :num_hits]
    shares_LM = received_LM / np.maximum(received_LM.sum(-1, keepdims=True), 1e-30)
    return [float(share) for share in shares_LM.mean(0)]
