"""The loss of held-out text: without memory, with random and with retrieved memories, and with references as text.

Scoring is strictly causal: a chunk reads what the chunk before it retrieved, as in generation, so no query has seen the
tokens that are scored. The first chunk of a sequence reads nothing and is not scored. Random memories are always
reported beside retrieved ones: what they gain is not knowledge.

Shape letters: T tokens, C chunks.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from model.checkpoint import PREFIX_TEXT, Checkpoint
from model.fetching import BankMemories
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, ReadingSession, check_memories_read, read_sequences
from model.retrieving import Retriever
from model.writing import Memories
from schemas.protocols import IntArray

SEQUENCE_TOKENS = 512

CHUNKS_OF_A_PASSAGE = 2
"""The least that can be scored: the first chunk reads nothing."""

FetchMemories = Callable[[Sequence[str]], Memories]
"""Returns the memories of references by their ids, in their order."""


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
            if len(passage) >= CHUNKS_OF_A_PASSAGE * CHUNK_TOKENS:
                passages.append(passage)
    return passages


def _list_losses(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Returns the loss of every token but those of the first chunk, which can read no memory."""
    first = CHUNK_TOKENS
    return torch.nn.functional.cross_entropy(logits_TV[first - 1 : -1].float(), tokens_T[first:], reduction="none")


@torch.inference_mode()
def score_without_memory(checkpoint: Checkpoint, tokens: IntArray, *, with_prefix: bool) -> torch.Tensor:
    """Returns the loss in nats of each token past the first chunk, (T - 64,), read without memory.

    Args:
        checkpoint: the model.
        tokens: a sequence, more than a chunk.
        with_prefix: False for the ordinary model, True for one that could read and is given nothing.
    """
    tokens_T = torch.from_numpy(tokens.astype(np.int64)).to(checkpoint.device)
    logits, _ = ReadingSession(checkpoint, with_prefix=with_prefix).read(tokens_T[None])
    return _list_losses(logits[0], tokens_T)


@torch.inference_mode()
def score_with_memory(
    checkpoint: Checkpoint, tokens: IntArray, chosen: Sequence[Sequence[str]], fetch: FetchMemories
) -> torch.Tensor:
    """Returns the loss in nats of each token past the first chunk, (T - 64,), read with memories.

    Args:
        checkpoint: the model.
        tokens: a sequence, more than a chunk.
        chosen: for each chunk the ids of the references it reads.
        fetch: where memories come from.

    Raises:
        MemoryNotReadError: some layer gave the memories no attention.
    """
    ref_ids = sorted({ref_id for of_chunk in chosen for ref_id in of_chunk})
    if not ref_ids:
        return score_without_memory(checkpoint, tokens, with_prefix=True)
    tokens_T = torch.from_numpy(tokens.astype(np.int64)).to(checkpoint.device)
    width = max(len(of_chunk) for of_chunk in chosen)
    place = {ref_id: row for row, ref_id in enumerate(ref_ids)}
    index_CM = torch.full((len(chosen), width), -1)
    for chunk, of_chunk in enumerate(chosen):
        index_CM[chunk, : len(of_chunk)] = torch.tensor([place[ref_id] for ref_id in of_chunk], dtype=torch.int64)
    chunk_T = torch.arange(len(tokens), device=checkpoint.device) // CHUNK_TOKENS
    index_BCM = index_CM[None].to(checkpoint.device)
    hidden, context = read_sequences(checkpoint, tokens_T[None], fetch(ref_ids), index_BCM, chunk_T[None])
    assert context is not None
    check_memories_read(context, index_BCM)
    return _list_losses(checkpoint.head(hidden)[0], tokens_T)


@torch.inference_mode()
def score_with_text(
    checkpoint: Checkpoint, tokens: IntArray, chosen: Sequence[Sequence[IntArray]], *, max_tokens: int | None = None
) -> torch.Tensor:
    """Returns the loss in nats of each token past the first chunk, (T - 64,), with references in the prompt.

    Each chunk is read after its own references, the best one nearest to it, and all of the sequence before it. Source
    of the layout: :mod:`model.text_references`.

    Args:
        checkpoint: the model, used as an ordinary one.
        tokens: a sequence, more than a chunk.
        chosen: for each chunk the tokens of its references, best first.
        max_tokens: the longest prompt: what comes first in the context is cut off. None for no limit.
    """
    before, after = (part.tolist() for part in checkpoint.tokenizer.encode([PREFIX_TEXT + " ", "\n\n"]))
    losses = []
    for chunk, start in enumerate(range(0, len(tokens), CHUNK_TOKENS)):
        if not chunk:
            continue
        end = min(start + CHUNK_TOKENS, len(tokens))
        told = [token for reference in reversed(chosen[chunk]) for token in (*before, *reference.tolist(), *after)]
        # The prompt has its own <s>.
        context = tokens[:end].tolist()
        context = context[1:] if context[:1] == list(checkpoint.bos_token_ids) else context
        if max_tokens is not None:
            context = context[max(0, len(context) - max(max_tokens - len(told), end - start + 1)) :]
        prompt = torch.tensor([*checkpoint.bos_token_ids, *told, *context], device=checkpoint.device)
        logits, _ = ReadingSession(checkpoint, with_prefix=False).read(prompt[None])
        wanted = prompt[-(end - start) :]
        scores = logits[0, -(end - start) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(scores, wanted, reduction="none"))
    return torch.cat(losses)


def shift_chosen(candidates: Sequence[Sequence[str]], num_memories: int) -> list[list[str]]:
    """Returns what each chunk reads in generation: the best of what the chunk before it retrieved; the first nothing.

    Args:
        candidates: for each chunk the ids it retrieved with its own text, best first.
        num_memories: how many of them are read.
    """
    return [[], *(list(of_chunk[:num_memories]) for of_chunk in candidates[:-1])]


def draw_random(ref_ids: Sequence[str], num_chunks: int, num_memories: int, key: str) -> list[list[str]]:
    """Returns random references for each chunk but the first; the same ones for the same key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(ref_ids), (num_chunks - 1, num_memories))
    return [[], *([ref_ids[row] for row in dict.fromkeys(rows)] for rows in drawn.tolist())]


@torch.inference_mode()
def measure_losses(
    checkpoint: Checkpoint,
    retriever: Retriever,
    memories: BankMemories,
    texts: Sequence[str],
    *,
    num_memories: int = MEMORIES_PER_CHUNK,
    scored: Callable[[], None] | None = None,
) -> LossReport:
    """Scores held-out texts in four ways; see :class:`LossReport`. Only tokens past the first chunk are scored.

    Args:
        checkpoint: the model.
        retriever: searches the bank.
        memories: of the bank.
        texts: what is scored.
        num_memories: memories that each chunk reads.
        scored: called after each passage.
    """
    passages = cut_passages(checkpoint, texts)
    sums = {"plain": 0.0, "none": 0.0, "random": 0.0, "retrieved": 0.0}
    num_tokens = 0
    everything = [retriever.get_ref_id(row) for row in range(retriever.num_references)]
    for number, passage in enumerate(passages):
        num_tokens += len(passage) - CHUNK_TOKENS
        chunks = [passage[start : start + CHUNK_TOKENS] for start in range(0, len(passage), CHUNK_TOKENS)]
        queries = [checkpoint.tokenizer.decode(chunk) for chunk in chunks]
        found = [[hit.ref_id for hit in hits] for hits in retriever.search(queries, num_memories)]
        random = draw_random(everything, len(chunks), num_memories, str(number))
        scores = {
            "plain": score_without_memory(checkpoint, passage, with_prefix=False),
            "none": score_without_memory(checkpoint, passage, with_prefix=True),
            "random": score_with_memory(checkpoint, passage, random, memories.fetch),
            "retrieved": score_with_memory(checkpoint, passage, shift_chosen(found, num_memories), memories.fetch),
        }
        for name, losses in scores.items():
            sums[name] += float(losses.sum())
        if scored is not None:
            scored()
    means = {name: total / max(1, num_tokens) for name, total in sums.items()}
    return LossReport(**means, num_tokens=num_tokens, num_passages=len(passages))
