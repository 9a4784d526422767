"""The language-modelling loss with its gradient, a few rows of the vocabulary at a time.

The logits of a batch are by far the largest tensor of a small model's step (4096 tokens times 8192 words of float32:
134 MB, and as much again for their gradient). Taking the loss and its gradient in slices keeps them in the cache.
"""

import torch
from torch import nn

ROWS_PER_SLICE = 1024


def backward_loss(hidden_BTE: torch.Tensor, targets_BT: torch.Tensor, head: nn.Module) -> float:
    """Runs the backward pass of the mean cross entropy and returns its value in nats a token.

    Args:
        hidden_BTE: last hidden states, still attached to the graph of the model that made them.
        targets_BT: the token that should follow each position; -100 where none counts.
        head: the map from hidden states to logits.
    """
    leaf = hidden_BTE.detach().flatten(0, 1).requires_grad_()
    targets = targets_BT.flatten()
    num_targets = int((targets != -100).sum())
    total = 0.0
    for rows, wanted in zip(leaf.split(ROWS_PER_SLICE), targets.split(ROWS_PER_SLICE), strict=True):
        loss = nn.functional.cross_entropy(head(rows), wanted, reduction="sum") / max(1, num_targets)
        loss.backward()
        total += float(loss.detach())
    assert leaf.grad is not None
    hidden_BTE.backward(leaf.grad.view_as(hidden_BTE))
    return total
