"""Reading memories: every 64-token chunk of a context attends to its own memories beside what came before.

Positions: the prefix ``<s>Reference:`` stands at 0.., every reference shares the 128 positions after it, the context
begins past them with its own ``<s>`` (method section 6). The prefix is ordinary context that reads no memory.

Shape letters: B batch, T context tokens, L memory layers, R distinct references, C chunks, M memories a chunk,
H KV heads, S slots a memory, D head dimension.
"""

import torch
from transformers import DynamicCache

from model.attention import MemoryContext
from model.checkpoint import Checkpoint
from model.writing import Memories
from schemas.errors import MemoryNotReadError
from schemas.records import EMPTY_SLOT

CHUNK_TOKENS = 64
"""Tokens that share their memories."""

MEMORIES_PER_CHUNK = 5
"""Memories each chunk reads."""


def place_memories(
    checkpoint: Checkpoint, memories: Memories, index_BCM: torch.Tensor, chunk_of_token: torch.Tensor
) -> MemoryContext:
    """Rotates memories to their positions and deals them out to chunks.

    Args:
        checkpoint: the model that will read.
        memories: R distinct references.
        index_BCM: which of the R references each chunk reads; -1 for none.
        chunk_of_token: (B, tokens of the call), the chunk each token belongs to; -1 reads nothing.
    """
    shape = memories.keys_LBHSD.shape
    filled_LRHS = memories.offsets_LBHS != EMPTY_SLOT
    positions = memories.offsets_LBHS.masked_fill(~filled_LRHS, 0) + len(checkpoint.prefix_token_ids)
    keys = checkpoint.rotary.rotate_each(memories.keys_LBHSD.reshape(-1, shape[-1]), positions.reshape(-1))
    present = index_BCM >= 0
    index = index_BCM.clamp(min=0)
    valid = filled_LRHS[:, index] & present[None, ..., None, None]
    return MemoryContext(
        memory_layers=checkpoint.memory_layers,
        keys_LBCHSD=keys.view(shape)[:, index].transpose(3, 4).flatten(4, 5),
        values_LBCHSD=memories.values_LBHSD[:, index].transpose(3, 4).flatten(4, 5),
        valid_LBCHS=valid.transpose(3, 4).flatten(4, 5),
        chunk_of_token=chunk_of_token,
        num_memories=index_BCM.shape[-1],
    )


def check_memories_read(context: MemoryContext, index_BCM: torch.Tensor) -> None:
    """Makes sure that memories which were given were attended to in every memory layer.

    Raises:
        MemoryNotReadError: some layer gave no attention to any memory, for instance because a change in transformers
            no longer passes the keyword ``memory3`` on.
    """
    if context.attention_LBCM is None or not bool((index_BCM >= 0).any()):
        return
    silent = [
        layer
        for layer, received in zip(context.memory_layers, context.attention_LBCM.sum((1, 2, 3)), strict=True)
        if not received > 0
    ]
    if silent:
        raise MemoryNotReadError(
            f"memories were retrieved but layers {silent} gave them no attention; this version of transformers or this "
            "architecture does not read them"
        )


class ReadingSession:
    """A context that grows token by token or chunk by chunk, with the key-values of what it has seen.

    The stored memories are never written to: a session owns copies of the prefix's key-values, and memories enter a
    call as arguments, not through the cache.

    Attributes:
        num_tokens: context tokens seen so far.
    """

    def __init__(self, checkpoint: Checkpoint, *, batch_size: int = 1, with_prefix: bool = True) -> None:
        """Starts an empty context.

        Args:
            checkpoint: the model that reads.
            batch_size: sequences that advance together, all of the same length.
            with_prefix: False starts an ordinary context without the prefix, for a model run without memory.
        """
        self.checkpoint = checkpoint
        self.num_tokens = 0
        self._cache = DynamicCache()
        self._batch_size = batch_size
        self._num_prefix = 0
        self._start = 0
        if with_prefix:
            prefix = checkpoint.prefix_token_ids.to(checkpoint.device).expand(batch_size, -1)
            with torch.inference_mode():
                self._forward(prefix, 0, None)
            self._num_prefix = prefix.shape[1]
            self._start = checkpoint.context_start

    def _forward(self, token_ids: torch.Tensor, first_position: int, memory: MemoryContext | None) -> torch.Tensor:
        num_new = token_ids.shape[1]
        positions = torch.arange(first_position, first_position + num_new, device=token_ids.device)
        # The mask of ones matters: without one, transformers takes the gap in the positions for packed sequences.
        mask = torch.ones((self._batch_size, self._cache.get_seq_length() + num_new), device=token_ids.device)
        output = self.checkpoint.decoder(
            input_ids=token_ids,
            position_ids=positions.expand(self._batch_size, -1),
            attention_mask=mask.long(),
            past_key_values=self._cache,
            use_cache=True,
            memory3=memory,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    @torch.inference_mode()
    def read(
        self,
        token_ids_BT: torch.Tensor,
        memories: Memories | None = None,
        index_BCM: torch.Tensor | None = None,
        chunk_of_token: torch.Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, MemoryContext | None]:
        """Feeds tokens and returns their logits, (B, T, words), and the memory context with the attention received.

        Args:
            token_ids_BT: the next tokens.
            memories: the references that chunks of this call read; None reads nothing.
            index_BCM: see :func:`place_memories`.
            chunk_of_token: see :func:`place_memories`; by default all tokens are of chunk 0.
            last_only: return logits of the last token only, (B, 1, words).

        Raises:
            MemoryNotReadError: memories were given but got no attention.
        """
        context = None
        if memories is not None and index_BCM is not None:
            if chunk_of_token is None:
                chunk_of_token = torch.zeros_like(token_ids_BT)
            context = place_memories(self.checkpoint, memories, index_BCM, chunk_of_token)
        hidden = self._forward(token_ids_BT, self._start + self.num_tokens, context)
        self.num_tokens += token_ids_BT.shape[1]
        if context is not None and index_BCM is not None:
            check_memories_read(context, index_BCM)
        return self.checkpoint.head(hidden[:, -1:] if last_only else hidden), context


def read_sequences(
    checkpoint: Checkpoint,
    token_ids_BT: torch.Tensor,
    memories: Memories,
    index_BCM: torch.Tensor,
    chunk_of_token: torch.Tensor,
) -> tuple[torch.Tensor, MemoryContext]:
    """Reads whole contexts in one pass without a cache, gradients included: what training and scoring use.

    Returns the last hidden states of the context tokens, (B, T, E), and the memory context.
    """
    prefix = checkpoint.prefix_token_ids.to(token_ids_BT.device)
    batch, num_tokens = token_ids_BT.shape
    input_ids = torch.cat((prefix.expand(batch, -1), token_ids_BT), 1)
    positions = torch.cat(
        (torch.arange(len(prefix)), torch.arange(checkpoint.context_start, checkpoint.context_start + num_tokens))
    ).to(token_ids_BT.device)
    nothing = torch.full((batch, len(prefix)), -1, device=token_ids_BT.device)
    context = place_memories(checkpoint, memories, index_BCM, torch.cat((nothing, chunk_of_token), 1))
    output = checkpoint.decoder(
        input_ids=input_ids,
        position_ids=positions.expand(batch, -1),
        attention_mask=torch.ones_like(input_ids),
        use_cache=False,
        memory3=context,
    )
    return output.last_hidden_state[:, len(prefix) :], context
