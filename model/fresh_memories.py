"""Memories that are written when they are asked for, in forms that the bank does not hold: to compare them.

    reference ids -> tokens (bank) -> encode (:mod:`model.writing`) -> recent ones in RAM -> (codec) -> tensors

A bank holds memories of one rule and one codec. To compare rules and codecs on the same references they are written
anew here, exactly (in the model's type), and what a codec loses is put on afterwards.

Shape letters: B references, L memory layers, H KV heads, S slots, D head dimension.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.coding import KeyValueCodec
from model.selecting import SelectionConfig
from model.writing import (
    BATCH_TOKENS,
    BATCH_TOKENS_ELSEWHERE,
    Memories,
    encode_references,
    pad_references,
    split_batches,
)
from schemas.bank import Bank
from schemas.protocols import IntArray

KEPT_BYTES = 1 << 29
"""RAM for memories that were written: chunks of one text ask for the same ones."""

WriteMemories = Callable[[Sequence[str]], Memories]
"""Writes the memories of references, in their order."""


class MemorySource(Protocol):
    """Where a model that reads gets memories from."""

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of references, in the order asked for."""
        ...


def read_tokens(bank: Bank, ref_ids: Sequence[str]) -> list[IntArray]:
    """Returns the tokens of references, in their order."""
    rows = bank.read_references(ref_ids, ["token_ids"])["token_ids"].to_pylist()
    return [np.array(row, dtype=np.int32) for row in rows]


@torch.inference_mode()
def write_alone(bank: Bank, checkpoint: Checkpoint, selection: SelectionConfig, ref_ids: Sequence[str]) -> Memories:
    """Writes memories as a bank's are written: each reference by itself.

    Args:
        bank: has the tokens of the references.
        checkpoint: the model.
        selection: which tokens are kept.
        ref_ids: the references, at least one.
    """
    tokens = read_tokens(bank, ref_ids)
    lengths = np.array([len(ids) for ids in tokens])
    parts: list[Memories] = []
    order: list[int] = []
    for rows in split_batches(lengths, BATCH_TOKENS.get(checkpoint.device.type, BATCH_TOKENS_ELSEWHERE)):
        padded, valid = pad_references([tokens[row] for row in rows], checkpoint.device)
        parts.append(encode_references(checkpoint, padded, valid, selection))
        order += rows.tolist()
    return take_memories(join_memories(parts), np.argsort(order).tolist())


def join_memories(parts: Sequence[Memories]) -> Memories:
    """Returns the memories of several batches as one."""
    return Memories(
        keys_LBHSD=torch.cat([part.keys_LBHSD for part in parts], 1),
        values_LBHSD=torch.cat([part.values_LBHSD for part in parts], 1),
        offsets_LBHS=torch.cat([part.offsets_LBHS for part in parts], 1),
    )


def take_memories(memories: Memories, rows: Sequence[int]) -> Memories:
    """Returns some of the memories, in the order of ``rows``."""
    index = torch.tensor(rows, device=memories.offsets_LBHS.device)
    return Memories(
        keys_LBHSD=memories.keys_LBHSD[:, index],
        values_LBHSD=memories.values_LBHSD[:, index],
        offsets_LBHS=memories.offsets_LBHS[:, index],
    )


class FreshMemories:
    """Writes memories when they are first asked for, and keeps the most recent ones."""

    def __init__(self, write: WriteMemories, *, kept_bytes: int = KEPT_BYTES) -> None:
        """Takes what writes.

        Args:
            write: writes the memories of references.
            kept_bytes: RAM for those that were written.
        """
        self._write, self._kept_bytes = write, kept_bytes
        self._kept: OrderedDict[str, Memories] = OrderedDict()

    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of references, at least one, in the order asked for."""
        missing = [ref_id for ref_id in dict.fromkeys(ref_ids) if ref_id not in self._kept]
        if missing:
            written = self._write(missing)
            # A copy each: a view would keep all of its batch in RAM.
            self._kept |= {ref_id: take_memories(written, [row]) for row, ref_id in enumerate(missing)}
        for ref_id in ref_ids:
            self._kept.move_to_end(ref_id)
        memories = join_memories([self._kept[ref_id] for ref_id in ref_ids])
        size = sum(tensor.nbytes for tensor in vars(memories).values()) // len(ref_ids)
        while len(self._kept) * size > self._kept_bytes:
            self._kept.popitem(last=False)
        return memories


class CodedMemories:
    """Memories that went through a codec, as if they had been stored."""

    def __init__(self, source: MemorySource, codec: KeyValueCodec) -> None:
        """Puts a codec behind a source of exact memories."""
        self._source, self._codec = source, codec

    @torch.inference_mode()
    def fetch(self, ref_ids: Sequence[str]) -> Memories:
        """Returns the memories of references, in the order asked for."""
        exact = self._source.fetch(ref_ids)
        keys_BLHSD, values_BLHSD = exact.keys_LBHSD.movedim(1, 0), exact.values_LBHSD.movedim(1, 0)
        keys, values = self._codec.decode(self._codec.encode(keys_BLHSD, values_BLHSD), exact.keys_LBHSD.dtype)
        return Memories(
            keys_LBHSD=keys.movedim(0, 1), values_LBHSD=values.movedim(0, 1), offsets_LBHS=exact.offsets_LBHS
        )
