"""Writing memories: references through the memory layers, the best tokens of each head kept.

Each reference is encoded alone, behind the prefix ``<s>Reference:``; layers past the last memory layer are never run
(method section 4). The same function serves the bank (no gradient) and training (with gradient).

Shape letters: B references, L memory layers, H KV heads, T tokens, S slots, D head dimension.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import FSDPModule

from model.attention import LastMemoryLayerReached, WritingTap
from model.checkpoint import Checkpoint, FingerprintState
from model.coding import KeyValueCodec, load_codec
from model.refitting import refit_values
from model.rotary import Rotary
from model.selecting import SelectionConfig, choose_tokens, gather_slots
from schemas.codec_names import NONE
from schemas.errors import InputError
from schemas.protocols import Fingerprint, IntArray, WrittenMemories
from schemas.records import RecordLayout

BATCH_TOKENS = {"cpu": 1024}
"""Tokens a forward pass, padding included, by kind of device: on a CPU larger batches leave the cache."""

BATCH_TOKENS_ELSEWHERE = 16384
"""Tokens a forward pass on an accelerator: enough rows to fill its matrix units."""


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


@dataclasses.dataclass(kw_only=True)
class SelectingTap(WritingTap):
    """Keeps of each memory layer only the best tokens, as soon as the layer has its queries, keys and values.

    So no layer's queries outlive it, however many references a batch has.

    Attributes:
        checkpoint: the model that writes.
        selection: which tokens to keep.
        valid_BT: True for tokens of a reference; the prefix before them is not part of it.
        positions_T: positions of the tokens of the references.
        ends_inside: the forward pass ends inside the last memory layer; False leaves its end to others.
        keys: of each layer so far the kept keys before RoPE, (B, H, S, D).
        values: the kept values, (B, H, S, D).
        offsets: their places, (B, H, S).
    """

    checkpoint: Checkpoint
    selection: SelectionConfig
    valid_BT: torch.Tensor
    positions_T: torch.Tensor
    ends_inside: bool = True
    keys: list[torch.Tensor] = dataclasses.field(default_factory=list)
    values: list[torch.Tensor] = dataclasses.field(default_factory=list)
    offsets: list[torch.Tensor] = dataclasses.field(default_factory=list)
    _angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def keep(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Selects one layer's tokens.

        Raises:
            LastMemoryLayerReached: this was the last layer that is needed.
        """
        if layer in self.memory_layers:
            rotary, first = self.checkpoint.rotaries[layer], query.shape[2] - self.valid_BT.shape[1]
            if rotary not in self._angles:
                self._angles[rotary] = rotary.reverse_angles(query, self.positions_T)
            query_BNTD, key_BHTD = rotary.unrotate_pair(query[:, :, first:], key[:, :, first:], self._angles[rotary])
            query_BHGTD = query_BNTD.unflatten(1, (key.shape[1], -1))
            value_BHTD, scaling = value[:, :, first:], self.checkpoint.attention_scaling
            kept = choose_tokens(query_BHGTD, key_BHTD, self.valid_BT, scaling=scaling, selection=self.selection)
            self.keys.append(gather_slots(key_BHTD, kept))
            if self.selection.refit:
                fitted = refit_values(query_BHGTD, key_BHTD, value_BHTD, self.valid_BT, kept, scaling=scaling)
                self.values.append(fitted)
            else:
                self.values.append(gather_slots(value_BHTD, kept))
            self.offsets.append(kept)
        if self.ends_inside and layer == self.memory_layers[-1]:
            raise LastMemoryLayerReached


def read_behind_prefix(checkpoint: Checkpoint, token_ids_BT: torch.Tensor, tap: WritingTap) -> None:
    """Reads texts as references are read, behind the prefix at positions from 0 on, until a tap has all it keeps.

    Args:
        checkpoint: the model.
        token_ids_BT: tokens without the prefix.
        tap: keeps what passes through the memory layers.
    """
    prefix = checkpoint.prefix_token_ids.to(token_ids_BT.device)
    input_ids = torch.cat((prefix.expand(len(token_ids_BT), -1), token_ids_BT), 1)
    with contextlib.suppress(LastMemoryLayerReached):
        checkpoint.decoder(
            input_ids=input_ids,
            position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            memory3=tap,
        )


def encode_references(
    checkpoint: Checkpoint, token_ids_BT: torch.Tensor, valid_BT: torch.Tensor, selection: SelectionConfig
) -> Memories:
    """Encodes a padded batch of references.

    A last memory layer that is sharded (FSDP) is run to its end: behind it FSDP drops the parameters that it gathered,
    and gathers them again once the layer's output is given its gradient. So the memories depend on that output too, by
    nothing; whatever a layer computes on the way back then waits for its parameters.

    Args:
        checkpoint: the model that writes.
        token_ids_BT: tokens without the prefix, padded on the right with any token.
        valid_BT: True for tokens of a reference.
        selection: which tokens to keep.
    """
    num_prefix = len(checkpoint.prefix_token_ids)
    last_layer = checkpoint.decoder.get_submodule(f"layers.{checkpoint.memory_layers[-1]}")
    is_sharded = isinstance(last_layer, FSDPModule)
    tap = SelectingTap(
        memory_layers=checkpoint.memory_layers,
        checkpoint=checkpoint,
        selection=selection,
        valid_BT=valid_BT,
        positions_T=torch.arange(num_prefix, num_prefix + token_ids_BT.shape[1], device=token_ids_BT.device),
        ends_inside=not is_sharded,
    )
    outputs: list[torch.Tensor] = []

    def leave(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        outputs.append(output)
        raise LastMemoryLayerReached

    leaving = last_layer.register_forward_hook(leave) if is_sharded else contextlib.nullcontext()
    with leaving:
        read_behind_prefix(checkpoint, token_ids_BT, tap)
    keys_LBHSD = torch.stack(tap.keys)
    for output in outputs:
        keys_LBHSD = keys_LBHSD + output[..., :0].sum()
    return Memories(
        keys_LBHSD=keys_LBHSD,
        values_LBHSD=torch.stack(tap.values),
        offsets_LBHS=torch.stack(tap.offsets),
    )


def pad_references(token_ids: Sequence[IntArray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (B, T) padded on the right with zeros, and where they are valid (B, T)."""
    lengths = np.array([len(ids) for ids in token_ids])
    padded = np.zeros((len(token_ids), int(lengths.max())), dtype=np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    valid = np.arange(padded.shape[1]) < lengths[:, None]
    return torch.from_numpy(padded).to(device), torch.from_numpy(valid).to(device)


def split_batches(lengths: NDArray[np.int64], num_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yields rows of references of similar length, as many at a time as fit ``num_tokens`` with padding, one at least.

    Args:
        lengths: tokens of each reference, (N,).
        num_tokens: the most tokens of a batch, padding included, the prefix not.
    """
    order: NDArray[np.int64] = np.argsort(lengths, kind="stable").astype(np.int64)
    start = 0
    while start < len(order):
        longest_of = lengths[order[start:]]
        sizes = np.arange(1, len(longest_of) + 1) * longest_of
        stop = start + max(1, int(np.searchsorted(sizes, num_tokens, side="right")))
        yield order[start:stop]
        start = stop


class ReferenceWriter:
    """Writes memories as bytes for a bank; a :class:`schemas.protocols.MemoryWriter`.

    Attributes:
        checkpoint: the model that writes.
        selection: which tokens are kept.
        codec: turns key-values into the bytes of a record, and back.
        layout: shape and type of the memories it writes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: SelectionConfig | None = None,
        *,
        dtype: str = "bfloat16",
        codec: KeyValueCodec | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Joins a model with a selection rule and the form in which key-values are stored.

        Args:
            checkpoint: the model that writes.
            selection: which tokens are kept; the paper's rule by default.
            dtype: the type in which key-values are stored.
            codec: turns key-values into bytes; None stores them as they are.
            num_threads: threads PyTorch may use for each thread that writes, where several write at once.
        """
        self.checkpoint = checkpoint
        self._num_threads = num_threads
        self.selection = selection or SelectionConfig()
        shape: dict[str, Any] = {
            "num_layers": len(checkpoint.memory_layers),
            "num_kv_heads": checkpoint.num_kv_heads,
            "num_slots": self.selection.num_slots,
            "head_dim": checkpoint.head_dim,
            "dtype": dtype,
        }
        self.codec = codec or load_codec(NONE, **shape)
        self.layout = RecordLayout(**shape, codec=self.codec.name)
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
        device = self.checkpoint.device
        for rows in split_batches(lengths, BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)):
            padded, valid = pad_references([token_ids[row] for row in rows], device)
            memories = encode_references(self.checkpoint, padded, valid, self.selection)
            coded = self.codec.encode(memories.keys_LBHSD.movedim(1, 0), memories.values_LBHSD.movedim(1, 0))
            payload[rows] = coded.cpu().numpy()
            offsets[rows] = memories.offsets_LBHS.movedim(1, 0).to(torch.uint8).cpu().numpy()
        return WrittenMemories(payload=payload, offsets=offsets)
