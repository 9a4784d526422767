"""Reading token by token: the memories of the current chunk stand in the cache, before the key-values of the context.

Between two retrievals every token of a sequence reads the same memories, so they are laid out once, and a token's
attention to memories and context is a single product and a single softmax over all of it: reading costs no more than
that many context tokens would.

Shape letters: B batch, H KV heads, G query heads a KV head, N = H x G query heads, K what a token sees, S slots of all
memories of a chunk, M memories, D head dimension, L memory layers.
"""

import dataclasses

import torch


def attend_token(
    query_BN1D: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    mask_B11K: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token of each sequence: two products of matrices, faster on a CPU than PyTorch's own.

    Args:
        query_BN1D: queries.
        key_BHKD: keys.
        value_BHKD: values.
        mask_B11K: True where a token is seen; None for everywhere.
        scaling: factor on the products.

    Returns:
        The output (B, N, 1, D) and the attention weights (B, H, G, K).
    """
    query_BHGD = query_BN1D.squeeze(2).unflatten(1, (key_BHKD.shape[1], -1)) * scaling
    scores = query_BHGD @ key_BHKD.mT
    if mask_B11K is not None:
        scores = scores.masked_fill(~mask_B11K, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(value_BHKD.dtype)
    return (weights @ value_BHKD).flatten(1, 2)[:, :, None], weights


@dataclasses.dataclass
class HeldMemories:
    """The memories that the next tokens read, one chunk a sequence, laid out in the first S places of the cache.

    Attributes:
        memory_layers: indices of the layers that read, ascending.
        valid_BS: True for slots that hold a token; None if all do.
        num_memories: M, so that S = M x slots a memory.
        weights: for each layer the attention each slot received, (B, H, G, S), summed over the tokens so far; None
            before the first.
    """

    memory_layers: tuple[int, ...]
    valid_BS: torch.Tensor | None
    num_slots: int
    num_memories: int
    weights: list[torch.Tensor | None] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Begins with no attention."""
        self.weights = [None] * len(self.memory_layers)

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attends to memories and context; arguments as :func:`attend_token`, the mask for the context alone.

        Args:
            place: the place of the layer among the memory layers.
            query: (B, N, 1, D).
            key: (B, H, S + context, D), memories first.
            value: as ``key``.
            mask: (B, 1, 1, context), or None.
            scaling: factor on the products.
        """
        out, weights = attend_token(query, key, value, self._join_mask(mask, key.shape[2]), scaling)
        received = weights[..., : self.num_slots].float()
        so_far = self.weights[place]
        self.weights[place] = received.clone() if so_far is None else so_far.add_(received)  # a view of all weights
        return out

    def _join_mask(self, mask: torch.Tensor | None, num_seen: int) -> torch.Tensor | None:
        if mask is None and self.valid_BS is None:
            return None
        parts = []
        for part, size in ((self.valid_BS, self.num_slots), (mask, num_seen - self.num_slots)):
            given = part if part is None or part.ndim == 4 else part[:, None, None]
            parts.append(given)
            if given is None:
                other = mask if mask is not None else self.valid_BS
                assert other is not None
                parts[-1] = other.new_ones((len(other), 1, 1, size))
        return torch.cat([part for part in parts if part is not None], -1)

    def sum_attention(self) -> torch.Tensor | None:
        """Returns the attention each memory got so far, (L, B, M), summed over heads and tokens; None before any."""
        if any(weights is None for weights in self.weights):
            return None
        received = torch.stack([weights.sum((1, 2)) for weights in self.weights if weights is not None])
        of_memories: torch.Tensor = received.unflatten(-1, (self.num_memories, -1)).sum(-1)
        return of_memories
