"""What each chunk of a training sequence retrieves: the nearest references that would not give the answer away.

Every 64-token chunk retrieves one reference with its own text and reads its own and the previous four chunks'
references (method section 7). A sequence must not carry a reference it nearly contains (the leak rule).
"""

import dataclasses
import itertools

import numpy as np

from model.reading import CHUNK_TOKENS
from model.tokenizing import CheckpointTokenizer
from schemas.protocols import Embedder

NUM_CANDIDATES = 12
"""References retrieved for each chunk, of which the nearest that the leak rule allows is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceStream:
    """References cut from a token stream, for training without a bank.

    Attributes:
        stream: the tokens of all documents.
        starts: where each reference begins, ascending, (references,).
        ends: where each ends, (references,).
    """

    stream: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def get_tokens(self, row: int) -> np.ndarray:
        """Returns the tokens of a reference."""
        return np.asarray(self.stream[self.starts[row] : self.ends[row]], dtype=np.int32)


def cut_references(stream: np.ndarray, document_starts: np.ndarray, length: int = 128) -> ReferenceStream:
    """Cuts each document, without its ``<s>`` and ``</s>``, into references of ``length`` tokens."""
    starts = [np.arange(first + 1, last - 1, length) for first, last in itertools.pairwise(document_starts)]
    counts = [len(part) for part in starts]
    ends = np.minimum(np.concatenate(starts) + length, np.repeat(document_starts[1:] - 1, counts))
    return ReferenceStream(stream=stream, starts=np.concatenate(starts), ends=ends)


def bound_overlap(sequence: np.ndarray, reference: np.ndarray, vocab_size: int) -> float:
    """Returns an upper bound on the overlap of the leak rule, in [0, 1].

    The rule's overlap is the longest common subsequence over the length of the reference. Common tokens, each counted
    as often as both have it, can only be more; so a bound at most 0.9 proves that the rule is kept.
    """
    common = np.minimum(np.bincount(sequence, minlength=vocab_size), np.bincount(reference, minlength=vocab_size))
    return float(common.sum()) / len(reference)


def retrieve_for_sequences(
    sequences: np.ndarray,
    window_starts: np.ndarray,
    references: ReferenceStream,
    reference_vectors: np.ndarray,
    tokenizer: CheckpointTokenizer,
    embedder: Embedder,
    *,
    vocab_size: int,
    max_overlap: float = 0.9,
) -> np.ndarray:
    """Returns the reference of each chunk, (sequences, chunks), -1 where every candidate would leak.

    Args:
        sequences: token ids (sequences, length).
        window_starts: where each sequence begins in the stream.
        references: what to retrieve from.
        reference_vectors: their embeddings, (references, dimension).
        tokenizer: for turning chunks into text.
        embedder: for embedding them.
        vocab_size: words of the model.
        max_overlap: the leak rule's bound.
    """
    import faiss

    length = sequences.shape[1]
    num_chunks = length // CHUNK_TOKENS
    index = faiss.IndexFlatIP(reference_vectors.shape[1])
    index.add(reference_vectors)
    queries = [
        tokenizer.decode(sequence[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS])
        for sequence in sequences
        for chunk in range(num_chunks)
    ]
    found = index.search(embedder.embed(queries), NUM_CANDIDATES)[1].reshape(len(sequences), num_chunks, -1)
    chosen = np.full((len(sequences), num_chunks), -1, dtype=np.int64)
    for row, (sequence, window) in enumerate(zip(sequences, window_starts, strict=True)):
        for chunk in range(num_chunks):
            for candidate in found[row, chunk]:
                inside = references.starts[candidate] < window + length and references.ends[candidate] > window
                tokens = references.get_tokens(int(candidate))
                if not inside and bound_overlap(sequence, tokens, vocab_size) <= max_overlap:
                    chosen[row, chunk] = candidate
                    break
    return chosen
