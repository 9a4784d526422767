"""The key-values of a context, in tensors with room to grow, and room in front for the memories of the current chunk.

transformers' own cache copies everything it holds for every token; here a token is written into its place. The layers
that read memories have their slots before the context, so that one product reaches both (:mod:`model.held_reading`).

Shape letters: B batch, H KV heads, T new tokens, K context tokens, S slots of all memories of a chunk, D head
dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_TOKENS = 256
"""Room for tokens to begin with; it doubles whenever it is full."""


class ContextLayer(CacheLayerMixin):
    """The key-values of one layer.

    Attributes:
        num_slots: S, places in front of the context; 0 in layers that read no memories.
        num_tokens: context tokens stored.
        shows_slots: True to hand out the memories together with the context.
    """

    is_sliding = False

    def __init__(self, num_slots: int, num_expected: int) -> None:
        """Makes an empty layer; ``num_expected`` is the number of tokens that there is room for at first."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_slots = num_slots
        self.num_tokens = 0
        self.shows_slots = False
        self._room = max(1, num_expected)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the tensors, of the type and on the device of the first key-values."""
        batch, heads, _, dim = key_states.shape
        size = (batch, heads, self.num_slots + self._room, dim)
        self.keys, self.values = key_states.new_empty(size), value_states.new_empty((*size[:3], value_states.shape[-1]))
        self.is_initialized = True

    def _grow(self, num_tokens: int) -> None:
        while self._room < num_tokens:
            self._room *= 2
        end = self.num_slots + self.num_tokens
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], self.num_slots + self._room, old.shape[3]))
            new[:, :, :end] = old[:, :, :end]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores key-values (B, H, T, D) and returns views of all: (B, H, K, D), memories first if they are shown."""
        end = self.num_tokens + key_states.shape[2]
        if not self.is_initialized:
            self._room = max(self._room, end)
            self.lazy_initialization(key_states, value_states)
        elif end > self._room:
            self._grow(end)
        assert self.keys is not None
        assert self.values is not None
        first, last = self.num_slots + self.num_tokens, self.num_slots + end
        self.keys[:, :, first:last] = key_states
        self.values[:, :, first:last] = value_states
        self.num_tokens = end
        begin = 0 if self.shows_slots else self.num_slots
        return self.keys[:, :, begin:last], self.values[:, :, begin:last]

    def hold(self, keys_BHSD: torch.Tensor, values_BHSD: torch.Tensor) -> None:
        """Puts memories in front of the context, in the place of those before."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, : self.num_slots] = keys_BHSD
        self.values[:, :, : self.num_slots] = values_BHSD

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of context tokens that a mask is for, and the place of the first."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of context tokens stored."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """Returns -1: there is no limit."""
        return -1


class ContextCache(Cache):
    """The key-values of all layers."""

    def __init__(
        self, num_layers: int, memory_layers: Sequence[int], num_slots: int, num_expected: int = FIRST_TOKENS
    ) -> None:
        """Makes an empty cache.

        Args:
            num_layers: layers of the model.
            memory_layers: indices of those that read memories.
            num_slots: slots of all memories that a chunk reads; 0 if none are ever held.
            num_expected: context tokens that there is room for at first.
        """
        self._memory_layers = tuple(memory_layers)
        slots = [num_slots if layer in self._memory_layers else 0 for layer in range(num_layers)]
        self._context_layers = [ContextLayer(number, num_expected) for number in slots]
        super().__init__(layers=list(self._context_layers))

    def show_slots(self, shown: bool) -> None:
        """Chooses whether the layers that read memories hand them out together with the context."""
        for layer in self._memory_layers:
            self._context_layers[layer].shows_slots = shown

    def hold(self, keys_LBHSD: torch.Tensor, values_LBHSD: torch.Tensor) -> None:
        """Puts the memories of the next tokens in front of the context, one chunk a sequence."""
        for layer, keys, values in zip(self._memory_layers, keys_LBHSD, values_LBHSD, strict=True):
            self._context_layers[layer].hold(keys, values)

    def rewind(self, num_tokens: int) -> None:
        """Forgets all but the first tokens of the context."""
        for layer in self._context_layers:
            layer.num_tokens = min(layer.num_tokens, num_tokens)
