"""What a training step is given: sequences, what they predict, and the references they read.

Where it stands: the loader and the makers of conversations produce batches, objectives turn them into a loss, and the
loop does not look inside.

Shape letters: B sequences, T tokens, C chunks, M memories a chunk, R references.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from schemas.protocols import IntArray

IGNORED = -100
"""The target of a position that is not to be predicted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """The sequences of one forward pass.

    Attributes:
        tokens_BT: what is read, int64, padded on the right with any token.
        targets_BT: the token after each position, int64; ``IGNORED`` where none counts, padding included.
        references: the tokens of the R distinct references that are written in the same step, each at least one.
        index_BCM: which of the R references each chunk reads, int64; -1 for none.
        chunk_of_token_BT: the chunk a token belongs to, int64; -1 reads nothing.
        with_prefix: False for sequences of an ordinary model: neither prefix nor memories.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    references: Sequence[IntArray]
    index_BCM: torch.Tensor
    chunk_of_token_BT: torch.Tensor
    with_prefix: bool = True

    @property
    def num_targets(self) -> int:
        """Positions that count."""
        return int((self.targets_BT != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding included; those of the references are not among them."""
        return self.tokens_BT.numel()

    def to(self, device: torch.device) -> "TrainingBatch":
        """Returns the batch on a device."""
        return dataclasses.replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            index_BCM=self.index_BCM.to(device),
            chunk_of_token_BT=self.chunk_of_token_BT.to(device),
        )


class BatchSource(Protocol):
    """Where the loop gets its batches: any step can be drawn at any time, so that resuming needs no more than a number.

    Equal arguments give equal batches, on every machine and after every restart.
    """

    @property
    def source_id(self) -> str:
        """Id of the data and of how it is drawn: a run is not resumed with another."""
        ...

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        """Returns the micro-batches of one rank for one optimizer step, in order; every rank gets as many.

        The sequences of all ranks together are the same for every number of ranks.
        """
        ...


def index_memories(rows_BC: torch.Tensor, num_memories: int) -> torch.Tensor:
    """Returns which reference each chunk reads, (B, C, M): its own and those of the chunks before it; -1 for none.

    Source: method section 7.

    Args:
        rows_BC: the row of each chunk's reference among those written in this step, -1 where it has none.
        num_memories: references a chunk reads.
    """
    padded = torch.nn.functional.pad(rows_BC, (num_memories - 1, 0), value=-1)
    return padded.unfold(1, num_memories, 1).flip(-1)


def make_plain_batch(sequences_BS: np.ndarray) -> TrainingBatch:
    """Returns a batch of ordinary language modelling: every token of a sequence but the first is a target.

    Args:
        sequences_BS: token ids, S = T + 1 of them a sequence.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(sequences_BS, dtype=np.int64))
    num_sequences = len(tokens)
    return TrainingBatch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        references=(),
        index_BCM=torch.full((num_sequences, 1, 1), -1),
        chunk_of_token_BT=torch.full((num_sequences, tokens.shape[1] - 1), -1),
        with_prefix=False,
    )
