"""The attention function ``"memory3"``: plain attention, attention that is listened to, attention that reads memories.

transformers calls the attention function registered under the name in ``config._attn_implementation`` with query, key
and value after RoPE, and passes on whatever keyword is given to ``model(...)``. The keyword ``memory3`` decides:

* nothing: plain attention;
* a :class:`WritingTap`: plain attention, and the tap keeps what passes through the memory layers;
* a :class:`model.chunked_reading.MemoryContext`: memory layers attend to ``[memories of the token's chunk | context]``,
  all chunks of the call at once;
* a :class:`model.held_reading.HeldMemories`: the same for single tokens, whose memories stand in the cache already;
* any other :class:`LayerAttention`: its own attention in the layers it names.

Shape letters: B batch, H KV heads, G query heads a KV head, N = H x G query heads, Q query tokens, K context tokens,
T tokens, D head dimension.
"""

import dataclasses
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from model.held_reading import attend_token
from schemas.errors import InputError

IMPLEMENTATION = "memory3"

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Keywords by which some architectures change the scores: capped scores, learned sinks, added biases."""


class LayerAttention(Protocol):
    """Attention that takes the place of plain attention in some layers.

    Attributes:
        memory_layers: indices of these layers, ascending.
    """

    memory_layers: tuple[int, ...]

    def attend(
        self,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Returns what the queries read, (B, N, Q, D).

        Args:
            place: the place of the layer among ``memory_layers``.
            query: (B, N, Q, D).
            key: (B, H, K, D).
            value: as ``key``.
            mask: True where a token is seen, (B, 1, Q, K); None for merely causal.
            scaling: factor on the products.
        """
        ...


class LastMemoryLayerReached(Exception):  # noqa: N818 - a way out of the forward pass, not an error
    """Leaves a forward pass that has no work past the last memory layer."""


@dataclasses.dataclass
class WritingTap:
    """Keeps queries, keys and values of the memory layers and ends the forward pass at the last of them.

    Attributes:
        memory_layers: indices of the layers to keep, ascending.
        kept: for each of them (query, key, value) after RoPE: (B, N, T, D), (B, H, T, D), (B, H, T, D).
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


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    if query.shape[2] == 1 and query.device.type == "cpu" and not torch.is_grad_enabled():
        return attend_token(query, key, value, mask, scaling)[0]
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        # Without a mask, several tokens are the whole context, and one token sees all of it.
        is_causal=mask is None and query.shape[2] > 1,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def memory3_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    memory3: WritingTap | LayerAttention | None = None,
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
    if isinstance(memory3, WritingTap):
        memory3.keep(layer, query, key, value)
        window = others.get("sliding_window")
        if window is not None and key.shape[2] > window:
            raise InputError(
                f"{type(module).__name__} sees {window} tokens, fewer than a reference has; use another model"
            )
        # References are padded on the right and within the window: the causal mask is all that writing needs.
        out = _attend_plainly(query, key, value, None, scaling, dropout)
    elif memory3 is not None and layer in memory3.memory_layers:
        place = memory3.memory_layers.index(layer)
        out = memory3.attend(place, query, key, value, attention_mask, scaling)
    else:
        out = _attend_plainly(query, key, value, attention_mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Makes ``attn_implementation="memory3"`` known to transformers; calling it again changes nothing.

    Its masks are those of PyTorch's attention: True where a token is seen, none where the context is merely causal.
    """
    AttentionInterface.register(IMPLEMENTATION, memory3_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
