"""The continual-training step: references written and read in the same step, with gradient.

Shape letters: B sequences, C chunks a sequence, T tokens, M memories a chunk.
"""

import torch

from model.checkpoint import Checkpoint
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, read_sequences
from model.selecting import SelectionConfig
from model.training.objective import backward_loss
from model.writing import encode_references, pad_references
from schemas.protocols import IntArray


def index_memories(present_BC: torch.Tensor, num_memories: int = MEMORIES_PER_CHUNK) -> torch.Tensor:
    """Returns which reference each chunk reads, (B, C, M): its own and those of the chunks before it; -1 for none.

    Args:
        present_BC: the row of each chunk's reference among those written in this step, -1 where it has none.
        num_memories: references a chunk reads.
    """
    padded = torch.nn.functional.pad(present_BC, (num_memories - 1, 0), value=-1)
    return padded.unfold(1, num_memories, 1).flip(-1)


def backward_continual(
    checkpoint: Checkpoint, tokens_BT: torch.Tensor, references: list[list[IntArray | None]], selection: SelectionConfig
) -> float:
    """Runs forward and backward of one step and returns the loss in nats a token.

    Args:
        checkpoint: the model, in training mode.
        tokens_BT: T - 1 tokens to read and as many to predict.
        references: for each sequence and chunk the tokens of its reference, or None.
        selection: which tokens memories keep.
    """
    written = [reference for of_sequence in references for reference in of_sequence if reference is not None]
    rows = iter(range(len(written)))
    present = torch.tensor(
        [[-1 if reference is None else next(rows) for reference in of_sequence] for of_sequence in references]
    )
    padded, valid = pad_references(written, tokens_BT.device)
    memories = encode_references(checkpoint, padded, valid, selection)
    inputs = tokens_BT[:, :-1]
    chunk = (torch.arange(inputs.shape[1], device=inputs.device) // CHUNK_TOKENS).expand(len(inputs), -1)
    hidden, _ = read_sequences(checkpoint, inputs, memories, index_memories(present).to(inputs.device), chunk)
    return backward_loss(hidden, tokens_BT[:, 1:], checkpoint.head)
