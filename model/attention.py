"""The attention function ``"memory3"``: plain attention, attention that is listened to, attention that reads memories.

transformers calls the attention function registered under the name in ``config._attn_implementation`` with query, key
and value after RoPE, and passes on whatever keyword is given to ``model(...)``. The keyword ``memory3`` decides:

* nothing: plain attention (PyTorch's scaled dot product);
* a :class:`WritingTap`: plain attention, and the tap keeps what passes through the memory layers;
* a :class:`MemoryContext`: memory layers attend to ``[memories of the token's chunk | context]`` with one softmax.

Shape letters: B batch, H KV heads, G query heads a KV head, Q query tokens, K context tokens, D head dimension,
L memory layers, C chunks, W tokens a chunk, M memories a chunk, S slots of all memories of a chunk.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from schemas.errors import InputError

IMPLEMENTATION = "memory3"

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Keywords by which some architectures change the scores: capped scores, learned sinks, added biases."""


class LastMemoryLayerReached(Exception):  # noqa: N818 - a way out of the forward pass, not an error
    """Leaves a forward pass that has no work past the last memory layer."""


@dataclasses.dataclass
class WritingTap:
    """Keeps queries, keys and values of the memory layers and ends the forward pass at the last of them.

    Attributes:
        memory_layers: indices of the layers to keep, ascending.
        kept: for each of them (query, key, value) after RoPE: (B, H*G, T, D), (B, H, T, D), (B, H, T, D).
    """

    memory_layers: tuple[int, ...]
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)

    def keep(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps one layer's tensors.

        Raises:
            LastMemoryLayerReached: this was the last layer that is needed.
        """
        if layer in self.memory_layers:
            self.kept.append((query, key, value))
        if layer == self.memory_layers[-1]:
            raise LastMemoryLayerReached


@dataclasses.dataclass
class MemoryContext:
    """The memories that the tokens of one forward call read.

    Attributes:
        memory_layers: indices of the layers that read, ascending; entry ``i`` of the tensors below is layer ``[i]``.
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
        """Lays the tokens out in a grid of chunks: all chunks of a call are then read in one batched product."""
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
        if not torch.is_grad_enabled():
            layers, size = len(self.memory_layers), (batch, num_chunks, self.num_memories)
            self.attention_LBCM = torch.zeros((layers, *size), device=chunk.device)

    def _to_grid(self, tokens_BHGQX: torch.Tensor) -> torch.Tensor:
        """Lays what tokens have, (B, H, G, Q, any), out by chunk and place in it: (B, C, W, H, G, any)."""
        rows = nn.functional.pad(tokens_BHGQX.permute(0, 3, 1, 2, 4).flatten(0, 1), (0, 0, 0, 0, 0, 0, 0, 1))
        grid: torch.Tensor = rows.index_select(0, self._token_of_cell).unflatten(0, self._grid)
        return grid

    def _from_grid(self, grid_BCWHGX: torch.Tensor, filler: float) -> torch.Tensor:
        """Undoes :meth:`_to_grid`; tokens that read nothing get ``filler``."""
        rows = nn.functional.pad(grid_BCWHGX.flatten(0, 2), (0, 0, 0, 0, 0, 0, 0, 1), value=filler)
        tokens = rows.index_select(0, self._cell_of_token).unflatten(0, (-1, self._num_tokens))
        context: torch.Tensor = tokens.permute(0, 2, 3, 1, 4)
        return context

    def score(self, layer: int, queries_BHGQD: torch.Tensor) -> torch.Tensor:
        """Returns the products of queries and memory keys, (B, H, G, Q, S); -inf where there is nothing to read."""
        keys_BCHSD, valid_BCHS = self.keys_LBCHSD[layer], self.valid_LBCHS[layer]
        scores = torch.einsum("bcwhgd,bchsd->bcwhgs", self._to_grid(queries_BHGQD), keys_BCHSD)
        scores = scores.masked_fill(~valid_BCHS[:, :, None, :, None], -torch.inf)
        return self._from_grid(scores, -torch.inf)

    def read(self, layer: int, weights_BHGQS: torch.Tensor) -> torch.Tensor:
        """Returns the weighted memory values, (B, H, G, Q, D), and notes how much attention each memory got."""
        weights = self._to_grid(weights_BHGQS)
        if self.attention_LBCM is not None:
            received = weights.float().sum((2, 3, 4)).unflatten(-1, (self.num_memories, -1)).sum(-1)
            self.attention_LBCM[layer] += received
        read = torch.einsum("bcwhgs,bchsd->bcwhgd", weights, self.values_LBCHSD[layer])
        return self._from_grid(read, 0.0)


def _attend_with_memory(
    query_BNQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    mask_B1QK: torch.Tensor,
    scaling: float,
    memory: MemoryContext,
    layer: int,
) -> torch.Tensor:
    heads = key_BHKD.shape[1]
    query_BHGQD = query_BNQD.unflatten(1, (heads, -1)) * scaling
    context = query_BHGQD @ key_BHKD[:, :, None].mT + mask_B1QK[:, :, None]
    remembered = memory.score(layer, query_BHGQD)
    num_slots = remembered.shape[-1]
    weights = torch.cat((remembered, context), -1).softmax(-1, dtype=torch.float32).to(query_BNQD.dtype)
    out = weights[..., num_slots:] @ value_BHKD[:, :, None] + memory.read(layer, weights[..., :num_slots])
    return out.flatten(1, 2)


def memory3_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    memory3: WritingTap | MemoryContext | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; see the module's docstring for what ``memory3`` does.

    Raises:
        InputError: the architecture asks for a kind of attention that is not computed here.
    """
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise InputError(f"{type(module).__name__} needs {name}, which memory3 does not compute; use another model")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(memory3, MemoryContext) and layer in memory3.memory_layers:
        if attention_mask is None:
            raise RuntimeError("transformers gave no attention mask; memory3 needs the one of its mask function")
        place = memory3.memory_layers.index(layer)
        out = _attend_with_memory(query, key, value, attention_mask, scaling, memory3, place)
        return out.transpose(1, 2).contiguous(), None
    writing = isinstance(memory3, WritingTap)
    if isinstance(memory3, WritingTap):
        memory3.keep(layer, query, key, value)
    # References are padded on the right and shorter than any window, so the causal mask is all that writing needs.
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if writing else attention_mask,
        is_causal=writing,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes ``attn_implementation="memory3"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, memory3_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
