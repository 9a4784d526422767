"""Reading whole chunks: every chunk of a call attends to its own memories beside the context, all chunks at once.

The tokens of a call are laid out in a grid of chunks, so that the attention of all of them to their memories is one
batched product. It is merged with the attention to the context by the logarithms of the sums of both softmaxes: exact,
and the context goes through PyTorch's fused kernel as if there were no memories. Where gradients are recorded, both
are joined before a single softmax instead, which is the same and can be differentiated.

Shape letters: B batch, H KV heads, G query heads a KV head, N = H x G query heads, Q query tokens, K context tokens,
D head dimension, L memory layers, C chunks, W tokens a chunk, M memories a chunk, S slots of all memories of a chunk.
"""

import dataclasses

import torch
from torch import nn

MAX_FLASH_DIM = 256
"""Largest head dimension that the flash kernel of a GPU takes."""

QUERIES_AT_ONCE = 256
"""Queries whose scores are in memory at a time where no kernel does it."""


@dataclasses.dataclass
class MemoryContext:
    """The memories that the tokens of one forward call read.

    Attributes:
        memory_layers: indices of the layers that read; entry ``i`` of the tensors below is layer ``[i]``.
        keys_LBCHSD: keys after RoPE at their own positions.
        values_LBCHSD: values.
        valid_LBCHS: False in empty slots and where a chunk has fewer memories.
        chunk_of_token: (B, Q) int64, the chunk whose memories a token reads, -1 for none (the prefix).
        num_memories: M, so that S = M x slots a memory.
        attention_LBCM: filled while reading: attention each memory received, summed over heads and tokens. None
            while gradients are recorded.
    """

    memory_layers: tuple[int, ...]
    keys_LBCHSD: torch.Tensor
    values_LBCHSD: torch.Tensor
    valid_LBCHS: torch.Tensor
    chunk_of_token: torch.Tensor
    num_memories: int
    attention_LBCM: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Lays the tokens out in a grid of chunks."""
        num_chunks = self.keys_LBCHSD.shape[2]
        chunk = self.chunk_of_token
        batch, num_tokens = chunk.shape
        reads = chunk >= 0
        member = nn.functional.one_hot(chunk.clamp(min=0), num_chunks) * reads[..., None]
        place = (member.cumsum(1) - 1).gather(2, chunk.clamp(min=0)[..., None])[..., 0]
        width = max(1, int(member.sum(1).max()))
        # Rows of a table of all tokens, and of a table of all cells; the row after the last is where nothing is.
        rows = torch.arange(batch, device=chunk.device)[:, None]
        num_cells = num_chunks * width
        cell = rows * num_cells + chunk.clamp(min=0) * width + place
        self._cell_of_token = torch.where(reads, cell, batch * num_cells).flatten()
        tokens = (rows * num_tokens + torch.arange(num_tokens, device=chunk.device)).flatten()
        token_of_cell = torch.full((batch * num_cells + 1,), batch * num_tokens, device=chunk.device)
        self._token_of_cell = token_of_cell.scatter(0, self._cell_of_token, tokens)[:-1]
        self._grid = (batch, num_chunks, width)
        self._num_tokens = num_tokens
        self._all_valid = bool(self.valid_LBCHS.all())
        if not torch.is_grad_enabled():
            layers, size = len(self.memory_layers), (batch, num_chunks, self.num_memories)
            self.attention_LBCM = torch.zeros((layers, *size), device=chunk.device)

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attends to memories and context.

        Args:
            place: the place of the layer among the memory layers.
            query: (B, N, Q, D).
            key: (B, H, K, D), of the context.
            value: as ``key``.
            mask: True where a context token is seen, (B, 1, Q, K); None for a context that begins with these tokens,
                each seeing itself and those before it, or for a single token that sees all.
            scaling: factor on the products.
        """
        if mask is None and query.shape[2] > 1 and torch.is_grad_enabled():
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
        if torch.is_grad_enabled():
            return self._attend_jointly(place, query, key, value, mask, scaling)
        return self._attend_and_merge(place, query, key, value, mask, scaling)

    def _attend_jointly(
        self,
        place: int,
        query_BNQD: torch.Tensor,
        key_BHKD: torch.Tensor,
        value_BHKD: torch.Tensor,
        mask_B1QK: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        query_BHGQD = query_BNQD.unflatten(1, (key_BHKD.shape[1], -1)) * scaling
        context = query_BHGQD @ key_BHKD[:, :, None].mT
        if mask_B1QK is not None:
            context = context.masked_fill(~mask_B1QK[:, :, None], -torch.inf)
        remembered = self._from_grid(self.score(place, self._to_grid(query_BHGQD)), -torch.inf)
        num_slots = remembered.shape[-1]
        weights = torch.cat((remembered, context), -1).softmax(-1, dtype=torch.float32).to(query_BNQD.dtype)
        read = self._from_grid(self._sum_values(place, self._to_grid(weights[..., :num_slots])), 0.0)
        out: torch.Tensor = weights[..., num_slots:] @ value_BHKD[:, :, None] + read
        return out.flatten(1, 2)

    def _attend_and_merge(
        self,
        place: int,
        query_BNQD: torch.Tensor,
        key_BHKD: torch.Tensor,
        value_BHKD: torch.Tensor,
        mask_B1QK: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        out_BNQD, log_sum_BNQ = attend_with_log_sum(query_BNQD, key_BHKD, value_BHKD, mask_B1QK, scaling)
        heads = key_BHKD.shape[1]
        out_BHGQD = out_BNQD.unflatten(1, (heads, -1))
        log_sum_BHGQ = log_sum_BNQ.unflatten(1, (heads, -1))

        grid_BCWHGD = self._to_grid(query_BNQD.unflatten(1, (heads, -1)) * scaling)
        scores = self.score(place, grid_BCWHGD).float()
        best = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weights = (scores - best).exp_()
        total = weights.sum(-1, keepdim=True)
        # The share of all attention that goes to memories: both sums as powers of e, their ratio as a sigmoid.
        # Cells without a token see an endless context, and so give memories nothing.
        context_log_sum = self._to_grid(log_sum_BHGQ[..., None], torch.inf)
        share = (best + total.log() - context_log_sum).sigmoid()
        weights *= share / total.clamp(min=torch.finfo(torch.float32).tiny)
        if self.attention_LBCM is not None:
            received = weights.sum((2, 3, 4)).unflatten(-1, (self.num_memories, -1)).sum(-1)
            self.attention_LBCM[place] += received
        read = self._sum_values(place, weights.to(value_BHKD.dtype))
        shares = self._from_grid(share.to(out_BNQD.dtype), 0.0)
        merged_BHGQD: torch.Tensor = out_BHGQD * (1 - shares) + self._from_grid(read, 0.0)
        return merged_BHGQD.flatten(1, 2)

    def score(self, place: int, grid_BCWHGD: torch.Tensor) -> torch.Tensor:
        """Returns the products of scaled queries and memory keys, (B, C, W, H, G, S); -inf where nothing is read."""
        scores = torch.einsum("bcwhgd,bchsd->bcwhgs", grid_BCWHGD, self.keys_LBCHSD[place])
        if self._all_valid:
            return scores
        return scores.masked_fill(~self.valid_LBCHS[place][:, :, None, :, None], -torch.inf)

    def _sum_values(self, place: int, weights_BCWHGS: torch.Tensor) -> torch.Tensor:
        """Returns the weighted memory values, (B, C, W, H, G, D)."""
        return torch.einsum("bcwhgs,bchsd->bcwhgd", weights_BCWHGS, self.values_LBCHSD[place])

    def _to_grid(self, tokens_BHGQX: torch.Tensor, filler: float = 0.0) -> torch.Tensor:
        """Lays what tokens have, (B, H, G, Q, any), out by chunk and place in it: (B, C, W, H, G, any)."""
        rows = tokens_BHGQX.permute(0, 3, 1, 2, 4).flatten(0, 1)
        rows = nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, 1), value=filler)
        grid: torch.Tensor = rows.index_select(0, self._token_of_cell).unflatten(0, self._grid)
        return grid

    def _from_grid(self, grid_BCWHGX: torch.Tensor, filler: float) -> torch.Tensor:
        """Undoes :meth:`_to_grid`; tokens that read nothing get ``filler``."""
        rows = nn.functional.pad(grid_BCWHGX.flatten(0, 2), (0, 0, 0, 0, 0, 0, 0, 1), value=filler)
        tokens = rows.index_select(0, self._cell_of_token).unflatten(0, (-1, self._num_tokens))
        context: torch.Tensor = tokens.permute(0, 2, 3, 1, 4)
        return context


def attend_with_log_sum(
    query_BNQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    mask_B1QK: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the context with the logarithm of the sum that its softmax divides by.

    Uses the kernels behind PyTorch's own attention, which know that sum but have no public function that returns it;
    computes it plainly where there is none.

    Args:
        query_BNQD: queries.
        key_BHKD: keys.
        value_BHKD: values.
        mask_B1QK: True where a token is seen; None as in :meth:`MemoryContext.attend`.
        scaling: factor on the products.

    Returns:
        The output (B, N, Q, D) and the logarithms (B, N, Q), float32; both are finite also where nothing is seen.
    """
    is_causal = mask_B1QK is None and query_BNQD.shape[2] > 1
    device = query_BNQD.device.type
    if device == "cpu":
        bias = _make_bias(mask_B1QK, query_BNQD.dtype)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BNQD, key_BHKD, value_BHKD, 0.0, is_causal, attn_mask=bias, scale=scaling
        )
        return out, log_sum.float()
    if device == "cuda" and mask_B1QK is None and _can_flash(query_BNQD):
        group = query_BNQD.shape[1] // key_BHKD.shape[1]
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention(
            query_BNQD,
            key_BHKD.repeat_interleave(group, 1),
            value_BHKD.repeat_interleave(group, 1),
            0.0,
            is_causal,
            scale=scaling,
        )[:2]
        return out, log_sum.float()
    return attend_with_log_sum_plainly(query_BNQD, key_BHKD, value_BHKD, mask_B1QK, scaling)


def _can_flash(query_BNQD: torch.Tensor) -> bool:
    """Tells whether the flash kernel of this GPU takes these queries."""
    is_half = query_BNQD.dtype in (torch.float16, torch.bfloat16)
    head_dim = query_BNQD.shape[-1]
    is_new = torch.cuda.get_device_capability(query_BNQD.device) >= (8, 0)
    return is_half and is_new and head_dim % 8 == 0 and head_dim <= MAX_FLASH_DIM


def attend_with_log_sum_plainly(
    query_BNQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    mask_B1QK: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attend_with_log_sum` in plain PyTorch, on any device."""
    num_queries, num_keys = query_BNQD.shape[2], key_BHKD.shape[2]
    if mask_B1QK is None and num_queries > 1:
        mask_B1QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key_BHKD.device).tril()[None, None]
    query_BHGQD = query_BNQD.unflatten(1, (key_BHKD.shape[1], -1))
    outs, log_sums = [], []
    for start in range(0, num_queries, QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        scores = (query_BHGQD[..., some, :] @ key_BHKD[:, :, None].mT).float() * scaling
        if mask_B1QK is not None:
            scores = scores.masked_fill(~mask_B1QK[:, :, None, some], torch.finfo(torch.float32).min)
        log_sums.append(scores.logsumexp(-1))
        weights = scores.sub_(log_sums[-1][..., None]).exp_().to(value_BHKD.dtype)
        outs.append(weights @ value_BHKD[:, :, None])
    return torch.cat(outs, -2).flatten(1, 2), torch.cat(log_sums, -1).flatten(1, 2)


def _make_bias(mask_B1QK: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Returns what is to be added to the products: the kernels of a CPU take no mask of truth values."""
    if mask_B1QK is None:
        return None
    return torch.zeros(mask_B1QK.shape, dtype=dtype, device=mask_B1QK.device).masked_fill_(~mask_B1QK, -torch.inf)
