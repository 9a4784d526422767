"""The loss of held-out text, without memory, with random memories and with retrieved ones.

Scoring is strictly causal: a chunk reads what the chunk before it retrieved, as in generation, so no query has seen
the tokens that are scored. The first chunk of a sequence reads nothing. Random memories are always reported beside
retrieved ones: what they gain is not knowledge.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, ReadingSession, check_memories_read, read_sequences
from model.retrieving import Retriever

SEQUENCE_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReport:
    """Mean losses in nats a token over the same tokens.

    Attributes:
        plain: the ordinary model without prefix and memories.
        none: with the prefix, no memories.
        random: with random memories of the bank.
        retrieved: with retrieved memories.
        num_tokens: tokens scored.
        num_passages: sequences they stand in.
    """

    plain: float
    none: float
    random: float
    retrieved: float
    num_tokens: int
    num_passages: int


def cut_passages(checkpoint: Checkpoint, texts: Sequence[str]) -> list[np.ndarray]:
    """Cuts texts into sequences of at most 512 tokens that begin with ``<s>``, dropping those under two chunks."""
    room = SEQUENCE_TOKENS - len(checkpoint.bos_token_ids)
    passages = []
    for ids in checkpoint.tokenizer.encode(texts):
        for start in range(0, len(ids), room):
            passage = np.concatenate((np.array(checkpoint.bos_token_ids, dtype=np.int64), ids[start : start + room]))
            if len(passage) >= 2 * CHUNK_TOKENS:
                passages.append(passage)
    return passages


def _sum_loss(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> float:
    """Sums the loss of the tokens past the first chunk: those that can read a memory."""
    first = CHUNK_TOKENS
    return float(
        torch.nn.functional.cross_entropy(logits_TV[first - 1 : -1].float(), tokens_T[first:], reduction="sum")
    )


@torch.inference_mode()
def measure_losses(
    checkpoint: Checkpoint,
    retriever: Retriever,
    memories: BankMemories,
    texts: Sequence[str],
    *,
    num_memories: int = MEMORIES_PER_CHUNK,
    seed: int = 0,
) -> LossReport:
    """Scores held-out texts in four ways; see :class:`LossReport`. Only tokens past the first chunk are scored."""
    passages = cut_passages(checkpoint, texts)
    generator = np.random.default_rng(seed)
    sums = {"plain": 0.0, "none": 0.0, "random": 0.0, "retrieved": 0.0}
    num_tokens = 0
    for passage in passages:
        tokens = torch.from_numpy(passage)[None].to(checkpoint.device)
        length = len(passage)
        num_tokens += length - CHUNK_TOKENS
        for name, with_prefix in (("plain", False), ("none", True)):
            logits, _ = ReadingSession(checkpoint, with_prefix=with_prefix).read(tokens)
            sums[name] += _sum_loss(logits[0], tokens[0])

        chunk = torch.arange(length, device=checkpoint.device)[None] // CHUNK_TOKENS
        starts = range(0, length - CHUNK_TOKENS, CHUNK_TOKENS)
        queries = [checkpoint.tokenizer.decode(passage[start : start + CHUNK_TOKENS]) for start in starts]
        found = retriever.search_rows(queries, num_memories)[0]
        drawn = generator.integers(0, retriever.num_references, found.shape)
        for name, rows in (("random", drawn), ("retrieved", found)):
            distinct = sorted(set(rows[rows >= 0].tolist()))
            index = np.where(rows >= 0, np.searchsorted(distinct, rows), -1)
            index_BCM = torch.from_numpy(np.concatenate((np.full((1, num_memories), -1), index)))[None]
            fetched = memories.fetch([retriever.get_ref_id(row) for row in distinct])
            hidden, context = read_sequences(checkpoint, tokens, fetched, index_BCM.to(checkpoint.device), chunk)
            check_memories_read(context, index_BCM)
            sums[name] += _sum_loss(checkpoint.head(hidden)[0], tokens[0])
    means = {name: total / max(1, num_tokens) for name, total in sums.items()}
    return LossReport(**means, num_tokens=num_tokens, num_passages=len(passages))
