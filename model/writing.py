"""Writing memories: references through the memory layers, the best tokens of each head kept.

Each reference is encoded alone, behind the prefix ``<s>Reference:``; layers past the last memory layer are never run
(method section 4). The same function serves the bank (no gradient) and training (with gradient).

Shape letters: B references, L memory layers, H KV heads, T tokens, S slots, D head dimension.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model.attention import LastMemoryLayerReached, WritingTap
from model.checkpoint import Checkpoint, FingerprintState
from model.selecting import SelectionConfig, gather_slots, score_tokens, select_offsets
from schemas.errors import InputError
from schemas.protocols import Fingerprint, IntArray, WrittenMemories
from schemas.records import RecordLayout

BATCH_SIZE = 16
"""References a forward pass: on a CPU larger batches are slower, because their attention leaves the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memories:
    """Memories of B references as tensors.

    Attributes:
        keys_LBHSD: keys before RoPE.
        values_LBHSD: values.
        offsets_LBHS: place of each kept token in its reference, int64; 255 for an empty slot.
    """

    keys_LBHSD: torch.Tensor
    values_LBHSD: torch.Tensor
    offsets_LBHS: torch.Tensor


def encode_references(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, valid_BT: torch.Tensor, selection: SelectionConfig
) -> Memories:
    """Encodes a padded batch of references.

    Args:
        checkpoint: the model that writes.
        token_ids_BT: tokens without the prefix, padded on the right with any token.
        valid_BT: True for tokens of a reference.
        selection: which tokens to keep.
    """
    prefix = checkpoint.prefix_token_ids.to(token_ids_BT.device)
    num_prefix = len(prefix)
    input_ids = torch.cat((prefix.expand(len(token_ids_BT), -1), token_ids_BT), 1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    tap = WritingTap(memory_layers=checkpoint.memory_layers)
    with contextlib.suppress(LastMemoryLayerReached):
        checkpoint.decoder(
            input_ids=input_ids,
            position_ids=positions[None],
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            memory3=tap,
        )
    keys, values, offsets = [], [], []
    for query, key, value in tap.kept:
        query_BNTD = checkpoint.rotary.unrotate(query, positions)[:, :, num_prefix:]
        key_BHTD = checkpoint.rotary.unrotate(key, positions)[:, :, num_prefix:]
        query_BHGTD = query_BNTD.unflatten(1, (key.shape[1], -1))
        with torch.no_grad():
            scores = score_tokens(
                query_BHGTD, key_BHTD, valid_BT, scaling=checkpoint.attention_scaling, score=selection.score
            )
            kept = select_offsets(scores, selection.num_slots)
        keys.append(gather_slots(key_BHTD, kept))
        values.append(gather_slots(value[:, :, num_prefix:], kept))
        offsets.append(kept)
    return Memories(keys_LBHSD=torch.stack(keys), values_LBHSD=torch.stack(values), offsets_LBHS=torch.stack(offsets))


def pad_references(token_ids: Sequence[IntArray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (B, T) padded on the right with zeros, and where they are valid (B, T)."""
    lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
    padded = np.zeros((len(token_ids), int(lengths.max())), dtype=np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    valid = torch.arange(padded.shape[1], device=device) < lengths[:, None]
    return torch.from_numpy(padded).to(device), valid


class ReferenceWriter:
    """Writes memories as bytes for a bank; a :class:`schemas.protocols.MemoryWriter`.

    Attributes:
        checkpoint: the model that writes.
        selection: which tokens are kept.
        layout: shape and type of the memories it writes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: SelectionConfig | None = None,
        *,
        dtype: str = "bfloat16",
        num_threads: int | None = None,
    ) -> None:
        """Joins a model with a selection rule and the type in which key-values are stored.

        Args:
            checkpoint: the model that writes.
            selection: which tokens are kept; the paper's rule by default.
            dtype: the type in which key-values are stored.
            num_threads: threads PyTorch may use for each thread that writes, where several write at once.
        """
        self.checkpoint = checkpoint
        self._num_threads = num_threads
        self.selection = selection or SelectionConfig()
        self.layout = RecordLayout(
            num_layers=len(checkpoint.memory_layers),
            num_kv_heads=checkpoint.num_kv_heads,
            num_slots=self.selection.num_slots,
            head_dim=checkpoint.head_dim,
            dtype=dtype,
        )
        self._state = FingerprintState(checkpoint)
        self._known: tuple[Any, Fingerprint] | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """What determines the memories it writes, as the model is now; the same object as long as nothing changes."""
        state = self._state.read()
        known = self._known
        if known is None or known[0] != state:
            known = self._known = (state, self.checkpoint.make_fingerprint(self.selection, self.layout))
        return known[1]

    @torch.inference_mode()
    def write(self, token_ids: Sequence[IntArray]) -> WrittenMemories:
        """Encodes references of 1..128 tokens, each alone, in batches of similar length.

        Raises:
            InputError: a reference has no token or more than the model's references may have.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        lengths = np.array([len(ids) for ids in token_ids])
        longest = self.checkpoint.max_reference_tokens
        if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= longest):
            raise InputError(f"a reference has {lengths.min()}..{lengths.max()} tokens; it must have 1..{longest}")
        payload = np.empty((len(lengths), self.layout.payload_bytes), dtype=np.uint8)
        offsets = np.empty((len(lengths), *self.layout.offsets_shape), dtype=np.uint8)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            padded, valid = pad_references([token_ids[row] for row in rows], self.checkpoint.device)
            memories = encode_references(self.checkpoint, padded, valid, self.selection)
            key_values = torch.stack((memories.keys_LBHSD, memories.values_LBHSD), 2)  # (L, B, 2, H, S, D)
            stored = key_values.movedim(1, 0).to(getattr(torch, self.layout.dtype)).contiguous().cpu()
            payload[rows] = stored.view(torch.uint8).numpy().reshape(len(rows), -1)
            offsets[rows] = memories.offsets_LBHS.movedim(1, 0).to(torch.uint8).cpu().numpy()
        return WrittenMemories(payload=payload, offsets=offsets)
