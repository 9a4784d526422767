"""Reading memories: every 64-token chunk of a context attends to its own memories beside what came before.

Positions: the prefix ``<s>Reference:`` stands at 0.., every reference shares the 128 positions after it, the context
begins past them with its own ``<s>`` (method section 6). The prefix is ordinary context that reads no memory.

Shape letters: B batch, T context tokens, L memory layers, R distinct references, C chunks, M memories a chunk,
H KV heads, S slots a memory, D head dimension.
"""

import torch

from model.checkpoint import Checkpoint
from model.chunked_reading import MemoryContext
from model.context_cache import FIRST_TOKENS, ContextCache
from model.held_reading import HeldMemories
from model.writing import Memories
from schemas.errors import MemoryNotReadError
from schemas.records import EMPTY_SLOT

CHUNK_TOKENS = 64
"""Tokens that share their memories."""

MEMORIES_PER_CHUNK = 5
"""Memories each chunk reads."""


def rotate_memories(checkpoint: Checkpoint, memories: Memories) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys of memories at their positions, (L, R, H, S, D), and where slots hold a token, (L, R, H, S)."""
    shape = memories.keys_LBHSD.shape
    filled_LRHS = memories.offsets_LBHS != EMPTY_SLOT
    positions = memories.offsets_LBHS.masked_fill(~filled_LRHS, 0) + len(checkpoint.prefix_token_ids)
    rotaries = checkpoint.memory_rotaries
    if len(set(rotaries)) == 1:
        keys = rotaries[0].rotate_each(memories.keys_LBHSD.reshape(-1, shape[-1]), positions.reshape(-1))
        return keys.view(shape), filled_LRHS
    layers = zip(rotaries, memories.keys_LBHSD.flatten(1, 3), positions.flatten(1), strict=True)
    return torch.stack([rotary.rotate_each(keys, places) for rotary, keys, places in layers]).view(shape), filled_LRHS


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
    keys_LRHSD, filled_LRHS = rotate_memories(checkpoint, memories)
    present = index_BCM >= 0
    index = index_BCM.clamp(min=0)
    valid = filled_LRHS[:, index] & present[None, ..., None, None]
    return MemoryContext(
        memory_layers=checkpoint.memory_layers,
        keys_LBCHSD=keys_LRHSD[:, index].transpose(3, 4).flatten(4, 5),
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
    if context.attention_LBCM is not None and bool((index_BCM >= 0).any()):
        _check_attention(context.memory_layers, context.attention_LBCM.sum((1, 2, 3)))


def _check_attention(memory_layers: tuple[int, ...], received_L: torch.Tensor) -> None:
    silent = [layer for layer, received in zip(memory_layers, received_L.tolist(), strict=True) if not received > 0]
    if silent:
        raise MemoryNotReadError(
            f"memories were retrieved but layers {silent} gave them no attention; this version of transformers or this "
            "architecture does not read them"
        )


class ReadingSession:
    """Contexts that grow together, token by token or chunk by chunk, with the key-values of what they have seen.

    The stored memories are never written to: a session owns copies of what it holds.

    Attributes:
        checkpoint: the model that reads.
        num_tokens: context tokens seen so far, padding included.
        held: the memories that single tokens read, None before :meth:`hold`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int = 1,
        with_prefix: bool = True,
        num_held_slots: int = 0,
        num_expected: int = FIRST_TOKENS,
    ) -> None:
        """Starts empty contexts.

        Args:
            checkpoint: the model that reads.
            batch_size: sequences that advance together.
            with_prefix: False starts an ordinary context without the prefix, for a model run without memory.
            num_held_slots: slots of all memories that a sequence will ever hold at a time, see :meth:`hold`.
            num_expected: tokens that there is room for at first.
        """
        self.checkpoint = checkpoint
        self.num_tokens = 0
        self.held: HeldMemories | None = None
        self._batch_size = batch_size
        self._prefix = checkpoint.prefix_token_ids.to(checkpoint.device) if with_prefix else None
        self._num_prefix = len(checkpoint.prefix_token_ids) if with_prefix else 0
        self._start = checkpoint.context_start if with_prefix else 0
        self._num_held_slots = num_held_slots
        self._cache = ContextCache(
            int(checkpoint.config.num_hidden_layers),
            checkpoint.memory_layers,
            num_held_slots,
            num_expected + self._num_prefix,
        )
        # Padding stands before the prefix, so that contexts of several lengths end together.
        self._num_padding_B = torch.zeros(batch_size, dtype=torch.int64, device=checkpoint.device)
        self._has_padding = False

    def _forward(self, token_ids: torch.Tensor, memory: MemoryContext | HeldMemories | None) -> torch.Tensor:
        """Runs the decoder over the next columns; prefix and padding are columns too."""
        num_seen, num_new = self._cache.get_seq_length(), token_ids.shape[1]
        column = torch.arange(num_seen, num_seen + num_new, device=token_ids.device)
        mask = None
        if self._has_padding:
            place = column[None] - self._num_padding_B[:, None]
            everything = torch.arange(num_seen + num_new, device=token_ids.device)
            mask = (everything[None] >= self._num_padding_B[:, None]).long()
        else:
            place = column[None].expand(self._batch_size, -1)
        gap = self._start - self._num_prefix
        positions = torch.where(place < self._num_prefix, place.clamp(min=0), place + gap)
        output = self.checkpoint.decoder(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            memory3=memory,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _begin(self, token_ids_BT: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Puts the prefix between padding and context; returns the columns of the first call."""
        num_tokens = token_ids_BT.shape[1]
        if lengths is not None:
            self._num_padding_B = num_tokens - lengths.to(token_ids_BT.device)
            self._has_padding = bool((self._num_padding_B > 0).any())
        if self._prefix is None:
            return token_ids_BT
        num_prefix = len(self._prefix)
        columns = torch.nn.functional.pad(token_ids_BT, (num_prefix, 0))
        place = torch.arange(num_prefix + num_tokens, device=columns.device)[None] - self._num_padding_B[:, None]
        prefix = self._prefix[place.clamp(0, num_prefix - 1)]
        self._prefix = None
        return torch.where((place >= 0) & (place < num_prefix), prefix, columns)

    @torch.inference_mode()
    def read(
        self,
        token_ids_BT: torch.Tensor,
        memories: Memories | None = None,
        index_BCM: torch.Tensor | None = None,
        chunk_of_token: torch.Tensor | None = None,
        *,
        lengths_B: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, MemoryContext | None]:
        """Feeds tokens and returns their logits, (B, T, words), and the memory context with the attention received.

        Args:
            token_ids_BT: the next tokens.
            memories: the references that chunks of this call read; None reads nothing.
            index_BCM: see :func:`place_memories`.
            chunk_of_token: see :func:`place_memories`; by default all tokens are of chunk 0.
            lengths_B: in the first call, how many of the T tokens each context has: the last ones, those before are
                padding, whose logits mean nothing. None for all.
            last_only: return logits of the last token only, (B, 1, words).

        Raises:
            MemoryNotReadError: memories were given but got no attention.
        """
        num_tokens = token_ids_BT.shape[1]
        is_first = self._cache.get_seq_length() == 0
        if lengths_B is not None and not is_first:
            raise ValueError("lengths are for the first tokens of contexts; later ones have no padding")
        columns = self._begin(token_ids_BT, lengths_B) if is_first else token_ids_BT
        context = None
        if memories is not None and index_BCM is not None:
            if chunk_of_token is None:
                chunk_of_token = torch.zeros_like(token_ids_BT)
            if lengths_B is not None:
                place = torch.arange(num_tokens, device=token_ids_BT.device)[None]
                chunk_of_token = chunk_of_token.masked_fill(place < self._num_padding_B[:, None], -1)
            chunk_of_token = torch.nn.functional.pad(chunk_of_token, (columns.shape[1] - num_tokens, 0), value=-1)
            context = place_memories(self.checkpoint, memories, index_BCM, chunk_of_token)
        self._cache.show_slots(False)
        hidden = self._forward(columns, context)[:, -num_tokens:]
        self.num_tokens += num_tokens
        if context is not None and index_BCM is not None:
            check_memories_read(context, index_BCM)
        return self.checkpoint.head(hidden[:, -1:] if last_only else hidden), context

    @torch.inference_mode()
    def hold(self, memories: Memories, index_BM: torch.Tensor) -> None:
        """Lays out the memories that single tokens read from now on; they replace those held before.

        Args:
            memories: R distinct references.
            index_BM: which of them each sequence reads; -1 for none. M x S is the session's ``num_held_slots``.

        Raises:
            ValueError: the memories do not fill the session's slots, or nothing was read yet.
        """
        num_slots = index_BM.shape[1] * memories.offsets_LBHS.shape[-1]
        if num_slots != self._num_held_slots or not self._cache.get_seq_length():
            raise ValueError(
                f"memories of {num_slots} slots cannot be held by a session of {self._num_held_slots} that has seen "
                f"{self.num_tokens} tokens"
            )
        keys_LRHSD, filled_LRHS = rotate_memories(self.checkpoint, memories)
        index = index_BM.clamp(min=0)
        # A reference with fewer tokens than slots leaves the last ones of every layer and head empty.
        valid_BS = (filled_LRHS[0, :, 0][index] & (index_BM >= 0)[..., None]).flatten(1)
        self._cache.hold(
            keys_LRHSD[:, index].transpose(2, 3).flatten(3, 4),
            memories.values_LBHSD[:, index].transpose(2, 3).flatten(3, 4),
        )
        self.held = HeldMemories(
            memory_layers=self.checkpoint.memory_layers,
            valid_BS=None if bool(valid_BS.all()) else valid_BS,
            num_slots=num_slots,
            num_memories=index_BM.shape[1],
        )

    @torch.inference_mode()
    def step(self, token_ids_B: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each sequence, which reads the memories held, if any; returns the logits, (B, words).

        Raises:
            MemoryNotReadError: memories are held but got no attention.
        """
        held = self.held
        is_fresh = held is not None and held.weights[0] is None
        self._cache.show_slots(held is not None)
        if not self._cache.get_seq_length():
            raise ValueError("a context begins with read(), which lays out its prefix")
        hidden = self._forward(token_ids_B[:, None], held)
        self.num_tokens += 1
        if held is not None and is_fresh and (held.valid_BS is None or bool(held.valid_BS.any())):
            received = held.sum_attention()
            layers = held.memory_layers
            _check_attention(layers, torch.zeros(len(layers)) if received is None else received.sum((1, 2)))
        return self.checkpoint.head(hidden[:, -1])  # type: ignore[no-any-return]

    def rewind(self, num_tokens: int) -> None:
        """Forgets all but the first tokens of the contexts, so that they can go on in another way."""
        self._cache.rewind(num_tokens + self._num_prefix)
        self.num_tokens = min(self.num_tokens, num_tokens)


def read_sequences(
    checkpoint: Checkpoint,
    token_ids_BT: torch.Tensor,
    memories: Memories | None = None,
    index_BCM: torch.Tensor | None = None,
    chunk_of_token: torch.Tensor | None = None,
    *,
    with_prefix: bool = True,
) -> tuple[torch.Tensor, MemoryContext | None]:
    """Reads whole contexts in one pass without a cache, gradients included: what training and scoring use.

    Args:
        checkpoint: the model that reads.
        token_ids_BT: the contexts; padding stands on the right, where what comes before does not see it.
        memories: the references that chunks read; None reads nothing behind the prefix, and the rest is not looked at.
        index_BCM: see :func:`place_memories`.
        chunk_of_token: see :func:`place_memories`.
        with_prefix: False reads ordinary contexts without the prefix, for a model run without memory.

    Returns:
        The last hidden states of the context tokens, (B, T, E), and the memory context, None where nothing is read.
    """
    prefix = checkpoint.prefix_token_ids.to(token_ids_BT.device)[: None if with_prefix else 0]
    batch, num_tokens = token_ids_BT.shape
    input_ids = torch.cat((prefix.expand(batch, -1), token_ids_BT), 1)
    start = checkpoint.context_start if with_prefix else 0
    positions = torch.cat((torch.arange(len(prefix)), torch.arange(start, start + num_tokens))).to(token_ids_BT.device)
    context = None
    if memories is not None and index_BCM is not None and chunk_of_token is not None:
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
