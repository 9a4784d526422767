"""The language-modelling objective with explicit memory: references written and read in the same step, with gradient.

One module whose ``forward`` is a whole step, writing included, so that wrappers for several processes (DDP, FSDP) see
one forward pass. References never pass the last memory layer (method section 7).

The logits of a batch are by far the largest tensor of a small model's step (4096 tokens times 8192 words of float32:
134 MB, and as much again for their gradient). Loss and gradient are taken in slices, which stay in the cache.

Shape letters: B sequences, T tokens, E size of the hidden states, V words, N = B x T.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from model.checkpoint import Checkpoint
from model.reading import read_sequences
from model.selecting import SelectionConfig
from model.training.batches import IGNORED, TrainingBatch
from model.writing import encode_references, pad_references

ROWS_PER_SLICE = 1024


class _SlicedCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropy of ``hidden @ weight.T``, its gradients taken slice by slice on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: torch.Tensor, weight_VE: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_NE) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VE, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(hidden_NE), ROWS_PER_SLICE):
            rows = slice(start, start + ROWS_PER_SLICE)
            hidden, targets = hidden_NE[rows], targets_N[rows]
            logits = (hidden @ weight_VE.T).float()
            counts = (targets != IGNORED)[:, None]
            place = targets.clamp(min=0)[:, None]
            log_sums = logits.logsumexp(-1, keepdim=True)
            total += ((log_sums - logits.gather(1, place)) * counts).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = logits.sub_(log_sums).exp_()
            grad.scatter_add_(1, place, torch.full_like(log_sums, -1.0))
            grad = (grad * counts).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = grad @ weight_VE
            if weight_grad is not None:
                weight_grad += grad.T @ hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (scale,) = grads
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else (weight_grad * scale).to(scale.dtype),
            None,
        )


def sum_cross_entropy(hidden_BTE: torch.Tensor, targets_BT: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Returns the cross entropy summed over all targets that count, in nats, with its gradient.

    Args:
        hidden_BTE: last hidden states.
        targets_BT: the token that should follow each position; ``IGNORED`` where none counts.
        head: the map from hidden states to logits.
    """
    hidden, targets = hidden_BTE.flatten(0, 1), targets_BT.flatten()
    if type(head) is nn.Linear and head.bias is None and not torch.is_autocast_enabled(hidden.device.type):
        return _SlicedCrossEntropy.apply(hidden, head.weight, targets)
    # A head that is more than a matrix, or one that runs in two types: recomputed on the way back, slice by slice.
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, wanted in zip(hidden.split(ROWS_PER_SLICE), targets.split(ROWS_PER_SLICE), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(_sum_plainly, rows, wanted, head, use_reentrant=False)
    return total


def _sum_plainly(hidden_NE: torch.Tensor, targets_N: torch.Tensor, head: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(head(hidden_NE).float(), targets_N, ignore_index=IGNORED, reduction="sum")


class LanguageObjective(nn.Module):
    """The sum of the loss of a batch, references written on the way.

    Attributes:
        model: the transformers model, whose parameters are trained.
        checkpoint: the same model with what memory needs to know about it.
        selection: which tokens memories keep.
    """

    def __init__(self, checkpoint: Checkpoint, selection: SelectionConfig | None = None) -> None:
        """Takes the model to train."""
        super().__init__()
        self.model = checkpoint.model
        self.checkpoint = checkpoint
        self.selection = selection or SelectionConfig()

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of each layer only, see :mod:`model.training.sharding`."""
        return isinstance(self.checkpoint.decoder.get_submodule("layers.0"), FSDPModule)

    def read(self, batch: TrainingBatch) -> torch.Tensor:
        """Returns the last hidden states of a batch, (B, T, E)."""
        checkpoint = self.checkpoint
        if not batch.with_prefix:
            return checkpoint.decoder(  # type: ignore[no-any-return]
                input_ids=batch.tokens_BT, attention_mask=torch.ones_like(batch.tokens_BT), use_cache=False
            ).last_hidden_state
        references = batch.references
        if not references and self.is_sharded:
            # The other processes may have references, and all must run the same layers. No chunk reads this one.
            references = [checkpoint.prefix_token_ids[-1:].numpy()]
        if not references:
            hidden, _ = read_sequences(checkpoint, batch.tokens_BT)
            return hidden
        padded, valid = pad_references(references, batch.tokens_BT.device)
        memories = encode_references(checkpoint, padded, valid, self.selection)
        hidden, _ = read_sequences(checkpoint, batch.tokens_BT, memories, batch.index_BCM, batch.chunk_of_token_BT)
        return hidden

    def forward(self, batch: TrainingBatch) -> torch.Tensor:
        """Returns the cross entropy of a batch summed over its targets, in nats."""
        return sum_cross_entropy(self.read(batch), batch.targets_BT, self.checkpoint.head)
