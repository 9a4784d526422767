"""What exchanges read: the memories of every chunk of a prompt and its answer, as generation reads them, as batches.

Where it stands: exchanges (:mod:`model.training.chat`) -> **with their references, as batches** -> objectives. Both
kinds of alignment, :mod:`model.training.conversations` and :mod:`model.training.preferences`, are laid out here.

The rules are those of :mod:`model.chunk_memories`. Every 64-token chunk of a prompt asks with its own text, the last
one with the 64 tokens that end the prompt; what follows goes on with the memories of the last chunk. When 64 tokens of
the answer are there, these are the next question, and the last of them is the first to read what it finds. The order of
a chunk's memories is of no importance: all references stand at the same positions.

Shape letters: T tokens of an exchange that are read, B exchanges, C chunks, M memories a chunk.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from model.reading import CHUNK_TOKENS
from model.retrieving import MemorySearch
from model.tokenizing import CheckpointTokenizer
from model.training.batches import IGNORED, TrainingBatch
from model.training.chat import Exchange
from schemas.bank import Bank
from schemas.protocols import IntArray, LongArray

QUERIES_PER_CALL = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadExchange:
    """An exchange and what it reads.

    Attributes:
        exchange: prompt and answer.
        ref_ids: for each chunk the references it reads, best first; empty for none.
    """

    exchange: Exchange
    ref_ids: tuple[tuple[str, ...], ...]

    @classmethod
    def without_references(cls, exchange: Exchange) -> "ReadExchange":
        """Returns an exchange that reads nothing."""
        return cls(exchange=exchange, ref_ids=((),) * len(list_queries(exchange)))


def place_chunks(num_prompt_tokens: int, num_answer_tokens: int) -> LongArray:
    """Returns the chunk that each token reads with, (T,): all tokens but the last one, which is never read."""
    prompt = np.arange(num_prompt_tokens, dtype=np.int64) // CHUNK_TOKENS
    answer = prompt[-1] + np.arange(1, num_answer_tokens, dtype=np.int64) // CHUNK_TOKENS
    return np.concatenate((prompt, answer))


def list_queries(exchange: Exchange) -> list[IntArray]:
    """Returns the tokens that each chunk of an exchange asks with."""
    prompt, answer = exchange.prompt_ids, exchange.answer_ids
    ends = [min(start + CHUNK_TOKENS, len(prompt)) for start in range(0, len(prompt), CHUNK_TOKENS)]
    starts_of_answer = range(0, len(answer) - CHUNK_TOKENS, CHUNK_TOKENS)
    return [
        *(prompt[max(0, end - CHUNK_TOKENS) : end] for end in ends),
        *(answer[start : start + CHUNK_TOKENS] for start in starts_of_answer),
    ]


def retrieve_references(
    exchanges: Sequence[Exchange], tokenizer: CheckpointTokenizer, search: MemorySearch | None, num_memories: int
) -> list[ReadExchange]:
    """Finds the references of every chunk of exchanges, once and for all.

    Args:
        exchanges: prompts and answers.
        tokenizer: turns the tokens of a chunk into the text that is searched for.
        search: what generation will search with; None leaves every chunk without memories.
        num_memories: references a chunk.
    """
    queries = [list_queries(exchange) for exchange in exchanges]
    joined = list(itertools.chain.from_iterable(queries))
    found: list[tuple[str, ...]] = []
    for start in range(0, len(joined), QUERIES_PER_CALL):
        texts = [tokenizer.decode(query) for query in joined[start : start + QUERIES_PER_CALL]]
        hits = [[]] * len(texts) if search is None else search.search(texts, num_memories)
        found += [tuple(hit.ref_id for hit in of_chunk) for of_chunk in hits]
    ends = itertools.accumulate(len(of_exchange) for of_exchange in queries)
    return [
        ReadExchange(exchange=exchange, ref_ids=tuple(found[end - len(of_exchange) : end]))
        for exchange, of_exchange, end in zip(exchanges, queries, ends, strict=True)
    ]


def load_references(rows: Iterable[ReadExchange], bank: Bank) -> dict[str, IntArray]:
    """Returns the tokens of all references that some exchanges read, by id.

    Raises:
        BankFormatError: a table of the bank is missing or damaged.
    """
    ref_ids = sorted({ref_id for row in rows for of_chunk in row.ref_ids for ref_id in of_chunk})
    if not ref_ids:
        return {}
    tokens = bank.read_references(ref_ids, ["token_ids"])["token_ids"].to_pylist()
    return {ref_id: np.asarray(ids, dtype=np.int32) for ref_id, ids in zip(ref_ids, tokens, strict=True)}


def make_exchange_batch(
    rows: Sequence[ReadExchange], references: Mapping[str, IntArray], num_memories: int
) -> TrainingBatch:
    """Lays out exchanges as one batch, a row each; the targets are the tokens of the answers.

    Args:
        rows: the exchanges.
        references: the tokens of every reference they read.
        num_memories: the most references a chunk reads.
    """
    distinct = list(dict.fromkeys(ref_id for row in rows for of_chunk in row.ref_ids for ref_id in of_chunk))
    places = {ref_id: place for place, ref_id in enumerate(distinct)}
    longest = max(row.exchange.num_tokens for row in rows) - 1
    tokens_BT = np.zeros((len(rows), longest), dtype=np.int64)
    targets_BT = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    chunk_BT = np.full((len(rows), longest), -1, dtype=np.int64)
    index_BCM = np.full((len(rows), max(len(row.ref_ids) for row in rows), num_memories), -1, dtype=np.int64)
    for place, row in enumerate(rows):
        prompt, answer = row.exchange.prompt_ids, row.exchange.answer_ids
        length = row.exchange.num_tokens - 1
        tokens_BT[place, :length] = np.concatenate((prompt, answer))[:-1]
        targets_BT[place, len(prompt) - 1 : length] = answer
        chunk_BT[place, :length] = place_chunks(len(prompt), len(answer))
        for chunk, of_chunk in enumerate(row.ref_ids):
            index_BCM[place, chunk, : len(of_chunk)] = [places[ref_id] for ref_id in of_chunk]
    return TrainingBatch(
        tokens_BT=torch.from_numpy(tokens_BT),
        targets_BT=torch.from_numpy(targets_BT),
        references=[references[ref_id] for ref_id in distinct],
        index_BCM=torch.from_numpy(index_BCM),
        chunk_of_token_BT=torch.from_numpy(chunk_BT),
    )
